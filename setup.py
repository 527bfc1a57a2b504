"""Build mmfast/_C by calling CMake; everything else about the package stands in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = ROOT / "build" / f"cmake-py{sys.version_info.major}{sys.version_info.minor}"
        options = {
            "Python_EXECUTABLE": sys.executable,
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
