"""Factors for the paper's experiments: trained once and together, kept for all commands.

A `Recipe` says how factors are made, a `Workshop` makes them. All that are missing share one pass
of the frozen model over the samples, since no gradient passes from one set to another.
"""

import argparse
import functools
import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import cskv
from experiments.longeval import make_cases
from experiments.measuring import write_json
from support.calibration import CALIBRATED, Statistics, calibrate, init_factors, rank_for
from support.checkpoint import load_model
from support.command import DTYPES, UserError, user_values
from support.factors_file import fingerprint, load_factors, save_factors
from support.processes import place
from support.resume import load_state, restore, save_state, state_of
from support.text import batch_of, sample_tokens
from support.tokenizer import load_tokenizer
from train import Tuner, loss_floor, run_layers

LINES = [25, 50, 100]  # of the LongEval cases that factors are fitted to, and of table 1


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
        self.work = args.work / Path(args.model).name
        for folder in (self.work, args.out):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{folder} cannot be made ({error}); choose another") from None

    @functools.cached_property
    def samples(self) -> list[Tensor]:
        """Texts [1, T] to fit on: of `--calibrate`, or LongEval cases of another seed."""
        args, limit = self.args, self.model.config.context_length
        if args.calibrate:
            length = min(args.seq_len, limit)
            return sample_tokens(args.calibrate, self.tokenizer, args.samples, length, args.seed)
        if args.text:
            raise UserError("factors are made from text; give some with --calibrate")
        share = -(-args.samples // len(LINES))
        lengths = (make_cases("longeval", lines, share, args.seed + 10**9) for lines in LINES)
        # One of each length in turn, so that the first, which losses are measured on, are like all.
        cases = [case for group in zip(*lengths, strict=True) for case in group]
        ids = [self.tokenizer.encode(case.text) for case in cases[: args.samples]]
        return [torch.tensor([tokens[:limit]]) for tokens in ids]

    @functools.cached_property
    def key(self) -> str:
        """A digest of all that factors depend on, besides their recipe."""
        args = self.args
        parts = [fingerprint(self.model), [sample.tolist() for sample in self.samples]]
        parts += [args.epochs, args.seed, args.dtype, args.measure_samples]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    @functools.cached_property
    def statistics(self) -> list[Statistics]:
        return calibrate(self.model, self.samples)

    def start(self, recipe: Recipe) -> cskv.Factors:
        """The recipe's factors before training, in float32."""
        d_kv, layers = self.model.config.d_kv, len(self.model.model.layers)
        k_ranks, v_ranks = (
            [rank_for(ratio, d_kv)] * layers for ratio in (recipe.k_ratio, recipe.v_ratio)
        )
        statistics = self.statistics if recipe.init in CALIBRATED else None
        with user_values():
            factors = init_factors(
                recipe.init, self.model, k_ranks, v_ranks, statistics, self.args.seed
            )
        return factors.in_bits(recipe.bits, recipe.bits, recipe.clamped_zero_point)

    def factors(self, *recipes: Recipe) -> list[cskv.Factors]:
        """Factors for each recipe; what has to be trained first, is."""
        missing = [r for r in dict.fromkeys(recipes) if r.trained and not self.file(r).exists()]
        if missing:
            self.train(missing)
        return [
            load_factors(self.file(r), self.model) if r.trained else self.start(r) for r in recipes
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
        steps, measured = args.epochs * len(samples), samples[: args.measure_samples]
        tuners = [Tuner(self.start(r), steps, r.lr or args.lr) for r in recipes]
        names = json.dumps([self.file(r).name for r in recipes])
        checkpoint = self.work / f"training-{hashlib.sha256(names.encode()).hexdigest()[:12]}.pt"
        if checkpoint.exists():
            state = load_state(checkpoint, {}, ("plan", "losses", "seconds", "initial", "tuners"))
            for tuner, mine in zip(tuners, state.pop("tuners"), strict=True):
                restore(tuner, mine)
        else:
            initial = run_layers(self.model, measured, tuners).sum(1).tolist()
            state = {"plan": {}, "losses": [], "seconds": 0.0, "initial": initial}
        began, losses = time.monotonic() - state["seconds"], state["losses"]
        # Every process has all tuners, and writes the same files, each whole or not at all.
        name, quiet = f"training {len(recipes)}", place()[0] > 0
        bar = tqdm(total=steps, initial=len(losses), desc=name, disable=quiet)
        for step in range(len(losses), steps):
            batch = batch_of(samples, step, 1, args.seed)
            losses.append(run_layers(self.model, batch, tuners, train=True).sum(1).tolist())
            for recipe, loss in zip(recipes, losses[-1], strict=True):
                if not math.isfinite(loss):
                    raise UserError(f"{recipe.name}, step {step}: the loss diverges; lower --lr")
            for tuner in tuners:
                tuner.step()
            state["seconds"] = time.monotonic() - began
            if (step + 1) % 64 == 0 and step + 1 < steps:
                save_state(checkpoint, {**state, "tuners": [state_of(t) for t in tuners]})
            bar.update()
        bar.close()
        finals = run_layers(self.model, measured, tuners).sum(1).tolist()
        moments = self.moments(measured)
        for i, (recipe, tuner) in enumerate(zip(recipes, tuners, strict=True)):
            history = {
                "initial": state["initial"][i],
                "final": finals[i],
                "floor": self.floor(moments, recipe),
                "losses": [step_losses[i] for step_losses in losses],
                "seconds": state["seconds"],
                "trained_together": len(recipes),
            }
            write_json(self.file(recipe).with_suffix(".json"), history)
            tuner.factors.info["trained"] = f"{steps} steps, lr {tuner.lr:g}, batch 1"
            save_factors(self.file(recipe), tuner.factors, self.model, torch.float32)
        checkpoint.unlink(missing_ok=True)

    def moments(self, samples: list[Tensor]) -> Tensor:
        """Mean k k^T and v v^T over the samples' tokens, [layers, 2, d_kv, d_kv]."""
        config = self.model.config
        shape = config.num_hidden_layers, 2, config.d_kv, config.d_kv
        moments = torch.zeros(shape, dtype=torch.float64, device=self.args.device)
        run_layers(self.model, samples, [], moments=moments)
        return moments / sum(sample.numel() for sample in samples)

    def floor(self, moments: Tensor, recipe: Recipe) -> float:
        """The least loss (equation 2) that factors of these ranks can have on those samples."""
        d_kv = self.model.config.d_kv
        ranks = [rank_for(ratio, d_kv) for ratio in (recipe.k_ratio, recipe.v_ratio)]
        floors = [
            loss_floor(m, rank) for layer in moments for m, rank in zip(layer, ranks, strict=True)
        ]
        return sum(floors).item() / d_kv
