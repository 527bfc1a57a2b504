"""docs/performance.md is what bench/plots.py writes from the result files, and its arithmetic is right."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def plots():
    spec = importlib.util.spec_from_file_location("bench_plots", ROOT / "bench" / "plots.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def row(provider, ms, shape="a", **more):
    return {"op": "attention", "mode": "forward", "dtype": "float32", "shape": shape, "provider": provider, "median_ms": str(ms), **more}


def test_page_is_current(plots):
    text = plots.PAGE.read_text()
    written = text.split(plots.BEGIN)[1].split(plots.END)[0].strip()
    assert written == plots.page(plots.load(ROOT / "bench" / "results")).strip(), "run `python bench/plots.py`"


def test_every_device_has_its_plot(plots):
    for device in plots.load(ROOT / "bench" / "results"):
        image = plots.IMAGES / f"performance-{device.name}.svg"
        assert image.exists(), "run `python bench/plots.py`"
        for _, shown in plots.bars(device):
            for label, _ in shown:
                assert label.replace("'", "&apos;") in image.read_text() or label in image.read_text(), f"{image.name} lacks {label}"


def test_ratio_by_hand(plots):
    """Peer over ours: 2 and 8, geometric mean 4; a shape that only one of them has does not count."""
    rows = [
        row("sdpa", 2.0),
        row("mmfast", 1.0),
        row("sdpa", 4.0, "b"),
        row("mmfast", 0.5, "b"),
        row("sdpa", 9.0, "c"),
        row("mmfast", 9.0, "d"),
    ]
    found = plots.ratio(rows, "sdpa")
    assert (found.mean, found.shapes, found.worst, found.worst_shape) == (pytest.approx(4.0), 2, 2.0, "a")
    assert plots.ratio(rows, "flash-attn") is None
    quickest = plots.ratio([*rows, row("sdpa flash", 1.5), row("sdpa math", 7.0)], "sdpa*")
    assert quickest.worst == 1.5


def test_graphs_are_compared_with_our_graph(plots):
    rows = [row(p, ms) for p, ms in (("sdpa flash", 8.0), ("mmfast", 4.0), ("graph: sdpa flash", 6.0), ("graph: mmfast", 2.0))]
    peers = {"sdpa": ("sdpa*", 1), "in graphs": ("graph: sdpa*", 1)}
    goal = plots.Goal("attention", True, "attention", peers, "")
    device = plots.Device("nvidia", {"attention": [{**r, "op": "perceiver"} for r in rows]}, {})
    assert [r.mean for _, _, _, r, _ in plots.measured(goal, [device])] == pytest.approx([2.0, 3.0])
    assert "forward in a CUDA graph, fp32 | 3.00 (3.00) |" in plots.attention_table(device)


def test_scored_fractions_are_cases_of_their_own(plots):
    rows = [
        row(p, ms, valid_fraction=f)
        for p, ms, f in (("eager", 8, "0.15"), ("mmfast", 1, "0.15"), ("eager", 8, "1.0"), ("mmfast", 4, "1.0"))
    ]
    found = plots.ratio(rows, "eager")
    assert (found.mean, found.worst, found.worst_shape) == (pytest.approx(4.0), 2.0, "a, 100% scored")


def test_goals_without_a_gpu_are_not_run(plots):
    """CPU rows never answer a GPU goal, nor the other way round; a mode is matched whole, not by its beginning."""
    rows = [row("sdpa", 3.0), row("mmfast", 1.0), row("sdpa", 1.0, mode="forward+backward"), row("mmfast", 1.0, mode="forward+backward")]
    cpu = plots.Device("cpu-2-threads", {"attention": rows}, {})
    said = {(what, against): (found, worst) for what, against, _, found, worst, _ in plots.goal_rows([cpu])}
    assert said["CPU: attention, forward, fp32", "the modules' own cores"][0] == "not measured"
    assert ("..", "SDPA") in said
    assert all(found == "not run" for (what, _), (found, _) in said.items() if what.startswith("GPU"))
    goal = next(g for g in plots.GOALS if g.what == "attention, forward, fp32")
    assert [round(r.mean, 6) for *_, r, _ in plots.measured(goal, [cpu]) if r] == [3.0]
    gpu = plots.Device("nvidia-x", {"attention": rows}, {})
    assert all(r is None for *_, r, _ in plots.measured(goal, [gpu]))


def test_goals_name_peers_as_the_benchmarks_do(plots):
    """One that no benchmark writes would stay "not measured" for ever."""
    for goal in plots.GOALS:
        source = (ROOT / "bench" / "ops" / f"bench_{goal.file}.py").read_text()
        for provider in (p.removeprefix("graph: ") for p, _ in goal.peers.values()):
            assert f'"{provider.rstrip("*")}' in source, f"{goal.what}: {provider}"
            assert provider.endswith("*") or f'"{provider}"' in source, f"{goal.what}: {provider}"


def test_no_gpu_figure_without_its_file(plots):
    devices = plots.load(ROOT / "bench" / "results")
    if any(not d.cpu for d in devices):
        pytest.skip("a GPU's results are checked in")
    lines = [line for line in plots.PAGE.read_text().splitlines() if line.startswith("| GPU:")]
    assert lines
    assert all("| not run |" in line for line in lines)
