"""From the command line to a recipe: by name or file, changed by a YAML file and dotted options, strictly."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pkgutil
import typing
from pathlib import Path
from typing import Any

from mmfast.spec import Alignment, System, nearest

from . import recipes
from .checkpoint import RunError

Recipe = System | Alignment


def recipe_names() -> dict[str, str]:
    """Every bundled recipe's name and module; a recipe is named after its file."""
    found = {}
    for group in pkgutil.iter_modules(recipes.__path__):
        module = importlib.import_module(f"{recipes.__name__}.{group.name}")
        for inner in pkgutil.iter_modules(module.__path__):
            found[inner.name] = f"{module.__name__}.{inner.name}"
    return dict(sorted(found.items()))


def load_recipe(name: str) -> Recipe:
    """A bundled recipe, or the ``RECIPE`` of a Python file."""
    known = recipe_names()
    if name in known:
        return importlib.import_module(known[name]).RECIPE
    if not name.endswith(".py"):
        raise RunError(
            f"unknown recipe {name!r}{nearest(name, known)}; `mmfast list` shows all, and a path ending in .py is read as a file"
        )
    if not Path(name).is_file():
        raise RunError(f"recipe file {name} does not exist")
    spec = importlib.util.spec_from_file_location("mmfast_user_recipe", name)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises is reported as theirs
        raise RunError(f"recipe file {name} fails: {type(error).__name__}: {error}") from error
    recipe = getattr(module, "RECIPE", None)
    if not isinstance(recipe, System | Alignment):
        raise RunError(f"recipe file {name} must define RECIPE, a System or an Alignment of mmfast.spec")
    return recipe


def set_value(spec: Any, path: str, value: Any, shown: str | None = None) -> Any:
    """The spec with one field changed. ``path`` is dotted; a place in a tuple is its index, or the name of the stage there."""
    shown = shown or path
    head, _, rest = path.partition(".")
    if isinstance(spec, tuple):
        names = [getattr(item, "name", str(i)) for i, item in enumerate(spec)]
        if head.isdigit() and int(head) < len(spec):
            at = int(head)
        elif head in names:
            at = names.index(head)
        else:
            raise RunError(f"--{shown}: nothing is called {head!r} there{nearest(head, names)}; there are {', '.join(names) or 'none'}")
        return (*spec[:at], set_value(spec[at], rest, value, shown) if rest else value, *spec[at + 1 :])
    if isinstance(spec, dict):
        if head not in spec:
            raise RunError(f"--{shown}: no key {head!r}{nearest(head, spec)}")
        return {**spec, head: set_value(spec[head], rest, value, shown) if rest else value}
    if not dataclasses.is_dataclass(spec):
        raise RunError(f"--{shown}: {path!r} leads below a plain value")
    fields = [f.name for f in dataclasses.fields(spec)]
    if head not in fields:
        raise RunError(f"--{shown}: {type(spec).__name__} has no field {head!r}{nearest(head, fields)}; it has {', '.join(fields)}")
    if rest:
        return dataclasses.replace(spec, **{head: set_value(getattr(spec, head), rest, value, shown)})
    return dataclasses.replace(spec, **{head: parse_value(typing.get_type_hints(type(spec))[head], value, shown)})


def parse_value(hint: Any, value: Any, shown: str) -> Any:
    """A value checked against, and converted to, a field's type."""
    import jsonargparse
    import yaml

    if dataclasses.is_dataclass(hint):
        raise RunError(f"--{shown}: is a group of fields; set one of them, say --{shown}.{dataclasses.fields(hint)[0].name}")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
    try:
        return parser.parse_args([f"--value={text}"]).value
    except (jsonargparse.ArgumentError, Exception) as error:  # its own errors are of several types
        name = getattr(hint, "__name__", str(hint)).replace("typing.", "")
        raise RunError(f"--{shown}: {text!r} is no {name if name != 'Literal' else str(hint).replace('typing.', '')}") from error


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for key, inner in tree.items() for k, v in flatten(inner, f"{prefix}{key}.").items()}
    return {prefix[:-1]: tree}


def read_yaml(path: str) -> dict[str, Any]:
    import yaml

    try:
        tree = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise RunError(f"config file {path} does not exist") from None
    except yaml.YAMLError as error:
        raise RunError(f"config file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise RunError(f"config file {path} must hold fields and values")
    return flatten(tree)


def options(rest: list[str]) -> dict[str, str]:
    """``--a.b value`` and ``--a.b=value`` pairs."""
    found, at = {}, 0
    while at < len(rest):
        word = rest[at]
        if not word.startswith("--"):
            raise RunError(f"unexpected argument {word!r}; fields are set as --name.of.field value")
        key, has, value = word[2:].partition("=")
        if not has:
            at += 1
            if at >= len(rest):
                raise RunError(f"--{key} needs a value")
            value = rest[at]
        found[key] = value
        at += 1
    return found


def apply(recipe: Recipe, changes: dict[str, Any], flags: tuple[str, ...] = ()) -> Recipe:
    """All changes in order; an unknown first word is also compared with the command's own flags."""
    for path, value in changes.items():
        head = path.partition(".")[0]
        fields = [f.name for f in dataclasses.fields(recipe)]
        if head not in fields:
            raise RunError(
                f"unknown option --{path}{nearest(head, [*fields, *flags])}; `mmfast show {recipe.name}` lists the recipe's fields"
            )
        recipe = set_value(recipe, path, value)
    return recipe


def from_dict(tree: Any, where: str = "recipe") -> Any:
    """The spec that ``mmfast.spec.to_dict`` wrote. Unknown kinds and fields raise ``RunError`` with the nearest name."""
    import mmfast.spec as vocabulary

    if isinstance(tree, dict) and "kind" in tree:
        kinds = {name: value for name, value in vars(vocabulary).items() if isinstance(value, type) and dataclasses.is_dataclass(value)}
        if tree["kind"] not in kinds:
            raise RunError(f"{where}: unknown kind {tree['kind']!r}{nearest(str(tree['kind']), kinds)}")
        kind = kinds[tree["kind"]]
        fields = [f.name for f in dataclasses.fields(kind)]
        if unknown := [k for k in tree if k not in fields and k != "kind"]:
            raise RunError(f"{where}: {kind.__name__} has no field {unknown[0]!r}{nearest(unknown[0], fields)}")
        try:
            return kind(**{k: from_dict(v, f"{where}.{k}") for k, v in tree.items() if k != "kind"})
        except TypeError as error:  # a field without default is missing
            raise RunError(f"{where}: {error}") from None
    if isinstance(tree, dict):
        return {k: from_dict(v, f"{where}.{k}") for k, v in tree.items()}
    return tuple(from_dict(v, where) for v in tree) if isinstance(tree, list) else tree
