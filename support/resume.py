"""What a long computation leaves behind to go on from exactly: its state, and its log."""

import hashlib
import io
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    """The flag of the first argument of `plan` that is another one in `theirs`; None if there is
    none."""
    for name, value in plan.items():
        if theirs.get(name) != value:
            return "--" + name.replace("_", "-")
    return None


def load_state(path: Path, plan: dict, names: tuple[str, ...]) -> dict:
    """What `save_state` wrote, on the CPU: "plan" and all that is named.

    Raises `UserError` if the file is damaged, or if its plan is not `plan`, naming an argument that
    differs.
    """
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
    text = str([sample.tolist() for sample in samples]).encode()
    weights = json.dumps(fingerprint(model)).encode()
    digests = {"model": hashlib.sha256(weights), "data": hashlib.sha256(text)}
    return plan | {name: digest.hexdigest() for name, digest in digests.items()}


@dataclass(frozen=True)
class Losses:
    """Losses of factors on some text, [layers] each, in the units of equation 2 (train.py)."""

    loss: Tensor  # of the factors
    floor: Tensor  # no factors of these ranks come below it
    optimal: Tensor  # of the closed form on the calibration text: what training can hope for
    zeros: Tensor  # of zeros in place of keys and values


STATE = ("bases", "initial", "seconds", "logged", "step", "parameters", "optimizer")


@dataclass(eq=False)
class Journal:
    """The checkpoint, the log and the progress bar of one training. Only the first process writes.

    The checkpoint is written every `every` steps, after the last one, and when Ctrl-C or SIGTERM
    ends the training after the step that it is in.
    """

    checkpoint: Path
    every: int
    log: Path | None  # JSON lines, one a step and a summary
    plan: dict  # arguments that must be the same to go on
    seconds: float = 0.0

    def __post_init__(self):
        self.first = place()[0] == 0
        self.logged = hashlib.sha256()  # of the log's lines so far

    def load(self, device: str) -> dict | None:
        """What the checkpoint holds, on `device`, or None if there is none."""
        if not self.checkpoint.exists():
            say(f"no checkpoint {self.checkpoint}; starting from the beginning")
            return None
        state = load_state(self.checkpoint, self.plan, STATE)
        say(f"going on after step {state['step']}")
        self.seconds = state["seconds"]
        self.logged_before = state["logged"]
        initial = {name: losses.to(device) for name, losses in state["initial"].items()}
        bases = [V.to(device) for V in state["bases"]]
        return {**state, "bases": bases, "initial": Losses(**initial)}

    @contextmanager
    def open(self, done: int, steps: int) -> Iterator[None]:
        """Around the steps `done` .. `steps` - 1; log lines of these from before are dropped."""
        self.done = done
        self.steps = steps
        self.began = time.monotonic() - self.seconds
        if self.log and self.first:
            self.keep_lines(done)
        quiet = not self.first or not steps
        self.bar = tqdm(total=steps, initial=done, unit="step", disable=quiet)
        with self.bar, Postponed(signal.SIGINT, signal.SIGTERM) as self.interrupt:
            yield

    def keep_lines(self, done: int) -> None:
        """Keeps the log's lines of the steps before `done`: the others will be done again. Raises
        `UserError` if they are not those of this training."""
        lines = []
        if done and self.log.exists():
            text = self.log.read_text(encoding="utf-8", errors="replace")
            lines = text.splitlines(True)[:done]
            for line in lines:
                self.logged.update(line.rstrip("\n").encode())
            if self.logged.hexdigest() != self.logged_before:
                raise UserError(f"{self.log} is not the log of this training; give another --log")
        with replacing(self.log) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")

    def check(self, loss: Tensor, initial: Losses, step: int) -> None:
        """Raises `UserError` if a layer's loss diverges, and removes the checkpoint: to go on from
        that would end here again."""
        # Losses of single batches differ, but not by a factor of 1000: neither from where the layer
        # began, nor, where that was next to nothing, from what it would lose with zeros.
        limit = 1000 * initial.loss.maximum(initial.zeros)
        bad = ~(loss.isfinite() & (loss <= limit))
        if bad.any():
            self.forget()
            i = int(bad.nonzero()[0])
            message = f"step {step}, layer {i}: the loss diverges ({loss[i].item():.3g})"
            raise UserError(f"{message}; start anew with a lower --lr, or another --dtype")

    def record(self, row: dict, columns: dict[str, Tensor], state: Callable[[], dict]) -> None:
        """Notes a finished step: `row` and the losses `columns` [layers] in the log, what `state`
        returns in the checkpoint.

        Raises `KeyboardInterrupt` after a signal, with the checkpoint written.
        """
        self.done += 1
        self.seconds = time.monotonic() - self.began
        self.write(row, columns)
        progress = f"loss {columns['loss'].sum():.4g}"
        if "floor" in columns and columns["floor"].any():
            progress += f", {columns['loss'].sum() / columns['floor'].sum():.2f} of its floor"
        self.bar.set_postfix_str(progress, refresh=False)
        self.bar.update()
        # A signal may reach one process a step before another, but they must stop together.
        stopped = summed(columns["loss"].new_tensor(self.interrupt.asked)).item() > 0
        due = self.done == self.steps or self.done % self.every == 0
        if self.first and (stopped or due):
            journal = {"plan": self.plan, "seconds": self.seconds}
            journal["logged"] = self.logged.hexdigest()
            save_state(self.checkpoint, {**journal, **state()})
        if stopped:
            say(f"\n{self.done} of {self.steps} steps are in {self.checkpoint}")
            say("go on with the same command and --resume")
            raise KeyboardInterrupt

    def summarize(self, steps: int, initial: Losses, final: Losses, samples: int) -> None:
        """Says and logs the losses on `samples` texts before and after, and their floor."""
        before, after, floor = initial.loss.sum(), final.loss.sum(), final.floor.sum()
        message = f"{before:.6g} before, {after:.6g} after, floor {floor:.6g}"
        ratio = None
        if floor:
            ratio = (after / floor).item()
            message += f", ratio {ratio:.4f}"
        say(f"loss on {samples} training samples: {message}")
        columns = {"initial": initial.loss, "final": final.loss}
        columns |= {"floor": final.floor, "optimal": final.optimal}
        self.write({"summary": True, "steps": steps, "ratio": ratio}, columns)

    def write(self, row: dict, columns: dict[str, Tensor]) -> None:
        """Appends a line to the log: `row`, the time, sums of `columns` [layers], these by layer.
        Raises `UserError` if it cannot be written."""
        if not (self.log and self.first):
            return
        sums = {name: column.sum().item() for name, column in columns.items()}
        by_layer = torch.stack(list(columns.values()), dim=1).tolist()
        layers = [dict(zip(columns, losses, strict=True)) for losses in by_layer]
        line = json.dumps({**row, "seconds": self.seconds, **sums, "layers": layers})
        with writing(self.log), self.log.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.logged.update(line.encode())

    def forget(self) -> None:
        """Removes the checkpoint."""
        if self.first:
            self.checkpoint.unlink(missing_ok=True)
