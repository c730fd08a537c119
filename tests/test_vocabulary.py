"""A tokenizer that is not the model's: ids beyond the vocabulary, and prompts without a token."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import infer
import train
from experiments import evaluate, paper
from tests.helpers import call, save_checkpoint, tiny_model


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """A model of 61 tokens, with a tokenizer of 80 in which LongEval's words are the last ones, and
    one that knows a single letter and drops all others."""
    folder = tmp_path_factory.mktemp("vocabulary")
    for name in ("larger", "deaf", "broken"):
        save_checkpoint(tiny_model(), folder / name)
    words = {f"t{i}": i for i in range(79)} | {"the": 79}
    larger = Tokenizer(models.WordLevel(words, unk_token="t78"))
    larger.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    larger.save(str(folder / "larger" / "tokenizer.json"))
    Tokenizer(models.BPE({"§": 3}, [])).save(str(folder / "deaf" / "tokenizer.json"))
    broken = Tokenizer(models.WordLevel({"t1": 1}, unk_token="[UNK]"))
    broken.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    broken.save(str(folder / "broken" / "tokenizer.json"))
    inside, beyond = " ".join(["t5 t6"] * 99), " ".join(["t5 t6"] * 60 + ["t70"] + ["t7"] * 60)
    (folder / "inside.txt").write_text(inside)
    (folder / "beyond.txt").write_text(beyond)
    record = {"input": "x", "context": "t70", "answers": ["y"], "length": 5, "answer_keywords": "y"}
    for file in ("triviaqa_e", "factrecall_en_16k"):
        (folder / f"{file}.jsonl").write_text(json.dumps(record) + "\n")
    return folder


def commands(setup, model, out):
    """Every command that turns text into tokens, by name: its module and its arguments."""
    inside, beyond = setup / "inside.txt", setup / "beyond.txt"
    model = ["--model", setup / model]
    sizes = ["--context", 20, "--steps", 4, "--passages", 5, "--batch", 5]
    few = ["--samples", 4, "--seq-len", 200, "--ratios", "0.5"]
    paper_to = ["--out", out / "o", "--work", out / "w", *few]
    full = [*model, "--caches", "full"]
    return {
        "infer": (infer, [*model, "--cache", "full", "--prompt", "t5 t70"]),
        "train": (train, [*model, "--data", beyond, "--out", out / "f", "--epochs", 0]),
        "perplexity": (evaluate, ["perplexity", *full, "--text", beyond, *sizes]),
        "calibration": (
            evaluate,
            ["perplexity", *model, "--text", inside, "--calibrate", beyond, *sizes, *few],
        ),
        "longeval": (evaluate, ["longeval", *full, "--lines", 2, "--cases", 2]),
        "passkey": (evaluate, ["passkey", *full, "--lines", 2, "--cases", 2]),
        "decode": (evaluate, ["longeval", *full, "--lines", 2, "--question", "decode"]),
        "longbench": (evaluate, ["longbench", *full, "--data", setup, "--sets", "triviaqa_e"]),
        "lveval": (evaluate, ["lveval", *full, "--data", setup, "--sets", "factrecall_en_16k"]),
        "table3": (paper, ["table3", *model, "--lines", 2, "--cases", 1, *paper_to]),
        "figure3": (paper, ["figure3", *model, "--calibrate", beyond, *paper_to]),
    }


NAMES = ["infer", "train", "perplexity", "calibration", "longeval", "passkey", "decode"]
NAMES += ["longbench", "lveval", "table3", "figure3"]


def refusal(setup, model, out, capsys, name):
    """The one line in which the command refuses this model's text."""
    if name in ("table3", "figure3"):
        pytest.importorskip("matplotlib")
    module, args = commands(setup, model, out)[name]
    code, printed, err = call(module, capsys, *args)
    assert (code, printed) == (2, "") and "Traceback" not in err
    return err.splitlines()[-1]


@pytest.mark.parametrize("name", NAMES)
def test_a_token_beyond_the_vocabulary_is_one_line(setup, tmp_path, capsys, name):
    last = refusal(setup, "larger", tmp_path, capsys, name)
    assert last.startswith("error: token 7") and "is not in the model's 61" in last
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("name", NAMES)
def test_text_that_yields_no_token_is_one_line(setup, tmp_path, capsys, name):
    last = refusal(setup, "deaf", tmp_path, capsys, name)
    assert last.startswith("error: ") and "token" in last


@pytest.mark.parametrize("name", NAMES)
def test_a_tokenizer_that_fails_on_a_text_is_one_line(setup, tmp_path, capsys, name):
    """Its word for unknown words is none of its words."""
    last = refusal(setup, "broken", tmp_path, capsys, name)
    assert last.startswith("error: the tokenizer cannot read the text (")
