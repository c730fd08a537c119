"""The process that runs a student's functions. It gets tensors and returns tensors: no more.

The grader starts it in a folder with `support/`, `beyond/` and scenarios.py, and writes requests to
its standard input, a line each: a function's name, tensors, numbers. Answers go back on what
was its standard output; what the student's functions print goes with the errors. Nothing in here
knows the right answers, so nothing is won by changing it from within: sandbox.py, on the other
side, trusts nothing that it receives.
"""

import base64
import ctypes  # noqa: F401 (before the guard: it opens the program itself)
import json
import os
import sys
import sysconfig
import tempfile
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
STATUS = 70  # exit status after something that is not allowed

# What Python says it is about to do (its audit events), and what of that ends the process.
FORBIDDEN = ("ctypes.", "os.exec", "os.fork", "os.kill", "os.posix_spawn", "os.spawn", "os.system")
FORBIDDEN += ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.ch")
FORBIDDEN += ("os.truncate", "os.forkpty", "os.startfile", "os.utime", "os.setxattr", "pty.spawn")
FORBIDDEN += ("resource.", "shutil.", "signal.pthread_kill", "socket.", "subprocess.", "syslog.")
FORBIDDEN += ("sys.addaudithook", "tempfile.")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
DEVICES = (os.devnull, "/dev/urandom", "/proc/cpuinfo", "/proc/meminfo")
LIBRARIES = ("stdlib", "platstdlib", "purelib", "platlib")  # Python's and installed ones
SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/sys/devices/system")  # libraries in C


def set_limits(cpu_seconds: int, memory: int, output: int) -> None:
    """No more processor time, memory beyond what is taken now (bytes), nor bytes in any file."""
    if resource is None:
        return
    limits = {"CPU": cpu_seconds, "FSIZE": output, "CORE": 0}
    with suppress(OSError):  # only Linux says, and keeps, how much it is
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limits["AS"] = pages * resource.getpagesize() + memory
    for name, most in limits.items():
        with suppress(ValueError, OSError):  # a lower limit is there already
            # The system kills a second later: before, it says why.
            hard = most + 1 if name == "CPU" else most
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, hard))


def watch(folders: list[str]) -> None:
    """Ends the process when it is about to do what no graded function needs to do, such as to
    write a file, and refuses to read files outside of these folders.

    Only of what Python does, and not against code that takes Python apart: confine.py holds against
    that too, where there is Linux.
    """
    readable = tuple(os.path.realpath(path) + "/" for path in folders)
    # Kept here: a student's code could put something else in the place of a module's names.
    forbidden, devices, writing, status = FORBIDDEN, DEVICES, WRITING, STATUS
    fspath, fsdecode, realpath, isdir = os.fspath, os.fsdecode, os.path.realpath, os.path.isdir
    write, leave = os.write, os._exit

    def stop(deed: str) -> None:
        write(2, f"not allowed in a graded function: {deed}\n".encode())
        leave(status)

    def check(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int):  # a stream that is open already
                return
            path = fsdecode(fspath(path))
            if flags & writing and path not in devices:
                stop(f"to write {path}")
        elif event in ("os.listdir", "os.scandir"):
            path = fsdecode(fspath("." if arguments[0] is None else arguments[0]))
        elif event == "os.mkdir" and isdir(arguments[0]):  # changes nothing
            return
        elif event.startswith(forbidden) and event != "os.chdir":
            return stop(f"{event} {arguments[0] if arguments else ''}")
        else:
            return
        if path not in devices and not (realpath(path) + "/").startswith(readable):
            raise PermissionError(13, "not allowed in a graded function", path)

    sys.addaudithook(check)


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


def where(error: BaseException) -> str:
    """The innermost function of the student's files that an error comes from."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if file.parent in (FOLDER, FOLDER / "beyond"):
            return f" ({file.relative_to(FOLDER)}, {frame.name})"
    return ""


def answer(request: str) -> str:
    """Calls the function that is asked for. Request and answer are JSON; an error is an answer."""
    try:
        values = json.loads(request)
        module, name = values["function"].rsplit(".", 1)
        function = getattr(import_module(module), name)
        result = function(**decode(values["tensors"]), **values["numbers"])
        return json.dumps({"tensors": encode(named(name, result))})
    except Exception as error:
        return json.dumps({"error": f"{type(error).__name__}: {error}"[:2000] + where(error)})


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    set_limits(*map(int, sys.argv[1:4]))
    sys.argv[:] = sys.argv[:1]
    # PyTorch wants a folder for what it compiles when the first optimizer is made.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.tempdir = str(FOLDER)
    paths = sysconfig.get_paths()
    folders = [str(FOLDER)] + [paths[name] for name in LIBRARIES]
    folders += [path for path in sys.path if "-packages" in path]
    sys.path[:0] = [str(FOLDER), str(FOLDER / "course")]
    from confine import confine

    confine([*folders, *DEVICES, *SYSTEM])
    watch(folders)
    for request in sys.stdin:
        print(answer(request), file=answers, flush=True)


if __name__ == "__main__":
    main()
