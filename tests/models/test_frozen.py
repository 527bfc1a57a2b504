"""Frozen (arXiv:2106.13884): no published weights, so its statements: sizes, what learns, what a prefix is, and a plain language model beside."""

import hashlib
from dataclasses import replace

import pytest
import torch
from mmfast.trainers import config
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mmfast.models import build
from mmfast.nn.nfresnet import activation
from mmfast.nn.projector import TokenProjector
from mmfast.spec import Fixed, LanguageModel, NfResnet, System, Tokens

IMAGE, N = 97, 2
SYSTEM = System(
    name="test",
    encoder=NfResnet(size=32, stem=8, blocks=(1, 1), width=32),
    connector=Tokens(N),
    language=LanguageModel(weights=None, vocab=98, width=32, depth=2, heads=4, kv_heads=2, ffn=48, context=128, init=0.3),
    image=Fixed(size=32),
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = build(SYSTEM)
    for block in made.encoder.blocks:
        nn.init.ones_(block.skip_gain)
    return made.double().eval()


def ids(*pieces):
    """Token ids of numbers and "image"s."""
    return torch.tensor([[t for p in pieces for t in ([IMAGE] * N if p == "image" else [p])]])


def digest(module):
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in module.parameters())).hexdigest()


def pixels(count, seed=1):
    return torch.randn(count, 3, 32, 32, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def test_published_sizes():
    recipe = config.load_recipe("frozen")
    stage = recipe.stages[0]
    optim = stage.optim
    assert (optim.lr, optim.betas, optim.batch, optim.schedule, optim.warmup, optim.weight_decay) == (
        3e-4,
        (0.9, 0.95),
        128,
        "constant",
        0,
        0,
    )
    assert stage.train == ("encoder", "connector")
    assert (recipe.image.size, recipe.image.fit, recipe.image_tokens, recipe.image_places) == (224, "pad", 2, 2)
    with torch.device("meta"):
        built = build(replace(recipe, language=replace(recipe.language, weights=None)))
        assert built.embed_images(torch.empty(1, 3, 224, 224)).shape == (1, 2, 4096)
    assert sum(p.numel() for p in built.connector.parameters()) == 2048 * 2 * 4096 + 2 * 4096 == 16_785_408
    assert sum(p.numel() for p in built.encoder.parameters()) == 23_508_048


def test_logits_are_those_of_a_plain_causal_model_with_the_prefix_before_the_words(model):
    """The language model's weights in a stock class, called with inputs_embeds; two pictures, one inside the text."""
    c = model.language.config
    stock = LlamaForCausalLM(LlamaConfig(**{k: getattr(c, k) for k in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "rms_norm_eps",
        "max_position_embeddings",
    )})).double().eval()  # fmt: skip
    stock.load_state_dict(model.language.state_dict())
    x = pixels(2)
    grid = model.encoder.vision(x)
    prefix = (grid.mean(1) @ model.connector.linear.weight.T + model.connector.linear.bias).view(2, N, 32)
    words = stock.get_input_embeddings()(torch.tensor([1, 5, 6, 7, 8]))
    embeds = torch.cat([words[:1], prefix[0], words[1:3], prefix[1], words[3:]])[None]
    with torch.no_grad():
        got = model(ids(1, "image", 5, 6, "image", 7, 8), pixel_values=x).logits
        torch.testing.assert_close(got, stock(inputs_embeds=embeds).logits, rtol=1e-10, atol=1e-10)
    assert got.shape == (1, N * 2 + 5, 98)


def test_the_last_visual_position_predicts_the_first_word_and_pictures_are_no_targets(model):
    sequence = ids("image", 5, 6, 7)
    labels = sequence.masked_fill(sequence == IMAGE, -100)
    out = model(sequence, pixel_values=pixels(1), labels=labels)
    logp = out.logits[0].log_softmax(-1)
    want = -(logp[N - 1, 5] + logp[N, 6] + logp[N + 1, 7]) / 3
    torch.testing.assert_close(out.loss, want)


def test_training_moves_vision_and_prefix_through_a_language_model_that_stays(model):
    before, learnt = digest(model.language), model.train_only(("encoder", "connector"))
    assert {id(p) for p in learnt} == {id(p) for part in (model.encoder, model.connector) for p in part.parameters()}
    model.train()
    assert not any(m.training for m in model.language.modules())  # dropout in it would blur the prefix's gradient
    optimizer = torch.optim.AdamW(learnt, lr=1e-2)
    sequence, first = ids("image", 5, 6), None
    for _ in range(5):
        optimizer.zero_grad()
        out = model(sequence, pixel_values=pixels(1), labels=sequence.masked_fill(sequence == IMAGE, -100))
        out.loss.backward()
        assert model.connector.linear.weight.grad.any()
        assert model.encoder.vision.stem.weight.grad.any()
        assert all(p.grad is None for p in model.language.parameters())
        first = out.loss.item() if first is None else first
        optimizer.step()
    assert out.loss.item() < first
    assert digest(model.language) == before
    model.train_only(())
    model.eval()


def test_pictures_that_pool_to_nothing_give_the_bias(model):
    prefix = model.embed_images(image_states=torch.zeros(3, 16, 32, dtype=torch.double))
    assert torch.equal(prefix, model.connector.linear.bias.view(1, N, 32).expand(3, -1, -1))


