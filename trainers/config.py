"""From the command line to a recipe: by name or file, changed in layers by files and dotted options, strictly.

The layers, each over the one before: the recipe, ``--tiny``, every ``--config FILE`` in order, the dotted options. A layer is a tree that is
merged into the recipe along the types of ``mmfast.spec``: a mapping changes fields in place, a mapping that says its ``kind`` starts from that
kind's defaults. Whatever is wrong is collected, so that one run tells all of it; what the types cannot say is in :func:`check`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import pkgutil
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmfast.spec import (
    BUILT_IN,
    PARTS,
    AdapterPrompts,
    Alignment,
    BoxTokens,
    Compute,
    Contrast,
    Data,
    Lora,
    Mixture,
    NfResnet,
    Optim,
    Pooled,
    Prefix,
    QFormer,
    Retrieval,
    SharedTokens,
    Shots,
    Stage,
    System,
    Tokens,
    Vqgan,
    misfits,
    nearest,
    to_dict,
)

from . import recipes
from .checkpoint import RunError

Recipe = System | Alignment
MISSING = dataclasses.MISSING
_NULL = ("null", "None", "~")
_EXPECTED = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}


class ConfigError(RunError):
    """Everything that is wrong with a configuration, a line each."""

    def __init__(self, problems: Iterable[str]):
        self.problems = list(dict.fromkeys(problems))
        count = len(self.problems)
        super().__init__(self.problems[0] if count == 1 else "\n  ".join([f"{count} errors in the configuration", *self.problems]))


# ---------------------------------------------------------------------------------------------------------------- recipes


def recipe_names() -> dict[str, str]:
    """Every bundled recipe's name and module; a recipe is named after its file."""
    found = {}
    for group in pkgutil.iter_modules(recipes.__path__):
        module = importlib.import_module(f"{recipes.__name__}.{group.name}")
        for inner in pkgutil.iter_modules(module.__path__):
            found[inner.name] = f"{module.__name__}.{inner.name}"
    return dict(sorted(found.items()))


def load_recipe(name: str, *, tiny: bool = False) -> Recipe:
    """A bundled recipe, the ``RECIPE`` of a Python file, what ``--print-config`` wrote (YAML or JSON), or the recipe of a run folder."""
    recipe = _load(name)
    if not tiny:
        return recipe
    from mmfast.models.tiny import tiny as shrink

    return shrink(recipe)


def _load(name: str) -> Recipe:
    known, path = recipe_names(), Path(name)
    if name in known:
        return importlib.import_module(known[name]).RECIPE
    if path.is_dir():
        if not (path / "recipe.json").is_file():
            raise RunError(f"{name} is no run folder: it holds no recipe.json")
        path = path / "recipe.json"
    elif path.suffix not in (".py", ".yaml", ".yml", ".json"):
        raise RunError(
            f"unknown recipe {name!r}{nearest(name, known)}; `mmfast list` shows all, and a path ending in .py or .yaml, or a run folder, is read"
        )
    if not path.is_file():
        raise RunError(f"recipe file {name} does not exist")
    if path.suffix != ".py":
        tree = {key: value for key, value in read_file(str(path)).items() if not (path.name == "recipe.json" and key == "seed")}
        if "kind" not in tree:
            raise RunError(f"{path} is no whole recipe (it has no kind: System or Alignment); as changes to one it is given with --config")
        return from_dict(tree, f"{path}: ")
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


# ----------------------------------------------------------------------------------------------------------------- layers


def merge(hint: Any, base: Any, given: Any, where: str, problems: list[str]) -> Any:
    """What ``given`` makes of ``base``, for a field of type ``hint``.

    Args:
        base: the value so far, ``MISSING`` when there is none.
        given: plain data of a file, or a word of the command line.
        where: how an error names the place.
        problems: grows by a line for everything that is wrong; what is wrong stays as in ``base``.
    """
    options = _options(hint)
    if type(None) in options:
        if given is None or (isinstance(given, str) and given in _NULL):
            return None
        options = tuple(option for option in options if option is not type(None))
    kinds, origin = [option for option in options if dataclasses.is_dataclass(option)], typing.get_origin(options[0])
    if isinstance(given, str) and (kinds or origin in (tuple, dict)):
        given = _plain(given)
    if kinds:
        return _choice(kinds, base, given, where, problems)
    if origin is tuple:
        return _items(typing.get_args(options[0]), base, given, where, problems)
    if origin is dict:
        return _entries(typing.get_args(options[0])[1], base, given, where, problems)
    return _scalar(options[0], base, given, where, problems, optional=len(options) < len(_options(hint)))


