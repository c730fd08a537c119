"""LongBench-E: prompts word for word, records, truncation, scores by hand and by other packages."""

import json
import zipfile
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

from experiments.tables import summarize
from experiments.tasks.longbench import (
    BUCKETS,
    TASKS,
    best_rouge_l,
    select,
)
from experiments.tasks.records import prompt_ids, read_records, truncate_middle
from experiments.tasks.scores import f1, lcs, normalize, rouge_l
from support.command import UserError
from support.huggingface.tokenizer import Tokenizer

quick = settings(max_examples=100, deadline=None, derandomize=True)
RECORD = {
    "input": "Who wrote it?",
    "context": "Passage 1:\nIt was written by {Ada}.",
    "answers": ["Ada Lovelace", "the Countess"],
    "length": 4100,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "0123",
}
HOTPOT = TASKS["hotpotqa_e"]


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


# ------------------------------------------------------------------------------------- prompts


def test_prompts_word_for_word():
    """Written out here a second time, from the public repository, so that no edit goes unseen."""
    prompts = {
        "hotpotqa_e": "Answer the question based on the given passages. Only give me the answer "
        "and do not output any other words.\n\nThe following are given passages.\nC\n\nAnswer the "
        "question based on the given passages. Only give me the answer and do not output any other "
        "words.\n\nQuestion: Q\nAnswer:",
        "multifieldqa_en_e": "Read the following text and answer briefly.\n\nC\n\nNow, answer the "
        "following question based on the above text, only give me the answer and do not output any "
        "other words.\n\nQuestion: Q\nAnswer:",
        "gov_report_e": "You are given a report by a government agency. Write a one-page summary "
        "of the report.\n\nReport:\nC\n\nNow, write a one-page summary of the report.\n\nSummary:",
        "triviaqa_e": "Answer the question based on the given passage. Only give me the answer and "
        "do not output any other words. The following are some examples.\n\nC\n\nQ",
        "qasper_e": "You are given a scientific article and a question. Answer the question as "
        "concisely as you can, using a single phrase or sentence if possible. If the question "
        "cannot be answered based on the information in the article, write "
        '"unanswerable". If the question is a yes/no question, answer "yes", "no", or '
        '"unanswerable". Do not provide any explanation.\n\nArticle: C\n\n Answer the question '
        "based on the above article as concisely as you can, using a single phrase or sentence if "
        "possible. If the question cannot be answered based on the information in the article, "
        'write "unanswerable". If the question is a yes/no question, answer "yes", "no", or '
        '"unanswerable". Do not provide any explanation.\n\nQuestion: Q\n\nAnswer:',
    }
    assert {n: t.prompt({"context": "C", "input": "Q"}) for n, t in TASKS.items()} == prompts
    assert {name: task.max_new_tokens for name, task in TASKS.items()} == {
        "hotpotqa_e": 32,
        "multifieldqa_en_e": 64,
        "gov_report_e": 512,
        "triviaqa_e": 32,
        "qasper_e": 128,
    }
    assert [name for name, task in TASKS.items() if not task.chat] == ["triviaqa_e"]


def test_braces_of_a_record_are_text():
    assert "written by {Ada}." in HOTPOT.prompt(RECORD)
    assert HOTPOT.prompt({"context": "{input}", "input": "?"}).count("{input}") == 1


@quick
@given(st.lists(st.integers()), st.integers(0, 30))
def test_truncation_keeps_the_ends(ids, max_length):
    head, tail = truncate_middle(ids, max_length)
    if len(ids) <= max_length:
        assert (head, tail) == (ids, [])
    else:
        assert len(head) == len(tail) == max_length // 2
        assert ids[: len(head)] == head
        assert ids[len(ids) - len(tail) :] == tail


