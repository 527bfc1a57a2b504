"""scripts/gpu.sh without a GPU: its stages, its time limits and what it leaves, with a stand-in for Python; then the benchmarks' dry run for real, and
their GPU branches on a stand-in for CUDA."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Says what it was called with; fails, or never ends, where the call holds a word of FAIL or HANG.
STAND_IN = """#!/bin/bash
[[ "$*" == *get_device_capability* ]] && echo 90 && exit 0
echo "called: $* seconds=${MMFAST_BENCH_SECONDS:-}"
for word in $FAIL; do [[ "$*" == *$word* ]] && exit 1; done
for word in $HANG; do [[ "$*" == *$word* ]] && exec sleep 60; done
exit 0
"""


@pytest.fixture
def checkout(tmp_path):
    """The script in a folder of its own, with nothing to build or run but the stand-in."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "gpu.sh").write_text((ROOT / "scripts" / "gpu.sh").read_text())
    (tmp_path / "pyproject.toml").write_text('version = "0"\n')
    (tmp_path / "bin").mkdir()
    for name in ("python", "cmake"):
        (tmp_path / "bin" / name).write_text(STAND_IN)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def run(checkout, *stages, **env):
    quiet = {k: v for k, v in os.environ.items() if not k.startswith("MMFAST")}
    env = (
        quiet
        | {"MMFAST_GPU_DRY": "1", "PYTHON": str(checkout / "bin" / "python"), "PATH": "/usr/bin:/bin", "OUT": str(checkout / "out")}
        | env
    )
    return subprocess.run(["bash", str(checkout / "scripts" / "gpu.sh"), *stages], capture_output=True, text=True, env=env, timeout=100)


def stages(text: str) -> dict[str, str]:
    """The last table: name to word."""
    known = ["build", "test", "sanitize", "card", "bench-vq", "bench-logp", "bench-attention", "bench-ppo", "model"]
    lines = [line.split() for line in text.splitlines() if line.split()[:1] and line.split()[0] in known and line.endswith(" s")]
    return {line[0]: " ".join(line[1:-2]) for line in lines}


def test_all_stages_in_order(checkout):
    done = run(checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(stages(done.stdout)) == [
        "build",
        "test",
        "sanitize",
        "card",
        "bench-vq",
        "bench-logp",
        "bench-attention",
        "bench-ppo",
        "model",
    ]
    assert set(stages(done.stdout).values()) == {"ok"}
    for file in ("bench/card.py", "bench_vq.py", "bench_linear_logp.py", "bench_attention.py", "bench_ppo.py", "bench/steps.py"):
        assert file in done.stdout
    assert done.stdout.count("-m pytest -vv -p no:cacheprovider") == 5  # the tests and four tools


def test_every_verdict_is_told_at_once():
    """With the script's own flags, beside those of our settings: dots would not say what failed before a run is cut off."""
    flags = re.search(r"-m pytest (-\S.*?) -rs", (ROOT / "scripts" / "gpu.sh").read_text())[1].split()
    file = "tests/eval/test_ranking.py"
    done = subprocess.run([sys.executable, "-m", "pytest", *flags, file], capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert f"{file}::test_" in done.stdout, done.stdout + done.stderr
    assert " PASSED" in done.stdout


def test_groups_and_single_stages(checkout):
    assert list(stages(run(checkout, "check").stdout)) == ["build", "test", "sanitize"]
    assert list(stages(run(checkout, "bench-ppo", "test").stdout)) == ["build", "test", "bench-ppo"]
    refused = run(checkout, "bench-vqq")
    assert refused.returncode == 2
    assert "no stage 'bench-vqq'" in refused.stderr


def test_a_failure_is_reported_and_the_rest_still_runs(checkout):
    done = run(checkout, "bench", FAIL="bench_vq.py")
    assert done.returncode == 1
    words = stages(done.stdout)
    assert words.pop("bench-vq") == "FAILED"
    assert set(words.values()) == {"ok"}
    assert len(words) == 6
    assert run(checkout, "sanitize", FAIL="reduced").returncode == 1
    assert list(stages(run(checkout, "check", FAIL="import").stdout)) == ["build"]  # nothing runs on a build that is not there


def test_what_hangs_is_cut_off(checkout):
    done = run(checkout, "test", "bench-ppo", HANG="reduced", MMFAST_STAGE_SECONDS="2")
    assert done.returncode == 1
    assert stages(done.stdout) == {"build": "ok", "test": "cut off", "bench-ppo": "ok"}


def test_stages_share_the_time(checkout):
    """300 s, 10 of them kept back: a stage gets its share of what is left, so the first a little and the last everything, as none here takes any time."""
    told = run(checkout, "bench", MMFAST_GPU_SECONDS="300").stdout
    seconds = [int(part.split()[0]) for part in told.split("seconds=")[1:] if part.split()[0].isdigit()]
    assert len(seconds) == 6
    assert 10 <= seconds[0] <= 290 * 25 / 505
    assert 250 <= seconds[-1] <= 290
    assert "at most 470 s" in run(checkout, "bench-ppo").stdout  # 8 minutes, with room to end
    assert "at most 470 s" in run(checkout, "bench-ppo", MMFAST_GPU_SECONDS="6000").stdout


def test_the_archive_holds_logs_and_results(checkout):
    folder = checkout / "build" / "gpu-dry-run" / "results" / "nvidia-x"
    folder.mkdir(parents=True)
    (folder / "vq.csv").write_text("op\n")
    run(checkout, "bench-vq")
    assert [f.name for f in (checkout / "out").iterdir()] == ["gpu-results.tar.gz"]
    with tarfile.open(checkout / "out" / "gpu-results.tar.gz") as archive:
        names = {Path(n).name for n in archive.getnames()}
    assert {"vq.csv", "bench_vq.log", "stages.txt"} <= names


FOLDERS = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "bench", ROOT / "bench" / "ops")))


