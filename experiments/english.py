"""Text that every machine with Python and PyTorch has already, to calibrate and to measure.

    python -m experiments.english --out runs/english

What is fitted on `calibration.txt` is measured on `heldout.txt`, technical prose of other hands,
and on `licences.txt`, legal prose. `program.txt` (modules of PyTorch), `headers.txt` (C++) and
`descriptions.txt` (what packages say of themselves) are of kinds that nothing is fitted to. All
differ a little from version to version of the packages.
"""

import support.interrupt  # isort: skip # noqa: F401

import argparse
import ast
import inspect
import sys
import sysconfig
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from pydoc_data.topics import topics

import torch

from support.command import Arguments, UserError, check_files, make_folder, replacing, run_command

MODULES = (torch.nn, torch.optim, torch.nn.functional, torch.utils.data, torch.distributions, torch)
LEFT_OUT = {"test", "tests", "idlelib", "site-packages", "dist-packages"}  # folders of the library
DESCRIBED = ("torch", "safetensors", "tokenizers", "numpy", "hypothesis", "pytest", "matplotlib")
DESCRIBED += ("jupyter_core", "transformers", "tqdm")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def calibration_texts() -> list[str]:
    """Python's language reference, topic by topic, then the longer docstrings of its library."""
    texts = [topics[name] for name in sorted(topics)]
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(library.rglob("*.py")):
        if LEFT_OUT & set(file.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (OSError, SyntaxError, ValueError):  # templates that are not quite Python
            continue
        for node in ast.walk(tree):
            text = isinstance(node, DOCUMENTED) and ast.get_docstring(node)
            if text and len(text) >= 300:
                texts.append(text)
    return texts


def heldout_texts() -> list[str]:
    """The longer docstrings of PyTorch's public names."""
    texts = []
    for module in MODULES:
        for name in sorted(vars(module)):
            thing = getattr(module, name, None)
            if name.startswith("_") or inspect.ismodule(thing):  # such as torch.os, Python's own
                continue
            text = inspect.getdoc(thing) or ""
            if len(text) >= 800:
                texts.append(text)
    return texts


def licences_texts() -> list[str]:
    """The licences that torch and numpy bring along, from the longest on: most short ones are the
    same but for a name."""
    texts = set()
    for file in [*(metadata.files("torch") or []), *(metadata.files("numpy") or [])]:
        if "LICEN" in file.name.upper():
            texts.add(file.read_text("utf-8"))
    long = sorted(text for text in texts if len(text) >= 3000)
    return sorted(long, key=len, reverse=True)


def files_of_torch(pattern: str) -> list[str]:
    """Files of the package torch, one after the other."""
    files = sorted(Path(torch.__file__).parent.glob(pattern), key=str)
    return ["".join([file.read_text("utf-8") for file in files])]


def descriptions_texts() -> list[str]:
    """Of the packages of requirements.txt, and those of requirements-extra.txt that are there."""
    texts = []
    for name in DESCRIBED:
        with suppress(metadata.PackageNotFoundError):
            texts.append(metadata.distribution(name).read_text("METADATA") or "")
    return ["".join(texts)]


def run(args: argparse.Namespace) -> None:
    if sys.flags.optimize > 1:
        raise UserError("heldout.txt is made of docstrings, which -OO leaves out; start without it")
    make_folder(args.out)
    makers = {
        "calibration.txt": calibration_texts,
        "heldout.txt": heldout_texts,
        "licences.txt": licences_texts,
        "program.txt": lambda: files_of_torch("nn/modules/[a-l]*.py"),
        "headers.txt": lambda: files_of_torch("include/c10/*/*.h"),
        "descriptions.txt": descriptions_texts,
    }
    check_files({name: args.out / name for name in makers}, read={})
    for name, make in makers.items():
        text = "\n\n".join(dict.fromkeys(make()))  # each once
        with replacing(args.out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(f"{args.out / name}: {len(text)} characters")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="write the files into this folder")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
