"""How long prefill and decode take with each cache, side by side in one process.

    python -m experiments.speed --model weights/SmolLM2-135M-Instruct --lengths 2048,8000

Every round times all caches one after the other, so that a slow moment of the machine hits all of
them; what is printed are ratios of medians over the rounds. The rank decides the time, the values
of the factors do not, so they come from `svd`, which needs no text. If the transformers package is
there, the same checkpoint runs in it with its DynamicCache.

Beside the time stands what bounds it, for one decode step: `cache_mb`, the bytes that the cache
holds, nearly all of which a step reads (cskv does not read the latents of its window), and `mflop`,
the multiplications and additions of its matrix products. Both leave something out: a step reads the
weights too, and cskv and asvd their A and B; rotating keys and unpacking bits are no products. With
`--dtype float32`, the default, keys and values are 32-bit numbers, but latents 16-bit ones.
"""

import argparse
import random
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from experiments.caches import KIVI, NAMES, PRUNED, CacheMaker, some_bits
from experiments.measuring import clock, table, write_json
from infer import held_bytes
from model import Transformer
from support.calibration import init_factors, rank_for
from support.checkpoint import load_model
from support.command import (
    DTYPES,
    Arguments,
    UserError,
    check_device,
    check_writable,
    comma_list,
    number,
    one_of,
    run_command,
)

# A runner makes an empty cache; `run(tokens, cache)` feeds it and returns the last logits.
Runner = tuple[Callable[[], object], Callable[[Tensor, object], Tensor]]


def transformers_runner(path: str, device: str, dtype: torch.dtype) -> Runner | None:
    """The same checkpoint in the transformers package, or None without it."""
    try:
        from transformers import AutoModelForCausalLM, DynamicCache
    except ImportError:
        return None
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()

    def run(tokens: Tensor, cache: object) -> Tensor:
        return theirs(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    return DynamicCache, run


def timed(function: Callable[[], object], device: str) -> float:
    """Seconds that `function` takes, its work on a GPU included."""
    start = clock(device)
    function()
    return clock(device) - start


@torch.no_grad()
def measure(
    runners: dict[str, Runner], vocab: int, length: int, args: argparse.Namespace
) -> list[dict]:
    """Rows (cache, length, prefill and decode seconds as medians, and their ratio to `full`)."""
    g = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocab, (1, length), generator=g).to(args.device)
    one = prompt[:, :1]
    prefill, decode = {name: [] for name in runners}, {name: [] for name in runners}
    caches = {}

    def steps(name: str) -> None:
        for _ in range(args.steps):
            runners[name][1](one, caches[name])

    bar = tqdm(total=2 * (args.rounds + 1) * len(runners), desc=f"{length} tokens", leave=False)
    names, order = list(runners), random.Random(0)
    for i in range(args.rounds + 1):  # the first round warms up
        for name in order.sample(names, len(names)):  # no one always runs behind the same one
            make, run = runners[name]
            caches.pop(name, None)  # its memory is free before the next one takes some
            caches[name] = make()
            seconds = timed(lambda run=run, name=name: run(prompt, caches[name]), args.device)
            prefill[name] += [seconds] if i else []
            bar.update()
    for i in range(args.rounds + 1):
        for name in order.sample(names, len(names)):
            seconds = timed(lambda name=name: steps(name), args.device)
            decode[name] += [seconds / args.steps] if i else []
            bar.update()
    bar.close()
    median = statistics.median
    rows = [
        {
            "cache": name,
            "tokens": length,
            "prefill_s": median(prefill[name]),
            "prefill_ratio": median(prefill[name]) / median(prefill["full"]),
            "decode_ms": 1e3 * median(decode[name]),
            "decode_ratio": median(decode[name]) / median(decode["full"]),
            "cache_mb": None,
            "mflop": None,
        }
        for name in runners
    ]
    for row in rows:
        cache = caches[row["cache"]]
        if isinstance(cache, list):  # ours
            row["cache_mb"] = held_bytes(cache) / 1e6
            # The plain form of attention is one whose products can be counted.
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                runners[row["cache"]][1](one, cache)
            row["mflop"] = counter.get_total_flops() / 1e6
    return rows