def _choice(kinds: list[type], base: Any, given: Any, where: str, problems: list[str]) -> Any:
    known = {kind.__name__: kind for kind in kinds}
    given = {"kind": given} if isinstance(given, str) and given in known else given
    if not isinstance(given, dict):
        shown = (
            f"the name of a kind ({', '.join(known)})"
            if len(known) > 1
            else f"fields, say {_at(where, dataclasses.fields(kinds[0])[0].name)}"
        )
        problems.append(f"{where}: is a group of fields; expected {shown}, got {given!r}{nearest(str(given), known)}")
        return base
    given = _grouped(given, where, problems)
    if "kind" in given:
        if given["kind"] not in known:
            problems.append(
                f"{_at(where, 'kind')}: unknown kind {given['kind']!r}{nearest(str(given['kind']), known)}, expected {_any(known)}"
            )
            return base
        kind, start = known[given["kind"]], None
    elif type(base) in kinds:
        kind, start = type(base), base
    elif len(kinds) == 1:
        kind, start = kinds[0], None
    else:
        problems.append(f"{where}: needs a kind, {_any(known)}")
        return base
    fields, hints, values, before = {f.name: f for f in dataclasses.fields(kind)}, _hints(kind), {}, len(problems)
    for key, value in given.items():
        if key == "kind":
            continue
        if key not in fields:
            problems.append(
                f"{_at(where, key)}: {kind.__name__} has no field {key!r}{nearest(str(key), fields)}; it has {', '.join(fields) or 'none'}"
            )
            continue
        values[key] = merge(hints[key], _default(fields[key]) if start is None else getattr(start, key), value, _at(where, key), problems)
    if start is not None:
        return dataclasses.replace(start, **{key: value for key, value in values.items() if value is not MISSING})
    if missing := [f.name for f in fields.values() if f.default is MISSING and f.default_factory is MISSING and f.name not in given]:
        problems.append(f"{where}: {kind.__name__} is missing {', '.join(missing)}")
        return base
    return base if len(problems) > before else kind(**values)


def _items(inner: tuple, base: Any, given: Any, where: str, problems: list[str]) -> Any:
    """A tuple: whole as a list, or places of it by index or name. null takes a named place out."""
    fixed = Ellipsis not in inner
    if isinstance(given, str) and not any(dataclasses.is_dataclass(option) for option in _options(inner[0])):
        given = [word.strip() for word in given.split(",")]
    if isinstance(given, list):
        if fixed and len(given) != len(inner):
            problems.append(f"{where}: expected {len(inner)} values, got {given!r}")
            return base
        names = [v.get("name", i) if isinstance(v, dict) else i for i, v in enumerate(given)]
        before = len(problems)
        items = [
            merge(inner[i if fixed else 0], MISSING, v, _at(where, names[i]) if isinstance(v, dict) else where, problems)
            for i, v in enumerate(given)
        ]
        return base if len(problems) > before else tuple(items)
    if not isinstance(given, dict) or base is MISSING:
        problems.append(f"{where}: expected a list such as [a, b], got {given!r}")
        return base
    items, names = list(base), [getattr(item, "name", str(i)) for i, item in enumerate(base)]
    for key, value in _grouped(given, where, problems).items():
        key = str(key)
        if key in names:
            at = names.index(key)
        elif key.isdigit() and int(key) < len(items):
            at = int(key)
        else:
            problems.append(
                f"{_at(where, key)}: nothing is called {key!r} there{nearest(key, names)}; there are {', '.join(names) or 'none'}"
            )
            continue
        gone = value is None or (isinstance(value, str) and value in _NULL)
        items[at] = MISSING if gone and not fixed else merge(inner[at if fixed else 0], items[at], value, _at(where, key), problems)
    return tuple(item for item in items if item is not MISSING)


def _entries(inner: Any, base: Any, given: Any, where: str, problems: list[str]) -> Any:
    """A dictionary: entries are set one by one, null takes one out."""
    if not isinstance(given, dict):
        problems.append(f"{where}: expected entries such as {{key: value}}, got {given!r}")
        return base
    if any(dataclasses.is_dataclass(option) for option in _options(inner)):
        given = _grouped(given, where, problems)
    entries = {} if base is MISSING else dict(base)
    for key, value in given.items():
        if value is None or (isinstance(value, str) and value in _NULL):
            if entries.pop(str(key), MISSING) is MISSING:
                problems.append(f"{_at(where, key)}: there is no entry {key!r} to take out{nearest(str(key), entries)}")
        else:
            entries[str(key)] = merge(inner, entries.get(str(key), MISSING), value, _at(where, key), problems)
    return {key: value for key, value in entries.items() if value is not MISSING}


