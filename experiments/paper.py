"""The paper's experiments, one command each, and what they leave open.

    python -m experiments.paper table1        or table2 .. table5, figure3, figure4; see COMMANDS
    python -m experiments.paper table1 --data FOLDER        LongEval's own files, as in the paper
    python -m experiments.paper all --data FOLDER           every file in experiments/results

Without more arguments they run on the embedded teaching model, with LongEval accuracy, in both
protocols of experiments/evaluate.py; with `--text` the measure is perplexity in decode mode.
Tables and figures go to `--out`; factors, which are trained once for all commands, and single cases
to `--work`. The column `paper` has the paper's numbers: LongChat-7B with 200 to 500 lines.
"""

import support.interrupt  # isort: skip # noqa: F401

import argparse
import json
import shlex
import sys
import time
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import torch

from cskv import INITIALIZATIONS, Factors, rank_for
from experiments import figures
from experiments.caches import Row, make_row
from experiments.evaluate import PROTOCOLS, perplexity_cases, retrieval_cases
from experiments.factors import FactorStore, Recipe
from experiments.measuring import Case, measure
from experiments.notes import all_that_counts, delete_notes, own_notes
from experiments.remake import remake
from experiments.tables import SCORES, beside, compare_with_full, side_by_side, table, write_json
from experiments.tasks.longeval import PUBLISHED, read_cases, samples
from infer import TEACHER
from support.command import (
    DTYPES,
    Arguments,
    UserError,
    check_files,
    comma_list,
    make_folder,
    number,
    replacing,
    run_command,
)
from support.factors_file import load_factors
from support.huggingface.checkpoint import load_model
from support.huggingface.tokenizer import load_tokenizer
from support.processes import place, processes
from support.text import sample_tokens

PAPER_LR = 5e-5
LINES = [25, 50, 100]  # of the LongEval cases that factors are fitted to, and of table 1


@dataclass
class Experiment:
    """What a table is made of. Its rows are pairs here, of a `Row` and further columns."""

    store: FactorStore
    cases: list[Case]
    ratios: list[float]
    inits: list[str]
    files: list[Factors]  # those of a budget
    out: Path  # of the table and the figure, without a suffix
    notes: Path
    plan: dict  # that must be the same to go on with the notes
    began: float = field(default_factory=time.monotonic)

    def row(self, cache: str, ratio: float | None = None, **settings) -> Row:
        """A cache that holds 16-bit numbers."""
        return make_row(self.store.model, cache, ratio, dtype=torch.bfloat16, **settings)

    def cskv(
        self, recipe: Recipe, ratio: float | None = None, window: int = 32, sinks: int = 0, **bits
    ) -> Row:
        """The paper's cache with the recipe's factors; `bits` are those of `Factors.in_bits`."""
        name = recipe.init
        if recipe.trained:
            name += ", trained"
        if recipe.bits < 16:
            name += f" in {recipe.bits} bits"
        if recipe.lr:
            name += f", lr {recipe.lr:g}"
        (factors,) = self.store.factors(recipe)
        ratio = recipe.k_ratio if ratio is None else ratio
        settings = {"origin": name, "window": window, "sinks": sinks}
        return self.row("cskv-plain", ratio, factors=factors.in_bits(**bits), **settings)

    def budgets(self) -> list[Row]:
        """The fast cache with ranks and bits of a budget, and 4 sinks: a row for each file."""
        rows = []
        for factors in self.files:
            cache = "cskv-window-8" if factors.info.get("window_bits") == "8" else "cskv"
            layers = max([group.count for group in factors.together], default=1)
            origin = "budget" if layers == 1 else f"budget, {layers} layers together"
            rows.append(self.row(cache, factors=factors, origin=origin, sinks=4))
        return rows

    def scores(self, rows: list[tuple[Row, dict]], by_lines: bool = False) -> list[dict]:
        """Rows of `measure` with their further columns. `by_lines` keeps LongEval's lengths apart;
        else a row is the average over them, as the paper's `Avg. Acc`."""
        cases = self.cases
        if "lines" in cases[0].columns and not by_lines:
            cases = [replace(c, columns={"question": c.columns["question"]}) for c in cases]
        caches = [row for row, _ in rows]
        measured = measure(self.store.model, caches, cases, self.notes, self.plan)
        return [{**row, **rows[i % len(rows)][1]} for i, row in enumerate(measured)]

    def write(self, rows: list[dict], columns: list[str]) -> None:
        """Prints a table, and writes it as JSON and as Markdown, with its command above, and when
        and on what it was made below. Protocols stand side by side; all rows follow."""
        if place()[0] > 0:
            return
        given = list(sys.argv[1:]) or [self.out.name]
        if "--data" in given:
            given[given.index("--data") + 1] = "FOLDER"
        command = f"`python -m experiments.paper {shlex.join(given)}`"
        minutes = (time.monotonic() - self.began) / 60
        made = f"{time.strftime('%Y-%m-%d')}, PyTorch {torch.__version__}, "
        made += (
            f"{torch.get_num_threads()} threads, {minutes:.1f} minutes since it was started last"
        )
        parts = [command, table(rows, columns), made]
        if "question" in rows[0]:
            merged, shown = side_by_side(rows, columns)
            parts = [command, table(merged, shown), made, table(rows, columns)]
        print(parts[1])
        write_json(self.out.with_suffix(".json"), rows)
        with replacing(self.out.with_suffix(".md")) as temporary:
            temporary.write_text("\n\n".join(parts) + "\n")

    @property
    def picture(self) -> Path:
        return self.out.with_suffix(".png")


