"""The paper's experiments, one command each, and what they leave open.

    python -m experiments.paper table1        or table2 .. table5, figure3, figure4; see COMMANDS
    python -m experiments.paper table1 --data FOLDER        LongEval's own files, as in the paper
    python -m experiments.paper all --data FOLDER           every file in experiments/results

Without more arguments they run on the embedded teaching model, with LongEval accuracy, in both
protocols of experiments/evaluate.py. With `--text` the measure is perplexity in decode mode:

    python -m experiments.paper table5 --model weights/SmolLM2-135M-Instruct \\
        --text runs/english/heldout.txt --calibrate runs/english/calibration.txt --samples 256

Tables and figures go to `--out`. Factors are trained once, for all commands: all that are missing
share one pass of the frozen model over the samples. They stay in `--work`, with checkpoints, and so
do single cases: a command that was interrupted goes on when it is given again. Two processes share
the cases out: `torchrun --nproc-per-node 2 -m experiments.paper table1`.

The paper's numbers, in the column `paper`, are of LongChat-7B on LongEval with 200 to 500 lines.
"""

import argparse
import json
import shlex
import sys
import time
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from pathlib import Path

import torch

from experiments import figures
from experiments.caches import CACHES, TOKENS, Row, make_row
from experiments.evaluate import perplexity_cases, retrieval_cases
from experiments.factors import FactorStore, Recipe
from experiments.measuring import Case, measure, with_score
from experiments.notes import all_that_counts, delete_notes
from experiments.remake import remake
from experiments.tables import (
    SCORES,
    beside,
    grouped,
    side_by_side,
    table,
    write_json,
    write_markdown,
)
from experiments.tasks.longeval import PUBLISHED, read_cases, samples
from infer import nominal_ratio
from support.calibration import INITIALIZATIONS, rank_for
from support.command import (
    DTYPES,
    Arguments,
    UserError,
    comma_list,
    make_folder,
    number,
    run_command,
)
from support.demonstration import TEACHER
from support.factors_file import load_factors
from support.huggingface.checkpoint import load_model
from support.huggingface.tokenizer import load_tokenizer
from support.options import PROTOCOLS, add_option, add_options
from support.processes import place, processes
from support.text import sample_tokens

PAPER_LR = 5e-5
HELPS = {
    "factors": "files of experiments.budget, for table1 and budget",
    "bits": "of table5",
    "inits": "of factors: random,svd,asvd,optimal,attention",
    "lines": "of LongEval (default: 25,50,100 in table1, else 50; with --data 200,300,400,500 "
    "in table1, else 200)",
    "data": "folder of LongEval's own files, `200_lines.jsonl` and so on, instead of our cases",
}
LINES = [25, 50, 100]  # of the LongEval cases that factors are fitted to, and of table 1


