"""What every op owes its callers, whichever way a call takes: any layout, one autograd rule, no graph where none is wanted."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mmfast

B, T, N, H, D, S, K = 2, 3, 4, 2, 8, 3, 16
ROWS, KEYS = (B, T, H, D), (B, N, H, D)
IDS = torch.tensor([[0, 2, -1], [1, 1, 0]])
KEEP = torch.tensor([[True, True, False], [True, False, True]])
TIMES = torch.tensor([[0, 1, 2], [2, 1, 1]])

# An op as a function of float tensors, and their shapes; those before the bar have gradients.
OPS: dict[str, tuple[Callable, list, list]] = {
    "cross_attention": (lambda q, k, v: mmfast.cross_attention(q, k, v, return_lse=True), [ROWS, KEYS, KEYS], []),
    "two segments": (lambda q, k, v, k2, v2: mmfast.cross_attention(q, k, v, k2, v2), [ROWS, KEYS, KEYS, KEYS, KEYS], []),
    "qformer": (
        lambda q, k, v: mmfast.qformer_attention(q, k, v, num_queries=N - S, mask_mode="multimodal_causal", text_mask=KEEP),
        [ROWS, KEYS, KEYS],
        [],
    ),
    "media": (lambda q, k, v: mmfast.media_cross_attention(q, k, v, text_time=TIMES, latents_per_media=2), [ROWS, KEYS, KEYS], []),
    "merge": (mmfast.merge_attention, [ROWS, (B, H, T), ROWS, (B, H, T)], []),
    "gae": (lambda r, v, b: mmfast.gae(r, v, gamma=0.9, lam=0.8, mask=KEEP, dones=~KEEP, bootstrap=b), [], [(B, T), (B, T), (B,)]),
    "whiten": (lambda x: mmfast.masked_whiten(x, KEEP), [], [(B, T)]),
    "policy": (
        lambda x, old, a, w, ref: mmfast.ppo_policy_loss(x, old, a, mask=KEEP, weights=w, ref_logp=ref, kl_coef=0.1)[0],
        [(B, T)],
        [(B, T)] * 4,
    ),
    "value": (lambda v, old, g: mmfast.ppo_value_loss(v, old, g, mask=KEEP)[0], [(B, T)], [(B, T)] * 2),
    "pairs": (lambda a, b, c, d: mmfast.preference_loss(a, b, c, d, reduction="none"), [(S,), (S,)], [(S,), (S,)]),
    "segments": (lambda x, w: mmfast.segment_logp(x, IDS, token_weights=w, norm="weight", num_segments=3), [(B, T), (B, T)], []),
    "label_logp": (lambda z: mmfast.label_logp(z, IDS.abs(), return_entropy=True), [(B, T, K)], []),
    "linear_logp": (lambda h, w: mmfast.linear_logp(h, w, IDS.abs()), [(B, T, D), (K, D)], []),
    "nearest": (lambda x, e: mmfast.vq_nearest(x, e, return_distance=True), [], [(B, T, D), (K, D)]),
    "quantize": (lambda x, e: mmfast.vq_quantize(x, e), [(B, T, D), (K, D)], []),
    "code_stats": (lambda x: mmfast.vq_code_stats(x, IDS.abs(), K), [], [(B, T, D)]),
}


def drawn(name: str) -> tuple[Callable, list[Tensor], int]:
    call, moving, fixed = OPS[name]
    generator = torch.Generator().manual_seed(0)
    return call, [torch.randn(shape, generator=generator) for shape in (*moving, *fixed)], len(moving)


def outcome(call: Callable, tensors: list[Tensor], moving: int) -> list[Tensor]:
    """Outputs, then gradients under uneven cotangents."""
    leaves = [t.requires_grad_() for t in tensors[:moving]]
    outputs = call(*tensors)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    moved = [o for o in outputs if o.requires_grad]
    loss = sum((o * torch.arange(1.0, o.numel() + 1).view(o.shape)).sum() for o in moved)
    grads = torch.autograd.grad(loss, leaves) if moving else ()
    return [x.detach() for x in (*outputs, *grads)]


def strided(t: Tensor) -> Tensor:
    """Every second element of a larger tensor, last dim included; what lies between is NaN."""
    wide = torch.full([2 * n for n in t.shape], torch.nan)
    view = wide[tuple(slice(None, None, 2) for _ in t.shape)]
    return view.copy_(t)


def turned(t: Tensor) -> Tensor:
    """The same values with the dims stored in reverse order."""
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


@pytest.mark.parametrize("layout", [strided, turned])
@pytest.mark.parametrize("name", OPS)
def test_any_layout(name, layout):
    call, tensors, moving = drawn(name)
    expected = outcome(call, [t.clone() for t in tensors], moving)
    laid = [layout(t).detach() for t in tensors]
    assert any(not t.is_contiguous() for t in laid) or all(t.dim() == 1 for t in laid)
    for got, want in zip(outcome(call, laid, moving), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OPS)
def test_one_value_for_all(name):
    """Expanded tensors: stride 0."""
    call, tensors, moving = drawn(name)
    one = [t[:1].expand_as(t) for t in tensors]
    expected = outcome(call, [t.contiguous() for t in one], moving)
    for got, want in zip(outcome(call, [t.detach() for t in one], moving), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_strides_of_dims_of_length_one_do_not_matter():
    for shape, strides in (((1, 6), (77, 1)), ((6, 1), (1, 99)), ((1, 1), (5, 7)), ((0, 3), (3, 1)), ((3, 0), (9, 4))):
        x = torch.randn(200).as_strided(shape, strides)
        for a, b in zip(mmfast.gae(x, x, gamma=0.9, lam=0.9), mmfast.gae(x.clone(), x.clone(), gamma=0.9, lam=0.9), strict=True):
            assert torch.equal(a, b)
            assert a.shape == x.shape
            assert a.stride() == torch.empty(shape).stride()
        assert torch.equal(mmfast.masked_whiten(x), mmfast.masked_whiten(x.clone()))


def test_no_elements_leave_numbers_not_memory():
    """Of nothing the losses are 0: their memory is not what the allocator happened to give."""
    empty = torch.empty(0, 5, requires_grad=True)
    for loss, stats in (mmfast.ppo_policy_loss(empty, empty, empty), mmfast.ppo_value_loss(empty, empty, empty)):
        assert loss.item() == 0
        assert all(value.item() == 0 for value in stats.values())
        assert torch.autograd.grad(loss, empty)[0].shape == empty.shape
    assert mmfast.vq_quantize(torch.empty(0, D), torch.randn(K, D))[2].item() == 0


@pytest.mark.parametrize("name", OPS)
def test_with_and_without_a_graph(name):
    """The same bits under no_grad, in inference mode and with gradient on; a graph only where an input asks for one."""
    call, tensors, moving = drawn(name)
    with torch.no_grad():
        plain = call(*tensors)
    with torch.inference_mode():
        inferred = call(*tensors)
    constant = call(*tensors)
    graphed = call(*(t.clone().requires_grad_() for t in tensors))
    first = [outputs[0] if isinstance(outputs, tuple) else outputs for outputs in (plain, inferred, constant, graphed)]
    assert all(torch.equal(first[0], other) for other in first[1:])
    assert [t.requires_grad for t in first] == [False, False, False, moving > 0]


def test_rules_are_called_without_the_dispatchers_wrapper():
    """torch.library's wrapper around a registered rule costs more than the kernels of small inputs."""
    for name in OPS:
        call, tensors, moving = drawn(name)
        if not moving:
            continue
        output = call(*(t.requires_grad_() for t in tensors))
        nodes, seen = [(output[0] if isinstance(output, tuple) else output).grad_fn], []
        while nodes:
            node = nodes.pop()
            if node is not None:
                seen.append(node.name())
                nodes += [n for n, _ in node.next_functions]
        assert not [n for n in seen if "GeneratedBackward" in n], f"{name}: {seen}"


