"""The paper's experiments, one command each, and what they leave open.

    python -m experiments.paper table1        every method, LongEval, 50% and 80% (and 95%)
    python -m experiments.paper table2        where the factors start, before and after training
    python -m experiments.paper table3        the window
    python -m experiments.paper table4        how to share the channels between keys and values
    python -m experiments.paper table5        quantization with and without training for it
    python -m experiments.paper figure3       singular values of keys and values
    python -m experiments.paper figure4       loss curves, with the floor that none can pass

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
import functools
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

import quant
from experiments import figures
from experiments.caches import PRUNED, CacheMaker, Choice
from experiments.evaluate import PROTOCOLS, flags, perplexity_cases, retrieval_cases
from experiments.longeval import make_cases
from experiments.measuring import Case, forget, measure, table, with_score, write_json
from experiments.workshop import LINES, Recipe, Workshop
from support.calibration import INITIALIZATIONS, rank_for
from support.command import (
    DTYPES,
    Arguments,
    UserError,
    check_device,
    comma_list,
    number,
    one_of,
    replacing,
    run_command,
)
from support.demonstration import TEACHER
from support.processes import place, processes

PAPER_LR = 5e-5

# ---------------------------------------------------------------------------------- measuring


class Experiment(Workshop):
    """A workshop that also measures what it makes."""

    def __init__(self, args: argparse.Namespace):
        self.began = time.monotonic()
        super().__init__(args)
        self.maker = CacheMaker(self.model, DTYPES[args.cache_dtype])

    def choice(self, recipe: Recipe, ratio: float | None = None, **options) -> Choice:
        """CSKV with the recipe's factors. `options` are those of `CacheMaker.bi_branch`."""
        (factors,) = self.factors(recipe)
        name = recipe.init + (", trained" if recipe.trained else "")
        name += f" in {recipe.bits} bits" if recipe.trained and recipe.bits < 16 else ""
        name += f", lr {recipe.lr:g}" if recipe.lr else ""
        return self.maker.bi_branch(
            factors, name, recipe.k_ratio if ratio is None else ratio, **options
        )

    def scores(self, rows: list[Choice], by_lines: bool = False) -> list[dict]:
        """Rows of `measure`: of perplexity, or of LongEval in each protocol. `by_lines` keeps the
        lengths apart; else a row is the average over them, as the paper's `Avg. Acc`."""
        args, what = self.args, "perplexity" if self.args.text else "longeval"
        named = argparse.Namespace(**{**vars(args), "out": None, "work": None})
        given = {**flags(named, self.model), "samples": self.key}
        cases = self.cases
        if not args.text and not by_lines:
            cases = [({"question": columns["question"]}, text) for columns, text in cases]
        return with_score(what, measure(self.model, rows, cases, self.notes, given))

    @functools.cached_property
    def cases(self) -> list[Case]:
        if self.args.text:
            return perplexity_cases(self.args, self.model, self.tokenizer)
        asked = argparse.Namespace(**{**vars(self.args), "what": "longeval"})
        return retrieval_cases(asked, self.model, self.tokenizer)

    @property
    def notes(self) -> Path:
        return self.work / f"{self.args.what}.json"

    def write(self, rows: list[dict], columns: dict) -> None:
        """Prints a table and writes it, as Markdown and as JSON. Of rows of several protocols it is
        `side_by_side`, and the file has all rows as well."""
        if place()[0]:
            return
        out, whole = self.args.out / self.args.what, table(rows, columns)
        text = table(*side_by_side(rows, columns))
        print(text)
        write_json(out.with_suffix(".json"), rows)
        command = f"`python -m experiments.paper {shlex.join(sys.argv[1:]) or self.args.what}`"
        minutes = (time.monotonic() - self.began) / 60
        made = f"{time.strftime('%Y-%m-%d')}, PyTorch {torch.__version__}, "
        made += (
            f"{torch.get_num_threads()} threads, {minutes:.1f} minutes since it was started last"
        )
        parts = [command, text, made] + [whole] * (whole != text)
        with replacing(out.with_suffix(".md")) as temporary:
            temporary.write_text("\n\n".join(parts) + "\n")

    @property
    def picture(self) -> Path:
        return self.args.out / f"{self.args.what}.png"

    @property
    def longest(self) -> int:
        """Tokens of the longest case that is measured, about."""
        if self.args.text:
            return self.args.context + self.args.steps
        case = next(make_cases("longeval", max(self.args.lines), 1, self.args.seed))
        return len(self.tokenizer.encode(case.text))