@dataclass
class Experiment:
    """What a table is made of: a model and its factors, cases, and a place for the results."""

    store: FactorStore
    cases: list[Case]
    ratios: list[float]
    inits: list[str]
    bits: list[int]
    dtype: torch.dtype  # of what caches hold
    out: Path  # of the table and the figure, without a suffix
    notes: Path
    arguments: dict  # that must be the same to go on with the notes
    files: list  # of Factors, those of a budget
    began: float = field(default_factory=time.monotonic)

    def plain(self, cache: str, ratio: float = 0.0, sinks: int = 0) -> Row:
        """A cache that needs no factors."""
        return make_row(self.store.model, cache, ratio, dtype=self.dtype, sinks=sinks)

    def cskv(
        self, recipe: Recipe, ratio: float | None = None, window: int = 32, sinks: int = 0, **bits
    ) -> Row:
        """The paper's cache with the recipe's factors; `bits` are those of `Factors.in_bits`."""
        name = recipe.init + (", trained" if recipe.trained else "")
        name += f" in {recipe.bits} bits" if recipe.trained and recipe.bits < 16 else ""
        name += f", lr {recipe.lr:g}" if recipe.lr else ""
        (factors,) = self.store.factors(recipe)
        settings = {"dtype": self.dtype, "origin": name, "window": window, "sinks": sinks}
        ratio = recipe.k_ratio if ratio is None else ratio
        return make_row(self.store.model, "cskv-plain", ratio, factors.in_bits(**bits), **settings)

    def budgets(self) -> list[Row]:
        """The fast cache with ranks and bits of a budget, and 4 sinks: a row for each file."""
        settings, rows = {"origin": "budget", "sinks": 4, "dtype": self.dtype}, []
        for own in self.files:
            ratio = nominal_ratio(self.store.model, own.in_bits(16, 16))  # of channels alone
            rows.append(make_row(self.store.model, "cskv", ratio, own, **settings))
        return rows

    def scores(self, rows: list[Row], more: list[dict], by_lines: bool = False) -> list[dict]:
        """Rows of `measure`, with what `more` has for each: of perplexity, or of LongEval in each
        protocol. `by_lines` keeps the lengths apart; else a row is the average over them, as the
        paper's `Avg. Acc`."""
        cases = self.cases
        if "lines" in cases[0].columns and not by_lines:
            cases = [replace(c, columns={"question": c.columns["question"]}) for c in cases]
        measured = measure(self.store.model, rows, cases, self.notes, self.arguments)
        return [{**row, **more[i % len(rows)]} for i, row in enumerate(with_score(measured))]

    def write(self, rows: list[dict], columns: list[str]) -> None:
        """Prints a table and writes it, as Markdown and as JSON. Of rows of several protocols it is
        `side_by_side`, and the file has all rows as well."""
        if place()[0]:
            return
        merged, shown = side_by_side(rows, columns)
        text, whole = table(merged, shown), table(rows, columns)
        print(text)
        write_json(self.out.with_suffix(".json"), rows)
        given = [
            "FOLDER" if flag == "--data" else word for flag, word in pairwise(["", *sys.argv[1:]])
        ]
        command = f"python -m experiments.paper {shlex.join(given) or self.out.name}"
        tables = [text] + [whole] * (whole != text)
        write_markdown(self.out.with_suffix(".md"), command, tables, self.began)


# ------------------------------------------------------------------------------------- tables


PRUNING = [name for name, kind in CACHES.items() if kind.shrinks == TOKENS]
COLOURS = {name: kind.colour for name, kind in CACHES.items()}
RESULTS = Path(__file__).parent / "results"
NUMBERS = json.loads((RESULTS / "paper.json").read_text())


def paper_number(table: str, **row) -> str:
    """The paper's accuracy in the row of its table that has these values, those of all lengths in
    table 1; "" if it has none."""
    for theirs in NUMBERS[table]:
        if all(theirs[name] == value for name, value in row.items()):
            values = theirs["accuracy"]
            return beside(values if isinstance(values, list) else [values])
    return ""


def table1(e: Experiment) -> None:
    """All methods. `cskv, asvd, trained` is the paper's. What goes beyond it: `optimal`, without
    training; KIVI; the first 4 tokens exact; and a budget's ranks and bits, of `--factors`."""
    recipes = [Recipe(init, r, r, init == "asvd") for r in e.ratios for init in e.inits]
    in_bits = Recipe("asvd", 0.8, 0.8, True, 4)
    e.store.factors(*recipes, *[in_bits] * ("asvd" in e.inits))
    rows = [e.plain("full")]
    for ratio in e.ratios:
        rows += [e.plain(name, ratio) for name in PRUNING]
        for init in e.inits:
            (factors,) = e.store.factors(Recipe(init, ratio, ratio))
            settings = {"origin": init, "dtype": e.dtype}
            rows.append(make_row(e.store.model, "asvd", ratio, factors, **settings))
        rows += [e.cskv(recipe) for recipe in recipes if recipe.k_ratio == ratio]
    rows += [e.plain("kivi-4"), e.plain("kivi-2")]
    # 95%: four bits on top of 80%; of the tokens, a twentieth.
    rows += [e.plain(name, 0.95) for name in PRUNING if 0.95 not in e.ratios]
    if "asvd" in e.inits:
        rows.append(e.cskv(in_bits, 0.95))
    if "optimal" in e.inits:
        rows.append(e.cskv(Recipe("optimal", 0.8, 0.8), 0.95, k_bits=4, v_bits=4))
        rows += [e.cskv(Recipe("optimal", ratio, ratio), sinks=4) for ratio in e.ratios]
    rows += [e.plain("kivi-2", sinks=4), *e.budgets()]
    more = []
    for row in rows:
        theirs = not row.sinks and (row.origin.startswith("asvd") or not row.origin)
        name = row.cache.removesuffix("-plain")
        number = paper_number("table1", cache=name, ratio=row.ratio) if theirs else ""
        more.append({"paper": number})
    result = e.scores(rows, more, by_lines=True)
    own = ["question", "lines", "cache", "factors", "bits", "sinks", "ratio"]
    e.write(result, [*own, *SCORES, "paper"])
    figures.accuracy_against_bytes(result, COLOURS, e.out.with_suffix(".png"))