def _scalar(hint: Any, base: Any, given: Any, where: str, problems: list[str], *, optional: bool) -> Any:
    """A plain value, checked and converted by jsonargparse."""
    literal = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    expected = ("one of " + ", ".join(literal) if literal else _EXPECTED[hint]) + (" or null" if optional else "")
    fits = isinstance(given, str) if literal or hint is str else not isinstance(given, list | dict) and given is not None
    try:
        if not fits:
            raise ValueError
        value = _leaf_parser(hint).parse_args([f"--value={given}"]).value
        return (
            given if isinstance(given, int | float) and hint is not bool else value
        )  # a file's 1 stays 1 where a number is wanted, not 1.0
    except Exception:  # jsonargparse's own errors are of several types, and their text shows its insides
        problems.append(f"{where}: expected {expected}, got {given!r}{nearest(str(given), literal)}")
        return base


@functools.cache
def _leaf_parser(hint: Any):
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    return parser


_hints = functools.cache(typing.get_type_hints)


def _options(hint: Any) -> tuple:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _default(field: dataclasses.Field) -> Any:
    """What a field of a new value starts from; a dictionary has what is given and nothing else."""
    return MISSING if field.default_factory is not MISSING else field.default


def _grouped(given: dict, where: str, problems: list[str]) -> dict:
    """Dotted keys one level deep: ``{"a.b": 1, "a.c": 2}`` -> ``{"a": {"b": 1, "c": 2}}``."""
    out: dict[Any, Any] = {}
    for key, value in given.items():
        head, dot, rest = str(key).partition(".")
        value = {rest: value} if dot else value
        if head in out and not (isinstance(out[head], dict) and isinstance(value, dict) and not out[head].keys() & value.keys()):
            problems.append(f"{_at(where, head)}: is given twice, or both whole and in parts")
            continue
        out[head] = {**out[head], **value} if head in out else value
    return out


def _plain(text: str) -> Any:
    """A word of the command line that stands for a list or a mapping: YAML's flow style."""
    import yaml

    try:
        return yaml.safe_load(text) if text.strip().startswith(("[", "{")) else text
    except yaml.YAMLError:
        return text


def _at(where: str, key: Any) -> str:
    return f"{where}{key}" if where.endswith(("--", " ")) or not where else f"{where}.{key}"


def _any(names: Iterable[str]) -> str:
    names = list(names)
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"


# ------------------------------------------------------------------------------------------------------------------ input


def read_file(path: str) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; a key given twice is an error, as it is nowhere meant."""
    import yaml

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            if twice := [key for i, key in enumerate(keys) if key in keys[:i]]:
                raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} is there twice", node.start_mark)
            return super().construct_mapping(node, deep)

    try:
        text = Path(path).read_text(encoding="utf-8")
        tree = json.loads(text) if path.endswith(".json") else yaml.load(text, Strict)
    except FileNotFoundError:
        raise RunError(f"config file {path} does not exist") from None
    except OSError as error:
        raise RunError(f"config file {path} cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise RunError(f"config file {path} is not valid JSON: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"config file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise RunError(f"config file {path} must hold fields and values")
    return tree


def options(rest: list[str], problems: list[str]) -> dict[str, str]:
    """``--a.b value`` and ``--a.b=value`` pairs; the last one of a name counts."""
    found, at = {}, 0
    while at < len(rest):
        word = rest[at]
        at += 1
        if not word.startswith("--"):
            problems.append(f"unexpected argument {word!r}; fields are set as --name.of.field value")
            continue
        key, has, value = word[2:].partition("=")
        if not has:
            if at >= len(rest) or rest[at].startswith("--"):
                problems.append(f"--{key} needs a value")
                continue
            value = rest[at]
            at += 1
        found[key] = value
    return found


def apply(recipe: Recipe, changes: dict[str, Any], problems: list[str], *, source: str = "--", flags: tuple[str, ...] = ()) -> Recipe:
    """The recipe with one layer over it. ``source`` begins the name of every place: "--" or a file's name."""
    fields, known = [f.name for f in dataclasses.fields(recipe)], {}
    if source == "--":  # an unknown first word may also be a flag of the command, misspelt
        for path, value in changes.items():
            head = path.partition(".")[0]
            if head in fields or head == "kind":
                known[path] = value
            else:
                problems.append(
                    f"unknown option --{path}{nearest(head, [*fields, *flags])}; `mmfast show {recipe.name}` lists the recipe's fields"
                )
        changes = known
    hint = System | Alignment if "kind" in changes else type(recipe)
    return merge(hint, recipe, changes, source, problems)


