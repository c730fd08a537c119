"""Ctrl-C while modules are imported ends a command in one line too. Commands import this first."""

import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def stop(number: int, frame: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


# Not in another program, such as pytest: only where the command itself is one of ours.
started = getattr(sys.modules["__main__"], "__file__", None)
if started:
    folder = Path(started).resolve().parent
    if folder in (ROOT, ROOT / "experiments", ROOT / "course", ROOT / "weights"):
        signal.signal(signal.SIGINT, stop)  # until `run_command`
