"""The measuring command, on tiny models: its numbers against independent ones."""

import json
import math
import re

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models

from cskv import init_factors
from experiments import caches, evaluate
from experiments.caches import Row
from experiments.tasks import longbench, records
from experiments.tasks.longeval import RetrievalCase, make_cases
from experiments.tasks.scores import wilson
from infer import TEACHER
from model import FullCache
from support.factors_file import load_factors, save_factors
from support.huggingface.checkpoint import load_model
from support.huggingface.tokenizer import Tokenizer, load_tokenizer
from support.text import passages
from tests.evaluating import ALL, arguments, measured, write_records
from tests.helpers import call, naive_forward, save_checkpoint, tiny_model

# ------------------------------------------------------------------------------- rows and columns

COLUMNS = {*Row.COLUMNS, "cases", "tokens", "measured_ratio"}
OWN_COLUMNS = {
    "perplexity": {"text", "context", "perplexity", "of_full"},
    "longeval": {"question", "lines", "accuracy", "interval"},
    "passkey": {"question", "lines", "accuracy", "interval"},
    "longbench": {"set", "bucket", "score"},
    "lveval": {"set", "bucket", "score"},
}


@pytest.mark.parametrize("what", OWN_COLUMNS)
def test_every_cache_in_every_command(everything, brief, tmp_path, capsys, what):
    rows = measured(everything, capsys, tmp_path / "rows", what, "--caches", ALL)
    assert list(dict.fromkeys(row["cache"] for row in rows)) == list(caches.CACHES)
    assert all(set(row) == COLUMNS | OWN_COLUMNS[what] for row in rows)
    names = ("cache", "nominal_ratio", "bits", "factors")
    assert {
        ("full", 0, "16", ""),
        ("h2o", 0.5, "16", ""),
        ("asvd", 0.5, "16", "asvd"),
        ("cskv", 0.5, "16", "attention"),
        ("kivi-4", 3 / 4, "4", ""),
    } <= {tuple(row[name] for name in names) for row in rows}


def test_bits_and_inits_make_rows(everything, tmp_path, capsys):
    """The ratio of a file is that of its channels, whatever bits it was made for; bits count in the
    nominal ratio."""
    model = tiny_model()
    factors = init_factors("svd", model, [4, 4], [4, 4]).in_bits(4, 4)
    save_factors(tmp_path / "f", factors, model)
    more = ["--caches", "cskv", "--factors", tmp_path / "f", "--inits", "svd,random"]
    more += ["--bits", "16,4", "--ratios", "0,0.5"]
    rows = measured(everything, capsys, tmp_path / "rows", "perplexity", *more)
    found = [(row["factors"], row["ratio"], row["bits"]) for row in rows]
    made = [(init, ratio) for ratio in (0, 0.5) for init in ("svd", "random")]
    pairs = [("f", pytest.approx(2 / 3)), *made]
    assert found == [(*pair, bits) for pair in pairs for bits in ("16", "4")]
    assert [row["nominal_ratio"] for row in rows[:2]] == pytest.approx([2 / 3, 11 / 12])
    assert rows[6]["perplexity"] != rows[7]["perplexity"]


# ------------------------------------------------------------------------------------- perplexity


def test_passages_are_spread_evenly():
    found = passages(list(range(14)), 3, 4).tolist()
    assert found == [[0, 1, 2, 3], [5, 6, 7, 8], [10, 11, 12, 13]]


