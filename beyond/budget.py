"""One budget of bytes over all layers, keys, values and bits, spent where it buys most.

The paper leaves the choice of ratios for single layers, and for keys and values, to the
future. Here each side (the keys or the values) of each layer gets a rank and bits of
its own, without any training, such that a cache has so many bytes and loses as little
as possible.

Take one side first: how to spend its bits on its channels? For Gaussian ones theory
answers with reverse water-filling (Cover and Thomas, "Elements of Information Theory",
section 10.3.3): pour water of one level D over the eigenvalues. A channel with an
eigenvalue above D gets 1/2 log2(eigenvalue / D) bits and keeps an error D, one below is
dropped and keeps all of its own. Then one bit more lowers the error as much in every
channel that has any, so none should be moved. The values of SmolLM2's layer 10 have 192
channels with eigenvalues from 9.0 down to 0.013. With 192 bits a token the level is
0.038: 167 channels lie above, the first gets 3.9 bits, the 32nd 1.8, the 128th 0.6. The
error is 12% of the energy. In 16 bits the same 192 bits hold 12 channels: 57%.

Between sides the rule is the same, if errors are counted in what they cost the model's
answers. But this differs by factors of hundreds, and eigenvalues do not tell. So it is
measured:

1. Calibrate. Factors of all ranks come at once: those of rank r are the first r columns
   of A and rows of B of full rank. They keep the attention's output, beyond/outputs.py.
2. Probe: one side of one layer at a few ranks and bits, all else exact. What it costs is
   the KL divergence, in nats, of the next token's distribution from the exact model's, in
   decode mode. Lower layers see nothing of it: it starts from its layer's stored input.
   Layers that share latents (beyond/shared.py) are one side, probed together.
3. Spend: every side begins with its least choice; then again and again the step is taken
   that lowers the sum of costs most for a byte. That costs add up is assumed, not known.
4. Probe again, around that plan: a side at ranks near its own, all others as planned. What
   it costs more than an exact side is spent on as before.
"""

from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

import quant
from beyond.probes import SIDES, Probe
from beyond.shared import shared_basis, shared_pairs
from cskv import (
    Factors,
    LayerFactors,
    LowRank,
    Statistics,
    Together,
    attention_metric,
    empty_latents,
    in_bits,
    init_pair,
    optimal_factors,
)
from model import Transformer

SHARES = (1 / 24, 1 / 3, 2 / 3, 1)  # of the channels, probed in each of the widths
SHARES_TOGETHER = (1 / 48, 1 / 24, 1 / 12, 1 / 6, 1 / 3, 2 / 3, 1)  # of those of a group of layers
NEAR = (0.6, 0.8, 1.25, 1.6)  # of a planned rank, probed around it
STEP = 4  # ranks to choose from are its multiples

# ------------------------------------------------------------------------------------ 2. probe


def sides_of(layers: int, count: int = 1) -> list[Together]:
    """The keys and the values of every `count` neighbouring layers, fewer in the end."""
    sides = []
    for first in range(0, layers, count):
        for side in SIDES:
            sides.append(Together(side, first, min(count, layers - first)))
    return sides


def probed_ranks(model: Transformer, count: int = 1) -> list[int]:
    """The ranks that are probed of `count` layers together: a few, up to all channels."""
    most = count * model.config.d_kv if count > 1 else full_rank(model)
    shares = SHARES_TOGETHER if count > 1 else SHARES
    ranks = {max(1, STEP * round(share * most / STEP)) for share in shares[:-1]}
    return sorted(ranks | {most})


def full_rank(model: Transformer) -> int:
    """Of one layer's keys or values."""
    return min(model.config.d_kv, model.config.hidden_size)


