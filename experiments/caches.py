"""The registry of caches that are compared, and the rows of a table that they fill.

To add a cache, write its class and give it a line in `CACHES`: experiments/README.md, "Add a
cache". All can hold 16-bit numbers, in whatever precision the model computes: bytes compare.
"""

import argparse
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, partialmethod
from itertools import product
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import torch
from torch import Tensor

import quant
from beyond.segments import FastCache, SmallWindowCache
from beyond.shared import connect
from cskv import BiBranchCache, Factors, LowRank, init_factors, rank_for
from experiments.baselines import (
    HeavyHitterCache,
    KiviCache,
    LowRankCache,
    StreamingCache,
    TurboQuantCache,
)
from infer import full_bytes, nominal_ratio
from model import FullCache, LayerCache, Rope, Transformer
from support.command import UserError, comma_list, number
from support.processes import say

TOKENS, CHANNELS = "tokens", "channels"  # what a compression ratio removes


@dataclass(frozen=True)
class Kind:
    """How a cache is made. `make` gets the settings of a `Row` as attributes, with the layer's own
    `factors`, its `attention`, the model's `config`, and the `expected` tokens."""

    make: Callable[[SimpleNamespace], LayerCache]
    shrinks: str | None = None  # TOKENS, or CHANNELS, which takes factors
    bits: int = 16
    sinks: bool = False  # whether it can keep the first tokens exact


def bi_branch(cache: type[BiBranchCache], s: SimpleNamespace) -> BiBranchCache:
    """A cache of latents and a window."""
    return cache(s.attention, s.factors, s.window, s.expected, s.sinks)


def kivi(bits: int, s: SimpleNamespace) -> KiviCache:
    """KIVI: every token and channel, in few bits."""
    return KiviCache(s.config, bits, s.window, s.expected, s.sinks)


def turboquant(bits: int, s: SimpleNamespace) -> TurboQuantCache:
    """TurboQuant: every token and channel, rotated at random, in few bits."""
    return TurboQuantCache(s.config, bits, s.expected)


CACHES = {
    # Every key and value.
    "full": Kind(lambda s: FullCache(s.config, s.expected)),
    # StreamingLLM: 4 sinks and the newest tokens.
    "streaming": Kind(lambda s: StreamingCache(s.config, s.ratio, s.budget), TOKENS),
    # H2O: the newest tokens and the most attended.
    "h2o": Kind(lambda s: HeavyHitterCache(s.config, s.ratio, s.budget), TOKENS),
    # Factors in the place of W_K and W_V themselves.
    "asvd": Kind(lambda s: LowRankCache(s.attention, s.factors, s.expected), CHANNELS),
    # Factors beside W_K and W_V, and a window: the fast cache, the paper's, and the fast one with
    # its full-precision branch in 8 bits.
    "cskv": Kind(partial(bi_branch, FastCache), CHANNELS, sinks=True),
    "cskv-plain": Kind(partial(bi_branch, BiBranchCache), CHANNELS, sinks=True),
    "cskv-window-8": Kind(partial(bi_branch, SmallWindowCache), CHANNELS, sinks=True),
    "kivi-2": Kind(partial(kivi, 2), bits=2, sinks=True),
    "kivi-4": Kind(partial(kivi, 4), bits=4, sinks=True),
    "turboquant-2": Kind(partial(turboquant, 2), bits=2),
    "turboquant-3": Kind(partial(turboquant, 3), bits=3),
    "turboquant-4": Kind(partial(turboquant, 4), bits=4),
}


@dataclass(frozen=True)
class Row:
    """A row of a table: a cache with its settings."""

    cache: str  # a name in CACHES
    ratio: float = 0.0  # that was asked for
    nominal_ratio: float = 0.0  # of channels, tokens and bits together, as the paper counts
    factors: Factors | None = None
    origin: str = ""  # of the factors: an initialization, or a file
    window: int = 32  # newest tokens in full precision, of cskv and kivi
    sinks: int = 0  # first tokens in full precision, likewise
    budget: int | None = None  # tokens to keep, in the place of a ratio of them
    dtype: torch.dtype = torch.float32  # of the numbers that the cache holds

    COLUMNS = ("cache", "factors", "bits", "sinks", "ratio", "nominal_ratio")  # of the table

    @property
    def bits(self) -> str:
        """Of a stored number: "4", or "3/8" for keys and values, the mean over the layers."""
        if self.factors is None:
            return str(CACHES[self.cache].bits)
        means = []
        for side in "kv":
            pairs = [getattr(layer, side) for layer in self.factors.layers]
            means.append(f"{fmean(pair.bits_a_token / pair.rank for pair in pairs):.3g}")
        shown = "/".join(dict.fromkeys(means))
        clamped = [pair for pair in self.factors.pairs if pair.clamped and pair.bits < 16]
        return f"{shown}, clamped zero-point" if clamped else shown

    @property
    def columns(self) -> dict:
        """The part of a table's row that says what was measured."""
        columns = {name: getattr(self, name) for name in self.COLUMNS}
        return columns | {"factors": self.origin}

    @property
    def label(self) -> str:
        parts = [self.cache, self.origin]
        if self.ratio:
            parts.append(f"{self.ratio:.0%}")
        if self.factors and self.bits != "16":
            parts.append(f"{self.bits} bits")
        if self.sinks:
            parts.append(f"{self.sinks} sinks")
        return " ".join(part for part in parts if part)


