"""Ctrl-C while modules are imported ends a command in one line too. Commands import this first."""

import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Postponed:
    """Within it the first of the `signals` sets `asked`, for the work to end at a good place; a
    second one does what it did before."""

    asked = False

    def __init__(self, *signals: int):
        self.signals = signals or (signal.SIGINT,)

    def __enter__(self) -> "Postponed":
        self.before = {number: signal.signal(number, self.ask) for number in self.signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, frame: object) -> None:
        self.asked = True
        signal.signal(number, self.before[number])


def stop(number: int, frame: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


# Not in another program, such as pytest: only where the command itself is one of ours.
started = getattr(sys.modules["__main__"], "__file__", None)
if started:
    folder = Path(started).resolve().parent
    if folder in (ROOT, ROOT / "experiments", ROOT / "course", ROOT / "weights"):
        signal.signal(signal.SIGINT, stop)  # until `run_command`
