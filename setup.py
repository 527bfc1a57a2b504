"""Build mmfast/_C by calling CMake; everything else about the package stands in pyproject.toml."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def find_torch() -> str:
    """The installed torch whose headers are used. An isolated build hides it from its own process, so the interpreter is asked afresh
    (-E drops the PYTHONPATH that hides it; what a virtual environment sees of the system counts), then every Python down the PATH."""
    if given := os.environ.get("MMFAST_TORCH"):
        return given
    if spec := importlib.util.find_spec("torch"):
        return str(Path(spec.origin).parent)
    ask = "import importlib.util as u; spec = u.find_spec('torch'); print(spec.origin if spec else '')"
    on_path = [Path(folder) / "python3" for folder in os.environ.get("PATH", "").split(os.pathsep)]
    for python in dict.fromkeys([sys.executable, *(str(p) for p in on_path if p.exists())]):
        found = subprocess.run([python, "-E", "-c", ask], capture_output=True, text=True, check=False, cwd="/").stdout.strip()
        if found and (Path(found).parent / "include" / "torch").is_dir():
            return str(Path(found).parent)
    raise SystemExit(
        "mmfast is built with the headers of an installed torch >= 2.10 and found none: install torch first, or set MMFAST_TORCH"
    )


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        # CMake's cache remembers its tools: environments with tools of their own (isolated builds) get a folder of their own.
        tools = hashlib.sha256(f"{sys.executable} {shutil.which('ninja')}".encode()).hexdigest()[:8]
        build = ROOT / "build" / f"cmake-py{sys.version_info.major}{sys.version_info.minor}-{tools}"
        options = {
            "Python_EXECUTABLE": sys.executable,
            "MMFAST_TORCH": find_torch(),
            "MMFAST_VERSION": self.distribution.get_version(),
            "MMFAST_CUDA": os.environ.get("MMFAST_CUDA", "auto").lower(),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(target),
        }
        if archs := os.environ.get("MMFAST_CUDA_ARCHS"):
            options["MMFAST_CUDA_ARCHS"] = archs.replace(" ", ";").replace(",", ";")
        defines = [f"-D{key}={value}" for key, value in options.items()]
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *defines], check=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", str(build), "-j", jobs], check=True)


setup(ext_modules=[Extension("mmfast._C", [])], cmdclass={"build_ext": CMakeBuild})
