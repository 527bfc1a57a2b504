"""mmfast.apply on live transformers models: same outputs, same gradients, everything else as it was; and back."""

import copy
import io
import types
import warnings

import pytest
import torch
from integrations import tiny
from torch import nn

import mmfast
from mmfast.integrations import transformers as integration

pytestmark = pytest.mark.filterwarnings("error:mmfast:RuntimeWarning")  # a fallback that a test does not expect fails it

# name: (model, its arguments, batch, its arguments, replaced classes and their number)
CASES = {
    "blip2": (tiny.blip2, {}, tiny.blip2_batch, {}, {"Blip2QFormerMultiHeadAttention": 5}),
    "blip2 eager": (tiny.blip2, {"impl": "eager"}, tiny.blip2_batch, {}, {"Blip2QFormerMultiHeadAttention": 5}),
    "instructblip": (tiny.instructblip, {}, tiny.instructblip_batch, {}, {"InstructBlipQFormerMultiHeadAttention": 5}),
    "instructblip eager, left": (
        tiny.instructblip, {"impl": "eager"}, tiny.instructblip_batch, {"side": "left"}, {"InstructBlipQFormerMultiHeadAttention": 5},
    ),
    "instructblip, middle": (
        tiny.instructblip, {}, tiny.instructblip_batch, {"side": "middle"}, {"InstructBlipQFormerMultiHeadAttention": 5},
    ),
    "instructblip video": (
        tiny.instructblip, {"video": True}, tiny.instructblip_batch, {"frames": 2}, {"InstructBlipVideoQFormerMultiHeadAttention": 5},
    ),
    "idefics": (tiny.idefics, {}, tiny.idefics_batch, {}, {"IdeficsPerceiverAttention": 2, "IdeficsAttention": 2}),
    "idefics eager": (tiny.idefics, {"impl": "eager"}, tiny.idefics_batch, {}, {"IdeficsPerceiverAttention": 2, "IdeficsAttention": 2}),
    "idefics, all images so far": (
        tiny.idefics, {"qk": True}, tiny.idefics_batch, {"kind": "all"}, {"IdeficsPerceiverAttention": 2, "IdeficsAttention": 2},
    ),
    "idefics, no resampler": (tiny.idefics, {"resampler": False}, tiny.idefics_batch, {}, {"IdeficsAttention": 2}),
    "idefics2": (tiny.idefics2, {}, tiny.idefics2_batch, {}, {"Idefics2PerceiverAttention": 2}),
    "idefics2, no padding": (tiny.idefics2, {}, tiny.idefics2_batch, {"ragged": False}, {"Idefics2PerceiverAttention": 2}),
    "idefics2 eager": (tiny.idefics2, {"impl": "eager"}, tiny.idefics2_batch, {}, {"Idefics2PerceiverAttention": 2}),
    "kosmos2": (tiny.kosmos2, {}, tiny.kosmos2_batch, {}, {"Kosmos2ImageToTextProjection": 1}),
    "chameleon": (tiny.chameleon, {}, tiny.chameleon_batch, {}, {"ChameleonVQVAEVectorQuantizer": 1}),
}  # fmt: skip


def make(name):
    model, options, batch, shape, replaced = CASES[name]
    return model(**options), batch(**shape), replaced


def expected(model, replaced) -> dict[str, int]:
    """Early 5.x ran Kosmos-2's connector causally by mistake; there it is left alone."""
    projection = getattr(model, "image_to_text_projection", None)
    return {} if projection is not None and projection.x_attn.is_causal else replaced


def run(model, batch, **more):
    """Logits, and the gradients of a fixed random sum of them."""
    model.zero_grad()
    logits = model(**batch, **more).logits
    real = logits > -1e30  # Chameleon sets the image tokens' logits to the type's minimum
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    (torch.where(real, logits, 0.0) * weight).sum().backward()
    return torch.where(real, logits, 0.0).detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def classes(model) -> list[type]:
    return [type(m) for m in model.modules()]


def fused(model) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, integration._Fused)]


