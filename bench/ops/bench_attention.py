"""Attention against the upstream modules' own code, SDPA, torch.compile and flash-attn, interleaved in one run.

``mmfast bench attention`` (or ``pytest bench/ops/bench_attention.py -s``; ``-k perceiver`` for one group) prints the tables and writes
``bench/results/<device>/attention.csv``, and ``attention_means.csv``: per group the geometric mean of (peer's median / ours) and the worst
shape. The clock starts only after a provider's output was compared with float64.

Only the attention core is timed: projections and norms around it are the same for all. Keys and values lie as the modules' projections
leave them (open_flamingo: halves of one tensor; Hugging Face: one tensor each). Batches: on a CPU 1 is one request, 4 to 16 a small
training or evaluation batch; on a GPU those of training. Dropout is compared at probability 0 and timed at 0.1.
"""

import itertools
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import pytest
import timing
import torch
from torch import Tensor, einsum
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import dropout, scaled_dot_product_attention

import mmfast
from mmfast.ops import attention as ops

DEVICE = timing.DEVICE
DTYPES = timing.sizes([torch.float32, torch.bfloat16], [torch.bfloat16, torch.float32, torch.float16], [torch.float32])
MODES = ["forward", "backward", "forward+backward"]
# Of torch.compile in the whole run; its rows are left out once they are spent (MMFAST_COMPILE_SECONDS=-1: none).
COMPILE_SECONDS = float(os.environ.get("MMFAST_COMPILE_SECONDS", timing.sizes(40, 40, -1)))
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # relative L2 of a provider; ours is held tighter by the tests
ROWS: list[dict] = []


def on(cpu: tuple, cuda: tuple) -> tuple:
    return timing.sizes(cpu, cuda, (1,))


@dataclass
class Case:
    group: str  # means are taken over a group
    model: str
    batch: int
    rows: int
    keys: int
    heads: int
    width: int
    key_heads: int = 0
    latents: int = 0  # keys of a second segment
    queries: int = 0  # Q-Former: learned queries among the rows
    mask: str = ""  # .. and its mode
    images: int = 0

    def __str__(self) -> str:
        keys = f"({self.keys}+{self.latents})" if self.latents else f"{self.keys}"
        heads = f"{self.heads}/{self.key_heads}" if self.key_heads else f"{self.heads}"
        text = f" {self.mask}" if self.mask else ""
        return f"{self.model}{text} {self.rows} x {keys}, {heads} x {self.width}, batch {self.batch}"


FLAMINGO = partial(Case, "perceiver", "Flamingo", rows=64, latents=64, heads=8, width=64)
BLIP2 = partial(Case, "cross", "BLIP-2", rows=32, heads=12, width=64)
SELF = partial(Case, "qformer", heads=12, width=64, queries=32)
CASES = [
    *(FLAMINGO(batch=b, keys=256) for b in on((1, 4, 16), (1, 64, 256))),
    *(FLAMINGO(batch=b, keys=2048) for b in on((1, 4), (1, 8))),
    *(BLIP2(batch=b, keys=257) for b in on((1, 4, 16), (16, 128))),
    *(BLIP2(batch=b, keys=677) for b in on((1, 4), (16, 64))),
    *(Case("cross", "Qwen-VL", batch=b, rows=256, keys=1024, heads=32, width=128) for b in on((1, 2), (1, 8))),
    *(Case("padded", "Idefics2", batch=b, rows=64, keys=1024, latents=64, heads=16, key_heads=4, width=96) for b in on((4,), (8, 64))),
    *(SELF("InstructBLIP", mask="bidirectional", batch=b, rows=n, keys=n) for n in (64, 160) for b in on((4, 16), (16, 128))),
    *(SELF("BLIP-2", mask="multimodal_causal", batch=b, rows=64, keys=64) for b in on((4, 16), (16, 128))),
    *(Case("media", "OpenFlamingo", batch=b, rows=512, keys=320, images=5, heads=8, width=64) for b in on((1, 4), (4, 32))),
]
if timing.DRY:
    CASES = list({c.group: c for c in reversed(CASES)}.values())
