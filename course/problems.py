"""The problems of problems.toml, and their functions in source text: found, emptied, put in place.

Functions are named by a file, perhaps a class, and a function: `cskv.BiBranchCache.decode`,
`beyond/segments.damping`. `modules` are the texts of files by their names without ".py".
Everything here works on text. No file of a student is imported.
"""

import ast
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from support.command import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("quant", "model", "cskv", "train", "infer", "beyond/segments")  # of problems
LARGEST = 2**18  # bytes of a file that is read
GIVEN = ROOT / "course" / "given"  # in a student's folder: the files of `MODULES` as handed out
# What students and the grader on Gradescope need besides.
PROJECT = ("course", "support", "beyond", "weights/teacher", "LICENSE")
PROJECT += ("experiments/__init__.py", "experiments/tasks")  # the checks' texts
# What a student must not find in these folders.
LEFT_OUT = ("__pycache__", ".ipynb_checkpoints", "release.py")
LEFT_OUT += ("walkthrough.ipynb", "answers.md", "INSTRUCTOR.md")
REQUIREMENTS = """torch==2.13.0
numpy==2.2.6
safetensors==0.8.0
tokenizers==0.23.3
tomli==2.2.1; python_version < "3.11"
"""
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # PyTorch without CUDA, which is several GB


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
    text = (ROOT / "course" / "problems.toml").read_text(encoding="utf-8")
    problems = []
    for entry in tomllib.loads(text)["problem"]:
        parts = [Part(**part) for part in entry["part"]]
        problems.append(Problem(entry["id"], entry["title"], entry["checks_in"], parts))
    return problems


# ------------------------------------------------------------------------- functions in a text


class NotFound(ValueError):
    """There is no such file, it is no Python, or it has no such function."""


class Unreadable(str):
    """In the place of a file's text: why there is none."""


def find_block(lines: list[str], place: range, kind: str, name: str) -> range:
    """Of these lines, those of a function (`kind` "def") or class: up to the next word that is
    indented no more. So a mistake in another function costs that one only. Of several it is the
    last, as in Python. Empty if there is none."""
    heads = {}
    for i in place:
        match = re.match(rf"(\s*){kind}\s+{name}\b", lines[i])
        if match:
            heads[i] = len(match[1])
    if not heads:
        return range(0)
    head = min(reversed(heads), key=heads.get)
    after = re.compile(rf"\s{{0,{heads[head]}}}[\w@]")
    ends = [i for i in range(head + 1, place.stop) if after.match(lines[i])]
    return range(head, min(ends, default=place.stop))


def find_function(modules: dict[str, str], name: str) -> tuple[ast.FunctionDef, list[str], slice]:
    """The definition of `name`, such as "cskv.BiBranchCache.decode", all lines of its file, and
    which of them it has, decorators included. Raises `NotFound`."""
    module, *path = name.split(".")
    file = f"{module}.py"
    text = modules.get(module, Unreadable("is not in the folder"))
    if isinstance(text, Unreadable):
        raise NotFound(f"{file} {text}")
    lines = text.split("\n")  # as Python counts them; splitlines() knows other ends
    place = range(len(lines))
    for part in path:
        kind = "def" if part == path[-1] else "class"
        place = find_block(lines, place, kind, part)
    if not place:
        raise NotFound(f"{file} has no function {'.'.join(path)}")
    start = place.start
    while start and lines[start - 1].lstrip().startswith("@"):
        start -= 1
    head = "if True:" if lines[start][0].isspace() else ""
    try:
        tree = ast.parse("\n".join([head, *lines[start : place.stop]]))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = min(start + (getattr(error, "lineno", None) or 2) - 1, len(lines))
        message = getattr(error, "msg", None) or str(error) or type(error).__name__
        raise NotFound(f"{file}, line {line}: {message}: {lines[line - 1].strip()}") from None
    ast.increment_lineno(tree, start - 1)
    node = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return node, lines, slice(start, node.end_lineno)


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
    """The files with this function's signature (it must say what is returned) and docstring left,
    and a body that says what to do. Raises `NotFound`."""
    node, lines, place = find_function(modules, name)
    last = node.body[0] if ast.get_docstring(node) else node.returns
    head = lines[place.start : last.end_lineno]
    path = name.split(".", 1)[1]
    message = f"problem {problem}: {path} is to be written; course/README.md, Problem {problem}"
    indent = " " * node.body[0].col_offset
    body = f'{indent}raise NotImplementedError(\n{indent}    "{message}"\n{indent})'
    return put_function(modules, name, "\n".join([*head, body]))


# ---------------------------------------------------------------------------- files of a project


def read_file(folder: str, name: str) -> str:
    """The text of a file that was handed in, or why there is none: a link, for example, could lead
    to the reference. `folder` has no link in its own path."""
    file = Path(folder, name)
    if os.path.realpath(file) != str(file):
        return Unreadable("is a link, or in a folder that is one; hand in the file itself")
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        return Unreadable("is a hard link, or no file; hand in a copy")
    if status.st_size > LARGEST:
        return Unreadable(f"has {status.st_size} bytes, more than {LARGEST}")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        return Unreadable(f"is not in UTF-8 (byte {error.start}); save it in this encoding")
    except OSError as error:
        return Unreadable(f"cannot be read: {error.strerror}")


def read_modules(folder: Path) -> dict[str, str]:
    """The texts of those files of `MODULES` that are in a folder."""
    real = os.path.realpath(folder)
    there = [module for module in MODULES if os.path.lexists(folder / f"{module}.py")]
    return {module: read_file(real, f"{module}.py") for module in there}


def find_submission(folder: Path) -> Path:
    """The folder with the files that were handed in: this one or, if they were zipped with one, a
    folder in it. Raises `UserError` if there is none, and for a link: it could lead anywhere."""
    if folder.is_symlink():
        raise UserError(f"{folder} is a link; give the folder itself")
    folders = [path for path in folder.glob("*") if path.is_dir() and not path.is_symlink()]
    for path in [folder, *sorted(folders)]:
        if any(os.path.lexists(path / f"{module}.py") for module in MODULES):
            return path
    names = ", ".join(f"{module}.py" for module in MODULES)
    raise UserError(f"{folder} has none of {names}; hand in these files themselves, no links")


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
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(*LEFT_OUT))
        else:
            shutil.copyfile(source, target)
    write_modules(folder, modules)  # these last: what was copied has the solution


@dataclass(frozen=True)
class Reference:
    """What students' functions are put into: files with all functions emptied, and those with the
    solutions that a part builds on. A student's folder has none of these: there it is their own."""

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
    """The files to check a part with. Raises `NotFound` if the student's files lack a function."""
    files = reference.given
    for name in part.builds_on:
        files = put_function(files, name, function_text(reference.solved or student, name))
    for name in part.names:
        files = put_function(files, name, function_text(student, name))
    return files


def student_line(
    files: dict[str, str], names: list[str], student: dict[str, str], frames: list[tuple[str, int]]
) -> str | None:
    """The innermost of the calls [file, line] that is in one of these functions of the student: its
    line in the student's file, and what stands there. `files` are those that were checked."""
    for file, line in reversed(frames):
        for name in names:
            _, _, place = find_function(files, name)
            if file == f"{name.split('.')[0]}.py" and place.start < line <= place.stop:
                _, lines, own = find_function(student, name)
                line += own.start - place.start
                return f"{file}, line {line}: {lines[line - 1].strip()}"
    return None