class Rounded(LayerCache):
    """`cache`, given numbers of `dtype` and so holding such, in a model that computes in others.

    A CPU without instructions for 16-bit floats multiplies them several times slower than 32-bit
    ones; so only what the cache does, attention above all, works in `dtype`.
    """

    def __init__(self, cache: LayerCache, dtype: torch.dtype):
        self.cache = cache
        self.dtype = dtype
        self.at_once = cache.at_once
        self.tensors = cache.tensors

    @property
    def length(self) -> int:
        return self.cache.length

    def call(self, name: str, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        inputs = [y.to(self.dtype) for y in (x, q, k, v)]
        out = getattr(self.cache, name)(*inputs, rope)
        return out if out is None else out.to(x.dtype)

    prefill = partialmethod(call, "prefill")
    remember = partialmethod(call, "remember")
    decode = partialmethod(call, "decode")
    extend = partialmethod(call, "extend")


def make_row(
    model: Transformer,
    cache: str,
    ratio: float | None = None,
    factors: Factors | None = None,
    **settings,
) -> Row:
    """A `Row` with its nominal ratio, its factors on the model's device; `settings` are `Row`'s.
    Without a `ratio` it is that of the factors' channels alone, or 0."""
    kind = CACHES[cache]
    if factors is None:
        nominal = (ratio or 0.0) if kind.shrinks else 1 - kind.bits / 16
        return Row(cache, ratio or 0.0, nominal, **settings)
    if ratio is None:
        ratio = nominal_ratio(model, factors.in_bits(16, 16))
    row = Row(cache, ratio, nominal_ratio(model, factors), **settings)
    like = torch.empty(0, dtype=row.dtype, device=model.lm_head.weight.device)
    return replace(row, factors=factors.to(like))


def make_cache(model: Transformer, row: Row, expected: int) -> list[LayerCache]:
    """An empty cache for one batch of sequences, `expected` tokens long in the end."""
    settings = SimpleNamespace(**vars(row))
    settings.config = model.config
    settings.expected = expected
    caches = []
    for i, layer in enumerate(model.model.layers):
        settings.attention = layer.self_attn
        if row.factors:
            settings.factors = row.factors.layers[i]
        caches.append(CACHES[row.cache].make(settings))
    if row.factors:
        connect(caches, row.factors)
    if row.dtype == model.lm_head.weight.dtype:
        return caches
    return [Rounded(cache, row.dtype) for cache in caches]


# ---------------------------------------------------------------------------- rows of a table


def layer_bytes(model: Transformer, row: Row, tokens: int) -> int:
    """Bytes that one layer of the cache really holds after a text of `tokens`."""
    config, weight = model.config, model.lm_head.weight
    cache = make_cache(model, row, tokens)[0]
    x = weight.new_zeros(1, tokens, config.hidden_size)
    q = weight.new_zeros(1, config.num_attention_heads, tokens, config.head_dim)
    kv = weight.new_zeros(1, config.num_key_value_heads, tokens, config.head_dim)
    cache.prefill(x, q, kv, kv, model.rope)
    return cache.nbytes()


def largest_size(
    model: Transformer, ratio: float, tokens: int, of_size: Callable[[int], Row], most: int
) -> int:
    """The largest size in 1 .. `most` whose row holds no more than 1 - `ratio` of a full cache's
    bytes, both after `tokens`. 0 if none does, or if even `most` holds far less."""
    limit = (1 - ratio) * full_bytes(model, tokens) / len(model.model.layers)

    def nbytes(size: int) -> int:
        return layer_bytes(model, of_size(size), tokens)

    size = bisect_right(range(1, most + 1), limit, key=nbytes)
    if size == 0 or (size == most and nbytes(size) < 0.98 * limit):
        say(f"{of_size(most).label}: no size holds those bytes; left out")
        return 0
    return size


def make_rows(
    model: Transformer,
    names: list[str],
    ratios: list[float],
    make_factors: Callable[[str, int], Factors],
    *,
    files: Sequence[tuple[str, Factors]] = (),
    inits: Sequence[str] = (),
    bits: list[int] | None = None,
    group: int | None = None,
    window: int = 32,
    sinks: int = 0,
    dtype: torch.dtype = torch.float32,
    equal: int | None = None,
) -> list[Row]:
    """The rows of a table, in the order of `names`, of `ratios`, of factors and of `bits`.

    Args:
        make_factors: gives factors for one of the `inits` and a rank.
        files: further factors and their names; they have ranks of their own.
        bits: of cskv's latents; None takes those of the factors.
        group: tokens that share a scale, for factors that are made here; None: KIVI's groups.
        equal: a number of tokens, at which `ratios` are of bytes really held: the size of each
            cache, tokens kept or rank, is the largest that holds no more.
    """
    config = model.config
    most_ranks = [min(config.d_kv, config.hidden_size)] * config.num_hidden_layers
    whole = init_factors("random", model, most_ranks, most_ranks) if equal else None
    rows = []

    def row(cache: str, ratio: float | None = None, **settings) -> Row:
        first = sinks if CACHES[cache].sinks else 0
        settings |= {"window": window, "sinks": first, "dtype": dtype}
        return make_row(model, cache, ratio, **settings)

    def add_tokens(name: str, ratio: float) -> None:
        def keeping(budget: int) -> Row:
            budget = max(5, budget)  # fewer tokens are no StreamingLLM
            return replace(row(name, ratio, budget=budget), nominal_ratio=1 - budget / equal)

        if not equal:
            rows.append(row(name, ratio))
        elif budget := largest_size(model, ratio, equal, keeping, equal):
            rows.append(keeping(budget))

    def add_channels(name: str, ratio: float, init: str, width: int | None) -> None:
        def in_bits(factors: Factors) -> Row:
            factors = factors.map(lambda pair: replace(pair, group=group))
            return row(name, ratio, factors=factors.in_bits(width, width), origin=init)

        def of_rank(rank: int) -> Row:  # to count bytes with
            return in_bits(whole.map(lambda pair: LowRank(pair.A[:, :rank], pair.B[:rank])))

        rank = rank_for(ratio, config.d_kv)
        if equal:
            rank = largest_size(model, ratio, equal, of_rank, most_ranks[0])
        if rank:
            rows.append(in_bits(make_factors(init, rank)))

    widths = bits or [None]
    for name in names:
        shrinks = CACHES[name].shrinks
        if shrinks is None:
            rows.append(row(name))
        elif shrinks == TOKENS:
            for ratio in ratios:
                add_tokens(name, ratio)
        elif name == "asvd":
            for ratio in ratios:
                add_channels(name, ratio, "asvd", 16)
        else:
            for (file, factors), width in product(files, widths):
                rows.append(row(name, factors=factors.in_bits(width, width), origin=file))
            for ratio, init, width in product(ratios, inits, widths):
                add_channels(name, ratio, init, width)
    if not rows:
        raise UserError("no cache can hold those bytes; choose other --ratios, or a longer --equal")
    shown = [row.columns for row in rows]
    for row in rows:
        if shown.count(row.columns) > 1:
            raise UserError(f"two rows for {row.label}; give each once, and each file its own name")
    return rows


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """The options of `evaluate` and `speed` that choose caches."""
    add = parser.add_argument
    names = comma_list(str, CACHES)
    widths = comma_list(number(int, 1), (*quant.BITS, 16, 32))
    ratios = comma_list(number(float, 0, 0.9999))
    add("--caches", type=names, default="full,cskv", help=f"compare these of {','.join(CACHES)}")
    add("--ratios", type=ratios, default="0.5,0.8", help="remove such shares (default: 0.5,0.8)")
    add("--factors", type=Path, nargs="*", default=[], help="let cskv use these files")
    add("--bits", type=widths, help="store latents in so many: 16,4 (default: the factors')")
    add("--window", type=number(int, 1), default=32, help="keep so many newest tokens exact (32)")
    add("--sinks", type=number(int, 0), default=0, help="keep so many first tokens exact (0)")
