"""The grader's side of a process that runs a student's functions (worker.py).

The grader never imports a student's file. It sends tensors to the process, gets tensors back, and
compares them itself with what they must be. What comes back has a bound, and so has a check.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from course import worker
from course.problems import copy_project

LARGEST_ANSWER = 2**24  # bytes
CHECKING = 2**29  # bytes that a check may take
COPIED = ("support", "beyond", "course/worker.py", "course/scenarios.py", "weights/teacher")
KEPT = ("PATH", "SYSTEMROOT", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
KILLED = (-9, -24)  # the exit status after SIGKILL and SIGXCPU, which the limits send
NOBODY = 65534  # the user that owns nothing


@dataclass(frozen=True)
class Limits:
    """Of one process."""

    cpu_seconds: int = 60
    seconds: float = 240.0  # only against a process that waits for ever: no check looks at a clock
    memory: int = 3 * 2**28  # bytes, beyond what Python and PyTorch take (Linux only)


class Failed(Exception):
    """A check does not hold, or the student's function raised an error."""

    frames = ()  # [file, line] of the calls that led to an error


class Stopped(Exception):
    """The process had to be stopped, or stopped itself: no points for the whole problem."""


def other_user() -> dict:
    """For `Popen`: as root, run as a user that owns nothing, if every user may run this Python."""
    if os.name != "posix" or os.geteuid() != 0:
        return {}
    python = Path(sys.executable)
    folders = [*Path(os.path.abspath(python)).parents, *python.resolve().parents]
    if not all(folder.stat().st_mode & 0o005 == 0o005 for folder in folders):
        return {}
    return {"user": NOBODY, "group": NOBODY, "extra_groups": []}


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """This process may take no more time, nor memory than `CHECKING` (Linux only). Raises `Stopped`
    or MemoryError. Does nothing on Windows, where only a student's own code is checked."""

    def stop(*_: object) -> None:
        raise Stopped(f"it did not end within {seconds:.3g} seconds")

    if worker.resource is None:
        yield
        return
    kind = worker.resource.RLIMIT_AS
    before = worker.resource.getrlimit(kind)
    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        limit = worker.memory_limit(CHECKING) or before[0]
        worker.resource.setrlimit(kind, (limit, before[1]))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        worker.resource.setrlimit(kind, before)


