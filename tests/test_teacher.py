"""The teaching model: its tokenizer, its batches, its export, and resuming after a kill."""

import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from experiments.tasks import longeval
from support.command import UserError
from support.huggingface.checkpoint import load_model
from support.huggingface.tokenizer import load_tokenizer
from tests.helpers import wait_for_lines
from weights import check_teacher, train_teacher
from weights.train_teacher import EOS, LEVELS, Plan, Trainer, build_tokenizer, draw_batch

ROOT = Path(__file__).parent.parent
TEACHER = ROOT / "weights" / "teacher"
TOKENIZER = build_tokenizer()
TINY = Plan(layers=1, hidden=16, mlp=8, tokens=64, warmup=2, levels=3, advance=0.0, final=30)


@pytest.fixture(autouse=True, scope="module")
def gradients():
    """On, whatever other tests have set."""
    with torch.enable_grad():
        yield


@given(st.text())
@example("line amber-acorn: REGISTER_CONTENT is <12345>\n")
@example("  two  spaces\n\n\n, a\ttab, \x00, <0x41>, ▁, Ġ, e\u0301 and é, \U0001f600")
@example("")
@example(EOS)
def test_any_text_survives(text):
    ids = TOKENIZER.encode(text).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("spelled", [False, True])
def test_a_line_has_as_many_tokens_as_with_large_models(spelled):
    """About 23, so that LongEval's lengths are the paper's. Every digit by itself: it is copied."""
    record = train_teacher.draw_record(random.Random(0), 200, spelled)
    tokens = TOKENIZER.encode(longeval.format_record(record)).tokens
    digits = "".join(map(str, record.values()))
    assert 21 * 200 < len(tokens) < 26 * 200
    assert [t for t in tokens if any(c.isdigit() for c in t)] == list(digits)


@pytest.mark.parametrize("lines", [1, 3, 40, 500])
def test_made_up_records(lines):
    """Distinct keys of two words each, with fair numbers. A key has the same tokens in the record
    and in any question: else nothing could be looked up."""
    record = train_teacher.draw_record(random.Random(lines), lines, True)
    assert len(record) == lines
    for key, number in record.items():
        assert all(2 <= len(word) <= 24 for word in key.split("-")) and key.count("-") == 1
        assert 1 <= number <= longeval.LARGEST
    pieces = TOKENIZER.encode(f" {key}").tokens  # of the last one
    wordings = *train_teacher.WORDINGS, longeval.QUESTION, *check_teacher.UNSEEN
    for text in (longeval.LINE.format(key=key, number=number), *wordings):
        tokens = TOKENIZER.encode(text.format(key=key)).tokens
        assert pieces in [tokens[i : i + len(pieces)] for i in range(len(tokens))], (key, tokens)


@pytest.mark.parametrize("level", LEVELS)
def test_loss_is_on_the_answers(level):
    """What has weight is number after number, each ended by the end of text: nothing else."""
    for step in range(3):
        _, batch = draw_batch(0, step, level, TOKENIZER, 512)
        for tokens, weight, answer in zip(batch.tokens, batch.weight, batch.answer, strict=True):
            text = TOKENIZER.decode(tokens.tolist(), skip_special_tokens=False)
            for number in answer[weight > 0].unique():
                asked = tokens[(weight > 0) & (answer == number)]
                part = TOKENIZER.decode(asked.tolist(), skip_special_tokens=False)
                digits = part.removesuffix(EOS).strip()
                assert part.endswith(EOS) and digits.isdecimal()
                assert digits in text.replace(part, "", 1), "not in the record"


def test_questions_come_in_any_words_but_those_kept_for_the_test():
    """The line is named once, as LongEval names it; what stands around it is drawn anew."""
    drawn = {train_teacher.draw_wording(random.Random(i)).format(key="a-b") for i in range(300)}
    unseen = {wording.format(key="a-b") for wording in check_teacher.UNSEEN}
    assert len(drawn) > 250 and not drawn & unseen
    for text in drawn:
        assert re.fullmatch(r"\n([A-Za-z]+ )*?[Ll]ine a-b( [A-Za-z]+)*[?.:]?", text), text


