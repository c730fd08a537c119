"""How long prefill and decode take with each cache, side by side in one process.

    python -m experiments.speed --model weights/SmolLM2-135M-Instruct --lengths 2048,8000

Every round times all caches one after the other, so that a slow moment of the machine hits all of
them; what is printed are ratios of medians over the rounds. The rank decides the time, the values
of the factors do not, so they come from `svd`, which needs no text; `--factors` files with ranks
and bits of their own come on top. If the transformers package is there, the same checkpoint runs in
it with its DynamicCache and, if the package hqq is there too, with its QuantizedCache.

Beside the time stands what bounds it, for one decode step: `cache_mb`, the bytes that the cache
holds, nearly all of which a step reads (cskv does not read the latents of its window), and `mflop`,
the multiplications and additions of its matrix products. Both leave something out: a step reads the
weights too, and cskv and asvd their A and B; rotating keys and unpacking bits are no products. With
`--dtype float32`, the default, keys and values are 32-bit numbers, but latents 16-bit ones.

`--shape longchat` needs no checkpoint: one layer of that shape; see shapes.py.
"""

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from cskv import init_factors
from experiments import figures
from experiments.caches import add_cache_options, make_cache, make_rows
from experiments.measuring import clock
from experiments.pictures import pyplot
from experiments.shapes import measure_shape
from experiments.tables import table, write_json
from experiments.transformers_runner import Runner, transformers_runners
from infer import held_bytes
from model import Transformer
from support.command import (
    DTYPES,
    Arguments,
    UserError,
    check_writable,
    number,
    run_command,
    use_device,
)
from support.factors_file import load_factors
from support.huggingface.checkpoint import load_model
from support.options import add_option, add_options
from support.shapes import SHAPES


def our_runners(
    model: Transformer,
    names: list[str],
    ratios: list[float],
    n: int,
    files=(),
    bits=None,
    **settings,
) -> dict[str, Runner]:
    """A runner for each cache of up to `n` tokens, by its label; caches hold numbers of the
    model's type. `files` keep their own bits. `settings` are those of `make_rows`."""

    def svd(_: str, rank: int):
        return init_factors("svd", model, *[[rank] * len(model.model.layers)] * 2)

    def run(tokens: Tensor, cache: object) -> Tensor:
        return model(tokens, cache, logits_to_keep=1)

    names, dtype = list(dict.fromkeys(["full", *names])), model.lm_head.weight.dtype
    rows = make_rows(model, names, ratios, svd, inits=["svd"], bits=bits, dtype=dtype, **settings)
    rows = [replace(row, origin="") for row in rows]
    if files:
        rows += make_rows(model, ["cskv"], [], svd, files=files, dtype=dtype, **settings)
    return {row.label: (partial(make_cache, model, row, n), run) for row in rows}


def timed(device: str, function: Callable, *args: object) -> float:
    """Seconds that `function` takes, its work on a GPU included."""
    start = clock(device)
    function(*args)
    return clock(device) - start