@pytest.fixture
def card(checkout):
    """.. and with what a machine with a GPU has: nvcc and compute-sanitizer, which runs what it is given unless its filter is refused."""
    (checkout / "bin" / "nvcc").write_text(STAND_IN)
    (checkout / "bin" / "compute-sanitizer").write_text(
        """#!/bin/bash
[[ -n $REFUSE && "$*" == *kns=* ]] && { echo "unknown option"; exit 1; }
echo "checked with: $*"
[[ "$*" == *--tool* ]] || echo "ERROR SUMMARY: 0 errors"
[[ -n $FINDS && "$*" == *"$FINDS"* ]] && exit 9
exit 0
"""
    )
    for name in ("nvcc", "compute-sanitizer"):
        (checkout / "bin" / name).chmod(0o755)
    return checkout


def test_a_machine_with_a_card(card):
    done = run(card, "check", MMFAST_GPU_DRY="")
    assert stages(done.stdout) == {"build": "ok", "test": "ok", "sanitize": "ok"}
    log = (card / "build" / "gpu-run" / "build.log").read_text()
    assert "-DMMFAST_CUDA=on -DMMFAST_CUDA_ARCHS=90" in log
    assert "--build build/gpu-run/cmake" in log
    assert "-m gpu tests/ops tests/nn" in done.stdout
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        said = (card / "build" / "gpu-run" / f"sanitize-{tool}.log").read_text()
        ours = "" if tool == "initcheck" else "--kernel-name kns=mmfast "  # what torch's kernels write is to be seen
        assert f"--tool {tool} {ours}--error-exitcode 9" in said
        assert "-m gpu and reduced" in said


def test_what_a_sanitizer_finds_is_a_failure(card):
    done = run(card, "sanitize", MMFAST_GPU_DRY="", FINDS="racecheck")
    assert stages(done.stdout)["sanitize"] == "FAILED"
    assert "racecheck: status 9" in done.stdout
    assert done.returncode == 1


def test_a_refused_filter_is_left_away_and_said(card):
    done = run(card, "sanitize", MMFAST_GPU_DRY="", REFUSE="1")
    assert stages(done.stdout)["sanitize"] == "ok"
    assert "does not take --kernel-name kns=mmfast" in done.stdout
    assert "--kernel-name" not in (card / "build" / "gpu-run" / "sanitize-memcheck.log").read_text()


def test_no_sanitizer_and_no_compiler_are_said(card):
    for name in ("nvcc", "compute-sanitizer"):
        (card / "bin" / name).unlink()
    done = run(card, "sanitize", MMFAST_GPU_DRY="")
    assert stages(done.stdout) == {"build": "ok", "sanitize": "left out"}
    assert "no nvcc: taking the build that is in mmfast/" in done.stdout
    assert "compute-sanitizer is not installed" in done.stdout
    assert done.returncode == 0


