"""The problems of problems.toml, and their functions in source text: found, emptied, put in place.

Functions are named by a file, perhaps a class, and a function: `cskv.BiBranchCache.decode`,
`beyond/segments.damping`.
Everything here works on text. No file of a student is imported.
"""

import ast
import functools
import io
import sys
import zipfile
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
GIVEN = COURSE / "given.zip"  # in a student's folder: all files of `MODULES` as handed out


@dataclass(frozen=True)
class Part:
    """Functions that are graded together; see problems.toml."""

    names: tuple[str, ...]
    builds_on: tuple[str, ...]
    checks: dict[str, int]  # points by the check's name


@dataclass(frozen=True)
class Problem:
    id: str
    title: str
    checks_in: str  # a module of course.checks
    parts: tuple[Part, ...]

    @property
    def points(self) -> int:
        return sum(sum(part.checks.values()) for part in self.parts)

    @property
    def names(self) -> list[str]:
        return [name for part in self.parts for name in part.names]


def load_problems() -> list[Problem]:
    text = (COURSE / "problems.toml").read_text(encoding="utf-8")
    return [
        Problem(
            entry["id"],
            entry["title"],
            entry["checks_in"],
            tuple(
                Part(tuple(part["names"]), tuple(part["builds_on"]), part["checks"])
                for part in entry["part"]
            ),
        )
        for entry in tomllib.loads(text)["problem"]
    ]


# ------------------------------------------------------------------------- functions in a text


class NotFound(ValueError):
    """A text has no such function, or is no Python."""


@functools.lru_cache(maxsize=64)
def parse(text: str) -> ast.Module:
    return ast.parse(text)


def find_function(text: str, name: str) -> ast.FunctionDef:
    """The definition of `name`, such as "cskv.BiBranchCache.decode", in the text of its module.

    Of several definitions it is the last, as in Python. Raises `NotFound`.
    """
    module, *path = name.split(".")
    try:
        body = parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        where = f", line {line}" if line else ""
        what = getattr(error, "msg", str(error))
        raise NotFound(f"{module}.py{where} is not Python: {what}") from None
    for depth, part in enumerate(path):
        kind = ast.FunctionDef if depth == len(path) - 1 else ast.ClassDef
        found = [node for node in body if isinstance(node, kind) and node.name == part]
        if not found:
            what = "function" if kind is ast.FunctionDef else "class"
            raise NotFound(f"{module}.py has no {what} {'.'.join(path[: depth + 1])}")
        body = found[-1].body
    return found[-1]


def line_range(node: ast.FunctionDef) -> slice:
    """The lines of a function in its text, decorators included."""
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return slice(first - 1, node.end_lineno)


def function_text(text: str, name: str) -> str:
    """The lines of a function, as they stand in the text."""
    return "".join(split_lines(text)[line_range(find_function(text, name))])


def put_function(text: str, name: str, function: str) -> str:
    """The text with these lines in the place of the function `name`."""
    lines = split_lines(text)
    lines[line_range(find_function(text, name))] = [function]
    return "".join(lines)


def split_lines(text: str) -> list[str]:
    """Lines as Python's parser counts them (str.splitlines also ends one at a form feed), each
    with its end."""
    return [line + "\n" for line in text.removesuffix("\n").split("\n")]


def empty_function(text: str, name: str, problem: str) -> str:
    """The text with the function's signature and docstring left, and a body that says what to do.

    Raises `NotFound`.
    """
    node, lines = find_function(text, name), split_lines(text)
    documented = ast.get_docstring(node) is not None
    end = node.body[0].end_lineno if documented else node.body[0].lineno - 1
    head = lines[line_range(node).start : end]
    while not documented and head[-1].lstrip().startswith("#"):  # what the body begins with
        head.pop()
    path = name.split(".", 1)[1]
    what = f'"problem {problem}: {path} is to be written; course/README.md, Problem {problem}"'
    indent = " " * node.body[0].col_offset
    body = [f"{indent}raise NotImplementedError(\n", f"{indent}    {what}\n", f"{indent})\n"]
    return put_function(text, name, "".join(head + body))


# ---------------------------------------------------------------------------- files of a project


def read_modules(folder: Path) -> dict[str, str]:
    """The texts of those files of `MODULES` that are in a folder. Left out are damaged ones, very
    large ones, and links: one could lead to the reference."""
    texts, folder = {}, folder.resolve()
    for module in MODULES:
        file = folder / f"{module}.py"
        with suppress(OSError, ValueError):
            if file.is_file() and file.resolve() == file and file.stat().st_size < LARGEST:
                texts[module] = file.read_text(encoding="utf-8-sig")
    return texts


def empty_modules(modules: dict[str, str], problems: Iterable[Problem]) -> dict[str, str]:
    """The files with every function of the problems emptied. Raises `UserError` if one of them no
    longer exists."""
    modules = dict(modules)
    for problem in problems:
        for name in problem.names:
            file = name.split(".")[0]
            try:
                modules[file] = empty_function(modules[file], name, problem.id)
            except (NotFound, KeyError) as error:
                raise UserError(f"problems.toml, problem {problem.id}: {error}; mend it") from None
    return modules


def write_given(modules: dict[str, str]) -> bytes:
    """A zip file of these files, the same bytes for the same texts."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for module, text in modules.items():
            archive.writestr(zipfile.ZipInfo(f"{module}.py"), text)
    return data.getvalue()


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
    """Of this project; `UserError` if its parts do not fit together."""
    if GIVEN.exists():
        with zipfile.ZipFile(GIVEN) as archive:
            texts = {name[:-3]: archive.read(name).decode() for name in archive.namelist()}
        return Reference(texts, None)
    modules = read_modules(ROOT)
    return Reference(empty_modules(modules, problems), modules)


def assemble(reference: Reference, part: Part, student: dict[str, str]) -> dict[str, str]:
    """The files to check a part with. Raises `NotFound` for a function that the student's
    files do not have."""
    files = dict(reference.given)

    def put(name: str, source: dict[str, str]) -> None:
        module = name.split(".")[0]
        if module not in source:
            raise NotFound(f"there is no file {module}.py (of text, not a link) in the folder")
        files[module] = put_function(files[module], name, function_text(source[module], name))

    for name in part.builds_on:
        put(name, student if reference.solved is None else reference.solved)
    for name in part.names:
        put(name, student)
    return files


def is_written(reference: Reference, name: str, student: dict[str, str]) -> bool:
    """Whether a student's function is another one than was handed out."""
    module = name.split(".")[0]
    given = function_text(reference.given[module], name)
    try:
        return module not in student or function_text(student[module], name) != given
    except NotFound:
        return True  # so that the reason is said