# Of each group only this case is compiled, and on the CPU also run with lesser instruction sets.
CLOSER_LOOK = {c.group: str(c) for c in sorted(CASES, key=lambda c: c.batch > 4)[::-1]}


@dataclass
class Provider:
    call: Callable[..., Tensor]  # leaves -> [B, rows, heads, width]
    leaves: list[Tensor]
    wraps: Callable = nullcontext  # a context that the call runs in

    def forward(self) -> Tensor:
        with torch.no_grad(), self.wraps():
            return self.call(*self.leaves)

    def graph(self) -> Tensor:
        with self.wraps():
            return self.call(*self.leaves)

    def timed(self, mode: str) -> Callable[[], object]:
        if mode == "forward":
            return self.forward
        out = self.graph()
        weight = torch.randn_like(out)
        if mode == "forward+backward":
            return lambda: torch.autograd.grad(self.graph(), self.leaves, weight)
        return lambda: torch.autograd.grad(out, self.leaves, weight, retain_graph=True)


# ------------------------------------------------------------------------------------------------- the cores of upstream modules


def perceiver_core(q, k, v, k2, v2):
    """open_flamingo's PerceiverAttention between its projections; the keys are joined here rather than as the projection's input."""
    q, k, v = (t.transpose(1, 2) for t in (q, torch.cat([k, k2], 1), torch.cat([v, v2], 1)))
    scores = einsum("... i d, ... j d -> ... i j", q * q.shape[-1] ** -0.5, k)
    weights = (scores - scores.amax(-1, keepdim=True).detach()).softmax(-1)
    return einsum("... i j, ... j d -> ... i d", weights, v).transpose(1, 2).flatten(2).unflatten(2, (q.shape[1], -1))


def media_core(q, k, v, *, text_time, latents):
    """open_flamingo's MaskedCrossAttention between its projections: every token against every image, then masked."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = einsum("... i d, ... j d -> ... i j", q * q.shape[-1] ** -0.5, k)
    image = (torch.arange(k.shape[2] // latents, device=q.device) + 1).repeat_interleave(latents)
    scores = scores.masked_fill(text_time[:, None, :, None] != image, -torch.finfo(scores.dtype).max)
    weights = (scores - scores.amax(-1, keepdim=True).detach()).softmax(-1)
    weights = weights.masked_fill((text_time == 0)[:, None, :, None], 0.0)
    return einsum("... i j, ... j d -> ... i d", weights, v).transpose(1, 2).flatten(2).unflatten(2, (q.shape[1], -1))


def hugging_face_core(q, k, v, *, mask=None, p=0.0, wide=False):
    """``eager_attention_forward`` of transformers' BLIP-2 and, with ``wide`` (softmax in float32), Idefics2."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t if t.shape[1] == q.shape[1] else t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    weights = dropout(scores.softmax(-1, dtype=torch.float32 if wide else None).to(q.dtype), p)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


def sdpa(q, k, v, *, mask=None, p=0.0):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return scaled_dot_product_attention(q, k, v, mask, dropout_p=p, enable_gqa=k.shape[1] != q.shape[1]).transpose(1, 2)


def concat_sdpa(q, k, v, k2, v2, *, mask=None):
    return sdpa(q, torch.cat([k, k2], 1), torch.cat([v, v2], 1), mask=mask)


def flash_attn():
    """flash_attn_func in our layout, or None with the reason printed."""
    if DEVICE == "cpu":
        return None
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        print(f"flash-attn left out: {error}")
        return None
    return lambda q, k, v, p=0.0: flash_attn_func(q, k, v, dropout_p=p)


# ------------------------------------------------------------------------------------------------------------------ providers