@torch.no_grad()
def compare(
    runners: dict[str, Runner], prompt: Tensor, rounds: int, steps: int, prefills: int = 2
) -> list[dict]:
    """A row for each runner: seconds to prefill `prompt` [1, T] and milliseconds of a decode step
    as medians, and their ratios to those of "full". The first of several prefills warms up, and so
    does a round before the `rounds` that count."""
    device, one, caches = prompt.device, prompt[:, :1], {}
    prefill, decode = ({name: [] for name in runners} for _ in range(2))

    def decode_steps(name: str) -> None:
        for _ in range(steps):
            runners[name][1](one, caches[name])

    total = (prefills + rounds + 1) * len(runners)
    bar = tqdm(total=total, desc=f"{prompt.shape[1]} tokens", leave=False)
    order = random.Random(0)  # no one always runs behind the same one
    for _ in range(prefills):
        for name in order.sample(list(runners), len(runners)):
            caches.pop(name, None)  # its memory is free before the next one takes some
            caches[name] = runners[name][0]()
            prefill[name].append(timed(device, runners[name][1], prompt, caches[name]))
            bar.update()
    for _ in range(rounds + 1):
        for name in order.sample(list(runners), len(runners)):
            decode[name].append(timed(device, decode_steps, name) / steps)
            bar.update()
    bar.close()
    rows = []
    for name in runners:
        p, full_p = (median(prefill[key][1:] or prefill[key]) for key in (name, "full"))
        d, full_d = (median(decode[key][1:]) for key in (name, "full"))
        row = {"cache": name, "tokens": prompt.shape[1]}
        row |= {"prefill_s": p, "prefill_ratio": p / full_p}
        row |= {"decode_ms": 1e3 * d, "decode_ratio": d / full_d, "cache_mb": None, "mflop": None}
        if isinstance(caches[name], list):  # ours
            row["cache_mb"] = held_bytes(caches[name]) / 1e6
            # The plain form of attention is one whose products can be counted.
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                runners[name][1](one, caches[name])
            row["mflop"] = counter.get_total_flops() / 1e6
        rows.append(row)
    return rows


def write(rows: list[dict], json: Path | None, picture: Path | None) -> None:
    """The rows as a table on standard output, and to the files that were asked for."""
    print(table(rows))
    write_json(json, rows)
    if picture:
        figures.time_against_tokens(rows, picture)


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed."""
    use_device(args.device)
    check_writable(args.json)
    check_writable(args.picture)
    if args.picture:
        pyplot()  # if it is missing, that is known before the work and not after
    torch.set_num_threads(args.threads)
    dtype = DTYPES[args.dtype]
    settings = {"bits": args.bits, "window": args.window, "sinks": args.sinks}
    settings["group"] = args.group or None
    if args.shape:
        sizes, names = (args.rounds, args.steps, args.device, dtype), ["full", *args.caches]
        settings |= {"names": list(dict.fromkeys(names)), "ratios": args.ratios}
        lengths = args.lengths
        rows = [row for n in lengths for row in measure_shape(args.shape, n, *sizes, **settings)]
        return write(rows, args.json, args.picture)
    if args.model is None:
        raise UserError("give a checkpoint, --model FOLDER, or a --shape without weights")
    model = load_model(args.model, args.device, dtype)
    more = (args.rounds + 1) * args.steps + 1  # one more is counted
    if max(args.lengths) + more > model.config.context_length:
        raise UserError(
            f"{max(args.lengths) + more} tokens exceed the context of {model.config.context_length}"
        )
    theirs = transformers_runners(args.model, args.device, dtype, args.lengths)
    if not theirs:
        print("transformers is not installed: ours only", file=sys.stderr)
    rows, generator = [], torch.Generator()
    files = [(file.stem, load_factors(file, model)) for file in args.factors]
    for length in args.lengths:
        settings["files"] = files
        runners = our_runners(model, args.caches, args.ratios, length + more, **settings)
        runners |= theirs
        drawn = torch.randint(
            model.config.vocab_size, (1, length), generator=generator.manual_seed(0)
        )
        prompt = drawn.to(args.device)
        rows += compare(runners, prompt, args.rounds, args.steps, args.prefills)
    write(rows, args.json, args.picture)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__.splitlines()[0])
    add_cache_options(parser)
    add_options(parser, "model lengths factors bits group", bits=[16, 4], group=0, model=None)
    parser.add_argument("--shape", choices=SHAPES, help="instead of a checkpoint: random weights")
    add_options(parser, "rounds steps threads device dtype json", steps=8)
    prefills = {"type": number(int, 1), "default": 2}
    add_option(parser, "prefills", "the first of several warms up; 1 for long prompts", **prefills)
    add_option(parser, "picture", "draw milliseconds against tokens, a PNG", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
