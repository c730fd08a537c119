"""LongEval and passkey cases: the prompts word for word, the cases, the scoring, the command."""

import hashlib
import json
import random
import re

import pytest

import experiments.longeval as longeval_command
from experiments.tasks import longeval
from experiments.tasks.longeval import make_cases, passkey_case
from experiments.tasks.scores import is_correct
from support.command import UserError
from tests.helpers import call


@pytest.mark.parametrize(
    ("task", "spelled", "sha256"),
    [
        ("longeval", False, "2d724f7a467abd6f"),
        ("longeval", True, "1bd1dd926cd4c0a1"),
        ("passkey", False, "66bfa833479e479f"),
    ],
)
def test_prompts_word_for_word(task, spelled, sha256):
    """As they were compared with the public repository: no edit goes unseen, and a seed gives the
    cases of the published tables, the first ones whatever their number."""
    cases = list(make_cases(task, 3, 4, 7, spelled))
    texts = "".join(case.text for case in cases[:2])
    assert hashlib.sha256(texts.encode()).hexdigest().startswith(sha256)
    assert cases[:2] == list(make_cases(task, 3, 2, 7, spelled))
    assert cases[:2] != list(make_cases(task, 3, 2, 8, spelled))


@pytest.mark.parametrize("spelled", [False, True])
def test_records(spelled):
    """Keys are distinct, and every line is asked for: else recency would be measured."""
    asked_for = set()
    for case in make_cases("longeval", 30, 300, 1, spelled):
        assert case.text == f"{case.context}{case.question} {case.answer}"
        pattern = r"^line ([a-z]+)-([a-z]+): REGISTER_CONTENT is <(\d+)>$"
        lines = re.findall(pattern, case.prompt, re.M)
        keys = [tuple(key) for *key, _ in lines]
        assert len(keys) == len(set(keys)) == 30
        assert all(1 <= int(number) <= 50_000 for *_, number in lines)
        asked = keys.index(re.search(r"in line ([a-z]+)-([a-z]+)\?", case.prompt).groups())
        assert int(lines[asked][-1]) == case.answer
        asked_for.add(asked)
        if not spelled:
            assert {a for a, _ in keys} <= set(longeval.ADJECTIVES)
            assert {b for _, b in keys} <= set(longeval.NOUNS)
    assert asked_for == set(range(30))


def test_passkey():
    for case in (passkey_case(random.Random(seed), 30) for seed in range(20)):
        assert set(map(int, re.findall(r"\d+", case.prompt))) == {case.answer}
        assert case.prompt.count("The grass is green.") == 30
        assert case.prompt.endswith("What is the pass key? The pass key is")


@pytest.mark.parametrize(
    ("output", "last", "first"),
    [
        (" 12345", 12345, 12345),
        ("The number in line 7 is <00042>.", 42, 7),  # runs of digits, as integers
        ("1,234\n", 234, 1),
        ("-5", 5, 5),
        ("no idea", None, None),
        ("²٣", None, None),  # digits to Python's \d or isdigit, not to LongEval
    ],
)
def test_scoring(output, last, first):
    for number in (1, 5, 7, 42, 234, 12345, 2, 3):
        assert is_correct(output, number) == (number == last)
        assert is_correct(output, number, first=True) == (number == first)


def test_published_cases(tmp_path):
    """Whole prompts, the space at their ends included, cut where the record ends, at the last."""
    mark = "\nNow the record is over"
    prompt = f"{mark}!\n\nline a-b: REGISTER_CONTENT is <7>\n{mark}. Tell me? "
    row = {"prompt": prompt, "expected_number": 7, "random_idx": ["a-b", 0], "num_lines": 1}
    file = tmp_path / "200_lines.jsonl"
    file.write_text(f"{json.dumps(row)}\n{json.dumps({**row, 'expected_number': 8})}\n")
    first, second = longeval.read_cases(tmp_path, 200)
    assert first.prompt == second.prompt == prompt
    assert first.context.endswith("<7>\n") and first.question.startswith("\nNow the record")
    assert (first.answer, second.answer) == (7, 8)
    file.write_text('{"prompt": "\\nNow the report is over", "expected_number": 7}')
    for lines, message in ((200, "none of LongEval's; fetch it"), (300, "no file .*300_lines")):
        with pytest.raises(UserError, match=message):
            longeval.read_cases(tmp_path, lines)


def test_command_line(tmp_path, capsys, refused):
    out = tmp_path / "cases.jsonl"
    args = ["--lines", 5, "--cases", 3, "--seed", 4, "--out", out]
    assert call(longeval_command, capsys, *args)[0] == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    cases = list(make_cases("longeval", 5, 3, seed=4))
    assert rows == [{"text": c.text, "prompt": c.prompt, "answer": c.answer} for c in cases]
    assert [file.name for file in tmp_path.iterdir()] == ["cases.jsonl"]
    error = refused(longeval_command, *args, "--lines", 2049)
    assert "2049 lines are more than 2048; choose fewer" in error