# ------------------------------------------------------------------------------------- tables


PRUNING = ("streaming", "h2o")
RESULTS = Path(__file__).parent / "results"
NUMBERS = json.loads((RESULTS / "paper.json").read_text())


def paper_number(table: str, origin: str = "", **row) -> str:
    """The paper's accuracy in the row of its table that has these values, those of all lengths in
    table 1; "" if it has none, as for factors that are not of asvd's `origin`."""
    for theirs in NUMBERS[table]:
        if row.items() <= theirs.items() and (not origin or origin.startswith("asvd")):
            values = theirs["accuracy"]
            return beside(values if isinstance(values, list) else [values])
    return ""


def uniform(init: str, ratio: float, **more) -> Recipe:
    """The same for keys and values; asvd is trained, as in the paper."""
    return Recipe(init, ratio, ratio, **{"trained": init == "asvd", **more})


def table1(e: Experiment) -> None:
    """All methods. `cskv, asvd, trained` is the paper's; `optimal`, without training, KIVI, sinks
    and budgets go beyond it."""
    recipes = [uniform(init, ratio) for ratio in e.ratios for init in e.inits]
    in_bits = uniform("asvd", 0.8, bits=4)
    if "asvd" in e.inits:
        e.store.factors(*recipes, in_bits)
    rows = [e.row("full")]
    for ratio in e.ratios:
        rows += [e.row(name, ratio) for name in PRUNING]
        for init in e.inits:
            (factors,) = e.store.factors(uniform(init, ratio, trained=False))
            rows.append(e.row("asvd", ratio, factors=factors, origin=init))
        rows += [e.cskv(recipe) for recipe in recipes if recipe.k_ratio == ratio]
    rows += [e.row("kivi-4"), e.row("kivi-2")]
    # 95%: four bits on top of 80%; of the tokens, a twentieth.
    rows += [e.row(name, 0.95) for name in PRUNING]
    if "asvd" in e.inits:
        rows.append(e.cskv(in_bits, 0.95))
    if "optimal" in e.inits:
        rows.append(e.cskv(uniform("optimal", 0.8), 0.95, k_bits=4, v_bits=4))
        rows += [e.cskv(uniform("optimal", ratio), sinks=4) for ratio in e.ratios]
    rows += [e.row("kivi-2", sinks=4), *e.budgets()]
    with_paper = []
    for row in rows:
        name = row.cache.removesuffix("-plain")
        number = paper_number("table1", row.origin, cache=name, ratio=row.ratio)
        with_paper.append((row, {"paper": number}))
    result = e.scores(with_paper, by_lines=True)
    columns = ["question", "lines", "cache", "factors", "bits", "sinks", "ratio"]
    e.write(result, [*columns, *SCORES, "paper"])
    figures.scores(result, e.picture, "measured_ratio", "measured ratio")


