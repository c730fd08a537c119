"""The paper's experiments as commands, on a tiny model: what they write, and that they resume."""

import json
import sys
from itertools import product

import pytest
import torch

import train
from cskv import INITIALIZATIONS, calibrate, init_factors, rank_for
from experiments import evaluate, paper, tables
from experiments.factors import FactorStore, Recipe
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


@pytest.fixture
def rows_of_table(everything, tmp_path, capsys, monkeypatch):
    """A function that gives the rows that a table asks for, without measuring them: cache, factors,
    ranks of keys and values, bits, ratio and the column `paper`; all columns; the rows."""

    def of_table(what, *more):
        asked = []

        def measure(model, rows, cases, notes, plan):
            asked.extend(rows)
            own = {"accuracy": 1.0, "cases": 1, "tokens": 9, "measured_ratio": 0.5, "seconds": 0.0}
            columns = [{"question": q, "lines": 2} for q in ("prefill", "decode")]
            return [{**row.columns, **c, **own} for c in columns for row in rows]

        monkeypatch.setattr(paper, "measure", measure)
        for name in ("pyplot", *(name for name in vars(paper.figures) if "_against_" in name)):
            monkeypatch.setattr(paper.figures, name, lambda *_: None)
        args = lines_flags(everything, what, tmp_path, "--ratios", "0.5,0.8", *more)
        assert call(paper, capsys, *args)[0] == 0
        said, found = read(tmp_path, what), []
        assert len(said) == 2 * len(asked)  # both protocols
        for row, printed in zip(asked, said, strict=False):
            layer = row.factors.layers[0] if row.factors else None
            ranks = (layer.k.rank, layer.v.rank) if layer else None
            ratio = round(row.ratio, 4)
            found.append((row.cache, row.origin, ranks, row.bits, ratio, printed["paper"]))
        return found, said, asked

    return of_table


TRAINED = "asvd, trained"


def test_the_rows_of_table_1(rows_of_table, tmp_path):
    """d_kv is 12: ranks 6 and 2. The paper's numbers are those of its four lengths. A file of a
    budget has its own ranks and bits; its row and three more have 4 sinks."""
    model = tiny_model()
    budget = init_factors("svd", model, [5] * 2, [3] * 2).in_bits(4, 3)
    save_factors(tmp_path / "b.safetensors", budget, model)
    found, said, asked = rows_of_table("table1", "--factors", tmp_path / "b.safetensors")
    assert found == [
        ("full", "", None, "16", 0, "1.00 / 1.00 / 0.98 / 0.98"),
        ("streaming", "", None, "16", 0.5, "0.12 / 0.16 / 0.06 / 0.20"),
        ("h2o", "", None, "16", 0.5, "0.62 / 0.56 / 0.52 / 0.50"),
        ("asvd", "asvd", (6, 6), "16", 0.5, "0.92 / 0.96 / 0.92 / 0.94"),
        ("asvd", "optimal", (6, 6), "16", 0.5, ""),
        ("cskv-plain", TRAINED, (6, 6), "16", 0.5, "0.98 / 0.94 / 0.96 / 0.94"),
        ("cskv-plain", "optimal", (6, 6), "16", 0.5, ""),
        ("streaming", "", None, "16", 0.8, "0.06 / 0.06 / 0.02 / 0.02"),
        ("h2o", "", None, "16", 0.8, "0.18 / 0.24 / 0.26 / 0.10"),
        ("asvd", "asvd", (2, 2), "16", 0.8, "0.26 / 0.12 / 0.06 / 0.04"),
        ("asvd", "optimal", (2, 2), "16", 0.8, ""),
        ("cskv-plain", TRAINED, (2, 2), "16", 0.8, "0.92 / 0.94 / 0.94 / 0.90"),
        ("cskv-plain", "optimal", (2, 2), "16", 0.8, ""),
        ("kivi-4", "", None, "4", 0, ""),
        ("kivi-2", "", None, "2", 0, ""),
        ("streaming", "", None, "16", 0.95, ""),
        ("h2o", "", None, "16", 0.95, ""),
        ("cskv-plain", f"{TRAINED} in 4 bits", (2, 2), "4", 0.95, ""),
        ("cskv-plain", "optimal", (2, 2), "4", 0.95, ""),
        ("cskv-plain", "optimal", (6, 6), "16", 0.5, ""),
        ("cskv-plain", "optimal", (2, 2), "16", 0.8, ""),
        ("kivi-2", "", None, "2", 0, ""),
        ("cskv", "budget", (5, 3), "4/3", 0.6667, ""),
    ]
    assert [row.sinks for row in asked] == [0] * 19 + [4] * 4
    assert [row["sinks"] for row in said] == [row.sinks for row in asked] * 2


