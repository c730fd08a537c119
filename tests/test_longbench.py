"""LongBench-E and LV-Eval: prompts, truncation, records, scores by hand and by other packages."""

import hashlib
import json
import zipfile
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

from experiments.tasks import longbench, lveval, records
from experiments.tasks.lveval import BLACKLIST
from experiments.tasks.prompts import read_prompt
from experiments.tasks.records import prompt_ids, read_records
from experiments.tasks.scores import f1, normalize, rouge_l
from support.command import UserError
from support.huggingface.tokenizer import Tokenizer
from tests.evaluating import write_records

quick = settings(max_examples=20, deadline=None, derandomize=True)
RECORD = {
    "input": "Who wrote it?",
    "context": "Passage 1:\nIt was written by {Ada}.",
    "answers": ["Ada Lovelace", "the Countess"],
    "answer_keywords": "Ada",
    "length": 4100,
}
TASKS = {**longbench.TASKS, **lveval.TASKS}
HOTPOT = TASKS["hotpotqa_e"]


# ------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("tasks", "sha256"),
    [(longbench.TASKS, "2cb7f0c1acf0d999"), (lveval.TASKS, "883399f76202542f")],
    ids=["longbench", "lveval"],
)
def test_prompts_word_for_word(tasks, sha256):
    """As they were compared with the public repositories: no edit goes unseen."""
    prompts = "".join(read_prompt(name) for name in tasks)
    assert hashlib.sha256(prompts.encode()).hexdigest().startswith(sha256)
    for name, task in tasks.items():
        prompt = task.prompt({"context": "[{C}{input}]", "input": "[{Q}]"})
        asked = name != "gov_report_e"  # a summary has no question
        assert (prompt.count("[{C}{input}]"), prompt.count("[{Q}]")) == (1, asked)


def test_settings_of_the_sets():
    tokens = [task.max_new_tokens for task in TASKS.values()]
    assert tokens == [32, 64, 512, 32, 128, 64, 64, 64, 64, 64, 16]
    assert [name for name, task in TASKS.items() if not task.chat] == ["triviaqa_e"]
    assert {task.repository for task in longbench.TASKS.values()} == {"THUDM/LongBench"}
    assert {task.archive for task in longbench.TASKS.values()} == {"data.zip"}
    for name, task in lveval.TASKS.items():
        assert f"{name}.zip" == task.archive.replace(".zip", "_16k.zip")
        assert ("answer_keywords" in task.fields) == (name != "factrecall_en_16k")
    for task in longbench.TASKS.values():
        buckets = [task.bucket({"length": n}) for n in (0, 3999, 4000, 7999, 8000, 99999)]
        assert buckets == ["0-4k", "0-4k", "4-8k", "4-8k", "8k+", "8k+"]


