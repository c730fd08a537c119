"""The measuring commands, on tiny models: their numbers against independent ones."""

import json

import pytest
import torch

import cskv
from experiments import english, evaluate, speed
from experiments.longeval import Case
from infer import TEACHER
from model import UserError, full_cache, load_model, load_tokenizer
from tests.test_infer import call
from tests.tiny import naive_forward, save_checkpoint, tiny_model, tiny_tokens


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_checkpoint(tiny_model(), folder / "model")
    (folder / "text.txt").write_text(" ".join(f"t{i * i % 61}" for i in range(400)))
    return folder


def test_decode_nll_equals_one_parallel_computation():
    model = tiny_model()
    tokens, ranks = tiny_tokens(model, 2, 20), [5, 5]
    factors = cskv.init_factors("svd", model, ranks, ranks)
    cache = cskv.bi_branch_cache(model, factors, 3, 0, 32, 32)
    nll = evaluate.decode_nll(model, tokens, 8, cache)
    assert nll.shape == (2, 12)
    for sequence, ours in zip(tokens, nll, strict=True):
        logits = naive_forward(model, sequence, factors, 3, prompt=8)
        expected = -logits.log_softmax(-1)[range(7, 19), sequence[8:]]
        torch.testing.assert_close(ours.double(), expected, atol=1e-4, rtol=1e-4)


def test_perplexity_command(setup, capsys):
    args = ["perplexity", "--model", setup / "model", "--text", setup / "text.txt"]
    args += ["--calibrate", setup / "text.txt", "--inits", "svd,optimal", "--ratios", "0,0.5"]
    args += [
        "--context",
        20,
        "--steps",
        10,
        "--passages",
        3,
        "--window",
        4,
        "--json",
        setup / "rows.json",
    ]
    code, out, _ = call(evaluate, capsys, *args)
    rows = json.loads((setup / "rows.json").read_text())
    assert code == 0 and len(out.splitlines()) == 2 + len(rows) == 2 + 5
    assert [row["cache"] for row in rows[:3]] == ["full", "cskv, svd", "cskv, optimal"]
    for row in rows[1:3]:  # at ratio 0 nothing is lost but 16-bit rounding
        assert row["perplexity"] == pytest.approx(rows[0]["perplexity"], rel=1e-2)
    assert rows[3]["perplexity"] != pytest.approx(rows[0]["perplexity"], rel=1e-2)
    assert rows[3]["nominal_ratio"] == 0.5
    latents, ring, full = 29 * 2 * 6 * 2, 2 * 4 * 12 * 4, 29 * 2 * 12 * 2
    assert rows[3]["honest_ratio"] == pytest.approx(1 - (latents + ring) / full)


def test_passages_are_spread_evenly():
    found = evaluate.passages(list(range(14)), 3, 4).tolist()
    assert found == [[0, 1, 2, 3], [5, 6, 7, 8], [10, 11, 12, 13]]
    with pytest.raises(UserError, match="has 10 tokens, 3 passages of 4 need more"):
        evaluate.passages(list(range(10)), 3, 4)


def test_wilson_by_hand():
    """46 of 50: (0.92 + 3.8416 / 100 -+ 1.96 sqrt(0.92 * 0.08 / 50 + 3.8416 / 10^4)) / 1.076832."""
    assert evaluate.wilson(46, 50) == pytest.approx((0.8116, 0.9685), abs=1e-4)
    assert evaluate.wilson(50, 50)[0] == pytest.approx(0.9287, abs=1e-4)


@pytest.mark.parametrize("question", ["prefill", "decode"])
def test_both_protocols_agree_on_an_exact_cache(setup, question):
    """With the full cache it cannot matter when the question is read."""
    model, tokenizer = tiny_model(), load_tokenizer(setup / "model")
    case = Case(" ".join(f"t{i}" for i in range(20)), " t7 t9 t3", 0)
    out = evaluate.retrieve(model, tokenizer, case, full_cache(model), question)
    ids = tokenizer.encode(case.prompt)
    for _ in range(evaluate.ANSWER_TOKENS):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert out == tokenizer.decode(ids[23:])


