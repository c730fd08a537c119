"""What a frozen model's layers see on text, and factors of all layers from that (cskv.py).

`calibrate` runs the model once over samples; `init_factors` calls an initialization by its name.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import cskv
from cskv import Factors, LayerFactors, LowRank
from model import Attention, LayerCache, Transformer
from support.command import UserError
from support.processes import place, summed


@contextmanager
def layer_hooks(
    model: Transformer, hook: Callable[[int, Tensor, Tensor, Tensor], None], sinks: int = 0
):
    """While the model runs, calls hook(i, x, k, v) for every layer i, all of them in float32.

    x [B, T, hidden] is the layer's input, k and v [B, T, d_kv] are before RoPE and without bias:
    RoPE turns K and K^ alike, and a bias is added to both, so neither changes the loss. The first
    `sinks` tokens are left out: a cache that keeps them exact has no latents of them.
    """

    def of_layer(i: int):
        def call(attention: Attention, args: tuple) -> None:
            x, projections = args[0][:, sinks:], (attention.k_proj, attention.v_proj)
            if x.shape[1]:  # else a sample of sinks alone
                hook(i, x.float(), *(F.linear(x, p.weight).float() for p in projections))

        return call

    layers = model.model.layers
    hooks = [l.self_attn.register_forward_pre_hook(of_layer(i)) for i, l in enumerate(layers)]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def count_tokens(samples: list[Tensor], sinks: int) -> int:
    """Tokens of `samples` [B, T] without the first `sinks` of each. Raises `UserError` if there are
    none."""
    tokens = sum(sample[:, sinks:].numel() for sample in samples)
    if not tokens:
        raise UserError(f"no sample is longer than {sinks} sinks; give longer text, or fewer sinks")
    return tokens


@dataclass
class Statistics:
    """What one layer sees on calibration text: all that `asvd` and `optimal` need to know of it.

    In float64, so that sums in another order, such as those of several processes, are the same. The
    second moments are not centred: the loss has no bias that could absorb a mean.
    """

    x_abs: Tensor  # [hidden]       mean of |x|
    k_moment: Tensor  # [d_kv, d_kv]   mean of k k^T, k before RoPE and without bias
    v_moment: Tensor  # [d_kv, d_kv]   mean of v v^T
    k_metric: Tensor | None = None  # [d_kv, d_kv]   what errors of keys cost; see outputs.py


@torch.no_grad()
def calibrate(
    model: Transformer,
    samples: list[Tensor],
    sinks: int = 0,
    caches: list[LayerCache] | None = None,
) -> list[Statistics]:
    """Runs the frozen model once over `samples` [B, T], shared out among the processes; the first
    `sinks` tokens of each do not count. `caches` that are given stay empty, and may look on.

    Returns one `Statistics` a layer. Raises `UserError` for no samples, or fewer than processes,
    and for keys or values that overflow.
    """
    (rank, count), config, device = place(), model.config, model.lm_head.weight.device
    if len(samples) < count:
        what = f"{len(samples)} samples for {count} processes; start fewer of these"
        raise UserError(what if samples else "no calibration text; give at least one sample")
    counted = count_tokens(samples, sinks)
    shapes = (config.hidden_size,), (config.d_kv, config.d_kv), (config.d_kv, config.d_kv)
    result = [
        Statistics(*(torch.zeros(s, dtype=torch.float64, device=device) for s in shapes))
        for _ in model.model.layers
    ]

    def add(i: int, x: Tensor, k: Tensor, v: Tensor) -> None:
        # [B * T, hidden], [B * T, d_kv] twice
        x, k, v = (y.flatten(0, 1).double() for y in (x, k, v))
        result[i].x_abs += x.abs().sum(0)
        result[i].k_moment += k.T @ k
        result[i].v_moment += v.T @ v

    with layer_hooks(model, add, sinks):
        for tokens in tqdm(samples[rank::count], "calibrating", unit="sample", disable=rank > 0):
            model(tokens.to(device), caches, logits_to_keep=1)
    for i, s in enumerate(result):  # in place: the moments of LongChat-7B are 8.6 GB
        for total in (s.x_abs, s.k_moment, s.v_moment):
            summed(total).div_(counted)
        if not (s.k_moment.isfinite().all() and s.v_moment.isfinite().all()):
            raise UserError(f"keys or values of layer {i} overflow; try another --dtype")
    return result


INITIALIZATIONS = ("random", "svd", "asvd", "optimal", "attention")
CALIBRATED = INITIALIZATIONS[2:]  # they need to know what the layers see


def rank_for(ratio: float, d_kv: int) -> int:
    """The rank that removes the share `ratio` of d_kv channels: the paper's compression ratio."""
    if not 0 <= ratio < 1:
        raise ValueError(f"compression ratio {ratio} is not in [0, 1): 0.8 keeps a fifth")
    return max(1, round((1 - ratio) * d_kv))


