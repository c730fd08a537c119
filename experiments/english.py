"""English text that every machine with Python and PyTorch has already, to calibrate and to measure.

    python -m experiments.english --out runs/english

writes `calibration.txt`, the language reference that comes with Python (package `pydoc_data`) and
the docstrings of its standard library; `heldout.txt`, the docstrings of PyTorch; and
`licences.txt`, the licences of PyTorch, NumPy and all that they contain. What is fitted on the
first is measured on the others, technical prose of other hands and legal prose. All differ a little
from version to version of Python and the packages.
"""

import support.interrupt  # isort: skip # noqa: F401

import argparse
import ast
import inspect
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from pydoc_data.topics import topics

import torch

from support.command import Arguments, UserError, check_files, make_folder, replacing, run_command

MODULES = (torch.nn, torch.optim, torch.nn.functional, torch.utils.data, torch.distributions, torch)
LEFT_OUT = {"test", "tests", "idlelib", "site-packages", "dist-packages"}  # folders of the library
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def calibration_text(shortest: int = 300) -> str:
    """Python's language reference, topic by topic, then the docstrings of at least `shortest`
    characters in the source of its standard library, each once."""
    texts = [topics[name] for name in sorted(topics)]
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(library.rglob("*.py")):
        if LEFT_OUT & set(file.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (OSError, SyntaxError, ValueError):  # templates that are not quite Python
            continue
        nodes = [node for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]
        found = [ast.get_docstring(node) or "" for node in nodes]
        texts += [text for text in found if len(text) >= shortest]
    return "\n\n".join(dict.fromkeys(texts))


def heldout_text(shortest: int = 800) -> str:
    """The docstrings of PyTorch's public names of at least `shortest` characters, each once."""
    texts = []
    for module in MODULES:
        for name in sorted(vars(module)):
            thing = getattr(module, name, None)
            if name.startswith("_") or inspect.ismodule(thing):  # such as torch.os, Python's own
                continue
            text = inspect.getdoc(thing) or ""
            if len(text) >= shortest:
                texts.append(text)
    return "\n\n".join(dict.fromkeys(texts))


def licences_text(shortest: int = 3000) -> str:
    """The licences that the packages torch and numpy bring along, of at least `shortest` characters
    and from the longest on, each once: most short ones are the same but for a name."""
    texts = set()
    for file in [*(metadata.files("torch") or []), *(metadata.files("numpy") or [])]:
        if "LICEN" in file.name.upper():
            texts.add(file.read_text("utf-8"))
    long = sorted(text for text in texts if len(text) >= shortest)
    return "\n\n".join(sorted(long, key=len, reverse=True))


def run(args: argparse.Namespace) -> None:
    if sys.flags.optimize > 1:
        raise UserError("heldout.txt is made of docstrings, which -OO leaves out; start without it")
    make_folder(args.out)
    makers = {"calibration": calibration_text, "heldout": heldout_text, "licences": licences_text}
    check_files({name: args.out / f"{name}.txt" for name in makers}, read={})
    for name, make in makers.items():
        file, text = args.out / f"{name}.txt", make()
        with replacing(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(f"{file}: {len(text)} characters")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="write the files into this folder")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