def test_retrieval_command_on_the_teaching_model(tmp_path, capsys):
    """8 cases: right with the full cache, wrong with random factors; bytes by hand."""
    model = load_model(TEACHER)
    cskv.save_factors(tmp_path / "f", cskv.init_factors("random", model, [8] * 4, [4] * 4), model)
    args = ["longeval", "--model", TEACHER, "--lines", 20, "--cases", 8]
    for question in ("prefill", "decode"):
        more = ["--question", question, "--factors", tmp_path / "f", "--json", tmp_path / "r.json"]
        code, out, _ = call(evaluate, capsys, *args, *more)
        full, random = json.loads((tmp_path / "r.json").read_text())
        assert code == 0 and len(out.splitlines()) == 4
        assert full["accuracy"] > 0.8 and random["accuracy"] < 0.3
        # float32: twice the 16-bit cache, and at most the room of one answer besides
        assert -1.1 < full["honest_ratio"] <= -1
        assert random["nominal_ratio"] == pytest.approx(1 - 12 / 128)
    code, out, err = call(evaluate, capsys, *args[:3], "--lines", 300, "--cases", 1)
    assert (code, out) == (2, "") and "leaves no room in a context of 2048" in err


def test_speed_command(setup, capsys):
    args = ["--model", setup / "model", "--lengths", "30,40", "--ratios", "0.5", "--rounds", 2]
    code, out, _ = call(speed, capsys, *args, "--json", setup / "speed.json")
    rows = json.loads((setup / "speed.json").read_text())
    full = [row for row in rows if row["cache"] == "full"]
    assert code == 0 and [row["tokens"] for row in full] == [30, 40]
    assert all(row["prefill_ratio"] == row["decode_ratio"] == 1 for row in full)
    for row, own in ((r, f) for r in rows for f in full if f["tokens"] == r["tokens"]):
        assert row["prefill_ratio"] == pytest.approx(row["prefill_s"] / own["prefill_s"])
        assert row["decode_ratio"] == pytest.approx(row["decode_ms"] / own["decode_ms"])
    assert {"full", "cskv 50%"} <= {row["cache"] for row in rows}
    assert len(out.splitlines()) == 2 + len(rows)


MISTAKES = {
    "a short text": (["--passages", 100], "passages of 1280 need more"),
    "past the context": (["--context", 590, "--steps", 20], "610 tokens do not fit"),
    "unknown init": (["--inits", "svd,best"], "no initialization 'best'"),
    "ratio 1": (["--ratios", "0.5,1"], "'1' is not a number from 0"),
    "nowhere to write": (["--json", "no/such/rows.json"], "no folder no/such"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(setup, tmp_path, capsys, mistake):
    more, message = MISTAKES[mistake]
    if mistake == "a short text":
        save_checkpoint(tiny_model(max_position_embeddings=2000), tmp_path / "model")
        setup = tmp_path
        (setup / "text.txt").write_text("t1 t2 t3")
    args = ["perplexity", "--model", setup / "model", "--text", setup / "text.txt", *more]
    code, out, err = call(evaluate, capsys, *args)
    error = err.splitlines()[-1]
    assert (code, out) == (2, "") and error.startswith("error: ") and message in error


def test_english_is_there_and_the_two_texts_are_apart(tmp_path, capsys):
    english.run(english.argparse.Namespace(out=tmp_path / "english"))
    calibration = (tmp_path / "english" / "calibration.txt").read_text(encoding="utf-8")
    heldout = (tmp_path / "english" / "heldout.txt").read_text(encoding="utf-8")
    assert len(calibration) > 300_000 and len(heldout) > 300_000
    paragraphs = {p for p in calibration.split("\n\n") if len(p) > 100}
    assert not paragraphs & set(heldout.split("\n\n"))