def layered(
    name: str, *, tiny: bool = False, files: Iterable[str] = (), rest: Iterable[str] = (), flags: tuple[str, ...] = ()
) -> tuple[Recipe, list[str]]:
    """A recipe under all its layers, and all that is wrong with them."""
    problems: list[str] = []
    base = recipe = load_recipe(name, tiny=tiny)
    said = ""
    for path in files:
        try:
            tree = read_file(path)
            recipe, said = apply(recipe, tree, problems, source=f"{path}: "), f"{said} {tree}"
        except RunError as error:
            problems.append(str(error))
    given = options(list(rest), problems)
    recipe = apply(recipe, given, problems, flags=flags)
    if not tiny and "max_length" not in f"{said} {given}":
        problems += _shortened(base, recipe)
    return recipe, problems


def _shortened(base: Recipe, recipe: Recipe) -> list[str]:
    """Texts of retrieval stages that lost places to a picture of more tokens, where nobody spoke of ``max_length``, a sentence each."""
    if not all(isinstance(one, System) and isinstance(one.connector, Tokens) for one in (base, recipe)):
        return []
    before, more = base.connector.tokens, recipe.connector.tokens - base.connector.tokens
    return [
        f"stages.{stage.name}.max_length: {stage.max_length} left {stage.max_length - before} tokens to a text, and beside connector.tokens "
        f"{before + more} leaves {stage.max_length - before - more}; give --stages.{stage.name}.max_length {stage.max_length + more} for texts as long "
        f"as before, or {stage.max_length} for shorter ones"
        for stage in recipe.stages
        if stage.objective == "retrieval"
        and more > 0
        and any(own.name == stage.name and own.objective == stage.objective and own.max_length == stage.max_length for own in base.stages)
    ]


def read_shots(base: Shots, given: str) -> Shots:
    """Shots with the fields of a word of the command line (YAML) changed, checked; a ConfigError tells all that is wrong."""
    problems: list[str] = []
    shots = merge(Shots, base, given, "--shots", problems)
    _check_shots(shots, _Rules("--shots.", problems))
    if problems:
        raise ConfigError(problems)
    return shots


def from_dict(tree: Any, where: str = "recipe") -> Recipe:
    """The recipe that ``mmfast.spec.to_dict`` wrote.

    Raises:
        ConfigError: unknown kinds and fields with the nearest name, missing fields, wrong types; all of them.
    """
    problems: list[str] = []
    recipe = merge(System | Alignment, MISSING, tree, where, problems)
    if problems:
        raise ConfigError(problems)
    return recipe


def to_yaml(recipe: Recipe) -> str:
    """All fields, as ``--config`` takes them: kinds are written out, so that the file means the same over any recipe."""
    import yaml

    class Short(yaml.SafeDumper):  # lists of plain values on their line
        def represent_sequence(self, tag, sequence, flow_style=None):
            return super().represent_sequence(tag, sequence, flow_style=not any(isinstance(v, dict | list) for v in sequence))

    return yaml.dump(to_dict(recipe), Dumper=Short, sort_keys=False, allow_unicode=True, width=140)


# ------------------------------------------------------------------------------------------------------------------ check


class _Rules:
    """Collects the rules that a recipe breaks, a sentence each."""

    def __init__(self, where: str = "", problems: list[str] | None = None):
        self.where, self.problems = where, [] if problems is None else problems

    def below(self, name: str) -> _Rules:
        return _Rules(f"{self.where}{name}.", self.problems)

    def __call__(self, holds: bool, name: str, sentence: str) -> None:
        if not holds:
            self.problems.append(f"{self.where}{name}: {sentence}")

    def within(self, spec: Any, **ranges: str) -> None:
        """Fields against ranges as mathematics writes them: ``"(0, inf)"``, ``"[0, 1)"``. None passes."""
        for name, interval in ranges.items():
            values = getattr(spec, name)
            low, high = (float(side) for side in interval[1:-1].split(","))
            for value in values if isinstance(values, tuple) else (values,):
                above = value is None or value > low or (interval[0] == "[" and value == low)
                below = value is None or value < high or (interval[-1] == "]" and value == high)
                self(above and below, name, f"expected {_in_words(interval)}, got {value}")


def _in_words(interval: str) -> str:
    low, high = interval[1:-1].split(", ")
    least = f"at least {low}" if interval[0] == "[" else f"more than {low}"
    return least if high == "inf" else f"{least} and {'at most' if interval[-1] == ']' else 'less than'} {high}"


