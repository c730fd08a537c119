"""The shape of the project: which file may import which, and where the README says things stand."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = [  # each part may import itself and what stands above it
    ("quant", "model"),
    ("cskv",),
    ("support",),
    ("beyond",),
    ("train", "infer"),
    ("experiments",),
    ("weights", "course"),
]
PARTS = [part for level in LEVELS for part in level]


def imported(file: Path) -> set[str]:
    """The first parts of the names of all modules that a file imports, wherever it does."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("part", PARTS)
def test_imports_run_one_way(part):
    level = next(n for n, parts in enumerate(LEVELS) if part in parts)
    below = {other for parts in LEVELS[level:] for other in parts} - {part}
    for file in sorted((ROOT / part).rglob("*.py")) or [ROOT / f"{part}.py"]:
        wrong = imported(file) & below
        assert not wrong, f"{file.name} imports {wrong}"


def test_the_readme_says_where_things_stand():
    """Each name in a row of the reading order is defined between the lines that the row gives. Of
    all files but the first, rows from line 1 on are of the whole file."""
    rows = re.findall(
        r"^\| \d+ \| \[`([\w./]+)`\][^|]*\| ([^|]*) \|[^|]*\| (\d+)-(\d+) \|$",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        flags=re.M,
    )
    assert len(rows) >= 9
    for name, text, first, last in rows:
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        assert int(last) <= len(lines)
        if int(first) == 1 and name != "cskv.py":
            assert int(last) == len(lines), name
        part = "\n".join(lines[int(first) - 1 : int(last)])
        for thing in re.findall(r"`([\w.]+)`", text):
            definition = rf"^\s*(def|class) {thing.split('.')[-1]}\b"
            assert re.search(definition, part, re.M), (name, thing)
