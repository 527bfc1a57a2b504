"""T5 as the language model: BLIP-2 and InstructBLIP of transformers on tiny random checkpoints, both ways; rows that are cut in two."""

from dataclasses import replace

import pytest
import torch
from blip import IMAGE, WORDS, drawn, saved, shapes, sizes
from torch.nn.functional import cross_entropy
from transformers import Blip2Config, Blip2ForConditionalGeneration, InstructBlipConfig, InstructBlipForConditionalGeneration

from mmfast import spec
from mmfast.data.chat import Encoder
from mmfast.models import build, from_pretrained, load_lavis, save_lavis, tokenizer_for
from mmfast.models.encoder_decoder import cuts, steps
from mmfast.models.generate import option_logps
from mmfast.models.pretrained import resize_embeddings

PAD, END = 0, 2
KINDS = {
    "blip2": (Blip2ForConditionalGeneration, Blip2Config),
    "instructblip": (InstructBlipForConditionalGeneration, InstructBlipConfig),
}


def stock(kind, *, seed=0, queries=4, language="flan", **choices):
    made, config = KINDS[kind]
    parts = sizes(pad=PAD, language=language, **choices)
    return drawn(made, config(**parts, num_query_tokens=queries, image_token_index=IMAGE), seed)


def filled(lengths, low, high, g, pad="right", before=(), fill=PAD):
    made = [[*before, *torch.randint(low, high, (n,), generator=g).tolist()] for n in lengths]
    short = [[fill] * (max(map(len, made)) - len(row)) for row in made]
    return torch.tensor([row + f if pad == "right" else f + row for row, f in zip(made, short, strict=True)])


def batch(kind, queries=4, size=28, seed=0, pad="right"):
    """Three rows of unlike length, as the stock processor lays them out: pictures and a prompt that is read, and labels of what is said."""
    g = torch.Generator().manual_seed(seed)
    ids = filled((6, 3, 5), 3, 55, g, pad, [IMAGE] * queries)
    asked = filled((2, 5, 4), 1, WORDS, g)
    more = {"qformer_input_ids": asked, "qformer_attention_mask": (asked != PAD).long()} if kind == "instructblip" else {}
    return {
        "input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": torch.randn(3, 3, size, size, generator=g),
        "labels": filled((4, 7, 2), 3, 55, g, fill=-100), **more,
    }  # fmt: skip


CASES = [{}, {"language": "t5"}, {"seed": 7}, {"size": 42, "queries": 3, "seed": 3}, {"tower": 36, "language": "t5", "seed": 5}]
named = pytest.mark.parametrize("case", CASES, ids=lambda k: "-".join(f"{a}={b}" for a, b in k.items()) or "flan")
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@named
@pytest.mark.parametrize("pad", ["right", "left"])
def test_logits_and_loss_equal_the_stock_class_both_ways(kind, case, pad, tmp_path):
    theirs = stock(kind, **case)
    ours, inputs = from_pretrained(saved(theirs, tmp_path / "a")), batch(kind, **shapes(case), pad=pad, seed=case.get("seed", 0))
    assert ours.system.language.encodes
    assert ours.system.language.tied == (case.get("language") == "t5")
    ours.save_pretrained(tmp_path / "b")
    back = KINDS[kind][0].from_pretrained(tmp_path / "b").eval()
    with torch.no_grad():
        want, got, again = (model(**inputs) for model in (theirs, ours, back))
        first = ours(**{**inputs, "labels": None}).logits
    assert want.logits.std() > 0.2, "a checkpoint that says nothing proves nothing"
    for other in (got, again):
        torch.testing.assert_close(other.logits, want.logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(other.loss, want.loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(first, want.logits[:, :1], atol=1e-5, rtol=0)
    assert {n: p.shape for n, p in back.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}


@kinds
@named
@pytest.mark.parametrize("pad", ["right", "left"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 4, "length_penalty": -1.0}, {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}],
    ids=["greedy", "beams", "short", "unrepeating"],
)
def test_tokens_equal_the_stock_class(kind, case, pad, options, tmp_path):
    theirs = stock(kind, **case)
    ours, inputs = from_pretrained(saved(theirs, tmp_path)), batch(kind, **shapes(case), pad=pad, seed=3)
    inputs.pop("labels")
    want = theirs.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=END, eos_token_id=END, **options)[:, 1:]
    names = {"num_beams": "beams", "no_repeat_ngram_size": "no_repeat"}
    got = ours.generate(**inputs, end=END, max_new_tokens=12, **{names.get(name, name): value for name, value in options.items()})
    assert got.tolist() == want[:, : got.shape[1]].tolist()
    assert (want[:, got.shape[1] :] == END).all()