def check_ranks(model: Transformer, *ranks: int) -> None:
    """Raises `ValueError` for a rank that the model's key and value projections cannot have."""
    most = min(model.config.d_kv, model.config.hidden_size)
    for rank in ranks:
        if not 1 <= rank <= most:
            raise ValueError(f"rank {rank} is not in 1 .. {most}, the channels of this model")


def equal_ranks(model: Transformer, rank: int | None, ratio: float) -> list[int]:
    """`rank`, or without one the rank of `ratio`, for every layer. Raises `ValueError` if it does
    not fit: before a long calibration, not after."""
    rank = rank or rank_for(ratio, model.config.d_kv)
    check_ranks(model, rank)
    return [rank] * len(model.model.layers)


@torch.no_grad()
def init_factors(
    name: str,
    model: Transformer,
    k_ranks: list[int],
    v_ranks: list[int],
    statistics: list[Statistics] | None = None,
    seed: int = 0,
) -> Factors:
    """Factors of every layer by the initialization `name`, in float32, with a rank for each layer.

    `attention` is `optimal` with value errors weighed by `cskv.output_metric`. The `CALIBRATED`
    ones need the `statistics` of `calibrate`. Raises `ValueError` for an unknown name, for ranks
    that do not fit, and for weights that are not finite.
    """
    layers = len(model.model.layers)
    if not len(k_ranks) == len(v_ranks) == layers:
        raise ValueError(f"{len(k_ranks)} and {len(v_ranks)} ranks for {layers} layers")
    check_ranks(model, *k_ranks, *v_ranks)
    generator = torch.Generator().manual_seed(seed)
    statistics = statistics or [None] * layers
    pairs = [
        LayerFactors(
            init_pair(name, model, i, "k", k_ranks[i], statistics[i], generator),
            init_pair(name, model, i, "v", v_ranks[i], statistics[i], generator),
        )
        for i in range(layers)
    ]
    return Factors(pairs, {"init": name, "trained": "none"})


@torch.no_grad()
def init_pair(
    name: str,
    model: Transformer,
    i: int,
    side: str,
    rank: int,
    seen: Statistics | None = None,
    generator: torch.Generator | None = None,
) -> LowRank:
    """`init_factors` for the keys ("k") or the values ("v") of layer i alone, with what that layer
    has `seen`."""
    if name not in INITIALIZATIONS:
        raise ValueError(f"no initialization {name!r}; choose one of {', '.join(INITIALIZATIONS)}")
    if name in CALIBRATED and seen is None:
        raise ValueError(f"initialization {name!r} needs calibration text")
    check_ranks(model, rank)
    attention = model.model.layers[i].self_attn
    W = getattr(attention, f"{side}_proj").weight.T.float()  # [hidden, d_kv]
    if not W.isfinite().all():
        raise ValueError(f"layer {i}: {side}_proj has weights that are not finite numbers")
    if name == "random":
        return cskv.random_factors(W, rank, generator)
    if name == "svd":
        return cskv.svd_factors(W, rank)
    if name == "asvd":
        return cskv.asvd_factors(W, rank, seen.x_abs.float())
    metric = None
    if name == "attention":
        metric = cskv.output_metric(attention) if side == "v" else seen.k_metric
    return cskv.optimal_factors(W, rank, getattr(seen, f"{side}_moment"), metric)