def assert_same(got, want, label=""):
    logits, grads = got
    want_logits, want_grads = want
    assert (logits - want_logits).abs().max() <= 1e-5, f"{label} logits off by {(logits - want_logits).abs().max():.1e}"
    assert set(grads) == set(want_grads)
    for name, grad in want_grads.items():
        # To 1e-4 of the largest entry; a gradient that is zero by symmetry (of a bias of keys) is compared with 1.
        error = (grads[name] - grad).abs().max() / max(grad.abs().max(), 1.0)
        assert error <= 1e-4, f"{label} gradient of {name} off by {error:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_same_logits_and_gradients_and_back(name):
    model, batch, replaced = make(name)
    before, keys, want = classes(model), list(model.state_dict()), run(model, batch)
    other = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    assert (model(**other).logits - model(**batch).logits).abs().max() > 0.01, "the image does not matter in this test"

    assert mmfast.apply(model) is model
    replaced = expected(model, replaced)
    names = [type(m).__name__ for m in fused(model)]
    assert {n: names.count(n) for n in names} == replaced
    assert list(model.state_dict()) == keys
    assert_same(run(model, batch), want, name)
    for part in fused(model):
        assert isinstance(part, part.stock)

    assert mmfast.restore(model) is model
    assert classes(model) == before
    assert not any("forward" in vars(m) for m in model.modules())
    logits, _ = run(model, batch)
    assert torch.equal(logits, want[0])


def broken(*args, **kwargs):
    raise AssertionError("the op was called")


@pytest.mark.parametrize("name", CASES)
def test_the_ops_run(name, monkeypatch):
    """What is replaced does go through the ops, all of it: with the ops taken away nothing runs."""
    model, batch, replaced = make(name)
    mmfast.apply(model)
    for op in ("cross_attention", "qformer_attention", "media_cross_attention", "vq_quantize"):
        monkeypatch.setattr(integration, op, broken)
    if expected(model, replaced):
        with pytest.raises(AssertionError, match="the op was called"):
            model(**batch)


@pytest.mark.parametrize("side", ["right", "left", "middle"])
@pytest.mark.parametrize("matching", [True, False])
def test_blip2_retrieval_reads_padded_text(matching, side):
    model, batch = tiny.blip2(text=True), tiny.retrieval_batch(side)

    def scores():
        model.zero_grad()
        out = model(**batch, use_image_text_matching_head=matching).logits_per_image
        (out * torch.arange(out.numel()).view_as(out)).sum().backward()
        return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    want = scores()
    mmfast.apply(model)
    assert_same(scores(), want)
    other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 0, 36, batch["input_ids"])}
    got = model(**other, use_image_text_matching_head=matching).logits_per_image
    if matching or side != "left":  # the unpadded row's [CLS] is elsewhere with left padding and no matching head
        torch.testing.assert_close(got, want[0], atol=1e-5, rtol=0)


def test_chameleon_quantiser_trains():
    model = tiny.chameleon()
    quantiser = model.model.vqmodel.quantize

    def losses():
        x = torch.randn(2, 8, 5, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
        quantized, loss, indices = quantiser(x)
        quantiser.zero_grad()
        (quantized.square().sum() + loss).backward()
        return quantized.detach(), loss.detach(), indices, x.grad, quantiser.embedding.weight.grad

    want = losses()
    mmfast.apply(model)
    for a, b in zip(losses(), want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["blip2", "instructblip", "idefics", "idefics2", "kosmos2", "chameleon"])
def test_generates_the_same_tokens(name):
    model, batch, _ = make(name)
    options = {"max_new_tokens": 8, "do_sample": False}
    if name == "kosmos2":
        batch["image_embeds_position_mask"] = batch["image_embeds_position_mask"][:, :6]
        batch["input_ids"], batch["attention_mask"] = batch["input_ids"][:, :6], batch["attention_mask"][:, :6]
    want = model.generate(**batch, **options)
    mmfast.apply(model)
    assert torch.equal(model.generate(**batch, **options), want)
    assert len(want.unique()) > 3


@pytest.mark.parametrize("name", ["blip2", "instructblip", "idefics", "idefics2", "kosmos2", "chameleon"])
def test_bf16(name):
    model, batch, _ = make(name)
    exact = run(model, batch)[0]
    model.to(torch.bfloat16)
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
    want = run(model, batch)[0]
    mmfast.apply(model)
    logits, grads = run(model, batch)
    assert logits.dtype == torch.bfloat16
    assert all(g.isfinite().all() for g in grads.values())
    # In bf16 both are some way off the float32 logits (Chameleon's stock search picks other codes); ours at most as far, within a factor.
    assert (logits - exact).norm() <= 1.5 * (want - exact).norm() + 0.01 * exact.norm()


@pytest.mark.parametrize("name", ["instructblip", "idefics"])
def test_autocast(name):
    model, batch, _ = make(name)
    exact = run(model, batch)[0]
    mmfast.apply(model)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**batch).logits
    assert (logits - exact).norm() <= 0.1 * exact.norm()


