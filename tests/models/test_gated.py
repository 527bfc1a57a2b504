"""Gated cross-attention in a live language model: the base untouched, the published mask, a dense reference, every way a batch comes in."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from gated import END, IMAGE, SYSTEM, made, open_gates, pictures, rows
from torch import Tensor
from transformers import AutoModelForCausalLM

from mmfast import spec
from mmfast.models import build
from mmfast.models.fusions.gated import FAMILIES
from mmfast.models.generate import option_logps


def plain(model) -> torch.nn.Module:
    """The language model as transformers builds it."""
    other = AutoModelForCausalLM.from_config(copy.deepcopy(model.language.config))
    other.load_state_dict(model.language.state_dict())
    return other.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_is_untouched_and_gates_at_zero_are_the_base(family):
    model = made(family, gates=False)
    base, ids = plain(model), rows("xIabE", "Iabcd")
    assert model.language.state_dict().keys() == base.state_dict().keys()
    want = base(ids).logits
    assert torch.equal(model(ids, pixel_values=pictures(2)).logits, want)
    assert torch.equal(model(rows("abcde")).logits, base(rows("abcde")).logits)
    open_gates(model)
    shown = model(ids, pixel_values=pictures(2)).logits
    assert (shown - want).abs().max() > 0.01
    assert (shown - model(ids, pixel_values=pictures(2, seed=1)).logits).abs().max() > 1e-3, "pictures matter"
    assert torch.equal(model.language(ids).logits, want), "without the fusion it is the base, whatever the gates"


def test_a_half_precision_base_is_itself_at_gates_zero():
    model = made(gates=False)
    model.language.to(torch.bfloat16)
    ids = rows("xIabE")
    assert torch.equal(model(ids, pixel_values=pictures(1)).logits, plain(model).to(torch.bfloat16)(ids).logits)


def test_where_the_blocks_stand():
    assert list(made(every=2, offset=1).fusion.layers) == ["1", "3"]  # OpenFlamingo
    assert list(made(every=2, offset=0).fusion.layers) == ["0", "2"]  # the paper and Idefics
    assert list(made(every=3, offset=0).fusion.layers) == ["0", "3"]
    with pytest.raises(ValueError, match="every=7 and offset=1 name none of the language model's 4 layers"):
        made(every=7, offset=1)
    with pytest.raises(ValueError, match="no block is known to fit before a layer of bloom; known are gpt2"):
        made("bloom")


# --------------------------------------------------------------------------------------------------- the formula, written out


def block(x: Tensor, media: Tensor, visible: Tensor, weights: dict, heads: int, activation) -> Tensor:
    """x [B, S, D], media [B, T, L, E], visible [B, S, T L] -> [B, S, D]."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    q = norm(x, "attn.norm") @ weights["attn.to_q.weight"].T
    k, v = (media.flatten(1, 2) @ weights["attn.to_kv.weight"].T).chunk(2, -1)
    out = []
    for qh, kh, vh in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        weight = torch.where(visible, (qh @ kh.mT / math.sqrt(qh.shape[-1])).exp(), 0.0)
        out.append(weight / weight.sum(-1, keepdim=True).clamp_min(1e-30) @ vh)
    y = x + weights["attn_gate"].tanh() * (torch.cat(out, -1) @ weights["attn.to_out.weight"].T)
    return y + weights["ff_gate"].tanh() * (activation(norm(y, "ff.0") @ weights["ff.1.weight"].T) @ weights["ff.3.weight"].T)


def dense(model, base, ids: Tensor, latents: list[list[Tensor]], *, immediate=True, activation=F.gelu) -> Tensor:
    """Logits of a llama with the blocks' formula between its own layers; latents: each row's pictures [L, E]."""
    length, most = latents[0][0].shape[0], max(map(len, latents))
    media = torch.stack([torch.stack([*row, *[torch.zeros_like(latents[0][0])] * (most - len(row))]) for row in latents])
    seen = [[sum(int(i) == IMAGE for i in row[: at + 1]) for at in range(len(row))] for row in ids.tolist()]
    visible = torch.tensor([[[(t + 1 == s) if immediate else t < s for t in range(most)] for s in row] for row in seen])
    visible = visible.repeat_interleave(length, -1)
    decoder, x = base.model, base.model.embed_tokens(ids)
    places = torch.arange(ids.shape[1])[None]
    rotary, mask = (
        decoder.rotary_emb(x, places),
        torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None].expand(len(ids), 1, -1, -1),
    )
    for i, layer in enumerate(decoder.layers):
        if str(i) in model.fusion.layers:
            x = block(x, media, visible, dict(model.fusion.layers[str(i)].named_parameters()), 2, activation)
        x = layer(x, attention_mask=mask, position_ids=places, position_embeddings=rotary)
    return base.lm_head(decoder.norm(x))


