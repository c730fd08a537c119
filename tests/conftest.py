"""One thread for the tests and for what they start: tensors here are so small that a second one
only waits, for long where other programs run as well, and rounding differs with their number."""

import json
import os
import random

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, after this

import pytest

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
