"""Gated prompts in a live language model: the base untouched, peft's numbers, the published names and counts, every way a batch comes in."""

import copy
from dataclasses import replace

import pytest
import torch
from mmfast.trainers.loop import rate

from mmfast import spec
from mmfast.models import add_lora, build, load_adapter, save_adapter
from mmfast.models.adapter import adapter_state, load_adapter_state, peft_state, save_peft_adapter

SYSTEM = spec.System(
    "test",
    encoder=spec.Clip(weights=None, width=32, depth=3, heads=2, ffn=48, patch=8, size=16),
    connector=spec.Pooled(hidden=8, pool="mean"),
    fusion=spec.AdapterPrompts(length=3, layers=2),
    language=spec.LanguageModel(weights=None, vocab=50, width=24, depth=3, heads=4, kv_heads=2, ffn=40, init=0.3),
    image=spec.Fixed(size=16),
)
IMAGE = 49
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def made(family="llama", *, gates=True, seed=0, **changes):
    torch.manual_seed(seed)
    model = build(replace(SYSTEM, language=replace(SYSTEM.language, family=family), **changes)).eval()
    if gates:
        for layer in model.fusion.layers.values():
            torch.nn.init.normal_(layer.gate)
    return model


def text(rows=2, length=7, seed=0):
    return torch.randint(1, 48, (rows, length), generator=torch.Generator().manual_seed(seed))


