"""The paper's experiments as commands, on a tiny model: what they write, and that they resume."""

import json
import sys

import pytest
import torch

import train
from cskv import INITIALIZATIONS, calibrate, init_factors, rank_for
from experiments import paper, tables
from experiments.factors import FactorStore, Recipe
from experiments.measuring import Case
from support.factors_file import save_factors
from support.huggingface.checkpoint import load_model
from support.huggingface.tokenizer import load_tokenizer
from support.text import sample_tokens
from tests.evaluating import torchrun
from tests.helpers import assert_same_factors, call, tiny_model


def flags(everything, what, out, *more):
    common = ["--model", everything / "model", "--out", out, "--work", out / "work"]
    return [what, *common, "--samples", 6, "--seq-len", 40, "--ratios", "0.5,0.75", *more]


def text_flags(everything, what, out, *more):
    text = everything / "text.txt"
    more = ["--text", text, "--calibrate", text, "--context", 40, "--steps", 6, *more]
    return flags(everything, what, out, "--passages", 2, "--batch", 2, *more)


def lines_flags(everything, what, out, *more):
    return flags(everything, what, out, "--lines", "2,3", "--cases", 2, *more)


def factor_store(everything, folder, samples=6, length=40):
    """The factors of a command with the flags of `text_flags`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(everything / "model")
    text = sample_tokens(everything / "text.txt", tokenizer, samples, length, 0)
    return FactorStore(tiny_model(), text, folder)


def read(out, what):
    return json.loads((out / f"{what}.json").read_text())


# ----------------------------------------------------------------------------- what is measured

MEASURED = {"question", "lines", "accuracy", "interval", "cases", "tokens", "measured_ratio"}
MEASURED |= {"seconds", "loss", "floor"}


def asked_for(rows):
    """What the rows of one protocol and length ask for. The plain cache was once named `cskv`."""
    shown = []
    for row in rows:
        if row["question"] == "prefill" and row["lines"] in (2, 200):
            own = {name: value for name, value in row.items() if name not in MEASURED}
            own["cache"] = own["cache"].removesuffix("-plain")
            own["nominal_ratio"] = pytest.approx(own["nominal_ratio"])
            shown.append(own)
    return shown


@pytest.mark.parametrize("what", ["table1", "table2", "table3", "table4", "table5"])
def test_the_rows_of_a_table_are_those_of_the_results(what, tmp_path, capsys, monkeypatch):
    """On the teaching model; without measuring them, and so with the least training."""
    asked = []

    def measure(model, rows, *_):
        asked.extend(rows)
        own = {"accuracy": 1.0, "measured_ratio": 0.5, "lines": 2}
        questions = ("prefill", "decode")
        return [{**row.columns, "question": q, **own} for q in questions for row in rows]

    monkeypatch.setattr(paper, "measure", measure)
    for name in ("pyplot", "scores"):
        monkeypatch.setattr(paper.figures, name, lambda *_, **__: None)
    monkeypatch.setattr(paper, "LINES", [2])
    monkeypatch.setattr(paper, "retrieval_cases", lambda *_, **__: [Case({}, None, 9999)])
    args = ["--out", tmp_path, "--work", tmp_path, "--samples", 2]
    assert call(paper, capsys, what, *args)[0] == 0
    said = read(tmp_path, what)
    published = json.loads((paper.RESULTS / "teacher" / f"{what}.json").read_text())
    published = [{"lines": 200, **row} for row in published if row["factors"] != "budget"]
    assert asked_for(said) == asked_for(published)
    for row, shown in zip(asked, said, strict=False):
        assert row.window == int(shown.get("window", 32))
        if "kept_k" in shown:
            layer = row.factors.layers[0]
            assert abs(64 * shown["kept_k"] - layer.k.rank) <= 0.5
            assert abs(64 * shown["kept_v"] - layer.v.rank) <= 0.5


def test_lengths_of_the_published_files():
    """All four in table 1, the first in the others; our own cases without such files."""
    for what, data, lines in (
        ("table1", ["--data", "F"], [200, 300, 400, 500]),
        ("table3", ["--data", "F"], [200]),
        ("table1", [], [25, 50, 100]),
        ("table3", [], [50]),
        ("table3", ["--data", "F", "--lines", "300"], [300]),
    ):
        assert paper.parse_arguments([what, *data]).lines == lines


# ----------------------------------------------------------------------------- what is written


@pytest.mark.slow
@pytest.mark.parametrize("make", [text_flags, lines_flags])
@pytest.mark.parametrize("what", paper.COMMANDS)
def test_every_command_writes_its_table(everything, brief, tmp_path, capsys, what, make):
    pytest.importorskip("matplotlib")
    if what == "budget":  # of perplexity only
        make = text_flags
    code, out, err = call(paper, capsys, *make(everything, what, tmp_path))
    assert code == 0, err
    rows = read(tmp_path, what)
    markdown = (tmp_path / f"{what}.md").read_text()
    assert markdown.startswith("`python -m experiments.paper") and out.strip() in markdown
    together = 1  # in a line: two protocols, and all lengths of table 1
    if "question" in rows[0]:
        assert {row["question"] for row in rows} == {"prefill", "decode"}
        together = 4 if what == "table1" else 2
    assert len(out.strip().splitlines()) == len(rows) // together + 2
    assert (tmp_path / f"{what}.png").exists() == (what not in ("table2", "table5"))
    assert not list((tmp_path / "work" / "model").glob("*.cases-*"))  # notes are gone when done


def test_protocols_stand_side_by_side():
    """Accuracies stand beside each other, measured ratios are means over the lengths, by hand."""
    rows = []
    for question, lines, accuracy, removed in (
        ("prefill", 25, 0.8, 0.7),
        ("prefill", 50, 0.6, 0.72),
        ("decode", 25, 0.5, 0.7),
        ("decode", 50, 0.4, 0.76),
    ):
        row = {"question": question, "lines": lines, "nominal_ratio": 0.8, "paper": "0.5"}
        rows.append({**row, "cache": "a", "accuracy": accuracy, "measured_ratio": removed})
        rows.append({**row, "cache": "b", "accuracy": 1.0, "measured_ratio": 0.5})
    columns = ["question", "lines", "cache", *paper.SCORES, "paper"]
    title, _, *lines = tables.table(*tables.side_by_side(rows, columns)).splitlines()
    assert title.startswith("| cache | nominal ratio | measured ratio | prefill, 25 / 50 lines | d")
    assert lines == [
        "| a | 80.0% | 72.0% | 0.80 / 0.60 | 0.50 / 0.40 | 0.5 |",
        "| b | 80.0% | 50.0% | 1.00 / 1.00 | 1.00 / 1.00 | 0.5 |",
    ]


def test_losses_and_floors(everything, tmp_path, capsys):
    """The floor is that of an independent computation; nothing lies below it, and training from
    svd comes nearer."""
    pytest.importorskip("matplotlib")
    assert call(paper, capsys, *text_flags(everything, "figure4", tmp_path))[0] == 0
    rows = read(tmp_path, "figure4")
    assert len(rows) == 2 * 2 * len(INITIALIZATIONS)  # ratios, learning rates
    store = factor_store(everything, tmp_path / "again")
    moments = []  # means over tokens
    for layer in calibrate(store.model, store.samples):
        moments += [layer.k_moment, layer.v_moment]
    for row in rows:
        rank = rank_for(row["ratio"], 12)
        floor = sum(torch.linalg.eigvalsh(m)[: 12 - rank].sum() for m in moments)
        assert row["floor"] == pytest.approx(floor.item() / 12, rel=1e-4)
        assert row["final"] >= row["floor"] * (1 - 1e-6)
        if row["init"] == "svd" and row["lr"] == 5e-3:
            assert row["final"] < row["initial"]


def test_training_together_equals_training_alone_and_resumes(everything, tmp_path, monkeypatch):
    """Two recipes in one pass, interrupted after its checkpoint, end where each alone ends."""

    def store(name):
        return factor_store(everything, tmp_path / name, 70, 5)

    recipes = Recipe("svd", 0.5, 0.5, True), Recipe("optimal", 0.75, 0.5, True, 4)
    alone = [store("alone").factors(recipe)[0] for recipe in recipes]
    together, real, steps = store("together"), train.batch_of, []

    def interrupted(*args):
        steps.append(args)
        if len(steps) == 67:  # the checkpoint is that of 64 steps
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train, "batch_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        together.factors(*recipes)
    steps.clear()
    resumed = together.factors(*recipes)
    assert len(steps) == 6
    assert len(together.history(recipes[0])["losses"]) == len(together.samples) == 70
    for one, other in zip(alone, resumed, strict=True):
        assert_same_factors(one, other)
    assert [{pair.bits for pair in factors.pairs} for factors in resumed] == [{16}, {4}]


@pytest.mark.slow
def test_two_processes_make_the_table_of_one(everything, tmp_path, capsys):
    """Training included, which they do together. Sums in another order round differently."""
    pytest.importorskip("matplotlib")
    one, two = (text_flags(everything, "table3", tmp_path / name) for name in ("one", "two"))
    assert call(paper, capsys, *one)[0] == 0
    done = torchrun(sys.executable, "-m", "experiments.paper", *map(str, two))
    assert done.stdout.count("| factors") == 1, done.stderr
    tables = [read(tmp_path / name, "table3") for name in ("one", "two")]
    for one, two in zip(*tables, strict=True):
        assert one["perplexity"] == pytest.approx(two["perplexity"], rel=1e-3)
        assert (one["window"], one["measured_ratio"]) == (two["window"], two["measured_ratio"])
    assert not list(tmp_path.glob("*/work/model/*.cases-*"))


def test_budget_compares_all_at_measured_bytes(everything, tmp_path, capsys):
    """Two texts, two lengths: in each the rows of the results, and one of a file; and perplexity
    over the full cache's."""
    pytest.importorskip("matplotlib")
    model, text = load_model(everything / "model"), everything / "text.txt"
    own = init_factors("svd", model, [3, 5], [4, 6]).in_bits(4, 3)
    save_factors(tmp_path / "f", own, model)
    other = tmp_path / "other.txt"
    other.write_text(" ".join(f"t{i * 7 % 61}" for i in range(400)))
    args = text_flags(everything, "budget", tmp_path, "--text", text, other, "--context", "40,60")
    args += ["--ratios", "0.5,0.8", "--factors", tmp_path / "f"]
    assert call(paper, capsys, *args)[0] == 0
    rows = read(tmp_path, "budget")

    def asked(rows):
        names = ("factors", "bits", "sinks", "ratio")
        return [(r["cache"].removesuffix("-plain"), *(r[name] for name in names)) for r in rows]

    published = json.loads((paper.RESULTS / "smollm2" / "budget.json").read_text())
    known = dict.fromkeys(asked([row for row in published if row["factors"] != "budget"]))
    places = tables.grouped(rows, "text", "context")
    assert list(places) == [("text", 40), ("text", 60), ("other", 40), ("other", 60)]
    for some in places.values():
        assert asked(some) == [*known, ("cskv", "budget", "4/3", 4, pytest.approx(1 - 18 / 48))]
        for row in some:
            assert row["of_full"] == pytest.approx(row["perplexity"] / some[0]["perplexity"])
    assert (tmp_path / "budget.png").stat().st_size
    assert "| of full |" in (tmp_path / "budget.md").read_text()


@pytest.mark.parametrize(
    "words, message",
    [
        (["table2", "--text", "a.txt", "--data", "."], "give --calibrate with it, and no --data"),
        (["table2", "--text", "a.txt"], "give --calibrate with it"),
        (["budget"], "give held-out text with --text"),
        (["all"], "give their folder with --data"),
        (["all", "--data", "."], "no file 200_lines.jsonl"),
        (["table1", "--processes", 2], "torchrun shares out the work"),
    ],
)
def test_a_mistake_is_one_line(refused, words, message):
    assert message in refused(paper, *words)
