"""What command lines share: how a mistake is said, how numbers are read and files written."""

import argparse
import math
import os
import re
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import NoReturn

import torch
from safetensors import SafetensorError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGEST = 2**31  # no count of tokens, no seed needs more
TEXTS = ("?*.txt", "?*.jsonl")  # what is read in a folder of text
# In a folder of a model: that, and the shards which an index names.
MODEL_FILES = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json")
MODEL_FILES += ("added_tokens.json", "vocab*", "merges*", "chat_template*", "adapter*")
MODEL_FILES += ("model*.safetensors*", "pytorch_model*", "additional_chat_templates/*")


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
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # in place of interrupt.py's
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (until the end)
        elif hasattr(stream, "reconfigure"):  # else one that a test put there
            stream.reconfigure(errors="replace")
    try:
        try:
            command()
        finally:  # a full disk is noticed here, not in the interpreter's last moments
            sys.stdout.flush()
    except UserError as error:
        fail(" ".join(str(error).split()))
    except torch.OutOfMemoryError:
        fail("out of GPU memory; try --dtype bfloat16 or a shorter text")
    except BrokenPipeError:  # the reader of our output has seen enough, as `head` does
        drop_output()
        sys.exit(1)
    except OSError as error:
        if error.filename is not None:
            fail(f"{error.filename} cannot be used ({error.strerror}); check where it is")
        drop_output()
        fail(f"the output cannot be written ({error}); write it to another place")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def fail(message: str) -> NoReturn:
    """Says what is wrong, in one line, and exits with 2."""
    with suppress(OSError):  # where even this cannot be written, the exit status still tells
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def drop_output() -> None:
    """What is still to be written to standard output goes nowhere, and fails no more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Arguments(argparse.ArgumentParser):
    """argparse, with a mistake as one line instead of the usage text and a line. The description is
    the first line of a module's docstring, which is None with `python -OO`."""

    def __init__(self, description: str | None = None, **options: object):
        super().__init__(description=(description or "").partition("\n")[0], **options)

    def parse_args(self, args: list[str] | None = None) -> argparse.Namespace:
        """As argparse does. Refuses names and text that files, and what is in them, cannot hold."""
        parsed = super().parse_args(args)
        encoding = sys.getfilesystemencoding().upper()
        for name, value in vars(parsed).items():
            for text in value if isinstance(value, list) else [value]:
                try:
                    str(text).encode(encoding)
                except UnicodeEncodeError:
                    mend = "rename the file, give other text, or set LC_ALL=C.UTF-8"
                    place = [action.dest for action in self._get_positional_actions()]
                    flag = name if name in place else "--" + name.replace("_", "-")
                    self.error(f"{flag} {str(text)!a} is not valid {encoding}; {mend}")
        return parsed

    def error(self, message: str) -> None:
        flag = re.match(r"argument (--[\w-]+): expected one argument", message)
        if flag:
            message += f"; a value that begins with a dash is given as {flag[1]}=-5"
        self.exit(2, f"error: {message} (see --help)\n")


def number(kind: type, low: float, high: float = LARGEST):
    """For argparse's `type`: an int or a float in [low, high]."""

    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            noun = "a whole number" if kind is int else "a number"
            limits = f"from {low} to {high}"
            if high == LARGEST and not value > high:
                limits = f"of at least {low}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun} {limits}")
        return value

    return read


def comma_list(read_one: Callable[[str], object]) -> Callable[[str], list]:
    """For argparse's `type`: values with commas between them, each as `read_one` reads it."""

    def read(text: str) -> list:
        values = [read_one(word) for word in text.split(",")]
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise argparse.ArgumentTypeError(f"{twice[0]!r} is given twice in {text!r}")
        return values

    return read


def one_of(known: tuple, noun: str) -> Callable[[str], object]:
    """For argparse's `type`: one of the known values. (`choices` cannot look into a list.)"""
    by_name = {str(value): value for value in known}

    def read(text: str) -> object:
        if text not in by_name:
            raise argparse.ArgumentTypeError(f"no {noun} {text!r}; choose of {','.join(by_name)}")
        return by_name[text]

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


def check_writable(path: Path | None) -> None:
    """Raises `UserError` if `path` cannot be written or replaced: before the work, not after."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise UserError(f"no folder {path.parent} to write {path.name} in; make it first")
    with writing(path):
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(path.stat().st_mode):  # raises OSError for a loop of links
                raise UserError(f"{path} is not a regular file to replace; choose another place")
        with NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".tmp"):
            pass


def make_folder(path: Path) -> None:
    """Makes a folder, if it is not there. Raises `UserError` if that cannot be."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def check_files(
    written: dict[str, Path | None], read: dict[str, Path | None], model: str | Path | None = None
) -> None:
    """Raises `UserError` if a file cannot be written, or is another one that is written or read,
    whatever links lead there. Of folders it is those files that are read in one of text, or in the
    `model`'s. Files by the names that a message shall give them, such as "--out"."""
    taken: dict[object, str] = {}
    names = [path.name for path in written.values() if path]
    for name, path in {**read, "--model": model, **written}.items():
        if path is None:
            continue
        files = [path]
        if name in written:
            check_writable(path)
        elif os.path.isdir(path):
            patterns = MODEL_FILES if name == "--model" else TEXTS
            files = files_in(Path(path), patterns, names)
            name = f"a file of {name}"
        for file in files:
            other = taken.setdefault(identity(file), name)
            if other != name and name in written:
                raise UserError(f"{name} and {other} are both {path}; choose another name")


def files_in(folder: Path, patterns: tuple[str, ...], names: Iterable[str] = ()) -> list[Path]:
    """The files of a folder that fit one of the patterns. `names` count as if they were there: the
    next command would read them. Where an index names a model's shards, these are added."""
    if patterns == MODEL_FILES:
        for index in folder.glob("*.index.json"):
            patterns += tuple(re.findall(r'"(\w[^"/*?[]*)"', index.read_text("utf-8", "replace")))
    files = [folder / name for name in names if any(fnmatch(name, p) for p in patterns)]
    for pattern in patterns:
        files += folder.glob(pattern)
    return files


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
