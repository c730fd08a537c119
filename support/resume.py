"""What a long training leaves behind: checkpoints to go on from exactly, and a log."""

import io
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from support.checkpoint import UNREADABLE
from support.command import UserError, replacing
from support.processes import place, say, summed


def save_state(path: Path, state: dict) -> None:
    """Writes a checkpoint, whole or not at all."""
    torch.save(state, buffer := io.BytesIO())
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_state(path: Path, plan: dict, names: tuple[str, ...]) -> dict:
    """What `save_state` wrote, on the CPU: "plan" and what else is named.

    Raises `UserError` if the file is damaged, or if its plan is not `plan`, naming an argument that
    differs.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        other = [name for name in plan if state["plan"][name] != plan[name]]
        missing = [name for name in names if name not in state]
        if missing:
            raise KeyError(missing[0])
    except (*UNREADABLE, TypeError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is damaged ({reason}); delete it to start anew") from None
    if other:
        flag = "--" + other[0].replace("_", "-")
        raise UserError(f"{path} was made with another {flag}; give the same, or another --out")
    return state


class Journal:
    """The checkpoint, the log and the progress bar of one training.

    Args:
        checkpoint: its file; written every `checkpoint_every` steps, after the last one, and when
            Ctrl-C or SIGTERM ends the training after the step that it is in.
        log: JSON lines, one for every `log_every`-th step and the last one; None for no log.
        state: what the checkpoint holds besides what `record` is given. It has "seconds".
    """

    def __init__(
        self,
        checkpoint: Path,
        checkpoint_every: int,
        log: Path | None,
        log_every: int,
        state: dict,
    ):
        self.checkpoint, self.checkpoint_every = checkpoint, checkpoint_every
        self.log, self.log_every, self.state = log, log_every, state
        self.first = place()[0] == 0  # of the processes: the one that writes

    @contextmanager
    def open(self, done: int, steps: int) -> Iterator[None]:
        """Around the steps `done` .. `steps` - 1; log lines of these from before are dropped."""
        self.steps = steps
        self.logged = {*range(0, steps, self.log_every), *range(steps)[-1:]} if self.log else set()
        if self.log and self.first:
            start_log(self.log, sum(step < done for step in self.logged))
        self.began = time.monotonic() - self.state["seconds"]
        quiet = not self.first or not steps
        self.bar = tqdm(total=steps, initial=done, unit="step", disable=quiet)
        with self.bar, interruptible() as self.signals:
            yield

    def record(
        self, step: int, row: dict, columns: dict[str, Tensor], shown: str, training: Callable
    ) -> None:
        """Notes a finished step: `row` and `columns` (`write_line`) in the log, `shown` beside the
        bar, and `training()`, what it takes to go on, in the checkpoint.

        Raises `KeyboardInterrupt` after a signal, with the checkpoint written.
        """
        self.state["seconds"] = time.monotonic() - self.began
        if self.first and step in self.logged:
            row = {"step": step, **row, "seconds": self.state["seconds"]}
            write_line(self.log, row, columns)
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update()
        # A signal may reach one process a step before another, but they must stop together.
        stopped = summed(next(iter(columns.values())).new_tensor(len(self.signals))).item() > 0
        due = step + 1 == self.steps or (step + 1) % self.checkpoint_every == 0
        if self.first and (stopped or due):
            save_state(self.checkpoint, {**self.state, **training()})
        if stopped:
            say(f"\n{step + 1} of {self.steps} steps are in {self.checkpoint}")
            say("go on with the same command and --resume")
            raise KeyboardInterrupt

    def forget(self) -> None:
        """Removes the checkpoint."""
        if self.first:
            self.checkpoint.unlink(missing_ok=True)


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Yields a list that Ctrl-C and SIGTERM add to, so that a step can end; a second one kills."""
    got: list[int] = []

    def handler(number: int, frame: object) -> None:
        got.append(number)
        signal.signal(number, before[number])

    before = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield got
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def start_log(log: Path, lines: int) -> None:
    """Keeps the first lines of a log: those of steps that will not be done again."""
    with replacing(log) as temporary:
        old = log.read_text(encoding="utf-8", errors="replace") if lines and log.exists() else ""
        temporary.write_text("".join(old.splitlines(True)[:lines]), encoding="utf-8")


def write_line(log: Path, row: dict, columns: dict[str, Tensor]) -> None:
    """Appends `row`, the sums of `columns` (each [layers]) by name, and these layer by layer."""
    values = {name: column.tolist() for name, column in columns.items()}
    sums = {name: column.sum().item() for name, column in columns.items()}
    layers = [dict(zip(values, layer, strict=True)) for layer in zip(*values.values(), strict=True)]
    try:
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, **sums, "layers": layers}) + "\n")
    except OSError as error:
        raise UserError(f"{log} cannot be written ({error}); choose another place") from None
