"""FROMAGe: published counts and names, interleaved generation with retrieval, the index, the likelihood of a prompt; against the formulas."""

import json
from dataclasses import replace

import pytest
import torch
from mmfast.trainers.config import load_recipe
from transformers import OPTConfig, OPTForCausalLM

from mmfast import spec
from mmfast.models import build, fromage, load_fromage, retrieval, save_fromage
from mmfast.models.generate import Reading
from mmfast.models.tokenizer import word_tokenizer

WORDS = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>", *"abcdefghijklmnop")
SYSTEM = spec.System(
    "test",
    encoder=spec.Clip(weights=None, width=32, depth=3, heads=2, ffn=48, patch=8, size=16, layer=-1, keep_class_token=True, post_norm=True),
    connector=spec.Tokens(tokens=1, pool="class"),
    fusion=spec.Retrieval(shared=8),
    language=spec.LanguageModel(
        family="opt", weights=None, vocab=0, width=24, depth=2, heads=2, kv_heads=2, ffn=40, context=64, init=0.3, tied=True
    ),
    image=spec.Fixed(size=16),
)


def made(seed=0, tokens=1, layers=(-1,)):
    torch.manual_seed(seed)
    tokenizer = word_tokenizer(WORDS, SYSTEM.added_tokens)
    system = replace(SYSTEM, connector=replace(SYSTEM.connector, tokens=tokens), fusion=replace(SYSTEM.fusion, layers=layers))
    return build(system, tokenizer=tokenizer).eval(), tokenizer


def picture(seed):
    return torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------- what is published


@pytest.mark.parametrize(("tokens", "trained"), [(1, 5_513_729), (4, 18_108_929)])
def test_published_counts(tokens, trained):
    from mmfast.trainers.recipes.architectures.fromage import RECIPE

    system = replace(
        RECIPE, encoder=replace(RECIPE.encoder, weights=None), language=replace(RECIPE.language, weights=None),
        connector=replace(RECIPE.connector, tokens=tokens),
    )  # fmt: skip
    with torch.device("meta"):
        model = build(system)
    learns = model.train_only(RECIPE.stages[0].train)
    partly = {id(p) for p in model.partly_trained()}
    assert sum(p.numel() for p in learns if id(p) not in partly) + len(model.new_tokens) * 4096 == trained
    assert len(partly) == 1, "the head is tied to the embeddings"
    state = fromage.fromage_state(model)
    assert sum(t.numel() for t in state.values()) == trained
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        "model.logit_scale": (),
        "model.text_hidden_fcs.0.0.weight": (256, 4096),
        "model.text_hidden_fcs.0.0.bias": (256,),
        "model.visual_embeddings.weight": (4096 * tokens, 1024),
        "model.visual_embeddings.bias": (4096 * tokens,),
        "model.visual_fc.weight": (256, 1024),
        "model.visual_fc.bias": (256,),
        "ret_input_embeddings.weight": (1, 4096),
    }


