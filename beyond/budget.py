"""One budget of bytes over all layers, keys, values and bits, spent where it buys most.

The paper leaves the choice of ratios for single layers, and for keys and values, to the future.
Here each side (the keys or the values) of each layer gets a rank and bits of its own, without any
training, such that a cache has so many bytes and loses as little as possible.

Take one side first: how to spend its bits on its channels? For Gaussian ones theory answers with
reverse water-filling (Cover and Thomas, "Elements of Information Theory", section 10.3.3): pour
water of one level D over the eigenvalues. A channel with an eigenvalue above D gets
1/2 log2(eigenvalue / D) bits and keeps an error D, one below is dropped and keeps all of its own.
Then one bit more lowers the error as much in every channel that has any, so none should be moved.
The values of SmolLM2's layer 10 have 192 channels with eigenvalues from 9.0 down to 0.013. With 192
bits a token the level is 0.038: 167 channels lie above, the first gets 3.9 bits, the 32nd 1.8, the
128th 0.6. The error is 12% of the energy. In 16 bits the same 192 bits hold 12 channels: 57%.

Between sides the rule is the same, if errors are counted in what they cost the model's answers. But
this differs by factors of hundreds, and eigenvalues do not tell. So it is measured:

1. Calibrate. Factors of all ranks come at once: those of rank r are the first r columns of A and
   rows of B of full rank. They keep the attention's output, beyond/outputs.py.
2. Probe: one side of one layer at a few ranks and bits, all else exact. What it costs is the KL
   divergence, in nats, of the next token's distribution from the exact model's, in decode mode.
   Lower layers see nothing of it: it starts from its layer's stored input. Layers that share
   latents (beyond/shared.py) are one side, probed together. They are unpacked once for all these
   layers, so the rule above can be kept to: channels differ in bits (`water_runs`), and the
   rank alone is chosen. A side of one layer has the same bits in all its channels.
3. Spend: every side begins with its least choice; then again and again the step is taken that
   lowers the sum of costs most for a byte. Costs of ranks between the probed ones lie on straight
   lines of the logarithm. That costs of sides add up is assumed, not known.
4. Probe again, around that plan: a side at ranks near its own, all others as planned. What it costs
   more than an exact side is spent on as before.
"""

from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise, product

import numpy as np
import torch
from torch import Tensor

import cskv
import quant
from beyond.probes import SIDES, Probe
from beyond.shared import shared_basis, shared_pairs
from cskv import Factors, LayerFactors, LowRank, Statistics, Together
from model import Transformer

SHARES = (1 / 24, 1 / 3, 2 / 3, 1)  # of the channels, probed in each of the widths
SHARES_TOGETHER = (1 / 48, 1 / 24, 1 / 12, 1 / 6, 1 / 3, 2 / 3, 1)  # of a group's
NEAR = (0.6, 0.8, 1.25, 1.6)  # of a planned rank, probed around it
STEP = 4  # ranks to choose from are its multiples
WIDTHS = (2, 3, 4)  # in bits
MIXED = 0  # in the place of bits: those of `water_runs`

Costs = dict[tuple[int, int], float]  # of a side at each probed (rank, bits), in nats
Runs = tuple[tuple[int, int], ...]  # (bits, channels), from a side's first channel on

# ------------------------------------------------------------------------- 1. calibrate


def sides_of(layers: int, count: int = 1) -> list[Together]:
    """Keys and values of every `count` neighbouring layers, fewer in the end."""
    sides = []
    for first in range(0, layers, count):
        for side in SIDES:
            sides.append(Together(side, first, min(count, layers - first)))
    return sides


@dataclass(frozen=True)
class Fitted:
    """What factors of any rank follow from.

    Args:
        seen: statistics of all layers.
        group: tokens of a channel that share a scale; None is as in KIVI.
        widths: in bits, that latents are probed in.
        channel_price: of layers that share latents, see `water_runs`.
        moments: of the groups of layers that share latents.
        weights: of the layers of such a group, see `layer_weights`.
        bases: found so far, for eigenvectors take long; and the energies of their channels.
    """

    model: Transformer
    seen: list[Statistics]
    group: int | None = None
    widths: tuple[int, ...] = WIDTHS
    channel_price: float = 0
    moments: dict[Together, Tensor] = field(default_factory=dict)
    weights: dict[Together, list[float]] = field(default_factory=dict)
    bases: dict[Together, tuple[LowRank, Tensor]] = field(default_factory=dict)

    def pairs(self, side: Together, rank: int) -> list[LowRank]:
        """Of all layers of a side, in float32."""
        if side.count == 1:
            i = side.first
            seen = self.seen[i]
            whole = [cskv.init_pair("attention", self.model, i, side.side, rank, seen)]
        else:
            whole = shared_pairs(self.model, side, self.basis(side)[0], rank)
        return [replace(pair, group=self.group) for pair in whole]

    def basis(self, side: Together) -> tuple[LowRank, Tensor]:
        if side not in self.bases:
            settings = self.moments[side], self.seen, self.weights[side]
            basis = shared_basis(self.model, side, *settings)
            self.bases[side] = basis, (self.moments[side] @ basis.A * basis.A).sum(0)
        return self.bases[side]

    def runs(self, side: Together, rank: int, bits: int) -> Runs:
        if bits != MIXED:
            return ((bits, rank),)
        energies = self.basis(side)[1]
        return water_runs(energies, rank, self.widths, self.group, self.channel_price)

    def widths_of(self, side: Together) -> tuple[int, ...]:
        return (MIXED,) if side.count > 1 else self.widths


