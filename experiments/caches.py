"""The registry of caches that are compared, and the rows of a table that they fill.

    full        every key and value
    streaming   StreamingLLM: 4 sinks and the newest tokens          a ratio removes tokens
    h2o         H2O: the newest tokens and the most attended         a ratio removes tokens
    asvd        factors in the place of W_K and W_V themselves       a ratio removes channels
    cskv-plain  factors beside W_K and W_V, and a window: the paper  a ratio removes channels
    cskv        the same latents, old keys not rebuilt: the fast one a ratio removes channels
    kivi-4      KIVI in 4 bits (2, 3 and 8 as well)                  every token and channel

A `Kind` says how a cache of that name is made; a `Row` is one of them with its settings. All hold
16-bit numbers unless told otherwise, in whatever precision the model computes, so that their bytes
compare. experiments/README.md, "Add a cache", adds one.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from types import SimpleNamespace

import torch

from beyond.segments import FastCache
from cskv import BiBranchCache, Factors, LowRank, init_factors, rank_for
from experiments.baselines import HeavyHitterCache, KiviCache, LowRankCache, StreamingCache
from experiments.rounded import Rounded
from infer import full_bytes, nominal_ratio
from model import FullCache, LayerCache, Transformer
from support.command import UserError, comma_list, one_of
from support.options import add_option, add_options
from support.processes import say

TOKENS, CHANNELS = "tokens", "channels"


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
        pairs, layers = self.factors.pairs, len(self.factors.layers)
        k, v = (f"{sum(pair.bits for pair in pairs[i::2]) / layers:.3g}" for i in (0, 1))
        clamped = any(pair.clamped and pair.bits < 16 for pair in pairs)
        return (k if k == v else f"{k}/{v}") + (", clamped zero-point" if clamped else "")

    @property
    def columns(self) -> dict:
        """The part of a table's row that says what was measured."""
        columns = {name: getattr(self, name) for name in self.COLUMNS}
        return columns | {"factors": self.origin}

    @property
    def label(self) -> str:
        parts = [self.cache, self.origin, f"{self.ratio:.0%}" if self.ratio else ""]
        parts.append(f"{self.bits} bits" if self.factors and self.bits != "16" else "")
        parts.append(f"{self.sinks} sinks" if self.sinks else "")
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Kind:
    """How a cache is made for one layer, what makes it smaller, and its colour in figures.

    `make` gets the settings of a `Row` as attributes, with the layer's own `factors`, its
    `attention` and the model's `config`, and the `expected` tokens in the end.
    """

    make: Callable[[SimpleNamespace], LayerCache]
    shrinks: str | None = None  # what a ratio removes: TOKENS or CHANNELS, which takes factors
    colour: str | None = None  # None: matplotlib chooses
    bits: int = 16
    sinks: bool = False  # whether it can keep the first tokens exact


def kivi(bits: int, colour: str | None = None) -> Kind:
    def make(s: SimpleNamespace) -> LayerCache:
        return KiviCache(s.config, bits, s.window, s.expected, s.sinks)

    return Kind(make, colour=colour, bits=bits, sinks=True)


def bi_branch(cache: type[BiBranchCache], colour: str | None = None) -> Kind:
    def make(s: SimpleNamespace) -> LayerCache:
        return cache(s.attention, s.factors, s.window, s.expected, s.sinks)

    return Kind(make, CHANNELS, colour, sinks=True)


CACHES = {
    "full": Kind(lambda s: FullCache(s.config, s.expected), colour="black"),
    "streaming": Kind(
        lambda s: StreamingCache(s.config, s.ratio, s.expected, s.budget), TOKENS, "tab:gray"
    ),
    "h2o": Kind(
        lambda s: HeavyHitterCache(s.config, s.ratio, s.expected, s.budget), TOKENS, "tab:brown"
    ),
    "asvd": Kind(
        lambda s: LowRankCache(s.attention, s.factors, s.expected), CHANNELS, "tab:orange"
    ),
    "cskv": bi_branch(FastCache, "tab:blue"),
    "cskv-plain": bi_branch(BiBranchCache, "tab:cyan"),
    "kivi-2": kivi(2, "limegreen"),
    "kivi-3": kivi(3),
    "kivi-4": kivi(4, "tab:green"),
    "kivi-8": kivi(8),
}


def make_row(
    model: Transformer, cache: str, ratio: float = 0.0, factors: Factors | None = None, **settings
) -> Row:
    """A `Row` with its nominal ratio, its factors on the model's device; `settings` are `Row`'s."""
    row = Row(cache, ratio, ratio, factors, **settings)
    if factors is not None:
        like = torch.empty(0, dtype=row.dtype, device=model.lm_head.weight.device)
        nominal = nominal_ratio(model, factors)
        return replace(row, factors=factors.to(like), nominal_ratio=nominal)
    kind = CACHES[cache]
    return row if kind.shrinks else replace(row, nominal_ratio=1 - kind.bits / 16)