def test_published_ids(tmp_path):
    """OPT's tokenizer has 50,265 pieces and its matrix 50,272 rows: [RET] is 50266, behind the picture's token, and takes a row that is there. None is
    added and none dropped (the release cuts the matrix to 50,267), so every row keeps what was learnt."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from mmfast.models import tokenizer_for

    pieces = ["<s>", "<pad>", "</s>", "<unk>", *"abcd"]
    inner = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces + [f"piece{i}" for i in range(8, 50_265)])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    sizes = dict(hidden_size=8, word_embed_proj_dim=8, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64)
    theirs = OPTForCausalLM(OPTConfig(vocab_size=50_272, **sizes))
    theirs.save_pretrained(tmp_path)
    system = replace(SYSTEM, language=spec.LanguageModel(weights=str(tmp_path)))
    tokenizer = tokenizer_for(system)
    model = build(system, tokenizer=tokenizer)
    assert (len(tokenizer), model.image_token, model.new_tokens) == (50_267, 50_265, (50_266,))
    assert torch.equal(model.language.get_input_embeddings().weight, theirs.get_input_embeddings().weight)
    assert torch.equal(fromage.fromage_state(model)["ret_input_embeddings.weight"], theirs.get_input_embeddings().weight[50_266:50_267])
    save_fromage(model, tmp_path / "saved")
    assert fromage.read_args(tmp_path / "saved")["retrieval_token_idx"] == 50_266
    ids, _ = retrieval.encode(model, tokenizer, [picture(0), "a b [RET]"])
    assert ids.tolist() == [[50_265, 2, 4, 5, 50_266]]  # OPT's beginning token is </s>, 2


@pytest.mark.parametrize("layers", [(-1,), (-1, 1)])
def test_published_files_both_ways(tmp_path, layers):
    (model, _), (other, _) = made(1, layers=layers), made(2, layers=layers)
    other.language.load_state_dict(model.language.state_dict())
    other.encoder.load_state_dict(model.encoder.state_dict())
    with torch.no_grad():
        other.language.get_input_embeddings().weight[model.new_tokens[0]] = 0
    save_fromage(model, tmp_path)
    saved = torch.load(tmp_path / "pretrained_ckpt.pth.tar", weights_only=True)
    assert saved.keys() == {"state_dict"}
    maps = {name for name in saved["state_dict"] if "hidden" in name}
    assert maps == {f"model.text_hidden_fcs.{i}.0.{name}" for i in range(len(layers)) for name in ("weight", "bias")}
    load_fromage(other, tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    args = json.loads((tmp_path / "model_args.json").read_text())
    assert args["retrieval_token_idx"] == model.new_tokens[0]
    assert (args["n_visual_tokens"], args["shared_emb_dim"], args["text_emb_layers"]) == (1, 8, list(layers))
    assert fromage.system_of(args, SYSTEM).fusion == model.system.fusion


def test_checkpoints_of_other_makers():
    (model, _), (other, _) = made(1), made(2)
    state = fromage.fromage_state(model)
    whole = {f"module.{k}": v for k, v in state.items() if k != "ret_input_embeddings.weight"}
    table = model.language.get_input_embeddings().weight.detach()
    whole |= {"module.model.input_embeddings.weight": table, "module.model.lm.model.decoder.embed_tokens.weight": table}
    fromage.load_fromage_state(other, whole)
    assert torch.equal(other.language.get_input_embeddings().weight[-1], table[-1])
    assert torch.equal(other.fusion.visual_fc.weight, model.fusion.visual_fc.weight)
    for change, sentence in (
        ({"model.visual_fc.bias": torch.zeros(3)}, r"model.visual_fc.bias: expected \[8\], got \[3\]"),
        ({"model.gate": torch.zeros(3)}, "holds model.gate, which is no weight of FROMAGe"),
    ):
        with pytest.raises(ValueError, match=sentence):
            fromage.load_fromage_state(other, state | change)
    with pytest.raises(ValueError, match=r"holds no model.logit_scale"):
        fromage.load_fromage_state(other, {k: v for k, v in state.items() if "scale" not in k})
    with pytest.raises(ValueError, match=r"its fusion is Prefix; FROMAGe's is Retrieval"):
        fromage.fromage_state(build(replace(SYSTEM, fusion=spec.Prefix(), language=replace(SYSTEM.language, vocab=30))))


def test_the_arguments_of_a_release_are_a_system():
    args = {
        "opt_version": "facebook/opt-1.3b",
        "visual_encoder": "openai/clip-vit-base-patch16",
        "n_visual_tokens": 4,
        "shared_emb_dim": 128,
    }
    leftovers = {"input_prompt": "A picture of", "tunable_prompt_length": 0, "pretrained_visual": True}
    system = fromage.system_of(args | leftovers, SYSTEM)
    assert (system.language.weights, system.encoder.weights) == ("facebook/opt-1.3b", "openai/clip-vit-base-patch16")
    assert (system.connector.tokens, system.fusion.shared) == (4, 128)
    assert system.fusion.layers == (-1,)
    assert fromage.system_of({"text_emb_layers": [0, -1]}, SYSTEM).fusion.layers == (0, -1)
    recipe = load_recipe("fromage")
    for tokens, places in ((1, 25), (4, 28)):  # 24 tokens of text
        assert fromage.system_of({"n_visual_tokens": tokens}, recipe).stages[0].max_length == places


@pytest.mark.parametrize("layers", [(), (3,), (-4,), (-1, 2), (0, 1, 0)])
def test_layers_that_are_not_there(layers):
    with pytest.raises(ValueError) as error:
        made(layers=layers)
    assert str(error.value) == f"test: fusion.layers: expected some of -3 to 2, no state twice, got {list(layers)}"


# --------------------------------------------------------------------------------------------------------- what is computed


def stock(model):
    """The language model as transformers builds it, and its embeddings."""
    config = model.language.config
    plain = OPTForCausalLM(OPTConfig(**config.to_diff_dict())).eval()
    plain.load_state_dict(model.language.state_dict())
    return plain, plain.get_input_embeddings()


@pytest.mark.parametrize(("tokens", "layers"), [(1, (-1,)), (4, (-1,)), (1, (-1, 1)), (4, (0, 2)), (1, (1,))])
def test_the_whole_against_transformers(tokens, layers):
    """Logits of [picture, text], and the score of a text with a picture, from CLIP's pooler_output and OPT's hidden states alone."""
    (model, tokenizer), seen = made(tokens=tokens, layers=layers), torch.stack([picture(0), picture(1)])
    plain, embed = stock(model)
    pooled = model.encoder.vision(seen).pooler_output
    ids, images = retrieval.encode(model, tokenizer, [seen[0], "a b c", seen[1], "d [RET]"])
    assert ids[0].tolist() == [*[4] * tokens, 1, 5, 6, 7, *[4] * tokens, 8, 21]
    prefix = model.connector.linear(pooled).view(2, tokens, -1)
    mixed = torch.cat([prefix[0], embed(ids[0, tokens : tokens + 4]), prefix[1], embed(ids[0, -2:])])[None]
    want = plain(inputs_embeds=mixed, output_hidden_states=True)
    torch.testing.assert_close(model(ids, **images).logits, want.logits, atol=1e-5, rtol=1e-5)
    texts, picture_side = model.fusion.text_hidden_fcs, model.fusion.visual_fc
    t = sum(text[0](want.hidden_states[layer][0, -1]) for layer, text in zip(layers, texts, strict=True))
    u = picture_side(pooled)
    cosine = (u @ t) / u.norm(dim=1) / t.norm()
    index = retrieval.Index.of(model, [(["x"], seen[:1]), (["y"], seen[1:])])
    torch.testing.assert_close(index.embeddings, u)
    hidden, states = model.fusion.read(model, ids, (0, -1), **images)
    assert torch.equal(hidden, model.hidden(ids, **images))
    assert layers != (-1,) or torch.equal(states, hidden[0, -1])
    got = index.scores(model, states)
    (_, found) = retrieval.generate(model, tokenizer, [seen[0], "a b c", seen[1], "d [RET]"], index, num_words=0, max_img_per_ret=2)
    assert dict(found) == pytest.approx(dict(zip("xy", got.tolist(), strict=True)))
    torch.testing.assert_close(got, cosine / 0.07, atol=1e-4, rtol=1e-4)
    line = torch.log_softmax(want.logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
    scored = ids[0, 1:] != 4
    assert retrieval.log_likelihood(model, tokenizer, [seen[0], "a b c", seen[1], "d [RET]"]) == pytest.approx(
        line[scored].mean().item(), abs=1e-5
    )


def slow(model, ids, embeds, count, rule):
    """Greedy, every step anew without a cache, as the released code does it."""
    out = []
    for number in range(count):
        line = torch.cat([ids, torch.tensor([out], dtype=torch.long)], 1)
        logits = model(line, image_embeds=embeds).logits[0, -1]
        out.append(int(rule(number, logits).argmax()))
    return out


def test_generation_is_that_of_every_step_anew():
    for seed in range(3):
        model, tokenizer = made(seed)
        ids, images = retrieval.encode(model, tokenizer, [picture(seed), "a b"])
        embeds, ret = model.embed_images(**images), model.new_tokens[0]

        def rule(number, logits, ret=ret):
            logits = logits.clone()
            logits[ret] = logits[ret] * 1.3 + 2 if number >= 2 else -torch.inf
            return logits

        want = slow(model, ids, embeds, 9, rule)
        said = retrieval.generate(
            model, tokenizer, [picture(seed), "a b"], num_words=9, ret_scale_factor=1.3, ret_bias=2, min_word_tokens=2
        )
        text = " ".join(part.replace(" [RET]", "") for part in said)
        assert text.split() == [t for t in tokenizer.convert_ids_to_tokens(want) if t not in tokenizer.all_special_tokens]


def index_of(model, count=6):
    return retrieval.Index.of(model, [([f"{i}.png" for i in range(count)], torch.stack([picture(100 + i) for i in range(count)]))])


def test_retrieval_for_tokens_of_the_prompt():
    """num_words=0, pictures in front: [RET] is read at its place in the sequence, not among the text's tokens."""
    model, tokenizer = made(tokens=4)
    index, prompts = index_of(model), [picture(1), "a b [RET]", picture(2), "c [RET]"]
    found = retrieval.generate(model, tokenizer, prompts, index, num_words=0, max_num_rets=2, max_img_per_ret=2)
    assert [type(part) for part in found] == [str, list, str, list]
    assert (found[0], found[2]) == ("a b [RET]", "c [RET]")
    ids, images = retrieval.encode(model, tokenizer, prompts)
    places = (ids[0] == model.new_tokens[0]).nonzero().flatten().tolist()
    assert places == [7, 13]
    scores = index.scores(model, model.hidden(ids, **images)[0, places])
    first = scores[0].topk(2)
    assert [name for name, _ in found[1]] == [f"{i}.png" for i in first.indices.tolist()]
    assert [score for _, score in found[1]] == pytest.approx(first.values.tolist(), abs=1e-5)
    scores[1, first.indices] = -1000  # those that were given are not given again
    assert [name for name, _ in found[3]] == [f"{i}.png" for i in scores[1].topk(2).indices.tolist()]
    one = retrieval.generate(model, tokenizer, prompts, index, num_words=0)
    assert one[0] == "a b [RET]"
    assert [name for name, _ in one[1]] == [found[1][0][0]]
    assert len(one) == 3