def cut(pair: LowRank, side: str, rank: int, bits: int) -> LowRank:
    """The first `rank` channels of a pair, in `bits`."""
    pair = replace(pair, A=pair.A[:, :rank], B=pair.B[:rank])
    return in_bits(pair, bits, SIDES[side], False, torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Fitted:
    """What factors of any rank follow from.

    Args:
        seen: statistics of all layers.
        moments: of the groups of layers that share latents.
        group: tokens of a channel that share a scale; None is as in KIVI.
        bases: found so far, for eigenvectors take long.
    """

    model: Transformer
    seen: list[Statistics]
    moments: dict[Together, Tensor] = field(default_factory=dict)
    group: int | None = None
    bases: dict[Together, LowRank] = field(default_factory=dict)

    def pairs(self, side: Together, rank: int, weights: list[float]) -> list[LowRank]:
        """Of all layers of a side, in float32; `weights` are those of `layer_weights`."""
        if side.count == 1:
            seen = self.seen[side.first]
            whole = [init_pair("attention", self.model, side.first, side.side, rank, seen)]
        else:
            if side not in self.bases:
                moment = self.moments[side]
                basis = shared_basis(self.model, side, moment, self.seen, weights)
                self.bases[side] = basis
            whole = shared_pairs(self.model, side, self.bases[side], rank)
        return [replace(pair, group=self.group) for pair in whole]


def layer_weights(probe: Probe, fitted: Fitted, side: Together) -> list[float]:
    """What an error of each layer costs, in nats: what it costs to keep a sixth of its channels
    alone, over what these lose in the layer's own metric."""
    if side.count == 1:
        return [1.0]
    d_kv = probe.model.config.d_kv
    rank = max(1, d_kv // 6)
    weights = []
    for n, i in enumerate(side.layers):
        own = slice(n * d_kv, (n + 1) * d_kv)
        moment = fitted.moments[side][own, own].double()
        attention = probe.model.model.layers[i].self_attn
        metric = attention_metric(attention, side.side, fitted.seen[i])
        W = getattr(attention, f"{side.side}_proj").weight.T.float()
        pair = optimal_factors(W, rank, moment, metric)
        cost = probe.cost(i, {side.side: like_model(pair, probe.model)})
        L = torch.linalg.cholesky(metric.double())
        lost = torch.linalg.eigvalsh(L.T @ moment @ L)[:-rank].clamp(min=0).sum().item()
        weights.append(max(cost, 1e-7) / lost if lost else 1.0)  # a silent layer loses nothing
    return weights


def like_model(pair: LowRank, model: Transformer) -> LowRank:
    like = model.lm_head.weight
    return replace(pair, A=pair.A.to(like), B=pair.B.to(like))


def probe_side(probe: Probe, fitted: Fitted, side: Together, widths: list[int]) -> dict:
    """The `weights` of a side's layers, and its `costs` at all of `probed_ranks`."""
    weights = layer_weights(probe, fitted, side)
    ranks = probed_ranks(probe.model, side.count)
    return {"weights": weights, "costs": side_costs(probe, fitted, side, weights, ranks, widths)}


def side_costs(
    probe: Probe,
    fitted: Fitted,
    side: Together,
    weights: list[float],
    ranks: list[int],
    widths: list[int],
) -> list[list[float]]:
    """What a side costs: for each of the widths in bits a list, for each of the ranks."""
    whole = fitted.pairs(side, ranks[-1], weights)
    whole = [like_model(pair, probe.model) for pair in whole]
    costs = []
    for bits in widths:
        of_ranks = []
        for rank in ranks:
            layers = [{side.side: cut(pair, side.side, rank, bits)} for pair in whole]
            of_ranks.append(probe.cost(side.first, *layers, together=(side,)))
        costs.append(of_ranks)
    return costs


# ------------------------------------------------------------------------------------ 3. spend


@dataclass(frozen=True)
class Choice:
    """What one side of a layer may be kept as, its bytes and what it costs, in nats."""

    rank: int
    bits: int
    nbytes: int
    cost: float


def latent_bytes(
    rank: int, bits: int, side: str, tokens: int, window: int, group: int | None = None
) -> int:
    """Bytes of a side's latents of `tokens`, as a cache really holds them: they are
    laid out in one that has shapes, but no memory."""
    A = torch.empty(0, rank, dtype=torch.float16)
    pair = LowRank(A, A.T, bits, group=group)
    latents = empty_latents(pair, SIDES[side], window, tokens)
    latents.append(torch.empty(1, tokens, rank, device="meta"))
    return sum(tensor.untyped_storage().nbytes() for tensor in latents.tensors())


def choices(
    costs: list[list[float]], nbytes: dict, probed: list[int], widths: list[int]
) -> list[Choice]:
    """All choices of one side from its probed `costs`: those of ranks between are
    interpolated, as straight lines of the logarithm. Full rank in 16 bits costs
    nothing.

    `nbytes` has the bytes of each (rank, bits) to choose from.
    """
    result = []
    for (rank, bits), size in nbytes.items():
        cost = 0.0
        if bits in widths:
            logs = np.log(np.maximum(costs[widths.index(bits)], 1e-9))
            cost = float(np.exp(np.interp(rank, probed, logs)))
        result.append(Choice(rank, bits, size, cost))
    return result


def fall(a: Choice, b: Choice) -> float:
    """How much the cost falls for a byte, from a to b."""
    return (a.cost - b.cost) / (b.nbytes - a.nbytes)


def convex_hull(some: list[Choice]) -> list[Choice]:
    """Of some choices those on the lower convex hull of cost over bytes, up to the
    least cost: each step to the next one buys less for a byte than the step before."""
    kept: list[Choice] = []
    for choice in sorted(some, key=lambda c: (c.nbytes, c.cost)):
        if kept and choice.cost >= kept[-1].cost:
            continue  # more bytes for nothing
        while len(kept) > 1 and fall(kept[-2], kept[-1]) <= fall(kept[-1], choice):
            kept.pop()
        kept.append(choice)
    return kept


def spend(sides: list[list[Choice]], budget: float) -> list[Choice]:
    """A choice for each side, of at most `budget` bytes in all: greedily, so that no
    plan of as many bytes costs less if the choices of every side are convex.

    The first step that the budget does not have ends it, with what is left for the side
    of that step: so more bytes never buy a worse plan. Raises `ValueError` if even the
    least choices are too many bytes.
    """
    hulls = [convex_hull(side) for side in sides]
    plan = [hull[0] for hull in hulls]
    left = budget - sum(choice.nbytes for choice in plan)
    if left < 0:
        raise ValueError(f"the least cache has {-left:.0f} bytes more than that; remove less")
    steps = []
    for s, hull in enumerate(hulls):
        steps += [(fall(a, b), s, b) for a, b in pairwise(hull)]
    for _, s, choice in sorted(steps, key=lambda step: -step[0]):
        left += plan[s].nbytes
        if choice.nbytes > left:
            affordable = [c for c in sides[s] if c.nbytes <= left]
            plan[s] = min(affordable, key=lambda c: c.cost)
            break
        plan[s] = choice
        left -= choice.nbytes
    return plan


def sizes(
    model: Transformer,
    side: Together,
    tokens: int,
    window: int,
    widths: list[int],
    group: int | None,
) -> dict[tuple[int, int], int]:
    """The bytes of each (rank, bits) that a side may be given."""
    least, *_, most = probed_ranks(model, side.count)
    kinds = [(rank, bits) for rank in (*range(least, most, STEP), most) for bits in widths]
    kinds.append((most, 16))
    settings = side.side, tokens, window, group
    if group is None and SIDES[side.side] == quant.CHANNELS:
        return {kind: latent_bytes(*kind, *settings) for kind in kinds}
    # In groups along tokens all channels are alike.
    channel = {bits: latent_bytes(1, bits, *settings) for bits in (*widths, 16)}
    return {(rank, bits): rank * channel[bits] for rank, bits in kinds}


# ------------------------------------------------------------------------------- 4. probe again


def near_ranks(model: Transformer, side: Together, rank: int) -> list[int]:
    """The ranks that are probed around a planned one."""
    least, *_, most = probed_ranks(model, side.count)
    ranks = {STEP * round(share * rank / STEP) for share in NEAR}
    return sorted({min(max(near, least), most) for near in ranks} | {rank})


@dataclass(frozen=True)
class Plan:
    """A choice for each side, after which `costs` at which `ranks`, and its factors.

    Args:
        probe: the texts, read through the factors.
        cost: of the whole plan, measured, in nats.
    """

    choices: list[Choice]
    ranks: list[list[int]]
    costs: list[list[list[float]]]
    factors: Factors
    probe: Probe
    cost: float


@dataclass(frozen=True)
class Planner:
    """Makes plans from costs.

    Args:
        nbytes: of each side, the bytes of each (rank, bits) to choose from.
        weights: of each side, those of `layer_weights`.
    """

    probe: Probe
    fitted: Fitted
    sides: list[Together]
    nbytes: list[dict[tuple[int, int], int]]
    widths: list[int]
    weights: list[list[float]]

    def plan(self, ranks: list[list[int]], costs: list[list[list[float]]], room: float) -> Plan:
        """The best plan of at most `room` bytes, of ranks between those that were probed."""
        all_choices = []
        for probed, of_side, nbytes in zip(ranks, costs, self.nbytes, strict=True):
            between = {}
            for (rank, bits), size in nbytes.items():
                if probed[0] <= rank <= probed[-1] or bits not in self.widths:
                    between[rank, bits] = size
            all_choices.append(choices(of_side, between, probed, self.widths))
        plan = spend(all_choices, room)
        factors = plan_factors(self.fitted, self.sides, plan, self.weights)
        like = self.probe.model.lm_head.weight
        probe = self.probe.around(factors.to(like), self.sides)
        return Plan(plan, ranks, costs, factors, probe, probe.cost(0))

    def costs_around(self, plan: Plan, ranks: list[list[int]], n: int) -> dict:
        """The `costs` of the n-th side more than exact, at these ranks, all others as planned."""
        side = self.sides[n]
        settings = side, self.weights[n], ranks[n], self.widths
        exact = plan.probe.cost(side.first, *[{side.side: None}] * side.count)
        costs = side_costs(plan.probe, self.fitted, *settings)
        return {"costs": [[cost - exact for cost in of_ranks] for of_ranks in costs]}

    def near(self, plan: Plan) -> list[list[int]]:
        """The ranks to probe around a plan."""
        model = self.probe.model
        sides = zip(self.sides, plan.choices, strict=True)
        return [near_ranks(model, side, choice.rank) for side, choice in sides]


def plan_factors(
    fitted: Fitted, sides: list[Together], plan: list[Choice], weights: list[list[float]]
) -> Factors:
    """The factors of a plan, which has a choice for each of the sides, as `weights` has."""
    layers: list[dict] = [{} for _ in fitted.model.model.layers]
    for side, choice, of_layers in zip(sides, plan, weights, strict=True):
        whole = fitted.pairs(side, choice.rank, of_layers)
        for i, pair in zip(side.layers, whole, strict=True):
            layers[i][side.side] = cut(pair, side.side, choice.rank, choice.bits)
    together = tuple(side for side in sides if side.count > 1)
    return Factors([LayerFactors(**pairs) for pairs in layers], {"trained": "none"}, together)