def make(case: Case, dtype: torch.dtype, p: float) -> tuple[dict[str, Provider], Tensor, int]:
    """All providers of a case, the upstream eager core first; the float64 truth (of probability 0); pairs of row and key that see each other."""
    torch.manual_seed(0)

    def random(n, heads=case.key_heads or case.heads):
        return torch.randn(case.batch, n, heads, case.width, device=DEVICE).to(dtype)

    def halves(n):
        return torch.cat([random(n), random(n)], 2).chunk(2, 2) if case.group in ("perceiver", "media") else (random(n), random(n))

    q, (k, v) = random(case.rows, case.heads), halves(case.keys)
    own = [q, k, v]
    one = own  # for peers that know one segment
    if case.latents:
        own = [*own, *halves(case.latents)]
        one = [q, torch.cat([k, own[3]], 1), torch.cat([v, own[4]], 1)]
    options, mask, additive = {}, None, None
    if case.group == "padded":  # images of different sizes
        lens = torch.linspace(case.keys // 2, case.keys, case.batch, device=DEVICE).int()
        options = {"key_lens": lens}
        seen = torch.arange(case.keys + case.latents, device=DEVICE)
        mask = ((seen < lens[:, None]) | (seen >= case.keys))[:, None, None]
    if case.group == "qformer":
        text = case.keys - case.queries
        real = torch.arange(text, device=DEVICE) < torch.linspace(text // 2, text, case.batch, device=DEVICE).int()[:, None]
        options = {"num_queries": case.queries, "mask_mode": case.mask, "text_mask": real}
        seen = torch.ones(case.keys, case.keys, dtype=torch.bool, device=DEVICE)
        if case.mask == "multimodal_causal":
            seen = seen.tril()
            seen[: case.queries, : case.queries] = True
        valid = torch.cat([real.new_ones(case.batch, case.queries), real], 1)[:, None, None]
        mask = seen & valid if case.mask == "multimodal_causal" else valid
    if case.group == "media":  # a few words, then an image before every hundred
        places = torch.arange(case.images, device=DEVICE) * (case.rows // case.images) + 6
        time_ = torch.zeros(case.batch, case.rows, dtype=torch.long, device=DEVICE).index_fill_(1, places, 1).cumsum(1)
        latents = case.keys // case.images
        options = {"text_time": time_, "latents_per_media": latents}
        mask = (time_[..., None] == torch.arange(case.keys, device=DEVICE) // latents + 1)[:, None]
    if mask is not None:
        additive = torch.zeros(mask.shape, device=DEVICE, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

    op, ref = {
        "qformer": (mmfast.qformer_attention, ops.qformer_attention_ref),
        "media": (mmfast.media_cross_attention, ops.media_cross_attention_ref),
    }.get(case.group, (mmfast.cross_attention, ops.cross_attention_ref))
    truth = ref(*(t.double() for t in own), **options)
    if p:
        options["dropout_p"] = p

    def provider(call, tensors, **more):
        return Provider(call, [t.detach().requires_grad_() for t in tensors], **more)

    def core(*t):
        if case.group == "perceiver":
            return perceiver_core(*t)
        if case.group == "media":
            return media_core(*t, text_time=time_, latents=latents)
        if case.group == "padded":
            return hugging_face_core(t[0], torch.cat([t[1], t[3]], 1), torch.cat([t[2], t[4]], 1), mask=additive, wide=True)
        return hugging_face_core(*t, mask=additive, p=p)

    made = {"eager": provider(core, own)}
    if case.latents:
        made["concat+sdpa"] = provider(partial(concat_sdpa, mask=mask), own)
    if DEVICE == "cpu":
        made["sdpa"] = provider(partial(sdpa, mask=mask, p=p), one)
    else:
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH):
            name = backend.name.split("_")[0].lower()
            made[f"sdpa {name}"] = provider(partial(sdpa, mask=mask, p=p), one, wraps=partial(sdpa_kernel, backend))
    if mask is None and (flash := flash_attn()):
        made["flash-attn"] = provider(partial(flash, p=p), one)
    made["mmfast"] = provider(partial(op, **options), own)
    rows_keys = (case.batch, case.heads, case.rows, case.keys + case.latents)
    return made, truth, math.prod(rows_keys) if mask is None else int(mask.expand(rows_keys).sum())


def check(made: dict[str, Provider], truth: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Relative errors; peers that refuse the case or are wrong are taken out of ``made``, with the reason."""
    errors = {}
    for name, p in list(made.items()):
        try:
            error = ((p.forward() - truth).norm() / truth.norm()).item()
            if name != "mmfast":
                torch.autograd.grad(p.graph().sum(), p.leaves)
        except Exception as refusal:  # whatever a peer says, it does not end the run
            if name == "mmfast":
                raise
            print(f"  {name} left out: {type(refusal).__name__} {str(refusal)[:120]!r}")
            del made[name]
            continue
        assert name != "mmfast" or error < TOLERANCE[dtype], f"mmfast is off by {error}"
        if error < TOLERANCE[dtype]:
            errors[name] = error
        else:
            print(f"  {name} left out: off by {error:.1e}")
            del made[name]
    return errors


def compiled(provider: Provider, dtype: torch.dtype, look: bool) -> Provider | None:
    """The eager core under torch.compile, forward and backward ready, or None with the reason printed."""
    reason = "only the first case of a group, in float32 and bfloat16" if not look or dtype == torch.float16 else ""
    if compiled.seconds > COMPILE_SECONDS:
        reason = f"its {COMPILE_SECONDS:g} s are spent"
    if reason:
        print(f"  torch.compile left out: {reason}")
        return None
    start = time.perf_counter()
    torch.compiler.reset()
    made = Provider(torch.compile(provider.call, dynamic=False), provider.leaves)
    made.forward()
    torch.autograd.grad(made.graph().sum(), made.leaves)
    compiled.seconds += time.perf_counter() - start
    return made


compiled.seconds = 0.0


# ---------------------------------------------------------------------------------------------------------------------- tests


def write() -> None:
    timing.write_rows("attention", ROWS)
    means = list(summary(ROWS))
    timing.write_rows("attention_means", means, columns=list(means[0]))


@pytest.fixture(scope="module", autouse=True)
def _report():
    yield
    for m in summary(ROWS):
        worst = f"worst {m['worst']:>5s}x  {m['worst_shape']}"
        print(f"  {m['group']:10s} {m['mode']:17s} {m['dtype']:9s} vs {m['peer']:13s} {m['mean']:>6s}x over {m['shapes']:2d}  {worst}")


def summary(rows: list[dict]):
    """Per group, type, mode and peer: the geometric mean over shapes of the peer's median over ours, and the worst shape."""
    first = {key: n for n, key in reversed(list(enumerate((r["op"], r["dtype"], r["mode"]) for r in rows)))}
    by = lambda r: first[r["op"], r["dtype"], r["mode"]]  # noqa: E731
    for _, part in itertools.groupby(sorted(rows, key=by), by):
        part = list(part)
        medians: dict[str, dict[str, float]] = {}
        for r in part:
            medians.setdefault(r["provider"], {})[r["shape"]] = float(r["median_ms"])
        for peer, theirs in medians.items():
            if peer.startswith(("mmfast", "graph: ")):
                continue
            ratios = {shape: t / medians["mmfast"][shape] for shape, t in theirs.items()}
            worst = min(ratios, key=ratios.get)
            mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
            yield dict(group=part[0]["op"], mode=part[0]["mode"], dtype=part[0]["dtype"], peer=peer, mean=f"{mean:.2f}", shapes=len(ratios),
                       worst=f"{ratios[worst]:.2f}", worst_shape=worst)  # fmt: skip


@pytest.mark.parametrize("group", dict.fromkeys(c.group for c in CASES))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_attention(group, dtype):
    for case in CASES:
        if case.group != group or timing.out_of_time(f"{case}, {dtype}"):
            continue
        print(f"\n{case}, {str(dtype).removeprefix('torch.')}")
        made, truth, pairs = make(case, dtype, 0.0)
        errors = check(made, truth, dtype)
        if group == "qformer":
            made, _, _ = make(case, dtype, 0.1)
        made = {name: p for name, p in made.items() if name in errors}
        look = str(case) == CLOSER_LOOK[group]
        if (quick := compiled(made["eager"], dtype, look)) is not None:
            made["torch.compile"] = quick
        for mode in MODES:
            calls = runnable(made, mode)
            if DEVICE == "cuda" and mode == "forward":
                calls |= in_graphs(calls)
            if DEVICE == "cpu" and look:
                calls |= lesser_isas(calls["mmfast"], dtype)
            times = timing.interleaved(calls, repeats=repeats(calls), warmup=25 if DEVICE == "cuda" else 1, device=DEVICE)
            weigh = mode != "backward" and dtype == torch.float32
            peaks = {n: timing.peak_memory_mb(c, DEVICE) for n, c in calls.items() if weigh and not n.startswith("mmfast ")}
            ROWS.extend(rows_of(case, mode, dtype, times, peaks, errors, least(made["mmfast"], mode, pairs, case.width)))
        write()


def runnable(made: dict[str, Provider], mode: str) -> dict[str, Callable[[], object]]:
    """What to time; a peer that does without dropout alone is left out here."""
    calls = {}
    for name, p in made.items():
        if (name, mode) == ("torch.compile", "backward"):
            continue
        try:
            call = p.timed(mode)
            call()
        except Exception as refusal:
            if name == "mmfast":
                raise
            print(f"  {name} left out: {type(refusal).__name__} {str(refusal)[:120]!r}")
        else:
            calls[name] = call
    return calls


def in_graphs(calls: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """Replays of ours and of the quickest peers: what a call costs on the device, without the host's share of it."""
    replays = {}
    for name, call in calls.items():
        if name != "mmfast" and not name.startswith(("sdpa", "flash", "concat")):
            continue
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                call()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
        except Exception as refusal:
            print(f"  graph of {name} left out: {type(refusal).__name__} {str(refusal)[:120]!r}")
        else:
            replays[f"graph: {name}"] = graph.replay
    return replays


def least(ours: Provider, mode: str, pairs: int, width: int) -> dict:
    """Operations and bytes that no implementation avoids: two products forward, five backward (scores again); each tensor once."""
    leaves = sum(t.numel() * t.element_size() for t in ours.leaves)
    out = ours.leaves[0].numel() * ours.leaves[0].element_size()
    forward, backward = (4 * pairs * width, leaves + out), (10 * pairs * width, 2 * leaves + 2 * out)
    both = tuple(map(sum, zip(forward, backward, strict=True)))
    flops, bytes_ = {"forward": forward, "backward": backward, "forward+backward": both}[mode]
    dtype = ours.leaves[0].dtype
    return {"flops": flops, "bytes_": bytes_, "rate": "split" if dtype == torch.float32 else str(dtype).removeprefix("torch.")}


def lesser_isas(call: Callable[[], object], dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    def forced(isa):
        mmfast.ops.library.force_cpu_isa(isa)
        call()
        mmfast.ops.library.force_cpu_isa("auto")

    best = mmfast.build_info()["cpu_isa"]
    if dtype != torch.bfloat16 and best == "avx512_bf16":
        best = "avx512"  # the same code for this type
    isas = [i for i in mmfast.build_info()["cpu_isas"] if i not in (best, "avx512_bf16")]
    return {f"mmfast {isa}": partial(forced, isa) for isa in isas}


def repeats(calls: dict[str, Callable[[], object]], seconds: float = 0.08) -> int:
    """As many rounds as fit, at least 9 and at most 100 (CUDA: always 100)."""
    start = time.perf_counter()
    for call in calls.values():
        call()
    if DEVICE == "cuda":
        return 100
    return max(9, min(100, int(seconds * len(calls) / (time.perf_counter() - start))))


def rows_of(case, mode, dtype, times, peaks, errors, least):
    print(f" {mode}")
    ours = times["mmfast"][0]
    for name, (median, p20, p80) in times.items():
        peak = f"{peaks[name]:8.1f} MB" if name in peaks else ""
        print(f"  {name:16s} {median:9.3f} ms  [{p20:.3f}, {p80:.3f}]  {median / ours:6.2f} times ours  {peak}")
        yield dict(op=case.group, provider=name, mode=mode, shape=str(case), dtype=str(dtype).removeprefix("torch."),
                   median_ms=f"{median:.4f}", p20_ms=f"{p20:.4f}", p80_ms=f"{p80:.4f}",
                   peak_mb=f"{peaks[name]:.1f}" if name in peaks else "", ratio_vs_eager=f"{times['eager'][0] / median:.3f}",
                   max_err=f"{errors[name]:.1e}" if name in errors else "", **timing.work(median_ms=median, **least),
                   version=mmfast.__version__ if name.startswith("mmfast") else torch.__version__)  # fmt: skip
