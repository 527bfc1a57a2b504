"""The Q-Former against transformers' classes, and the passes of BLIP-2's pre-training against one another."""

import copy

import pytest
import torch
from torch import nn

from mmfast.nn import QFormer

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "encoder_hidden_size": 24,
    "cross_attention_frequency": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
B, N, TEXT, IMAGE = 3, 4, 6, 9


def redraw(module: nn.Module) -> nn.Module:
    """Weights at which every part matters."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            draw = torch.randn_like(p)
            is_norm = "norm" in name.lower() and name.endswith("weight")
            p.copy_(1 + 0.3 * draw if is_norm else 0.3 * draw if p.dim() == 1 else p.shape[-1] ** -0.5 * draw)
    return module.eval()


def blip2(text: bool = True):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = redraw(transformers.Blip2QFormerModel(transformers.Blip2QFormerConfig(**SIZES, use_qformer_text_input=text)))
    ours = QFormer(**SIZES, use_qformer_text_input=text).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def instructblip():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel

    theirs = redraw(InstructBlipQFormerModel(transformers.InstructBlipQFormerConfig(**SIZES, vocab_size=37)))
    ours = QFormer(**SIZES, vocab_size=37).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def mask(side: str) -> torch.Tensor:
    real = torch.ones(B, TEXT, dtype=torch.long)
    for b, missing in enumerate((0, 2, 5)):
        real[b, TEXT - missing :] = 0
    return real.flip(1) if side == "left" else real


def inputs():
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 37, (B, TEXT), generator=g)
    return torch.randn(1, N, 32, generator=g), torch.randn(B, IMAGE, 24, generator=g), torch.randn(B, TEXT, 32, generator=g), ids


def compare(theirs: nn.Module, ours: nn.Module, run_theirs, run_ours, tensors: list[torch.Tensor]) -> None:
    """Values to 1e-5; gradients of tensors and weights to 1e-4 of the largest."""
    results = []
    for module, run in ((theirs, run_theirs), (ours, run_ours)):
        module.zero_grad()
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = run(module, *leaves)
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        results.append((out, {**{n: p.grad for n, p in module.named_parameters()}, **{str(i): t.grad for i, t in enumerate(leaves)}}))
    (want, want_grads), (got, grads) = results
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert set(grads) == set(want_grads)
    for name, grad in want_grads.items():
        if grad is None:
            assert grads[name] is None, name
        else:
            assert (grads[name] - grad).abs().max() <= 1e-4 * max(grad.abs().max(), 1.0), name


@pytest.mark.parametrize("text", [True, False])
def test_blip2_image_pass(text):
    theirs, ours = blip2(text)
    queries, image, _, _ = inputs()
    compare(
        theirs, ours,
        lambda m, q, i: m(query_embeds=q.expand(B, -1, -1), encoder_hidden_states=i).last_hidden_state,
        lambda m, q, i: m(q, i).queries,
        [queries, image],
    )  # fmt: skip


def test_blip2_padded_images():
    theirs, ours = blip2()
    queries, image, _, _ = inputs()
    lens = torch.tensor([9, 4, 1])
    real = (torch.arange(IMAGE) < lens[:, None]).long()
    compare(
        theirs, ours,
        lambda m, q, i: m(query_embeds=q.expand(B, -1, -1), encoder_hidden_states=i, encoder_attention_mask=real).last_hidden_state,
        lambda m, q, i: m(q, i, image_lens=lens).queries,
        [queries, image],
    )  # fmt: skip


@pytest.mark.parametrize("side", ["right", "left", None])
def test_blip2_matching_pass(side):
    theirs, ours = blip2()
    queries, image, text, _ = inputs()
    real = None if side is None else mask(side)
    whole = None if side is None else torch.cat([torch.ones(B, N, dtype=torch.long), real], 1)

    def run_theirs(m, q, i, t):
        both = torch.cat([q.expand(B, -1, -1), t], 1)
        return m(query_embeds=both, query_length=N, attention_mask=whole, encoder_hidden_states=i).last_hidden_state

    def run_ours(m, q, i, t):
        out = m(q, i, text=t, text_mask=real)
        assert out.cache is None
        return torch.cat([out.queries, out.text], 1)

    compare(theirs, ours, run_theirs, run_ours, [queries, image, text])
    if side == "right":
        lens = real.sum(-1)
        got = ours(queries, image, text=text, text_lens=lens)
        torch.testing.assert_close(got.queries, ours(queries, image, text=text, text_mask=real).queries, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["right", "left"])
def test_blip2_text_pass(side):
    theirs, ours = blip2()
    _, _, text, _ = inputs()
    real = mask(side)
    compare(
        theirs, ours,
        lambda m, t: m(query_embeds=t, query_length=0, attention_mask=real).last_hidden_state,
        lambda m, t: m(text=t, text_mask=real).text,
        [text],
    )  # fmt: skip
    assert ours(text=text, text_mask=real).queries is None


@pytest.mark.parametrize("side", ["right", "left"])
def test_instructblip(side):
    theirs, ours = instructblip()
    queries, image, _, ids = inputs()
    real = mask(side)
    whole = torch.cat([torch.ones(B, N, dtype=torch.long), real], 1)

    def run_theirs(m, q, i):
        return m(input_ids=ids, query_embeds=q.expand(B, -1, -1), attention_mask=whole, encoder_hidden_states=i).last_hidden_state

    def run_ours(m, q, i):
        out = m(q, i, text=ids, text_mask=real)
        return torch.cat([out.queries, out.text], 1)

    compare(theirs, ours, run_theirs, run_ours, [queries, image])
    want = ours(queries, image, text=ids, text_mask=real).queries
    repadded = ours(queries, image, text=torch.where(real == 0, 36, ids), text_mask=real).queries
    torch.testing.assert_close(repadded, want, atol=1e-5, rtol=0)
    instructed = ours(queries, image, text=ids.flip(0), text_mask=real).queries
    assert (instructed - want).abs().max() > 0.01
    compare(
        theirs, ours,
        lambda m, q, i: m(input_ids=None, query_embeds=q.expand(B, -1, -1), encoder_hidden_states=i).last_hidden_state,
        lambda m, q, i: m(q, i).queries,
        [queries, image],
    )  # fmt: skip


def test_unimodal_is_the_two_passes_apart():
    _, ours = instructblip()
    queries, image, _, ids = inputs()
    both = ours(queries, image, text=ids, text_mask=mask("left"), mask_mode="unimodal")
    torch.testing.assert_close(both.queries, ours(queries, image).queries, atol=1e-5, rtol=0)
    torch.testing.assert_close(both.text, ours(text=ids, text_mask=mask("left")).text, atol=1e-5, rtol=0)
    assert both.cache is None


def test_captioning_with_cached_queries():
    _, ours = instructblip()
    queries, image, _, ids = inputs()
    seen = ours(queries, image)
    assert seen.cache.num_queries == N
    assert seen.cache.layers[0][0].shape == (B, N, 4, 8)
    joint = ours(queries, image, text=ids, mask_mode="multimodal_causal")
    torch.testing.assert_close(joint.queries, seen.queries, atol=1e-5, rtol=0)  # queries do not see the text
    after = ours(text=ids, cache=seen.cache, mask_mode="multimodal_causal")
    torch.testing.assert_close(after.text, joint.text, atol=1e-5, rtol=0)
    # Piece by piece, as in generation: two tokens, one, the rest.
    cache, pieces = seen.cache, []
    for piece in ids.split([2, 1, 3], 1):
        out = ours(text=piece, cache=cache, mask_mode="multimodal_causal")
        cache = out.cache
        pieces.append(out.text)
    torch.testing.assert_close(torch.cat(pieces, 1), joint.text, atol=1e-5, rtol=0)
    assert cache.layers[2][1].shape == (B, N + TEXT, 4, 8)
    # Causal: the third token moves what comes from it on, and the image moves everything.
    changed = ids.clone()
    changed[:, 2] = (ids[:, 2] + 1) % 36 + 1
    moved = (ours(text=changed, cache=seen.cache, mask_mode="multimodal_causal").text - after.text).abs().amax((0, 2)) > 1e-4
    assert moved.tolist() == [False, False, True, True, True, True]
    elsewhere = ours(text=ids, cache=ours(queries, image.flip(0)).cache, mask_mode="multimodal_causal").text
    assert ((elsewhere - after.text).abs().amax(-1)[0] > 1e-4).all()


def test_captioning_with_padded_text_and_gradients_through_the_cache():
    _, ours = instructblip()
    queries, image, _, ids = inputs()
    real = mask("left")
    grads = []
    for cached in (True, False):
        leaf, picture = queries.clone().requires_grad_(), image.clone().requires_grad_()
        if cached:
            out = ours(text=ids, text_mask=real, cache=ours(leaf, picture).cache, mask_mode="multimodal_causal")
        else:
            out = ours(leaf, picture, text=ids, text_mask=real, mask_mode="multimodal_causal")
        weight = torch.randn(out.text.shape, generator=torch.Generator().manual_seed(1)) * real[..., None]
        grads.append(torch.autograd.grad((out.text * weight).sum(), [leaf, picture]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        assert a.abs().max() > 1e-3


def test_dropout_in_training_alone():
    _, ours = blip2()
    queries, image, _, _ = inputs()
    want = ours(queries, image).queries
    for part in ("attention", "hidden"):
        noisy = QFormer(**{**SIZES, f"{'attention_probs' if part == 'attention' else part}_dropout_prob": 0.2})
        noisy.load_state_dict(ours.state_dict())
        torch.testing.assert_close(noisy.eval()(queries, image).queries, want)
        noisy.train()
        assert (noisy(queries, image).queries - noisy(queries, image).queries).abs().max() > 0.01, part
        torch.manual_seed(1)
        a = noisy(queries, image).queries
        torch.manual_seed(1)
        assert torch.equal(a, noisy(queries, image).queries)


def test_sizes_of_the_released_ones():
    with torch.device("meta"):
        stage2 = QFormer(use_qformer_text_input=False)
        stage2_text = QFormer()
        instruct = QFormer(vocab_size=30523)
        large = QFormer(use_qformer_text_input=False, encoder_hidden_size=1024)  # beside CLIP's ViT-L
    size = [sum(p.numel() for p in m.parameters()) for m in (stage2, stage2_text, instruct, large)]
    assert size == [105_137_664, 161_825_280, 185_660_160, 101_598_720]
    start = QFormer(**SIZES, vocab_size=37)
    assert start.encoder["layer"][0].attention["attention"]["key"].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert (start.embeddings["word_embeddings"].weight[0] == 0).all()


def test_half_and_copies():
    _, ours = instructblip()
    queries, image, _, ids = inputs()
    want = ours(queries, image, text=ids).queries
    half = copy.deepcopy(ours).bfloat16()(queries, image, text=ids).queries
    assert half.dtype == torch.bfloat16
    assert (half.float() - want).norm() < 0.05 * want.norm()


def test_refuses_what_does_not_belong_together():
    ours, plain = QFormer(**SIZES, vocab_size=37), QFormer(**SIZES, use_qformer_text_input=False)
    queries, image, text, ids = inputs()
    cases = [
        (lambda: ours(), "give query_embeds, text, or both"),
        (lambda: ours(queries), "queries read an image"),
        (lambda: ours(queries.expand(2, -1, -1), image), "2 sets of queries for 3 images"),
        (lambda: ours(queries, image, text=ids[:2]), "2 texts for 3 images"),
        (lambda: ours(queries, image, text=text), r"expected text as ids \[B, S\], got \[3, 6, 32\]"),
        (lambda: plain(queries, image, text=text), "built without text input"),
        (lambda: QFormer(**SIZES)(queries, image, text=ids), r"embeddings \[B, S, D\]; this one has no vocabulary, got \[3, 6\]"),
        (lambda: ours(text=ids, cache=ours(queries, image).cache), "after a cache comes text alone"),
        (lambda: ours(queries, image, text=ids, mask_mode="causal"), "unknown mask_mode 'causal'"),
        (lambda: QFormer(**{**SIZES, "num_attention_heads": 5}), "no multiple of num_attention_heads 5"),
        (lambda: QFormer(vocab_size=9, use_qformer_text_input=False), "a vocabulary without text input"),
        (lambda: QFormer(**SIZES, vocab_size=37, max_position_embeddings=4)(text=ids), "6 text positions, there are embeddings for 4"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