@pytest.mark.parametrize("name", ["blip2", "instructblip", "idefics", "kosmos2"])
def test_gradient_checkpointing(name):
    model, batch, _ = make(name)
    want = run(model.train(), batch)
    mmfast.apply(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(run(model, batch, **({"use_cache": False} if name != "kosmos2" else {})), want)


def test_gradient_checkpointing_repeats_dropout():
    model, batch = tiny.instructblip(attention_probs_dropout_prob=0.5), tiny.instructblip_batch()
    mmfast.apply(model.train())
    torch.manual_seed(3)
    want = run(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(3)
    assert_same(run(model, batch, use_cache=False), want)


def test_dropout_in_training_alone():
    model = tiny.blip2(attention_probs_dropout_prob=0.25)
    attention = model.qformer.encoder.layer[0].crossattention.attention
    rows, image = torch.randn(1, 4, 32), torch.randn(1, 5, 24)
    want = attention(rows, encoder_hidden_states=image)[0]
    mmfast.apply(model)
    torch.testing.assert_close(attention(rows, encoder_hidden_states=image)[0], want)
    model.train()
    draws = torch.cat([attention(rows, encoder_hidden_states=image)[0] for _ in range(3000)])
    assert len(draws[:, 0, 0].unique()) > 10
    torch.testing.assert_close(draws.mean(0, keepdim=True), want, atol=0.06, rtol=0)  # unbiased
    mmfast.restore(model)
    stock = torch.cat([attention(rows, encoder_hidden_states=image)[0] for _ in range(3000)])
    torch.testing.assert_close(draws.std(0), stock.std(0), atol=0.06, rtol=0.1)  # and as wide as the stock one
    mmfast.apply(model.eval())
    torch.testing.assert_close(attention(rows, encoder_hidden_states=image)[0], want)


# ------------------------------------------------------------------------------------------------------------------- fallbacks


def falls_back(why):
    return pytest.warns(RuntimeWarning, match=f"mmfast: .* runs its stock forward: .*{why}")


def test_attention_weights_come_from_the_stock_class():
    model, batch = tiny.instructblip("eager"), tiny.instructblip_batch()
    image, text = torch.randn(3, 5, 24), {"input_ids": batch["qformer_input_ids"], "query_embeds": model.query_tokens.expand(3, -1, -1)}
    call = {**text, "encoder_hidden_states": image, "output_attentions": True}
    want = model.qformer(**call)
    mmfast.apply(model)
    with falls_back("output_attentions") as record:
        got = model.qformer(**call)
    assert len(record) == 1, "one warning for all layers"
    for a, b in zip((*got.attentions, *got.cross_attentions), (*want.attentions, *want.cross_attentions), strict=True):
        assert torch.equal(a, b)
    assert len(want.attentions) >= 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.qformer(**call)  # said once
    torch.testing.assert_close(model.qformer(**text, encoder_hidden_states=image)[0], want[0], atol=1e-5, rtol=0)


def test_attention_weights_asked_for_by_the_config():
    model = tiny.blip2("eager")
    model.qformer.config.output_attentions = True
    call = {"query_embeds": model.query_tokens, "encoder_hidden_states": torch.randn(1, 5, 24)}
    want = model.qformer(**call)
    mmfast.apply(model)
    with falls_back("attention weights are wanted"):
        got = model.qformer(**call)
    assert torch.equal(got.attentions[0], want.attentions[0])


def qformer_self_attention(impl=None):
    model = tiny.blip2(impl)
    attention = model.qformer.encoder.layer[0].attention.attention
    return attention, torch.randn(2, 4, 32), model


LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        (torch.zeros(2, 1, 4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), LOWEST), "differs between heads or rows"),
        (torch.zeros(2, 4, 1, 4).index_fill(1, torch.tensor([2]), 0).index_put((torch.tensor(0), torch.tensor(1), torch.tensor(0), torch.tensor(3)), torch.tensor(LOWEST)), "differs between heads"),
        (torch.tensor([0.0, -0.5, 0.0, LOWEST]).expand(2, 1, 1, 4), "holds other values than 0"),
        (torch.tensor([[0.0] * 4, [LOWEST] * 4])[:, None, None], "leaves a sequence without any key"),
        (torch.zeros(2, 4, 4), r"of shape \[2, 4, 4\]"),
        (torch.ones(2, 1, 1, 4, dtype=torch.long), "of type torch.int64"),
    ],
    ids=["causal", "one head", "bias", "all padding", "3-D", "integers"],
)  # fmt: skip
def test_masks_that_are_not_key_padding_go_to_the_stock_class(mask, why):
    attention, x, model = qformer_self_attention("eager")
    if mask.dim() == 3:
        mask = mask[:1]  # broadcasts over the heads there
        why = why.replace("2, 4, 4", "1, 4, 4")
    want = attention(x, mask)[0]
    mmfast.apply(model)
    with falls_back(why):
        assert torch.equal(attention(x, mask)[0], want)


