"""Shared fixtures. Tests compare with references; nothing here times anything."""

import os
from pathlib import Path

# Caches that libraries would put into the home directory stay inside the checkout.
CACHE = Path(__file__).resolve().parent.parent / ".cache"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE / "inductor"))
os.environ.setdefault("HF_HOME", str(CACHE / "huggingface"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

import mmfast  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() and mmfast.build_info()["cuda"]:
        return
    why = "no CUDA device" if not torch.cuda.is_available() else "this mmfast was built without CUDA"
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512_bf16"])
def isa(request):
    """Runs a CPU test once per instruction set that this machine has."""
    if request.param not in mmfast.build_info()["cpu_isas"]:
        pytest.skip(f"this machine or build has no {request.param} kernels")
    mmfast.ops.library.force_cpu_isa(request.param)
    yield request.param
    mmfast.ops.library.force_cpu_isa("auto")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