def check(recipe: Recipe, *, processes: int | None = None) -> list[str]:
    """What is wrong with a recipe beyond its types, a sentence each: ranges, names that must exist, choices that exclude each other.

    Args:
        processes: how many share a batch; default what torchrun says, else 1.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1")) if processes is None else processes
    rules = _Rules()
    system = recipe.policy if isinstance(recipe, Alignment) else recipe
    _check_model(system, rules.below("policy") if isinstance(recipe, Alignment) else rules)
    _check_compute(recipe.compute, rules.below("compute"))
    if isinstance(recipe, Alignment):  # the policy's own is that of its stages
        rules.problems += compute_misfits(system, recipe.compute)
    if recipe.compute.parallel == "fsdp" and any("new_tokens" in job.train for job in (*system.stages, recipe) if hasattr(job, "train")):
        rules.problems.append("compute.parallel: fsdp cannot train single rows of a weight; take new_tokens out of train, or choose ddp")
    if isinstance(recipe, Alignment):
        _check_alignment(recipe, rules)
        _check_training(recipe, system, rules, processes)
    if system is recipe or starts_from_nothing(system):
        _check_stages(system, rules if system is recipe else rules.below("policy"), processes)
    if starts_from_nothing(system):  # else its context is that of weights, which are still to be read
        rules.problems += length_misfits(recipe, system)
    return rules.problems


def compute_misfits(system: System, compute: Compute) -> list[str]:
    """``misfits`` of a model's choices and how it is run."""
    return [sentence for sentence in misfits(dataclasses.replace(system, compute=compute)) if sentence.startswith("compute.")]


def length_misfits(recipe: Recipe, system: System) -> list[str]:
    """Stages whose rows may be longer than the language model's context: a table of positions ends there (GPT-2, OPT), and what other families
    make of places beyond it, they have not learnt. T5's relative positions have no end.

    Args:
        system: the recipe's, with the sizes of its weights (``mmfast.models.resolved``).
    """
    rules, context = _Rules(), system.language.context
    jobs: list[tuple[str, Stage | Alignment]] = [("", recipe)] if isinstance(recipe, Alignment) else []
    if not jobs or starts_from_nothing(recipe.policy):
        jobs += [(f"{'policy.' if jobs else ''}stages.{stage.name}.", stage) for stage in system.stages]
    for where, job in jobs:
        read = getattr(job, "objective", "lm") in ("lm", "retrieval") and not system.language.encodes
        fits = not read or job.max_length <= context
        _Rules(where, rules.problems)(
            fits, "max_length", f"{job.max_length} is more than the language model's context of {context}; at most {context}"
        )
    return rules.problems


def starts_from_nothing(system: System) -> bool:
    """Whether no word of the language model is learnt yet, so that an alignment trains its policy's stages first."""
    return not (system.weights or system.language.weights)


def _check_stages(system: System, rules: _Rules, processes: int) -> None:
    rules(len({s.name for s in system.stages}) == len(system.stages), "stages", "every stage needs a name of its own")
    first: Stage | None = None
    for stage in system.stages:
        its = rules.below(f"stages.{stage.name}")
        _check_training(stage, system, its, processes)
        if stage.lora is not None:
            first = first or stage
            same = stage.lora == first.lora
            its(same, "lora", f"the adapters of {first.name} are still there and train on, and these are others; give both stages the same")


def _check_codes(choice: Vqgan, its: _Rules) -> None:
    its.within(
        choice, size="[1, inf)", channels="[1, inf)", blocks="[1, inf)", latent="[1, inf)", width="[1, inf)", codes="[1, inf)",
        groups="[1, inf)", dropout="[0, 1)", beta="[0, inf)", decay="[0, 1]", dead_below="[0, inf)",
    )  # fmt: skip
    its(bool(choice.multipliers) and min(choice.multipliers) > 0, "multipliers", "names no level, or one without channels")
    if choice.groups > 0:
        its(choice.channels % choice.groups == 0, "channels", f"{choice.channels} is not a multiple of groups {choice.groups}")