def test_boolean_mask_means_what_the_implementation_makes_of_it():
    """SDPA takes True as visible; eager attention adds the 1 to the scores."""
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]], dtype=torch.bool)[:, None, None].expand(-1, 1, 4, -1)
    for impl in (None, "eager"):
        attention, x, model = qformer_self_attention(impl)
        stock_is_eager = integration._eager(attention.config) or not hasattr(attention, "scaling")  # early 5.x has eager alone
        want = attention(x, mask)[0]
        mmfast.apply(model)
        if stock_is_eager:
            with falls_back("boolean mask"):
                got = attention(x, mask)[0]
        else:
            got = attention(x, mask)[0]
        torch.testing.assert_close(got, want)


def test_a_mask_changed_in_place_is_read_again():
    attention, x, model = qformer_self_attention("eager")
    mask = torch.zeros(2, 1, 1, 4)
    mmfast.apply(model)
    first = attention(x, mask)[0]
    mask[:, :, :, 1] = LOWEST
    second = attention(x, mask)[0]
    assert (first - second).abs().max() > 0.01
    mmfast.restore(model)
    torch.testing.assert_close(second, attention(x, mask)[0])
    with torch.inference_mode():
        mmfast.apply(model)
        mask = torch.zeros(2, 1, 1, 4)
        first = attention(x, mask)[0]
        mask[:, :, :, 1] = LOWEST
        torch.testing.assert_close(attention(x, mask)[0], second)


def test_one_mask_tensor_read_by_modules_of_other_lengths():
    attention, x, model = qformer_self_attention("eager")
    mmfast.apply(model)
    mask = torch.zeros(2, 1, 1, 4)
    mask[0, ..., 3] = LOWEST
    attention(x, mask)
    with falls_back(r"shape \[2, 1, 1, 4\]"), pytest.raises(RuntimeError):
        attention(torch.randn(2, 5, 32), mask)  # the stock class refuses it too


def test_idefics_image_masks_of_other_kinds():
    model, batch = tiny.idefics(), tiny.idefics_batch("odd")
    want = run(model, batch)
    mmfast.apply(model)
    with falls_back("several images that are not all from the first on"):
        assert_same(run(model, batch), want)


def test_idefics_dropout_in_training():
    model, batch = tiny.idefics(dropout=0.1), tiny.idefics_batch()
    mmfast.apply(model.train())
    with falls_back("attention dropout in training"):
        model(**batch)
    run(model.eval(), batch)


def test_idefics_without_any_image():
    model, batch = tiny.idefics(), tiny.idefics_batch()
    batch["image_attention_mask"].zero_()
    want = run(model, batch)
    mmfast.apply(model)
    assert_same(run(model, batch), want)


def test_kosmos_connector_whose_implementation_changes():
    model, batch = tiny.kosmos2(), tiny.kosmos2_batch()
    mmfast.apply(model)
    if not fused(model):
        assert model.image_to_text_projection.x_attn.is_causal
        return
    model.set_attn_implementation("eager")
    with falls_back("projection_attentions"):
        out = model(**batch)
    assert out.projection_attentions is not None


# ------------------------------------------------------------------------------------------------------------ what else must hold


def test_what_it_prints(capsys):
    model = tiny.idefics()
    mmfast.apply(model)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "mmfast: 2 IdeficsPerceiverAttention -> cross_attention",
        "mmfast: 2 IdeficsAttention -> media_cross_attention",
        "mmfast: 2 IdeficsVisionAttention left alone: no op of mmfast replaces it",
        "mmfast: 4 IdeficsAttention left alone: the language model's self-attention",
    ]
    kept = classes(model)
    mmfast.apply(model)
    assert classes(model) == kept
    assert "2 IdeficsPerceiverAttention already replaced" in capsys.readouterr().out
    mmfast.apply(tiny.kosmos2("eager"))
    out = capsys.readouterr().out
    assert "1 Kosmos2ImageToTextProjection left alone: eager attention returns its weights" in out
    mmfast.apply(nn.Sequential(nn.Linear(2, 2)))
    assert capsys.readouterr().out.startswith("mmfast: nothing replaced in Sequential; known are parts of blip_2, instructblip,")
    with pytest.raises(TypeError, match=r"mmfast.apply: expected a torch.nn.Module, got str"):
        mmfast.apply("blip2")
    mmfast.restore(nn.Linear(2, 2))


def test_other_models_stay_stock():
    one, two = tiny.blip2(), tiny.blip2()
    forwards = {cls: cls.forward for cls in classes(two)}
    mmfast.apply(one)
    assert not fused(two)
    assert all(cls.forward is f for cls, f in forwards.items())


