"""The caches that are compared, by name: the paper's Table 1, KIVI, and the full cache.

    full        every key and value
    streaming   StreamingLLM: 4 sinks and the newest tokens          1 - ratio of the tokens
    h2o         H2O: the newest tokens and the most attended         1 - ratio of the tokens
    asvd        factors in the place of W_K and W_V themselves       1 - ratio of the channels
    cskv        factors beside W_K and W_V, and a window             1 - ratio of the channels
    kivi-4      KIVI in 4 bits (2, 3 and 8 as well)                  every token and channel

A `Choice` is a row of a table: how to make that cache, empty, for one more sequence. All of them
hold 16-bit numbers unless told otherwise, in whatever precision the model computes, so that their
bytes compare.
"""

import argparse
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import cskv
import quant
from experiments.baselines import heavy_hitter_cache, kivi_cache, low_rank_cache, streaming_cache
from infer import full_bytes, nominal_ratio
from model import LayerCache, Rope, Transformer, full_cache
from support.calibration import CALIBRATED, INITIALIZATIONS, calibrate, init_factors, rank_for
from support.command import DTYPES, UserError, comma_list, number, one_of
from support.factors_file import load_factors
from support.processes import say

PRUNED = {"streaming": streaming_cache, "h2o": heavy_hitter_cache}
KIVI = {f"kivi-{bits}": bits for bits in quant.BITS}
LEAST = 5  # tokens to keep at least, when they are chosen by bytes: StreamingLLM's; H2O needs 2
NAMES = ("full", *PRUNED, "asvd", "cskv", *KIVI)


@dataclass(frozen=True)
class Choice:
    """A cache to measure. `make(expected)` gives an empty one for a final length in tokens."""

    cache: str
    make: Callable[[int], list[LayerCache]]
    ratio: float = 0.0  # that was asked for
    nominal_ratio: float = 0.0  # of channels, tokens and bits together, as the paper counts
    factors: str = ""  # what they are: an initialization, or a file
    bits: str = "16"  # of a stored number: "4", or "3/8" for keys and values

    COLUMNS = ("cache", "factors", "bits", "ratio", "nominal_ratio")  # of the table; not a field

    @property
    def columns(self) -> dict:
        """The part of a row that says what was measured."""
        return {name: getattr(self, name) for name in self.COLUMNS}

    @property
    def label(self) -> str:
        parts = [self.cache, self.factors, f"{self.ratio:.0%}" if self.ratio else ""]
        parts.append(f"{self.bits} bits" if self.cache == "cskv" and self.bits != "16" else "")
        return " ".join(part for part in parts if part)