def trainings(e: Experiment) -> list[Recipe]:
    """Every initialization at every ratio, at the paper's learning rate and at ours; trained."""
    rates = sorted({PAPER_LR, e.store.lr})
    choices = product(e.ratios, INITIALIZATIONS, rates)
    recipes = [uniform(init, ratio, trained=True, lr=lr) for ratio, init, lr in choices]
    e.store.factors(*recipes)
    return recipes


def table2(e: Experiment) -> None:
    """Initializations before and after the paper's training, with their losses and the floor."""
    rows = []
    for r in trainings(e):
        history = e.store.history(r)
        columns = {"loss": history["final"], "floor": history["floor"], "paper": ""}
        if r.lr == PAPER_LR:
            before = replace(r, trained=False, lr=None)
            rows.append((e.cskv(before), {**columns, "loss": history["initial"]}))
            columns["paper"] = paper_number("table2", init=r.init, ratio=r.k_ratio)
        rows.append((e.cskv(r), columns))
    e.write(e.scores(rows), ["question", "ratio", "factors", "loss", "floor", *SCORES, "paper"])


def table3(e: Experiment) -> None:
    """The window, at the highest of the ratios."""
    longest = max(case.length for case in e.cases)
    windows = [1, *(row["window"] for row in NUMBERS["table3"])]
    rows = []
    for init, window in product(e.inits, windows):
        if window < longest:
            row = e.cskv(uniform(init, max(e.ratios)), window=window)
            number = paper_number("table3", init, window=window)
            rows.append((row, {"window": window, "paper": number}))
    result = e.scores(rows)
    e.write(result, ["question", "factors", "window", "ratio", *SCORES, "paper"])
    figures.scores(result, e.picture, "window", "window, tokens", log_x=True)


def table4(e: Experiment) -> None:
    """Channels shared between keys and values, as kept shares, half and a quarter of all."""
    recipes = {}
    for init, theirs in product(e.inits, NUMBERS["table4"]):
        kept = {"kept_k": theirs["kept_k"], "kept_v": theirs["kept_v"]}
        recipe = Recipe(init, 1 - kept["kept_k"], 1 - kept["kept_v"], init == "asvd")
        recipes[recipe] = {**kept, "paper": paper_number("table4", init, **kept)}
    e.store.factors(*recipes)
    rows = []
    for recipe, columns in recipes.items():
        removed = 1 - (columns["kept_k"] + columns["kept_v"]) / 2
        rows.append((e.cskv(recipe, removed), columns))
    result = e.scores(rows)
    e.write(result, ["question", "factors", "ratio", "kept_k", "kept_v", *SCORES, "paper"])
    figures.scores(result, e.picture, "kept_k", "share of the key channels that is kept")


def table5(e: Experiment) -> None:
    """Latents in fewer bits, without (ptq) and with (qat) training for it, by two quantizers; and,
    at about the bytes of 80% in 16 bits, half of the key channels with all value channels in 3
    bits, and KIVI. The clamped zero-point is trained for at 4 bits, the paper's.
    """
    choices: list[tuple[str, Recipe, dict]] = []  # mode, factors, bits
    for init, ratio in product(e.inits, e.ratios):
        start = uniform(init, ratio)
        choices.append(("none", start, {}))
        for bits, clamped in product((4, 3, 2), (False, True)):
            quantized = {"k_bits": bits, "v_bits": bits, "clamped": clamped}
            choices.append(("ptq", start, quantized))
            if not clamped or bits == 4:
                aware = replace(start, trained=True, bits=bits, clamped=clamped)
                choices.append(("qat", aware, quantized))
    e.store.factors(*[recipe for _, recipe, _ in choices])
    rows = [(e.row("full"), {"mode": "none", "paper": ""})]
    for mode, recipe, bits in choices:
        number = ""
        if bits.get("k_bits", 4) == 4:
            number = paper_number("table5", recipe.init, ratio=recipe.k_ratio, mode=mode)
        rows.append((e.cskv(recipe, **bits), {"mode": mode, "paper": number}))
    mixed = e.cskv(Recipe("optimal", 0.5, 0.0), 0.25, k_bits=3, v_bits=3)
    for row in (mixed, e.row("kivi-4"), e.row("kivi-2")):
        rows.append((row, {"mode": "ptq", "paper": ""}))
    columns = ["question", "cache", "ratio", "factors", "bits", "mode"]
    e.write(e.scores(rows), [*columns, *SCORES, "paper"])


