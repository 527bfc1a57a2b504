"""The arrows of the package: who may import whom, and what `import mmfast` costs."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A package and what it may import of ours. Everything below stands on what is above it.
ALLOWED = {
    "mmfast/ops": {"ops"},
    "mmfast/spec.py": set(),
    "mmfast/eval": {"eval", "data.synthetic"},
    "mmfast/nn": {"ops", "nn", "spec"},
    "mmfast/losses": {"ops", "losses"},
    "mmfast/data": {"spec", "data"},
    "mmfast/models": {"ops", "nn", "losses", "spec", "data", "models"},
    "mmfast/integrations": {"ops", "nn", "losses", "models", "integrations"},
}
# Third-party modules that a layer may import at its top (inside functions anything the extras list is fine).
TOP_LEVEL = {
    "mmfast/ops": {"torch"},
    "mmfast/spec.py": set(),
    "mmfast/eval": {"numpy"},
    "mmfast/nn": {"torch"},
    "mmfast/losses": {"torch"},
    "mmfast/data": {"torch", "numpy", "PIL"},
    "mmfast/integrations": {"torch"},
}


def imports(path: Path, top_only: bool = False) -> list[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else ast.walk(tree)
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; the library imports absolutely"
            names += [node.module] if node.module != "mmfast" else [f"mmfast.{alias.name}" for alias in node.names]
    return names


def files(layer: str) -> list[Path]:
    path = ROOT / layer
    return [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("layer", ALLOWED)
def test_arrows(layer):
    for path in files(layer):
        for name in imports(path):
            if not name.startswith("mmfast"):
                continue
            inner = name.removeprefix("mmfast").lstrip(".")
            ok = inner in ("_C",) or any(inner == a or inner.startswith(a + ".") for a in ALLOWED[layer])
            assert ok, f"{path.relative_to(ROOT)} imports {name}; {layer} may import {sorted(ALLOWED[layer])}"


@pytest.mark.parametrize("layer", TOP_LEVEL)
def test_third_party(layer):
    for path in files(layer):
        for name in imports(path, top_only=True):
            first = name.split(".")[0]
            if first == "mmfast" or first in sys.stdlib_module_names:
                continue
            assert first in TOP_LEVEL[layer], f"{path.relative_to(ROOT)} imports {first} at its top"


def test_recipes_are_data():
    for path in sorted((ROOT / "trainers" / "recipes").rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            banned = (ast.FunctionDef, ast.ClassDef, ast.If, ast.For, ast.While, ast.Lambda)
            assert not isinstance(node, banned), f"{path.relative_to(ROOT)}:{node.lineno} holds code; a recipe is data"


def test_import_brings_torch_alone():
    code = "import mmfast, sys; print([m for m in ('transformers', 'PIL', 'peft', 'jsonargparse', 'datasets') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout
    assert out.strip() == "[]"


def test_apply_loads_when_asked_for():
    code = (
        "import mmfast, sys; before = 'mmfast.integrations' in sys.modules; mmfast.apply; "
        "print(before, 'mmfast.integrations.transformers' in sys.modules, 'transformers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout
    assert out.split() == ["False", "True", "False"]


def test_import_time():
    """Beyond torch at most 0.3 s: the smallest of a few tries, measured inside one process after torch is in."""
    code = "import torch, time; t = time.perf_counter(); import mmfast; print(time.perf_counter() - t)"
    best = 10.0
    for _ in range(5):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout
        best = min(best, float(out))
        if best < 0.3:
            return
        time.sleep(0.5)
    pytest.fail(f"import mmfast took {best:.2f} s beyond torch")
