"""The problems of problems.toml, and their functions in source text: found, emptied, put in place.

Functions are named by a file, perhaps a class, and a function: `cskv.BiBranchCache.decode`,
`beyond/segments.damping`. `modules` are the texts of files by their names without ".py".
Everything here works on text. No file of a student is imported.
"""

import ast
import functools
import os
import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from support.command import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it along

COURSE = Path(__file__).resolve().parent
ROOT = COURSE.parent
# The files that problems are in.
MODULES = ("quant", "model", "cskv", "train", "infer", "beyond/segments")
LARGEST = 2**20  # bytes of a file that is read
GIVEN = COURSE / "given"  # in a student's folder: the files of `MODULES` as handed out
# What students and the grader on Gradescope need besides.
PROJECT = ("course", "support", "beyond", "weights/teacher", "LICENSE", "requirements.txt")
# Of the experiments, what the leaderboard measures with.
PROJECT += ("experiments/__init__.py", "experiments/rounded.py", "experiments/tasks")


@dataclass(frozen=True)
class Part:
    """Functions that are graded together; see problems.toml."""

    names: list[str]
    builds_on: list[str]
    checks: dict[str, int]  # points by the check's name

    @property
    def points(self) -> int:
        return sum(self.checks.values())


@dataclass(frozen=True)
class Problem:
    id: str
    title: str
    checks_in: str  # a module of course.checks
    parts: list[Part]

    @property
    def points(self) -> int:
        return sum(part.points for part in self.parts)

    @property
    def names(self) -> list[str]:
        return [name for part in self.parts for name in part.names]


def load_problems() -> list[Problem]:
    text = (COURSE / "problems.toml").read_text(encoding="utf-8")
    problems = []
    for entry in tomllib.loads(text)["problem"]:
        parts = [Part(**part) for part in entry["part"]]
        problems.append(Problem(entry["id"], entry["title"], entry["checks_in"], parts))
    return problems


# ------------------------------------------------------------------------- functions in a text


class NotFound(ValueError):
    """There is no such file, it is no Python, or it has no such function."""


@functools.lru_cache(maxsize=64)
def parse(text: str, file: str) -> ast.Module:
    try:
        return ast.parse(text, file)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise NotFound(f"{file} is not Python: {error}") from None


def find_function(modules: dict[str, str], name: str) -> tuple[ast.FunctionDef, list[str], slice]:
    """The definition of `name`, such as "cskv.BiBranchCache.decode", all lines of its file, and
    which of them it has, decorators included.

    Of several definitions it is the last, as in Python. Raises `NotFound`.
    """
    module, *path = name.split(".")
    file = f"{module}.py"
    if module not in modules:
        raise NotFound(f"there is no file {file} (of text, not a link) in the folder")
    node = parse(modules[module], file)
    for part in path:
        kind = ast.FunctionDef if part == path[-1] else ast.ClassDef
        same_name = [n for n in node.body if isinstance(n, kind) and n.name == part]
        if not same_name:
            raise NotFound(f"{file} has no function {'.'.join(path)}")
        node = same_name[-1]
    lines = modules[module].split("\n")  # as Python counts them; splitlines() knows other ends
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return node, lines, slice(first - 1, node.end_lineno)


def function_text(modules: dict[str, str], name: str) -> str:
    """The lines of a function, as they stand in its file. Raises `NotFound`."""
    _, lines, place = find_function(modules, name)
    return "\n".join(lines[place])


def put_function(modules: dict[str, str], name: str, function: str) -> dict[str, str]:
    """The files with these lines in the place of the function `name`. Raises `NotFound`."""
    _, lines, place = find_function(modules, name)
    lines[place] = [function]
    return {**modules, name.split(".")[0]: "\n".join(lines)}


def empty_function(modules: dict[str, str], name: str, problem: str) -> dict[str, str]:
    """The files with this function's signature and docstring left, and a body that says what to do.
    It must say what it returns. Raises `NotFound`."""
    node, lines, place = find_function(modules, name)
    last = node.body[0] if ast.get_docstring(node) else node.returns
    head = lines[place.start : last.end_lineno]
    path = name.split(".", 1)[1]
    message = f"problem {problem}: {path} is to be written; course/README.md, Problem {problem}"
    indent = " " * node.body[0].col_offset
    body = f'{indent}raise NotImplementedError(\n{indent}    "{message}"\n{indent})'
    return put_function(modules, name, "\n".join([*head, body]))


# ---------------------------------------------------------------------------- files of a project


def read_modules(folder: Path) -> dict[str, str]:
    """The texts of those files of `MODULES` that are in a folder. Left out are damaged ones, very
    large ones, and links: one could lead to the reference."""
    texts, folder = {}, Path(os.path.realpath(folder))
    for module in MODULES:
        file = folder / f"{module}.py"
        with suppress(OSError, ValueError):
            if file.is_file() and file.resolve() == file and file.stat().st_size < LARGEST:
                texts[module] = file.read_text(encoding="utf-8-sig")
    return texts


def write_modules(folder: Path, modules: dict[str, str]) -> None:
    for module, text in modules.items():
        file = folder / f"{module}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def copy_project(folder: Path, names: Iterable[str], modules: dict[str, str]) -> None:
    """Fills a folder with these files and folders of the project, and with these modules."""
    for name in names:
        source = ROOT / name
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.ipynb")
            shutil.copytree(source, target, ignore=ignore)
        else:
            shutil.copyfile(source, target)
    write_modules(folder, modules)  # these last: what was copied has the solution


@dataclass(frozen=True)
class Reference:
    """What students' functions are put into.

    Args:
        given: the files with all functions of problems emptied.
        solved: the files that functions of `builds_on` come from. None where this is a student's
            folder: there is no reference then, and they come from the student as well.
    """

    given: dict[str, str]
    solved: dict[str, str] | None


def load_reference(problems: Iterable[Problem]) -> Reference:
    """Of this project. Raises `UserError` if problems.toml names a function that there is not."""
    if GIVEN.exists():
        return Reference(read_modules(GIVEN), None)
    solved = read_modules(ROOT)
    given = solved
    for problem in problems:
        for name in problem.names:
            try:
                given = empty_function(given, name, problem.id)
            except NotFound as error:
                raise UserError(f"problems.toml, problem {problem.id}: {error}; mend it") from None
    return Reference(given, solved)


def assemble(reference: Reference, part: Part, student: dict[str, str]) -> dict[str, str]:
    """The files to check a part with. Raises `NotFound` for a function that the student's
    files do not have."""
    files = reference.given
    for name in part.builds_on:
        files = put_function(files, name, function_text(reference.solved or student, name))
    for name in part.names:
        files = put_function(files, name, function_text(student, name))
    return files


def is_written(reference: Reference, name: str, student: dict[str, str]) -> bool:
    """Whether a student's function is another one than was handed out."""
    try:
        return function_text(student, name) != function_text(reference.given, name)
    except NotFound:
        return True  # so that the reason is said
