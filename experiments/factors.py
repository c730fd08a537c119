"""Factors for the paper's experiments: trained once and together, kept for all commands.

All that are missing share one pass of the frozen model over the samples, since no gradient passes
from one set to another.
"""

import functools
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from cskv import CALIBRATED, Factors, Statistics, init_factors, rank_for
from model import Transformer
from support.command import UserError, user_values
from support.factors_file import fingerprint, load_factors, save_factors
from support.processes import calibrate_together, place
from support.resume import load_state, save_state
from train import Tuner, count_tokens, loss_floor, new_moments, run_layers, train_layers

MEASURED = 32  # samples that losses are measured on, before and after


@dataclass(frozen=True)
class Recipe:
    """Factors to make: an initialization, ranks, and whether and for what they are trained."""

    init: str
    k_ratio: float
    v_ratio: float
    trained: bool = False
    bits: int = 16  # with training: quantization-aware
    clamped: bool = False  # the zero-point; see quant.py
    lr: float | None = None  # other than the store's


def digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


class FactorStore:
    """A model, `samples` [1, T] to calibrate and to train on, and a folder with the factors made so
    far. Losses are measured on the first samples."""

    def __init__(self, model: Transformer, samples: list[Tensor], folder: Path, lr: float = 5e-3):
        self.model = model
        self.samples = samples
        self.folder = folder
        self.measured = samples[:MEASURED]
        self.lr = lr
        # Of all that factors depend on, besides their recipe.
        texts = [sample.tolist() for sample in samples]
        self.key = digest(fingerprint(model), texts, str(model.lm_head.weight.dtype))

    @functools.cached_property
    def statistics(self) -> list[Statistics]:
        return calibrate_together(self.model, self.samples)

    def ranks(self, recipe: Recipe) -> tuple[int, int]:
        """Of keys and values, in every layer."""
        d_kv = self.model.config.d_kv
        return rank_for(recipe.k_ratio, d_kv), rank_for(recipe.v_ratio, d_kv)

    def start(self, recipe: Recipe) -> Factors:
        """The recipe's factors before training, in float32."""
        statistics = self.statistics if recipe.init in CALIBRATED else None
        layers = len(self.model.model.layers)
        with user_values():
            k_rank, v_rank = self.ranks(recipe)
            k_ranks, v_ranks = [k_rank] * layers, [v_rank] * layers
            factors = init_factors(recipe.init, self.model, k_ranks, v_ranks, statistics)
        return factors.in_bits(recipe.bits, recipe.bits, recipe.clamped)

    def factors(self, *recipes: Recipe) -> list[Factors]:
        """Factors for each recipe; what has to be trained first, is. What training measured is in
        their `info`: see `train`."""
        missing = [r for r in dict.fromkeys(recipes) if r.trained and not self.file(r).exists()]
        if missing:
            self.train(missing)
        made = []
        for r in recipes:
            made.append(load_factors(self.file(r), self.model) if r.trained else self.start(r))
        return made

    def file(self, r: Recipe) -> Path:
        name = f"{r.init}-k{r.k_ratio:g}-v{r.v_ratio:g}-{r.bits}bits-lr{r.lr or self.lr:g}"
        if r.clamped:
            name += "-clamped"
        return self.folder / f"{name}-{self.key}.safetensors"

    def train(self, recipes: list[Recipe]) -> None:
        """The paper's training (train.py) for all recipes at once, in one pass over the samples. It
        measures `initial` and `final` losses, their `floor`, and `losses` of every step before its
        update."""
        steps = len(self.samples)
        tuners = [Tuner(self.start(r), steps, r.lr or self.lr) for r in recipes]
        checkpoint = self.folder / f"training-{digest(*[self.file(r).name for r in recipes])}.pt"
        if checkpoint.exists():
            state = load_state(checkpoint, {}, ("losses", "seconds", "initial", "tuners"))
            for tuner, of_tuner in zip(tuners, state["tuners"], strict=True):
                tuner.restore(of_tuner)
        else:
            state = {"losses": [], "seconds": 0.0, "initial": self.losses(tuners)}
        began = time.monotonic() - state["seconds"]
        # Every process has all tuners, and writes the same files, each whole or not at all.
        training = train_layers(self.model, tuners, self.samples)
        left = steps - len(state["losses"])
        for step, losses, _ in tqdm(training, "training", total=left, disable=place()[0] > 0):
            if not losses.isfinite().all():
                raise UserError(f"step {step}: the loss diverges; lower --lr")
            state["losses"].append(losses.sum(1).tolist())
            state["seconds"] = time.monotonic() - began
            if (step + 1) % 64 == 0:
                state["tuners"] = [tuner.state() for tuner in tuners]
                save_state(checkpoint, state)
        finals = self.losses(tuners)
        moments = self.moments()
        for i, (recipe, tuner) in enumerate(zip(recipes, tuners, strict=True)):
            history = {
                "initial": state["initial"][i],
                "final": finals[i],
                "floor": self.floor(moments, recipe),
                "losses": [of_step[i] for of_step in state["losses"]],
                "seconds": state["seconds"],
                "trained_together": len(recipes),
            }
            tuner.factors.info["history"] = json.dumps(history)
            tuner.factors.info["trained"] = f"{steps} steps, lr {tuner.lr:g}, batch 1"
            save_factors(self.file(recipe), tuner.factors, self.model, torch.float32)
        checkpoint.unlink(missing_ok=True)

    def history(self, recipe: Recipe) -> dict:
        """What training measured."""
        (factors,) = self.factors(recipe)
        return json.loads(factors.info["history"])

    def losses(self, tuners: list[Tuner]) -> list[float]:
        return run_layers(self.model, self.measured, tuners).sum(1).tolist()

    def moments(self) -> Tensor:
        """Mean k k^T and v v^T over the tokens that are measured, [layers, 2, d_kv, d_kv]."""
        moments = new_moments(self.model)
        run_layers(self.model, self.measured, [], moments=moments)
        return moments / count_tokens(self.measured)

    def floor(self, moments: Tensor, recipe: Recipe) -> float:
        """The least loss (equation 2) that factors of these ranks can have on those samples."""
        k_rank, v_rank = self.ranks(recipe)
        total = 0.0
        for k_moment, v_moment in moments:
            total += (loss_floor(k_moment, k_rank) + loss_floor(v_moment, v_rank)).item()
        return total / self.model.config.d_kv
