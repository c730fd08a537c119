"""Text files to samples of tokens."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from support.command import TEXTS, UserError
from support.huggingface.tokenizer import Tokenizer

UTF_8 = "utf-8-sig"  # editors on Windows write a mark first


def read_documents(path: Path) -> Iterator[str]:
    """Yields the documents of a .txt file (one), a .jsonl file (`text` of each line), or a folder
    of these, in the order of the names. Raises `UserError` naming file and line."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if TEXTS.match(file.name))
        if not files:
            raise UserError(f"{path} has no .txt or .jsonl files; give text to read")
        for file in files:
            yield from read_documents(file)
    elif not TEXTS.match(path.name):
        raise UserError(f"{path} is not a .txt or .jsonl file, nor a folder of them; convert it")
    elif not path.exists():
        raise UserError(f"no file {path}; give text to read")
    elif path.suffix == ".txt":
        yield read_file(path)
    else:
        with readable(path), path.open(encoding=UTF_8) as lines:
            for i, line in enumerate(lines, 1):
                if line.strip():
                    yield read_line(line, f"{path}, line {i}")


def read_file(name: str | Path) -> str:
    """The text of a file of any name, or of standard input for "-"."""
    source = 0 if name == "-" else name
    with readable(name), open(source, encoding=UTF_8, closefd=name != "-") as file:
        text = file.read()
    if "\0" in text:  # UTF-16 without a mark is valid UTF-8, of letters and NULs
        raise UserError(f"{name} has NUL bytes, so it is no UTF-8 text; save it as such")
    return text


@contextmanager
def readable(name: str | Path) -> Iterator[None]:
    """A file that cannot be read, or is no UTF-8, in one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error}); give another file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is no UTF-8 text ({error}); save it as such") from None


def read_line(line: str, place: str) -> str:
    """The text of a line of a .jsonl file. Raises `UserError` naming the place."""
    try:
        text = json.loads(line)["text"]
        text.encode()  # fails for half of a surrogate pair, which is no letter
        return text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        problem = 'not a JSON object with a "text" of letters'
        raise UserError(f"{place}: {problem}; mend or remove that line") from None


def sample_tokens(
    path: Path, tokenizer: Tokenizer, samples: int, length: int, seed: int, sinks: int = 0
) -> list[Tensor]:
    """Up to `samples` tensors [1, T] with 2 <= T <= `length`, longer than the `sinks` that are not
    learned from, drawn without repetition: whole documents, or pieces of one that is longer."""
    pieces = []
    least = max(2, sinks + 1)
    for text in read_documents(path):
        ids = torch.tensor([tokenizer.encode(text)])  # [1, tokens]
        pieces += [piece for piece in ids.split(length, dim=1) if piece.shape[1] >= least]
    if not pieces:
        problem = f"{path} holds no text of {least} tokens or more"
        raise UserError(f"{problem}; give longer text, or a higher --seq-len")
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))
    return [pieces[i] for i in order[:samples].tolist()]


def with_copies(texts: list[Tensor], every: int) -> list[Tensor]:
    """Texts [1, T], but of one in `every` only the first half, twice."""
    copied = list(texts)
    for n in range(1, len(texts), every):
        half = texts[n].shape[1] // 2
        copied[n] = texts[n][:, :half].repeat(1, 2)
    return copied


def passages(ids: list[int], count: int, length: int) -> Tensor:
    """`count` passages of `length` tokens, spread evenly over a text, as [count, length]."""
    if len(ids) < count * length:
        problem = f"the text has {len(ids)} tokens, {count} passages of {length} need more"
        raise UserError(f"{problem}; give longer text, or fewer or shorter passages")
    starts = [i * (len(ids) - length) // max(1, count - 1) for i in range(count)]
    return torch.tensor([ids[s : s + length] for s in starts])


def batch_of(samples: list[Tensor], step: int, size: int, seed: int) -> list[Tensor]:
    """The samples of one step; every epoch has an order of its own, drawn from seed and epoch."""
    epoch, position = divmod(step, -(-len(samples) // size))
    generator = torch.Generator().manual_seed((seed << 32) + epoch)
    order = torch.randperm(len(samples), generator=generator).tolist()
    return [samples[i] for i in order[position * size : (position + 1) * size]]


WIDER_CACHES = "--dtype and --cache-dtype bfloat16, --bits 32, or --caches without kivi"
WIDER = "another --dtype (bfloat16 reaches as far as float32), or latents of 32 bits (--bits 32)"


def check_finite(finite: bool, mend: str = WIDER) -> None:
    """Raises `UserError` if a model's output, of which this is known, is not `finite`."""
    if not finite:
        problem = "the model's output is not finite: some number is too large for its type"
        raise UserError(f"{problem}; try {mend}")
