"""The installed wheel trains every architecture: built from a copy of the sources around the ops that are compiled already, put into a folder of
its own, and run from an empty one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mmfast.trainers import config

import mmfast

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = [name for name, module in config.recipe_names().items() if ".architectures." in module]

# What setup.py does, but for the compiler: the ops lie in the package.
SETUP = 'from setuptools import setup\nsetup(package_data={"mmfast": ["py.typed", "_C*.so"]}, has_ext_modules=lambda: True)\n'


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("mmfast", "trainers"):  # a checkout may have a link to trainers/ in mmfast/
        shutil.copytree(ROOT / name, source / name, ignore=lambda folder, names: [n for n in names if (Path(folder) / n).is_symlink()])
    shutil.copy(mmfast._C.__file__, source / "mmfast")
    (source / "setup.py").write_text(SETUP)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(site), str(source)], check=True)
    (wheel,) = site.glob("mmfast-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(site / "lib"), str(wheel)], check=True)
    return site / "lib"


def run(installed: Path, folder: Path, *words: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "MMFAST_CACHE"} | {"PYTHONPATH": str(installed)}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_installed_command_lists_every_architecture(installed, tmp_path):
    where = run(installed, tmp_path, sys.executable, "-c", "import mmfast, mmfast.trainers as t; print(mmfast.__file__, t.__file__)")
    assert all(path.startswith(str(installed)) for path in where.split()), "the installed one is what is tested"
    listed = run(installed, tmp_path, str(installed / "bin" / "mmfast"), "list")
    assert set(ARCHITECTURES) <= {line.split()[0] for line in listed.splitlines()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_installed_wheel_trains(name, installed, tmp_path):
    command = [str(installed / "bin" / "mmfast"), "train", name, "--tiny", "--device", "cpu"]
    run(installed, tmp_path, *command, "--dry-run")
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"
    run(installed, tmp_path, *command, "--steps", "2", "--quiet")
    assert json.loads((tmp_path / "runs" / name / "eval.json").read_text())
    assert (tmp_path / "runs" / name / "report.html").stat().st_size > 1000