def test_the_rows_of_table_3(rows_of_table):
    found, said, asked = rows_of_table("table3", "--inits", "optimal,asvd")
    windows = [1, 2, 4, 8, 16, 32, 64]
    numbers = ["", "0.77", "0.83", "0.85", "0.88", "0.92", "0.93"]
    few = len(found) // 2  # windows of the length of the cases or more are left out
    assert found[:few] == [("cskv-plain", "optimal", (2, 2), "16", 0.8, "")] * few
    assert found[few:] == [("cskv-plain", TRAINED, (2, 2), "16", 0.8, n) for n in numbers[:few]]
    assert [row.window for row in asked] == windows[:few] * 2
    assert [row["window"] for row in said] == windows[:few] * 4


def test_the_rows_of_table_4(rows_of_table):
    """Keys keep the first share, values the second."""
    found, said, _ = rows_of_table("table4", "--inits", "asvd")
    assert found[0] == ("cskv-plain", TRAINED, (10, 2), "16", 0.5, "0.97")
    assert found[1] == ("cskv-plain", TRAINED, (9, 3), "16", 0.5, "0.98")
    assert found[6] == ("cskv-plain", TRAINED, (2, 10), "16", 0.5, "0.80")
    assert found[7] == ("cskv-plain", TRAINED, (5, 1), "16", 0.75, "0.73")
    assert found[13] == ("cskv-plain", TRAINED, (1, 5), "16", 0.75, "0.43")
    assert len(found) == 14
    for row, (_, _, (k, v), *_) in zip(said[:14], found, strict=True):
        assert abs(12 * row["kept_k"] - k) <= 0.5 and abs(12 * row["kept_v"] - v) <= 0.5


def test_the_rows_of_table_5(rows_of_table):
    found, said, _ = rows_of_table("table5", "--inits", "asvd", "--ratios", "0.8")
    expected = [("none", TRAINED, "16", "0.92")]
    for bits in "432":
        four = bits == "4"  # the paper's
        clamped = f"{bits}, clamped zero-point"
        expected.append(("ptq", TRAINED, bits, "0.00" if four else ""))
        expected.append(("qat", f"{TRAINED} in {bits} bits", bits, "0.90" if four else ""))
        expected.append(("ptq", TRAINED, clamped, "0.00" if four else ""))
        if four:
            expected.append(("qat", f"{TRAINED} in 4 bits", clamped, "0.90"))
    assert [row["mode"] for row in said[: len(found)]] == [
        *("none", *(mode for mode, *_ in expected)),
        *("ptq", "ptq", "ptq"),
    ]
    assert found == [
        ("full", "", None, "16", 0, ""),
        *(("cskv-plain", name, (2, 2), bits, 0.8, n) for _, name, bits, n in expected),
        ("cskv-plain", "optimal", (6, 12), "3", 0.25, ""),
        ("kivi-4", "", None, "4", 0, ""),
        ("kivi-2", "", None, "2", 0, ""),
    ]


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
@pytest.mark.parametrize(
    "what, make",
    [*product(paper.COMMANDS, [text_flags]), *product(["table1", "table4"], [lines_flags])],
)
def test_every_command_writes_its_table(everything, tmp_path, capsys, monkeypatch, what, make):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(evaluate, "ANSWER_TOKENS", {"longeval": 5})  # it is not them that counts
    code, out, err = call(paper, capsys, *make(everything, what, tmp_path))
    assert code == 0, err
    rows = read(tmp_path, what)
    markdown = (tmp_path / f"{what}.md").read_text()
    assert markdown.startswith("`python -m experiments.paper") and out.strip() in markdown
    if make is text_flags:
        assert len(out.strip().splitlines()) == len(rows) + 2
    else:  # a line for each cache: two protocols side by side, lengths averaged
        lengths = 2 if what == "table1" else 1
        assert len(out.strip().splitlines()) == len(rows) // (2 * lengths) + 2
    assert (tmp_path / f"{what}.png").exists() == (what not in ("table2", "table5"))
    if what.startswith("table"):
        score = "perplexity" if make is text_flags else "accuracy"
        assert all(row[score] >= 0 and "measured_ratio" in row for row in rows)
        questions = {None} if make is text_flags else {"prefill", "decode"}
        assert {row.get("question") for row in rows} == questions
    assert not list((tmp_path / "work" / "model").glob("*.cases-*"))  # notes are gone when done


