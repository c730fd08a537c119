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
do single cases: a command that was interrupted goes on when it is given again.

The paper's numbers, in the column `paper`, are of LongChat-7B on LongEval with 200 to 500 lines.
"""

import argparse
import functools
import hashlib
import io
import json
import math
import shlex
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import cskv
import quant
from experiments import figures
from experiments.baselines import heavy_hitter_cache, kivi_cache, low_rank_cache, streaming_cache
from experiments.caches import Choice, cskv_choice, names_of
from experiments.evaluate import (
    flags,
    forget,
    measure,
    perplexity_cases,
    retrieval_cases,
    table,
    with_score,
    write_json,
)
from experiments.longeval import make_cases
from infer import TEACHER
from model import (
    DTYPES,
    UNREADABLE,
    Arguments,
    UserError,
    check_device,
    full_cache,
    load_model,
    load_tokenizer,
    number,
    numbers,
    replacing,
    run_command,
)
from train import Tuner, batch_of, run_layers, sample_tokens

PAPER_LR = 5e-5
LINES = [25, 50, 100]  # of the LongEval cases that factors are fitted to, and of table 1

# ------------------------------------------------------------------------------------ factors


@dataclass(frozen=True)
class Recipe:
    """Factors to make: an initialization, ranks, and whether and for what they are trained."""

    init: str
    k_ratio: float
    v_ratio: float
    trained: bool = False
    bits: int = 16  # with training: quantization-aware
    clamped_zero_point: bool = False
    lr: float | None = None  # other than --lr

    @property
    def name(self) -> str:
        parts = [self.init, f"k{1e4 * self.k_ratio:04.0f}-v{1e4 * self.v_ratio:04.0f}"]
        parts += [f"{self.bits}bits"] * (self.bits < 16) + ["clamped"] * self.clamped_zero_point
        return "-".join(parts)


class Workshop:
    """A model, text to fit factors on, and the factors made so far."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.model = load_model(args.model, args.device, DTYPES[args.dtype])
        self.tokenizer = load_tokenizer(args.model)
        self.work, self.out = args.work / Path(args.model).name, args.out
        for folder in (self.work, self.out):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{folder} cannot be made ({error}); choose another") from None
        self._samples = self._statistics = None

    @property
    def samples(self) -> list[Tensor]:
        """Texts [1, T] to fit on: of `--calibrate`, or LongEval cases of another seed."""
        if self._samples is None:
            args = self.args
            if args.calibrate:
                length = min(args.seq_len, self.model.config.context_length)
                self._samples = sample_tokens(
                    args.calibrate, self.tokenizer, args.samples, length, args.seed
                )
            elif args.text:
                raise UserError("factors are made from text; give some with --calibrate")
            else:
                share = -(-args.samples // len(LINES))
                cases = [
                    case
                    for lines in LINES
                    for case in make_cases("longeval", lines, share, args.seed + 10**9)
                ]
                ids = [self.tokenizer.encode(case.text) for case in cases[: args.samples]]
                limit = self.model.config.context_length
                self._samples = [torch.tensor([tokens[:limit]]) for tokens in ids]
        return self._samples

    @functools.cached_property
    def key(self) -> str:
        """A digest of all that factors depend on, besides their recipe."""
        args = self.args
        parts = [cskv.fingerprint(self.model), [sample.tolist() for sample in self.samples]]
        parts += [args.epochs, args.seed, args.dtype, args.measure_samples]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    @property
    def longest(self) -> int:
        """Tokens of the longest case that is measured, about."""
        if self.args.text:
            return self.args.context + self.args.steps
        case = next(make_cases("longeval", max(self.args.lines), 1, self.args.seed))
        return len(self.tokenizer.encode(case.text))

    @property
    def statistics(self) -> list[cskv.Statistics]:
        if self._statistics is None:
            bar = tqdm(self.samples, "calibrating", unit="sample", leave=False)
            self._statistics = cskv.collect_statistics(self.model, bar)
        return self._statistics

    def start(self, recipe: Recipe) -> cskv.Factors:
        """The recipe's factors before training, in float32."""
        d_kv, layers = self.model.config.d_kv, len(self.model.model.layers)
        k_ranks, v_ranks = (
            [cskv.rank_for(ratio, d_kv)] * layers for ratio in (recipe.k_ratio, recipe.v_ratio)
        )
        statistics = self.statistics if recipe.init in cskv.CALIBRATED else None
        factors = cskv.init_factors(
            recipe.init, self.model, k_ranks, v_ranks, statistics, self.args.seed
        )
        return cskv.rotate_values(factors) if recipe.bits < 16 else factors

    def factors(self, *recipes: Recipe) -> list[cskv.Factors]:
        """Factors for each recipe, of the model's type; what has to be trained first, is."""
        missing = [r for r in dict.fromkeys(recipes) if r.trained and not self.file(r).exists()]
        if missing:
            self.train(missing)
        like = self.model.lm_head.weight
        return [
            cskv.load_factors(self.file(r), self.model) if r.trained else self.start(r).to(like)
            for r in recipes
        ]

    def file(self, recipe: Recipe) -> Path:
        return self.work / f"{recipe.name}-lr{recipe.lr or self.args.lr:g}-{self.key}.safetensors"

    def history(self, recipe: Recipe) -> dict:
        """What training measured: `initial`, `final` and `floor`, of the samples measured, and
        `losses` of every step before its update."""
        self.factors(recipe)
        return json.loads(self.file(recipe).with_suffix(".json").read_text())

    def train(self, recipes: list[Recipe]) -> None:
        """The paper's training (train.py) for all recipes at once, in one pass over the samples."""
        args, samples = self.args, self.samples
        steps = args.epochs * len(samples)
        tuners = [
            Tuner(self.start(r), steps, r.lr or args.lr, r.bits, r.bits, r.clamped_zero_point)
            for r in recipes
        ]
        measured = samples[: args.measure_samples]
        names = [self.file(r).name for r in recipes]
        digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:12]
        checkpoint = self.work / f"training-{digest}.pt"
        state = {"losses": [], "seconds": 0.0, "initial": None}
        if checkpoint.exists():
            try:
                state = torch.load(checkpoint, weights_only=True)
            except UNREADABLE:
                raise UserError(f"{checkpoint} is damaged; delete it to train again") from None
            for tuner, mine in zip(tuners, state["tuners"], strict=True):
                tuner.steps_done = len(state["losses"])
                tuner.optimizer.load_state_dict(mine["optimizer"])
                with torch.no_grad():
                    for parameter, value in zip(tuner.parameters, mine["parameters"], strict=True):
                        parameter.copy_(value)
        if state["initial"] is None:
            state["initial"] = run_layers(self.model, measured, tuners).sum(1).tolist()
        began = time.monotonic() - state["seconds"]
        first = len(state["losses"])
        for step in tqdm(
            range(first, steps), f"training {len(recipes)}", initial=first, total=steps
        ):
            batch = batch_of(samples, step, 1, args.seed)
            state["losses"].append(
                run_layers(self.model, batch, tuners, train=True).sum(1).tolist()
            )
            for recipe, loss in zip(recipes, state["losses"][-1], strict=True):
                if not math.isfinite(loss):
                    raise UserError(f"{recipe.name}, step {step}: the loss diverges; lower --lr")
            for tuner in tuners:
                tuner.step()
            if (step + 1) % 64 == 0 and step + 1 < steps:
                state["seconds"] = time.monotonic() - began
                self.save_checkpoint(checkpoint, state, tuners)
        seconds = time.monotonic() - began
        finals = run_layers(self.model, measured, tuners).sum(1).tolist()
        spectra = self.spectra(measured)
        for i, (recipe, tuner) in enumerate(zip(recipes, tuners, strict=True)):
            history = {
                "initial": state["initial"][i],
                "final": finals[i],
                "floor": self.floor(spectra, recipe),
                "losses": [losses[i] for losses in state["losses"]],
                "seconds": seconds,
                "trained_together": len(recipes),
            }
            write_json(self.file(recipe).with_suffix(".json"), history)
            tuner.factors.info["trained"] = f"{steps} steps, lr {tuner.lr:g}, batch 1"
            cskv.save_factors(self.file(recipe), tuner.factors, self.model, torch.float32)
        checkpoint.unlink(missing_ok=True)

    @staticmethod
    def save_checkpoint(path: Path, state: dict, tuners: list[Tuner]) -> None:
        kept = [
            {
                "parameters": [p.detach() for p in tuner.parameters],
                "optimizer": tuner.optimizer.state_dict(),
            }
            for tuner in tuners
        ]
        torch.save({**state, "tuners": kept}, buffer := io.BytesIO())
        with replacing(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())

    @torch.no_grad()
    def spectra(self, samples: list[Tensor]) -> Tensor:
        """Eigenvalues [layers, 2, d_kv] of the mean k k^T and v v^T, the smallest first."""
        config = self.model.config
        shape = config.num_hidden_layers, 2, config.d_kv, config.d_kv
        moments = torch.zeros(shape, dtype=torch.float64, device=self.args.device)
        run_layers(self.model, samples, [], moments=moments)
        tokens = sum(sample.numel() for sample in samples)
        return torch.linalg.eigvalsh(moments / tokens).clamp(min=0).cpu()

    def floor(self, spectra: Tensor, recipe: Recipe) -> float:
        """The least loss (equation 2) that factors of these ranks can have on those samples."""
        d_kv = self.model.config.d_kv
        k, v = (d_kv - cskv.rank_for(ratio, d_kv) for ratio in (recipe.k_ratio, recipe.v_ratio))
        return ((spectra[:, 0, :k].sum() + spectra[:, 1, :v].sum()) / d_kv).item()

    # ------------------------------------------------------------------------------- measuring

    def choice(self, recipe: Recipe, ratio: float | None = None, **options) -> Choice:
        """CSKV with the recipe's factors. `options` are those of `cskv_choice`."""
        (factors,) = self.factors(recipe)
        name = recipe.init + (", trained" if recipe.trained else "")
        name += f" in {recipe.bits} bits" if recipe.trained and recipe.bits < 16 else ""
        name += f", lr {recipe.lr:g}" if recipe.lr else ""
        ratio = recipe.k_ratio if ratio is None else ratio
        return cskv_choice(self.model, factors, name, ratio, **options)

    def scores(self, what: str, rows: list[Choice], by_lines: bool = False) -> list[dict]:
        """Rows of `measure`: of perplexity, or of LongEval in each protocol. `by_lines` keeps the
        lengths apart; else a row is the average over them, as the paper's `Avg. Acc`."""
        args, notes = self.args, self.work / f"{what}.json"
        named = {**vars(args), "out": None, "work": None}
        given = {**flags(argparse.Namespace(**named), self.model), "factors": self.key}
        if args.text:
            cases, measure_of = perplexity_cases(args, self.model, self.tokenizer), "perplexity"
        else:
            cases, measure_of = [], "longeval"
            for question in args.questions:
                asked = argparse.Namespace(
                    **{**vars(args), "question": question, "what": "longeval"}
                )
                for columns, case in retrieval_cases(asked, self.model, self.tokenizer):
                    columns = {"question": question, **(columns if by_lines else {})}
                    cases.append((columns, case))
        result = measure(self.model, rows, cases, notes, given)
        return with_score(measure_of, result)

    def write(self, what: str, rows: list[dict], columns: dict) -> None:
        """Prints the table and writes it, as Markdown and as JSON."""
        text = table(rows, columns)
        print(text)
        write_json(self.out / f"{what}.json", rows)
        with replacing(self.out / f"{what}.md") as temporary:
            temporary.write_text(f"{self.command(what)}\n\n{text}\n")

    def command(self, what: str) -> str:
        return f"`python -m experiments.paper {shlex.join(sys.argv[1:]) or what}`"