class Sandbox:
    """Student's functions in a process of their own; `files` are the texts of all `MODULES`."""

    def __init__(self, files: dict[str, str], limits: Limits):
        self.files = files
        self.limits = limits

    def __enter__(self) -> "Sandbox":
        self.folder = Path(tempfile.mkdtemp(prefix="course-"))
        copy_project(self.folder, COPIED, self.files)
        for path in [self.folder, *self.folder.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        self.printed = tempfile.TemporaryFile()
        # -u: what was printed must be there when the process is ended.
        command = [sys.executable, "-I", "-B", "-u", self.folder / "course" / "worker.py"]
        command += [str(self.limits.cpu_seconds), str(self.limits.memory)]
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        environment["OMP_NUM_THREADS"] = "1"
        # PyTorch wants a folder for what it compiles when the first optimizer is made.
        homes = ("HOME", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR")
        environment |= dict.fromkeys(homes, str(self.folder))
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.printed,
            cwd=self.folder,
            env=environment,
            start_new_session=True,
            **other_user(),
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        with suppress(OSError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.printed.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self) -> None:
        """Ends the process and all that it started."""
        with suppress(OSError):
            if os.name == "posix":
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
        self.process.wait()

    def output(self) -> str:
        """The last of what the process printed."""
        self.printed.seek(0)
        return self.printed.read()[-2000:].decode("utf-8", "replace").strip()

    def ask(self, function: str, tensors: dict[str, Tensor], **numbers) -> dict[str, Tensor]:
        """What a function, such as "quant.pack" or "scenarios.attend", makes of these tensors and
        numbers, as tensors: those of its result's names or, for a single one, of its own name.
        Raises `Failed` if the student's function raised an error, `Stopped` if it ended."""
        tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        request = {"function": function, "numbers": numbers, "tensors": worker.encode(tensors)}
        return read_answer(self.exchange(json.dumps(request)))

    def exchange(self, request: str) -> bytes:
        """The line that the process answers. Raises `Stopped` if it ended."""
        answer = b""
        with suppress(OSError):
            self.process.stdin.write(request.encode() + b"\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline(LARGEST_ANSWER)
        if not answer.endswith(b"\n"):
            raise Stopped(self.why_it_ended())
        return answer

    def why_it_ended(self) -> str:
        """Why there is no answer, in a sentence."""
        with suppress(subprocess.TimeoutExpired):  # it has closed its answers, but still runs
            self.process.wait(5)
        status = self.process.poll()
        self.kill()
        end = self.output()[-300:]
        if status is None:
            return f"it closed the way to the grader, or sent over {LARGEST_ANSWER} bytes"
        if status in KILLED:
            return f"it took over {self.limits.cpu_seconds} seconds of processor time, or memory"
        if status < 0:
            return f"it crashed with signal {-status}: {end}"
        return f"it ended the process, with status {status}: {end}"


def read_answer(answer: bytes) -> dict[str, Tensor]:
    """The tensors of a line that the process wrote. Raises as `Sandbox.ask` does."""
    try:
        values = json.loads(answer)
        if "error" not in values:
            return worker.decode(values["tensors"])
        frames = [(str(file), int(line)) for file, line in values["frames"]]
        message = str(values["error"])[:2000]
    except Exception:  # bytes of any kind may have come
        raise Stopped("the process wrote something else than its answer") from None
    failed = Failed(message)
    failed.frames = frames
    raise failed


def look(answer: dict[str, Tensor], name: str, shape: tuple, dtype=None) -> Tensor:
    """A tensor of an answer, of this shape and type, and finite. Raises `Failed` if it is not."""
    if name not in answer:
        raise Failed(f"{name} was not returned")
    tensor = answer[name]
    if tuple(tensor.shape) != tuple(shape):
        raise Failed(f"{name} has shape {list(tensor.shape)}, {list(shape)} was expected")
    if dtype is not None and tensor.dtype != dtype:
        raise Failed(f"{name} is of type {tensor.dtype}, {dtype} was expected")
    if tensor.dtype.is_complex or not tensor.double().isfinite().all():
        raise Failed(f"{name} has numbers that are not finite")
    return tensor


def expect(
    answer: dict, name: str, want: Tensor | float, tolerance: float, hint="", dtype=None
) -> None:
    """Raises `Failed` unless a tensor of an answer is `want`, within a relative tolerance."""
    want = torch.as_tensor(want, dtype=torch.float64)
    got = look(answer, name, want.shape, dtype)
    if want.numel() == 0:
        return
    errors = (got.double() - want).abs() / want.abs().max().clamp(min=1e-300)
    wrong = ~(errors <= tolerance)
    if wrong.any():
        first = tuple(wrong.nonzero()[0].tolist())
        place = f" at {list(first)}" if first else ""
        values = f"{got[first].item():.6g}{place}, {want[first].item():.6g} was expected"
        error = f"relative error {errors.max():.2g}, at most {tolerance:g} allowed"
        reason = f"; {hint}" if hint else ""
        raise Failed(f"{name} is {values}; {error}{reason}")


class Draw:
    """Random inputs, new ones at every run, the same ones for the same seed. Numbers are those of
    float32, in float64."""

    def __init__(self, seed: str):
        digest = int.from_bytes(seed.encode(), "little") % (2**63 - 25)
        self.generator = torch.Generator().manual_seed(digest)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).float().double()

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64).float().double()

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers in low .. high."""
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def integer(self, low: int, high: int) -> int:
        return int(self.whole(low, high))

    def choose(self, values: list | tuple):
        return values[self.integer(0, len(values) - 1)]
