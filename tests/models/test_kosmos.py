"""Our Kosmos-2 is the published one: parity with transformers' class, the connector, the original names, published counts, Magneto's start."""

import math
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2ImageToTextProjection

from mmfast import spec
from mmfast.data import chat
from mmfast.models import build, from_pretrained, tiny, tokenizer_for
from mmfast.models.published import kosmos2
from mmfast.nn.pool import AttentionPool

PAD, END = 1, 2
CASES = [
    {},
    {"seed": 7, "queries": 5},
    {"seed": 2, "vision": {"image_size": 28, "patch_size": 14, "num_hidden_layers": 3}, "text": {"layers": 3}},
    {"seed": 3, "text": {"embed_dim": 48, "attention_heads": 2}, "vision": {"hidden_size": 24, "hidden_act": "gelu"}},
]
ids_of = {"ids": lambda k: "-".join(k) or "upstream"}


def stock(seed=0, queries=3, text=None, vision=None):
    """The tiny configuration of upstream's tests, with weights that say something."""
    torch.manual_seed(seed)
    config = Kosmos2Config(
        text_config=dict(vocab_size=99, embed_dim=32, layers=2, attention_heads=4, ffn_dim=37, max_position_embeddings=512) | (text or {}),
        vision_config=dict(
            image_size=32, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37
        ) | (vision or {}),
        latent_query_num=queries,
    )  # fmt: skip
    model = Kosmos2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
        model.get_input_embeddings().weight.mul_(0.4)  # a tied head that is loud repeats itself
    return model


def batch(model, seed=0, pad="right"):
    """Three rows of unlike length as the processor makes them: ids in the image's places are words, and mean nothing."""
    g, count = torch.Generator().manual_seed(seed), model.config.latent_query_num
    size = model.config.vision_config.image_size
    words = torch.randint(10, 98, (20,), generator=g).tolist()
    rows = [[0, 5, *range(4, 4 + count), 6, *tail] for tail in (words[:9], words[9:13], words[13:])]
    places = [[0, 0, *[1] * count, *[0] * (len(row) - 2 - count)] for row in rows]
    width = max(map(len, rows))

    def fill(values, value):
        more = [[value] * (width - len(v)) for v in values]
        return torch.tensor([v + m if pad == "right" else m + v for v, m in zip(values, more, strict=True)])

    ids, mask = fill(rows, PAD), fill(places, 0)
    unscored = (ids == PAD) | (ids == 0) | (ids == 5) | mask.bool()
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "image_embeds_position_mask": mask,
        "pixel_values": torch.randn(3, 3, size, size, generator=g),
        "labels": ids.masked_fill(unscored, -100),
    }


def saved(model, path):
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("pad", ["right", "left"])
@pytest.mark.parametrize("kwargs", CASES, **ids_of)
def test_logits_and_loss_equal_the_stock_class(kwargs, pad, tmp_path):
    theirs = stock(**kwargs)
    ours, inputs = from_pretrained(saved(theirs, tmp_path)), batch(theirs, kwargs.get("seed", 0), pad)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        want, got = theirs(**inputs), ours(**inputs)
    assert want.logits[real].std() > 0.3, "a checkpoint that says nothing proves nothing"
    torch.testing.assert_close(got.logits[real], want.logits[real], atol=1e-5, rtol=0)
    torch.testing.assert_close(got.loss, want.loss, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "name",
    ["encoder.vision.post_layernorm.weight", "connector.latent_query", "connector.x_attn.out_proj.bias",
     "language.model.layers.1.ffn.ffn_layernorm.weight", "language.model.layers.0.self_attn.inner_attn_ln.bias"],
)  # fmt: skip
def test_a_changed_weight_is_seen(name, tmp_path):
    theirs = stock()
    ours, inputs = from_pretrained(saved(theirs, tmp_path)), batch(theirs)
    with torch.no_grad():
        want = theirs(**inputs).logits
        ours.get_parameter(name).mul_(1.3).add_(torch.randn_like(ours.get_parameter(name)) * 0.1)
        assert (ours(**inputs).logits - want).abs().max() > 1e-3