def test_the_last_token_is_read_too():
    model, tokenizer = made()
    index = index_of(model)
    said = retrieval.generate(model, tokenizer, ["a b"], index, num_words=3, ret_bias=1e4, min_word_tokens=2)
    assert said[0].endswith(" [RET]")
    assert len(said) == 2, "[RET] ends it"
    ids, _ = retrieval.encode(model, tokenizer, ["a b"])
    line = torch.cat([ids, torch.tensor([tokenizer.convert_tokens_to_ids(said[0].split())])], 1)
    best = index.scores(model, model.hidden(line)[0, -1]).max()
    assert said[1][0][1] == pytest.approx(best.item(), abs=1e-5)


def test_a_factor_lowers_negative_logits_and_a_bias_does_not():
    model, tokenizer = made()
    with torch.no_grad():  # every logit of [RET] is negative: against the norm's constant state
        model.language.get_input_embeddings().weight[model.new_tokens[0]] = -model.language.get_decoder().final_layer_norm.bias.fill_(3.0)
    options = dict(num_words=4, min_word_tokens=0)
    for factor in (1.0, 100.0):
        assert "[RET]" not in " ".join(retrieval.generate(model, tokenizer, ["a"], ret_scale_factor=factor, **options))
    assert "[RET]" in retrieval.generate(model, tokenizer, ["a"], ret_bias=1e4, **options)[0]