RAGGED = ("xIabEIc", "abIcdef", "IaIbIcd")  # 2, 1 and 3 pictures


@pytest.mark.parametrize("immediate", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "squared_relu"])
def test_against_dense_masks(immediate, activation):
    model, ids = made(immediate=immediate, activation=activation), rows(*RAGGED)
    latents = model.embed_images(pictures(6)).detach().requires_grad_()
    other = latents.detach().clone().requires_grad_()
    model.train_only(("adapter",))
    got = model(ids, image_embeds=latents).logits
    by_row = [list(other[:2]), list(other[2:3]), list(other[3:])]
    function = F.gelu if activation == "gelu" else lambda x: x.clamp_min(0) ** 2
    want = dense(model, plain(model), ids, by_row, immediate=immediate, activation=function)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    # Gradients of latents and of every weight under random cotangents.
    cotangent = torch.randn_like(got)
    names = [n for n, _ in model.fusion.named_parameters()]
    parameters = [p for _, p in model.fusion.named_parameters()]
    ours = torch.autograd.grad(got, [latents, *parameters], cotangent)
    theirs = torch.autograd.grad(want, [other, *parameters], cotangent)
    for name, a, b in zip(["latents", *names], ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * max(1.0, float(b.abs().max())), rtol=0, msg=lambda m, name=name: f"{name}: {m}")
        assert b.abs().max() > 0, name


def test_the_worked_mask():
    """[x, I, a, b, E, I, c]: text times [0, 1, 1, 1, 1, 2, 2]. What a picture's change moves in a model whose language model carries nothing
    from place to place is who sees it."""
    model, ids = made(every=4, offset=1), rows("xIabEIc")  # one block, before the last layer
    with torch.no_grad():
        for layer in model.language.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    first, second = pictures(2), pictures(2)
    first[0], second[1] = pictures(1, seed=1)[0], pictures(1, seed=2)[0]
    base = model(ids, pixel_values=pictures(2)).logits

    def moved(changed):
        return ((model(ids, pixel_values=changed).logits - base).abs().amax(-1)[0] > 1e-4).tolist()

    assert moved(first) == [False, True, True, True, True, False, False]
    assert moved(second) == [False, False, False, False, False, True, True]
    model.fusion.layers["3"].attn.only_attend_immediate_media = False
    base = model(ids, pixel_values=pictures(2)).logits
    assert moved(first) == [False, True, True, True, True, True, True]


def test_text_before_the_first_picture_gets_exactly_nothing_from_it():
    model, said = made(), []
    for module in model.fusion.layers.values():
        module.attn.register_forward_hook(lambda m, args, out: said.append(out))
    model(rows("xyIab", "abcde"), pixel_values=pictures(1))
    assert len(said) == 2
    for out in said:
        assert not out[0, :2].any()
        assert not out[1].any()
        assert out[0, 2:].abs().amax(-1).min() > 0


def test_later_pictures_change_nothing_before_them():
    model, ids = made(), rows("xIabIcIdef")
    seen = pictures(3)
    base = model(ids, pixel_values=seen).logits
    swapped = model(ids, pixel_values=seen[[0, 2, 1]]).logits
    torch.testing.assert_close(swapped[:, :4], base[:, :4], atol=0, rtol=0)
    assert (swapped - base)[:, 4:].abs().amax(-1).min() > 1e-4


def test_rows_may_share_pictures():
    model, ids, shown = made().double(), rows(*RAGGED), pictures(2).double()  # two pictures and six round otherwise in single precision
    order = torch.tensor([1, 0, 1, 0, 0, 1])
    want = model(ids, pixel_values=shown[order]).logits
    torch.testing.assert_close(model(ids, pixel_values=shown, image_rows=order).logits, want, atol=1e-12, rtol=0)


def test_as_many_pictures_as_places():
    with pytest.raises(ValueError, match="the batch has 2 image placeholders, but 3 images came with it"):
        made()(rows("IaIb"), pixel_values=pictures(3))


