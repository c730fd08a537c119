"""Latents shared by layers: more channels to shrink.

The paper shrinks the channels of one layer. Neighbouring layers read nearly the same residual
stream, so their keys are far from independent, and so are their values. Put the channels of g
layers side by side, and shrink them together:

    [ s_1 k_1 L_1 | ... | s_g k_g L_g ]   [T, g d_kv]   V_r: top eigenvectors of its moment
    z = sum_l s_l k_l L_l V_r^(l) = sum_l x_l A_l   [T, r]   one latent of a token for all layers
    k_l ~ z B_l                                              B_l [r, d_kv] is the layer's own

    A_l = s_l W_l L_l V_r^(l)        B_l = V_r^(l)^T L_l^-1 / s_l

V_r^(l) are the rows of V_r for layer l, L_l L_l^T its metric (beyond/outputs.py for keys,
`cskv.output_metric` for values), and s_l^2 what an error of that layer costs the model's answer
(`budget.layer_weights`). Without s_l layers of large numbers would take all channels. The moment
is that of `Moments`. g = 1 is the paper.

z is a sum over layers. A token's latent is needed only when the token has left the window, long
after the last layer of the group has added its part:

    layers 0, 1, 2 share        layer 0    layer 1    layer 2
    token t passes              z = x A    z += x A   z += x A, closed: stored, and packed
    each attends                through latents of tokens that left the window, closed before

The reading side does not change: a layer multiplies with all r channels of the group's latents, be
they rebuilt or not. That is what is paid for the bytes: time.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import cskv
from beyond.outputs import OutputObserver, calibrate_outputs
from beyond.segments import GrowingLatents
from cskv import BiBranchCache, Factors, LowRank, Statistics, Together
from model import Attention, LayerCache, Rope, Transformer
from quant import Packed, read_together
from support.processes import summed


@dataclass(eq=False)
class PackedRuns:
    """Latents whose first channels have more bits: a `Packed` for each run of (bits, channels)."""

    sizes: list[int]  # channels
    parts: list[Packed]

    def append(self, c: Tensor) -> None:
        for part, some in zip(self.parts, c.split(self.sizes, dim=2), strict=True):
            part.append(some)

    def read(self, start: int, stop: int) -> Tensor:
        return read_together(self.parts, start, stop)

    def tensors(self) -> list[Tensor]:
        return [tensor for part in self.parts for tensor in part.tensors()]

    # What tokens tell is the same for all parts.

    @property
    def length(self) -> int:
        return self.parts[0].length

    def until_packed(self) -> int:
        return self.parts[0].until_packed()

    def at_once(self) -> int:
        return self.parts[0].at_once()


@dataclass(eq=False)
class Sum:
    """The latents of a group of layers, and of the tokens that pass it at the moment."""

    latents: GrowingLatents | Packed | PackedRuns
    count: int  # layers
    window: int
    length = 0  # tokens that all layers can read: those before the ones that pass
    added = 0  # layers, to `open`
    open = None  # [B, n, r], the newest tokens' sum so far

    def __post_init__(self):
        self.values: dict[tuple[int, int], Tensor] = {}  # until all have read them


@dataclass(eq=False)
class Part:
    """A layer's way to the latents that it shares, in place of its cache's own."""

    total: Sum
    place: int  # of the layer in the group, from 0

    @property
    def is_last(self) -> bool:
        return self.place + 1 == self.total.count

    @property
    def length(self) -> int:
        """The same for all layers, or the last one would read other latents than those before."""
        return self.total.length

    def append(self, c: Tensor) -> None:
        """c [B, n, r], what the layer adds to the latents of the next n tokens."""
        total = self.total
        if self.place != total.added:
            raise ValueError("layers that share latents take tokens together, in order")
        if self.place == 0:
            total.length = total.latents.length
            total.values.clear()  # what the last layer has not read, for its chunks were others
        total.added += 1
        c = c.to(torch.promote_types(c.dtype, torch.float32))
        total.open = c if self.place == 0 else total.open + c
        if self.is_last:
            total.latents.append(total.open)
            total.added = 0
            total.open = None

    def at_once(self) -> int:
        """No new token may see another one's latent, which is not closed; and all layers must read
        the same packed groups as if the tokens came one by one."""
        latents = self.total.latents
        if not isinstance(latents, GrowingLatents) and latents.until_packed() == 1:
            return 1
        return min(self.total.window, latents.at_once())

    def read(self, start: int, stop: int) -> Tensor:
        """As the group's latents do; dequantized once a step, and not once a layer."""
        values = self.total.values
        if (start, stop) not in values:
            values[start, stop] = self.total.latents.read(start, stop)
        if self.is_last:
            return values.pop((start, stop))
        return values[start, stop]

    def tensors(self) -> list[Tensor]:
        """All of the group's for the last layer, so that they are counted once."""
        return self.total.latents.tensors() if self.is_last else []


def shared_cache(model: Transformer, factors: Factors, *args, **settings) -> list[LayerCache]:
    """`cskv.bi_branch_cache`, whose arguments these are, also for factors with layers that share
    latents."""
    cache = cskv.bi_branch_cache(model, replace(factors, together=()), *args, **settings)
    connect(cache, factors)
    return cache