def test_a_subclass_with_its_own_forward_is_left_alone(capsys):
    model = tiny.blip2()
    attention = model.qformer.encoder.layer[1].attention.attention
    mine = type("Mine", (type(attention),), {"forward": lambda self, *a, **k: super(type(self), self).forward(*a, **k)})
    attention.__class__ = mine
    mmfast.apply(model)
    assert type(attention) is mine
    assert len(fused(model)) == 4


def test_an_instance_with_another_forward_is_left_alone(capsys):
    model = tiny.blip2()
    attention = model.qformer.encoder.layer[1].attention.attention
    attention.forward = lambda *a, **k: None
    mmfast.apply(model)
    assert len(fused(model)) == 4
    assert "1 Blip2QFormerMultiHeadAttention left alone: something else has replaced its forward already" in capsys.readouterr().out


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["blip2", "chameleon"])
def test_copies(name, way):
    model, batch, replaced = make(name)
    want = run(model, batch)
    mmfast.apply(model)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert len(fused(twin)) == sum(replaced.values())
    assert_same(run(twin, batch), want)
    assert twin.get_parameter(next(iter(want[1]))) is not model.get_parameter(next(iter(want[1])))
    mmfast.restore(twin)
    assert not fused(twin)
    assert fused(model)


def test_save_and_load(tmp_path):
    model, batch, _ = make("instructblip")
    mmfast.apply(model)
    model.save_pretrained(tmp_path)
    stock = type(model).from_pretrained(tmp_path).eval()
    assert not fused(stock)
    assert_same(run(model, batch), run(stock, batch))


def test_data_parallel_replicas_use_their_own_weights():
    attention, x, model = qformer_self_attention()
    mmfast.apply(model)
    replica = attention._replicate_for_data_parallel()
    replica._modules = dict(attention._modules, query=nn.Linear(32, 32))
    assert not torch.equal(replica(x)[0], attention(x)[0])


def test_under_accelerate_hooks():
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    model, batch = tiny.blip2(), tiny.blip2_batch()
    want = run(model, batch)
    attention = model.qformer.encoder.layer[0].attention.attention
    calls = []

    class Count(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(type(module).__name__)
            return args, kwargs

    hooks.add_hook_to_module(attention, Count())
    mmfast.apply(model)
    assert attention in fused(model)
    assert attention._old_forward.__func__ is type(attention).forward
    assert_same(run(model, batch), want)
    assert calls == ["Blip2QFormerMultiHeadAttention"]
    mmfast.restore(model)
    assert attention._old_forward.__func__ is type(attention).forward
    assert_same(run(model, batch), want)
    mmfast.apply(model)
    hooks.remove_hook_from_module(attention)
    assert isinstance(attention.forward, types.MethodType)
    mmfast.restore(model)
    assert attention.forward.__func__ is type(attention).forward


def test_with_lora():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, batch = tiny.blip2(), tiny.blip2_batch()
    config = peft.LoraConfig(r=2, target_modules=r".*qformer.*\.(query|value)", init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config)
    want = run(model, batch)
    mmfast.apply(model)
    assert len(fused(model)) == 5
    assert_same(run(model, batch), want)


def test_compiled():
    model, batch = tiny.instructblip(), tiny.instructblip_batch("left")
    want = run(model, batch)
    mmfast.apply(model)
    model.qformer = torch.compile(model.qformer, backend="aot_eager")
    logits, grads = run(model, batch)
    assert_same((logits, {k.replace("._orig_mod", ""): v for k, v in grads.items()}), want)


def test_fully_sharded(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model, batch = tiny.instructblip(), tiny.instructblip_batch()
    want = run(model, batch)
    before = classes(model)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        mmfast.apply(model)
        layers = list(model.qformer.encoder.layer)
        inner = layers[1].attention.attention
        fully_shard(inner, mesh=mesh)  # the replaced module itself, and its layer
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

        def whole(result):
            return result[0], {n: g.full_tensor() for n, g in result[1].items()}

        assert_same(whole(run(model, batch)), want)
        mmfast.restore(model)
        assert not fused(model)
        assert isinstance(inner, FSDPModule)
        assert type(inner).__mro__[2] is before[list(model.modules()).index(inner)]
        assert_same(whole(run(model, batch)), want)
        sharded = classes(model)
        mmfast.apply(model)  # after sharding
        assert len(fused(model)) == 5
        assert_same(whole(run(model, batch)), want)
        mmfast.restore(model)
        assert classes(model) == sharded
    finally:
        dist.destroy_process_group()