def our_runners(model: Transformer, length: int, args: argparse.Namespace) -> dict[str, Runner]:
    """A runner for each cache, by its label; caches hold numbers of the model's type."""
    expected = length + (args.rounds + 1) * args.steps + 1
    layers, d_kv = len(model.model.layers), model.config.d_kv
    maker, rows = CacheMaker(model, model.lm_head.weight.dtype), []
    for name in dict.fromkeys(["full", *args.caches]):
        if name == "full":
            rows.append(maker.full())
        elif name in KIVI:
            rows.append(maker.kivi(KIVI[name], args.window))
        for ratio in args.ratios:
            if name in PRUNED:
                rows.append(maker.pruned(name, ratio))
            elif name in ("asvd", "cskv"):
                ranks = [rank_for(ratio, d_kv)] * layers
                factors = init_factors("svd", model, ranks, ranks)
                if name == "asvd":
                    rows.append(maker.low_rank(factors, "", ratio))
                    continue
                for bits in args.bits:
                    rows.append(maker.bi_branch(factors, "", ratio, args.window, bits, bits))

    def run(tokens: Tensor, cache: object) -> Tensor:
        return model(tokens, cache, logits_to_keep=1)

    return {row.label: (partial(row.make, expected), run) for row in rows}


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed."""
    check_device(args.device)
    check_writable(args.json)
    torch.set_num_threads(args.threads)
    dtype = DTYPES[args.dtype]
    model = load_model(args.model, args.device, dtype)
    longest = max(args.lengths) + (args.rounds + 1) * args.steps + 1  # one more is counted
    if longest > model.config.context_length:
        raise UserError(f"{longest} tokens exceed the context of {model.config.context_length}")
    theirs = transformers_runner(args.model, args.device, dtype)
    if theirs is None:
        print("transformers is not installed: ours only", file=sys.stderr)
    rows = []
    for length in args.lengths:
        runners = our_runners(model, length, args)
        if theirs:
            runners["transformers, DynamicCache"] = theirs
        rows += measure(runners, model.config.vocab_size, length, args)
    columns = {"cache": str, "tokens": str, "prefill_s": "{:.2f}".format}
    columns |= {"prefill_ratio": "{:.2f}".format, "decode_ms": "{:.1f}".format}
    columns |= {"decode_ratio": "{:.2f}".format}

    def short(value: float | None) -> str:  # transformers does not say
        return "" if value is None else f"{value:.4g}"

    print(table(rows, columns | {"cache_mb": short, "mflop": short}))
    write_json(args.json, rows)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="checkpoint folder or hub name")
    parser.add_argument(
        "--lengths",
        type=comma_list(number(int, 1)),
        default=[2048],
        help="of the prompt: 2048,8000",
    )
    parser.add_argument(
        "--ratios",
        type=comma_list(number(float, 0, 0.9999)),
        default=[0.5, 0.8],
        help="default: 0.5,0.8",
    )
    parser.add_argument(
        "--caches",
        type=comma_list(one_of(NAMES, "cache")),
        default=["full", "cskv"],
        help=f"of {','.join(NAMES)} (default: full,cskv)",
    )
    parser.add_argument(
        "--bits", type=some_bits, default=[16, 4], help="of cskv's latents (default: 16,4)"
    )
    parser.add_argument(
        "--rounds", type=number(int, 1), default=5, help="timed rounds (default: 5)"
    )
    parser.add_argument("--steps", type=number(int, 1), default=8, help="decode steps of a round")
    parser.add_argument("--window", type=number(int, 1), default=32, help="full-precision tokens")
    parser.add_argument("--threads", type=number(int, 1), default=2, help="default: 2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