def test_words_behind_a_line_break_are_dropped(monkeypatch):
    model, tokenizer = made()
    whole = retrieval.generate(model, tokenizer, ["a"], num_words=8, min_word_tokens=8)[0].split()
    at = next(i for i in range(1, 8) if whole[i] not in whole[:i])
    broken = tokenizer.convert_tokens_to_ids(whole[at])

    class Breaks:
        def __call__(self, text, **kwargs):
            ids = tokenizer(text, **kwargs)["input_ids"]
            return {"input_ids": [*ids, broken] if text.endswith("\n") else ids}

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    assert retrieval.generate(model, Breaks(), ["a"], num_words=8, min_word_tokens=8)[0].split() == whole[:at]


def test_wrong_wishes():
    model, tokenizer = made()
    with pytest.raises(ValueError, match=r"temperature 0 takes the likeliest token, so top_p must be 1, got 0.5"):
        retrieval.generate(model, tokenizer, ["a"], top_p=0.5)
    with pytest.raises(ValueError, match="of at least 0"):
        retrieval.generate(model, tokenizer, ["a"], num_words=-1)


def test_the_beginning_token_stands_once_or_each_time():
    model, tokenizer = made()
    assert retrieval.encode(model, tokenizer, ["a", "b"])[0].tolist() == [[1, 5, 6]]
    assert retrieval.encode(model, tokenizer, ["a", "b"], begin_each=True)[0].tolist() == [[1, 5, 1, 6]]