def trainings(e: Experiment) -> list[Recipe]:
    """Every initialization at every ratio, at the paper's learning rate and at ours."""
    rates = sorted({PAPER_LR, e.store.lr})
    pairs = [(ratio, init) for ratio in e.ratios for init in INITIALIZATIONS]
    return [Recipe(init, ratio, ratio, True, lr=lr) for ratio, init in pairs for lr in rates]


def table2(e: Experiment) -> None:
    """Initializations before and after the paper's training, with their losses and the floor."""
    trained = trainings(e)
    e.store.factors(*trained)
    recipes = [r for t in trained for r in (replace(t, trained=False, lr=None), t)]
    recipes, more = list(dict.fromkeys(recipes)), []
    for r in recipes:
        history = e.store.history(replace(r, trained=True, lr=r.lr or PAPER_LR))
        loss = history["final" if r.trained else "initial"]
        number = paper_number("table2", init=r.init, ratio=r.k_ratio) if r.lr == PAPER_LR else ""
        more.append({"loss": loss, "floor": history["floor"], "paper": number})
    result = e.scores([e.cskv(recipe) for recipe in recipes], more)
    e.write(result, ["question", "ratio", "factors", "loss", "floor", *SCORES, "paper"])


def table3(e: Experiment) -> None:
    """The window, at the highest of the ratios."""
    ratio, longest = max(e.ratios), max(case.length for case in e.cases)
    windows = [1, *(row["window"] for row in NUMBERS["table3"])]
    rows, more = [], []
    for init in e.inits:
        for window in (w for w in windows if w < longest):
            rows.append(e.cskv(Recipe(init, ratio, ratio, init == "asvd"), window=window))
            number = paper_number("table3", window=window) if init == "asvd" else ""
            more.append({"window": window, "paper": number})
    result = e.scores(rows, more)
    e.write(result, ["question", "factors", "window", "ratio", *SCORES, "paper"])
    figures.score_against_window(result, e.out.with_suffix(".png"))


def table4(e: Experiment) -> None:
    """Channels shared between keys and values, as kept shares, half and a quarter of all."""
    recipes, more = [], []
    for init in e.inits:
        for split in NUMBERS["table4"]:
            kept = {name: split[name] for name in ("kept_k", "kept_v")}
            recipes.append(Recipe(init, *(1 - share for share in kept.values()), init == "asvd"))
            more.append({**kept, "paper": paper_number("table4", **kept) * (init == "asvd")})
    e.store.factors(*recipes)
    rows = [e.cskv(r, 1 - (2 - r.k_ratio - r.v_ratio) / 2) for r in recipes]
    result = e.scores(rows, more)
    e.write(result, ["question", "factors", "ratio", "kept_k", "kept_v", *SCORES, "paper"])
    figures.score_against_split(result, e.out.with_suffix(".png"))


