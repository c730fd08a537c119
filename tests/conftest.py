"""What tests are given. One thread for them and for what they start: tensors here are so small that
a second one only waits, for long where other programs run as well, and rounding differs with it."""

import os
import random

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, after this

import pytest
import torch

import train
from cskv import init_factors
from experiments import evaluate
from support.factors_file import save_factors
from tests import helpers
from tests.evaluating import write_records

torch.set_grad_enabled(False)


@pytest.fixture(scope="session")
def everything(tmp_path_factory):
    """A tiny checkpoint, factors of rank 4 of 12, a text, 24 documents, and a record of every
    benchmark's sets."""
    folder = tmp_path_factory.mktemp("tiny")
    model = helpers.tiny_model()
    helpers.save_checkpoint(model, folder / "model")
    (folder / "text.txt").write_text(" ".join(f"t{i * i % 61}" for i in range(400)))
    draw = random.Random(0)
    words = [[f"t{draw.randrange(61)}" for _ in range(draw.randrange(3, 50))] for _ in range(24)]
    write_records(folder / "text.jsonl", *[{"text": " ".join(some)} for some in words])
    save_factors(folder / "f", init_factors("svd", model, [4, 4], [4, 4]), model)
    record = {"input": "t7", "context": "t1 t2 t3", "answers": ["t5"], "answer_keywords": "t5"}
    write_records(folder / "data" / "triviaqa_e.jsonl", {**record, "length": 5000})
    write_records(folder / "data" / "factrecall_en_16k.jsonl", record)
    return folder


@pytest.fixture
def brief(monkeypatch):
    """Answers of LongEval in 5 tokens instead of 100, where it is not them that counts."""
    monkeypatch.setattr(evaluate, "ANSWER_TOKENS", {"longeval": 5, "passkey": 5})


@pytest.fixture
def refused(everything, tmp_path, capsys):
    """Runs a command line that must be refused: exit code 2, one line of error behind its `notes`,
    nothing else said, no file changed, and none written but those `left` by design. Returns that
    line."""

    def run(module, *arguments, notes=False, left=()):
        before = helpers.written(everything, tmp_path)
        code, out, err = helpers.call(module, capsys, *arguments)
        *said, error = err.splitlines()
        assert (code, out) == (2, "") and error.startswith("error: "), err
        assert "Traceback" not in err and (notes or not said), err
        after = helpers.written(everything, tmp_path)
        assert {path.name for path in after.keys() - before.keys()} == set(left)
        assert before.items() <= after.items()
        return error

    return run


@pytest.fixture
def trained(everything, tmp_path, capsys):
    """Trains by the command line, which must go well, into a file `out`. Returns what it said."""

    def run(out, *more):
        arguments = helpers.arguments(everything, tmp_path / out, *more)
        code, printed, err = helpers.call(train, capsys, *arguments)
        assert (code, printed) == (0, ""), err
        return err

    return run