# --------------------------------------------------------------------------------------------------- ways a batch comes in


@pytest.mark.parametrize(
    ("family", "options"),
    [(f, {"immediate": i}) for f in ("llama", "gpt_neox") for i in (True, False)]
    + [(f, {"block": "idefics", "gates": "vector", "qk_norm": True}) for f in ("llama", "gpt2")],
)
def test_rows_laid_end_to_end_stay_apart(family, options):
    model = made(family, **options)
    texts = ["xIabEIc", "abI", "abc", "IaIbIcd"]
    each = [rows(t, seed=i) for i, t in enumerate(texts)]
    counts = [t.count("I") for t in texts]
    shown = list(pictures(sum(counts)).split(counts))
    want = [model(ids, **({"pixel_values": p} if len(p) else {})).logits[0] for ids, p in zip(each, shown, strict=True)]
    places = torch.cat([torch.arange(ids.shape[1]) for ids in each])[None]
    got = model(torch.cat(each, 1), pixel_values=torch.cat(shown), position_ids=places).logits[0]
    torch.testing.assert_close(got, torch.cat(want), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "packing"), [("llama", False), ("llama", True), ("opt", False), ("gpt_neox", False), ("gpt_neox", True), ("mpt", False)]
)
def test_checkpointing_changes_nothing(family, packing):
    model, ids = made(family), rows("xIabE", "IabcI")
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    model.train_only(("connector", "adapter", "new_tokens"))
    batch = {"input_ids": ids, "labels": ids}
    if packing:
        batch = {k: v.reshape(1, -1) for k, v in batch.items()} | {"position_ids": torch.arange(5).repeat(2)[None]}

    def gradients():
        model.zero_grad()
        first = model(**batch, pixel_values=pictures(3)).loss
        # Another pass before the first one's backward: what is computed again must read what it read.
        second = model(rows("IIabc", "abcde", seed=3), pixel_values=pictures(2, seed=3)).logits.square().mean()
        (first + second).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.train()
    kept = gradients()
    model.checkpoint_activations()
    seen = []
    for module in model.fusion.layers.values():
        module.ff[2].register_forward_hook(lambda *_: seen.append(1))
    again = gradients()
    assert len(seen) >= 2 * 2 * len(model.fusion.layers), "the blocks were not computed again"
    assert kept.keys() == again.keys()
    assert {n.split(".")[0] for n in kept} == {"connector", "fusion", "language"}
    for name, value in kept.items():
        torch.testing.assert_close(again[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_the_cache_says_what_it_says_without(family):
    model = made(family)
    head = model.language.get_output_embeddings().weight
    with torch.no_grad():  # a token <image> that the model itself says shows nothing, and could not be told from the others below
        head[IMAGE] = head[5]
    texts = ["xIabEIc", "Iab", "abcd", "IIIab"]
    each = [rows(t, seed=i) for i, t in enumerate(texts)]
    counts = [t.count("I") for t in texts]
    shown = list(pictures(sum(counts)).split(counts))
    width = max(ids.shape[1] for ids in each)
    ids = torch.cat([F.pad(i, (width - i.shape[1], 0)) for i in each])
    mask = torch.cat([F.pad(torch.ones_like(i), (width - i.shape[1], 0)) for i in each])
    got = model.generate(ids, attention_mask=mask, pixel_values=torch.cat(shown), max_new_tokens=6)
    for row, (prompt, images) in enumerate(zip(each, shown, strict=True)):
        said = prompt
        for _ in range(6):
            logits = model(said, **({"pixel_values": images} if len(images) else {})).logits[:, -1]
            said = torch.cat([said, logits.argmax(-1)[:, None]], 1)
        assert got[row].tolist() == said[0, prompt.shape[1] :].tolist(), texts[row]


def test_only_the_gates_learn_in_the_first_step():
    model, ids = made(gates=False), rows("xIEab", "Iabcd")
    names = {n for n, p in model.named_parameters() if any(p is q for q in model.train_only(("adapter", "connector", "new_tokens")))}
    assert {n.split(".")[0] for n in names} == {"fusion", "connector", "language"}
    model(ids, pixel_values=pictures(2), labels=ids).loss.backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any() and not n.startswith("language.")}
    assert moved == {f"fusion.layers.{i}.{g}" for i in (1, 3) for g in ("attn_gate", "ff_gate")}
    table = model.language.get_input_embeddings().weight.grad
    assert table.abs().amax(-1).nonzero().flatten().tolist() == [IMAGE, END], "of the embeddings, the new tokens' rows alone"
    with torch.no_grad():
        for module in model.fusion.layers.values():
            module.attn_gate.sub_(module.attn_gate.grad)
            module.ff_gate.sub_(module.ff_gate.grad)
    model.zero_grad()
    model(ids, pixel_values=pictures(2), labels=ids).loss.backward()
    still = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {n for n in names if not n.startswith("language.")} <= still


def test_videos_and_the_temporal_embeddings():
    """A video of more frames than there are embeddings gets them stretched over it (8 to 30 in the paper; here 2 to 3)."""
    torch.manual_seed(0)
    model = build(replace(SYSTEM, connector=replace(SYSTEM.connector, frames=2, activation="squared_relu"))).eval()
    table = model.connector.resampler.frame_embs
    video = torch.randn(1, 3, 3, 16, 16)
    assert model.embed_images(video).shape == (1, 3, 32)
    states = model.encode(video)
    assert states.shape == (1, 3, 4, 32)
    with torch.no_grad():
        placed = states + torch.stack([table[0], table.mean(0), table[1]])[:, None]
        got = model.connector(states)
        table.zero_()
        torch.testing.assert_close(got, model.connector(placed), atol=1e-5, rtol=0)
    assert model.embed_images(torch.randn(2, 3, 16, 16)).shape == (2, 3, 32)


def test_videos_and_pictures_in_one_batch():
    """Frames end to end, and how many each has: what each gives alone, in the forward pass and in generation; from states too."""
    torch.manual_seed(0)
    model = build(replace(SYSTEM, connector=replace(SYSTEM.connector, frames=2))).eval()
    open_gates(model)
    ids, frames, pixels = rows("xIabI", "Iabcd"), torch.tensor([3, 1, 3]), torch.randn(7, 3, 16, 16)
    seen = model.embed_images(pixels, image_frames=frames)
    alone = [model.embed_images(part[None]) for part in pixels.split(frames.tolist())]
    torch.testing.assert_close(seen, torch.cat(alone), atol=1e-5, rtol=0)
    torch.testing.assert_close(alone[1], model.embed_images(pixels[3:4]), atol=1e-5, rtol=0)
    want = model(ids, image_embeds=seen).logits
    torch.testing.assert_close(model(ids, pixel_values=pixels, image_frames=frames).logits, want, atol=1e-5, rtol=0)
    turned = {"image_states": model.encode(pixels), "image_frames": frames, "image_rows": torch.tensor([2, 1, 0])}
    torch.testing.assert_close(model.embed_images(**turned), seen.flip(0), atol=1e-5, rtol=0)
    said = model.generate(ids, pixel_values=pixels, image_frames=frames, max_new_tokens=4)
    assert torch.equal(said, model.generate(ids, image_embeds=seen, max_new_tokens=4))
    last = pixels.clone()
    last[0] += 1  # the first frame of the first video, which its text sees as well as the last
    assert (model(ids, pixel_values=last, image_frames=frames).logits[0] - want[0])[1:].abs().max() > 1e-4
    with pytest.raises(ValueError, match="image_frames are read by a connector Resampler with frames, and this one has none"):
        made().embed_images(pixels, image_frames=frames)


def test_a_connector_that_fits():
    with pytest.raises(ValueError, match="GatedCrossAttention reads the latents of a Resampler, in the tower's width, got Linear"):
        build(replace(SYSTEM, connector=spec.Linear()))
    prefix = build(replace(SYSTEM, fusion=spec.Prefix()))
    assert prefix.embed_images(pictures(2)).shape == (2, 3, 24)


def test_the_likeliest_of_some_answers():
    """Closed questions are answered by log-likelihood: as the whole text scored anew, option by option."""
    model, ids, seen = made(), rows("xIabE", "Iabcd"), pictures(2)
    options = [[7], [5, 9], [11, 3, END]]
    got = option_logps(model, ids, options, pixel_values=seen)
    for b in range(2):
        for o, option in enumerate(options):
            whole = torch.cat([ids[b : b + 1], torch.tensor([option])], 1)
            logp = model(whole, pixel_values=seen[b : b + 1]).logits[0].log_softmax(-1)
            want = sum(float(logp[ids.shape[1] - 1 + k, token]) for k, token in enumerate(option))
            assert float(got[b, o]) == pytest.approx(want, abs=1e-4)