def side_by_side(rows: list[dict], columns: dict) -> tuple[list[dict], dict]:
    """Rows and columns with a column of accuracies for each protocol; these and measured ratios are
    means over the lengths."""
    keys = [name for name in columns if name not in ("question", "lines", *SCORES)]
    questions = dict.fromkeys(row["question"] for row in rows if "question" in row)
    if not questions:
        return rows, columns
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        key = tuple(row[name] for name in (*keys, "nominal_ratio"))
        groups.setdefault(key, []).append(row)
    merged = []
    for group in groups.values():
        scores = {q: fmean(r["accuracy"] for r in group if r["question"] == q) for q in questions}
        measured = fmean(row["measured_ratio"] for row in group)
        merged.append({**group[0], **scores, "measured_ratio": measured})
    shown = {name: columns[name] for name in keys if name != "paper"}
    shown |= {name: SCORES[name] for name in ("nominal_ratio", "measured_ratio")}
    shown |= dict.fromkeys(questions, SCORES["accuracy"])
    return merged, shown | ({"paper": str} if "paper" in columns else {})


# ------------------------------------------------------------------------------------- tables

SCORES = {
    "accuracy": "{:.2f}".format,
    "interval": lambda pair: "[{:.2f}, {:.2f}]".format(*pair),
    "perplexity": "{:.2f}".format,
    "nominal_ratio": "{:.1%}".format,
    "measured_ratio": "{:.1%}".format,
}
PERCENT = "{:.0%}".format


def paper_number(numbers: dict, *key) -> str:
    found = numbers.get(key if len(key) > 1 else key[0])
    return "" if found is None else f"{found:.2f}"


# LongChat-7B, LongEval, averages over 4k to 10k.
TABLE_1 = {
    ("full", 0.0): fmean([1.00, 1.00, 0.98, 0.98]),
    ("streaming", 0.5): fmean([0.12, 0.16, 0.06, 0.20]),
    ("h2o", 0.5): fmean([0.62, 0.56, 0.52, 0.50]),
    ("asvd", 0.5): fmean([0.92, 0.96, 0.92, 0.94]),
    ("cskv", 0.5): fmean([0.98, 0.94, 0.96, 0.94]),
    ("streaming", 0.8): fmean([0.06, 0.06, 0.02, 0.02]),
    ("h2o", 0.8): fmean([0.18, 0.24, 0.26, 0.10]),
    ("asvd", 0.8): fmean([0.26, 0.12, 0.06, 0.04]),
    ("cskv", 0.8): fmean([0.92, 0.94, 0.94, 0.90]),
}
TABLE_2 = {
    ("random", 0.5): 0.00, ("svd", 0.5): 0.94, ("asvd", 0.5): 0.95,
    ("random", 0.6): 0.00, ("svd", 0.6): 0.93, ("asvd", 0.6): 0.94,
    ("random", 0.7): 0.00, ("svd", 0.7): 0.89, ("asvd", 0.7): 0.93,
    ("random", 0.8): 0.00, ("svd", 0.8): 0.87, ("asvd", 0.8): 0.92,
}  # fmt: skip
TABLE_3 = {2: 0.77, 4: 0.83, 8: 0.85, 16: 0.88, 32: 0.92, 64: 0.93, 128: 0.94, 256: 0.94}
TABLE_3 |= {512: 0.94, 1024: 0.95, 2048: 0.96, 4096: 0.96}
# By the shares of K and V as printed, taken as kept shares; 12.5% and 87.5% are printed as 75%.
TABLE_4 = {
    (0.875, 0.125): 0.97, (0.75, 0.25): 0.98, (0.625, 0.375): 0.96, (0.5, 0.5): 0.95,
    (0.375, 0.625): 0.95, (0.25, 0.75): 0.94, (0.125, 0.875): 0.80,
    (0.4375, 0.0625): 0.73, (0.375, 0.125): 0.89, (0.3125, 0.1875): 0.95, (0.25, 0.25): 0.93,
    (0.1875, 0.3125): 0.88, (0.125, 0.375): 0.80, (0.0625, 0.4375): 0.43,
}  # fmt: skip
TABLE_5 = {(0.6, "none"): 0.94, (0.6, "ptq"): 0.00, (0.6, "qat"): 0.94}
TABLE_5 |= {(0.7, "none"): 0.93, (0.7, "ptq"): 0.00, (0.7, "qat"): 0.92}
TABLE_5 |= {(0.5, "none"): 0.95, (0.5, "ptq"): 0.00, (0.5, "qat"): 0.96}
TABLE_5 |= {(0.8, "none"): 0.92, (0.8, "ptq"): 0.00, (0.8, "qat"): 0.90}


