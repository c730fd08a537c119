"""How long prefill and decode take with each cache, side by side in one process.

    python -m experiments.speed --model weights/SmolLM2-135M-Instruct --lengths 2048,8000
    python -m experiments.speed --shape longchat --lengths 2048,8192        one layer; see shapes.py

Every round times all caches one after the other, so that a slow moment of the machine hits all of
them. The rank decides the time, the values of the factors do not, so they are random; `--factors`
files with ranks and bits of their own come on top. The same checkpoint runs in the transformers
package too, if that is there.

Beside the time stands what bounds it, for one decode step:

    cache_mb   bytes that the cache holds, nearly all of which a step reads
    read_mb    of a layer alone: those, and the factors A and B
    mflop      millions of multiplications and additions of its matrix products

A step reads the weights too, and rotating keys and unpacking bits are no products. With `--dtype
float32`, the default, keys and values are 32-bit numbers, but latents 16-bit ones.
"""

import support.interrupt  # isort: skip # noqa: F401

import argparse
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from cskv import Factors, init_factors
from experiments import figures
from experiments.caches import Row, add_cache_options, make_cache, make_rows
from experiments.measuring import clock
from experiments.pictures import pyplot
from experiments.shapes import SHAPES, factor_bytes, shape_config, shape_runners
from experiments.tables import table, write_json
from infer import held_bytes
from model import Transformer
from support.command import (
    DTYPES,
    Arguments,
    UserError,
    check_files,
    comma_list,
    number,
    run_command,
    use_device,
)
from support.factors_file import load_factors
from support.huggingface.checkpoint import load_model
from support.processes import say

# Makes an empty cache; reads a prompt into it; adds the prompt's first token and returns logits.
Runner = tuple[Callable[[], object], Callable[[object], None], Callable[[object], Tensor]]


def rows_to_time(
    model: Transformer, names: list[str], ratios: list[float], files=(), bits=None, **settings
) -> list[Row]:
    """The full cache, and rows of `make_rows` with random factors, in numbers of the model's type;
    then those of `files`, which keep their own bits."""

    def random_factors(init: str, rank: int) -> Factors:
        ranks = [rank] * len(model.model.layers)
        return init_factors(init, model, ranks, ranks)

    settings["dtype"] = model.lm_head.weight.dtype
    names = list(dict.fromkeys(["full", *names]))
    made = make_rows(model, names, ratios, random_factors, inits=["random"], bits=bits, **settings)
    given = make_rows(model, ["cskv"], [], random_factors, files=files, **settings) if files else []
    return [*(replace(row, origin="") for row in made), *given]


def our_runners(
    model: Transformer, rows: list[Row], prompt: Tensor, expected: int
) -> dict[str, Runner]:
    """A runner for each cache, by its label; `prompt` is [1, T], and there are `expected` tokens in
    the end."""

    def fill(cache: object) -> None:
        model(prompt, cache, logits_to_keep=1)

    def step(cache: object) -> Tensor:
        return model(prompt[:, :1], cache)

    return {row.label: (partial(make_cache, model, row, expected), fill, step) for row in rows}


def their_runners(model: torch.nn.Module, prompt: Tensor) -> dict[str, Runner]:
    """A runner for the full cache of the transformers package and, where the package hqq is
    installed, for its quantized one in 4 and in 2 bits; `model` is one of theirs.

    hqq packs 4 groups of 64 numbers together and fails where keys do not come out even, so the
    quantized ones are there only for a prompt [1, T] of such a length.
    """
    from transformers import DynamicCache, QuantizedCache

    def fill(cache: object) -> None:
        model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def step(cache: object) -> Tensor:
        return model(prompt[:, :1], past_key_values=cache, use_cache=True).logits

    runners = {"transformers, DynamicCache": (DynamicCache, fill, step)}
    numbers = prompt.shape[1] * model.config.num_key_value_heads * model.config.head_dim
    if find_spec("hqq") and numbers % 256 == 0:
        for bits in (4, 2):
            axes = {"axis_key": 1, "axis_value": 1}  # the only ones that this backend has
            make = partial(QuantizedCache, "hqq", model.config, nbits=bits, **axes)
            runners[f"transformers, QuantizedCache {bits} bits"] = (make, fill, step)
    return runners


def load_theirs(path: str, device: str, dtype: torch.dtype) -> torch.nn.Module | None:
    """The same checkpoint in the transformers package, if that is installed."""
    if not find_spec("transformers"):
        say("transformers is not installed: ours only")
        return None
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()


def interleaved(
    run: Callable[[str], None], names: list[str], rounds: int, device: str
) -> dict[str, float]:
    """Median seconds of `run(name)`, each name once a round. The first of several warms up."""
    times: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)  # no one always runs behind the same one
    for _ in tqdm(range(rounds), leave=False):
        for name in order.sample(names, len(names)):
            start = clock(device)
            run(name)
            times[name].append(clock(device) - start)
    return {name: median(seconds[1:] or seconds) for name, seconds in times.items()}


