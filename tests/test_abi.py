"""One binary for every torch >= 2.10: nothing of torch is linked but its stable C interface."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def test_nothing_of_a_static_library_is_exported():
    """A compiler may bring its libstdc++ as an archive, as CUDA its runtime: beside torch's copy an exported one crashes."""
    defined = [line.split()[-1].split("@")[0] for line in symbols("--defined-only")]
    assert "PyInit__C" in defined
    assert not [name for name in defined if name.startswith(("cuda", "_ZNSt8ios_base4Init", "__cxa_throw"))]


STREAMS = """
int aoti_torch_get_current_cuda_stream(int device, void** stream) { *stream = (void*)(0x1000L + device); return 0; }
"""
ASK = "import ctypes, sys; {}import mmfast._C as c; print(c.cuda_stream(3))"


@pytest.mark.gpu
def test_stream_is_the_current_one():
    with torch.cuda.stream(torch.cuda.Stream()):
        assert _C.cuda_stream(torch.cuda.current_device()) == torch.cuda.current_stream().cuda_stream != 0


def test_stream_is_found_where_python_loads_torch_for_itself(tmp_path):
    """``import torch`` loads libtorch_cuda without giving its names to other libraries; a stand-in is loaded in the same way."""
    if not mmfast.build_info()["cuda"]:
        pytest.skip("this mmfast was built without CUDA")
    if torch.version.cuda or not shutil.which("cc"):
        pytest.skip("a CUDA build of torch, or no C compiler: no stand-in can be loaded")
    (tmp_path / "streams.c").write_text(STREAMS)
    library = tmp_path / "libtorch_cuda.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-o", library, tmp_path / "streams.c"], check=True)

    def ask(load: str) -> subprocess.CompletedProcess:
        where = Path(_C.__file__).parent.parent
        return subprocess.run([sys.executable, "-c", ASK.format(load)], capture_output=True, text=True, cwd=where)

    assert ask(f"ctypes.CDLL({str(library)!r}); ").stdout.strip() == str(0x1003)
    assert "this torch was built without CUDA" in ask("").stderr