def table1(shop: Experiment) -> None:
    """All methods. `cskv, asvd, trained` is the paper's; `cskv, optimal` needs no training."""
    maker, inits, rows = shop.maker, shop.args.inits, [shop.maker.full()]
    recipes = [Recipe(init, r, r, init == "asvd") for r in shop.args.ratios for init in inits]
    in_bits = Recipe("asvd", 0.8, 0.8, True, 4)
    shop.factors(*recipes, *[in_bits] * ("asvd" in inits))
    for ratio in shop.args.ratios:
        rows += [maker.pruned(name, ratio) for name in PRUNED]
        for init in inits:
            rows.append(maker.low_rank(*shop.factors(Recipe(init, ratio, ratio)), init, ratio))
        rows += [shop.choice(recipe) for recipe in recipes if recipe.k_ratio == ratio]
    rows += [maker.kivi(4), maker.kivi(2)]
    # 95%: four bits on top of 80%; of the tokens, a twentieth.
    rows += [maker.pruned(name, 0.95) for name in PRUNED if 0.95 not in shop.args.ratios]
    if "asvd" in inits:
        rows.append(shop.choice(in_bits, 0.95))
    if "optimal" in inits:
        rows.append(shop.choice(Recipe("optimal", 0.8, 0.8), 0.95, k_bits=4, v_bits=4))

    result = shop.scores(rows, by_lines=True)
    for row in result:
        theirs = row["factors"].startswith("asvd") or not row["factors"]
        row["paper"] = paper_number(TABLE_1, row["cache"], row["ratio"]) if theirs else ""
    columns = {"question": str, "lines": str, "cache": str, "factors": str, "bits": str}
    columns |= {"ratio": PERCENT, **SCORES, "paper": str}
    shop.write(result, columns)
    figures.accuracy_against_bytes(result, shop.picture)


def trainings(shop: Experiment) -> list[Recipe]:
    """Every initialization at every ratio, at the paper's learning rate and at ours."""
    rates = sorted({PAPER_LR, shop.args.lr})
    return [
        Recipe(init, ratio, ratio, True, lr=lr)
        for ratio in shop.args.ratios
        for init in INITIALIZATIONS
        for lr in rates
    ]


def table2(shop: Experiment) -> None:
    """Initializations before and after the paper's training, with their losses and the floor."""
    trained = trainings(shop)
    shop.factors(*trained)
    recipes = [r for t in trained for r in (replace(t, trained=False, lr=None), t)]
    recipes = list(dict.fromkeys(recipes))
    result = shop.scores([shop.choice(recipe) for recipe in recipes])
    for i, row in enumerate(result):
        recipe = recipes[i % len(recipes)]
        history = shop.history(replace(recipe, trained=True, lr=recipe.lr or PAPER_LR))
        row |= {"loss": history["final" if recipe.trained else "initial"]}
        row |= {"floor": history["floor"], "paper": ""}
        if recipe.lr == PAPER_LR:
            row["paper"] = paper_number(TABLE_2, recipe.init, recipe.k_ratio)
    columns = {"question": str, "ratio": PERCENT, "factors": str, "loss": "{:.4g}".format}
    shop.write(result, columns | {"floor": "{:.4g}".format, **SCORES, "paper": str})