class Held(LayerCache):
    """`cache`, fed with numbers of `dtype` and so holding such, in a model that computes in others.

    A CPU without instructions for 16-bit floats multiplies them several times slower than 32-bit
    ones; so only what the cache does, attention above all, works in `dtype`. A prefill is exact
    then as one of the other caches is, with the same output for all of them, but rounded.
    """

    def __init__(self, cache: LayerCache, dtype: torch.dtype):
        self.cache, self.dtype, self.exact_prefill = cache, dtype, cache.exact_prefill

    @property
    def length(self) -> int:
        return self.cache.length

    def prefill(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        return self.cache.prefill(*(y.to(self.dtype) for y in (x, q, k, v)), rope).to(x.dtype)

    def decode(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        return self.cache.decode(*(y.to(self.dtype) for y in (x, q, k, v)), rope).to(x.dtype)

    def tensors(self) -> list[Tensor]:
        return self.cache.tensors()


class CacheMaker:
    """Makes a `Choice` of every kind for one model, its caches holding numbers of `dtype`."""

    def __init__(self, model: Transformer, dtype: torch.dtype):
        self.model, self.weight = model, model.lm_head.weight
        self.dtype = dtype

    def choice(self, cache: str, make: Callable[[int], list[LayerCache]], *columns) -> Choice:
        """A `Choice` of what `make(expected)` makes; `columns` are its other fields in order."""
        if self.dtype == self.weight.dtype:
            return Choice(cache, make, *columns)
        return Choice(cache, lambda n: [Held(one, self.dtype) for one in make(n)], *columns)

    def full(self) -> Choice:
        return self.choice("full", partial(full_cache, self.model))

    def pruned(self, name: str, ratio: float, budget: int | None = None) -> Choice:
        """StreamingLLM or H2O, by `name`: 1 - `ratio` of a prompt's tokens, or `budget` tokens."""
        make = partial(PRUNED[name], self.model, ratio, budget=budget)
        return self.choice(name, lambda n: make(expected=n), ratio, ratio)

    def kivi(self, bits: int, residual: int = 32) -> Choice:
        make = partial(kivi_cache, self.model, bits, residual)
        return self.choice(f"kivi-{bits}", make, 0.0, 1 - bits / 16, "", str(bits))

    def low_rank(self, factors: cskv.Factors, name: str, ratio: float) -> Choice:
        """Channel shrinking alone, with factors called `name`."""
        make = partial(low_rank_cache, self.model, self.in_dtype(factors))
        return self.choice("asvd", make, ratio, nominal_ratio(self.model, factors), name)

    def bi_branch(
        self,
        factors: cskv.Factors,
        name: str,
        ratio: float | None = None,
        window: int = 32,
        k_bits: int | None = None,
        v_bits: int | None = None,
        clamped_zero_point: bool = False,
    ) -> Choice:
        """CSKV with these factors, in their own bits and quantizer unless others are given."""
        if ratio is None:
            ratio = nominal_ratio(self.model, factors)
        factors = factors.in_bits(k_bits, v_bits, clamped_zero_point)  # before they are rounded
        held = self.in_dtype(factors)

        def make(expected: int) -> list[LayerCache]:
            return cskv.bi_branch_cache(self.model, held, window, expected)

        k, v = factors.layers[0].k, factors.layers[0].v
        shown = str(k.bits) if k.bits == v.bits else f"{k.bits}/{v.bits}"
        shown += ", clamped zero-point" if k.clamped and min(k.bits, v.bits) < 16 else ""
        nominal = nominal_ratio(self.model, factors)
        return self.choice("cskv", make, ratio, nominal, name, shown)

    def in_dtype(self, factors: cskv.Factors) -> cskv.Factors:
        return factors.to(torch.empty(0, dtype=self.dtype, device=self.weight.device))

    # --------------------------------------------------------------------------- equal bytes

    def layer_bytes(self, choice: Choice, tokens: int) -> int:
        """Bytes that one layer of the cache really holds after a text of `tokens`."""
        config, rope = self.model.config, self.model.rope
        rope.reach(tokens, self.weight.device)
        cache = choice.make(tokens)[0]
        x = self.weight.new_zeros(1, tokens, config.hidden_size)
        q, k, v = (
            self.weight.new_zeros(1, heads, tokens, config.head_dim)
            for heads in (config.num_attention_heads, *[config.num_key_value_heads] * 2)
        )
        cache.prefill(x, q, k, v, rope)
        return cache.nbytes()

    def size_for(
        self, ratio: float, tokens: int, of_size: Callable[[int], Choice], most: int
    ) -> int | None:
        """The largest size in 1 .. `most` that holds no more than 1 - `ratio` of a full cache's
        bytes, both after `tokens`. None if no size does, or if even the largest holds far less.
        """
        limit = (1 - ratio) * full_bytes(self.model, tokens) / len(self.model.model.layers)
        low, high = 0, most + 1  # low fits, high does not
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.layer_bytes(of_size(middle), tokens) <= limit
            low, high = (middle, high) if fits else (low, middle)
        if low == most and self.layer_bytes(of_size(low), tokens) < 0.98 * limit:
            return None
        return low or None


def choices(
    args: argparse.Namespace, model: Transformer, calibration: Callable[[], list[Tensor]]
) -> list[Choice]:
    """The rows that the flags of `add_arguments` ask for, in the order of `--caches`.

    Factors come from `--factors`, or are made by `--inits` from `calibration()`: samples [1, T],
    asked for only if an initialization needs them. Raises `UserError` if two rows would be alike.
    """
    maker, d_kv, tokens = CacheMaker(model, DTYPES[args.cache_dtype]), model.config.d_kv, args.equal
    files = [(Path(file).stem, load_factors(file, model)) for file in args.factors]
    inits = args.inits or ([] if files else ["optimal"])
    window, clamped = args.window, args.clamped_zero_point
    if tokens and tokens > model.config.context_length:
        raise UserError(f"--equal {tokens} exceeds the context of {model.config.context_length}")
    statistics = functools.cache(lambda: calibrate(model, calibration()))

    @functools.cache
    def make_factors(init: str, rank: int) -> cskv.Factors:
        ranks = [rank] * len(model.model.layers)
        seen = statistics() if init in CALIBRATED else None
        return init_factors(init, model, ranks, ranks, seen, args.seed)

    def sizes(ratio: float, of_size: Callable[[int], Choice], most: int) -> list[int]:
        """With `--equal`: the size that holds the bytes asked for, or none."""
        size = maker.size_for(ratio, tokens, of_size, most)
        if size is None:
            say(f"{of_size(most).label}: no size holds those bytes; left out")
        return [size] if size else []

    def pruned(name: str, ratio: float) -> list[Choice]:
        if not tokens:
            return [maker.pruned(name, ratio)]

        def of_size(budget: int) -> Choice:
            choice = maker.pruned(name, ratio, max(LEAST, budget))
            return replace(choice, nominal_ratio=1 - budget / tokens)

        return [of_size(budget) for budget in sizes(ratio, of_size, tokens)]

    def shrunk(init: str, ratio: float, row: Callable[[cskv.Factors], Choice]) -> list[Choice]:
        """`row` of factors with the rank that the ratio asks for."""
        if not tokens:
            return [row(make_factors(init, rank_for(ratio, d_kv)))]
        most = min(d_kv, model.config.hidden_size)
        ranks = [most] * len(model.model.layers)
        whole = init_factors("random", model, ranks, ranks)  # of any values, to count bytes

        def of_rank(rank: int) -> Choice:
            return row(whole.map(lambda p: cskv.LowRank(p.A[:, :rank], p.B[:rank])))

        return [row(make_factors(init, rank)) for rank in sizes(ratio, of_rank, most)]

    rows = []
    for name in args.caches:
        if name == "full":
            rows.append(maker.full())
        elif name in KIVI:
            rows.append(maker.kivi(KIVI[name], window))
        elif name in PRUNED:
            rows += [row for ratio in args.ratios for row in pruned(name, ratio)]
        elif name == "asvd":
            for ratio in args.ratios:
                rows += shrunk("asvd", ratio, lambda f, r=ratio: maker.low_rank(f, "asvd", r))
        else:
            widths = args.bits or [None]  # None: those of the factors
            for file, factors in files:
                options = file, None, window
                rows += [maker.bi_branch(factors, *options, b, b, clamped) for b in widths]
            for ratio, init, bits in itertools.product(args.ratios, inits, widths):
                options = init, ratio, window, bits, bits, clamped
                rows += shrunk(init, ratio, lambda f, o=options: maker.bi_branch(f, *o))
    if not rows:
        raise UserError("no cache can hold those bytes; choose other --ratios, or a longer --equal")
    for i, row in enumerate(rows):
        if row.columns in [other.columns for other in rows[:i]]:
            raise UserError(f"two rows for {row.label}; give each once, and each file its own name")
    return rows


some_bits = comma_list(one_of((*quant.BITS, 16, 32), "number of bits"))


def add_arguments(p: argparse.ArgumentParser, caches: str = "full,cskv") -> None:
    """The flags that choose caches, for the command lines of this folder."""

    p.add_argument(
        "--caches",
        type=comma_list(one_of(NAMES, "cache")),
        default=caches.split(","),
        help=f"of {','.join(NAMES)} (default: {caches})",
    )
    p.add_argument(
        "--ratios",
        type=comma_list(number(float, 0, 0.9999)),
        default=[0.5, 0.8],
        help="share removed, of channels or of tokens (default: 0.5,0.8)",
    )
    p.add_argument("--factors", type=Path, nargs="*", default=[], help="factors files for cskv")
    p.add_argument(
        "--inits",
        type=comma_list(one_of(INITIALIZATIONS, "initialization")),
        help="factors to make for cskv: svd,asvd,optimal (default: optimal, without --factors)",
    )
    p.add_argument(
        "--bits", type=some_bits, help="of cskv's latents: 16,4 (default: those of the factors)"
    )
    p.add_argument(
        "--clamped-zero-point",
        action="store_true",
        help="quantize cskv's latents as the paper's published code does; see quant.py",
    )
    p.add_argument(
        "--window",
        type=number(int, 1),
        default=32,
        help="newest tokens in full precision, of cskv and kivi (default: 32)",
    )
    p.add_argument(
        "--equal",
        type=number(int, 1),
        metavar="TOKENS",
        help="take --ratios as measured ones: streaming, h2o, asvd and cskv of --inits get the "
        "size, tokens kept or rank, at which they hold that much less than a full cache of TOKENS",
    )
    p.add_argument(
        "--cache-dtype",
        choices=DTYPES,
        default="bfloat16",
        help="of what caches hold; 16 bits, the default, are what measured ratios count with",
    )
