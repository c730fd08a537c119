"""What a long computation leaves behind to go on from exactly: its state, and its log."""

import hashlib
import io
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from model import Transformer
from support.command import UserError, first_line, replacing, writing
from support.factors_file import fingerprint
from support.interrupt import Postponed
from support.processes import place, say, summed


def save_state(path: Path, state: dict) -> None:
    """Writes a state, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def changed_flag(plan: dict, theirs: dict) -> str | None:
    """The flag of the first argument of `plan` that is another one in `theirs`, if there is one."""
    for name, value in plan.items():
        if theirs.get(name) != value:
            return "--" + name.replace("_", "-")
    return None


def load_state(path: Path, plan: dict, names: tuple[str, ...]) -> dict:
    """What `save_state` wrote, on the CPU: "plan" and all that is named. Raises `UserError` if the
    file is damaged, or if its plan is another one than `plan`."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        flag = changed_flag(plan, state.get("plan", {}))
        for name in names:
            state[name]
    except Exception as error:  # a damaged pickle raises nearly anything
        message = f"{path} is damaged ({first_line(error)})"
        raise UserError(f"{message}; delete it to start anew") from None
    if flag:
        message = f"{path} was made with another {flag}"
        raise UserError(f"{message}; give the same, write elsewhere, or delete it to start anew")
    return state


# Arguments that may change when a training is resumed; model and data are compared by content.
MAY_CHANGE = ("out", "log", "checkpoint_every", "resume", "device", "model", "data")


def make_plan(arguments: dict, model: Transformer, samples: list[Tensor]) -> dict:
    """All that must be the same to go on with a training."""
    plan = {name: str(value) for name, value in arguments.items() if name not in MAY_CHANGE}
    for name, content in (("model", fingerprint(model)), ("data", [s.tolist() for s in samples])):
        plan[name] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return plan


STATE = ("initial", "limit", "seconds", "lines", "step", "parameters", "optimizer")


@dataclass(eq=False)
class Journal:
    """The checkpoint, the log and the progress bar of one training. Only the first process writes.

    The checkpoint is written every `every` steps, after the last one, and when Ctrl-C or SIGTERM
    ends the training after a step. It has the log's lines too: those of steps that will be done
    again leave the log, and whatever else was in the file."""

    checkpoint: Path
    every: int
    log: Path | None  # JSON lines, one a step and a summary
    plan: dict  # arguments that must be the same to go on
    seconds: float = 0.0
    lines: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.first = place()[0] == 0

    def load(self) -> dict | None:
        """What the checkpoint holds, or None if there is none."""
        if not self.checkpoint.exists():
            say(f"no checkpoint {self.checkpoint}; starting from the beginning")
            return None
        state = load_state(self.checkpoint, self.plan, STATE)
        say(f"going on after step {state['step']}")
        self.seconds = state["seconds"]
        self.lines = state["lines"]
        return state

    @contextmanager
    def open(self, done: int, steps: int) -> Iterator[None]:
        """Around the steps `done` .. `steps` - 1."""
        self.done = done
        self.steps = steps
        self.began = time.monotonic() - self.seconds
        if self.log and self.first:
            with replacing(self.log) as temporary:
                temporary.write_text("".join(self.lines), encoding="utf-8")
        self.bar = tqdm(total=steps, initial=done, unit="step", disable=not (self.first and steps))
        with self.bar, Postponed(signal.SIGINT, signal.SIGTERM) as self.interrupt:
            yield

    def record(self, row: dict, columns: dict[str, Tensor], state: Callable[[], dict]) -> None:
        """Notes a finished step: `row` and the losses `columns` [layers] in the log, what `state`
        returns in the checkpoint. Raises `KeyboardInterrupt` after a signal, with that written."""
        self.done += 1
        self.seconds = time.monotonic() - self.began
        self.write(row, columns)
        totals = [f"{name} {losses.sum():.4g}" for name, losses in columns.items()]
        self.bar.set_postfix_str(", ".join(totals), refresh=False)
        self.bar.update()
        # A signal may reach one process a step before another, but they must stop together.
        stopped = summed(columns["loss"].new_tensor(self.interrupt.asked)).item() > 0
        due = self.done == self.steps or self.done % self.every == 0
        if self.first and (stopped or due):
            journal = {"plan": self.plan, "seconds": self.seconds, "lines": self.lines}
            save_state(self.checkpoint, journal | state())
        if stopped:
            say(f"\n{self.done} of {self.steps} steps are in {self.checkpoint}")
            say("go on with the same command and --resume")
            raise KeyboardInterrupt

    def write(self, row: dict, columns: dict[str, Tensor]) -> None:
        """Appends a line to the log: `row`, the time, `columns` [layers] as sums and by layer."""
        if not (self.log and self.first):
            return
        sums = {name: column.sum().item() for name, column in columns.items()}
        by_layer = torch.stack(list(columns.values()), dim=1).tolist()
        layers = [dict(zip(columns, losses, strict=True)) for losses in by_layer]
        line = json.dumps({**row, "seconds": self.seconds, **sums, "layers": layers}) + "\n"
        self.lines.append(line)
        with writing(self.log), self.log.open("a", encoding="utf-8") as file:
            file.write(line)

    def forget(self) -> None:
        """Removes the checkpoint."""
        if self.first:
            self.checkpoint.unlink(missing_ok=True)