def water_runs(
    energies: Tensor, rank: int, widths: tuple[int, ...], group: int, channel_price: float = 0
) -> Runs:
    """The bits of a group's first `rank` channels, at the water level at which one more is not
    worth the fewest: to each the width that is least in its error plus the level times its bits.
    A channel costs time, too, and so the level sinks if it is worth `channel_price` bits more: the
    same bytes are spent on fewer channels.

    In b bits the error is scale^2 / 12 (quant.py), and 128 normal numbers have a range of 5.3 times
    their root mean square.
    """
    energies = energies.double().flip(0).cummax(0).values.flip(0)[:rank, None]
    b = torch.tensor(sorted(widths), dtype=torch.float64, device=energies.device)
    errors = (5.3 / (2**b - 1)) ** 2 / 12  # of an energy of 1
    price = quant.bits_per_element(b, group, group)
    level = energies[-1] * (1 - errors[0]) / (price[0] + channel_price)
    best = (energies * errors + level * price).argmin(1)  # falls from channel to channel
    runs = []
    stop = rank
    for n, bits in enumerate(sorted(widths)):
        start = STEP * round((best > n).sum().item() / STEP)
        if stop > start:
            runs.insert(0, (bits, stop - start))
            stop = start
    return tuple(runs)


def cut(pairs: list[LowRank], side: Together, runs: Runs) -> list[LowRank]:
    """The first channels of the pairs of a side, in the bits of these runs."""
    rank = sum(channels for _, channels in runs)
    result = []
    for pair in pairs:
        pair = replace(pair, A=pair.A[:, :rank], B=pair.B[:rank])
        generator = torch.Generator().manual_seed(0)
        pair = cskv.in_bits(pair, runs[-1][0], SIDES[side.side], False, generator)
        result.append(replace(pair, runs=runs if len(runs) > 1 else ()))
    return result


# ----------------------------------------------------------------------------- 2. probe


def probed_ranks(model: Transformer, count: int = 1) -> list[int]:
    """The ranks that are probed of `count` layers together, up to all channels."""
    shares = SHARES
    most = min(model.config.d_kv, model.config.hidden_size)
    if count > 1:
        shares = SHARES_TOGETHER
        most = count * model.config.d_kv
    ranks = {max(1, STEP * round(share * most / STEP)) for share in shares[:-1]}
    return sorted(ranks | {most})


