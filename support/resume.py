"""What a long training leaves behind: checkpoints to go on from exactly, and a log."""

import hashlib
import io
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from model import Transformer
from support.command import UserError, append_line, first_line, replacing
from support.factors_file import fingerprint
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
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(
            f"{path} is damaged ({first_line(error)}); delete it to start anew"
        ) from None
    if other:
        flag = "--" + other[0].replace("_", "-")
        raise UserError(f"{path} was made with another {flag}; give the same, or another --out")
    return state


# Arguments that may change when a training is resumed; model and data are compared by content.
MAY_CHANGE = ("out", "log", "checkpoint_every", "resume", "device", "save_dtype", "model", "data")


def make_plan(arguments: dict, model: Transformer, samples: list[Tensor]) -> dict:
    """All that must be the same to go on with a training."""
    plan = {name: str(value) for name, value in arguments.items() if name not in MAY_CHANGE}
    text = str([sample.tolist() for sample in samples]).encode()
    return plan | {"model": fingerprint(model), "data": hashlib.sha256(text).hexdigest()}


def state_of(tuner) -> dict:
    """What it takes to go on exactly with a `train.Tuner`."""
    parameters = [parameter.detach() for parameter in tuner.parameters]
    optimizer = tuner.optimizer.state_dict()
    return {"step": tuner.steps_done, "parameters": parameters, "optimizer": optimizer}


@torch.no_grad()
def restore(tuner, state: dict) -> None:
    """Puts a `train.Tuner` where it was when `state_of` was called."""
    tuner.steps_done = state["step"]
    tuner.optimizer.load_state_dict(state["optimizer"])
    for parameter, value in zip(tuner.parameters, state["parameters"], strict=True):
        parameter.copy_(value)


class Journal:
    """The checkpoint, the log and the progress bar of one training.

    Its `state` is what a checkpoint holds besides what `record` is given: "plan", "seconds",
    "initial" (the table of `train.measure` before the first step) and what the caller puts there.
    If it goes on from a checkpoint, all of that checkpoint, with "step" in it.

    Args:
        checkpoint: its file; written every `checkpoint_every` steps, after the last one, and when
            Ctrl-C or SIGTERM ends the training after the step that it is in.
        log: JSON lines, one for every `log_every`-th step and the last one; None for no log.
        plan: arguments that must be the same to go on.
        resume: whether to go on from the checkpoint, if there is one.
    """

    def __init__(
        self,
        checkpoint: Path,
        log: Path | None,
        checkpoint_every: int,
        log_every: int,
        plan: dict,
        resume: bool,
        device: str,
    ):
        self.checkpoint, self.checkpoint_every = checkpoint, checkpoint_every
        self.log, self.log_every = log, log_every
        self.first = place()[0] == 0  # of the processes: the one that writes
        self.state = {"plan": plan, "seconds": 0}
        if resume and checkpoint.exists():
            names = (*self.state, "initial", "bases", "step", "parameters", "optimizer")
            self.state = load_state(checkpoint, plan, names)
            self.state["bases"] = [V.to(device) for V in self.state["bases"]]
            self.state["initial"] = self.state["initial"].to(device)
            say(f"going on after step {self.state['step']}")
        elif resume:
            say(f"no checkpoint {checkpoint}; starting from the beginning")

    @contextmanager
    def open(self, done: int, steps: int) -> Iterator[None]:
        """Around the steps `done` .. `steps` - 1; log lines of these from before are dropped."""
        self.check(self.state["initial"][0], 0)
        self.steps = steps
        self.logged = {*range(0, steps, self.log_every), *range(steps)[-1:]} if self.log else set()
        if self.log and self.first:
            start_log(self.log, sum(step < done for step in self.logged))
        self.began = time.monotonic() - self.state["seconds"]
        quiet = not self.first or not steps
        self.bar = tqdm(total=steps, initial=done, unit="step", disable=quiet)
        with self.bar, interruptible() as self.signals:
            yield

    def check(self, losses: Tensor, step: int) -> None:
        """Raises `UserError` if a layer's loss diverges from "initial", and removes the checkpoint:
        to go on from that would end here again."""
        # Losses of single batches differ, but not by a factor of 1000: neither from where the layer
        # began, nor, where that was next to nothing, from what it would lose with zeros.
        began, _, _, zeros = self.state["initial"]
        bad = ~(losses.isfinite() & (losses <= 1000 * began.maximum(zeros)))
        if bad.any():
            self.forget()
            i = int(bad.nonzero()[0])
            loss = f"step {step}, layer {i}: the loss diverges ({losses[i].item():.3g})"
            raise UserError(f"{loss}; start anew with a lower --lr, or another --dtype")

    def record(self, step: int, rate: float, losses: Tensor, tuner) -> None:
        """Notes a finished step: its learning rate and losses (rows "loss", and of a logged step
        "floor" and "optimal") in the log, and the tuner in the checkpoint.

        Raises `KeyboardInterrupt` after a signal, with the checkpoint written.
        """
        self.state["seconds"] = time.monotonic() - self.began
        if self.first and step in self.logged:
            row = {"step": step, "lr": rate, "seconds": self.state["seconds"]}
            write_line(self.log, row, ("loss", "floor", "optimal"), losses[:3])
        loss, *floor = losses[:2].sum(1).tolist()
        ratio = f", {loss / floor[0]:.2f} of its floor" if any(floor) else ""
        self.bar.set_postfix_str(f"loss {loss:.4g}{ratio}", refresh=False)
        self.bar.update()
        # A signal may reach one process a step before another, but they must stop together.
        stopped = summed(losses.new_tensor(len(self.signals))).item() > 0
        due = step + 1 == self.steps or (step + 1) % self.checkpoint_every == 0
        if self.first and (stopped or due):
            save_state(self.checkpoint, {**self.state, **state_of(tuner)})
        if stopped:
            say(f"\n{step + 1} of {self.steps} steps are in {self.checkpoint}")
            say("go on with the same command and --resume")
            raise KeyboardInterrupt

    def summarize(self, steps: int, final: Tensor, samples: int) -> None:
        """Says and logs the losses on `samples` texts before and after, and their floor."""
        columns = torch.stack([self.state["initial"][0], *final[:3]])
        before, after, floor, _ = columns.sum(1).tolist()
        ratio = after / floor if floor else None
        losses = f"{before:.6g} before, {after:.6g} after, floor {floor:.6g}"
        losses += f", ratio {ratio:.4f}" if floor else ""
        say(f"loss on {samples} training samples: {losses}")
        if self.log and self.first:
            row = {"summary": True, "steps": steps, "ratio": ratio}
            row["seconds"] = self.state["seconds"]
            write_line(self.log, row, ("initial", "final", "floor", "optimal"), columns)

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


def write_line(log: Path, row: dict, names: tuple[str, ...], columns: Tensor) -> None:
    """Appends `row`, sums of `columns` [names, layers] by name, and these by layer."""
    sums = dict(zip(names, columns.sum(1).tolist(), strict=True))
    layers = [dict(zip(names, values, strict=True)) for values in columns.T.tolist()]
    append_line(log, {**row, **sums, "layers": layers})
