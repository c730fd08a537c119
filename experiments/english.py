"""English text that every machine with Python and PyTorch has already, to calibrate and to measure.

    python -m experiments.english --out runs/english

writes `calibration.txt`, the language reference that comes with Python (package `pydoc_data`), and
`heldout.txt`, the docstrings of PyTorch. Technical prose of two hands: what is fitted on the first
is measured on the second. Both differ a little from version to version of Python and PyTorch.
"""

import argparse
import inspect
from pathlib import Path
from pydoc_data.topics import topics

import torch

from model import Arguments, UserError, replacing, run_command

MODULES = (torch.nn, torch.optim, torch.nn.functional, torch.utils.data, torch.distributions, torch)


def calibration_text() -> str:
    """Python's language reference, topic by topic."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def heldout_text(shortest: int = 800) -> str:
    """The docstrings of PyTorch's public names of at least `shortest` characters, each once."""
    texts = {}
    for module in MODULES:
        for name in sorted(vars(module)):
            text = inspect.getdoc(getattr(module, name, None)) or ""
            if not name.startswith("_") and len(text) >= shortest:
                texts.setdefault(text, name)
    return "\n\n".join(texts)


def run(args: argparse.Namespace) -> None:
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{args.out} cannot be made ({error}); choose another folder") from None
    for name, text in (("calibration", calibration_text()), ("heldout", heldout_text())):
        file = args.out / f"{name}.txt"
        with replacing(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(f"{file}: {len(text)} characters")


if __name__ == "__main__":
    parser = Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the two files in")
    run_command(lambda: run(parser.parse_args()))
