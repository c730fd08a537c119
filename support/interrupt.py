"""Ctrl-C while modules are imported ends a command in one line too. Commands import this first."""

import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Postponed:
    """Within it Ctrl-C sets `asked`, for the work to end at a good place; a second one raises."""

    asked = False

    def __enter__(self) -> "Postponed":
        self.before = signal.signal(signal.SIGINT, self.ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.before)

    def ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def stop(number: int, frame: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


# Not in another program, such as pytest: only where the command itself is one of ours.
started = getattr(sys.modules["__main__"], "__file__", None)
if started:
    folder = Path(started).resolve().parent
    if folder in (ROOT, ROOT / "experiments", ROOT / "course", ROOT / "weights"):
        signal.signal(signal.SIGINT, stop)  # until `run_command`
