"""LongEval cases: the prompts word for word, the cases, the scoring, the command line."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import longeval
from experiments.tasks import longeval as retrieval
from experiments.tasks.longeval import make_cases, passkey_case
from experiments.tasks.scores import is_correct, read_answer
from support.command import UserError, run_command

ROOT = Path(__file__).parent.parent


def test_prompt_word_for_word():
    """Written out here a second time, from the public repository, so that no edit goes unseen."""
    case = next(make_cases("longeval", 2, 1, seed=7))
    (key_1, number_1), (key_2, number_2) = re.findall(r"^line (\S+): .*<(\d+)>$", case.prompt, re.M)
    asked = re.search(r"in line (\S+)\?", case.prompt)[1]
    assert asked in (key_1, key_2)
    assert case.prompt == (
        "Below is a record of lines I want you to remember. Each line begins with "
        "'line <line index>' and contains a '<REGISTER_CONTENT>' at the end of the line as a "
        "numerical value. For each line index, memorize its corresponding <REGISTER_CONTENT>. At "
        "the end of the record, I will ask you to retrieve the corresponding <REGISTER_CONTENT> of "
        "a certain line index. Now the record start:\n\n"
        f"line {key_1}: REGISTER_CONTENT is <{number_1}>\n"
        f"line {key_2}: REGISTER_CONTENT is <{number_2}>\n"
        "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line "
        f"{asked}? I need the number."
    )
    assert case.text == f"{case.prompt} {case.answer}"


@pytest.mark.parametrize("spelled", [False, True])
def test_records(spelled):
    for case in make_cases("longeval", 100, 20, seed=1, spelled=spelled):
        lines = re.findall(
            r"^line ([a-z]+)-([a-z]+): REGISTER_CONTENT is <(\d+)>$", case.prompt, re.M
        )
        assert len(lines) == len({line[:2] for line in lines}) == 100, "keys must be distinct"
        assert all(1 <= int(number) <= 50_000 for *_, number in lines)
        asked = re.search(r"in line ([a-z]+)-([a-z]+)\?", case.prompt)
        assert [int(n) for *key, n in lines if tuple(key) == asked.groups()] == [case.answer]
        if not spelled:
            assert {a for a, *_ in lines} <= set(retrieval.ADJECTIVES)
            assert {b for _, b, _ in lines} <= set(retrieval.NOUNS)


def test_word_lists():
    for words in (retrieval.ADJECTIVES, retrieval.NOUNS):
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
        ("1,234", 234),
        ("12345\n", 12345),
        ("-5", 5),
        ("3.14", 14),
        ("no idea", None),
        ("", None),
        ("²٣", None),  # digits to Python's \d or isdigit, not to LongEval
    ],
)
def test_scoring(output, number):
    assert read_answer(output) == number
    assert is_correct(output, 12345) == (number == 12345)


def test_a_passkey_is_the_first_number():
    assert read_answer(" 12345. The pass key is 9", first=True) == 12345
    assert is_correct(" 12345. The pass key is 9", 12345, first=True)
    assert read_answer("no idea", first=True) is None


@given(st.text(alphabet=st.characters(exclude_categories=["Nd"])), st.integers(0, 10**9))
def test_scoring_reads_the_number_after_any_words(words, number):
    assert read_answer(f"{words}{number}") == number
    assert read_answer(f"{number}{words}") == number
    assert not is_correct(f"{words}{number}", number + 1)


def test_errors():
    for call in (
        lambda: next(make_cases("chess", 5, 1, seed=0)),
        lambda: next(make_cases("longeval", 0, 1, seed=0)),
        lambda: next(make_cases("longeval", 5000, 1, seed=0)),
        lambda: passkey_case(random.Random(0), -1),
    ):
        with pytest.raises(UserError):
            call()


def test_published_cases(tmp_path):
    """Whole prompts, the space at their ends included, cut where the record ends."""
    prompt = "Below ...\n\nline a-b: REGISTER_CONTENT is <7>\n\nNow the record is over. Tell me? "
    row = {"prompt": prompt, "expected_number": 7, "random_idx": ["a-b", 0], "num_lines": 1}
    file = tmp_path / "200_lines.jsonl"
    file.write_text(f"{json.dumps(row)}\n{json.dumps({**row, 'expected_number': 8})}\n")
    first, second = retrieval.read_cases(tmp_path, 200)
    assert first.prompt == second.prompt == prompt
    assert first.context.endswith("<7>\n") and first.question.startswith("\nNow the record")
    assert (first.answer, second.answer) == (7, 8)


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", "7", "null", "{}", '{"prompt": "", "expected_number": 7}']
    + [json.dumps({"prompt": "\nNow the record is over", "expected_number": n}) for n in (None, "")]
    + [json.dumps({"prompt": 7, "expected_number": 7})],
)
def test_published_files_that_are_none(tmp_path, line):
    (tmp_path / "200_lines.jsonl").write_text(line and f"{line}\n", encoding="utf-16")
    with pytest.raises(UserError, match=r"200_lines\.jsonl, line 1"):
        retrieval.read_cases(tmp_path, 200)
    (tmp_path / "200_lines.jsonl").write_text(line and f"{line}\n")
    with pytest.raises(UserError, match=r"200_lines\.jsonl, line 1"):
        retrieval.read_cases(tmp_path, 200)


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "experiments.longeval", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_command_line(tmp_path):
    out = tmp_path / "cases.jsonl"
    result = command("--lines", "5", "--cases", "3", "--seed", "4", "--out", str(out))
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    cases = list(make_cases("longeval", 5, 3, seed=4))
    assert rows == [{"text": c.text, "prompt": c.prompt, "answer": c.answer} for c in cases]
    assert [file.name for file in tmp_path.iterdir()] == ["cases.jsonl"]


def test_command_line_errors(tmp_path, capsys):
    """One line, exit code 2, no traceback, and nothing half-written."""
    result = command("--lines", "9999", "--out", str(tmp_path / "a"))
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for arguments in (
        ["--lines", "0", "--out", str(tmp_path / "a")],
        ["--cases", "some", "--out", str(tmp_path / "a")],
        ["--out", str(tmp_path / "missing" / "a")],
        ["--lines", "5"],
    ):
        with pytest.raises(SystemExit) as stop:
            run_command(lambda a=arguments: longeval.run(longeval.parse_arguments(a)))
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