@pytest.mark.parametrize("kwargs", CASES, **ids_of)
def test_the_way_back_loads_in_the_stock_class(kwargs, tmp_path):
    first = stock(**kwargs)
    ours = from_pretrained(saved(first, tmp_path / "a"))
    theirs = Kosmos2ForConditionalGeneration.from_pretrained(saved(ours, tmp_path / "b")).eval()
    inputs = batch(theirs)
    with torch.no_grad():
        torch.testing.assert_close(theirs(**inputs).logits, first(**inputs).logits, atol=1e-6, rtol=0)
    assert theirs.text_model.lm_head.weight is theirs.text_model.model.embed_tokens.weight


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("seed", [1, 3])
def test_tokens_equal_the_stock_class(seed, beams, tmp_path):
    """A batch that is padded on the left says what each row says alone. (The stock class counts padding among the positions of generated
    tokens, though not of the prompt's, so that its own padded rows may say something else; alone they are the reference.)"""
    theirs = stock(seed=seed)
    ours, inputs = from_pretrained(saved(theirs, tmp_path)), batch(theirs, seed, "left")
    inputs.pop("labels")
    got = ours.generate(**inputs, end=END, max_new_tokens=12, beams=beams)
    told = set()
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        alone = {k: v[row : row + 1] if k == "pixel_values" else v[row][mask][None] for k, v in inputs.items()}
        want = theirs.generate(**alone, max_new_tokens=12, do_sample=False, num_beams=beams)[0, int(mask.sum()) :].tolist()
        assert got[row, : len(want)].tolist() == want
        told |= set(want)
    assert len(told) > 3 - (beams > 1)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_runs_do_not_repeat_as_in_the_stock_class(size, tmp_path):
    theirs = stock(seed=3)
    ours, inputs = from_pretrained(saved(theirs, tmp_path)), batch(theirs, 3)
    alone = {k: v[:1] for k, v in inputs.items() if k != "labels"}
    free = ours.generate(**alone, max_new_tokens=16)[0].tolist()
    want = theirs.generate(**alone, max_new_tokens=16, do_sample=False, no_repeat_ngram_size=size, eos_token_id=None)
    got = ours.generate(**alone, max_new_tokens=16, no_repeat=size)[0].tolist()
    assert got == want[0, alone["input_ids"].shape[1] :].tolist()
    assert got != free


def test_a_trained_system_is_written_as_the_stock_class(tmp_path):
    from mmfast.trainers.recipes.architectures.kosmos_1 import RECIPE

    ours = build(replace(tiny(RECIPE), language=replace(tiny(RECIPE).language, vocab=60))).eval()
    theirs = Kosmos2ForConditionalGeneration.from_pretrained(saved(ours, tmp_path)).eval()
    inputs = batch(theirs)
    inputs["input_ids"] = inputs["input_ids"] % 50 + 2
    inputs["labels"] = None
    with torch.no_grad():
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(theirs(**inputs).logits[real], ours(**inputs).logits[real], atol=1e-5, rtol=0)


def test_the_connector_is_theirs():
    config = stock().config
    theirs, ours = Kosmos2ImageToTextProjection(config), AttentionPool(32, 32, 3, 4)
    torch.nn.init.normal_(theirs.x_attn.out_proj.bias)
    ours.load_state_dict(theirs.state_dict())
    features = torch.randn(2, 65, 32, requires_grad=True)
    want, got = theirs.eval()(features)[0], ours.eval()(features)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    out = torch.randn_like(want)
    names = [n for n, _ in ours.named_parameters()]
    for name, a, b in zip(
        ["features", *names],
        torch.autograd.grad(got, [features, *ours.parameters()], out),
        torch.autograd.grad(want, [features, *(theirs.get_parameter(n) for n in names)], out),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=name)


