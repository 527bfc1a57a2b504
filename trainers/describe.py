"""What there is and how two differ: the tables behind `mmfast list`, `show` and `diff`."""

from __future__ import annotations

from typing import Any

from mmfast.spec import Alignment, System, to_dict

from .config import load_recipe, recipe_names


def choices(recipe: System | Alignment) -> dict[str, str]:
    """A recipe in a few words, one a column of the table."""
    if isinstance(recipe, Alignment):
        return {
            "kind": "alignment",
            "model": recipe.policy.name,
            "how": " + ".join(_term(t) for t in recipe.terms),
            "trains": ", ".join(recipe.train),
            "data": recipe.data.name,
        }
    parts = (recipe.encoder, recipe.connector, recipe.fusion, recipe.language, recipe.image)
    return {
        "kind": "system",
        "model": " > ".join(type(p).__name__ for p in parts),
        "how": "; ".join(f"{s.name}: {s.objective}" for s in recipe.stages),
        "trains": "; ".join(", ".join(s.train) for s in recipe.stages),
        "data": "; ".join(s.data.name for s in recipe.stages),
    }


def _term(term: Any) -> str:
    values = [str(v) for k, v in to_dict(term).items() if k in ("better", "worse", "view")]
    return f"{type(term).__name__}({', '.join(values)})"


def table(markdown: bool = False) -> str:
    """All bundled recipes."""
    rows = [{"name": name, **choices(recipe), "paper": recipe.paper} for name in recipe_names() for recipe in [load_recipe(name)]]
    columns = ["name", "kind", "model", "how", "trains", "data", "paper"] if markdown else ["name", "kind", "model", "paper"]
    if markdown:
        lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        return "\n".join(lines + ["| " + " | ".join(row[c] for c in columns) + " |" for row in rows])
    width = {c: max(len(c), *(len(row[c]) for row in rows)) for c in columns}
    return "\n".join(
        "  ".join(str(row[c]).ljust(width[c]) for c in columns).rstrip() for row in [dict(zip(columns, columns, strict=True)), *rows]
    )


def flat(spec: Any) -> dict[str, Any]:
    """Dotted fields of a recipe; stages and other named members by their names."""

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for k, v in value.items():
                walk(v, f"{path}.{k}" if path else k)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for i, v in enumerate(value):
                walk(v, f"{path}.{v.get('name', i)}")
        else:
            out[path] = value

    out: dict[str, Any] = {}
    walk(to_dict(spec), "")
    return out


def show(recipe: System | Alignment) -> str:
    """Every field, one a line, in the form in which the command line sets it."""
    return "\n".join(f"{key} = {value!r}" for key, value in flat(recipe).items() if not key.endswith("kind"))


def diff(a: System | Alignment, b: System | Alignment) -> str:
    """The fields that differ, apart from names and papers; "-" where one has no such field."""
    left, right = flat(a), flat(b)
    keys = [k for k in {**left, **right} if left.get(k) != right.get(k) and k not in ("name", "paper")]
    if not keys:
        return f"{a.name} and {b.name} do not differ"
    rows = [("", a.name, b.name), *((k, repr(left[k]) if k in left else "-", repr(right[k]) if k in right else "-") for k in keys)]
    width = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, width, strict=True)).rstrip() for row in rows)