def tiny_tokenizer() -> Tokenizer:
    """Words as tokens, <s> before every text, and a chat template."""
    words = ["<unk>", "<s>", "[user]", "[assistant]", *map(str, range(10)), "17"]
    backend = Backend(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    template = "{{bos_token}} [user] {{messages[0].content}} [assistant]"
    return Tokenizer(backend, {"bos_token": "<s>"}, template)


@pytest.mark.parametrize(
    ("max_length", "chat", "tokens"),
    [
        (11, False, "<s> 0 1 2 3 4 5 6 7 8 9"),
        (11, True, "<s> [user] 0 1 2 3 4 5 6 7 8 9 [assistant]"),
        # <s> is one of the 11. The halves, "<s> 0 1" and "7 8 9", are joined as text.
        (6, False, "<s> 0 17 8 9"),
        (7, False, "<s> 0 17 8 9"),
        (6, True, "<s> [user] 0 17 8 9 [assistant]"),
    ],
)
def test_prompt_ids(max_length, chat, tokens):
    task, tokenizer = replace(HOTPOT, template="{context} {input}"), tiny_tokenizer()
    record = {"context": "0 1 2 3 4 5 6 7", "input": "8 9"}
    expected = [tokenizer.backend.token_to_id(token) for token in tokens.split()]
    assert prompt_ids(task, record, tokenizer, max_length, chat) == expected


def test_few_shot_prompts_are_not_chat():
    task, tokenizer = replace(TASKS["triviaqa_e"], template="{context}"), tiny_tokenizer()
    assert prompt_ids(task, {"context": "3", "input": ""}, tokenizer, 9) == [1, 7]


# ------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("below", ["", "data"])
def test_read_records(tmp_path, below):
    write(tmp_path / below / "hotpotqa_e.jsonl", [RECORD, "", {**RECORD, "input": ""}])
    assert read_records(HOTPOT, tmp_path) == [RECORD, {**RECORD, "input": ""}]


def test_from_the_hub(tmp_path, monkeypatch):
    archive, asked = tmp_path / "data.zip", []
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("__MACOSX/data/._hotpotqa_e.jsonl", "no record")
        file.writestr("data/hotpotqa.jsonl", "another set")
        file.writestr("data/hotpotqa_e.jsonl", json.dumps(RECORD) + "\n")
        file.writestr("data/qasper_e.jsonl", "\n{}\n")

    def download(repository, name, repo_type):
        asked.append((repository, name, repo_type))
        return str(archive)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert read_records(HOTPOT) == [RECORD]
    assert asked == [("THUDM/LongBench", "data.zip", "dataset")]
    with pytest.raises(UserError, match=r"data\.zip, qasper_e\.jsonl, line 2: no 'input'"):
        read_records(TASKS["qasper_e"])
    with pytest.raises(UserError, match=r"data\.zip has no triviaqa_e\.jsonl"):
        read_records(TASKS["triviaqa_e"])
    whole = archive.read_bytes()
    start = whole.index(b"data/hotpotqa_e.jsonl") + len("data/hotpotqa_e.jsonl")
    for damaged in (whole[:100], whole[:start] + bytes(20) + whole[start + 20 :], b""):
        archive.write_bytes(damaged)
        with pytest.raises(UserError, match=r"data\.zip cannot be read"):
            read_records(HOTPOT)


def test_no_hub(monkeypatch):
    def download(*args, **kwargs):
        raise ConnectionError("no route to host\nand a long story")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(UserError, match=r"\(no route to host\); give a folder that has hotpotqa_e"):
        read_records(HOTPOT)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (json.dumps(RECORD)[:-9], "line 2: not JSON"),
        ("[1, 2]", "line 2: no 'input' of type str"),
        ("[" * 100_000, "line 2: not JSON"),
        ({**RECORD, "context": None}, "line 2: no 'context' of type str"),
        ({**RECORD, "length": "4100"}, "line 2: no 'length' of type int"),
        ({**RECORD, "answers": "Ada"}, "line 2: no 'answers' of type list"),
        ({**RECORD, "answers": []}, "line 2: 'answers'"),
        ({**RECORD, "answers": ["Ada", 1]}, "line 2: 'answers'"),
    ],
)
def test_damaged_records(tmp_path, line, message):
    write(tmp_path / "hotpotqa_e.jsonl", [RECORD, line])
    with pytest.raises(UserError, match=f"hotpotqa_e.jsonl, {message}"):
        read_records(HOTPOT, tmp_path)