def _check_model(system: System, rules: _Rules) -> None:
    sizes = dict(width="[1, inf)", depth="[1, inf)", heads="[1, inf)", ffn="[1, inf)")
    if isinstance(system.encoder, Vqgan):
        _check_codes(system.encoder, rules.below("encoder"))
    elif isinstance(system.encoder, NfResnet):
        rules.below("encoder").within(system.encoder, size="[1, inf)", stem="[1, inf)", width="[1, inf)")
    else:
        rules.below("encoder").within(system.encoder, **sizes, patch="[1, inf)", size="[1, inf)")
    rules.below("language").within(
        system.language, **sizes, context="[1, inf)", kv_heads="[1, inf)", vocab="[0, inf)", norm_eps="(0, inf)", init="(0, inf)"
    )
    rules.below("image").within(system.image, std="(0, inf)")
    ranges = dict.fromkeys(("depth", "hidden", "tokens", "heads", "head_width", "width", "ffn", "every"), "[1, inf)")
    rules.below("connector").within(system.connector, **{k: v for k, v in ranges.items() if hasattr(system.connector, k)})
    if isinstance(system.connector, Tokens):
        rules.below("connector").within(system.connector, init="[0, inf)")
    if isinstance(system.regions, BoxTokens):
        rules.below("regions").within(system.regions, bins="[1, 256]")
    ranges = dict.fromkeys(("every", "heads", "head_width", "ffn", "shared"), "[1, inf)")
    rules.below("fusion").within(system.fusion, **{k: v for k, v in ranges.items() if hasattr(system.fusion, k)})
    if isinstance(system.fusion, AdapterPrompts):
        rules.below("fusion").within(system.fusion, length="[1, inf)", layers=f"[1, {system.language.depth}]")
        pooled = isinstance(system.connector, Pooled)
        rules(pooled, "connector", "adapter prompts take one vector a picture; set connector Pooled")
    rules.problems += [f"{rules.where}{sentence}" for sentence in misfits(system)]


def _check_compute(compute: Any, rules: _Rules) -> None:
    rules.within(compute, workers="[0, inf)", bad_steps="[1, inf)")
    rules(not (compute.precision == "fp16" and compute.device == "cpu"), "precision", "fp16 is for CUDA; on the CPU choose bf16 or fp32")


def _check_optim(optim: Optim, trained: set[str], rules: _Rules, processes: int) -> None:
    rules.within(
        optim, lr="(0, inf)", layer_decay="(0, 1]", steps="[1, inf)", epochs="(0, inf)", batch="[1, inf)", accumulate="[1, inf)", warmup="[0, inf)",
        hold="[0, 1]", floor="(0, 1]" if optim.schedule == "exponential" else "[0, 1]", eps="(0, inf)", betas="[0, 1)", weight_decay="[0, inf)", clip="[0, inf)", ema="[0, 1)",
    )  # fmt: skip
    rules(optim.steps is not None or optim.epochs is not None, "steps", "a stage needs steps or epochs, and has neither")
    fits = optim.batch % processes == 0
    rules(fits, "batch", f"{optim.batch} rows do not divide among {processes} processes; choose a multiple of {processes}")
    for name, least in (("lr_of", "more than 0"), ("weight_decay_of", "at least 0")):
        for part, value in getattr(optim, name).items():
            where = f"{name}.{part}"
            left_out = "; a part that shall not learn is left out of train" if name == "lr_of" else ""
            rules(value > 0 or (value == 0 and name != "lr_of"), where, f"expected {least}, got {value}{left_out}")
            known = part in PARTS
            rules(known, where, f"there is no part {part!r}{nearest(part, PARTS)}, the parts are {', '.join(PARTS)}")
            told = ", ".join(sorted(trained)) or "nothing"
            rules(not known or part in trained, where, f"{part} does not train there; what trains is {told}")


