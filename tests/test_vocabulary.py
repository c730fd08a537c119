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


SIZES = "--context 20 --steps 4 --passages 5 --batch 5"
FEW = "--samples 4 --seq-len 200 --ratios 0.5"
PAPER = f"--out O/o --work O/w {FEW}"
COMMANDS = {  # every one that turns text into tokens; S is the folder of the setup, O an empty one
    "infer": (infer, ["--cache", "full", "--prompt", "t5 t70"]),
    "train": (train, "--data S/beyond.txt --out O/f --epochs 0"),
    "perplexity": (evaluate, f"perplexity --caches full --text S/beyond.txt {SIZES}"),
    "calibration": (
        evaluate,
        f"perplexity --text S/inside.txt --calibrate S/beyond.txt {SIZES} {FEW}",
    ),
    "longeval": (evaluate, "longeval --caches full --lines 2 --cases 2"),
    "passkey": (evaluate, "passkey --caches full --lines 2 --cases 2"),
    "decode": (evaluate, "longeval --caches full --lines 2 --question decode"),
    "longbench": (evaluate, "longbench --caches full --data S --sets triviaqa_e"),
    "lveval": (evaluate, "lveval --caches full --data S --sets factrecall_en_16k"),
    "table3": (paper, f"table3 --lines 2 --cases 1 {PAPER}"),
    "figure3": (paper, f"figure3 --calibrate S/beyond.txt {PAPER}"),
}


def refusal(setup, model, out, capsys, name):
    """The one line in which the command refuses this model's text."""
    if name in ("table3", "figure3"):
        pytest.importorskip("matplotlib")
    module, words = COMMANDS[name]
    if isinstance(words, str):
        words = [word.replace("S", str(setup)).replace("O/", f"{out}/") for word in words.split()]
    code, printed, err = call(module, capsys, *words, "--model", setup / model)
    assert (code, printed) == (2, "") and "Traceback" not in err
    return err.splitlines()[-1]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_token_beyond_the_vocabulary_is_one_line(setup, tmp_path, capsys, name):
    last = refusal(setup, "larger", tmp_path, capsys, name)
    assert last.startswith("error: token 7") and "is not in the model's 61" in last
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_text_that_yields_no_token_is_one_line(setup, tmp_path, capsys, name):
    last = refusal(setup, "deaf", tmp_path, capsys, name)
    assert last.startswith("error: ") and "token" in last


@pytest.mark.parametrize("name", COMMANDS)
def test_a_tokenizer_that_fails_on_a_text_is_one_line(setup, tmp_path, capsys, name):
    """Its word for unknown words is none of its words."""
    last = refusal(setup, "broken", tmp_path, capsys, name)
    assert last.startswith("error: the tokenizer cannot read the text (")