def test_records_that_are_not_there(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=r"no file .*hotpotqa_e\.jsonl"):
            read_records(HOTPOT, folder)
    path = tmp_path / "hotpotqa_e.jsonl"
    path.write_text("\n")
    with pytest.raises(UserError, match="has no records"):
        read_records(HOTPOT, tmp_path)
    path.write_bytes(json.dumps(RECORD).encode() + b"\n\xff\xfe\n")
    with pytest.raises(UserError, match="line 2: not JSON"):
        read_records(HOTPOT, tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        read_records(HOTPOT, tmp_path)


def test_select():
    assert [task.name for task in select(["qasper_e", "triviaqa_e"])] == ["qasper_e", "triviaqa_e"]
    assert select(TASKS) == list(TASKS.values())
    with pytest.raises(UserError, match="no set 'hotpotqa'; choose from hotpotqa_e, multif"):
        select(["hotpotqa"])


# ------------------------------------------------------------------------------------ token F1

texts = st.text("ab .,-\nTHE", max_size=30) | st.lists(
    st.sampled_from(["the", "cat", "Cat,", "sat", "an", "a.", "42", "yes-no"]), max_size=8
).map(" ".join)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The  Cat,\tan  owl & a THE-fish.", ["cat", "owl", "thefish"]),
        ("a a theme", ["theme"]),
        ("U.S. 1,000", ["us", "1000"]),
        ("“café”", ["“café”"]),  # ASCII punctuation only
        ("the.", []),
    ],
)
def test_normalize(text, words):
    assert normalize(text) == words


@pytest.mark.parametrize(
    ("output", "answer", "score"),
    [
        ("The cat.", "a CAT", 1),
        ("the cat sat on the mat", "cat", 0.4),  # P = 1/4, R = 1
        ("x x y", "x x x z", 4 / 7),  # P = 2/3, R = 2/4: as often as both have it
        ("dog", "cat", 0),
        ("", "cat", 0),
        ("the", "the", 0),  # nothing is left to compare
    ],
)
def test_f1_by_hand(output, answer, score):
    assert f1(output, answer) == pytest.approx(score)


@quick
@given(texts, texts)
def test_f1_properties(x, y):
    assert 0 <= f1(x, y) <= 1
    assert f1(x, y) == f1(y, x)
    assert f1(x, x) == (1 if normalize(x) else 0)
    assert (f1(x, y) > 0) == bool(set(normalize(x)) & set(normalize(y)))


@quick
@given(texts, st.lists(texts, min_size=1, max_size=3))
def test_f1_equals_squad(output, answers):
    squad = pytest.importorskip("torchmetrics.functional.text").squad
    assume(normalize(output) and all(map(normalize, answers)))  # SQuAD 2 lets nothing equal nothing
    answer = {"answers": {"answer_start": [0] * len(answers), "text": answers}, "id": "1"}
    theirs = squad({"prediction_text": output, "id": "1"}, answer)["f1"].item() / 100
    assert HOTPOT.score(output, {"answers": answers}) == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "output", "score"),
    [
        ("hotpotqa_e", "Countess", 1),  # the best of the answers
        ("qasper_e", "Ada", 2 / 3),
        ("multifieldqa_en_e", "\nAda\nLovelace", 1),
        ("triviaqa_e", "\n\nAda\nLovelace", 2 / 3),  # the first line only
        ("triviaqa_e", " \nAda Lovelace", 0),  # which is a line of one space here
    ],
)
def test_scores_of_the_sets(name, output, score):
    assert TASKS[name].score(output, RECORD) == pytest.approx(score)


# ------------------------------------------------------------------------------------- Rouge-L

words = st.lists(st.sampled_from("abcd"), max_size=9)
prose = st.text("abc .", max_size=40) | st.lists(st.sampled_from("abcdefgh."), min_size=15).map(
    " ".join
)