def table5(e: Experiment) -> None:
    """Latents in fewer bits, without (ptq) and with (qat) training for it, by two quantizers; and,
    at about the bytes of 80% in 16 bits, half of the key channels with all value channels in 3
    bits, and KIVI. The clamped zero-point is trained for at the largest of the bits, the paper's.
    """
    kinds: list[tuple[str, Recipe, dict]] = []  # mode, factors, bits
    for start in (Recipe(init, r, r, init == "asvd") for init in e.inits for r in e.ratios):
        kinds.append(("none", start, {}))
        for bits in e.bits:
            for clamped in (False, True):
                options = {"k_bits": bits, "v_bits": bits, "clamped": clamped}
                kinds.append(("ptq", start, options))
                if not clamped or bits == max(e.bits):
                    aware = replace(start, trained=True, bits=bits, clamped=clamped)
                    kinds.append(("qat", aware, options))
    e.store.factors(*(recipe for _, recipe, _ in kinds))
    rows, more = [e.plain("full")], [{"mode": "none", "paper": ""}]
    for mode, recipe, options in kinds:
        rows.append(e.cskv(recipe, **options))
        theirs = recipe.init == "asvd" and options.get("k_bits", 4) == 4
        number = paper_number("table5", ratio=recipe.k_ratio, mode=mode) if theirs else ""
        more.append({"mode": mode, "paper": number})
    rows.append(e.cskv(Recipe("optimal", 0.5, 0.0), 0.25, k_bits=3, v_bits=3))
    rows += [e.plain("kivi-4"), e.plain("kivi-2")]
    result = e.scores(rows, more + [{"mode": "ptq", "paper": ""}] * 3)
    own = ["question", "cache", "ratio", "factors", "bits", "mode"]
    e.write(result, [*own, *SCORES, "paper"])


def budget(e: Experiment) -> None:
    """Perplexity at measured bytes, all methods: uniform factors, and with 4 sinks the files that
    experiments/budget.py made; KIVI with and without sinks. Nothing is trained."""
    rows = [e.plain("full")]
    rows += [e.plain(name, ratio) for name in PRUNING for ratio in e.ratios]
    rows += [e.plain(name, sinks=sinks) for name in ("kivi-4", "kivi-2") for sinks in (0, 4)]
    for bits in (16, 4):
        rows += [e.cskv(Recipe("optimal", r, r), k_bits=bits, v_bits=bits) for r in e.ratios]
    rows += e.budgets()
    result = e.scores(rows, [{}] * len(rows))
    for full, *others in grouped(result, "text", "context").values():
        for row in (full, *others):
            row["of_full"] = row["perplexity"] / full["perplexity"]
    own = ["text", "context", "cache", "factors", "bits", "sinks", "ratio"]
    e.write(result, [*own, *SCORES, "of_full"])
    figures.perplexity_against_bytes(result, COLOURS, e.out.with_suffix(".png"))


def figure3(e: Experiment) -> None:
    """Singular values of keys and values, layer by layer."""
    spectra = torch.linalg.eigvalsh(e.store.moments()).clamp(min=0).cpu().flip(-1)
    shares = spectra.cumsum(-1) / spectra.sum(-1, keepdim=True)  # [layers, 2, d_kv]
    rows = []
    for layer, both in enumerate(shares):
        for of, share in zip(("keys", "values"), both, strict=True):
            row = {"layer": layer, "of": of}
            for ratio in (0.5, 0.8):
                kept = share[rank_for(ratio, len(share)) - 1].item()
                row[f"left_out_{ratio:.0%}"] = 1 - kept
            rows.append(row)
    e.write(rows, ["layer", "of", "left_out_50%", "left_out_80%"])
    figures.singular_values(spectra.sqrt(), e.out.with_suffix(".png"))


def figure4(e: Experiment) -> None:
    """Loss curves of the initializations, with the least loss that is possible."""
    e.store.factors(*trainings(e))
    curves = [
        {"ratio": r.k_ratio, "init": r.init, "lr": r.lr, **e.store.history(r)} for r in trainings(e)
    ]
    columns = ["ratio", "init", "lr", "initial", "final", "floor", "seconds", "trained_together"]
    e.write([{name: curve[name] for name in columns} for curve in curves], columns)
    figures.loss_curves(curves, e.out.with_suffix(".png"))


