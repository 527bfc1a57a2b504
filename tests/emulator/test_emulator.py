"""The emulator itself: its primitives against numpy, and planted faults, each of which it or a sanitizer must report.

``python -m emulator.test_emulator SANITIZER FUNCTION FAULT`` calls one planted kernel; the tests do so with sanitizers preloaded.
"""

import ctypes
import sys

import numpy as np
import pytest
from emulator.emulator import build, from_bf16, has_sanitizer, pointer, run_sanitized, to_bf16

SOURCE = "tests/emulator/primitives.cu"
rng = np.random.default_rng(0)


def call(name, *args, sanitizer=""):
    return build(SOURCE, sanitizer=sanitizer).function(name)(*[pointer(a) if isinstance(a, np.ndarray) else a for a in args])


def test_barrier_and_shuffles():
    x, out = rng.standard_normal((5, 1000), np.float32), np.empty(5, np.float32)
    assert call("row_sum", x, out, 5, 1000) == 0
    np.testing.assert_allclose(out, x.sum(1), rtol=1e-4)


@pytest.mark.parametrize(("threads", "active"), [(32, 32), (70, 70), (96, 75), (64, 8)])
def test_warp_primitives(threads, active):
    out = np.zeros(threads * 16 + 1, np.uint32)
    assert call("warp_primitives", out, threads, active) == 0
    table, live = out[:-1].reshape(threads, 16), min(active, 32)
    assert out[-1] == active
    assert not table[active:].any()
    for warp in range((active + 31) // 32):
        live = min(active - warp * 32, 32)
        lanes = np.arange(live)
        got = table[warp * 32 : warp * 32 + live]
        full = 0xFFFFFFFF if live == 32 else (1 << live) - 1
        vote = lambda p: sum(1 << int(i) for i in lanes[p])  # noqa: E731
        if live > 5:
            assert (got[:, 0] == 15).all()
        if live % 2 == 0:
            assert (got[:, 1] == lanes ^ 1).all()
        assert (got[:, 2] == np.where(lanes < 2, lanes, lanes - 2)).all()
        down = np.where(lanes % 8 + 4 < 8, lanes + 4, lanes)
        assert (got[down < live, 3] == down[down < live]).all()
        assert (got[:, 4] == vote(lanes % 3 == 0)).all()
        assert (got[:, 5] == int(live > 7)).all()
        assert (got[:, 6] == 1).all()
        assert (got[:, 7] == [vote(lanes // 5 == i // 5) for i in lanes]).all()
        assert (got[:, 8] == lanes.sum()).all()
        assert (got[:, 9].astype(np.int32) == live - 17).all()
        assert (got[:, 10] == sum(min(2, active - w * 32) for w in range((active + 31) // 32))).all()
        assert (got[:, 11] == 1).all()
        if live == 32:
            assert (got[:16, 12] == 9).all()
            assert (got[16:, 12] == 20).all()
        assert (got[:, 13] == 6).all()
        assert (got[:, 14] == bin(full).count("1")).all()
        assert (got[:, 15] == 1).all()


@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32"])
def test_mma_is_a_matrix_product(kind):
    m, n, k = 32, 24, 48
    a, b = rng.standard_normal((m, k), np.float32), rng.standard_normal((n, k), np.float32)
    if kind == "f16":
        stored = a.astype(np.float16), b.astype(np.float16)
        values = [v.astype(np.float64) for v in stored]
    elif kind == "bf16":
        stored = to_bf16(a), to_bf16(b)
        values = [from_bf16(v).astype(np.float64) for v in stored]
    else:  # the low 13 bits are ignored
        stored = a, b
        values = [(v.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64) for v in stored]
    c = np.full((m, n), np.nan, np.float32)
    assert call("gemm", ["f16", "bf16", "tf32"].index(kind), *stored, c, m, n, k) == 0
    np.testing.assert_allclose(c, values[0] @ values[1].T, rtol=1e-5, atol=1e-5)


def test_ldmatrix_fragments():
    x = rng.integers(0, 65536, (4, 8, 8), dtype=np.uint16)
    out = np.zeros((32, 11), np.uint32)
    assert call("ldmatrix_fragments", x, out) == 0
    words = lambda m: np.ascontiguousarray(m).view(np.uint32).reshape(32)  # noqa: E731  lane l: row l / 4, columns 2 (l % 4), + 1
    for i in range(4):
        assert (out[:, i] == words(x[i])).all()
        assert (out[:, 4 + i] == words(x[i].T)).all()
    assert (out[:, 8] == words(x[0])).all()
    assert (out[:, 9] == words(x[1])).all()
    assert (out[:, 10] == words(x[0])).all()


def test_asynchronous_copies():
    x, out = np.arange(1, 9, dtype=np.float32), np.zeros(8, np.float32)
    assert call("copies", x, out, 8) == 0
    assert out[0] == 1
    assert np.isnan(out[1])
    assert out[2:].tolist() == [3, 4, 5, 6, 0, 0]


def test_shared_memory_starts_undefined_in_every_block():
    out = np.zeros(3, np.float32)
    assert call("leak", out, 3) == 0
    assert np.isnan(out).all()


EXPECTED = {
    "out_of_bounds": np.arange(31, -1, -1.0),
    "static_out_of_bounds": np.arange(31, -1, -1.0),
    "missing_barrier": np.arange(63, -1, -1.0),
    "blocks_race": np.arange(8.0),
    "divergent_collective": np.arange(32) ^ 1,
    "divergent_barrier": np.arange(64.0),
    "unwaited_copy": np.arange(32.0),
}


def planted(name: str, fault: bool, sanitizer: str = "") -> tuple[int, bool]:
    """Status of the launch, and whether the values are right."""
    expected = EXPECTED[name].astype(np.float32)
    out = np.zeros_like(expected)
    inputs = [np.arange(32, dtype=np.float32)] if name == "unwaited_copy" else []
    status = call(name, ctypes.c_bool(fault), *inputs, out, sanitizer=sanitizer)
    return status, bool((out == expected).all())


@pytest.mark.parametrize("name", EXPECTED)
def test_correct_twin_passes(name):
    assert planted(name, False) == (0, True)


@pytest.mark.parametrize("name", ["divergent_collective", "divergent_barrier"])
def test_divergence_is_reported(name, capfd):
    status, _ = planted(name, True)
    assert status == 719
    message = capfd.readouterr().err
    assert "divergent collective" in message
    assert "block (0, 0, 0) thread (" in message
    assert "primitives.cu:" in message


def test_unwaited_copy_reads_nan():
    status, right = planted("unwaited_copy", True)
    assert (status, right) == (0, False)


SANITIZED = [
    ("address", "out_of_bounds", "heap-buffer-overflow"),
    ("address", "static_out_of_bounds", "use-after-poison"),
    ("thread", "missing_barrier", "data race"),
    ("thread", "blocks_race", "data race"),
]


@pytest.mark.parametrize(("sanitizer", "name", "report"), SANITIZED)
def test_sanitizer_reports_fault(sanitizer, name, report):
    if not has_sanitizer(sanitizer):
        pytest.skip(f"this compiler has no {sanitizer} sanitizer")
    good = run_sanitized("emulator.test_emulator", sanitizer, name, "0")
    assert good.returncode == 0, good.stdout + good.stderr
    bad = run_sanitized("emulator.test_emulator", sanitizer, name, "1")
    assert bad.returncode != 0
    assert report in bad.stderr, bad.stderr
    assert "primitives.cu:" in bad.stderr  # with the line


if __name__ == "__main__":
    sanitizer, name, fault = sys.argv[1:]
    sys.exit(0 if planted(name, fault == "1", sanitizer) == (0, True) else 3)
