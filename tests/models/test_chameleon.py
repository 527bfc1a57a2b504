"""Our Chameleon is the published one: parity with transformers' class both ways, the official layout against the formulas, and the counts."""

from dataclasses import replace

import pytest
import torch
from mmfast.trainers.config import load_recipe
from transformers import AutoConfig, AutoModelForCausalLM, ChameleonConfig, ChameleonForConditionalGeneration

from mmfast.models import build, chameleon, from_pretrained
from mmfast.models.published.chameleon import add_decoder, from_stock, tokenizer_of
from mmfast.spec import SharedTokens

BOS, EOS, PAD, IMAGE, BEGIN, END = 1, 2, 3, 4, 5, 6
CODES, PER_PICTURE = 8, 16 * 16
WORDS = {"<s>": BOS, "</s>": EOS, "<pad>": PAD, "<image>": IMAGE, "<racm3:break>": BEGIN, "<eoss>": END} | {
    # In another order than that of the codes.
    SharedTokens.code(k): 10 + (3 * k) % CODES
    for k in range(CODES)
}
CASES = [{}, {"swin_norm": True}, {"tied": True, "seed": 3}, {"kv": 4, "seed": 5, "attention": [16]}]


def stock(swin_norm=False, tied=False, kv=2, seed=0, attention=None):
    torch.manual_seed(seed)
    config = ChameleonConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=kv,
        max_position_embeddings=1024, swin_norm=swin_norm, vocabulary_map=WORDS, pad_token_id=PAD, tie_word_embeddings=tied, initializer_range=0.2,
        vq_config=dict(
            embed_dim=8, num_embeddings=CODES, latent_channels=8, resolution=32, base_channels=32, channel_multiplier=[1, 2], num_res_blocks=1,
            attn_resolutions=attention,
        ),
    )  # fmt: skip
    model = ChameleonForConditionalGeneration(config).eval()
    with torch.no_grad():  # norms that do nothing would prove nothing
        for name, p in model.named_parameters():
            if "norm" in name and "vqmodel" not in name:
                p.copy_(torch.randn(p.shape) * 0.5 + (1.0 if name.endswith("weight") else 0.0))
        vq = model.model.vqmodel  # codes where pictures are, or all would be one code
        z = vq.quant_conv(vq.encoder(torch.rand(1, 3, 32, 32) * 2 - 1))[0].flatten(1).T
        vq.quantize.embedding.weight.copy_(z[torch.randperm(len(z))[:CODES]])
    return model


def batch(seed=0, pad="right"):
    """Two rows of unlike length, the first with two pictures and the second with one; labels of text alone."""
    g = torch.Generator().manual_seed(seed)
    slots = [BEGIN, *[IMAGE] * PER_PICTURE, END]
    words = torch.randint(20, 40, (12,), generator=g).tolist()
    rows = [[BOS, *slots, *words[:5], *slots, *words[5:9]], [BOS, words[9], *slots, *words[10:]]]
    width = max(map(len, rows))
    fill = [[PAD] * (width - len(r)) for r in rows]
    ids = torch.tensor([r + f if pad == "right" else f + r for r, f in zip(rows, fill, strict=True)])
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "pixel_values": torch.rand(3, 3, 32, 32, generator=g) * 2 - 1,
        "labels": ids.masked_fill((ids == IMAGE) | (ids == PAD) | (ids == BOS), -100),
    }


def text_columns():
    return [i for i in range(40) if not 10 <= i < 10 + CODES]


@pytest.mark.parametrize("pad", ["right", "left"])
@pytest.mark.parametrize("kwargs", CASES, ids=str)
def test_logits_and_loss_equal_the_stock_class(kwargs, pad, tmp_path):
    """All columns, those of codes at the least number there is, and the loss over what is left."""
    theirs = stock(**kwargs)
    theirs.save_pretrained(tmp_path)
    ours, inputs = from_pretrained(tmp_path), batch(pad=pad)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        want, got = theirs(**inputs), ours(**inputs)
    text = text_columns()
    assert want.logits[real][:, text].std() > 0.3, "a checkpoint that says nothing proves nothing"
    torch.testing.assert_close(got.logits[real], want.logits[real], atol=1e-5, rtol=0)
    torch.testing.assert_close(got.loss, want.loss, atol=1e-5, rtol=0)
    assert len(ours.encode(inputs["pixel_values"]).unique()) > 3, "pictures of one code prove nothing"
    assert torch.equal(ours.encode(inputs["pixel_values"]), theirs.model.get_image_tokens(inputs["pixel_values"]).long())


