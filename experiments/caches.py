"""The caches that are compared, by name: the paper's Table 1, KIVI, and the full cache.

    full        every key and value
    streaming   StreamingLLM: 4 sinks and the newest tokens          1 - ratio of the tokens
    h2o         H2O: the newest tokens and the most attended         1 - ratio of the tokens
    asvd        factors in the place of W_K and W_V themselves       1 - ratio of the channels
    cskv        factors beside W_K and W_V, and a window             1 - ratio of the channels
    kivi-4      KIVI in 4 bits (2, 3 and 8 as well)                  every token and channel

A `Choice` is a row of a table: how to make that cache, empty, for one more sequence.
"""

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

import cskv
import quant
from experiments.baselines import heavy_hitter_cache, kivi_cache, low_rank_cache, streaming_cache
from model import LayerCache, Transformer, UserError, full_cache, number, numbers
from train import calibrate

KIVI = tuple(f"kivi-{bits}" for bits in quant.BITS)
NAMES = ("full", "streaming", "h2o", "asvd", "cskv", *KIVI)


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


def cskv_choice(
    model: Transformer,
    factors: cskv.Factors,
    name: str,
    ratio: float | None = None,
    window: int = 32,
    k_bits: int | None = None,
    v_bits: int | None = None,
    clamped_zero_point: bool = False,
) -> Choice:
    """CSKV with these factors, in their own bits and quantizer unless others are given."""
    bits = k_bits or factors.k_bits, v_bits or factors.v_bits
    clamped_zero_point = clamped_zero_point or factors.clamped_zero_point

    def make(expected: int) -> list[LayerCache]:
        return cskv.bi_branch_cache(model, factors, window, expected, *bits, clamped_zero_point)

    shown = str(bits[0]) if bits[0] == bits[1] else "{}/{}".format(*bits)
    shown += ", clamped zero-point" if clamped_zero_point and min(bits) < 16 else ""
    channels = cskv.nominal_ratio(model, factors)
    nominal = cskv.nominal_ratio(model, factors, *bits)
    return Choice("cskv", make, channels if ratio is None else ratio, nominal, name, shown)


def choices(
    args: argparse.Namespace, model: Transformer, calibration: Callable[[], list[Tensor]]
) -> list[Choice]:
    """The rows that the flags of `add_arguments` ask for, in the order of `--caches`.

    Factors come from `--factors`, or are made by `--inits` from `calibration()`: samples [1, T],
    asked for only if an initialization needs them. Raises `UserError` if two rows would be alike.
    """
    files = [(Path(file).stem, cskv.load_factors(file, model)) for file in args.factors]
    inits = args.inits or ([] if files else ["optimal"])

    @functools.cache
    def statistics() -> list[cskv.Statistics]:
        return calibrate(model, calibration())

    def make_factors(init: str, ratio: float) -> cskv.Factors:
        ranks = [cskv.rank_for(ratio, model.config.d_kv)] * len(model.model.layers)
        seen = statistics() if init in cskv.CALIBRATED else None
        factors = cskv.init_factors(init, model, ranks, ranks, seen, args.seed)
        return factors.to(model.lm_head.weight)

    def pruned(name: str, ratio: float) -> Choice:
        cache = {"streaming": streaming_cache, "h2o": heavy_hitter_cache}[name]
        return Choice(name, partial(cache, model, ratio), ratio, nominal_ratio=ratio)

    def low_rank(ratio: float) -> Choice:
        factors = make_factors("asvd", ratio)
        make = partial(low_rank_cache, model, factors)
        return Choice("asvd", make, ratio, cskv.nominal_ratio(model, factors), "asvd")

    def bi_branch() -> list[Choice]:
        made = [(init, ratio) for ratio in args.ratios for init in inits]
        factors = [(name, None, f) for name, f in files]
        factors += [(init, ratio, make_factors(init, ratio)) for init, ratio in made]
        window, clamped = args.window, args.clamped_zero_point
        return [
            cskv_choice(model, f, name, ratio, window, bits, bits, clamped)
            for name, ratio, f in factors
            for bits in args.bits or [None]  # None: those of the factors
        ]

    rows = []
    for name in args.caches:
        if name == "full":
            rows.append(Choice(name, partial(full_cache, model)))
        elif name in ("streaming", "h2o"):
            rows += [pruned(name, ratio) for ratio in args.ratios]
        elif name == "asvd":
            rows += [low_rank(ratio) for ratio in args.ratios]
        elif name == "cskv":
            rows += bi_branch()
        else:
            bits = int(name.removeprefix("kivi-"))
            make = partial(kivi_cache, model, bits, args.window)
            rows.append(Choice(name, make, nominal_ratio=1 - bits / 16, bits=str(bits)))
    for i, row in enumerate(rows):
        if row.columns in [other.columns for other in rows[:i]]:
            raise UserError(f"two rows for {row.label}; give each once, and each file its own name")
    return rows


def names_of(known: tuple[str, ...], what: str) -> Callable[[str], list[str]]:
    """For argparse's `type`: some of the known names, with commas between them."""

    def read(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                message = f"no {what} {name!r}; choose of {','.join(known)}"
                raise argparse.ArgumentTypeError(message)
        return text.split(",")

    return read


def some_bits(text: str) -> list[int]:
    """For argparse's `type`: bits of a latent, with commas between them."""
    bits = numbers(int, 2, 32)(text)
    if not set(bits) <= {*quant.BITS, 16, 32}:
        raise argparse.ArgumentTypeError(f"{text!r} is not of 2,3,4,8,16,32")
    return bits


def add_arguments(p: argparse.ArgumentParser, caches: str = "full,cskv") -> None:
    """The flags that choose caches, for the command lines of this folder."""

    p.add_argument(
        "--caches",
        type=names_of(NAMES, "cache"),
        default=caches.split(","),
        help=f"of {','.join(NAMES)} (default: {caches})",
    )
    p.add_argument(
        "--ratios",
        type=numbers(float, 0, 0.9999),
        default=[0.5, 0.8],
        help="share removed, of channels or of tokens (default: 0.5,0.8)",
    )
    p.add_argument("--factors", type=Path, nargs="*", default=[], help="factors files for cskv")
    p.add_argument(
        "--inits",
        type=names_of(cskv.INITIALIZATIONS, "initialization"),
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


def held_bytes(cache: list[LayerCache]) -> int:
    return sum(layer.nbytes() for layer in cache)


def full_bytes(model: Transformer, tokens: int) -> int:
    """Bytes of a full cache in 16 bits, what honest ratios compare with."""
    return 2 * 2 * model.config.num_hidden_layers * model.config.d_kv * tokens
