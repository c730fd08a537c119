"""LongEval and passkey cases: the prompts word for word, the cases, the scoring, the command."""

import hashlib
import json
import random
import re

import pytest

import experiments.longeval as longeval_command
from experiments.tasks import longeval
from experiments.tasks.longeval import make_cases, passkey_case
from experiments.tasks.scores import is_correct, read_answer
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
    cases of the published tables."""
    cases = make_cases(task, 3, 2, seed=7, spelled=spelled)
    texts = "".join(case.text for case in cases)
    assert hashlib.sha256(texts.encode()).hexdigest().startswith(sha256)


@pytest.mark.parametrize("spelled", [False, True])
def test_records(spelled):
    for case in make_cases("longeval", 100, 20, seed=1, spelled=spelled):
        assert case.text == f"{case.context}{case.question} {case.answer}"
        pattern = r"^line ([a-z]+)-([a-z]+): REGISTER_CONTENT is <(\d+)>$"
        lines = re.findall(pattern, case.prompt, re.M)
        assert len(lines) == len({line[:2] for line in lines}) == 100, "keys must be distinct"
        assert all(1 <= int(number) <= 50_000 for *_, number in lines)
        asked = re.search(r"in line ([a-z]+)-([a-z]+)\?", case.prompt)
        assert [int(n) for *key, n in lines if tuple(key) == asked.groups()] == [case.answer]
        if not spelled:
            assert {a for a, *_ in lines} <= set(longeval.ADJECTIVES)
            assert {b for _, b, _ in lines} <= set(longeval.NOUNS)


def test_word_lists():
    for words in (longeval.ADJECTIVES, longeval.NOUNS):
        assert len(words) == len(set(words))
        assert all(word.isascii() and word.isalpha() and word.islower() for word in words)


def test_every_line_is_asked_for():
    """A question that always fell on the same lines would measure recency, not retrieval."""
    asked = set()
    for case in make_cases("longeval", 5, 200, seed=3):
        keys = re.findall(r"^line (\S+): ", case.prompt, re.M)
        asked.add(keys.index(re.search(r"in line (\S+)\?", case.prompt)[1]))
    assert asked == set(range(5))


@pytest.mark.parametrize("task", ["longeval", "passkey"])
def test_same_seed_same_cases(task):
    cases = list(make_cases(task, 10, 5, seed=0))
    assert cases == list(make_cases(task, 10, 8, seed=0))[:5]
    assert cases != list(make_cases(task, 10, 5, seed=1))


def test_passkey():
    for case in (passkey_case(random.Random(seed), 30) for seed in range(20)):
        assert set(map(int, re.findall(r"\d+", case.prompt))) == {case.answer}
        assert case.prompt.count("The grass is green.") == 30
        assert case.prompt.endswith("What is the pass key? The pass key is")


@pytest.mark.parametrize(
    ("output", "number"),
    [
        (" 12345", 12345),
        ("The number in line 7 is <00042>.", 42),  # the last run of digits, as an integer
        ("1,234\n", 234),
        ("-5", 5),
        ("no idea", None),
        ("²٣", None),  # digits to Python's \d or isdigit, not to LongEval
        ("12345 is " + "0" * 9000, 0),  # where int() of the text itself would raise
    ],
)
def test_scoring(output, number):
    assert read_answer(output) == number
    assert is_correct(output, 12345) == (number == 12345)
    assert read_answer("9" * 5000) == 10**5000 - 1


def test_a_passkey_is_the_first_number():
    assert is_correct(" 12345. The pass key is 9", 12345, first=True)
    assert read_answer("no idea", first=True) is None


@pytest.mark.parametrize("case", [("chess", 5), ("longeval", 0), ("longeval", 5000)])
def test_cases_that_cannot_be(case):
    with pytest.raises(UserError):
        next(make_cases(*case, 1, seed=0))


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


@pytest.mark.parametrize(
    "line",
    [
        "7",
        '{"prompt": "", "expected_number": 7}',
        '{"prompt": 7, "expected_number": 7}',
        '{"prompt": "\\nNow the record is over", "expected_number": null}',
        "{}".encode("utf-16").decode("latin-1"),
    ],
)
def test_published_files_that_are_none(tmp_path, line):
    with pytest.raises(UserError, match=r"no file .*200_lines\.jsonl; LongEval's testcases have"):
        longeval.read_cases(tmp_path, 200)
    (tmp_path / "200_lines.jsonl").write_text(f"{line}\n", encoding="latin-1")
    with pytest.raises(UserError, match=r"200_lines\.jsonl.*; fetch it again"):
        longeval.read_cases(tmp_path, 200)


def test_command_line(tmp_path, capsys):
    out = tmp_path / "cases.jsonl"
    args = ["--lines", 5, "--cases", 3, "--seed", 4, "--out", out]
    assert call(longeval_command, capsys, *args)[0] == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    cases = list(make_cases("longeval", 5, 3, seed=4))
    assert rows == [{"text": c.text, "prompt": c.prompt, "answer": c.answer} for c in cases]
    assert [file.name for file in tmp_path.iterdir()] == ["cases.jsonl"]


@pytest.mark.parametrize("arguments", ["--lines 9999 --out a", "--out no/a", "--lines 5"])
def test_command_line_errors(tmp_path, monkeypatch, capsys, arguments):
    """One line, exit code 2, no traceback, and nothing half-written."""
    monkeypatch.chdir(tmp_path)
    code, _, err = call(longeval_command, capsys, *arguments.split())
    assert code == 2 and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
