"""One binary for every torch >= 2.10: nothing of torch is linked but its stable C interface."""

import re
import shutil
import subprocess

import pytest

import mmfast
from mmfast import _C


def symbols(*flags: str) -> list[str]:
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    return subprocess.run(["nm", "-D", *flags, _C.__file__], capture_output=True, text=True, check=True).stdout.splitlines()


def test_no_cxx_symbol_of_torch_is_undefined():
    undefined = [line.split()[-1] for line in symbols("--undefined-only")]
    assert any(name.startswith("aoti_torch_") for name in undefined), "the list is empty: is this the right file?"
    # Itanium mangling: a C++ name that lives in, or mentions, a namespace at::, c10:: or torch::
    foreign = [name for name in undefined if name.startswith("_Z") and re.search(r"(?<![0-9a-z])(2at|3c10|5torch)[0-9A-Z]", name)]
    assert not foreign, f"_C needs symbols outside torch's stable C interface: {foreign}"


def test_the_pattern_sees_what_it_must():
    pattern = re.compile(r"(?<![0-9a-z])(2at|3c10|5torch)[0-9A-Z]")
    for name in ("_ZN2at6TensorD1Ev", "_ZN3c104impl3cow", "_ZN5torch7Library4_defE", "_ZNK3c1010TensorImpl5sizesEv"):
        assert pattern.search(name)
    for name in ("_ZNSt6vectorIiSaIiEE", "_ZN6mmfast10vq_nearestE"):
        assert not pattern.search(name)


def test_cuda_is_not_linked():
    dynamic = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert not [lib for lib in needed if "cuda" in lib or "python" in lib], needed
    assert "RPATH" not in dynamic, "a path of the build machine is left in the binary"
    assert "RUNPATH" not in dynamic, "a path of the build machine is left in the binary"


def test_stream_symbol_is_weak():
    if not mmfast.build_info()["cuda"]:
        pytest.skip("this mmfast was built without CUDA")
    (line,) = [line for line in symbols("--undefined-only") if "aoti_torch_get_current_cuda_stream" in line]
    assert line.split()[-2] in ("w", "v"), "a CPU build of torch, which lacks the symbol, could not load this binary"