def test_perplexity_equals_one_parallel_computation(everything, tmp_path, capsys):
    """Of the full cache, of CSKV with a window of 4 and 2 sinks, and of ASVD of full rank. Batches
    of 2 and 1 count 3 passages, of which 49 tokens go through a cache; and bytes, by hand."""
    model, ids = tiny_model(), [i * i % 61 for i in range(400)]

    def expected(*factors):
        losses = []
        for start in (0, 175, 350):
            sequence = torch.tensor(ids[start : start + 50])
            logits = naive_forward(model, sequence, *factors, prompt=40, sinks=2)
            losses += (-logits.log_softmax(-1)[range(39, 49), sequence[40:]]).tolist()
        return math.exp(sum(losses) / 30)

    more = ["--caches", "full,cskv-plain,asvd,cskv", "--ratios", 0, "--sinks", 2, "--bits", 32]
    more += ["--factors", everything / "f"]
    rows = measured(everything, capsys, tmp_path / "rows", "perplexity", *more)
    assert [row["cases"] for row in rows] == [3] * 4 and {row["tokens"] for row in rows} == {49}
    full, lossy, asvd, _ = (row["perplexity"] for row in rows)
    assert full == pytest.approx(expected(), rel=1e-5)
    assert lossy == pytest.approx(expected(load_factors(everything / "f", model), 4), rel=1e-4)
    assert lossy != pytest.approx(full, rel=2e-2)
    assert asvd == pytest.approx(full, rel=1e-2)  # its latents are in 16 bits
    # Of a layer with d_kv 12, in 32 bits: latents of rank 4; keys and values of window and sinks.
    held = 2 * 4 * 4 * (49 - 2) + 2 * 12 * 4 * (4 + 2)
    removed = pytest.approx(1 - held / (2 * 12 * 2 * 49))
    assert [rows[i]["measured_ratio"] for i in (0, 1, 3)] == [-1, removed, removed]


def test_several_texts_and_contexts(everything, tmp_path, capsys):
    """Rows as of a command for each, one after the other; and a picture."""
    pytest.importorskip("matplotlib")
    text, other = everything / "text.txt", tmp_path / "other.txt"
    other.write_text(" ".join(f"t{i * 7 % 61}" for i in range(400)))
    more = ["perplexity", "--caches", "full,kivi-2"]
    apart = []
    for one, context in ((text, 40), (text, 60), (other, 40), (other, 60)):
        flags = [*more, "--text", one, "--context", context]
        apart += measured(everything, capsys, tmp_path / "one", *flags)
    flags = ["--text", text, other, "--context", "40,60", "--picture", tmp_path / "p.png"]
    assert measured(everything, capsys, tmp_path / "all", *more, *flags) == apart
    assert (tmp_path / "p.png").stat().st_size


# -------------------------------------------------------------------------------------- retrieval


def greedy(model, ids, most):
    """The new tokens of greedy decoding, by a whole forward pass for each."""
    new = []
    for _ in range(most):
        new.append(int(model(torch.tensor([ids + new]))[0, -1].argmax()))
    return new


@pytest.mark.parametrize("question", ["prefill", "decode"])
def test_answers_and_scores_of_both_protocols(everything, tmp_path, capsys, monkeypatch, question):
    """Of the full cache, so that both give what greedy decoding does; two answers of three are
    made to be right. What is prefilled is the prompt, or the context alone."""
    model, limit = tiny_model(), evaluate.ANSWER_TOKENS["longeval"]
    cases = []
    for i, error in enumerate((0, 1, 0)):
        context, asked = " ".join(f"t{(i + 7 * j) % 61}" for j in range(20)), " t7 t9 t3"
        ids = [int(word[1:]) for word in (context + asked).split()]
        cases.append(RetrievalCase(context, asked, greedy(model, ids, limit)[-1] + error))
    monkeypatch.setattr(evaluate, "make_cases", lambda *_, seed: cases)
    prefills, real = [], FullCache.remember
    monkeypatch.setattr(
        FullCache, "remember", lambda *args: prefills.append(args[1].shape[1]) or real(*args)
    )
    more = ["--caches", "full", "--question", question]
    (row,) = measured(everything, capsys, tmp_path / "rows", "longeval", *more)
    assert (row["accuracy"], row["cases"]) == (2 / 3, 3)
    assert row["interval"] == pytest.approx(wilson(2, 3))
    assert row["tokens"] == 23 + limit - 1  # the last new token is not fed back
    assert prefills == [20 if question == "decode" else 23] * 3 * 2  # the layers