def test_a_prefix_does_not_depend_on_its_place_nor_on_other_pictures(model):
    x = pixels(3)
    together, alone = model.embed_images(x), torch.cat([model.embed_images(p[None]) for p in x])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    seen = []

    def look(module, args, kwargs):
        seen.append(kwargs["inputs_embeds"].detach())

    handle = model.language.get_decoder().register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(ids("image", 5), pixel_values=x[:1])
        model(ids(1, 7, 8, "image", 5, "image", 6), pixel_values=x[[1, 0]])
    handle.remove()
    torch.testing.assert_close(seen[0][0, :N], seen[1][0, 4 + N : 4 + 2 * N], rtol=1e-12, atol=1e-12)


def test_a_shift_of_everything_changes_nothing_under_relative_positions(model):
    """What makes a prefix that was trained in front usable further on."""
    embeds = torch.cat([model.embed_images(pixels(1)), model.language.get_input_embeddings()(torch.tensor([[5, 6]]))], 1)
    places = torch.arange(N + 2)[None]
    with torch.no_grad():
        here, there = (model.language(inputs_embeds=embeds, position_ids=places + shift).logits for shift in (0, 40))
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)  # transformers keeps its rotations in fp32


def test_generation_from_interleaved_pictures_and_with_padding_on_the_left(model):
    """Greedy, with a cache: token for token what the whole sequence gives anew at each step, alone and in a batch with a longer prompt."""
    x = pixels(3)
    long, short = ids(1, "image", 5, 6, "image", 7), ids(1, "image", 8)

    def slowly(prompt, shown):
        sequence = prompt
        with torch.no_grad():
            for _ in range(6):
                sequence = torch.cat([sequence, model(sequence, pixel_values=shown).logits[:, -1:].argmax(-1)], 1)
        return sequence[:, prompt.shape[1] :]

    want = torch.cat([slowly(long, x[:2]), slowly(short, x[2:])])
    assert torch.equal(model.generate(long, pixel_values=x[:2], max_new_tokens=6), want[:1])
    gap = long.shape[1] - short.shape[1]
    padded = torch.cat([long, nn.functional.pad(short, (gap, 0), value=3)])
    mask = torch.ones_like(padded)
    mask[1, :gap] = 0
    assert torch.equal(model.generate(padded, attention_mask=mask, pixel_values=x, max_new_tokens=6), want)


def test_the_class_token_is_pooled_where_a_tower_has_one():
    projector = TokenProjector(8, 4, 3, "class")
    states = torch.randn(2, 5, 8)
    torch.testing.assert_close(projector(states), projector.linear(states[:, 0]).view(2, 3, 4))
    assert TokenProjector(8, 4, 3, "mean")(states).shape == (2, 3, 4)


@pytest.mark.parametrize("shrink", [False, True])
def test_a_prefix_begins_about_as_long_as_a_word(shrink):
    """By the sizes of the recipe: states of 2,048 channels behind the activation, words of deviation 0.02; and as the tiny form is built."""
    torch.manual_seed(0)
    recipe = config.load_recipe("frozen", tiny=shrink)
    if shrink:
        built = build(replace(recipe, language=replace(recipe.language, vocab=200)))
        projector, word = built.connector, built.language.get_input_embeddings().weight.std()
    else:
        projector, word = TokenProjector(2048, 256, 2, recipe.connector.pool, recipe.connector.init), torch.tensor(0.02)
    states = activation(torch.randn(16, 1, projector.linear.in_features))
    assert 0.5 < projector(states).std() / word < 2
    assert not projector.linear.bias.any()
    assert TokenProjector(2048, 256, 2).linear.bias.any()  # torch's own


def test_controls_are_options(tmp_path):
    def changed(*words, tiny=False):
        recipe, problems = config.layered("frozen", tiny=tiny, rest=words)
        assert problems == []
        assert config.check(recipe) == []
        return recipe

    blind = changed("--stages.captions.data.blind", "true", tiny=True)
    assert [stage.data.blind for stage in blind.stages] == [False, True]
    finetuned = changed("--stages.captions.train", "[encoder, connector, language]", "--stages.captions.optim.lr", "1e-5")
    assert (finetuned.stages[0].train, finetuned.stages[0].optim.lr) == (("encoder", "connector", "language"), 1e-5)
    scratch = changed(
        "--stages.captions.train", "[encoder, connector, language]", "--language.weights", "null", "--language.words", "huggyllama/llama-7b"
    )  # fmt: skip
    assert (scratch.language.weights, scratch.language.words) == (None, "huggyllama/llama-7b")
    recipe, problems = config.layered("frozen", rest=["--encoder.width", "100"])
    assert any(sentence.startswith("encoder.width: 100 is not a multiple of") for sentence in [*problems, *config.check(recipe)])


def test_towers_that_are_cut_to_pieces_are_refused():
    with pytest.raises(ValueError, match=r"encoder.size: 100 is not a multiple of encoder.patch 8"):
        build(replace(SYSTEM, encoder=replace(SYSTEM.encoder, size=100), image=Fixed(size=100)))
    with pytest.raises(ValueError, match=r"connector\.pool"):
        build(replace(SYSTEM, connector=Tokens(2, pool="class")))
