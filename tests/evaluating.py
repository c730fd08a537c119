"""What the tests of the measuring commands share: a tiny folder of everything, and their flags."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from types import FunctionType, ModuleType

import torch

import infer
from experiments import evaluate, measuring
from experiments.caches import CACHES
from tests.helpers import call

ROOT = Path(__file__).parent.parent
ALL = ",".join(CACHES)


def write_records(path, *records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def arguments(everything, what, *more):
    """A whole command line of small cases."""
    shared = ["--model", everything / "model", "--window", 4, "--ratios", "0.5", "--samples", 8]
    shared += ["--cache-dtype", "float32"]
    text = ["--text", everything / "text.txt", "--passages", 3, "--batch", 2]
    data = ["--calibrate", everything / "text.txt", "--data", everything / "data"]
    own = {
        "perplexity": [*text, *data[:2], "--context", 40, "--steps", 10],
        "longeval": ["--lines", 2, "--cases", 2],
        "passkey": ["--lines", 2, "--cases", 2],
        "longbench": [*data, "--sets", "triviaqa_e"],
        "lveval": [*data, "--sets", "factrecall_en_16k"],
    }
    return [what, *shared, *own[what], *more]


def measured(everything, capsys, path, what, *more):
    """The rows that a command writes to `path`, its table checked for a line each."""
    code, out, err = call(evaluate, capsys, *arguments(everything, what, "--json", path, *more))
    assert code == 0, err
    rows = json.loads(path.read_text())
    assert len(out.splitlines()) == 2 + len(rows)
    return rows


def notes_beside(path):
    return sorted(path.parent.glob(f"{path.name}.*"))


def interrupt_after(monkeypatch, count):
    """The (count + 1)-th cache that a case has been asked of is interrupted as by Ctrl-C. Returns a
    list of all such."""
    asked = []

    def held_bytes(cache):
        asked.append(cache)
        if len(asked) > count:
            raise KeyboardInterrupt
        return infer.held_bytes(cache)

    monkeypatch.setattr(measuring, "held_bytes", held_bytes)
    return asked


def command(everything, *more):
    return [sys.executable, "-m", "experiments.evaluate", *map(str, arguments(everything, *more))]


def torchrun(*args):
    """The command line `args` in two processes."""
    python, *rest = args
    start = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *rest]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(start, cwd=ROOT, env=env, capture_output=True, text=True)


def storages(*things):
    """The bytes of the memory, by its place, of all tensors that can be reached from these, through
    attributes, containers and closures."""
    seen = {}
    found = {}
    todo = list(things)
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, type | ModuleType):
            continue
        seen[id(thing)] = thing  # kept alive, so that no other object gets its id
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, FunctionType):
            todo.append(thing.__closure__)  # and not all of its module
        else:
            todo += gc.get_referents(thing)
    return found