def shown(rows=2, seed=0):
    """Rows that each show an image at their second place."""
    ids = text(rows, seed=seed)
    ids[:, 1] = IMAGE
    return ids, torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_is_untouched_and_zero_gates_are_the_base(family):
    model, ids = made(family, gates=False), text()
    torch.manual_seed(0)
    plain = build(replace(SYSTEM, fusion=spec.Prefix(), connector=spec.Linear(), language=replace(SYSTEM.language, family=family))).language
    assert model.language.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(model.language.state_dict())
    base = plain.eval()(ids).logits
    assert torch.equal(model(ids).logits, base)
    assert torch.equal(model(*shown()[:1], pixel_values=shown()[1]).logits, plain(shown()[0]).logits)
    for layer in model.fusion.layers.values():
        torch.nn.init.normal_(layer.gate)
    assert (model(ids).logits - base).abs().max() > 0.1
    assert torch.equal(model.language(ids).logits, base), "without the fusion it is the base, whatever the gates"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_model_keeps_its_attention_function(attention):
    model, ids = made(), text()
    want = model(ids).logits
    model.language.set_attn_implementation(attention)
    torch.testing.assert_close(model(ids).logits, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("mode", ["tanh", "identity"])
def test_peft_has_the_same_logits_and_gradients(family, mode):
    """One gate a layer there and no function over it; so ours are equal over heads, and theirs is tanh(g)."""
    from peft import AdaptionPromptConfig, get_peft_model

    model = made(family, fusion=replace(SYSTEM.fusion, gate=mode))
    theirs = get_peft_model(copy.deepcopy(_plain(model)), AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM"))
    attentions = [layer.self_attn for layer in theirs.get_base_model().model.layers]
    for number, g in (("1", 0.7), ("2", -0.4)):
        ours, other = model.fusion.layers[number], attentions[int(number)]
        with torch.no_grad():
            ours.gate.fill_(g)
            other.adaption_gate.fill_(torch.tensor(g).tanh() if mode == "tanh" else g)
            other.adaption_prompt.copy_(ours.prompt[None])
    model.train_only(("adapter",))
    for seed, (rows, length) in enumerate([(1, 1), (2, 7), (3, 12)]):
        ids = text(rows, length, seed)
        got, want = model(ids).logits, theirs(ids).logits
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(got)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    for number in ("1", "2"):
        theirs_grad = attentions[int(number)].adaption_prompt.grad[0]
        torch.testing.assert_close(model.fusion.layers[number].prompt.grad, theirs_grad, atol=1e-4, rtol=1e-4)


def _plain(model):
    """The language model as transformers builds it."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_config(copy.deepcopy(model.language.config))
    plain.load_state_dict(model.language.state_dict())
    return plain.eval()


def test_only_the_gates_learn_in_the_first_step():
    model, (ids, pixels) = made(gates=False), shown()
    names = {n for n, p in model.named_parameters() if any(p is q for q in model.train_only(("adapter", "connector")))}
    adapter = {f"fusion.layers.{i}.{n}" for i in (1, 2) for n in ("prompt", "gate")}
    assert names == adapter | {f"connector.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")}
    model(ids, pixel_values=pixels, labels=ids).loss.backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"fusion.layers.1.gate", "fusion.layers.2.gate"}
    with torch.no_grad():
        for layer in model.fusion.layers.values():
            layer.gate.sub_(layer.gate.grad)
    model.zero_grad()
    model(ids, pixel_values=pixels, labels=ids).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()} == names


@pytest.mark.parametrize(("layers", "trained"), [(30, 1_229_760), (20, 819_840), (10, 409_920)])
def test_published_counts(layers, trained):
    """30 layers: 1.2 M. The figures of 10 and 20 layers have their gates here: 32 a layer."""
    from mmfast.trainers.recipes.architectures.llama_adapter import RECIPE

    random = replace(
        RECIPE, encoder=replace(RECIPE.encoder, weights=None), language=replace(RECIPE.language, weights=None),
        fusion=replace(RECIPE.fusion, layers=layers),
    )  # fmt: skip
    with torch.device("meta"):
        model = build(random)
    assert sum(p.numel() for p in model.train_only(("adapter",))) == trained
    assert list(model.fusion.layers) == [str(i) for i in range(32 - layers, 32)]
    state = adapter_state(model)
    assert len(state) == 33
    assert state["adapter_query.weight"].shape == (layers * 10, 4096)
    assert {tuple(v.shape) for k, v in state.items() if "gate" in k} == {(1, 32, 1, 1)}
    if layers == 30:
        assert sum(t.numel() for t in state.values()) * 4 == 4_919_296
        both = sum(p.numel() for p in model.train_only(("adapter", "connector")))
        assert round(both / 1e6, 2) == 1.79  # the paper's multimodal model; how its projection is made is not published


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_published_files_both_ways(tmp_path, suffix):
    model, other, file = made(seed=1), made(seed=2), tmp_path / f"adapter.{suffix}"
    other.language.load_state_dict(model.language.state_dict())
    save_adapter(model, file)
    load_adapter(other, file)
    assert torch.equal(other(text()).logits, model(text()).logits)
    if suffix == "pth":
        names = set(torch.load(file, weights_only=True))
        assert names == {"adapter_query.weight", *(f"layers.{i}.attention.gate" for i in range(3))}


def test_the_first_release_has_one_gate_a_layer():
    model = made()
    state = adapter_state(model) | {f"layers.{i}.attention.gate": torch.tensor([0.1 * i]) for i in range(3)}
    load_adapter_state(model, state)
    assert model.fusion.layers["2"].gate.tolist() == pytest.approx([0.2] * 4)
    assert torch.equal(model.fusion.layers["1"].prompt, state["adapter_query.weight"][:3]), "lowest layer first"


@pytest.mark.parametrize("mode", ["tanh", "identity"])
def test_peft_s_files_both_ways(mode, tmp_path):
    """peft reads what is written and says the same, and what peft writes is read."""
    from peft import AdaptionPromptConfig, PeftModel, get_peft_model

    model, ids = made(fusion=replace(SYSTEM.fusion, gate=mode)), text()
    with torch.no_grad():
        for layer, g in zip(model.fusion.layers.values(), (0.7, -0.4), strict=True):
            layer.gate.fill_(g)
    want = model(ids).logits
    save_peft_adapter(model, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(_plain(model), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(ids).logits, want, atol=1e-5, rtol=1e-5)
    fresh = get_peft_model(_plain(model), AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for name, p in fresh.named_parameters():
            p.fill_(0.3) if name.endswith("gate") else p.normal_() if name.endswith("adaption_prompt") else None
    fresh.save_pretrained(tmp_path / "theirs")
    load_adapter(model, tmp_path / "theirs")
    assert (model(ids).logits - want).abs().max() > 0.1
    torch.testing.assert_close(model(ids).logits, fresh(ids).logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.fusion.layers["1"].prompt, fresh.get_base_model().model.layers[1].self_attn.adaption_prompt[0])


def test_peft_s_count():
    """LLaMA-7B: one gate a layer instead of 32, 1,228,830 parameters; peft's own model has as many, by the same names."""
    from mmfast.trainers.recipes.architectures.llama_adapter import RECIPE
    from peft import AdaptionPromptConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    random = replace(RECIPE, encoder=replace(RECIPE.encoder, weights=None), language=replace(RECIPE.language, weights=None))
    with torch.device("meta"):
        model = build(random)
        theirs = get_peft_model(
            LlamaForCausalLM(LlamaConfig()), AdaptionPromptConfig(adapter_len=10, adapter_layers=30, task_type="CAUSAL_LM")
        )
    for layer in model.fusion.layers.values():
        layer.to_empty(device="cpu").gate.data.zero_()
    learns = {name: p.shape for name, p in theirs.named_parameters() if p.requires_grad}
    assert sum(shape.numel() for shape in learns.values()) == 1_228_830
    assert {name: t.shape for name, t in peft_state(model).items()} == learns


def test_what_peft_has_no_form_for_says_so():
    model = made()
    with pytest.raises(ValueError, match="the heads of layer 1 have gates of their own, and peft has one a layer"):
        peft_state(model)
    for layer in model.fusion.layers.values():
        torch.nn.init.zeros_(layer.gate)
    state, start = peft_state(model), "base_model.model.model.layers.2.self_attn.adaption_"
    with pytest.raises(ValueError, match=r"the gate of layer 2, 1.5, is no tanh; set fusion.gate to identity"):
        load_adapter_state(model, state | {f"{start}gate": torch.tensor([1.5])})
    with pytest.raises(ValueError, match=r"adapter_query.weight: expected .* = 6, 24\], got \[3, 24\]"):
        load_adapter_state(model, {k: v for k, v in state.items() if k != f"{start}prompt"})
    with pytest.raises(ValueError, match=r"holds no layers.2.attention.gate"):
        load_adapter_state(model, {k: v for k, v in state.items() if k != f"{start}gate"})
    with pytest.raises(ValueError, match=r"holds lm_head.weight, which is no prompt and no gate"):
        load_adapter_state(model, state | {"lm_head.weight": torch.zeros(1)})


def test_files_that_do_not_fit_say_so():
    model, state = made(), adapter_state(made())
    with pytest.raises(ValueError, match=r"adapter_query.weight: expected \[2 layers x 3 prompts = 6, 24\], got \[5, 24\]"):
        load_adapter_state(model, state | {"adapter_query.weight": torch.zeros(5, 24)})
    with pytest.raises(ValueError, match=r"holds layers.3.attention.gate, which is no prompt and no gate of a language model of 3 layers"):
        load_adapter_state(model, state | {"layers.3.attention.gate": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"layers.2.attention.gate: expected 1 or 4 values, got \[3\]"):
        load_adapter_state(model, state | {"layers.2.attention.gate": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"holds no layers.1.attention.gate"):
        load_adapter_state(model, {k: v for k, v in state.items() if k != "layers.1.attention.gate"})
    with pytest.raises(ValueError, match=r"its fusion is Prefix; an adapter needs AdapterPrompts"):
        adapter_state(build(replace(SYSTEM, fusion=spec.Prefix())))


# ------------------------------------------------------------------------------------------------------ batches and images


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_rows(family):
    model, (ids, pixels) = made(family), shown(3)
    whole = model(ids, pixel_values=pixels).logits
    for i in range(3):
        torch.testing.assert_close(model(ids[i : i + 1], pixel_values=pixels[i : i + 1]).logits[0], whole[i], atol=1e-5, rtol=0)
    assert (whole - model(ids, pixel_values=pixels.roll(1, 0)).logits).abs().amax((1, 2)).min() > 1e-3, "every row sees its image"


def test_images_find_their_rows():
    model, (ids, pixels) = made(), shown(3)
    ids[1] = text(1, seed=9)  # a row without an image
    got = model(ids, pixel_values=pixels[[0, 2]]).logits
    torch.testing.assert_close(got[1], model(ids[1:2]).logits[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(got[2], model(ids[2:], pixel_values=pixels[2:]).logits[0], atol=1e-5, rtol=0)
    # Without tokens for them, as many images as rows are the rows' own.
    plain = text(3)
    bare = model(plain, pixel_values=pixels).logits
    torch.testing.assert_close(bare[1], model(plain[1:2], pixel_values=pixels[1:2]).logits[0], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="the batch has 2 image placeholders, but 3 images came with it"):
        model(ids, pixel_values=pixels)
    ids[0, 4] = IMAGE
    with pytest.raises(ValueError, match="adapter prompts hold one image a row, and a row of the batch shows several"):
        model(ids, pixel_values=pixels)


def test_the_class_token_or_the_mean():
    states = torch.randn(2, 5, 32)
    for pool, picked in (("class", states[:, :1]), ("mean", states.mean(1, keepdim=True))):
        connector = made(connector=spec.Pooled(hidden=8, pool=pool), encoder=replace(SYSTEM.encoder, keep_class_token=True)).connector
        assert connector.state_dict().keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
        first, last = connector[0], connector[2]
        want = torch.nn.functional.gelu(picked @ first.weight.T + first.bias) @ last.weight.T + last.bias
        torch.testing.assert_close(connector(states), want)


def test_one_vector_a_prompt():
    """LLaMA-Adapter V2 adds another vector to each prompt of a layer."""
    model, (ids, _) = made(), shown()
    one = torch.randn(2, 1, 24)
    torch.testing.assert_close(
        model(ids, image_embeds=one.expand(-1, 3, -1)).logits, model(ids, image_embeds=one).logits, atol=1e-5, rtol=0
    )


def test_packed_rows_see_their_own_image():
    model, (ids, pixels) = made(), shown(3)
    ids[1, :2] = ids[1, :2].flip(0)  # a row may begin with its image
    lengths = [5, 7, 3]
    packed = torch.cat([row[:n] for row, n in zip(ids, lengths, strict=True)])[None]
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    for images in ({"pixel_values": pixels}, {}):
        hidden = model.hidden(packed, position_ids=places, **images).split(lengths, 1)
        for i, n in enumerate(lengths):
            own = {k: v[i : i + 1] for k, v in images.items()}
            torch.testing.assert_close(hidden[i], model.hidden(ids[i : i + 1, :n], **own), atol=1e-5, rtol=0)
    swapped = model.hidden(packed, position_ids=places, pixel_values=pixels[[0, 2, 1]]).split(lengths, 1)
    torch.testing.assert_close(swapped[0], model.hidden(ids[:1, :5], pixel_values=pixels[:1]), atol=1e-5, rtol=0)
    assert (swapped[1] - model.hidden(ids[1:2], pixel_values=pixels[1:2])).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("with_image", [False, True])
def test_the_cache_changes_nothing(family, with_image):
    model, (ids, pixels) = made(family), shown()
    images = {"pixel_values": pixels} if with_image else {}
    ids = ids if with_image else text()
    said = model.generate(ids, max_new_tokens=6, **images)
    line = ids
    for _ in range(6):
        line = torch.cat([line, model(line, **images).logits[:, -1:].argmax(-1)], 1)
        if IMAGE in line[:, ids.shape[1] :]:
            pytest.fail("the toy said the image token: choose another seed")
    assert torch.equal(said, line[:, ids.shape[1] :])
    alone = [model.generate(ids[i : i + 1], max_new_tokens=6, **{k: v[i : i + 1] for k, v in images.items()}) for i in range(2)]
    assert torch.equal(said, torch.cat(alone))


def test_left_padding_changes_nothing():
    model, (ids, pixels) = made(), shown()
    short = ids[1:, :5]
    padded = torch.cat([ids[:1], torch.cat([torch.zeros(1, 2, dtype=torch.long), short], 1)])
    mask = torch.ones_like(padded)
    mask[1, :2] = 0
    both = model.generate(padded, attention_mask=mask, pixel_values=pixels, max_new_tokens=5)
    alone = torch.cat(
        [
            model.generate(ids[:1], pixel_values=pixels[:1], max_new_tokens=5),
            model.generate(short, pixel_values=pixels[1:], max_new_tokens=5),
        ]
    )
    assert torch.equal(both, alone)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_checkpointing_gives_the_same_gradients():
    def gradients(checkpointing):
        model, (ids, pixels) = made(), shown()
        learns = model.train_only(("adapter", "connector", "embeddings"))
        if checkpointing:
            model.checkpoint_activations()
        model.train()
        model(ids, pixel_values=pixels, labels=ids).loss.backward()
        return [p.grad for p in learns]

    for got, want in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_a_copy_is_a_model_of_its_own():
    model, ids = made(), text()
    want = model(ids).logits
    other = copy.deepcopy(model)
    for layer in model.fusion.layers.values():
        torch.nn.init.zeros_(layer.gate)
    assert torch.equal(other(ids).logits, want)
    assert not torch.equal(model(ids).logits, want)


def test_adapters_of_both_kinds_together():
    model, (ids, pixels) = made(), shown()
    want = model(ids, pixel_values=pixels).logits
    add_lora(model, spec.Lora(rank=2, alpha=2, targets=("q_proj", "k_proj")))
    torch.testing.assert_close(model(ids, pixel_values=pixels).logits, want, atol=1e-6, rtol=0)


def test_what_cannot_be_built_says_so(tmp_path):
    with pytest.raises(ValueError, match="AdapterPrompts: expected 1 to 3 layers, the language model's, got 4"):
        made(fusion=spec.AdapterPrompts(layers=4))
    with pytest.raises(ValueError, match=r"connector.pool: class reads the class token; set encoder.keep_class_token true, or pool mean"):
        made(connector=spec.Pooled())
    with pytest.raises(ValueError, match="weights: elsewhere are those of a prefix model; with AdapterPrompts give the parts' own weights"):
        made(weights="elsewhere")
    with pytest.raises(ValueError, match=r"expected condition \[2, 1 or K=3, D=24\], got \[2, 4, 24\]"):
        made(connector=spec.Linear())(*shown()[:1], pixel_values=shown()[1])


def test_schedule_of_the_release():
    """lr 1.125e-3, 2 of 5 epochs warm-up, to 0 along half a cosine: at the end of epoch t. During warm-up ours is a step ahead of the release,
    which takes its first step at rate 0; after it both are the same."""
    optim, each = spec.Optim(lr=1.125e-3, epochs=5, warmup=0.4), 100
    assert rate(optim, 1 * each - 1, 5 * each) == pytest.approx(5.625e-4)
    for t, want in ((2, 1.125e-3), (3.5, 5.625e-4), (4.5, 7.536e-5)):
        assert rate(optim, round(t * each), 5 * each) == pytest.approx(want, rel=1e-4)
