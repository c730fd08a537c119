"""The process that runs a student's functions. It gets tensors and returns tensors: no more.

The grader starts it in a folder with the course's files, `support/` and `scenarios.py`, and writes
requests to its standard input: the name of a scenario, tensors, numbers. Answers go back on what
was its standard output; what the student's functions print goes with the errors. Nothing in here
knows the right answers, so nothing is won by changing it from within: sandbox.py, on the other
side, trusts nothing that it receives.
"""

import ctypes  # noqa: F401 (before the guard: it opens the program itself)
import json
import os
import struct
import sys
import sysconfig
import tempfile
from contextlib import suppress
from pathlib import Path

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None

import torch
from safetensors.torch import load, save

HEADER = struct.Struct("<Q")  # the bytes of a message, before it
STATUS = 70  # exit status after something that is not allowed

# What Python says it is about to do (its audit events), and what of that ends the process.
FORBIDDEN = ("ctypes.", "os.exec", "os.fork", "os.kill", "os.posix_spawn", "os.spawn", "os.system")
FORBIDDEN += ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.ch")
FORBIDDEN += ("os.truncate", "os.forkpty", "os.startfile", "os.utime", "os.setxattr", "pty.spawn")
FORBIDDEN += ("resource.", "shutil.", "signal.pthread_kill", "socket.", "subprocess.", "syslog.")
FORBIDDEN += ("sys.addaudithook", "tempfile.")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
DEVICES = (os.devnull, "/dev/urandom", "/proc/cpuinfo", "/proc/meminfo")
SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/sys/devices/system")  # libraries in C
PATHS = os.path.realpath, os.path.isdir


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


def libraries() -> list[str]:
    """Folders of Python's own modules and of installed ones."""
    paths = sysconfig.get_paths()
    folders = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return folders + [path for path in sys.path if "-packages" in path]


def watch(folders: list[str]) -> None:
    """Ends the process when it is about to do what no graded function needs to do, such as to
    write a file, and refuses to read files outside of these folders.

    Only of what Python does, and not against code that takes Python apart: confine.py holds against
    that too, where there is Linux.
    """
    readable = tuple(os.path.realpath(path) + "/" for path in folders)
    devices = DEVICES
    # Kept here: a student's code could put something else in the place of a module's names.
    forbidden, fspath, fsdecode, realpath, isdir = FORBIDDEN, os.fspath, os.fsdecode, *PATHS
    write, leave, status, writing = os.write, os._exit, STATUS, WRITING

    def stop(what: str) -> None:
        write(2, f"not allowed in a graded function: {what}\n".encode())
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


def read_message(stream) -> bytes | None:
    """The next message, or None at the end."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    return stream.read(HEADER.unpack(header)[0])


def write_message(stream, data: bytes) -> None:
    stream.write(HEADER.pack(len(data)) + data)
    stream.flush()


def metadata(data: bytes) -> dict[str, str]:
    """That of a safetensors message."""
    (length,) = HEADER.unpack(data[: HEADER.size])
    return json.loads(data[HEADER.size : HEADER.size + length]).get("__metadata__", {})


def plain(name: str, value: object) -> torch.Tensor:
    """A value that a student's function returned, as a tensor that can be sent."""
    if isinstance(value, (bool, int, float)):
        return torch.tensor(value, dtype=torch.float64)
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is of type {type(value).__name__}, a tensor was expected")
    return torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())


def where(error: BaseException) -> str:
    """The innermost line of the student's files that an error comes from."""
    line, trace, folder = "", error.__traceback__, Path(__file__).parent
    while trace:
        file = Path(trace.tb_frame.f_code.co_filename)
        if file.parent in (folder, folder / "beyond") and file.name != "scenarios.py":
            line = f" ({file.relative_to(folder)}, {trace.tb_frame.f_code.co_name})"
        trace = trace.tb_next
    return line


def answer(request: bytes) -> bytes:
    """Runs the scenario that is asked for. An error is an answer too."""
    try:
        values = metadata(request)
        import scenarios

        scenario, numbers = getattr(scenarios, values["scenario"]), json.loads(values["numbers"])
        result = scenario(**load(request), **numbers)
        return save({name: plain(name, value) for name, value in result.items()}, {"ok": "1"})
    except Exception as error:
        text = f"{type(error).__name__}: {error}"[:2000] + where(error)
        return save({}, {"error": text.encode("utf-8", "replace").decode()})


def main() -> None:
    folder = Path(__file__).resolve().parent
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    set_limits(*map(int, sys.argv[1:4]))
    sys.argv[:] = sys.argv[:1]
    # PyTorch wants a folder for what it compiles when the first optimizer is made.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.tempdir = str(folder)
    sys.path.insert(0, str(folder))
    from confine import confine

    folders = [str(folder), *libraries()]
    confine([*folders, *DEVICES, *SYSTEM])
    watch(folders)
    while (request := read_message(requests)) is not None:
        write_message(answers, answer(request))


if __name__ == "__main__":
    main()
