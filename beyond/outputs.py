"""What the attention makes of keys and values: statistics for factors that keep its output.

`cskv.optimal_factors` keeps every key and every value as well as it can. But what a
layer hands on is a sum over tokens t, o = sum_t p_t v_t, so not every error counts
alike. Here p are the attention probabilities of a query, and t the tokens that it reads
through the compressed branch:

Values. The output is off by sum_t p_t (v_t - v^_t), and what is cut from one value may cancel with
    what is cut from another. Cutting is linear: what happens to v happens to u = sum_t p_t v_t.
    So the channels to keep are those of u: its second moment takes the place of the values' own.
Keys. A score is off by q^T R (k_t - k^_t), R being the turn from t to the query. Averaged over all
    distances, R turns each plane into every direction: then q q^T is a multiple of the identity for
    each plane, half of |q_plane|^2. These are a metric for errors of keys, a diagonal.

Both fit into `optimal_factors` (Izenman, 1975), so the factors are in closed form as before.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from beyond.segments import is_exact
from cskv import Observer, Statistics
from model import Attention, Rope, Transformer, seen_by
from support.command import UserError
from support.processes import calibrate_together, summed

EVERY = 8  # of this many queries one is looked at


class OutputObserver(Observer):
    """Also adds up what the queries of its layer read through the compressed branch of
    a cache with this `window` and these `sinks`."""

    def __init__(self, attention: Attention, see, sinks: int, window: int):
        super().__init__(attention, see, sinks)
        self.window = window
        config = attention.config
        zero = attention.k_proj.weight.new_zeros((), dtype=torch.float64)
        self.mass = zero.clone()  # sum of p
        self.values = zero.repeat(config.d_kv, config.d_kv)  # sum of u^T u
        # sum of p q^2
        self.queries = zero.repeat(config.num_key_value_heads, config.head_dim)

    def remember(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> None:
        super().remember(x, q, k, v, rope)
        T = x.shape[1]
        # The n queries i, of those that read a compressed token.
        first = min(self.sinks + self.window, T)
        i = torch.arange(first, T, EVERY, device=x.device)
        j = torch.arange(T, device=x.device)
        seen = seen_by(i, j, self.sliding_window)  # [n, T]
        compressed = seen & ~is_exact(i, j, self.window, self.sinks)
        # 1. What these queries read: p, and the compressed branch's part of it.
        q_i = rope.rotate(q, 0)[:, :, i].float().unflatten(1, (k.shape[1], -1))
        k_j = rope.rotate(k, 0).float().unsqueeze(2)
        scores = q_i @ k_j.mT / math.sqrt(k.shape[-1])
        p = scores.masked_fill(~seen, -math.inf).softmax(-1)
        p = p * compressed  # [B, H_kv, G, n, T]
        self.attended = p.sum((1, 2, 3))  # how much each token is read, [B, T]
        # 2. Values: u. A bias is added to v and to v^ alike.
        v = F.linear(x, self.attention.v_proj.weight).float()  # [B, T, d_kv]
        u = (p.flatten(1, 3) @ v).flatten(0, 1).double()  # [B * H * n, d_kv]
        # 3. Keys: the energy of each plane of a query, before RoPE, times what it reads.
        power = q[:, :, i].double().square()  # [B, H, n, D]
        power = power.unflatten(-1, (2, -1)).mean(-2).repeat(1, 1, 1, 2)
        power *= p.sum(-1).flatten(1, 2).unsqueeze(-1)
        self.mass += p.sum()
        self.values += u.T @ u
        self.queries += power.sum((0, 2)).unflatten(0, (k.shape[1], -1)).sum(1)


@torch.no_grad()
def calibrate_outputs(
    model: Transformer,
    samples: list[Tensor],
    window: int,
    sinks: int,
    kind: Callable[..., OutputObserver] = OutputObserver,
) -> list[Statistics]:
    """`cskv.calibrate`, but with the moment of the values, and the metric for keys,
    that are explained above. `kind` makes the observer of a layer.

    Raises `UserError` as `calibrate_together` does, and for samples in which no token
    leaves the window.
    """
    observers = []

    def observe(attention: Attention, see, sinks: int) -> OutputObserver:
        observers.append(kind(attention, see, sinks, window))
        return observers[-1]

    result = calibrate_together(model, samples, sinks, observe)
    for i, (layer, statistics) in enumerate(zip(observers, result, strict=True)):
        mass = summed(layer.mass)
        values = summed(layer.values)
        queries = summed(layer.queries)
        if not mass:
            raise UserError("no token leaves the window in any sample; give longer text")
        if not queries.any():  # then no error of a key costs anything
            queries += 1
        metric = (queries / queries.mean()).flatten().clamp(min=1e-3).diag()
        if not (values.isfinite().all() and metric.isfinite().all()):
            raise UserError(f"queries or values of layer {i} overflow; try another --dtype")
        statistics.v_moment = values / mass
        statistics.k_metric = metric
    return result