TABLES = (table1, table2, table3, table4, table5, budget)
COMMANDS = {f.__name__: f for f in (*TABLES, figure3, figure4)}


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed. A case that does not fit is refused before
    the training, and not after it."""
    if args.what == "all":
        if args.data is None:
            raise UserError("all needs LongEval's own files; give their folder with --data")
        read_cases(args.data, PUBLISHED[0])  # a wrong folder is known before the work
        remake(RESULTS / "commands.txt", args.data, Path("runs/all"), args.processes)
        return
    for text in args.text:
        if not text.exists():
            raise UserError(f"no file {text}; give held-out text")
    if args.what == "budget" and not args.text:
        raise UserError("budget measures perplexity; give held-out text with --text")
    if args.text and args.data:
        raise UserError("--text asks for perplexity, --data for LongEval; leave one out")
    if args.what not in ("table2", "table5"):
        figures.pyplot()  # if it is missing, that is known before the work and not after
    with processes(args.device) as device:
        model = load_model(args.model, device, DTYPES[args.dtype])
        tokenizer = load_tokenizer(args.model, model.config.vocab_size)
        limit = model.config.context_length
        work = args.work / Path(args.model).name
        for folder in (work, args.out):
            make_folder(folder)
        if args.calibrate:
            drawn = args.samples, min(args.seq_len, limit), args.seed
            texts = sample_tokens(args.calibrate, tokenizer, *drawn)
        elif args.text:
            raise UserError("factors are made from text; give some with --calibrate")
        else:
            drawn = "longeval", LINES, args.samples, args.seed
            texts = samples(tokenizer, limit, *drawn)
        cases = []
        if not args.what.startswith("figure"):
            for text, context in product(args.text, args.context):
                sizes = context, args.steps, args.passages, args.batch
                cases += perplexity_cases(model, tokenizer, text, *sizes)
            if not args.text:
                drawn = args.question, args.lines, args.cases, args.seed, False, args.data
                cases = retrieval_cases(model, tokenizer, "longeval", *drawn)
        training = args.measure_samples, args.epochs, args.lr, args.seed
        store = FactorStore(model, texts, work, *training)
        counts = {**vars(args), "out": None, "work": None, "samples": store.key}
        settings = args.ratios, args.inits, args.bits, DTYPES[args.cache_dtype]
        written = args.out / args.what, work / f"{args.what}.json"
        files = [load_factors(file, model) for file in args.factors]
        counts = all_that_counts(counts, model, args.model)
        experiment = Experiment(store, cases, *settings, *written, counts, files)
        COMMANDS[args.what](experiment)
        if place()[0] == 0:
            delete_notes(experiment.notes)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=[*COMMANDS, "all"])
    number_of = {"type": number(int, 1), "default": 1}
    add_option(parser, "processes", "to share the work of all out among", **number_of)
    out = {"out": Path("runs/paper"), "work": Path("runs/factors")}
    add_options(parser, "model out work", model=TEACHER, **out)
    add_options(parser, "bits inits lines data", HELPS, inits=["asvd", "optimal"], bits=[4, 3, 2])
    add_options(parser, "ratios cache-dtype")
    add_options(parser, "calibrate samples seq-len epochs lr measure-samples seed", samples=1024)
    add_options(parser, "cases question", cases=100, question=PROTOCOLS)
    add_options(parser, "factors steps passages batch device dtype", HELPS, passages=8)
    texts = {"type": Path, "nargs": "+", "default": []}
    add_option(parser, "text", "held-out text, for perplexity; several for budget", **texts)
    lengths = {"type": comma_list(number(int, 1)), "default": [1024]}
    add_option(parser, "context", "tokens prefilled; several for budget", **lengths)
    args = parser.parse_args(argv)
    all_lengths, one = (PUBLISHED, PUBLISHED[:1]) if args.data else (LINES, [50])
    args.lines = args.lines or (all_lengths if args.what == "table1" else one)
    if args.processes > 1 and args.what != "all":
        parser.error(f"--processes is for all; torchrun shares out the work of {args.what}")
    if max(args.bits) > 8:  # others are latents that are not quantized, and in every table
        parser.error("--bits of the paper's experiments are 2, 3, 4 or 8, for table5")
    return args


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