@kinds
def test_what_is_said_varies(kind, tmp_path):
    """The tokens above are not those of a model that says one thing whatever it sees."""
    ours, inputs = from_pretrained(saved(stock(kind), tmp_path)), batch(kind, seed=3)
    inputs.pop("labels")
    said = ours.generate(**inputs, end=END, max_new_tokens=12)
    assert len(set(said.flatten().tolist())) > 5
    other = ours.generate(**{**inputs, "pixel_values": inputs["pixel_values"].flip(0)}, end=END, max_new_tokens=12)
    assert said.tolist() != other.tolist()


# ------------------------------------------------------------------------------------------------------- rows that are cut

LANGUAGE = spec.LanguageModel(family="t5", weights=None, vocab=60, width=16, depth=2, heads=2, kv_heads=2, ffn=32)
SYSTEM = spec.System(
    "test",
    encoder=spec.Eva(weights=None, width=24, depth=2, heads=3, ffn=48, patch=14, size=28),
    connector=spec.QFormer(tokens=4, width=32, depth=3, heads=4, ffn=64, vocab=37, positions=64, shared=8, dropout=0.0),
    language=LANGUAGE,
    image=spec.Fixed(size=28),
)


def rows(model):
    """A picture, a prompt and an answer of three lengths each, padded; one row has no answer."""
    g = torch.Generator().manual_seed(1)
    parts = [
        (torch.randint(3, 55, (n,), generator=g), torch.randint(3, 55, (m,), generator=g)) for n, m in ((2, 3), (0, 6), (5, 1), (3, 0))
    ]
    ids, labels = torch.full((4, 12), PAD), torch.full((4, 12), -100)
    for i, (prompt, answer) in enumerate(parts):
        row = torch.cat([torch.full((4,), model.image_token), prompt, answer])
        ids[i, : len(row)] = row
        labels[i, len(row) - len(answer) : len(row)] = answer
    return ids, labels, parts, torch.randn(4, 3, 28, 28, generator=g)


def test_rows_are_cut_before_their_first_label():
    labels = torch.tensor([[-100, -100, 5, -100], [-100, 5, 6, 7], [7, 5, -100, -100], [-100] * 4, [7, -100, -100, 5]])
    assert cuts(labels).tolist() == [2, 1, 1, 4, 3]
    assert [steps(row[None], cuts(row[None])) for row in labels] == [1, 3, 1, 1, 1]
    assert steps(labels, cuts(labels)) == 3


def test_padding_costs_no_steps_and_changes_nothing():
    """A long prompt with a short answer beside a short prompt: the decoder says what is learnt, not all that is as wide as the batch."""
    torch.manual_seed(0)
    model = build(SYSTEM).eval()
    ids, labels, _, pixels = rows(model)
    ids, labels = torch.nn.functional.pad(ids, (0, 20), value=PAD), torch.nn.functional.pad(labels, (0, 20), value=-100)
    said = []
    handle = model.language.decoder.register_forward_hook(lambda m, _, kwargs, out: said.append(out[0].shape[1]), with_kwargs=True)
    with torch.no_grad():
        wide = model.hidden(ids, labels=labels, pixel_values=pixels)
        narrow = model.hidden(ids[:, :12], labels=labels[:, :12], pixel_values=pixels)
    handle.remove()
    assert said == [6, 6]
    torch.testing.assert_close(wide[:3, :12], narrow[:3], atol=1e-6, rtol=0)


def test_rows_end_to_end_are_refused():
    model = build(SYSTEM).eval()
    with pytest.raises(ValueError, match="position_ids keep rows apart that lie end to end, which t5 cannot; leave packing off"):
        model.hidden(torch.tensor([[7, 8, 7, 8]]), labels=torch.tensor([[-100, 8, -100, 8]]), position_ids=torch.tensor([[0, 1, 0, 1]]))


def test_states_of_cut_rows_are_the_stock_model_s_one_at_a_time():
    torch.manual_seed(0)
    model = build(SYSTEM).eval()
    ids, labels, parts, pixels = rows(model)
    head = model.language.get_output_embeddings()
    with torch.no_grad():
        logits = head(model.hidden(ids, labels=labels, pixel_values=pixels))
        seen = model.connector(model.encode(pixels))
        for i, (prompt, answer) in enumerate(parts[:3]):
            read = torch.cat([seen[i], model.language.shared(prompt)])[None]
            want = model.language(inputs_embeds=read, labels=answer[None]).logits[0]
            first = 4 + len(prompt) - 1  # a state stands before the token that it predicts
            torch.testing.assert_close(logits[i, first : first + len(answer)], want, atol=1e-5, rtol=0)
            assert (logits[i, :first] == 0).all()
        assert (logits[3, :-1] == 0).all()