@pytest.mark.parametrize(
    ("name", "max_length", "chat", "tokens"),
    [
        ("hotpotqa_e", 11, False, "<s> 0 1 2 3 4 5 6 7 8 9"),
        ("hotpotqa_e", 11, True, "<s> [user] 0 1 2 3 4 5 6 7 8 9 [assistant]"),
        # <s> is one of the 11. The halves, "<s> 0 1" and "7 8 9", are joined as text.
        ("hotpotqa_e", 10, False, "<s> 0 1 2 35 6 7 8 9"),
        ("hotpotqa_e", 7, False, "<s> 0 17 8 9"),
        ("hotpotqa_e", 6, True, "<s> [user] 0 17 8 9 [assistant]"),
        ("triviaqa_e", 6, True, "<s> 0 17 8 9"),  # few-shot prompts are not chat
    ],
)
def test_prompt_ids(monkeypatch, name, max_length, chat, tokens):
    """Of a tokenizer with words as tokens, <s> before every text, and a chat template; of prompts
    that are the context and the question alone."""
    monkeypatch.setattr(records, "read_prompt", lambda name: "{context} {input}")
    words = ["<unk>", "<s>", "[user]", "[assistant]", *map(str, range(10)), "17"]
    backend = Backend(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<s>"])
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    template = "{{bos_token}} [user] {{messages[0].content}} [assistant]" if chat else None
    tokenizer = Tokenizer(backend, {"bos_token": "<s>"}, template)
    record = {"context": "0 1 2 3 4 5 6 7", "input": "8 9"}
    expected = [backend.token_to_id(token) or 0 for token in tokens.split()]
    assert prompt_ids(TASKS[name], record, tokenizer, max_length) == expected


# ------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("name", ["hotpotqa_e.jsonl", "data/hotpotqa_e.jsonl"])
def test_read_records(tmp_path, name):
    other = {**RECORD, "input": ""}
    (tmp_path / "data").mkdir()
    (tmp_path / name).write_text(f"{json.dumps(RECORD)}\n\n{json.dumps(other)}")
    assert read_records(HOTPOT, tmp_path) == [RECORD, other]


def test_from_the_hub(tmp_path, monkeypatch):
    task = TASKS["loogle_SD_mixup_16k"]
    path = tmp_path / "loogle_SD_mixup.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(f"__MACOSX/data/._{task.name}.jsonl", "no record")
        file.writestr("data/loogle.jsonl", "another set")
        file.writestr(f"data/{task.name}.jsonl", json.dumps(RECORD))

    def download(*asked, repo_type):
        assert (*asked, repo_type) == ("Infinigence/LVEval", path.name, "dataset")
        if not path.exists():
            raise ConnectionError("no route to host\nand a long story")
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert read_records(task) == [RECORD]
    with pytest.raises(UserError, match=r"give a folder that has triviaqa_e\.jsonl"):
        read_records(replace(task, name="triviaqa_e"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=f"the hub did not give {path.name} of Infinigence/LVEval"):
        read_records(task)
    path.unlink()
    with pytest.raises(UserError, match=r"\(no route to host\); give a folder that has"):
        read_records(task)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\xff\xfe", "hotpotqa_e.jsonl, line 1: not JSON"),
        ("\n" + "[" * 100_000, "line 2: not JSON"),
        ("[1, 2]", "line 1: no 'input' of type str"),
        (json.dumps({**RECORD, "length": "4100"}), "line 1: no 'length' of type int"),
        ("\n", "has no records"),
        (None, "no file .*hotpotqa_e.jsonl"),
    ],
)
def test_damaged_records(tmp_path, text, message):
    write_records(tmp_path / "qasper_e.jsonl", RECORD)
    if text is not None:
        (tmp_path / "hotpotqa_e.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        read_records(HOTPOT, tmp_path)


# -------------------------------------------------------------------------------------- scores

texts = st.lists(
    st.sampled_from(["the", "cat", "Cat,", "sat", "an", "a.", "42", "yes-no", " -\n"]), max_size=8
).map(" ".join)


@pytest.mark.parametrize(
    ("output", "answer", "score"),
    [
        ("The  Cat,\tan  owl & a THE-fish.", "cat owl thefish", 1),
        ("“café”", "café", 0),  # ASCII punctuation only
        ("x x y", "x x x z", 4 / 7),  # P = 2/3, R = 2/4: as often as both have it
        ("", "", 0),
        ("the", "the", 0),  # nothing is left to compare
    ],
)
def test_f1_by_hand(output, answer, score):
    assert f1(output, answer) == f1(answer, output) == pytest.approx(score)


@pytest.mark.slow  # imports torchmetrics
@quick
@given(texts, st.lists(texts, min_size=1, max_size=3))
def test_f1_equals_squad(output, answers):
    squad = pytest.importorskip("torchmetrics.functional.text").squad
    assume(normalize(output) and all(map(normalize, answers)))  # SQuAD 2 lets nothing equal nothing
    answer = {"answers": {"answer_start": [0] * len(answers), "text": answers}, "id": "1"}
    theirs = squad({"prediction_text": output, "id": "1"}, answer)["f1"].item() / 100
    assert HOTPOT.score(output, {"answers": answers}) == pytest.approx(theirs, abs=1e-6)


prose = st.text("abc .", max_size=40) | st.lists(st.sampled_from("abcdefgh."), min_size=15).map(
    " ".join
)


@pytest.mark.parametrize(
    ("output", "reference", "score"),
    [
        # Lin's example [3], section 3.2: aligned are 1 2 3 5 of 5, and of 8 distinct ones.
        ("1 2 6 7 8. 1 3 8 9 5", "1 2 3 4 5", 2 * (4 / 8) * (4 / 5) / (4 / 8 + 4 / 5)),
        ("c b a", "a b c", 1 / 3),  # in another order only one word is common
        ("b a. b", "a b", 1 / 2),  # twice b: of a and b, equally good, the first sentence gives b
        ("a a a a", "a b", 2 / 3),  # distinct words: P = 1, R = 1/2
        ("A cat, sat", "a cat sat", 1 / 3),  # neither case nor punctuation is dropped
        ("a. ", "a", 2 / 3),  # the space after the last full stop is a sentence, of one empty word
        ("...", "a", 0),
    ],
)
def test_rouge_l_by_hand(output, reference, score):
    assert rouge_l(output, reference) == pytest.approx(score, abs=1e-6)


@quick
@given(prose, prose)
def test_rouge_l_equals_the_package(output, reference):
    rouge = pytest.importorskip("rouge").Rouge()
    try:
        theirs = rouge.get_scores([output], [reference], avg=True)["rouge-l"]["f"]
    except ValueError:  # no sentence at all: LongBench scores 0
        theirs = 0
    assert rouge_l(output, reference) == pytest.approx(theirs, abs=1e-12)


def test_blacklist():
    assert len(BLACKLIST) == len(set(BLACKLIST)) == 38
    assert all(normalize(word) == [word] for word in BLACKLIST), "else it could never match"


LONDON = "Ada was born in London"


@pytest.mark.parametrize(
    ("name", "output", "keywords", "score"),
    [
        ("hotpotqa_e", "second", "", 1),  # the best of the answers
        ("qasper_e", "London", "", 1 / 3),
        ("multifieldqa_en_e", "\nsecond\none", "", 2 / 3),
        ("triviaqa_e", "\n\nsecond\none", "", 1),  # the first line only
        ("triviaqa_e", " \nsecond", "", 0),  # which is a line of one space here
        ("gov_report_e", "second one", "", 2 / 3),  # Rouge-L
        ("factrecall_en_16k", "London", "Lisbon", 1 / 3),  # no gate
        ("loogle_SD_mixup_16k", LONDON, "born in London", 1),  # recall 2/3: `in` is blacklisted
        ("loogle_SD_mixup_16k", LONDON, "Lisbon", 0),  # the right words, but not the keyword
        ("loogle_SD_mixup_16k", "Ada was born in Paris", "born in London", 0.8),  # recall 1/3
        ("loogle_SD_mixup_16k", "Ada born", "Ada one two three four", 2 * 2 / 7),  # just enough
        ("loogle_SD_mixup_16k", "Ada born", "Ada one two three four five", 0),
        ("loogle_SD_mixup_16k", "Ada Ada", "Ada Ada one two three four five six", 2 * 1 / 7),
        ("loogle_SD_mixup_16k", "in", "in", 0),  # F1 is 1/3, but a blacklisted word is no keyword
        ("loogle_SD_mixup_16k", "second", "second", 0),  # the second answer is not looked at
        ("loogle_SD_mixup_16k", "London", "...", 1 / 3),  # without keywords there is no gate
    ],
)
def test_scores_of_the_sets(name, output, keywords, score):
    record = {"answers": [LONDON, "second"], "answer_keywords": keywords}
    assert TASKS[name].score(output, record) == pytest.approx(score)