def connect(caches: list[BiBranchCache], factors: Factors) -> None:
    """Gives the layers of each group one place for their latents, in empty caches."""
    for group in factors.together:
        name = f"c_{group.side}"
        first = caches[group.first]
        latents = getattr(first, name)
        pair = getattr(factors.layers[group.first], group.side)
        if pair.runs:
            parts = [replace(latents, bits=bits) for bits, _ in pair.runs]
            latents = PackedRuns([channels for _, channels in pair.runs], parts)
        total = Sum(latents, group.count, first.window)
        for n, i in enumerate(group.layers):
            setattr(caches[i], name, Part(total, n))


# ------------------------------------------------------------------------- closed form


class Moments:
    """Second moments of a group's keys or values, all layers side by side: [g d_kv, g d_kv].

    Two of them, of traces 1, are added. One counts all tokens alike. In the other a token counts by
    the attention that it gets in these layers when it has left the window: some are never read,
    however large they are. Either of them alone costs more on one kind of text or another. They are
    sums in float64 of products in float32.
    """

    def __init__(self, group: Together, model: Transformer):
        self.count = group.count
        n = group.count * model.config.d_kv
        zero = model.lm_head.weight.new_zeros((), dtype=torch.float64)
        self.plain = zero.repeat(n, n)
        self.read = zero.repeat(n, n)
        self.rows: list[Tensor] = []  # of the text that passes, a layer's each, [tokens, d_kv]
        self.mass = 0

    def add(self, y: Tensor, mass: Tensor) -> None:
        """The next layer's y [B, T, d_kv], and how much attention each token gets there [B, T]."""
        self.rows.append(y.flatten(0, 1).float())
        self.mass = self.mass + mass.flatten().float()
        if len(self.rows) == self.count:
            Y = torch.cat(self.rows, dim=1)
            self.plain += Y.T @ Y
            Y *= self.mass.sqrt()[:, None]
            self.read += Y.T @ Y
            self.rows = []
            self.mass = 0

    def finish(self) -> Tensor:
        total = 0
        for moment in (self.plain, self.read):
            summed(moment)
            total = total + moment / moment.trace().clamp(min=1e-38)
        return total.float()


class GroupObserver(OutputObserver):
    """Also adds the layer's keys and values to the `moments` of its groups."""

    def __init__(self, attention: Attention, *settings, moments: dict[Attention, dict]):
        super().__init__(attention, *settings)
        self.moments = moments[attention]  # by side

    def remember(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> None:
        super().remember(x, q, k, v, rope)
        x = x[:, self.sinks :]
        for side, moments in self.moments.items():
            W = getattr(self.attention, f"{side}_proj").weight
            moments.add(F.linear(x, W), self.attended[:, self.sinks :])


def calibrate_groups(
    model: Transformer, samples: list[Tensor], groups: list[Together], window: int, sinks: int
) -> tuple[list[Statistics], dict[Together, Tensor]]:
    """`calibrate_outputs`, and the moments of groups of layers, in float32.

    The samples are read as often as it takes to have no more bytes of sums at a time than the
    model's weights have, if one group has not.
    """
    result = {}
    most = max([group.count for group in groups], default=1) * model.config.d_kv
    weights = sum(weight.nbytes for weight in model.parameters())
    at_once = max(1, weights // (2 * 8 * most**2))
    for start in range(0, max(1, len(groups)), at_once):
        moments = {group: Moments(group, model) for group in groups[start : start + at_once]}
        of_layer: dict[Attention, dict] = {layer.self_attn: {} for layer in model.model.layers}
        for group, sums in moments.items():
            for i in group.layers:
                of_layer[model.model.layers[i].self_attn][group.side] = sums
        observe = partial(GroupObserver, moments=of_layer)
        seen = calibrate_outputs(model, samples, window, sinks, observe)
        for group, sums in moments.items():
            result[group] = sums.finish()
    return seen, result


def shared_basis(
    model: Transformer, group: Together, moment: Tensor, seen: list[Statistics], weights
) -> LowRank:
    """C [g d_kv, g d_kv] and B of a group, for z = sum_l k_l C_l and k_l ~ z B_l, in float32: a
    rank keeps the first columns and rows. `moment` is that of `Moments`, `seen` are statistics of
    all layers, and `weights` the group's s_l^2."""
    metrics = []
    for i, weight in zip(group.layers, weights, strict=True):
        attention = model.model.layers[i].self_attn
        metrics.append(weight * cskv.attention_metric(attention, group.side, seen[i]))
    metric = torch.block_diag(*metrics)
    # The keys k themselves take the place of the inputs x, and the identity that of W.
    identity = torch.eye(len(moment), device=moment.device)
    return cskv.optimal_factors(identity, len(moment), moment, metric)


def shared_pairs(model: Transformer, group: Together, basis: LowRank, rank: int) -> list[LowRank]:
    """A and B of each layer of a group, with one latent for all, in float32."""
    pairs = []
    C = basis.A[:, :rank].chunk(group.count)  # [d_kv, r] each
    B = basis.B[:rank].chunk(group.count, dim=1)  # [r, d_kv] each
    for n, i in enumerate(group.layers):
        W = getattr(model.model.layers[i].self_attn, f"{group.side}_proj").weight.T.float()
        pairs.append(LowRank(W @ C[n], B[n].contiguous()))  # k_l = x_l W_l
    return pairs