@quick
@given(words, words)
def test_lcs_is_longest_and_common(x, y):
    @cache
    def longest(i, j):
        if i == len(x) or j == len(y):
            return 0
        if x[i] == y[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    def is_subsequence(part, whole):
        rest = iter(whole)
        return all(word in rest for word in part)

    common = lcs(x, y)
    assert len(common) == longest(0, 0)
    assert is_subsequence(common, x)
    assert is_subsequence(common, y)


def test_lcs_of_several():
    """Rouge-L depends on which one it is, as soon as several are put together."""
    assert lcs(["a", "b"], ["b", "a"]) == ["b"]
    assert lcs(["b", "a"], ["a", "b"]) == ["a"]


@pytest.mark.parametrize(
    ("output", "reference", "score"),
    [
        # Lin's example [3], section 3.2: aligned are 1 2 3 5 of 5, and of 8 distinct ones.
        ("1 2 6 7 8. 1 3 8 9 5", "1 2 3 4 5", 2 * (4 / 8) * (4 / 5) / (4 / 8 + 4 / 5)),
        ("a b c", "a x c", 2 / 3),
        ("c b a", "a b c", 1 / 3),  # in another order only one word is common
        ("c. b. a", "a b c", 1),  # but sentences may come in any
        ("b a. b", "a b", 1 / 2),  # twice b: of a and b, equally good, the first sentence gives b
        ("a a a a", "a b", 2 / 3),  # distinct words: P = 1, R = 1/2
        ("A cat, sat", "a cat sat", 1 / 3),  # neither case nor punctuation is dropped
        ("a. ", "a", 2 / 3),  # the space after the last full stop is a sentence, of one empty word
        ("", "a", 0),
        ("...", "a", 0),
        ("a", "..", 0),
    ],
)
def test_rouge_l_by_hand(output, reference, score):
    assert rouge_l(output, reference) == pytest.approx(score, abs=1e-6)
    assert best_rouge_l(output, {"answers": ["zzz", reference]}) == rouge_l(output, reference)


@quick
@given(st.permutations("abcdef"), st.integers(1, 6), st.permutations("abcdef"), st.integers(1, 6))
def test_rouge_l_of_one_sentence(x, n, y, m):
    """Without repetitions it is the F of the longest common subsequence: 2 L / (n + m)."""
    x, y = x[:n], y[:m]
    expected = 2 * len(lcs(x, y)) / (n + m)
    assert rouge_l(" ".join(x), " ".join(y)) == pytest.approx(expected, abs=1e-6)


@quick
@given(prose, prose)
def test_rouge_l_equals_the_package(output, reference):
    rouge = pytest.importorskip("rouge").Rouge()
    try:
        theirs = rouge.get_scores([output], [reference], avg=True)["rouge-l"]["f"]
    except ValueError:  # no sentence at all: LongBench scores 0
        theirs = 0
    assert rouge_l(output, reference) == pytest.approx(theirs, abs=1e-12)
    assert 0 <= rouge_l(output, reference) <= 1


# -------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("length", "bucket"),
    [(0, "0-4k"), (3999, "0-4k"), (4000, "4-8k"), (7999, "4-8k"), (8000, "8k+"), (99999, "8k+")],
)
def test_buckets(length, bucket):
    assert {task.bucket({"length": length}) for task in TASKS.values()} == {bucket}
    assert bucket in BUCKETS


def test_summarize():
    scores = [("q", "8k+", 0.5), ("p", "0-4k", 1), ("q", "0-4k", 0), ("q", "8k+", 0.25)]
    rows = [{"set": name, "bucket": bucket, "score": score} for name, bucket, score in scores]
    assert [tuple(row.values()) for row in summarize(rows, BUCKETS)] == [
        ("q", "0-4k", 1, 0),
        ("q", "8k+", 2, 37.5),
        ("q", "all", 3, 25),
        ("p", "0-4k", 1, 100),
        ("p", "all", 1, 100),
        ("average", "0-4k", 2, 50),
        ("average", "8k+", 2, 37.5),
        ("average", "all", 4, 62.5),  # of 25 and 100: every set counts the same
    ]
    assert list(summarize(rows, BUCKETS)[0]) == ["set", "bucket", "cases", "score"]
    assert summarize([]) == []
