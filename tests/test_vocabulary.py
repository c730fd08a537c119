"""A tokenizer that is not the model's: ids beyond the vocabulary, and prompts without a token."""

import re

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import infer
import train
from experiments import evaluate, paper
from tests.evaluating import write_records
from tests.helpers import call, save_checkpoint, tiny_model

# Of a model of 61 tokens: one of 80, in which LongEval's words are the last ones; one that knows a
# single letter and drops all others; one whose word for unknown words is none of its words.
LARGER = {f"t{i}": i for i in range(79)} | {"the": 79}
TOKENIZERS = {
    "larger": (models.WordLevel(LARGER, unk_token="t78"), r"token 7\d is not in the model's 61"),
    "deaf": (models.BPE({"§": 3}, []), ".*token"),
    "broken": (
        models.WordLevel({"t1": 1}, unk_token="?"),
        r"the tokenizer cannot read the text \(",
    ),
}


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    for name, (model, _) in TOKENIZERS.items():
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        save_checkpoint(tiny_model(), folder / name)
        tokenizer.save(str(folder / name / "tokenizer.json"))
    (folder / "inside.txt").write_text("t5 t6 " * 99)
    (folder / "beyond.txt").write_text("t5 t6 " * 60 + "t70" + " t7" * 60)
    record = {"input": "x", "context": "t70", "answers": ["y"], "length": 5, "answer_keywords": "y"}
    for file in ("triviaqa_e", "factrecall_en_16k"):
        write_records(folder / f"{file}.jsonl", record)
    return folder


SIZES = "--context 20 --steps 4 --passages 5 --batch 5"
FEW = "--samples 4 --seq-len 200 --ratios 0.5"
PAPER = f"--out O/o --work O/w {FEW}"
CALIBRATED = f"perplexity --text S/inside.txt --calibrate S/beyond.txt {SIZES} {FEW}"
COMMANDS = {  # every one that turns text into tokens; S is the folder of the setup, O an empty one
    "infer": (infer, "--cache full --prompt t70"),
    "train": (train, "--data S/beyond.txt --out O/f --epochs 0"),
    "perplexity": (evaluate, f"perplexity --caches full --text S/beyond.txt {SIZES}"),
    "calibration": (evaluate, CALIBRATED),
    "longeval": (evaluate, "longeval --caches full --lines 2 --cases 2"),
    "passkey": (evaluate, "passkey --caches full --lines 2 --cases 2"),
    "decode": (evaluate, "longeval --caches full --lines 2 --question decode"),
    "longbench": (evaluate, "longbench --caches full --data S --sets triviaqa_e"),
    "lveval": (evaluate, "lveval --caches full --data S --sets factrecall_en_16k"),
    "table3": (paper, f"table3 --lines 2 --cases 1 {PAPER}"),
    "figure3": (paper, f"figure3 --calibrate S/beyond.txt {PAPER}"),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("model", TOKENIZERS)
def test_text_without_tokens_of_the_model_is_one_line(setup, tmp_path, capsys, model, name):
    if name in ("table3", "figure3"):
        pytest.importorskip("matplotlib")
    module, words = COMMANDS[name]
    words = words.replace("S", str(setup)).replace("O/", f"{tmp_path}/").split()
    code, printed, err = call(module, capsys, *words, "--model", setup / model)
    assert (code, printed) == (2, "") and "Traceback" not in err
    said = TOKENIZERS[model][1]
    assert re.match(f"error: {said}", err.splitlines()[-1])
    assert not (tmp_path / "f").exists()
