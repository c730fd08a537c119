"""What command lines share: how a mistake is said, how numbers are read and files written."""

import argparse
import os
import re
import signal
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from safetensors import SafetensorError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGEST = 2**31  # no count of tokens, no seed needs more
TEXTS = re.compile(r".+\.(txt|jsonl)$")  # what is read in a folder of text
MODEL_FILES = re.compile(  # in a folder of a model
    r"(generation_)?config\.json|special_tokens_map|added_tokens|tokenizer|vocab|merges"
    r"|chat_template|adapter|model.*\.safetensors|pytorch_model"
)


class UserError(ValueError):
    """A mistake that the user can mend. Command lines print it as one line and exit with 2."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, as a part of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def user_values() -> Iterator[None]:
    """A `ValueError` that the algorithm raises for a value that the user gave, as a `UserError`."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def run_command(command: Callable[[], None]) -> None:
    """Runs a command line and exits: 0, or 2 with one line on standard error for a `UserError`.

    A character that the terminal lacks is written as "?"; what a closed stream would get is lost.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in place of interrupt.py's
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (until the end)
        getattr(sys, name).reconfigure(errors="replace")
    try:
        try:
            command()
        finally:  # a full disk is noticed here, not in the interpreter's last moments
            sys.stdout.flush()
    except UserError as error:
        message = " ".join(str(error).split())
    except torch.OutOfMemoryError:
        message = "out of GPU memory; try --dtype bfloat16 or a shorter text"
    except OSError as error:
        message = f"{error.filename} cannot be used ({error.strerror}); check where it is"
        if error.filename is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to come
            if isinstance(error, BrokenPipeError):  # the reader has seen enough, as `head` does
                sys.exit(1)
            message = f"the output cannot be written ({error}); write it to another place"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    else:
        return
    with suppress(OSError):  # where even this cannot be written, the exit status still tells
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


class Arguments(argparse.ArgumentParser):
    """argparse, with a mistake as one line instead of the usage text and a line."""

    def __init__(self, description: str | None = None, **options: object):
        first_line = (description or "").partition("\n")[0]  # a docstring is None with `python -OO`
        super().__init__(description=first_line, **options)

    def parse_args(self, args: list[str] | None = None) -> argparse.Namespace:
        """As argparse does. Refuses names and text that files, and what is in them, cannot hold."""
        words = sys.argv[1:] if args is None else args
        encoding = sys.getfilesystemencoding().upper()
        for word in words:
            try:
                word.encode(encoding)
            except UnicodeEncodeError:
                mend = "rename the file, give other text, or set LC_ALL=C.UTF-8"
                self.error(f"{word!a} is not valid {encoding}; {mend}")
        return super().parse_args(words)

    def error(self, message: str) -> None:
        flag = re.match(r"argument (--[\w-]+): expected one argument", message)
        if flag:
            message += f"; a value that begins with a dash is given as {flag[1]}=-5"
        self.exit(2, f"error: {message} (see --help)\n")


def number(kind: type, low: float, high: float = LARGEST):
    """For argparse's `type`: an int or a float in [low, high]."""

    def read(text: str) -> int | float:
        with suppress(ValueError):
            value = kind(text)
            if low <= value <= high:
                return value
        noun = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {noun} from {low} to {high}")

    return read


def comma_list(read_one: Callable, known: Iterable | None = None) -> Callable[[str], list]:
    """For argparse's `type`: values with commas between them, each one of the `known`, if given."""

    def read(text: str) -> list:
        values = [read_one(word) for word in text.split(",")]
        for value in values:
            if known is not None and value not in known:
                choices = ",".join(map(str, known))
                raise argparse.ArgumentTypeError(f"no {value!r} here; choose of {choices}")
            if values.count(value) > 1:
                raise argparse.ArgumentTypeError(f"{value!r} is given twice in {text!r}")
        return values

    return read


def use_device(name: str) -> None:
    """Raises `UserError` unless tensors can live on the device called `name`.

    cuDNN's attention, which PyTorch prefers on an H100 for 16-bit numbers, is switched off: it
    plans anew for every length. A decode step of SmolLM2 took 64 ms with it, in float32 30.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        torch.empty(1, device=name).item()
    except (RuntimeError, AssertionError):
        raise UserError(f"no device {name!r} here; use --device cpu") from None


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """What keeps `path` from being written, as a `UserError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written ({error}); choose another place") from None


def check_writable(path: Path) -> None:
    """Raises `UserError` if `path` cannot be written or replaced: before the work, not after."""
    if not path.parent.is_dir():
        raise UserError(f"no folder {path.parent} to write {path.name} in; make it first")
    with writing(path):
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(path.stat().st_mode):  # raises OSError for a loop of links
                raise UserError(f"{path} is not a regular file to replace; choose another place")
        with NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".tmp"):
            pass


def make_folder(path: Path) -> None:
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def check_files(
    written: dict[str, Path | None], read: dict[str, Path | None], model: str | Path | None = None
) -> None:
    """Raises `UserError` if a file cannot be written, or is another one that is written or read,
    whatever links lead there. Files by the names that a message shall give them, such as "--out".
    In a folder that is read, a new file counts if the next command would read it."""
    taken: dict[object, str] = {}
    new_names = [path.name for path in written.values() if path]
    for name, path in {**read, "--model": model}.items():
        if path is None:
            continue
        taken[identity(path)] = name
        if os.path.isdir(path):
            is_read = MODEL_FILES if name == "--model" else TEXTS
            for file in filter(is_read.match, os.listdir(path) + new_names):
                taken[identity(Path(path, file))] = f"a file of {name}"
    for name, path in written.items():
        if path is None:
            continue
        check_writable(path)
        other = taken.setdefault(identity(path), name)
        if other != name:
            raise UserError(f"{name} and {other} are both {path}; choose another name")


def identity(path: str | Path) -> object:
    """By what a file is known, whatever it is called and whichever links lead there."""
    with suppress(OSError):
        status = os.stat(path)
        return status.st_dev, status.st_ino
    return os.path.realpath(path)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name to write a file under; it takes the name `path` only when it is complete."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with writing(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()