def test_protocols_stand_side_by_side():
    """Accuracies stand beside each other, measured ratios are means over the lengths, by hand."""

    def row(question, lines, cache, accuracy, removed):
        score = {"question": question, "lines": lines, "accuracy": accuracy, "paper": "0.5"}
        return {"cache": cache, "nominal_ratio": 0.8, "measured_ratio": removed, **score}

    rows = [row("prefill", 25, "a", 0.8, 0.7), row("prefill", 50, "a", 0.6, 0.72)]
    rows += [row("decode", 25, "a", 0.5, 0.7), row("decode", 50, "a", 0.4, 0.76)]
    rows += [row(q, n, "b", 1.0, 0.5) for q in ("prefill", "decode") for n in (25, 50)]
    columns = ["question", "lines", "cache", *paper.SCORES, "paper"]
    merged, shown = tables.side_by_side(rows, columns)
    scores = ["prefill, 25 / 50 lines", "decode, 25 / 50 lines"]
    names = ["cache", "nominal_ratio", "measured_ratio", *scores, "paper"]
    assert shown == names
    assert [[r[name] for name in names] for r in merged] == [
        ["a", 0.8, pytest.approx(0.72), "0.80 / 0.60", "0.50 / 0.40", "0.5"],
        ["b", 0.8, 0.5, "1.00 / 1.00", "1.00 / 1.00", "0.5"],
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
    """Two texts, two lengths: each cache once in each, and its perplexity over the full cache's."""
    pytest.importorskip("matplotlib")
    model, text = load_model(everything / "model"), everything / "text.txt"
    own = init_factors("svd", model, [3, 5], [4, 6]).in_bits(4, 3)
    save_factors(tmp_path / "f", own, model)
    other = tmp_path / "other.txt"
    other.write_text(" ".join(f"t{i * 7 % 61}" for i in range(400)))
    args = text_flags(everything, "budget", tmp_path, "--text", text, other, "--context", "40,60")
    code, _, err = call(paper, capsys, *args, "--factors", tmp_path / "f")
    assert code == 0, err
    rows = read(tmp_path, "budget")
    assert len(rows) == 4 * 14
    places = [("text", 40), ("text", 60), ("other", 40), ("other", 60)]
    assert list(dict.fromkeys((row["text"], row["context"]) for row in rows)) == places
    for text, context in places:
        some = [row for row in rows if (row["text"], row["context"]) == (text, context)]
        assert [(r["cache"], r["factors"], r["bits"], r["sinks"], r["ratio"]) for r in some] == [
            ("full", "", "16", 0, 0),
            *((name, "", "16", 0, ratio) for name in ("streaming", "h2o") for ratio in (0.5, 0.75)),
            *((f"kivi-{b}", "", b, sinks, 0) for b in "42" for sinks in (0, 4)),
            *(("cskv-plain", "optimal", b, 0, ratio) for b in ("16", "4") for ratio in (0.5, 0.75)),
            ("cskv", "budget", "4/3", 4, pytest.approx(1 - 18 / 48)),
        ]
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
