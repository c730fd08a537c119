"""What the attention makes of keys and values: statistics for factors that keep its output.

`cskv.optimal_factors` keeps every key and every value as well as it can. But what a layer hands on
is a sum over tokens t, o = sum_t p_t v_t, so not every error counts alike. Here p are the attention
probabilities of a query, and t the tokens that it reads through the compressed branch:

Values. The output is off by sum_t p_t (v_t - v^_t), and what is cut from one value may cancel with
    what is cut from another. Cutting is linear: what happens to v happens to u = sum_t p_t v_t.
    So the channels to keep are those of u: its second moment takes the place of the values' own.
Keys. A score is off by q^T R (k_t - k^_t), R being the turn from t to the query. Averaged over all
    distances, R turns each pair of channels into every direction: then q q^T is a multiple of the
    identity for each pair, half of |q_pair|^2. These are a metric for errors of keys, a diagonal.

Both fit into `optimal_factors` (Izenman, 1975), so the factors are in closed form as before.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from beyond.probes import branches
from model import Attention, LayerCache, Rope, Transformer, causal_attention
from support.calibration import Statistics, calibrate
from support.command import UserError
from support.processes import summed

EVERY = 8  # of this many queries one is looked at


class Attended(LayerCache):
    """Attends exactly, and adds up what the queries of its layer read.

    Only queries and tokens that meet through the compressed branch of a cache with this `window`
    and these `sinks` count.
    """

    def __init__(self, attention: Attention, window: int, sinks: int):
        self.attention, self.window, self.sinks = attention, window, sinks
        config = attention.config
        like = {"dtype": torch.float64, "device": attention.k_proj.weight.device}
        self.mass = torch.zeros((), **like)  # sum of p
        self.values = torch.zeros(config.d_kv, config.d_kv, **like)  # sum of u^T u
        self.queries = torch.zeros(config.num_key_value_heads, config.head_dim, **like)  # of p q^2

    def prefill(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        T, sliding_window = x.shape[1], self.attention.config.sliding_window
        q_rotated, k_rotated = rope.rotate(q, 0), rope.rotate(k, 0)
        first = min(self.sinks + self.window, T)  # the first query that reads a compressed token
        at = torch.arange(first, T, EVERY, device=x.device)
        if len(at):
            seen, exact = branches(at, T, self.window, self.sinks, sliding_window)  # [n, T]
            q_at, k_all = q_rotated[:, :, at].float(), k_rotated.float()
            scores = q_at.unflatten(1, (k.shape[1], -1)) @ k_all[:, :, None].transpose(-1, -2)
            scores = scores.masked_fill(~seen, -math.inf) / math.sqrt(k.shape[-1])
            self.add(scores.softmax(-1) * (seen & ~exact), q[:, :, at], x)
        return causal_attention(q_rotated, k_rotated, v, sliding_window)

    def add(self, p: Tensor, q: Tensor, x: Tensor) -> None:
        """p [B, H_kv, G, n, T], of the queries q [B, H, n, D] before RoPE, and x [B, T, hidden]."""
        v = x @ self.attention.v_proj.weight.T  # a bias is added to v and to v^ alike
        u = (p.flatten(1, 3) @ v.float()).flatten(0, 1).double()  # [B * H * n, d_kv]
        q_pairs = q.double().square().unflatten(-1, (2, -1)).mean(-2).repeat(1, 1, 1, 2)
        q_pairs = q_pairs * p.sum(-1).flatten(1, 2)[..., None]  # [B, H, n, D]
        self.mass += p.sum()
        self.values += u.T @ u
        self.queries += q_pairs.sum((0, 2)).unflatten(0, (p.shape[1], -1)).sum(1)


@torch.no_grad()
def calibrate_outputs(
    model: Transformer, samples: list[Tensor], window: int, sinks: int
) -> list[Statistics]:
    """`support.calibration.calibrate`, but with the moment of the values, and the metric for keys,
    that are explained above.

    Raises `UserError` as it does, and for samples in which no token leaves the window.
    """
    caches = [Attended(layer.self_attn, window, sinks) for layer in model.model.layers]
    found = calibrate(model, samples, sinks, caches)
    for i, (own, seen) in enumerate(zip(caches, found, strict=True)):
        mass, values, queries = map(summed, (own.mass, own.values, own.queries))
        if not mass:
            raise UserError("no token leaves the window in any sample; give longer text")
        metric = (queries / queries.mean()).flatten().clamp(min=1e-3).diag()
        if not (values.isfinite().all() and metric.isfinite().all()):
            raise UserError(f"queries or values of layer {i} overflow; try another --dtype")
        found[i] = replace(seen, v_moment=values / mass, k_metric=metric)
    return found