def test_a_row_s_gradients_are_the_stock_model_s():
    """All of the loss's gradient reaches the connector, and none the language model that is frozen."""
    torch.manual_seed(0)
    model = build(SYSTEM)
    trained = {id(p) for p in model.train_only(("connector",))}
    ids, labels, parts, pixels = rows(model)
    logits = model.language.get_output_embeddings()(model.hidden(ids, labels=labels, pixel_values=pixels))
    cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").backward()
    reached = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {id(model.get_parameter(name)) for name in reached} == trained
    assert {name.partition(".")[0] for name in reached} == {"connector"}
    model.zero_grad()
    for i, (prompt, answer) in enumerate(parts[:3]):
        seen = model.connector(model.encode(pixels[i : i + 1]))[0]
        read = torch.cat([seen, model.language.shared(prompt)])[None]
        (model.language(inputs_embeds=read, labels=answer[None]).loss * len(answer)).backward()
    for name, grad in reached.items():
        torch.testing.assert_close(grad, model.get_parameter(name).grad, atol=1e-5, rtol=1e-4, msg=name)


def test_recomputed_activations_change_nothing():
    torch.manual_seed(0)
    model = build(SYSTEM)
    model.train_only(("connector",))
    ids, labels, _, pixels = rows(model)

    def gradient():
        model.zero_grad()
        model.train()
        model.hidden(ids, labels=labels, pixel_values=pixels).square().sum().backward()
        return model.connector.query_tokens.grad.clone()

    plain = gradient()
    model.checkpoint_activations()
    torch.testing.assert_close(gradient(), plain, atol=1e-6, rtol=1e-5)


def test_a_picture_behind_the_first_label_is_refused():
    model = build(SYSTEM).eval()
    ids, labels, _, pixels = rows(model)
    labels[0, 1] = 7
    with pytest.raises(
        ValueError, match=r"a picture stands behind the first word that is learnt, and t5 reads pictures in its encoder alone"
    ):
        model.hidden(ids, labels=labels, pixel_values=pixels)


def test_options_are_what_forward_says_of_them():
    torch.manual_seed(0)
    model = build(SYSTEM).eval()
    ids, pixels = torch.tensor([[model.image_token] * 4 + [7, 8]]), torch.randn(1, 3, 28, 28)
    options = [[5], [6, 9], [6, 4, 11]]
    got = option_logps(model, ids, options, pixel_values=pixels)[0]
    for option, logp in zip(options, got, strict=True):
        with torch.no_grad():
            said = model(ids, pixel_values=pixels, labels=torch.tensor([option])).logits[0].log_softmax(-1)
        torch.testing.assert_close(logp, said[torch.arange(len(option)), option].sum(), atol=1e-5, rtol=0)


def test_a_head_of_its_own_stays_so_when_words_are_added():
    """transformers ties any T5's head to its embeddings when it resizes them."""
    torch.manual_seed(0)
    language = build(SYSTEM).language
    head, table = (weight.detach().clone() for weight in (language.lm_head.weight, language.shared.weight))
    assert not torch.equal(head, table)
    resize_embeddings(language, 63)
    for weight, old in ((language.lm_head.weight, head), (language.shared.weight, table)):
        assert torch.equal(weight[:60], old)
        torch.testing.assert_close(weight[60:], old.mean(0).expand(3, -1))
    tied = build(replace(SYSTEM, language=replace(LANGUAGE, tied=True))).language
    resize_embeddings(tied, 63)
    assert tied.lm_head.weight is tied.shared.weight


# ------------------------------------------------------------------------------------------------------ files, and sizes


def test_lavis_s_names_there_and_back(tmp_path):
    torch.manual_seed(0)
    one, two = build(SYSTEM), build(SYSTEM)
    save_lavis(one, tmp_path / "a.pth", "t5_proj")
    held = torch.load(tmp_path / "a.pth", weights_only=True)
    assert "t5_proj.weight" in held["model"]
    held["model"] |= {f"t5_model.{name}": value for name, value in one.language.state_dict().items()}
    torch.save(held, tmp_path / "b.pth")
    one.connector.ln_vision.eps = 1e-5  # LAVIS's
    ids, labels, _, pixels = rows(one)
    for file, same in (("a.pth", False), ("b.pth", True)):
        load_lavis(two, tmp_path / file)
        with torch.no_grad():
            seen, other = (model.connector(model.encode(pixels)) for model in (one, two))
            got, want = (model.hidden(ids, labels=labels, image_embeds=seen) for model in (two, one))
        assert torch.equal(seen, other)
        assert torch.equal(got, want) == same
    with pytest.raises(ValueError, match=r"b\.pth: t5_model\.shared\.weight: expected \[61, 16\], got \[60, 16\]"):
        load_lavis(build(replace(SYSTEM, language=replace(LANGUAGE, vocab=61))), tmp_path / "b.pth")


