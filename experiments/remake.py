"""Makes files again by the commands that made them, one after the other, from a list like this:

    folder/table.md folder/table.json
        torchrun -m experiments.evaluate ... --json folder/table.json

A block is files, then indented the command for all of them; lines that begin with # are comments.
What was begun with `torchrun` is shared out among processes, what with `python` is not. `{data}`
stands for a folder that the reader names.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from support.command import UserError, make_folder
from support.processes import say


def read_blocks(path: Path) -> list[tuple[list[Path], str]]:
    """The files and the command of each block."""
    blocks: list[tuple[list[Path], str]] = []
    files: list[Path] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            blocks.append((files, line.strip()))
            files = []
        elif not line.startswith("#"):
            files += [Path(name) for name in line.split()]
    return blocks


def words(command: str, data: Path, count: int) -> list[str]:
    """A command as it is started, with `count` processes if it can be shared out."""
    program, *rest = [word.format(data=data) for word in shlex.split(command)]
    if program == "torchrun" and count > 1:
        rest = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--", *rest]
    return [sys.executable, *rest]


def remake(path: Path, data: Path, done: Path, count: int) -> None:
    """Runs the commands of the list at `path` whose files are missing, or that do not stand in the
    file `done`, where they are written down. Ends with a list of all files.

    Raises `UserError` for the first command that fails; the next call goes on with it.
    """
    make_folder(done.parent)
    done.touch()
    blocks = read_blocks(path)
    for n, (files, command) in enumerate(blocks, 1):
        made = all(file.exists() for file in files)
        if made and command in done.read_text(encoding="utf-8").splitlines():
            continue
        for file in files:
            make_folder(file.parent)
        say(f"{n} of {len(blocks)}: {command}")
        environment = dict(os.environ)
        if count > 1:
            environment["OMP_NUM_THREADS"] = "1"
        if subprocess.run(words(command, data, count), env=environment).returncode:
            raise UserError(f"this failed, mend it and start again: {command}")
        missing = [str(file) for file in files if not file.exists()]
        if missing:
            raise UserError(f"{', '.join(missing)} not written by: {command}")
        with done.open("a", encoding="utf-8") as file:
            file.write(f"{command}\n")
    for files, command in blocks:
        print(*files, f"    {command}", sep="\n")