def table3(shop: Experiment) -> None:
    """The window, at the highest of the ratios."""
    ratio = max(shop.args.ratios)
    recipes = [Recipe(init, ratio, ratio, init == "asvd") for init in shop.args.inits]
    windows = [w for w in (1, *TABLE_3) if w < shop.longest]
    rows, widths = [], []
    for recipe in recipes:
        for window in windows:
            rows.append(shop.choice(recipe, window=window))
            widths.append(window)
    result = shop.scores(rows)
    for i, row in enumerate(result):
        row["window"] = widths[i % len(widths)]
        row["paper"] = paper_number(TABLE_3, row["window"]) if "asvd" in row["factors"] else ""
    columns = {"question": str, "factors": str, "window": str, "ratio": PERCENT}
    shop.write(result, columns | SCORES | {"paper": str})
    figures.score_against(result, "window", shop.picture)


def table4(shop: Experiment) -> None:
    """Channels shared between keys and values, as kept shares, half and a quarter of all."""
    splits = list(TABLE_4)
    recipes = [
        Recipe(init, 1 - k, 1 - v, init == "asvd") for init in shop.args.inits for k, v in splits
    ]
    shop.factors(*recipes)
    result = shop.scores([shop.choice(r, 1 - (2 - r.k_ratio - r.v_ratio) / 2) for r in recipes])
    for i, row in enumerate(result):
        row["kept_k"], row["kept_v"] = splits[i % len(splits)]
        row["paper"] = ""
        if "asvd" in row["factors"]:
            row["paper"] = paper_number(TABLE_4, row["kept_k"], row["kept_v"])
    columns = {"question": str, "factors": str, "ratio": PERCENT}
    columns |= {"kept_k": "{:.1%}".format, "kept_v": "{:.1%}".format}
    shop.write(result, columns | SCORES | {"paper": str})
    figures.score_against_split(result, shop.picture)


def table5(shop: Experiment) -> None:
    """Latents in fewer bits, without (ptq) and with (qat) training for it, by two quantizers; and,
    at about the bytes of 80% in 16 bits, half of the key channels with all value channels in 3
    bits, and KIVI. The clamped zero-point is trained for at the largest of the bits, the paper's.
    """
    inits, ratios = shop.args.inits, shop.args.ratios
    starts = [Recipe(init, r, r, init == "asvd") for init in inits for r in ratios]
    rows: list[tuple[str, Recipe, dict]] = []  # mode, factors, options
    for start in starts:
        rows.append(("none", start, {}))
        for bits in shop.args.bits:
            for clamped in (False, True):
                options = {"k_bits": bits, "v_bits": bits, "clamped_zero_point": clamped}
                rows.append(("ptq", start, options))
                if not clamped or bits == max(shop.args.bits):
                    aware = replace(start, trained=True, bits=bits, clamped_zero_point=clamped)
                    rows.append(("qat", aware, options))
    shop.factors(*(recipe for _, recipe, _ in rows))
    modes = ["none", *(mode for mode, _, _ in rows), *["ptq"] * 3]
    choices = [shop.maker.full()]
    choices += [shop.choice(recipe, **options) for _, recipe, options in rows]
    choices.append(shop.choice(Recipe("optimal", 0.5, 0.0), 0.25, k_bits=3, v_bits=3))
    choices += [shop.maker.kivi(4), shop.maker.kivi(2)]
    result = shop.scores(choices)
    for i, row in enumerate(result):
        row["mode"] = modes[i % len(modes)]
        theirs = "asvd" in row["factors"] and row["bits"].split(",")[0] in ("16", "4")
        row["paper"] = paper_number(TABLE_5, row["ratio"], row["mode"]) if theirs else ""
    columns = {"question": str, "cache": str, "ratio": PERCENT, "factors": str, "bits": str}
    shop.write(result, columns | {"mode": str, **SCORES, "paper": str})


def figure3(shop: Experiment) -> None:
    """Singular values of keys and values, layer by layer."""
    moments = shop.moments(shop.samples[: shop.args.measure_samples])
    spectra = torch.linalg.eigvalsh(moments).clamp(min=0).cpu().flip(-1)
    shares = spectra.cumsum(-1) / spectra.sum(-1, keepdim=True)  # [layers, 2, d_kv]
    d_kv = shop.model.config.d_kv
    rows = [
        {
            "layer": i,
            "of": "values" if j else "keys",
            **{
                f"left_out_{r:.0%}": 1 - shares[i, j, rank_for(r, d_kv) - 1].item()
                for r in (0.5, 0.8)
            },
        }
        for i in range(len(spectra))
        for j in (0, 1)
    ]
    shop.write(
        rows,
        {
            "layer": str,
            "of": str,
            **dict.fromkeys(("left_out_50%", "left_out_80%"), "{:.2%}".format),
        },
    )
    figures.singular_values(spectra.sqrt(), shop.picture)