@pytest.mark.parametrize(
    ("width", "ffn", "heads", "projection", "whole"),
    [(2048, 5120, 32, 1_574_912, 2_849_757_184), (4096, 10240, 64, 3_149_824, 11_135_332_352)],
)
def test_published_sizes(width, ffn, heads, projection, whole):
    """FlanT5-XL and XXL, and what a second stage trains before them, on no memory."""
    language = spec.LanguageModel(family="t5", weights=None, vocab=32128, width=width, depth=24, heads=heads, kv_heads=heads, ffn=ffn)
    with torch.device("meta"):
        model = build(spec.System("g", encoder=spec.Eva(weights=None), connector=spec.QFormer(), language=language))
    assert sum(p.numel() for p in model.language.parameters()) == whole
    assert sum(p.numel() for p in model.connector.projection.parameters()) == projection
    assert sum(p.numel() for p in model.train_only(("connector",))) == 105_137_664 + 24_576 + 2_816 + projection


def test_other_encoder_decoders_are_told(tmp_path):
    from transformers import MT5Config

    MT5Config(d_model=16, vocab_size=20).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model_type 'mt5' is no causal language model, nor an encoder-decoder that is known \(t5\)"):
        build(replace(SYSTEM, language=spec.LanguageModel(weights=str(tmp_path))))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"fusion": spec.GatedCrossAttention(), "connector": spec.Resampler()}, "fusion: GatedCrossAttention goes into a causal language model, and t5 is"),
        ({"fusion": spec.Retrieval(), "connector": spec.Tokens()}, "fusion: Retrieval goes into a causal language model, and t5 is"),
        ({"fusion": spec.Prefix("<image>", "</image>")}, "fusion.begin: <image> is learnt behind a text, and t5 reads pictures in its encoder alone"),
        ({"compute": spec.Compute(precision="fp16")}, "compute.precision: t5 overflows in fp16; set bf16"),
        ({"compute": spec.Compute(packing=True)}, "compute.packing: the decoder of t5 cannot keep packed rows apart"),
    ],
)  # fmt: skip
def test_what_needs_a_causal_model_is_told(changes, sentence):
    assert any(wrong.startswith(sentence) for wrong in spec.misfits(replace(SYSTEM, **changes)))
    assert not any(
        wrong.startswith(sentence) for wrong in spec.misfits(replace(SYSTEM, **changes, language=replace(LANGUAGE, family="llama")))
    )


def test_no_other_stock_class_has_it(tmp_path):
    model = build(replace(SYSTEM, encoder=spec.Clip(weights=None, width=24, depth=2, heads=3, ffn=48, size=28), connector=spec.Linear()))
    with pytest.raises(ValueError, match="no class of transformers has a model of Linear and Prefix over t5"):
        model.save_pretrained(tmp_path)


def test_flan_t5_s_folder_brings_sizes_words_and_a_head_of_its_own(tmp_path):
    """Weights and tokenizer of transformers' classes: no beginning token, and <image> is added behind its words."""
    from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((f"▁{w}", -2.0) for w in ("a", "dog", "what", "is", "this")),
        ("▁", -3.0),
        ("s", -4.0),
    ]
    words = T5Tokenizer(vocab=pieces, extra_ids=0)
    words.save_pretrained(tmp_path)
    config = T5Config(
        vocab_size=len(words), d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = T5ForConditionalGeneration(config)
    theirs.lm_head.weight = torch.nn.Parameter(torch.randn(len(words), 16))
    theirs.save_pretrained(tmp_path)

    system = replace(SYSTEM, language=spec.LanguageModel(weights=str(tmp_path)))
    tokenizer = tokenizer_for(system)
    model = build(system, tokenizer=tokenizer).eval()
    language = model.system.language
    assert (language.family, language.width, language.ffn, language.heads, language.tied) == ("t5", 16, 24, 2, False)
    assert model.image_token == len(words)
    assert torch.equal(model.language.lm_head.weight[: len(words)], theirs.lm_head.weight)
    encode = Encoder(tokenizer, "blip2_t5_vqa", 4, model.image_token, tokenizer.pad_token_id)
    ids, labels = encode([("<image>what is this", "a dog")])
    assert ids[:4] == [model.image_token] * 4
    assert tokenizer.decode(ids[4:]).endswith("</s> a dog</s>")
    assert " what is this " in tokenizer.decode(ids[4:])
    assert tokenizer.decode([label for label in labels if label != -100]) == "a dog</s>"
    assert encode.end_token == tokenizer.eos_token_id == 1