def layer_weights(probe: Probe, fitted: Fitted, side: Together) -> list[float]:
    """What an error of each layer costs, in nats: what it costs to keep a sixth of its
    channels alone, over what these lose in the layer's own metric."""
    d_kv = probe.model.config.d_kv
    rank = max(1, d_kv // 6)
    weights = []
    for n, i in enumerate(side.layers):
        own = slice(n * d_kv, (n + 1) * d_kv)
        moment = fitted.moments[side][own, own].double()
        attention = probe.model.model.layers[i].self_attn
        metric = cskv.attention_metric(attention, side.side, fitted.seen[i])
        W = getattr(attention, f"{side.side}_proj").weight.T.float()
        pair = cskv.optimal_factors(W, rank, moment, metric)
        cost = probe.changed({Together(side.side, i, 1): [pair]}).cost
        L = torch.linalg.cholesky(metric.double())
        dropped = torch.linalg.eigvalsh(L.T @ moment @ L)[:-rank]
        lost = dropped.clamp(min=0).sum().item()
        weight = 1.0  # of a silent layer, which loses nothing
        if lost:
            weight = max(cost, 1e-7) / lost
        weights.append(weight)
    return weights


def side_costs(probe: Probe, fitted: Fitted, side: Together, ranks: list[int]) -> Costs:
    """What a side costs at each of the ranks, in each of its widths in bits."""
    whole = fitted.pairs(side, ranks[-1])
    costs = {}
    for bits in fitted.widths_of(side):
        for rank in ranks:
            pairs = cut(whole, side, fitted.runs(side, rank, bits))
            costs[rank, bits] = probe.changed({side: pairs}).cost
    return costs


def probe_alone(probe: Probe, fitted: Fitted, side: Together) -> dict:
    """The `costs` of a side, all else exact; and the `weights` of its layers."""
    weights = layer_weights(probe, fitted, side) if side.count > 1 else [1.0]
    fitted.weights[side] = weights
    ranks = probed_ranks(probe.model, side.count)
    return {"weights": weights, "costs": side_costs(probe, fitted, side, ranks)}


# ----------------------------------------------------------------------------- 3. spend


@dataclass(frozen=True)
class Choice:
    """What one side of a layer may be kept as, its bytes and what it costs, in nats."""

    rank: int
    bits: int  # or `MIXED`
    nbytes: int
    cost: float
    runs: Runs = ()


@cache
def latent_bytes(
    rank: int, bits: int, side: str, tokens: int, window: int, group: int | None = None
) -> int:
    """Bytes of a side's latents of `tokens`, as a cache really holds them: they are
    laid out in one that has shapes, but no memory."""
    A = torch.empty(0, rank, dtype=torch.float16)
    pair = LowRank(A, A.T, bits, group=group)
    alike = pair.grouping(SIDES[side]).dim == quant.TOKENS  # all channels
    if alike and rank > 1:
        return rank * latent_bytes(1, bits, side, tokens, window, group)
    latents = cskv.empty_latents(pair, SIDES[side], window, tokens)
    latents.append(torch.empty(1, tokens, rank, device="meta"))
    return sum(tensor.untyped_storage().nbytes() for tensor in latents.tensors())


def free_choices(fitted: Fitted, side: Together, tokens: int, window: int) -> list[Choice]:
    """All that a side may be kept as, as if it cost nothing."""
    least, *_, most = probed_ranks(fitted.model, side.count)
    ranks = [*range(least, most, STEP), most]
    result = []
    for rank, bits in [*product(ranks, fitted.widths_of(side)), (most, 16)]:
        size = 0
        runs = fitted.runs(side, rank, bits)
        for width, channels in runs:
            size += latent_bytes(channels, width, side.side, tokens, window, fitted.group)
        result.append(Choice(rank, bits, size, 0.0, runs))
    return result


def with_costs(free: list[Choice], costs: Costs) -> list[Choice]:
    """Those of ranks between the probed ones, with costs on straight lines of the
    logarithm. Full rank in 16 bits costs nothing."""
    probed = sorted({rank for rank, _ in costs})
    result = []
    for choice in free:
        if choice.bits == 16:
            result.append(choice)
        elif probed[0] <= choice.rank <= probed[-1]:
            logs = np.log([max(costs[rank, choice.bits], 1e-9) for rank in probed])
            cost = np.exp(np.interp(choice.rank, probed, logs))
            result.append(replace(choice, cost=float(cost)))
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


@dataclass(frozen=True)
class Plan:
    """A choice for each side, after which costs; its factors, and texts so read."""

    choices: dict[Together, Choice]
    costs: dict[Together, Costs]
    factors: Factors
    probe: Probe


def factors_of(sides: dict[Together, list[LowRank]], count: int) -> Factors:
    """Factors of `count` layers from the pairs of all sides."""
    pairs: list[dict] = [{} for _ in range(count)]
    for side, of_layers in sides.items():
        for i, pair in zip(side.layers, of_layers, strict=True):
            pairs[i][side.side] = pair
    together = tuple(side for side in sides if side.count > 1)
    layers = [LayerFactors(own["k"], own["v"]) for own in pairs]
    return Factors(layers, {"trained": "none"}, together)


def make_plan(
    probe: Probe,
    fitted: Fitted,
    free: dict[Together, list[Choice]],
    probed: dict[Together, dict],
    room: float,
) -> Plan:
    """The best plan of at most `room` bytes, from what was `probed` of each side."""
    costs = {side: probed[side]["costs"] for side in free}
    chosen = spend([with_costs(free[side], costs[side]) for side in free], room)
    plan = dict(zip(free, chosen, strict=True))
    pairs = {}
    for side, choice in plan.items():
        whole = fitted.pairs(side, choice.rank)
        pairs[side] = cut(whole, side, choice.runs)
    factors = factors_of(pairs, len(probe.model.model.layers))
    return Plan(plan, costs, factors, probe.changed(pairs))


# ----------------------------------------------------------------------- 4. probe again


def near_ranks(model: Transformer, side: Together, rank: int) -> list[int]:
    """The ranks that are probed around a planned one."""
    least, *_, most = probed_ranks(model, side.count)
    ranks = {STEP * round(share * rank / STEP) for share in NEAR}
    return sorted({min(max(near, least), most) for near in ranks} | {rank})


def probe_around(plan: Plan, fitted: Fitted, side: Together) -> dict:
    """The `costs` of a side more than exact, near its rank, all others as planned."""
    exact = plan.probe.changed({side: [None] * side.count}).cost
    ranks = near_ranks(fitted.model, side, plan.choices[side].rank)
    costs = side_costs(plan.probe, fitted, side, ranks)
    return {"costs": {kind: cost - exact for kind, cost in costs.items()}}