def figure4(shop: Experiment) -> None:
    """Loss curves of the initializations, with the least loss that is possible."""
    rows, curves = [], []
    shop.factors(*trainings(shop))
    for recipe in trainings(shop):
        row = {"ratio": recipe.k_ratio, "init": recipe.init, "lr": recipe.lr}
        history = shop.history(recipe)
        kept = ("initial", "final", "floor", "seconds", "trained_together")
        rows.append({**row, **{name: history[name] for name in kept}})
        curves.append({**row, **history})
    four = "{:.4g}".format
    columns = {"ratio": PERCENT, "init": str, "lr": "{:g}".format}
    columns |= {"initial": four, "final": four, "floor": four, "seconds": "{:.0f}".format}
    shop.write(rows, columns | {"trained_together": str})
    figures.loss_curves(curves, shop.picture)


COMMANDS = {f.__name__: f for f in (table1, table2, table3, table4, table5, figure3, figure4)}

# -------------------------------------------------------------------------------- command line


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed."""
    check_device(args.device)
    if args.what not in ("table2", "table5"):
        figures.pyplot()  # if it is missing, that is known before the work and not after
    if args.text and not args.text.exists():
        raise UserError(f"no file {args.text}; give held-out text")
    with processes(args.device) as args.device:
        shop = Experiment(args)
        if args.what.startswith("table"):
            shop.cases  # noqa: B018  (a case that does not fit says so now, not after the training)
        COMMANDS[args.what](shop)
        if place()[0] == 0:
            forget(shop.notes)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("what", choices=COMMANDS)
    add("--model", default=TEACHER, help="default: the embedded teaching model")
    add("--out", type=Path, default=Path("runs/paper"), help="folder for tables and figures")
    add("--work", type=Path, default=Path("runs/factors"), help="folder for factors in the making")
    add(
        "--ratios",
        type=comma_list(number(float, 0, 0.9999)),
        default=[0.5, 0.8],
        help="default: 0.5,0.8",
    )
    inits = comma_list(one_of(INITIALIZATIONS, "initialization"))
    add("--inits", type=inits, default=["asvd", "optimal"], help="default: asvd,optimal")
    widths = comma_list(one_of(quant.BITS, "number of bits"))
    add("--bits", type=widths, default=[4, 3, 2], help="of table5 (default: 4,3,2)")
    add("--samples", type=number(int, 1), default=1024, help="to calibrate and train on")
    add("--seq-len", type=number(int, 2), default=1024, help="tokens of a sample, at most")
    add("--epochs", type=number(int, 1), default=1)
    add(
        "--lr",
        type=number(float, 0),
        default=5e-3,
        help="of the training (default: 0.005); table2 and figure4 have the paper's 5e-5 as well",
    )
    add("--measure-samples", type=number(int, 1), default=32, help="to measure losses on")
    add("--seed", type=number(int, 0), default=0)
    add(
        "--lines",
        type=comma_list(number(int, 1)),
        help="of LongEval (default: 25,50,100 in table1, else 50)",
    )
    add("--cases", type=number(int, 1), default=100, help="of each length (default: 100)")
    add(
        "--question",
        type=comma_list(one_of(PROTOCOLS, "protocol")),
        default=PROTOCOLS,
        help="default: both",
    )
    add("--calibrate", type=Path, help="text to fit on (default: LongEval cases of another seed)")
    add("--text", type=Path, help="held-out text: measure perplexity, not LongEval")
    add("--context", type=number(int, 1), default=1024, help="tokens prefilled")
    add("--steps", type=number(int, 1), default=256, help="tokens measured, one by one")
    add("--passages", type=number(int, 1), default=8, help="of the held-out text")
    add("--batch", type=number(int, 1), default=8, help="passages at a time")
    add("--device", default="cpu")
    add("--dtype", choices=DTYPES, default="float32", help="to compute in (default: float32)")
    add("--cache-dtype", choices=DTYPES, default="bfloat16", help="of caches (default: bfloat16)")
    args = parser.parse_args(argv)
    args.lines = args.lines or (LINES if args.what == "table1" else [50])
    args.spelled = False
    return args


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