def test_both_protocols_read_the_same_tokens():
    """A pair that merges over the seam belongs to the question. A chat template goes around all."""
    vocab = {"a": 0, "b": 1, "c": 2, "bc": 3, "<": 4, ">": 5}
    plain = Tokenizer(Backend(models.BPE(vocab, [("b", "c")])), {}, None)
    chat = Tokenizer(plain.backend, {}, "<{{ messages[0].content }}>")
    case = RetrievalCase("aab", "ca", 0)
    for tokenizer, context, question in ((plain, [0, 0], [3, 0]), (chat, [4, 0, 0], [3, 0, 5])):
        assert evaluate.split_prompt(tokenizer, case, "decode") == (context, question)
        assert evaluate.split_prompt(tokenizer, case, "prefill") == (context + question, [])
    assert evaluate.split_prompt(chat, case, "decode", chat=False) == ([0, 0], [3, 0])
    nothing = RetrievalCase("b", "ca", 0)  # cannot be prefilled
    assert evaluate.split_prompt(plain, nothing, "decode") == ([3], [0])


def test_published_cases_in_the_place_of_ours(everything, brief, tmp_path, capsys):
    """The first of each file, as if the same cases had been drawn."""
    for n in (2, 3):
        cases = make_cases("longeval", n, 3, seed=0)
        rows = [{"prompt": case.prompt, "expected_number": case.answer} for case in cases]
        write_records(tmp_path / f"{n}_lines.jsonl", *rows)
    args = ["longeval", "--caches", "full,kivi-2", "--lines", "2,3", "--question", "prefill,decode"]
    found = []
    for more in (["--data", tmp_path], []):
        found.append(measured(everything, capsys, tmp_path / "rows", *args, *more))
    assert found[0] == found[1] and len(found[0]) == 2 * 2 * 2
    assert evaluate.parse_arguments(["longeval", "--model", "M", "--data", "F"]).lines[-1] == 500


def test_retrieval_command_on_the_teaching_model(tmp_path, capsys):
    """8 cases: right with the full cache, wrong with random factors."""
    model = load_model(TEACHER)
    save_factors(tmp_path / "f", init_factors("random", model, [8] * 4, [4] * 4), model)
    args = ["longeval", "--model", TEACHER, "--lines", 20, "--cases", 8, "--factors"]
    args += [tmp_path / "f", "--question", "prefill,decode", "--json", tmp_path / "r.json"]
    assert call(evaluate, capsys, *args)[0] == 0
    for row in json.loads((tmp_path / "r.json").read_text()):
        if row["cache"] == "full":
            assert row["accuracy"] > 0.8
            assert -0.05 < row["measured_ratio"] <= 0  # at most the room of one answer besides
        else:
            assert row["accuracy"] < 0.3
            assert row["nominal_ratio"] == pytest.approx(1 - 12 / 128)


def test_a_passkey_answer_has_room(everything, tmp_path, capsys):
    """Of all its tokens: a buffer that grows at the last one holds 256 that nothing needs."""
    more = ["--caches", "full", "--cache-dtype", "bfloat16"]
    (row,) = measured(everything, capsys, tmp_path / "rows", "passkey", *more)
    assert -0.02 < row["measured_ratio"] < 0  # the last token of an answer is not fed back


@pytest.fixture
def texts(monkeypatch):
    """All that is tokenized."""
    seen, encode = [], Tokenizer.encode
    monkeypatch.setattr(
        Tokenizer, "encode", lambda *args, **more: seen.append(args[1]) or encode(*args, **more)
    )
    return seen


