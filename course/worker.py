"""The process that runs a student's functions. It gets tensors and returns tensors: no more.

The grader starts it in a folder with `support/`, `beyond/` and scenarios.py, and writes requests to
its standard input, a line each: a function's name, tensors, numbers. Answers go back on what
was its standard output; what is printed goes with the errors. Nothing in here knows the right
answers, and sandbox.py, on the other side, trusts nothing that it receives.
"""

import base64
import json
import os
import sys
import traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None

import torch
from safetensors.torch import load, save

FOLDER = Path(__file__).resolve().parents[1]
ONLY_FUNCTIONS = "only the function is taken from your file: helpers and imports go inside it"


def memory_limit(more: int) -> int | None:
    """In bytes: what this process has now and so much more. Only Linux says, and keeps it."""
    with suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        return pages * resource.getpagesize() + more


def set_limits(cpu_seconds: int, memory: int) -> None:
    """For good: no more processor time, memory beyond what is taken now (bytes), 1 MiB in any file,
    nor other processes (as root there is no such limit)."""
    if resource is None:
        return
    limits = {"CPU": cpu_seconds, "FSIZE": 2**20, "CORE": 0, "NPROC": 0}
    limits["AS"] = memory_limit(memory) or resource.RLIM_INFINITY
    for name, most in limits.items():
        with suppress(ValueError, OSError):  # a lower limit is there already
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


def encode(tensors: dict[str, torch.Tensor]) -> str:
    return base64.b64encode(save(tensors)).decode()


def decode(text: str) -> dict[str, torch.Tensor]:
    return load(base64.b64decode(text))


def named(name: str, result: object) -> dict[str, torch.Tensor]:
    """What a function of this name returned, as tensors that can be sent."""
    if {"A", "B"} <= set(dir(result)):  # a LowRank
        result = {"A": result.A, "B": result.B}
    if not isinstance(result, dict):
        result = {name: result}
    tensors = {}
    for key, value in result.items():
        if isinstance(value, (bool, int, float)):
            value = torch.tensor(value, dtype=torch.float64)
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{key} is of type {type(value).__name__}, a tensor was expected")
        tensors[key] = torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
    return tensors


def explain(error: Exception) -> str:
    """An error in words for a student."""
    text = f"{type(error).__name__}: {error}"
    if "NoneType" in text:
        return f"a function returned nothing: is there a `return`? ({text})"
    owner = type(getattr(error, "obj", None)).__module__  # of a method that is missing
    ours = Path(getattr(sys.modules.get(owner), "__file__", None) or "/").is_relative_to(FOLDER)
    if type(error) is NameError or (ours and isinstance(error, AttributeError)):
        text += f"; {ONLY_FUNCTIONS}"
    return text


def frames(error: Exception) -> list:
    """[file, line] of the calls that led to an error, the innermost last."""
    found = []
    for frame in traceback.extract_tb(error.__traceback__):
        file = Path(frame.filename)
        if file.is_relative_to(FOLDER):
            found.append([file.relative_to(FOLDER).as_posix(), frame.lineno])
    return found[-30:]


def answer(request: str) -> str:
    """Calls the function that is asked for. Request and answer are JSON; an error is an answer."""
    try:
        values = json.loads(request)
        module, name = values["function"].rsplit(".", 1)
        function = getattr(import_module(module), name)
        result = function(**decode(values["tensors"]), **values["numbers"])
        return json.dumps({"tensors": encode(named(name, result))})
    except Exception as error:
        return json.dumps({"error": explain(error)[:2000], "frames": frames(error)})
    finally:
        sys.stdout.flush()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    set_limits(*map(int, sys.argv[1:3]))
    sys.path[:0] = [str(FOLDER), str(FOLDER / "course")]
    for request in sys.stdin:
        print(answer(request), file=answers, flush=True)


if __name__ == "__main__":
    main()