def make_cache(model: Transformer, row: Row, expected: int) -> list[LayerCache]:
    """An empty cache for one batch of sequences, `expected` tokens long in the end."""
    caches = []
    for i, layer in enumerate(model.model.layers):
        own = {"attention": layer.self_attn, "config": model.config, "expected": expected}
        if row.factors:
            own["factors"] = row.factors.layers[i]
        caches.append(CACHES[row.cache].make(SimpleNamespace(**{**vars(row), **own})))
    if row.dtype == model.lm_head.weight.dtype:
        return caches
    return [Rounded(cache, row.dtype) for cache in caches]


def layer_bytes(model: Transformer, row: Row, tokens: int) -> int:
    """Bytes that one layer of the cache really holds after a text of `tokens`."""
    config, weight = model.config, model.lm_head.weight
    model.rope.reach(tokens, weight.device)
    cache = make_cache(model, row, tokens)[0]
    heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
    q, k, v = (weight.new_zeros(1, n, tokens, config.head_dim) for n in heads)
    cache.prefill(weight.new_zeros(1, tokens, config.hidden_size), q, k, v, model.rope)
    return cache.nbytes()


def largest_size(
    model: Transformer, ratio: float, tokens: int, of_size: Callable[[int], Row], most: int
) -> int:
    """The largest size in 1 .. `most` whose row `of_size(size)` holds no more than 1 - `ratio` of a
    full cache's bytes, both after `tokens`. 0 if none does, or if even `most` holds far less."""
    limit = (1 - ratio) * full_bytes(model, tokens) / len(model.model.layers)
    low, high = 0, most + 1  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        fits = layer_bytes(model, of_size(middle), tokens) <= limit
        low, high = (middle, high) if fits else (low, middle)
    if not low or (low == most and layer_bytes(model, of_size(low), tokens) < 0.98 * limit):
        say(f"{of_size(most).label}: no size holds those bytes; left out")
        return 0
    return low


def make_rows(
    model: Transformer,
    names: list[str],
    ratios: list[float],
    make_factors: Callable[[str, int], Factors],
    *,
    files: Sequence[tuple[str, Factors]] = (),
    inits: Sequence[str] = (),
    bits: list[int] | None = None,
    clamped: bool = False,
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
        bits: of cskv's latents; None takes those of the factors. `clamped`: see quant.py.
        group: tokens that share a scale, for factors that are made here; None: KIVI's groups.
        equal: a number of tokens, at which `ratios` are of bytes really held: the size of each
            cache, tokens kept or rank, is the largest that holds no more.
    """
    d_kv, layers, widths = model.config.d_kv, len(model.model.layers), bits or [None]
    most = min(d_kv, model.config.hidden_size)  # the highest rank

    def row(cache: str, ratio: float = 0.0, factors: Factors | None = None, **more) -> Row:
        more |= {"window": window, "sinks": sinks if CACHES[cache].sinks else 0}
        return make_row(model, cache, ratio, factors, dtype=dtype, **more)

    def token_row(name: str, ratio: float) -> Row | None:
        def keeping(budget: int) -> Row:
            budget = max(5, budget)  # fewer tokens are no StreamingLLM
            return replace(row(name, ratio, budget=budget), nominal_ratio=1 - budget / equal)

        if not equal:
            return row(name, ratio)
        budget = largest_size(model, ratio, equal, keeping, equal)
        return keeping(budget) if budget else None

    def channel_row(name: str, ratio: float, init: str, width: int | None) -> Row | None:
        def shrunk(factors: Factors) -> Row:
            factors = factors.map(lambda pair: replace(pair, group=group))
            return row(name, ratio, factors.in_bits(width, width, clamped), origin=init)

        def of_rank(rank: int) -> Row:
            return shrunk(whole.map(lambda pair: LowRank(pair.A[:, :rank], pair.B[:rank])))

        rank = rank_for(ratio, d_kv)
        if equal:
            whole = init_factors("random", model, *[[most] * layers] * 2)  # to count bytes with
            rank = largest_size(model, ratio, equal, of_rank, most)
        return shrunk(make_factors(init, rank)) if rank else None

    rows = []
    for name in names:
        shrinks = CACHES[name].shrinks
        if shrinks is None:
            rows.append(row(name))
        elif shrinks == TOKENS:
            rows += [token_row(name, ratio) for ratio in ratios]
        elif name == "asvd":
            rows += [channel_row(name, ratio, "asvd", 16) for ratio in ratios]
        else:
            for (file, own), width in product(files, widths):
                ratio = nominal_ratio(model, own.in_bits(16, 16))  # of channels alone
                rows.append(row(name, ratio, own.in_bits(width, width, clamped), origin=file))
            rows += [channel_row(name, *options) for options in product(ratios, inits, widths)]
    rows = [row for row in rows if row]
    if not rows:
        raise UserError("no cache can hold those bytes; choose other --ratios, or a longer --equal")
    shown = [row.columns for row in rows]
    for row in rows:
        if shown.count(row.columns) > 1:
            raise UserError(f"two rows for {row.label}; give each once, and each file its own name")
    return rows


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """The options that choose caches, of `evaluate` and `speed`."""
    names, default = comma_list(one_of(tuple(CACHES), "cache")), ["full", "cskv"]
    add_option(parser, "caches", f"of {','.join(CACHES)}", type=names, default=default)
    add_options(parser, "ratios window sinks")