def test_retrieval_calibrates_on_cases_of_another_seed(
    everything, brief, tmp_path, capsys, monkeypatch, texts
):
    """On the longest ones, with their answers, cut to --seq-len tokens."""
    samples, calibrate = [], evaluate.calibrate_together
    monkeypatch.setattr(
        evaluate, "calibrate_together", lambda *args: samples.extend(args[1]) or calibrate(*args)
    )
    measured(everything, capsys, tmp_path / "r", "longeval", "--lines", "2,9", "--seq-len", 30)
    assert [sample.shape for sample in samples] == [(1, 30)] * 8
    seen = [text for text in texts if re.search(r"need the number\. \d+$", text)]
    assert len(seen) == 8
    assert all(len(re.findall(r"REGISTER_CONTENT is <", text)) == 9 for text in seen)
    assert not set(seen) & {case.text for case in make_cases("longeval", 9, 8, 0)}


def test_vicuna_is_the_template_of_longchat(everything, brief, tmp_path, capsys, texts):
    """The prompt that FastChat makes of the conversation template vicuna_v1.1."""
    more = ["--caches", "full", "--vicuna"]
    measured(everything, capsys, tmp_path / "rows", "longeval", *more)
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions."
    )
    prompt = next(make_cases("longeval", 2, 1, 0)).prompt
    assert texts[0] == f"{system} USER: {prompt} ASSISTANT:"
    texts.clear()
    measured(everything, capsys, tmp_path / "rows", "passkey", *more)
    assert texts[0] == next(make_cases("passkey", 2, 1, 0)).prompt  # a text to continue


# ------------------------------------------------------------------------------------ LongBench-E


def scripted(monkeypatch, *answers):
    """The model reads its prompts, which are returned, but says these answers, cache by cache."""
    prompts, said = [], iter(answers)
    make_prompt = records.prompt_ids

    def prompt_ids(*arguments):
        prompts.append(make_prompt(*arguments))
        return prompts[-1]

    def answer(*arguments):
        return [int(word[1:]) for word in next(said).split()]

    monkeypatch.setattr(evaluate, "prompt_ids", prompt_ids)
    monkeypatch.setattr(evaluate.Question, "answer", answer)
    return prompts