# ------------------------------------------------------------------------------------- tables

SCORES = {
    "accuracy": "{:.2f}".format,
    "interval": lambda pair: "[{:.2f}, {:.2f}]".format(*pair),
    "perplexity": "{:.2f}".format,
    "nominal_ratio": "{:.1%}".format,
    "honest_ratio": "{:.1%}".format,
}
PERCENT = "{:.0%}".format


def paper_number(numbers: dict, *key) -> str:
    found = numbers.get(key if len(key) > 1 else key[0])
    return "" if found is None else f"{found:.2f}"


def mean(*values: float) -> float:
    return sum(values) / len(values)


# LongChat-7B, LongEval, averages over 4k to 10k.
TABLE_1 = {
    ("full", 0.0): mean(1.00, 1.00, 0.98, 0.98),
    ("streaming", 0.5): mean(0.12, 0.16, 0.06, 0.20),
    ("h2o", 0.5): mean(0.62, 0.56, 0.52, 0.50),
    ("asvd", 0.5): mean(0.92, 0.96, 0.92, 0.94),
    ("cskv", 0.5): mean(0.98, 0.94, 0.96, 0.94),
    ("streaming", 0.8): mean(0.06, 0.06, 0.02, 0.02),
    ("h2o", 0.8): mean(0.18, 0.24, 0.26, 0.10),
    ("asvd", 0.8): mean(0.26, 0.12, 0.06, 0.04),
    ("cskv", 0.8): mean(0.92, 0.94, 0.94, 0.90),
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


def table1(shop: Workshop) -> None:
    """All methods. `cskv, asvd, trained` is the paper's; `cskv, optimal` needs no training."""
    model, rows = shop.model, [Choice("full", partial(full_cache, shop.model))]
    inits = [
        Recipe(init, r, r, init == "asvd") for r in shop.args.ratios for init in shop.args.inits
    ]
    in_bits = Recipe("asvd", 0.8, 0.8, True, 4)
    shop.factors(*inits, *[in_bits] * ("asvd" in shop.args.inits))
    for ratio in shop.args.ratios:
        rows.append(Choice("streaming", partial(streaming_cache, model, ratio), ratio, ratio))
        rows.append(Choice("h2o", partial(heavy_hitter_cache, model, ratio), ratio, ratio))
        for init in shop.args.inits:
            (factors,) = shop.factors(Recipe(init, ratio, ratio))
            make = partial(low_rank_cache, model, factors)
            rows.append(Choice("asvd", make, ratio, cskv.nominal_ratio(model, factors), init))
        rows += [shop.choice(recipe) for recipe in inits if recipe.k_ratio == ratio]
    for bits in (4, 2):
        make = partial(kivi_cache, model, bits, 32)
        rows.append(Choice(f"kivi-{bits}", make, 0.0, 1 - bits / 16, bits=str(bits)))
    # 95%: four bits on top of 80%; of the tokens, a twentieth.
    for name, prune in (("streaming", streaming_cache), ("h2o", heavy_hitter_cache)):
        rows.append(Choice(name, partial(prune, model, 0.95), 0.95, 0.95))
    if "asvd" in shop.args.inits:
        rows.append(shop.choice(in_bits, 0.95))
    if "optimal" in shop.args.inits:
        rows.append(shop.choice(Recipe("optimal", 0.8, 0.8), 0.95, k_bits=4, v_bits=4))

    result = shop.scores("table1", rows, by_lines=True)
    for row in result:
        theirs = row["factors"].startswith("asvd") or not row["factors"]
        row["paper"] = paper_number(TABLE_1, row["cache"], row["ratio"]) if theirs else ""
    columns = {"question": str, "lines": str, "cache": str, "factors": str, "bits": str}
    columns |= {"ratio": PERCENT, **SCORES, "paper": str}
    shop.write("table1", result, columns)
    figures.accuracy_against_bytes(result, shop.out / "table1.png")


def trainings(shop: Workshop) -> list[Recipe]:
    """Every initialization at every ratio, at the paper's learning rate and at ours."""
    rates = sorted({PAPER_LR, shop.args.lr})
    return [
        Recipe(init, ratio, ratio, True, lr=lr)
        for ratio in shop.args.ratios
        for init in cskv.INITIALIZATIONS
        for lr in rates
    ]


def table2(shop: Workshop) -> None:
    """Initializations before and after the paper's training, with their losses and the floor."""
    trained = trainings(shop)
    shop.factors(*trained)
    recipes = [r for t in trained for r in (replace(t, trained=False, lr=None), t)]
    recipes = list(dict.fromkeys(recipes))
    result = shop.scores("table2", [shop.choice(recipe) for recipe in recipes])
    for i, row in enumerate(result):
        recipe = recipes[i % len(recipes)]
        history = shop.history(replace(recipe, trained=True, lr=recipe.lr or PAPER_LR))
        row |= {"loss": history["final" if recipe.trained else "initial"]}
        row |= {"floor": history["floor"], "paper": ""}
        if recipe.lr == PAPER_LR:
            row["paper"] = paper_number(TABLE_2, recipe.init, recipe.k_ratio)
    columns = {"question": str, "ratio": PERCENT, "factors": str, "loss": "{:.4g}".format}
    shop.write("table2", result, columns | {"floor": "{:.4g}".format, **SCORES, "paper": str})


def table3(shop: Workshop) -> None:
    """The window, at the highest of the ratios."""
    ratio = max(shop.args.ratios)
    recipes = [Recipe(init, ratio, ratio, init == "asvd") for init in shop.args.inits]
    windows = [w for w in (1, *TABLE_3) if w < shop.longest]
    rows, widths = [], []
    for recipe in recipes:
        for window in windows:
            rows.append(shop.choice(recipe, window=window))
            widths.append(window)
    result = shop.scores("table3", rows)
    for i, row in enumerate(result):
        row["window"] = widths[i % len(widths)]
        row["paper"] = paper_number(TABLE_3, row["window"]) if "asvd" in row["factors"] else ""
    columns = {"question": str, "factors": str, "window": str, "ratio": PERCENT}
    shop.write("table3", result, columns | SCORES | {"paper": str})
    figures.score_against(result, "window", shop.out / "table3.png")


def table4(shop: Workshop) -> None:
    """Channels shared between keys and values, as kept shares, half and a quarter of all."""
    splits = list(TABLE_4)
    recipes = [
        Recipe(init, 1 - k, 1 - v, init == "asvd") for init in shop.args.inits for k, v in splits
    ]
    shop.factors(*recipes)
    result = shop.scores(
        "table4", [shop.choice(r, 1 - (2 - r.k_ratio - r.v_ratio) / 2) for r in recipes]
    )
    for i, row in enumerate(result):
        row["kept_k"], row["kept_v"] = splits[i % len(splits)]
        row["paper"] = ""
        if "asvd" in row["factors"]:
            row["paper"] = paper_number(TABLE_4, row["kept_k"], row["kept_v"])
    columns = {"question": str, "factors": str, "ratio": PERCENT}
    columns |= {"kept_k": "{:.1%}".format, "kept_v": "{:.1%}".format}
    shop.write("table4", result, columns | SCORES | {"paper": str})
    figures.score_against_split(result, shop.out / "table4.png")


def table5(shop: Workshop) -> None:
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
    choices = [Choice("full", partial(full_cache, shop.model))]
    choices += [shop.choice(recipe, **options) for _, recipe, options in rows]
    choices.append(shop.choice(Recipe("optimal", 0.5, 0.0), 0.25, k_bits=3, v_bits=3))
    choices += [
        Choice(f"kivi-{b}", partial(kivi_cache, shop.model, b, 32), 0.0, 1 - b / 16, bits=str(b))
        for b in (4, 2)
    ]
    result = shop.scores("table5", choices)
    for i, row in enumerate(result):
        row["mode"] = modes[i % len(modes)]
        theirs = "asvd" in row["factors"] and row["bits"].split(",")[0] in ("16", "4")
        row["paper"] = paper_number(TABLE_5, row["ratio"], row["mode"]) if theirs else ""
    columns = {"question": str, "cache": str, "ratio": PERCENT, "factors": str, "bits": str}
    shop.write("table5", result, columns | {"mode": str, **SCORES, "paper": str})


def figure3(shop: Workshop) -> None:
    """Singular values of keys and values, layer by layer."""
    spectra = shop.spectra(shop.samples[: shop.args.measure_samples]).flip(-1)
    shares = spectra.cumsum(-1) / spectra.sum(-1, keepdim=True)  # [layers, 2, d_kv]
    d_kv = shop.model.config.d_kv
    rows = [
        {
            "layer": i,
            "of": "values" if j else "keys",
            **{
                f"left_out_{r:.0%}": 1 - shares[i, j, cskv.rank_for(r, d_kv) - 1].item()
                for r in (0.5, 0.8)
            },
        }
        for i in range(len(spectra))
        for j in (0, 1)
    ]
    shop.write(
        "figure3",
        rows,
        {
            "layer": str,
            "of": str,
            **dict.fromkeys(("left_out_50%", "left_out_80%"), "{:.2%}".format),
        },
    )
    figures.singular_values(spectra.sqrt(), shop.out / "figure3.png")


def figure4(shop: Workshop) -> None:
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
    shop.write("figure4", rows, columns | {"trained_together": str})
    figures.loss_curves(curves, shop.out / "figure4.png")


COMMANDS = {f.__name__: f for f in (table1, table2, table3, table4, table5, figure3, figure4)}

# -------------------------------------------------------------------------------- command line


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed."""
    check_device(args.device)
    if args.what not in ("table2", "table5"):
        figures.pyplot()  # if it is missing, that is known before the work and not after
    if args.text and not args.text.exists():
        raise UserError(f"no file {args.text}; give held-out text")
    shop = Workshop(args)
    COMMANDS[args.what](shop)
    forget(shop.work / f"{args.what}.json")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("what", choices=COMMANDS)
    add("--model", default=TEACHER, help="default: the embedded teaching model")
    add("--out", type=Path, default=Path("runs/paper"), help="folder for tables and figures")
    add("--work", type=Path, default=Path("runs/factors"), help="folder for factors in the making")
    add("--ratios", type=numbers(float, 0, 0.9999), default=[0.5, 0.8], help="default: 0.5,0.8")
    inits = names_of(cskv.INITIALIZATIONS, "initialization")
    add("--inits", type=inits, default=["asvd", "optimal"], help="default: asvd,optimal")
    widths = names_of(tuple(map(str, quant.BITS)), "number of bits")
    add("--bits", type=widths, default=["4", "3", "2"], help="of table5 (default: 4,3,2)")
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
    add("--lines", type=numbers(int, 1), help="of LongEval (default: 25,50,100 in table1, else 50)")
    add("--cases", type=number(int, 1), default=100, help="of each length (default: 100)")
    questions = names_of(("prefill", "decode"), "protocol")
    add("--questions", type=questions, default=["prefill", "decode"], help="default: both")
    add("--calibrate", type=Path, help="text to fit on (default: LongEval cases of another seed)")
    add("--text", type=Path, help="held-out text: measure perplexity, not LongEval")
    add("--context", type=number(int, 1), default=1024, help="tokens prefilled")
    add("--steps", type=number(int, 1), default=256, help="tokens measured, one by one")
    add("--passages", type=number(int, 1), default=8, help="of the held-out text")
    add("--batch", type=number(int, 1), default=8, help="passages at a time")
    add("--device", default="cpu")
    add("--dtype", choices=DTYPES, default="bfloat16", help="16 bits: honest ratios count 16")
    args = parser.parse_args(argv)
    args.lines = args.lines or (LINES if args.what == "table1" else [50])
    args.bits, args.spelled = [int(bits) for bits in args.bits], False
    return args


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