def budget(e: Experiment) -> None:
    """Perplexity at measured bytes, all methods: uniform factors, and with 4 sinks the files that
    experiments/budget.py made; KIVI with and without sinks. Nothing is trained."""
    rows = [e.row("full")]
    rows += [e.row(name, ratio) for name in PRUNING for ratio in e.ratios]
    rows += [e.row(name, sinks=sinks) for name in ("kivi-4", "kivi-2") for sinks in (0, 4)]
    for bits, ratio in product((16, 4), e.ratios):
        rows.append(e.cskv(uniform("optimal", ratio), k_bits=bits, v_bits=bits))
    rows += e.budgets()
    result = e.scores([(row, {}) for row in rows])
    compare_with_full(result)
    columns = ["text", "context", "cache", "factors", "bits", "sinks", "ratio"]
    e.write(result, [*columns, *SCORES, "of_full"])
    figures.scores(result, e.picture, "measured_ratio", "measured ratio")


def figure3(e: Experiment) -> None:
    """Singular values of keys and values, layer by layer."""
    spectra = torch.linalg.eigvalsh(e.store.moments()).clamp(min=0).cpu().flip(-1)
    shares = spectra.cumsum(-1) / spectra.sum(-1, keepdim=True)  # [layers, 2, d_kv]
    rows = []
    for layer, both in enumerate(shares):
        for side, share in zip(("keys", "values"), both, strict=True):
            row = {"layer": layer, "of": side}
            for ratio in (0.5, 0.8):
                kept = share[rank_for(ratio, len(share)) - 1].item()
                row[f"left_out_{ratio:.0%}"] = 1 - kept
            rows.append(row)
    e.write(rows, ["layer", "of", "left_out_50%", "left_out_80%"])
    figures.singular_values(spectra.sqrt(), e.picture)


def figure4(e: Experiment) -> None:
    """Loss curves of the initializations, with the least loss that is possible."""
    curves = []
    for r in trainings(e):
        curves.append({"ratio": r.k_ratio, "init": r.init, "lr": r.lr, **e.store.history(r)})
    columns = ["ratio", "init", "lr", "initial", "final", "floor", "seconds", "trained_together"]
    e.write([{name: curve[name] for name in columns} for curve in curves], columns)
    figures.loss_curves(curves, e.picture)


