"""One thread for the tests and for what they start: tensors here are so small that a second one
only waits, for long where other programs run as well, and rounding differs with their number."""

import json
import os
import random

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, after this

import pytest

from cskv import init_factors
from experiments import evaluate
from support.factors_file import save_factors
from tests.evaluating import write_records
from tests.helpers import save_checkpoint, tiny_model


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """A tiny checkpoint, 24 documents, and the arguments that train on them."""
    folder = tmp_path_factory.mktemp("train")
    save_checkpoint(tiny_model(), folder / "model")
    draw = random.Random(0)
    words = [[f"t{draw.randrange(61)}" for _ in range(draw.randrange(3, 50))] for _ in range(24)]
    lines = [json.dumps({"text": " ".join(w)}) + "\n" for w in words]
    (folder / "text.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A tiny checkpoint, text, factors of rank 4 of 12, and a record of every benchmark's sets."""
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_model()
    save_checkpoint(model, folder / "model")
    (folder / "text.txt").write_text(" ".join(f"t{i * i % 61}" for i in range(400)))
    save_factors(folder / "f", init_factors("svd", model, [4, 4], [4, 4]), model)
    record = {"input": "t7", "context": "t1 t2 t3", "answers": ["t5"], "answer_keywords": "t5"}
    write_records(folder / "data" / "triviaqa_e.jsonl", {**record, "length": 5000})
    write_records(folder / "data" / "factrecall_en_16k.jsonl", record)
    return folder


@pytest.fixture
def brief(monkeypatch):
    """Answers of LongEval in 5 tokens instead of 100, where it is not them that counts."""
    monkeypatch.setattr(evaluate, "ANSWER_TOKENS", {"longeval": 5, "passkey": 5})