def _check_training(job: Any, system: System, rules: _Rules, processes: int) -> None:
    """What a stage and an alignment have in common."""
    from mmfast.data import chat

    lora: Lora | None = job.lora
    trained = {*job.train, *(("embeddings",) if "language" in job.train else ()), *((lora.part,) if lora else ())}
    for part in job.train:
        rules(part in PARTS, "train", f"there is no part {part!r}{nearest(part, PARTS)}, the parts are {', '.join(PARTS)}")
    kind = type(system.fusion).__name__
    learns = not isinstance(system.fusion, Prefix | SharedTokens)
    rules(learns or "adapter" not in job.train, "train", f"adapter is what the fusion has to learn, and {kind} has nothing; take it out")
    rules(
        bool(system.added_tokens or system.weights) or "new_tokens" not in job.train,
        "train",
        "new_tokens are the tokens that the choices add, and these add none; take it out",
    )
    _check_queries(job, system, rules)
    rules(bool(trained), "train", f"nothing trains; name some of {', '.join(PARTS)}, or set lora")
    rules(len(set(job.train)) == len(job.train), "train", "a part is named twice")
    _check_optim(job.optim, trained, rules.below("optim"), processes)
    if job.optim.layer_decay != 1:
        layered, its = not isinstance(system.encoder, Vqgan | NfResnet), rules.below("optim")
        its(layered, "layer_decay", f"goes by a vision transformer's layers, and encoder is {type(system.encoder).__name__}; set it to 1")
        its(not layered or "encoder" in trained, "layer_decay", "is of the encoder's layers, and these do not train there; set it to 1")
    form = chat.TEMPLATES.get(job.template)
    if form is not None and getattr(system.connector, "instructed", False) and getattr(job, "objective", "lm") == "lm":
        rules(
            not (form.mark or form.learn_begin),
            "template",
            f"{job.template} learns what stands before the question, so that a Q-Former would not read it; choose another, or leave connector.instructed off",
        )
    family = system.language.family
    rules(
        not (form is not None and form.mark and system.language.encodes and getattr(job, "objective", "lm") == "lm"),
        "template",
        f"{job.template} learns what stands before the question, so that the encoder of {family} would not read it; choose another",
    )
    drawn = form is not None and form.prefix and not isinstance(job, Stage)
    rules(
        not drawn,
        "template",
        f"{job.template} reads a part of each answer, drawn by its words, and learns the rest; two answers need one that learns all",
    )
    level = not job.optim.level_new or "new_tokens" in job.train
    rules(level, "optim.level_new", "gives rows of new_tokens their norm, and these do not train; take it out")
    known = job.template in chat.TEMPLATES
    rules(
        known,
        "template",
        f"unknown template {job.template!r}{nearest(job.template, chat.TEMPLATES)}, expected one of {', '.join(chat.TEMPLATES)}",
    )
    if not (system.weights or system.encoder.weights) and system.encoder.patch > 0:
        tokens = 1 if "queries" in job.train else system.image_places
        rules(
            job.max_length >= tokens + 2,
            "max_length",
            f"{job.max_length} cannot hold a picture of {tokens} tokens and an answer; at least {tokens + 2}",
        )
    if lora is not None:
        rules.below("lora").within(lora, rank="[1, inf)", alpha="(0, inf)", dropout="[0, 1)")
        rules(bool(lora.targets), "lora.targets", "names no module; say [q_proj, v_proj]")
        rules(lora.part not in job.train, "lora", f"{lora.part} trains whole and through adapters; take it out of train, or set lora null")
    quantized = system.language.quantize != "none" and "language" in job.train
    rules(not quantized, "train", "a 4bit language model cannot train whole; take language out of train and set lora")
    if isinstance(job.data, Mixture):
        _check_mixture(job.data, rules)
    for where, data in _sources(job.data):
        its = rules.below(where)
        its.within(data, frames="[1, inf)")
        if isinstance(data, Data):
            its.within(data, weight="(0, inf)", loss="(0, inf)", boxes="[0, 1]", instruct="[0, 1]", captions_first="[0, 1]")
            its.within(data, min_side="[0, inf)")
            its.below("pages").within(data.pages, pictures="[0, inf)", similarity="[0, 1]", following="[0, 1]", single="[0, 1]")
            _check_shots(data.shots, its.below("shots"))
            endless = data.streaming and job.optim.steps is None
            its(not endless, "streaming", "a stream has no known length; set optim.steps instead of epochs")
            built_in = data.path is None and data.name in BUILT_IN
            its(not (data.streaming and data.full), "full", "a stream is read record by record; leave streaming off, or full")
            for name in ("clean", "instruct", "min_side"):
                its(not (getattr(data, name) and built_in), name, f"{data.name} is built in and read as it is; leave {name} off")
            its(data.captions_first is None or not built_in, "captions_first", f"{data.name} is built in and read as it is; set it to null")
            its(data.shots == Shots() or not built_in, "shots", f"{data.name} is built in and read as it is; leave shots as it is")
            its(not (data.streaming and built_in), "streaming", f"{data.name} is built in and held in memory; leave streaming off")
    if isinstance(job, Stage) and job.objective == "retrieval":
        rules(isinstance(system.fusion, Retrieval), "objective", f"retrieval compares pictures with texts, and {kind} does not; choose lm")
        rules(job.template == "fromage", "template", f"retrieval ends texts with {Retrieval.token}; choose fromage")
        rules(not system.compute.packing, "objective", "retrieval compares rows; set compute.packing false")
        rules.within(job, contrast="[0, inf)")
    if isinstance(job, Stage):
        rules.within(job, z_loss="[0, inf)", dropout="[0, 1)")
        rules(not job.z_loss or job.objective == "lm", "z_loss", f"is a term of objective lm, and this is {job.objective}; set it to 0")
    if isinstance(job, Stage) and job.objective == "words":
        told = isinstance(job.data, Data) and job.data.path is None and job.data.name in ("shapes", "shapes_captions", "easy_vqa")
        rules(told, "objective", "words needs to know what is true of a picture, as the built-in shapes and easy_vqa do; choose lm")