def test_what_is_built_to_learn_has_codes_in_reach(tmp_path):
    """The same weights by ``build``, for a stage that learns to draw."""
    stock().save_pretrained(tmp_path)
    ours, inputs = from_pretrained(tmp_path), batch()
    learns = build(replace(ours.system, weights=str(tmp_path))).eval()
    with torch.no_grad():
        shut, open_ = (model(**inputs).logits[..., 10 : 10 + CODES] for model in (ours, learns))
    assert (shut == torch.finfo(torch.float32).min).all()
    assert open_.abs().max() < 1e3


def test_labels_of_pictures(tmp_path):
    """A label that is the placeholder is the picture's own token: the loss is plain cross-entropy of ids with the codes in them."""
    theirs = stock()
    theirs.save_pretrained(tmp_path)
    ours, inputs = from_pretrained(tmp_path), batch()
    ours.text_only = False
    ids, labels = inputs["input_ids"], inputs["input_ids"].masked_fill(inputs["input_ids"] == PAD, -100)
    labels[1, :20] = -100  # this picture is only half to be learnt
    with torch.no_grad():
        tokens = theirs.model.get_image_tokens(inputs["pixel_values"]).flatten()
        whole = ids.clone()
        whole[ids == IMAGE] = tokens.long()
        want = torch.nn.functional.cross_entropy(
            theirs.lm_head(theirs.model(input_ids=whole)[0])[:, :-1].flatten(0, 1), whole.where(labels != -100, -100)[:, 1:].flatten()
        )
        got = ours(ids, pixel_values=inputs["pixel_values"], labels=labels).loss
    assert torch.isfinite(got)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_a_changed_weight_is_seen(tmp_path):
    theirs, inputs = stock(), batch()
    theirs.save_pretrained(tmp_path)
    real, text = inputs["attention_mask"].bool(), text_columns()
    with torch.no_grad():
        want = theirs(**inputs).logits[real][:, text]
        for name in (
            "language.model.layers.0.self_attn.q_norm.weight",
            "language.model.layers.1.self_attn.k_norm.bias",
            "language.model.embed_tokens.weight",
            "encoder.vision.quantize.embedding.weight",
        ):
            ours = from_pretrained(tmp_path)
            p = ours.get_parameter(name)
            p.add_(torch.randn_like(p) * 0.3)
            assert (ours(**inputs).logits[real][:, text] - want).abs().max() > 1e-3, name


@pytest.mark.parametrize("kwargs", CASES, ids=str)
def test_the_way_back_loads_in_the_stock_class(kwargs, tmp_path):
    theirs = stock(**kwargs)
    theirs.save_pretrained(tmp_path / "a")
    from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    again, inputs = ChameleonForConditionalGeneration.from_pretrained(tmp_path / "b").eval(), batch()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, theirs(**inputs).logits, atol=1e-6, rtol=0)
    assert again.config.vocabulary_map == WORDS
    assert again.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("kwargs", [{"seed": 3}, {"swin_norm": True, "seed": 3}], ids=str)
@pytest.mark.parametrize("beams", [1, 3])
def test_tokens_equal_the_stock_class(kwargs, beams, tmp_path):
    theirs = stock(**kwargs)
    theirs.save_pretrained(tmp_path)
    ours, inputs = from_pretrained(tmp_path), batch(seed=3, pad="left")
    inputs.pop("labels")
    want = theirs.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=EOS, num_beams=beams)[
        :, inputs["input_ids"].shape[1] :
    ]
    got = ours.generate(**inputs, end=EOS, max_new_tokens=12, beams=beams)
    assert got.tolist() == want.tolist()
    assert len(set(got.flatten().tolist())) > 4


def test_drawing_needs_the_original_tokenizer(tmp_path):
    from mmfast.models.drawing import draw

    theirs = stock()
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no decoder.*original tokenizer checkpoint"):
        draw(ours, torch.tensor([[BOS, 30]]), temperature=0.0)
    # As the published file is: a state_dict with the losses' networks beside the tokenizer.
    whole = tokenizer_of(ours.system.encoder, decoder=True)
    whole.load_state_dict(theirs.model.vqmodel.state_dict(), strict=False)
    add_decoder(ours, {"state_dict": {**whole.state_dict(), "loss.discriminator.main.0.bias": torch.zeros(1)}})
    assert draw(ours, torch.tensor([[BOS, 30]]), temperature=0.0).shape == (1, 32, 32, 3)
    with pytest.raises(ValueError, match="other codes than the model reads"):
        add_decoder(ours, {k: v + 1 for k, v in whole.state_dict().items()})
    with pytest.raises(ValueError, match="no tokenizer of its sizes: Missing key"):
        add_decoder(ours, {})