def bench(folder: Path, path: str, *options: str, **env) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-s", "-rs", "-p", "no:cacheprovider", "--benchmark-disable", *options, path]
    env = os.environ | {"MMFAST_GPU_DRY": "1", "MMFAST_RESULTS": str(folder), "PYTHONPATH": FOLDERS, "OMP_NUM_THREADS": "1"} | env
    return subprocess.run(
        [*command, "-o", f"python_files={Path(path).name}"], capture_output=True, text=True, cwd=ROOT, env=env, timeout=170
    )


@pytest.mark.parametrize("path", ["bench/ops/bench_ppo.py", "bench/card.py"])
def test_dry_run_writes_results_elsewhere(tmp_path, path):
    before = {f: f.read_bytes() for f in (ROOT / "bench" / "results").rglob("*.*")}
    done = bench(tmp_path, path)
    assert done.returncode == 0, done.stdout
    (folder,) = tmp_path.iterdir()
    assert {f.name for f in folder.iterdir()} == {Path(path).stem.removeprefix("bench_") + ".csv", "env.json"}
    assert before == {f: f.read_bytes() for f in (ROOT / "bench" / "results").rglob("*.*")}


@pytest.mark.parametrize("path", ["bench/ops/bench_vq.py", "bench/card.py"])
def test_branches_for_a_gpu(tmp_path, path):
    """What only a machine with a card would enter, on a stand-in for CUDA."""
    done = bench(tmp_path, path, "-p", "fake_cuda")
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout
    assert (tmp_path / "fake-gpu" / "env.json").exists()


def test_every_gpu_goal_finds_its_shapes(monkeypatch):
    """A goal whose rows no benchmark would write stays "not run" for ever."""
    code = """
import json, fake_cuda
fake_cuda.pytest_configure()
import bench_attention, bench_ppo, bench_vq
print(json.dumps({"attention": list(map(str, bench_attention.CASES)), "ppo": list(map(str, bench_ppo.SHAPES)), "vq": list(map(str, bench_vq.SHAPES))}))
"""
    env = os.environ | {"PYTHONPATH": FOLDERS}
    shapes = json.loads(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout.splitlines()[-1]
    )
    monkeypatch.syspath_prepend(ROOT / "bench")
    import plots

    goals = [g for g in plots.GOALS if g.gpu and "shape" in g.where]
    assert len(goals) >= 5
    for goal in goals:
        for wanted in goal.where["shape"]:
            only = plots.Goal(goal.what, True, goal.file, {}, "", {"shape": (wanted,)})
            assert only.select([{"shape": s} for s in shapes[goal.file]]), f"{goal.what}: no benchmark has the shape {wanted}"


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("-p", "fake_cuda")], ids=["dry", "stand-in"])
@pytest.mark.parametrize("path", ["ops/bench_vq.py", "ops/bench_linear_logp.py", "ops/bench_attention.py", "steps.py"])
def test_dry_run_of_the_longer_benchmarks(tmp_path, path, options):
    pytest.importorskip("transformers", reason="transformers is not installed: two whole steps need it")
    done = bench(tmp_path, f"bench/{path}", *options)
    assert done.returncode == 0, done.stdout
    assert list(tmp_path.glob("*/*.csv"))


def test_result_files_are_replaced_whole(tmp_path):
    """A run that dies while it writes leaves the file as it was; another op's facts stay in env.json."""
    code = """
import timing
class Broken:
    def __str__(self):
        raise RuntimeError("died")
row = dict(op="a", provider="b", mode="c", shape="d", dtype="float32", median_ms=1)
timing.write_rows("one", [row])
timing.write_rows("two", [row])
try:
    timing.write_rows("one", [row, row | dict(shape=Broken())])
except RuntimeError as error:
    print(error)
"""
    env = os.environ | {"PYTHONPATH": FOLDERS, "MMFAST_RESULTS": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert "died" in done.stdout
    (folder,) = tmp_path.iterdir()
    assert (folder / "one.csv").read_text().splitlines()[1:] == ["a,b,c,d,float32,1,,,,,,,,,"]
    assert set(json.loads((folder / "env.json").read_text())) == {"one", "two"}


def test_nothing_begins_after_the_time(tmp_path):
    done = bench(tmp_path, "bench/ops/bench_ppo.py", MMFAST_BENCH_SECONDS="0")
    assert done.returncode == 0
    assert "left out: the 0 s of this run are spent" in done.stdout
    assert not list(tmp_path.iterdir())