def test_the_original_names_are_read():
    """gpt_model, img_connector and img_model.visual, with what is to be ignored among them."""
    theirs, back = stock(seed=4), {}
    renamed = {
        "text_model.lm_head.": "gpt_model.decoder.output_projection.", "text_model.model.": "gpt_model.decoder.",
        "image_to_text_projection.": "img_connector.", "vision_model.model.embeddings.class_embedding": "img_model.visual.class_embedding",
        "vision_model.model.embeddings.position_embedding.weight": "img_model.visual.positional_embedding",
        "vision_model.model.embeddings.patch_embedding.": "img_model.visual.conv1.", "vision_model.model.pre_layrnorm.": "img_model.visual.ln_pre.",
        "vision_model.model.post_layernorm.": "img_model.visual.ln_post.", "vision_model.model.encoder.layers.": "img_model.visual.transformer.resblocks.",
    }  # fmt: skip
    for name, value in theirs.state_dict().items():
        start = next(s for s in renamed if name.startswith(s))
        told = renamed[start] + name.removeprefix(start)
        if told.startswith("img_model"):
            for ours, original in (("self_attn", "ts_attn"), ("layer_norm", "ln_"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
                told = told.replace(ours, original)
        back[told] = value
    back |= {"gpt_model.decoder.embed_positions._float_tensor": torch.zeros(1), "gpt_model.decoder.self_attn_sope.scale": torch.ones(3)}
    assert "img_model.visual.transformer.resblocks.1.ts_attn.q_proj.weight" in back
    ours = kosmos2.from_stock(stock(seed=9))
    kosmos2.load_original(ours, back)
    inputs = batch(theirs)
    with torch.no_grad():
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(ours(**inputs).logits[real], theirs(**inputs).logits[real], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"differ in text_model.model.layer_norm.bias"):
        kosmos2.load_original(ours, {k: v for k, v in back.items() if k != "gpt_model.decoder.layer_norm.bias"})


def test_published_sizes():
    """On no memory: a layer, the text model, the connector, the tower, all together; and what the tower's last block has."""
    from mmfast.trainers.recipes.architectures.kosmos_1 import RECIPE

    with torch.device("meta"):
        model = build(replace(RECIPE, encoder=replace(RECIPE.encoder, weights=None)))
    modules = (model.blocks[0], model.language, model.connector, model.encoder, model)
    assert [sum(p.numel() for p in m.parameters()) for m in modules] == [50_378_752, 1_342_289_920, 19_015_680, 303_179_776, 1_664_485_376]
    assert sum(p.numel() for block in model.blocks for p in block.parameters()) == 1_209_090_048
    assert model.language.get_input_embeddings().weight.numel() == 133_195_776
    trained = model.train_only(("last_block",))
    block = sum(p.numel() for p in model.encoder.blocks[-1].parameters())
    assert sum(p.numel() for p in trained) == block + 2 * 1024
    assert all(n.startswith(("encoder.vision.encoder.layers.23.", "encoder.vision.post_layernorm.")) for n in model.trained)


def test_magneto_start():
    """sqrt(ln 2N) is 1.96754 at 24 layers; here N = 2. Xavier's deviation is sqrt(2 / (in + out))."""
    assert round(math.sqrt(math.log(2 * 24)), 5) == 1.96754
    width, ffn = 96, 160
    language = build(
        spec.System(
            "made",
            encoder=spec.Clip(weights=None, width=32, depth=1, heads=2, ffn=48, patch=8, size=16),
            language=spec.LanguageModel(
                family="kosmos_2_text_model",
                weights=None,
                vocab=50,
                width=width,
                depth=2,
                heads=4,
                kv_heads=4,
                ffn=ffn,
                tied=True,
                init=0.1,
            ),
            image=spec.Fixed(size=16),
        )
    ).language
    layer, gain = language.model.layers[1], math.sqrt(math.log(4))
    for linear, scale, sides in (
        (layer.self_attn.q_proj, 1, 2 * width), (layer.self_attn.k_proj, 1, 2 * width), (layer.self_attn.v_proj, gain, 2 * width),
        (layer.self_attn.out_proj, gain, 2 * width), (layer.ffn.fc1, gain, width + ffn), (layer.ffn.fc2, gain, width + ffn),
    ):  # fmt: skip
        assert linear.weight.std().item() == pytest.approx(scale * math.sqrt(2 / sides), rel=0.04)
        assert not linear.bias.any()
    table = language.get_input_embeddings().weight
    assert not table[PAD].any()
    assert table[2:].std().item() == pytest.approx(0.1, rel=0.05)
    assert language.get_output_embeddings().weight is table


def test_positions_begin_behind_the_padding_token():
    """The worked value of the fairseq table: width 4, position 2, sines then cosines."""
    theirs = stock(text={"embed_dim": 4, "attention_heads": 1}).text_model.model.embed_positions
    row = theirs(inputs_embeds=torch.zeros(1, 1, 4))[0, 0]
    torch.testing.assert_close(row, torch.tensor([0.909297, 0.0002, -0.416147, 1.0]), atol=1e-6, rtol=0)


# --------------------------------------------------------------------------------------------------------------- the vocabulary

SNOWMAN = (
    "<grounding> An image of<phrase> a snowman</phrase><object><patch_index_0044><patch_index_0863></object> warming himself by"
    "<phrase> a fire</phrase><object><patch_index_0005><patch_index_0911></object>."
)
# The ids that the release gives its tags, as published.
TAGS = {
    "<mask>": 64001, "</doc>": 64002, "<image>": 64003, "</image>": 64004, "</chunk>": 64005, "</line>": 64006, "<phrase>": 64007, "</phrase>": 64008,
    "<object>": 64009, "</object>": 64010, "</delimiter_of_multi_objects/>": 64011, "<grounding>": 64012, "<patch_index_0000>": 64013,
    "<patch_index_1023>": 65036,
}  # fmt: skip


def words(folder, *tags):
    """A folder of a tokenizer with the ids of Kosmos-2's before its tags, 64,001 pieces of which few are words here, and with ``tags`` behind them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", "<pad>", "</s>", "<unk>", *re.findall(r"\w+|\.", "An image of a snowman warming himself by fire.")]
    pieces += [f"piece{i}" for i in range(len(pieces), 64_001)]
    inner = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate([*pieces, *tags])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(tags),
    )
    Kosmos2Config().save_pretrained(folder)
    made.save_pretrained(folder)


@pytest.mark.parametrize("known", [6, len(TAGS)], ids=["without places", "whole"])
def test_the_vocabulary_is_the_published_one(known, tmp_path):
    """Names, ids and 65,037 in all: of a tokenizer that has them, and of one that ends before the tags of places, which are added in order.
    transformers' processor, which adds its tags itself, has the same."""
    from mmfast.trainers.recipes.architectures.kosmos_2 import RECIPE
    from transformers import AutoTokenizer, Kosmos2Processor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from mmfast.models.pretrained import placeholder

    words(tmp_path / "base", *list(TAGS)[:6])
    theirs = Kosmos2Processor(CLIPImageProcessorPil(size={"height": 224, "width": 224}), AutoTokenizer.from_pretrained(tmp_path / "base"))
    if known > 6:
        theirs.tokenizer.save_pretrained(tmp_path / "base")
    system = replace(RECIPE, language=replace(RECIPE.language, words=str(tmp_path / "base")))
    ours = tokenizer_for(system)
    assert len(ours) == len(theirs.tokenizer) == 65_037 == system.language.vocab == placeholder(system, ours)
    assert ours.convert_tokens_to_ids(list(TAGS)) == theirs.tokenizer.convert_tokens_to_ids(list(TAGS)) == list(TAGS.values())
    assert ours.convert_tokens_to_ids([f"<patch_index_{i:04}>" for i in range(1024)]) == list(range(64_013, 65_037))
    assert (ours.bos_token_id, ours.pad_token_id, ours.eos_token_id, ours.unk_token_id) == (0, 1, 2, 3)

    # The published example with its picture has 91 tokens, which is one for each of its words.
    borders = ours.convert_tokens_to_ids(list(system.borders))
    places = dict(image_tokens=system.image_places, image_token=placeholder(system, ours), borders=borders)
    ids, _ = chat.encode(ours, "bare", [("<image>" + SNOWMAN, None)], **places)
    picture = Image.new("RGB", (32, 32))
    batch = theirs(images=picture, text=SNOWMAN, return_tensors="pt")
    seen = batch["image_embeds_position_mask"][0].bool()
    assert len(ids) == batch["input_ids"].shape[1] == 91
    assert batch["input_ids"][0].masked_fill(seen, placeholder(system, ours)).tolist() == ids
    assert ours.unk_token_id not in ids
