"""Vector quantisation against cdist + argmin, addmm + argmin, vector-quantize-pytorch and faiss, interleaved in one run.

``pytest bench/ops/bench_vq.py -s`` (or ``mmfast bench vq``) prints the tables and writes ``bench/results/<device>/vq.csv``; the clock
starts only after a provider's answer was compared with the float64 argmin. ``--benchmark-json FILE`` adds pytest-benchmark's own record
of our rows. Shapes: 1024 tokens a 512 px image and 8192 x 256 codes (Chameleon), 16384 x 256 and 1024 x 256 (VQGAN), 8192 x 32.
"""

import pytest
import timing
import torch

import mmfast

DEVICE = "cuda" if torch.cuda.is_available() and mmfast.build_info()["cuda"] else "cpu"
SHAPES = [(1024, 8192, 256), (1024, 16384, 256), (256, 1024, 256), (1024, 8192, 32)]
if DEVICE == "cuda":
    SHAPES += [(32 * 1024, 8192, 256), (128 * 1024, 8192, 256)]
ROWS: list[dict] = []


@pytest.fixture(scope="module", autouse=True)
def _write():
    yield
    if ROWS:
        print(f"\nwrote {timing.write_rows('vq', ROWS, DEVICE)}")


def faiss_search(x, codebook):
    try:
        import faiss
    except ImportError:
        print("faiss is not installed: left out")
        return None
    if DEVICE == "cuda":
        return None
    faiss.omp_set_num_threads(torch.get_num_threads())
    rows, codes = x.numpy(), codebook.numpy()

    def run():  # building a flat index is a copy of the codes; a codebook in training needs it every step
        index = faiss.IndexFlatL2(codes.shape[1])
        index.add(codes)
        return torch.from_numpy(index.search(rows, 1)[1][:, 0])

    return run


def providers(x, codebook):
    norms = lambda: codebook.square().sum(-1)  # noqa: E731
    all_ = {
        "cdist+argmin": lambda: torch.cdist(x, codebook).argmin(-1),
        "addmm+argmin": lambda: torch.addmm(norms(), x, codebook.T, alpha=-2).argmin(-1),
    }
    if (search := faiss_search(x, codebook)) is not None:
        all_["faiss"] = search
    if DEVICE == "cpu":
        for isa in mmfast.build_info()["cpu_isas"]:

            def run(isa=isa):
                mmfast.ops.library.force_cpu_isa(isa)
                return mmfast.vq_nearest(x, codebook)

            all_[f"mmfast {isa}"] = run
    else:
        all_["mmfast"] = lambda: mmfast.vq_nearest(x, codebook)
    return all_


def exact(x, codebook):
    return torch.cat([torch.cdist(part.double(), codebook.double()).argmin(-1) for part in x.split(4096)])


def record(mode, shape, dtype, times, peaks=None, versions=None):
    eager = times[next(iter(times))][0]
    print(f"\n{mode} N x K x D = {shape}, {dtype}")
    for name, (median, p20, p80) in times.items():
        peak = f"{peaks[name]:9.1f} MB" if peaks else ""
        print(f"  {name:26s} {median:9.2f} ms  [{p20:.2f}, {p80:.2f}]  {eager / median:6.2f}x {peak}")
        ROWS.append(
            dict(op="vq", provider=name, mode=mode, shape=str(shape), dtype=dtype, median_ms=f"{median:.4f}", p20_ms=f"{p20:.4f}",
                 p80_ms=f"{p80:.4f}", peak_mb=f"{peaks[name]:.1f}" if peaks else "", ratio_vs_eager=f"{eager / median:.3f}",
                 version=(versions or {}).get(name, ""))
        )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_search(shape, benchmark):
    n, k, d = shape
    torch.manual_seed(0)
    x, codebook = torch.randn(n, d, device=DEVICE), torch.randn(k, d, device=DEVICE)
    truth = exact(x, codebook)
    calls = providers(x, codebook)
    for name, call in calls.items():
        wrong = (call() != truth).float().mean().item()
        assert wrong == 0 if name.startswith("mmfast") else wrong < 0.01, f"{name}: {wrong:.2%} of the indices are wrong"
    record("search", shape, "float32", timing.interleaved(calls, device=DEVICE))
    mmfast.ops.library.force_cpu_isa("auto")
    benchmark(lambda: mmfast.vq_nearest(x, codebook))


@pytest.mark.parametrize("axis", ["N", "K"])
def test_cost_grows_linearly(axis, benchmark):
    sizes = (512, 1024, 2048) if axis == "N" else (4096, 8192, 16384)
    torch.manual_seed(0)
    calls = {}
    for size in sizes:
        x = torch.randn(size if axis == "N" else 1024, 256, device=DEVICE)
        codebook = torch.randn(size if axis == "K" else 8192, 256, device=DEVICE)
        calls[f"mmfast {axis}={size}"] = lambda x=x, c=codebook: mmfast.vq_nearest(x, c)
    times = timing.interleaved(calls, device=DEVICE)
    record(f"growth in {axis}", sizes, "float32", times)
    benchmark(next(iter(calls.values())))


def test_training_step(benchmark):
    """Search, straight-through output, commitment loss, backward, EMA: one step of VectorQuantize (N=1024, K=8192, D=256)."""
    upstream = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed: nothing to compare with")
    from importlib.metadata import version

    torch.manual_seed(0)
    options = dict(dim=256, codebook_size=8192, decay=0.99, rotation_trick=False)
    theirs = upstream.VectorQuantize(**options).to(DEVICE).train()
    ours = mmfast.nn.VectorQuantize(**options).to(DEVICE).train()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 1024, 256, device=DEVICE)

    def step(module):
        leaf = x.clone().requires_grad_()
        quantized, _, loss = module(leaf)
        (quantized.square().sum() + loss.sum()).backward()
        return leaf.grad

    calls = {"vector-quantize-pytorch": lambda: step(theirs), "mmfast": lambda: step(ours)}
    peaks = {name: timing.peak_memory_mb(call, DEVICE) for name, call in calls.items()}
    versions = {"vector-quantize-pytorch": version("vector-quantize-pytorch"), "mmfast": mmfast.__version__}
    record(
        "training step",
        (1024, 8192, 256),
        "float32",
        timing.interleaved(calls, repeats=9, device=DEVICE),
        peaks,
        versions,
    )
    print(f"  extra peak memory: {peaks['mmfast'] / peaks['vector-quantize-pytorch']:.1%} of vector-quantize-pytorch's")
    benchmark(lambda: step(ours))