COMMANDS = {f.__name__: f for f in (table1, table2, table3, table4, table5, budget)}
COMMANDS |= {f.__name__: f for f in (figure3, figure4)}


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed. A case that does not fit is refused before
    the training, and not after it."""
    if args.what == "all":
        if args.data is None:
            raise UserError("all needs LongEval's own files; give their folder with --data")
        read_cases(args.data, PUBLISHED[0])  # a wrong folder is known before the work
        remake(RESULTS / "commands.txt", args.data, Path("runs/all.txt"), args.processes)
        return
    if args.what == "budget" and not args.text:
        raise UserError("budget measures perplexity; give held-out text with --text")
    if args.text and (args.data or not args.calibrate):
        raise UserError("--text asks for perplexity; give --calibrate with it, and no --data")
    if args.what not in ("table2", "table5"):
        figures.pyplot()  # if it is missing, that is known before the work and not after
    with processes(args.device) as device:
        model = load_model(args.model, device, DTYPES[args.dtype])
        tokenizer = load_tokenizer(args.model, model.config.vocab_size)
        work = args.work / Path(args.model).name
        for folder in (work, args.out):
            make_folder(folder)
        out, notes = args.out / args.what, work / f"{args.what}.json"
        written = {"the notes": own_notes(notes)}
        written |= {f"the {end} file": out.with_suffix(f".{end}") for end in ("md", "json", "png")}
        read = {str(file): file for file in (*args.text, *args.factors)}
        read |= {"--calibrate": args.calibrate, "--data": args.data}
        check_files(written, read, args.model)
        limit = model.config.context_length
        if args.calibrate:
            length = min(args.seq_len, limit)
            texts = sample_tokens(args.calibrate, tokenizer, args.samples, length, seed=0)
        else:
            texts = samples(tokenizer, limit, "longeval", LINES, args.samples, seed=0)
        cases = []
        if args.text:
            sizes = {"steps": args.steps, "count": args.passages, "batch": args.batch}
            cases = perplexity_cases(model, tokenizer, args.text, args.context, **sizes)
        elif args.what not in ("figure3", "figure4"):
            drawn = {"count": args.cases, "data": args.data}
            cases = retrieval_cases(model, tokenizer, "longeval", PROTOCOLS, args.lines, **drawn)
        store = FactorStore(model, texts, work, args.lr)
        counts = {**vars(args), "out": None, "work": None, "samples": store.key}
        plan = all_that_counts(counts, model, args.model)
        files = [load_factors(file, model) for file in args.factors]
        experiment = Experiment(store, cases, args.ratios, args.inits, files, out, notes, plan)
        COMMANDS[args.what](experiment)
        if place()[0] == 0:
            delete_notes(notes)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__)
    add, count = parser.add_argument, number(int, 1)
    counts = comma_list(count)
    ratios = comma_list(number(float, 0, 0.9999))
    inits = comma_list(str, INITIALIZATIONS)
    add("what", choices=[*COMMANDS, "all"])
    add("--processes", type=count, default=1, help="share the work of all out among so many (1)")
    add("--model", default=TEACHER, help="measure this checkpoint, a folder or a hub name")
    add("--out", type=Path, default=Path("runs/paper"), help="write tables here (runs/paper)")
    add("--work", type=Path, default=Path("runs/factors"), help="keep factors here (runs/factors)")
    add("--inits", type=inits, default="asvd,optimal", help="compare such factors (asvd,optimal)")
    add("--ratios", type=ratios, default="0.5,0.8", help="remove such shares (default: 0.5,0.8)")
    add("--factors", type=Path, nargs="*", default=[], help="show these of budget too")
    add("--lines", type=counts, help="ask about so many lines (50, with --data 200; table1: more)")
    add("--cases", type=count, default=100, help="ask so often at each length (default: 100)")
    add("--data", type=Path, help="read LongEval's own cases in this folder instead of ours")
    add("--text", type=Path, nargs="+", default=[], help="measure perplexity on this text")
    add("--context", type=counts, default="1024", help="prefill so many tokens of it (1024)")
    add("--steps", type=count, default=256, help="decode so many one by one (default: 256)")
    add("--passages", type=count, default=8, help="measure on so many of each text (default: 8)")
    add("--batch", type=count, default=8, help="read so many at a time, as memory allows (8)")
    add("--calibrate", type=Path, help="fit factors to this text (default: to LongEval's cases)")
    add("--samples", type=count, default=1024, help="calibrate and train on so many texts (1024)")
    add("--seq-len", type=number(int, 2), default=1024, help="cut texts to so many tokens (1024)")
    help = "train at this rate (default: 0.005); table2 and figure4 have the paper's too"
    add("--lr", type=number(float, 0), default=5e-3, help=help)
    add("--device", default="cpu", help="compute on cpu or cuda")
    add("--dtype", choices=DTYPES, default="float32", help="compute in it (default: float32)")
    args = parser.parse_args(argv)
    if args.lines is None:
        lengths = PUBLISHED if args.data else LINES
        first = PUBLISHED[:1] if args.data else [50]
        args.lines = lengths if args.what == "table1" else first
    if args.processes > 1 and args.what != "all":
        parser.error(f"--processes is for all; torchrun shares out the work of {args.what}")
    return args


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