def test_pictures_have_the_same_codes_in_half_precision(tmp_path):
    """The language model may be held in bf16; the tokenizer is read in fp32 from the file, and made so where a model in bf16 is given."""
    theirs, pixels = stock(seed=1), torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    theirs.save_pretrained(tmp_path)
    whole, half = from_pretrained(tmp_path), from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert next(half.language.parameters()).dtype == torch.bfloat16
    assert len(whole.encoder(pixels).unique()) == CODES
    torch.testing.assert_close(half.encoder(pixels), whole.encoder(pixels), rtol=0, atol=0)
    given = from_stock(stock(seed=1).bfloat16())
    assert given.encoder.vision.codebook.dtype == torch.float32
    assert given.encoder(pixels).shape == (4, PER_PICTURE)
    # The original tokenizer's codes are those that a folder in bf16 has rounded.
    original = tokenizer_of(whole.system.encoder, decoder=True)
    original.load_state_dict(theirs.model.vqmodel.state_dict(), strict=False)
    add_decoder(given, original.state_dict())
    torch.testing.assert_close(given.encoder(pixels), whole.encoder(pixels), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------ the official layout


def official(shards, dim=16, heads=4, kv_heads=2, depth=2, ffn=24, vocab=20, seed=0):
    """Random files of the release: rows or columns of each weight, norms of a sub-layer in all, one pair of q/k norms a file."""
    g = torch.Generator().manual_seed(seed)
    d = dim // heads

    def new(*shape):
        return torch.randn(*shape, generator=g) * 0.5

    shared = {f"layers.{i}.{n}_norm.weight": 1 + new(dim) for i in range(depth) for n in ("attention", "ffn")} | {
        "norm.weight": 1 + new(dim)
    }
    files = []
    for _ in range(shards):
        file = {"tok_embeddings.weight": new(vocab, dim // shards), "output.weight": new(vocab // shards, dim), **shared}
        for i in range(depth):
            file |= {
                f"layers.{i}.attention.wq.weight": new(dim // shards, dim),
                f"layers.{i}.attention.wk.weight": new(kv_heads * d // shards, dim),
                f"layers.{i}.attention.wv.weight": new(kv_heads * d // shards, dim),
                f"layers.{i}.attention.wo.weight": new(dim, dim // shards),
                f"layers.{i}.feed_forward.w1.weight": new(ffn // shards, dim),
                f"layers.{i}.feed_forward.w3.weight": new(ffn // shards, dim),
                f"layers.{i}.feed_forward.w2.weight": new(dim, ffn // shards),
            }
            for which in "qk":
                file |= {f"layers.{i}.attention.{which}_normalization.{n}": new(d) + (n == "weight") for n in ("weight", "bias")}
        files.append(file)
    return files


def official_logits(files, ids, *, heads, kv_heads, depth, swin):
    """Chameleon's formulas on these files, in float64: each file computes its own heads with its own norms, pairs (2i, 2i + 1) rotate, and what
    the files add is added up."""
    files = [{k: v.double() for k, v in file.items()} for file in files]
    T, n = len(ids), len(files)
    x = torch.cat([file["tok_embeddings.weight"][ids] for file in files], 1)
    dim = x.shape[1]
    d = dim // heads

    def rms(v, weight):
        return v * (v.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight

    def rotated(v):  # [T, H, d] as complex numbers
        angle = torch.arange(T).double()[:, None] * 10000 ** (-torch.arange(0, d, 2).double() / d)
        turned = torch.view_as_complex(v.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.view_as_real(turned).flatten(-2)

    def attention(v, i):
        out = 0
        for file in files:
            q, k, value = (
                (v @ file[f"layers.{i}.attention.{w}.weight"].T).view(T, h // n, d)
                for w, h in (("wq", heads), ("wk", kv_heads), ("wv", kv_heads))
            )
            q, k = (
                torch.nn.functional.layer_norm(
                    t, (d,), *(file[f"layers.{i}.attention.{w}_normalization.{p}"] for p in ("weight", "bias")), eps=1e-5
                )
                for t, w in ((q, "q"), (k, "k"))
            )
            q, k = rotated(q), rotated(k)
            k, value = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, value))
            scores = torch.einsum("thd,shd->hts", q, k) / d**0.5
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
            seen = torch.einsum("hts,shd->thd", scores.softmax(-1), value).flatten(1)
            out = out + seen @ file[f"layers.{i}.attention.wo.weight"].T
        return out

    def feed_forward(v, i):
        w1, w2, w3 = ([file[f"layers.{i}.feed_forward.{w}.weight"] for file in files] for w in ("w1", "w2", "w3"))
        return sum((torch.nn.functional.silu(v @ a.T) * (v @ c.T)) @ b.T for a, b, c in zip(w1, w2, w3, strict=True))

    for i in range(depth):
        for sub, norm in ((attention, "attention_norm"), (feed_forward, "ffn_norm")):
            weight = files[0][f"layers.{i}.{norm}.weight"]
            x = x + (rms(sub(x, i), weight) if swin else sub(rms(x, weight), i))
    return rms(x, files[0]["norm.weight"]) @ torch.cat([file["output.weight"] for file in files]).T


@pytest.mark.parametrize(("shards", "swin"), [(1, False), (2, True), (2, False)])
def test_files_of_the_release(shards, swin):
    sizes = dict(heads=4, kv_heads=2)
    files = official(shards)
    ours = chameleon.language(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, swin_norm=swin,
        max_position_embeddings=32, rms_norm_eps=1e-5, pad_token_id=None,
    )  # fmt: skip
    ours.load_state_dict(chameleon.official_state(files, **sizes))
    ids = torch.randint(0, 20, (9,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = ours.eval().lm_head(ours.get_decoder()(input_ids=ids[None])[0])[0]
    want = official_logits(files, ids, depth=2, swin=swin, **sizes)
    assert want.std() > 0.3
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)


def test_files_that_are_no_release():
    files = official(2)
    with pytest.raises(ValueError, match=r"layers.0.attention.rope is no name of a released Chameleon"):
        chameleon.official_state([{**files[0], "layers.0.attention.rope": files[0]["norm.weight"]}], heads=4, kv_heads=2)
    with pytest.raises(ValueError, match=r"norm\.weight is not the same in all files"):
        chameleon.official_state([files[0], {**files[1], "norm.weight": files[1]["norm.weight"] + 1}], heads=4, kv_heads=2)
    with pytest.raises(ValueError, match=r"file or more with the same names"):
        chameleon.official_state([files[0], {}], heads=4, kv_heads=2)


# ------------------------------------------------------------------------------------------------------------- sizes, on meta


def sizes_of(recipe, **language):
    with torch.device("meta"):
        model = build(replace(recipe, language=replace(recipe.language, words=None, **language)))
    return model, sum(p.numel() for p in model.language.parameters())


def test_published_sizes():
    """Decoders of 7B and 34B as transformers counts them (a pair of norms a head), and as the release does (a pair a file)."""
    recipe = load_recipe("chameleon")
    model, count = sizes_of(recipe)
    assert count == 7_013_666_816
    assert count - 32 * 2 * (32 + 32) * 128 + 32 * 2 * 2 * 128 == 7_013_158_912
    vq = model.encoder.vision
    read = sum(p.numel() for n, p in vq.named_parameters() if not n.startswith("decoder."))
    assert (read, count + read) == (29_423_616, 7_043_090_432)
    assert sum(p.numel() for p in vq.parameters()) == 68_718_467
    system = model.system
    assert (system.image_tokens, system.image_places + len(system.borders)) == (1024, 1026)
    assert system.language.context // 1026 == 3
    _, large = sizes_of(recipe, width=8192, depth=48, heads=64, kv_heads=8, ffn=22016, norm="after")
    assert large - 48 * 2 * (64 + 8) * 128 + 48 * 2 * 2 * 4 * 128 == 34_293_522_432


def test_norms_over_queries_and_keys_are_of_each_head_and_before_rotation():
    """That they are there: scaling a query map changes nothing, as LayerNorm takes it out, in ours and not in a llama of these sizes."""
    sizes = dict(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4)
    torch.manual_seed(0)
    llama = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, initializer_range=0.5))
    ids = torch.arange(8)[None]
    for model, same in ((chameleon.language(**sizes, initializer_range=0.5), True), (llama, False)):
        model.eval()
        with torch.no_grad():
            before = model.get_decoder()(input_ids=ids)[0]
            model.get_decoder().layers[0].self_attn.q_proj.weight.mul_(30)
            after = model.get_decoder()(input_ids=ids)[0]
        assert torch.allclose(before, after, atol=1e-3) == same
    names = [n for n, _ in chameleon.language(**sizes).named_parameters() if "_norm" in n and "self_attn" in n]
    assert names == [f"model.layers.0.self_attn.{w}_norm.{p}" for w in "qk" for p in ("weight", "bias")]
