"""LV-Eval: its sets, and the keyword gate by hand. (Prompts and archives: test_longbench.py.)"""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.tables import summarize
from experiments.tasks.lveval import BLACKLIST, TASKS, gated_f1, keyword_recall
from experiments.tasks.records import read_records
from experiments.tasks.scores import f1, normalize
from support.command import UserError

quick = settings(max_examples=100, deadline=None, derandomize=True)
RECORD = {
    "input": "Where was Ada born?",
    "context": "### Passage 1\nAda was born in London.",
    "answers": ["Ada was born in London", "never scored"],
    "answer_keywords": "born in London",
}
LOOGLE = TASKS["loogle_SD_mixup_16k"]


def test_blacklist():
    assert len(BLACKLIST) == len(set(BLACKLIST)) == 38
    assert all(normalize(word) == [word] for word in BLACKLIST), "else it could never match"


@pytest.mark.parametrize(
    ("output", "keywords", "recall"),
    [
        ("Ada, born in London.", "born in London", 2 / 3),  # `in` counts below the line only
        ("in", "born in London", 0),
        ("London London London", "London London Paris", 2 / 3),
        ("London", "the London", 1),
        ("Paris", "", 1),
    ],
)
def test_keyword_recall(output, keywords, recall):
    assert keyword_recall(output, keywords) == pytest.approx(recall)


@pytest.mark.parametrize(
    ("output", "keywords", "score"),
    [
        ("Ada was born in London", "born in London", 1),
        ("Ada was born in London", "Lisbon", 0),  # the right words, but not the keyword
        ("Ada was born in Paris", "born in London", 0.8),  # recall 1/3 lets it pass
        ("Ada was", "born in London", 0),
        ("Ada born", "Ada one two three four", 2 * 2 / 7),  # recall 1/5 is just enough
        ("Ada born", "Ada one two three four five", 0),
        ("in", "in", 0),  # F1 would be 1/3, but a blacklisted word is no keyword
        ("never scored", "scored", 0),  # the second answer is not looked at
        ("London", "", 1 / 3),  # without keywords there is no gate
        ("London", "...", 1 / 3),
    ],
)
def test_gated_f1_by_hand(output, keywords, score):
    assert LOOGLE.score(output, {**RECORD, "answer_keywords": keywords}) == pytest.approx(score)


def test_factrecall_has_no_gate():
    record = {**RECORD, "answers": ["Ludwig Beethoven"], "answer_keywords": "nothing of the sort"}
    assert TASKS["factrecall_en_16k"].score("Beethoven", record) == pytest.approx(2 / 3)


words = st.lists(st.sampled_from(["in", "The", "was", "cat", "sat", "mat."]), max_size=8)


@quick
@given(words.map(" ".join), words.map(" ".join), words.map(" ".join))
def test_the_gate_only_closes(output, answer, keywords):
    score = gated_f1(output, {"answers": [answer], "answer_keywords": keywords})
    assert score in (0, f1(output, answer))
    content = set(normalize(keywords)) - set(BLACKLIST)
    if normalize(keywords) and not content & set(normalize(output)):
        assert score == 0


def test_the_sets(tmp_path):
    """All but one have keywords, 64 tokens and an archive of their name."""
    record = {name: RECORD[name] for name in ("input", "context", "answers")}
    for name, task in TASKS.items():
        assert task.chat and f"{name}.zip" == task.archive.replace(".zip", "_16k.zip")
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record))
        if name == "factrecall_en_16k":
            assert task.max_new_tokens == 16 and read_records(task, tmp_path) == [record]
            continue
        assert task.max_new_tokens == 64
        with pytest.raises(UserError, match=rf"{name}\.jsonl, line 1: no 'answer_keywords'"):
            read_records(task, tmp_path)


def test_one_column():
    rows = [{"set": LOOGLE.name, "bucket": LOOGLE.bucket(RECORD), "score": s} for s in (0.5, 1)]
    assert [tuple(row.values()) for row in summarize(rows)] == [
        (LOOGLE.name, "all", 2, 75),
        ("average", "all", 2, 75),
    ]