def test_longbench_by_hand(everything, tmp_path, capsys, monkeypatch):
    """Best F1 over the answers: 2 * 2 / (3 + 2), 0, 2 * 1 / (2 + 1); first F1 of 1; two sets."""
    cases = [
        ("hotpotqa_e", "t13 t14", "t1", ["t2"], 3999),  # scores 0
        ("hotpotqa_e", "t15 t16", "t1 t2", ["t2"], 8000),  # 2 / 3
        ("hotpotqa_e", "t11 t12", "t1 t2 t3", ["t9", "t3 t1"], 100),  # 4 / 5
        ("triviaqa_e", "t17 t18", "t4 t5", ["T4, the T5!"], 4000),  # 1
        ("triviaqa_e", "t19 t20", "t6", ["t6 t6 t6"], 7999),  # 1 / 2
    ]
    for name, asked, _, answers, length in cases:
        record = {"input": asked, "context": "t1 {t2}", "answers": answers, "length": length}
        with (tmp_path / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
    answers = [said for _, _, said, *_ in cases for _ in ("full", "streaming")]
    prompts = scripted(monkeypatch, *answers)
    more = ["--caches", "full,streaming", "--data", tmp_path, "--sets", "hotpotqa_e,triviaqa_e"]
    rows = measured(everything, capsys, tmp_path / "rows", "longbench", *more)
    of_full, of_streaming = rows[::2], rows[1::2]
    for own in (of_full, of_streaming):
        found = [(row["set"], row["bucket"], row["cases"], round(row["score"], 2)) for row in own]
        assert found == [
            ("hotpotqa_e", "0-4k", 2, 40.0),
            ("hotpotqa_e", "8k+", 1, 66.67),
            ("hotpotqa_e", "all", 3, 48.89),
            ("triviaqa_e", "4-8k", 2, 75.0),
            ("triviaqa_e", "all", 2, 75.0),
            ("average", "0-4k", 2, 40.0),
            ("average", "4-8k", 2, 75.0),
            ("average", "8k+", 1, 66.67),
            ("average", "all", 5, 61.94),
        ]
    # Lengths and bytes of several sets: every token once. The full cache has room for the answer.
    tokenizer = load_tokenizer(everything / "model")
    for prompt, (name, asked, *_) in zip(prompts, cases, strict=True):
        text = longbench.TASKS[name].prompt({"context": "t1 {t2}", "input": asked})
        assert prompt == tokenizer.encode(text)
    total = sum(len(prompt) for prompt in prompts)
    assert of_full[8]["tokens"] == pytest.approx(total / 5)
    assert of_full[1]["tokens"] == of_full[7]["tokens"] == len(prompts[1])  # 8k+
    assert of_full[8]["measured_ratio"] == pytest.approx(1 - 2 * (total + 5 * 32) / total)


def test_long_prompts_lose_their_middle(everything, tmp_path, capsys, monkeypatch):
    """To what the context of 600 leaves for 32 new tokens and 64 besides."""
    words = " ".join(f"t{i % 50}" for i in range(700))
    record = {"input": "t60", "context": words, "answers": ["t1"], "length": 1}
    write_records(tmp_path / "triviaqa_e.jsonl", record)
    prompts = scripted(monkeypatch, "t1")
    more = ["--caches", "full", "--data", tmp_path]
    measured(everything, capsys, tmp_path / "rows", "longbench", *more)
    ids = load_tokenizer(everything / "model").encode(longbench.TASKS["triviaqa_e"].prompt(record))
    assert prompts == [[*ids[:251], 0, *ids[-251:]]]  # the words at the seam become one


# ---------------------------------------------------------------------------------------- mistakes

EQUAL = ["--caches", "streaming", "--equal"]
GOV_REPORT = ["--sets", "gov_report_e", "--data", "F/long"]
MISTAKES = {
    "a short text": ("perplexity", ["--passages", 9], "400 tokens, 9 passages of 50 need more"),
    "past the context": ("perplexity", ["--context", 595], "605 tokens do not fit into 600"),
    "texts of one name": (
        "perplexity",
        ["--text", "F/a/t.txt", "F/b/t.txt"],
        "two texts for t; give each",
    ),
    "no text": ("perplexity", ["--text", "no.txt"], "no file no.txt"),
    "a ratio twice": ("passkey", ["--ratios", "0.5,0.5"], "0.5 is given twice in '0.5,0.5'"),
    "no size holds it": ("longeval", [*EQUAL, 60, "--ratios", "0.99"], "no cache can hold those"),
    "bytes beyond reach": ("longeval", ["--equal", 601], "--equal 601 exceeds the context of 600"),
    "files of one name": ("longeval", ["--factors", "F/f", "F/copy/f"], "two rows for cskv f"),
    "too long a case": ("longeval", ["--lines", 300], "leaves no room in a context of 600"),
    "unknown set": ("longbench", ["--sets", "qasper"], "no 'qasper' here; choose of hotpotqa_e,"),
    "no calibration": ("longbench", [], "give --calibrate TEXT"),
    "no room": ("longbench", [*GOV_REPORT, "--model", "F/short"], "leaves no room in a context"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(everything, tmp_path, refused, mistake):
    what, more, message = MISTAKES[mistake]
    copies = {"f": "f", "copy/f": "f", "a/t.txt": "text.txt", "b/t.txt": "text.txt"}
    for name, original in copies.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes((everything / original).read_bytes())
    record = {"input": "", "context": "", "answers": ["t1"], "length": 1}
    write_records(tmp_path / "long" / "gov_report_e.jsonl", record)
    save_checkpoint(tiny_model(max_position_embeddings=500), tmp_path / "short")
    args = arguments(everything, what, *more)
    if mistake == "no calibration":
        at = args.index("--calibrate")
        del args[at : at + 2]
    args = [str(word).replace("F/", f"{tmp_path}/") for word in args]
    assert message in refused(evaluate, *args, notes=True)
