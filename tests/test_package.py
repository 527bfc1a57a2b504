"""What an installed mmfast holds: setuptools is asked which modules a wheel would get, without building one."""

from pathlib import Path

from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

ROOT = Path(__file__).resolve().parents[1]


def packaged(monkeypatch):
    monkeypatch.chdir(ROOT)
    distribution = Distribution({"src_root": str(ROOT), "script_name": "setup.py"})
    distribution.parse_config_files([str(ROOT / "pyproject.toml")])
    command = build_py(distribution)
    command.finalize_options()
    modules = {f"{package}.{module}".removesuffix(".__init__") for package, module, _ in command.find_all_modules()}
    return distribution, modules


def there():
    """Modules of the source tree; trainers/ is installed as mmfast.trainers."""
    found = set()
    for top, name in ((ROOT / "mmfast", "mmfast"), (ROOT / "trainers", "mmfast.trainers")):
        for path in top.rglob("*.py"):
            words = path.relative_to(top).with_suffix("").parts
            if name == "mmfast" and words[0] == "trainers":  # a checkout may link it there
                continue
            found.add(".".join([name, *words]).removesuffix(".__init__"))
    return found


def test_a_wheel_has_every_module_and_every_recipe(monkeypatch):
    distribution, modules = packaged(monkeypatch)
    assert modules == there()
    recipes = {path.stem for path in (ROOT / "trainers" / "recipes").rglob("[!_]*.py")}
    assert {"llava", "dpo", "smollm2_easy_vqa"} <= recipes
    assert recipes == {m.rpartition(".")[2] for m in modules if m.startswith("mmfast.trainers.recipes.") and m.count(".") == 4}
    assert "py.typed" in distribution.package_data["mmfast"]


def test_the_command_leads_to_the_trainers(monkeypatch):
    distribution, modules = packaged(monkeypatch)
    (script,) = distribution.entry_points["console_scripts"]
    name, _, target = script.partition(" = ")
    assert name.strip() == "mmfast"
    assert target.partition(":")[0] in modules