def test_an_index_in_a_file(tmp_path):
    index = index_of(made()[0])
    index.save(tmp_path / "index.safetensors")
    again = retrieval.Index.load(tmp_path / "index.safetensors")
    assert again.names == index.names
    assert torch.equal(again.embeddings, index.embeddings)
    torch.save({"paths": index.names, "embeddings": index.embeddings}, tmp_path / "index.pkl")
    with pytest.raises(ValueError, match=r"index.pkl is no index of pictures in safetensors \(a pickle is not read, it can run code\)"):
        retrieval.Index.load(tmp_path / "index.pkl")


@pytest.mark.parametrize("batch", [1, 2, 20])
def test_losses_of_answers_token_by_token(batch):
    """Each answer on its own behind picture and prompt, through transformers' class; the second loss is not shifted, as in the released script."""
    model, tokenizer = made(tokens=4)
    plain, embed = stock(model)
    prompt, images = retrieval.encode(model, tokenizer, [picture(3), "a b c"])
    answers = [[1, 7, 8], [1], [1, 9, 10, 11, 12], [1, 7]]
    shifted, unshifted = retrieval.answer_losses(model, prompt, answers, batch=batch, **images)
    prefix = model.connector.linear(model.encoder.vision(picture(3)[None]).pooler_output).view(4, -1)
    with torch.no_grad():
        for number, answer in enumerate(answers):
            line = torch.cat([prefix, embed(prompt[0, 4:]), embed(torch.tensor(answer))])[None]
            logps = plain(inputs_embeds=line).logits[0].log_softmax(-1)
            at = range(prompt.shape[1], prompt.shape[1] + len(answer))
            assert shifted[number].item() == pytest.approx(-sum(logps[i - 1, t].item() for i, t in zip(at, answer, strict=True)), abs=1e-4)
            assert unshifted[number].item() == pytest.approx(-sum(logps[i, t].item() for i, t in zip(at, answer, strict=True)), abs=1e-4)
    with pytest.raises(ValueError, match="at least one answer, each of at least one token"):
        retrieval.answer_losses(model, prompt, [[1], []], **images)
    with pytest.raises(ValueError, match="padded on the left go on token by token"):
        Reading(model, prompt, torch.ones_like(prompt), **images).logits_of(prompt)