def _check_shots(shots: Shots, its: _Rules) -> None:
    from mmfast.data.episodes import PROMPTS

    its.within(shots, shots="[0, inf)", ways="[1, inf)", inner_shots="[0, inf)", repeats="[0, inf)")
    known = shots.prompt is None or shots.prompt in PROMPTS
    its(known, "prompt", f"unknown prompt {shots.prompt!r}{nearest(str(shots.prompt), PROMPTS)}, expected one of {', '.join(PROMPTS)}")


def _check_queries(job: Any, system: System, rules: _Rules) -> None:
    """A Q-Former's first stage: its objective, its part and its connector belong together."""
    asked = isinstance(job, Stage) and job.objective == "queries"
    reads = isinstance(system.connector, QFormer) and (system.connector.text or system.weights is not None)
    if not (asked or "queries" in job.train):
        return
    rules(reads, "objective" if asked else "train", f"queries needs a connector QFormer with text, got {system.connector}")
    rules(asked, "train", "the part queries learns by objective queries; say connector for what the language model reads pictures through")
    rules("queries" in job.train, "train", "objective queries trains the part queries; name it")
    others = [part for part in job.train if part not in ("queries", "encoder")]
    rules(not others, "train", f"objective queries reaches queries and encoder, not {', '.join(others)}; take it out")
    most = getattr(system.connector, "positions", job.max_length)
    rules(job.max_length <= most, "max_length", f"{job.max_length} words are more than the Q-Former's {most} positions; at most {most}")
    rules(job.optim.batch >= 2, "optim.batch", "a text is compared with other pictures of its micro-batch, and 1 row has none; at least 2")


def _check_mixture(mixture: Mixture, rules: _Rules) -> None:
    its, parts = rules.below("data"), mixture.parts
    its(bool(parts), "parts", "a mixture needs at least one data set")
    its(len({p.name for p in parts}) == len(parts), "parts", "every data set of a mixture needs a name of its own")
    given = [p.weight is not None for p in parts]
    its(all(given) or not any(given), "parts", "give every data set of a mixture a weight, or none")
    given = [p.loss is not None for p in parts]
    its(all(given) or not any(given), "parts", "give the loss of every data set of a mixture a weight, or of none")
    built_in = all(p.path is None and p.name in BUILT_IN for p in parts)
    its(not any(given) or not built_in, "parts", "the losses of built-in sets have no weights of their own; leave loss out")
    bare = [p.name for p in parts if p.path is None]
    its(
        not bare or len(bare) == len(parts),
        "parts",
        f"give every data set of a mixture a path; {', '.join(bare)} {'have' if len(bare) > 1 else 'has'} none",
    )
    for part in parts:
        its(
            not part.streaming,
            f"parts.{part.name}.streaming",
            "a mixture is drawn from by number; leave streaming off, or train on one set",
        )


def _sources(data: Any) -> list[tuple[str, Any]]:
    return [(f"data.parts.{part.name}", part) for part in data.parts] if isinstance(data, Mixture) else [("data", data)]


def _check_alignment(alignment: Alignment, rules: _Rules) -> None:
    views = list(alignment.views)
    rules(bool(alignment.terms), "terms", "an alignment needs at least one term")
    for i, term in enumerate(alignment.terms):
        its = rules.below(f"terms.{i}")
        named = {"better": term.better, "worse": term.worse} if isinstance(term, Contrast) else {"view": term.view}
        for field, view in named.items():
            its(view in views, field, f"there is no view {view!r}{nearest(view, views)}, the views are {', '.join(views) or 'none'}")
        its(len(set(named.values())) == len(named), "worse", "contrasts a view with itself")
        its.within(term, weight="(0, inf)")
        if isinstance(term, Contrast):
            its.within(term, label_smoothing="[0, 0.5)")
    rules.within(alignment, beta="(0, inf)")
    rules.below("data").within(alignment.data, scenes="[2, inf)")
    off = alignment.reference == "adapter_off"
    rules(not off or alignment.lora is not None, "reference", "adapter_off needs adapters to switch off; set lora")
    whole = alignment.lora is not None and bool(alignment.train)
    rules(
        not (off and whole), "reference", f"adapter_off leaves {', '.join(alignment.train)} as trained; set train [] or another reference"
    )


def resolved(recipe: Recipe, problems: list[str], **options: Any) -> Recipe:
    """The recipe, if nothing is wrong with it.

    Raises:
        ConfigError: everything that is.
    """
    if problems := [*problems, *check(recipe, **options)]:
        raise ConfigError(problems)
    return recipe
