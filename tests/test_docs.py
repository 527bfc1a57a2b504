"""What the documents say is what is there."""

import importlib
import re
from pathlib import Path

from mmfast.trainers.describe import table
from mmfast.trainers.measured import FILE, filled, read

ROOT = Path(__file__).resolve().parent.parent


def test_systems_table_is_current():
    assert (ROOT / "docs" / "systems.md").read_text().strip() == table(markdown=True, root=ROOT).strip(), "run `make docs`"


def test_tables_of_what_was_measured_are_current():
    rows = read(ROOT / FILE)
    pages = [page for page in (ROOT / "docs").glob("*.md") if "<!-- measured:" in page.read_text()]
    assert pages
    for page in pages:
        assert page.read_text() == filled(page.read_text(), rows), f"{page.name}: run `make docs`"
    assert filled("a\n<!-- measured: x -->\n| old |\nb\n", []) == "a\n<!-- measured: x -->\nx: nothing measured yet\nb\n"


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_functions_that_the_alignment_page_names_exist():
    names = re.findall(r"`(mmfast(?:\.\w+)+)`", (ROOT / "docs" / "alignment.md").read_text())
    assert len(names) > 40
    for name in names:
        module, _, function = name.rpartition(".")
        assert callable(getattr(importlib.import_module(module), function)), name


def test_what_examples_import_is_there():
    """Every import of ours in a Python block of the README and of docs/."""
    found = 0
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
            for line in re.findall(r"^(?:from mmfast[\w.]* import .+|import mmfast[\w.]*)$", block, re.M):
                exec(line, {})
                found += 1
    assert found > 20


def test_readme_op_example_runs():
    code = re.search(r"## Use an op\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    small = code.replace("256, 32, 32", "256, 4, 4").replace("8192", "64")
    exec(compile(small, "README.md", "exec"), {})