def test_registered_rules_agree_with_the_eager_ones():
    q, k = torch.randn(ROWS, requires_grad=True), torch.randn(KEYS, requires_grad=True)
    ops = torch.ops.mmfast
    args = (None,) * 9, (0, 0, 0, 0, D**-0.5, 0)
    pairs = [
        (ops.attention(q, k, k, *args[0], *args[1])[0], mmfast.cross_attention(q, k, k), (q, k)),
        (ops.label_logp(q, IDS.abs()[..., None].expand(B, T, H), False, 1.0, 0.0, -100)[0], mmfast.label_logp(q, IDS.abs()[..., None].expand(B, T, H)).view(-1), (q,)),
    ]  # fmt: skip
    for registered, eager, leaves in pairs:
        assert torch.equal(registered, eager)
        grads = (torch.autograd.grad(x.square().sum(), leaves) for x in (registered, eager))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_transforms_of_functions():
    """torch.func sees the rule too, and a batch of calls is a loop over them."""
    q, k = torch.randn(ROWS), torch.randn(KEYS)
    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(mmfast.cross_attention(leaf, k, k).square().sum(), leaf)
    assert torch.equal(torch.func.grad(lambda t: mmfast.cross_attention(t, k, k).square().sum())(q), expected)
    many = torch.stack([q, -q])
    with torch.no_grad():
        batched = torch.func.vmap(lambda t: mmfast.cross_attention(t, k, k))(many)
        assert torch.equal(batched, torch.stack([mmfast.cross_attention(t, k, k) for t in many]))
