"""Build mmfast/_C by calling CMake; everything else about the package stands in pyproject.toml."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def find_torch() -> str:
    """The installed torch whose headers are used. Inside an isolated build it is not importable, but still where it was: in the
    interpreter's own site-packages, or in those of a Python further down the PATH."""
    if given := os.environ.get("MMFAST_TORCH"):
        return given
    if spec := importlib.util.find_spec("torch"):
        return str(Path(spec.origin).parent)
    places = [Path(sysconfig.get_path(kind)) for kind in ("platlib", "purelib")]
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        python = Path(folder) / "python3"
        if python.exists():
            ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('platlib'))"]
            places.append(Path(subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip() or "."))
    for place in places:
        if (place / "torch" / "include" / "torch").is_dir():
            return str(place / "torch")
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