@torch.no_grad()
def compare(
    runners: dict[str, Runner],
    tokens: int,
    rounds: int,
    steps: int,
    prefills: int,
    device: str,
    caches: dict[str, object],
) -> list[dict]:
    """A row for each runner, whose prompt has so many tokens: medians of the seconds to prefill it
    and of the milliseconds of a decode step, and their ratios to those of "full". `caches` gets the
    cache of each, to look at."""

    def prefill(name: str) -> None:
        make, fill, _ = runners[name]
        caches.pop(name, None)  # its memory is free before the next one takes some
        caches[name] = make()
        fill(caches[name])

    def decode(name: str) -> None:
        step = runners[name][2]
        for _ in range(steps):
            step(caches[name])

    prefill_s = interleaved(prefill, list(runners), prefills, device)
    decode_s = interleaved(decode, list(runners), rounds + 1, device)
    rows = []
    for name, (_, _, step) in runners.items():
        row = {"cache": name, "tokens": tokens}
        row |= {"prefill_s": prefill_s[name], "prefill_ratio": prefill_s[name] / prefill_s["full"]}
        row |= {"decode_ms": 1e3 * decode_s[name] / steps}
        row |= {"decode_ratio": decode_s[name] / decode_s["full"], "cache_mb": None, "mflop": None}
        if isinstance(caches[name], list):  # ours
            row["cache_mb"] = held_bytes(caches[name]) / 1e6
            # The plain form of attention is one whose products can be counted.
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                step(caches[name])
            row["mflop"] = counter.get_total_flops() / 1e6
        rows.append(row)
    return rows


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed."""
    use_device(args.device)
    read = {f"--factors {file}": file for file in args.factors}
    check_files({"--json": args.json, "--picture": args.picture}, read, args.model)
    if args.picture:
        pyplot()  # if it is missing, that is known before the work and not after
    torch.set_num_threads(args.threads)
    dtype = DTYPES[args.dtype]
    settings = {"names": args.caches, "ratios": args.ratios, "bits": args.bits}
    settings |= {"window": args.window, "sinks": args.sinks, "group": args.group or None}
    steps = (args.rounds + 1) * args.steps + 1  # a round warms up, and one step is counted
    sizes = {"rounds": args.rounds, "steps": args.steps, "device": args.device}
    rows = []
    if args.shape:
        for n in args.lengths:
            model = Transformer(shape_config(args.shape, n + steps)).to(args.device, dtype)
            caches = rows_to_time(model, **settings)
            runners, held = shape_runners(model, caches, n, n + steps), {}
            found = compare(runners, n, prefills=1, caches=held, **sizes)
            for row, cache in zip(found, caches, strict=True):
                for name in ("prefill_s", "prefill_ratio", "cache_mb"):
                    del row[name]  # of a layer alone
                nbytes = held_bytes(held[cache.label]) + factor_bytes(cache)
                rows.append({**row, "read_mb": nbytes / 1e6})
    elif args.model is None:
        raise UserError("give a checkpoint, --model FOLDER, or a --shape without weights")
    else:
        model = load_model(args.model, args.device, dtype)
        config, most = model.config, max(args.lengths) + steps
        if most > config.context_length:
            raise UserError(f"{most} tokens exceed the context of {config.context_length}")
        files = [(file.stem, load_factors(file, model)) for file in args.factors]
        caches = rows_to_time(model, files=files, **settings)
        theirs = load_theirs(args.model, args.device, dtype)
        for n in args.lengths:
            generator = torch.Generator().manual_seed(0)
            prompt = torch.randint(config.vocab_size, (1, n), generator=generator).to(args.device)
            runners = our_runners(model, caches, prompt, n + steps)
            if theirs:
                runners |= their_runners(theirs, prompt)
            rows += compare(runners, n, prefills=args.prefills, caches={}, **sizes)
    print(table(rows))
    write_json(args.json, rows)
    if args.picture:
        figures.time_against_tokens(rows, args.picture)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__)
    add_cache_options(parser)
    parser.set_defaults(bits="16,4")
    add, count = parser.add_argument, number(int, 1)
    add("--model", help="time this checkpoint, a folder or a hub name")
    add("--shape", choices=SHAPES, help="time one layer of this shape, with random weights")
    add("--lengths", type=comma_list(count), default="2048", help="prefill so many tokens (2048)")
    add("--group", type=number(int, 0), default=0, help="let so many tokens share a scale")
    add("--rounds", type=count, default=5, help="time so many rounds (default: 5)")
    add("--steps", type=count, default=8, help="decode so many tokens a round (default: 8)")
    add("--prefills", type=count, default=2, help="prefill so often; the first of several warms up")
    add("--threads", type=count, default=2, help="use so many threads (default: 2)")
    add("--device", default="cpu", help="compute on cpu or cuda")
    add("--dtype", choices=DTYPES, default="float32", help="compute in it (default: float32)")
    add("--json", type=Path, help="write the rows to this file")
    add("--picture", type=Path, help="draw milliseconds against tokens, a PNG")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
