"""Vector quantisation against cdist + argmin, addmm + argmin, vector-quantize-pytorch and faiss, interleaved in one run.

``pytest bench/ops/bench_vq.py -s`` (or ``mmfast bench vq``) prints the tables and writes ``bench/results/<device>/vq.csv``; the clock
starts only after a provider's answer was compared with the float64 argmin. ``--benchmark-json FILE`` adds pytest-benchmark's own record
of our rows. Shapes: 1024 tokens a 512 px image and 8192 x 256 codes (Chameleon), 16384 x 256 and 1024 x 256 (VQGAN), 8192 x 32.
"""

from importlib.metadata import version

import pytest
import timing
import torch

import mmfast

DEVICE = timing.DEVICE
FEW = [(1024, 8192, 256), (1024, 16384, 256), (256, 1024, 256), (1024, 8192, 32)]
SHAPES = timing.sizes(FEW, [(32 * 1024, 8192, 256), *FEW, (128 * 1024, 8192, 256)], [(64, 128, 32)])
CODES = timing.sizes(8192, 8192, 128)  # of the growth and training cases
REPEATS = 100 if DEVICE == "cuda" else 15
ROWS: list[dict] = []


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
    if DEVICE == "cuda" and len(x) == 32 * 1024:  # compiling takes seconds: for the shape of the goal alone
        quick = torch.compile(lambda x, c: torch.addmm(c.square().sum(-1), x, c.T, alpha=-2).argmin(-1), dynamic=False)

        def compiled():
            before = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = True
            found = quick(x, codebook)
            torch.backends.cuda.matmul.allow_tf32 = before
            return found

        all_["addmm+argmin, compiled, tf32"] = compiled
        try:
            from pylibraft.distance import fused_l2_nn_argmin
        except ImportError as error:
            print(f"cuVS left out: {error}")
        else:
            all_["cuvs"] = lambda: torch.as_tensor(fused_l2_nn_argmin(x, codebook), device="cuda").long()
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


def record(mode, shape, dtype, times, peaks=None, versions=None, least=None):
    eager = times[next(iter(times))][0]
    print(f"\n{mode} N x K x D = {shape}, {dtype}")
    for name, (median, p20, p80) in times.items():
        peak = f"{peaks[name]:9.1f} MB" if peaks else ""
        print(f"  {name:26s} {median:9.2f} ms  [{p20:.2f}, {p80:.2f}]  {eager / median:6.2f}x {peak}")
        ROWS.append(
            dict(op="vq", provider=name, mode=mode, shape=str(shape), dtype=dtype, median_ms=f"{median:.4f}", p20_ms=f"{p20:.4f}",
                 p80_ms=f"{p80:.4f}", peak_mb=f"{peaks[name]:.1f}" if peaks else "", ratio_vs_eager=f"{eager / median:.3f}",
                 version=(versions or {}).get(name, ""), **(timing.work(median_ms=median, **least) if least else {}))
        )  # fmt: skip
    timing.write_rows("vq", ROWS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_search(shape, benchmark):
    n, k, d = shape
    torch.manual_seed(0)
    x, codebook = torch.randn(n, d, device=DEVICE), torch.randn(k, d, device=DEVICE)
    truth = exact(x, codebook)
    calls = providers(x, codebook)
    for name, call in list(calls.items()):
        try:
            wrong = (call() != truth).float().mean().item()
        except Exception as refusal:  # whatever a peer says, it does not end the run
            if name.startswith("mmfast"):
                raise
            print(f"  {name} left out: {type(refusal).__name__} {str(refusal)[:120]!r}")
            del calls[name]
            continue
        assert wrong == 0 or not name.startswith("mmfast"), f"{name}: {wrong:.2%} of the indices are wrong"
        if wrong > 0.05:
            print(f"  {name} left out: {wrong:.2%} of its indices are wrong")
            del calls[name]
    least = {"flops": 2 * n * k * d, "bytes_": 4 * (n * d + k * d) + 8 * n, "rate": "float16"}
    record("search", shape, "float32", timing.interleaved(calls, repeats=REPEATS, device=DEVICE), least=least)
    mmfast.ops.library.force_cpu_isa("auto")
    benchmark(lambda: mmfast.vq_nearest(x, codebook))


@pytest.mark.parametrize("axis", ["N", "K"])
def test_cost_grows_linearly(axis, benchmark):
    sizes = (CODES // 16, CODES // 8, CODES // 4) if axis == "N" else (CODES // 2, CODES, 2 * CODES)
    torch.manual_seed(0)
    calls = {}
    for size in sizes:
        x = torch.randn(size if axis == "N" else CODES // 8, 256, device=DEVICE)
        codebook = torch.randn(size if axis == "K" else CODES, 256, device=DEVICE)
        calls[f"mmfast {axis}={size}"] = lambda x=x, c=codebook: mmfast.vq_nearest(x, c)
    times = timing.interleaved(calls, device=DEVICE)
    record(f"growth in {axis}", sizes, "float32", times)
    benchmark(next(iter(calls.values())))


@pytest.mark.parametrize("rows", timing.sizes([1024], [1024, 32 * 1024], [64]))
def test_training_step(rows, benchmark):
    """Search, straight-through output, commitment loss, backward, EMA: one step of VectorQuantize (K=8192, D=256)."""
    try:
        import vector_quantize_pytorch as upstream
    except ImportError as error:
        print(f"vector-quantize-pytorch left out: {error}")
        upstream = None
    torch.manual_seed(0)
    options = dict(dim=256, codebook_size=CODES, decay=0.99, rotation_trick=False)
    ours = mmfast.nn.VectorQuantize(**options).to(DEVICE).train()
    modules, versions = {"mmfast": ours}, {"mmfast": mmfast.__version__}
    if upstream is not None:
        theirs = upstream.VectorQuantize(**options).to(DEVICE).train()
        ours.load_state_dict(theirs.state_dict())
        modules = {"vector-quantize-pytorch": theirs, "mmfast": ours}
        versions["vector-quantize-pytorch"] = version("vector-quantize-pytorch")
    x = torch.randn(1, rows, 256, device=DEVICE)

    def step(module):
        leaf = x.clone().requires_grad_()
        quantized, _, loss = module(leaf)
        (quantized.square().sum() + loss.sum()).backward()
        return leaf.grad

    calls = {name: lambda m=module: step(m) for name, module in modules.items()}
    peaks = {name: timing.peak_memory_mb(call, DEVICE) for name, call in calls.items()}
    times = timing.interleaved(calls, repeats=100 if DEVICE == "cuda" else 9, device=DEVICE)
    record("training step", (rows, CODES, 256), "float32", times, peaks, versions)
    if upstream is not None:
        print(f"  extra peak memory: {peaks['mmfast'] / peaks['vector-quantize-pytorch']:.1%} of vector-quantize-pytorch's")
    benchmark(lambda: step(ours))