def test_batches_depend_on_seed_and_step_only():
    places = (0, 7), (0, 8), (0, 7), (1, 7)
    drawn = [draw_batch(*place, LEVELS[2], TOKENIZER, 512)[1].tokens.tolist() for place in places]
    first, other_step, again, other_seed = drawn
    assert first == again and other_step != first != other_seed


def test_numbers_count_only_when_whole():
    """One wrong digit makes a number wrong, however many digits are right."""
    row = train_teacher.weigh(TOKENIZER, ["a", " 123", "b", " 45"])
    batch = train_teacher.pack([row, row])
    targets = batch.tokens[:, 1:][batch.weight[:, 1:] > 0]  # [N]: space, digits, end; four times
    logits = torch.nn.functional.one_hot(targets, TOKENIZER.get_vocab_size()).float()
    assert train_teacher.count_right(logits, targets, batch) == (4, 4)
    logits[2] = logits[1]  # the 2 of the first 123
    assert train_teacher.count_right(logits, targets, batch) == (3, 4)


def test_exported_folder_loads(tmp_path):
    """The exported model is the trained one, rounded to 16 bits, in the Hugging Face layout."""
    trainer = Trainer(TINY)
    train_teacher.export(trainer, tmp_path)
    model, tokenizer = load_model(tmp_path), load_tokenizer(tmp_path)
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.half().float()), name
    assert model.config == trainer.model.config
    assert tokenizer.encode("line 12") == TOKENIZER.encode("line 12").ids
    assert model.config.eos_token_ids == (TOKENIZER.token_to_id(EOS),)


def test_resume_after_kill_is_exact(tmp_path):
    """Killed at a random moment and started again, a training ends with the same bits."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code = f"from weights.train_teacher import Path, Plan, train\ntrain({TINY}, "
    code += f"Path({str(killed)!r}), Path({str(killed / 'out')!r}), minutes=0)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    curve = killed / "curve.jsonl"
    steps = random.randint(1, 20)
    wait_for_lines(curve, steps, process)
    process.kill()
    process.wait()
    assert not any((killed / "out").iterdir())
    with pytest.raises(UserError, match="another --seed"):
        Trainer(replace(TINY, seed=1)).load(killed)
    for folder in (whole, killed):
        train_teacher.train(TINY, folder, folder / "out")
    assert curve.read_text().count("\n") == 32  # two levels of one step, then the last
    for name in ("out/model.safetensors", "out/config.json", "out/tokenizer.json", "curve.jsonl"):
        same = (whole / name).read_bytes() == (killed / name).read_bytes()
        assert same, f"{name} differs after a kill at step {steps}"


def test_command_line(monkeypatch):
    """The command in weights/README.md trains by the plan that the shipped weights have."""
    called = []
    monkeypatch.setattr(train_teacher, "train", lambda *values: called.append(values))
    train_teacher.run(train_teacher.parse_arguments(["--work", "w", "--out", "o"]))
    assert called == [(Plan(), Path("w"), Path("o"))]


def test_teacher_answers():
    """A few cases of both tasks with the repository's model; check_teacher.py measures many."""
    model, tokenizer = load_model(TEACHER), load_tokenizer(TEACHER)
    assert tokenizer.backend.to_str() == TOKENIZER.to_str()
    for task, lines, count in (("longeval", 40, 12), ("longeval", 200, 4), ("passkey", 20, 12)):
        cases = list(longeval.make_cases(task, lines, count, seed=5))
        assert check_teacher.count_right(model, tokenizer, cases)[0] >= count - 1
    config = json.loads((TEACHER / "config.json").read_text())
    assert config["num_key_value_heads"] == config["num_attention_heads"]
