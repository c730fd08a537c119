"""How long a decode step takes with each cache, side by side in one process.

    python -m experiments.speed --model weights/SmolLM2-135M-Instruct --lengths 2048,8000
    python -m experiments.speed --shape longchat --lengths 2048,8192       attention of one layer

Every round times all caches one after the other, so that a slow moment of the machine hits all of
them. The rank decides the time, the values of the factors do not, so they are random; `--factors`
files with ranks and bits of their own come on top. The same checkpoint runs in the transformers
package too, if that is there. A `--shape` is a layer with random weights: `decode` of its cache is
timed, without projections and MLP, which are the same for all. In a model the other layers' caches
pass between two steps of a layer, so it does not find its own in the processor's cache: so many
layers take turns here, too, until their full caches are `PASS` bytes.
"""

import support.interrupt  # isort: skip # noqa: F401

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm

from cskv import Factors, init_factors
from experiments import figures
from experiments.caches import Row, add_cache_options, make_cache, make_rows
from experiments.measuring import clock
from experiments.tables import table, write_json
from infer import held_bytes
from model import Config, LayerCache, Transformer
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
from support.text import read_file

# Makes a cache that has read a prompt; adds a token to it.
Runner = tuple[Callable[[], object], Callable[[object], Tensor]]

SHAPES = {  # layers, query heads, key heads, D, theta of RoPE, its linear scaling
    "longchat": (32, 32, 32, 128, 1e4, 8.0),  # LongChat-7B-v1.5-32k
    "mistral": (32, 32, 8, 128, 1e6, 1.0),  # Mistral-7B-Instruct-v0.2
    "smollm2": (30, 9, 3, 64, 1e5, 1.0),  # SmolLM2-135M
    "teacher": (4, 2, 2, 32, 1e6, 1.0),  # the embedded model
}
PASS = 2**27  # several times what a processor keeps
COLUMNS = ("text", "context", "factors", "of_full")  # of experiments.evaluate's rows


def layers_in_turn(name: str, tokens: int, dtype: torch.dtype) -> int:
    """How many layers of that shape: those of the model, but no more than `PASS` bytes."""
    layers, _, H_kv, D, _, _ = SHAPES[name]
    return min(layers, -(-PASS // (2 * tokens * H_kv * D * dtype.itemsize)))


def shape_config(name: str, tokens: int, layers: int = 1) -> Config:
    """Layers of that shape, for so many tokens, and next to nothing beside their attention."""
    _, H, H_kv, D, theta, factor = SHAPES[name]
    return Config(
        vocab_size=1,
        hidden_size=H * D,
        intermediate_size=1,
        num_hidden_layers=layers,
        num_attention_heads=H,
        num_key_value_heads=H_kv,
        head_dim=D,
        rms_norm_eps=1e-5,
        rope_theta=theta,
        rope_scaling={"rope_type": "linear", "factor": factor},
        max_position_embeddings=tokens,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        sliding_window=None,
        eos_token_ids=(),
    )


def rows_to_time(args: argparse.Namespace, model: Transformer) -> list[Row]:
    """The full cache, and rows of `make_rows` with random factors, in numbers of the model's type;
    then those of `--factors`, which keep their own bits."""

    def random_factors(init: str, rank: int) -> Factors:
        ranks = [rank] * len(model.model.layers)
        return init_factors(init, model, ranks, ranks)

    settings = {"window": args.window, "sinks": args.sinks, "dtype": model.lm_head.weight.dtype}
    names = list(dict.fromkeys(["full", *args.caches]))
    own = {"inits": ["random"], "bits": args.bits, "group": args.group or None}
    made = make_rows(model, names, args.ratios, random_factors, **own, **settings)
    rows = [replace(row, origin="") for row in made]
    if args.factors:
        files = [(file.stem, load_factors(file, model)) for file in args.factors]
        rows += make_rows(model, ["cskv"], [], random_factors, files=files, **settings)
    return rows


def our_runners(
    model: Transformer, rows: list[Row], prompt: Tensor, expected: int
) -> dict[str, Runner]:
    """A runner for each cache, by its label; `prompt` is [1, T], and there are `expected` tokens in
    the end."""

    def start(row: Row) -> list[LayerCache]:
        cache = make_cache(model, row, expected)
        model(prompt, cache, logits_to_keep=1)
        return cache

    def step(cache: list[LayerCache]) -> Tensor:
        return model(prompt[:, :1], cache)

    return {row.label: (partial(start, row), step) for row in rows}


def layer_runners(
    model: Transformer, rows: list[Row], tokens: int, expected: int, layers: int = 1
) -> dict[str, Runner]:
    """The same for the first layers alone, which remember random numbers and attend to them."""
    config, weight = model.config, model.lm_head.weight
    H, H_kv, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    generator = torch.Generator(weight.device).manual_seed(0)
    like = {"generator": generator, "device": weight.device, "dtype": weight.dtype}
    model.rope.reach(expected, weight.device)

    def inputs(n: int) -> list[Tensor]:
        """x, q, k and v of n tokens."""
        shapes = [(1, n, H * D), (1, H, n, D), (1, H_kv, n, D), (1, H_kv, n, D)]
        return [torch.randn(shape, **like) for shape in shapes]

    prompt = inputs(tokens)
    token = inputs(1)

    def start(row: Row) -> list[LayerCache]:
        cache = make_cache(model, row, expected)[:layers]
        for layer in cache:
            layer.remember(*prompt, model.rope)
        return cache

    def step(cache: list[LayerCache]) -> Tensor:
        for layer in cache:
            out = layer.decode(*token, model.rope)
        return out

    return {row.label: (partial(start, row), step) for row in rows}


def their_runners(model: torch.nn.Module, prompt: Tensor) -> dict[str, Runner]:
    """A runner for the full cache of the transformers package and, where the package hqq is
    installed, for its quantized one in 4 and in 2 bits; `model` is one of theirs.

    hqq packs 4 groups of 64 numbers together and fails where keys do not come out even, so the
    quantized ones are there only for a prompt [1, T] of such a length.
    """
    from transformers import DynamicCache, QuantizedCache

    def start(make: Callable[[], object]) -> object:
        cache = make()
        model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def step(cache: object) -> Tensor:
        return model(prompt[:, :1], past_key_values=cache, use_cache=True).logits

    runners = {"transformers, DynamicCache": (partial(start, DynamicCache), step)}
    numbers = prompt.shape[1] * model.config.num_key_value_heads * model.config.head_dim
    if find_spec("hqq") and numbers % 256 == 0:
        for bits in (4, 2):
            axes = {"axis_key": 1, "axis_value": 1}  # the only ones that this backend has
            make = partial(QuantizedCache, "hqq", model.config, nbits=bits, **axes)
            runners[f"transformers, QuantizedCache {bits} bits"] = (partial(start, make), step)
    return runners


def load_theirs(path: str, device: str, dtype: torch.dtype) -> torch.nn.Module | None:
    """The same checkpoint in the transformers package, if that is installed."""
    if not find_spec("transformers"):
        say("transformers is not installed: ours only")
        return None
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()


@torch.inference_mode()  # as `infer.generate`
def compare(
    runners: dict[str, Runner], tokens: int, rounds: int, steps: int, device: str, layers: int = 1
) -> list[dict]:
    """A row for each runner, whose prompt has so many tokens: the milliseconds of a decode step, in
    the median of the rounds, their ratio to those of "full", and the megabytes that a cache of ours
    holds; of one of so many layers."""
    names = list(runners)
    caches = {name: start() for name, (start, _) in runners.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)  # no one always runs behind the same one
    for _ in tqdm(range(rounds + 1), leave=False):
        for name in order.sample(names, len(names)):
            step = runners[name][1]
            began = clock(device)
            for _ in range(steps):
                step(caches[name])
            times[name].append(1e3 * (clock(device) - began) / steps / layers)
    ms = {name: median(of_rounds[1:]) for name, of_rounds in times.items()}  # one to warm up
    rows = []
    for name, cache in caches.items():
        held = held_bytes(cache) / layers / 1e6 if isinstance(cache, list) else None
        row = {"cache": name, "tokens": tokens, "decode_ms": ms[name]}
        rows.append({**row, "decode_ratio": ms[name] / ms["full"], "cache_mb": held})
    return rows


def read_scores(files: list[Path], factors: list[Path]) -> list[dict]:
    """Rows of experiments.evaluate with perplexity over the full cache's, of these factors."""
    names = [file.stem for file in factors]
    scores = []
    for path in files:
        text = read_file(path)
        try:
            rows = [{name: row[name] for name in COLUMNS} for row in json.loads(text)]
        except (ValueError, TypeError, KeyError) as error:
            made = "what `experiments.evaluate perplexity --caches full,cskv ... --json` wrote"
            raise UserError(f"{path} has no perplexities ({error}); give {made}") from None
        scores += [row for row in rows if row["factors"] in names]
    if files and not scores:
        raise UserError("--scores has no rows of these --factors; give files of the same names")
    return scores


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed."""
    use_device(args.device)
    read = {str(file): file for file in (*args.factors, *args.scores)}
    check_files({"--json": args.json, "--picture": args.picture}, read, args.model)
    if args.scores and not args.picture:
        raise UserError("--scores are for a picture; give --picture FILE.png, or leave them out")
    scores = read_scores(args.scores, args.factors)
    if args.picture:
        figures.pyplot()  # if it is missing, that is known before the work and not after
    dtype = DTYPES[args.dtype]
    more = (args.rounds + 1) * args.steps  # a round warms up
    longest = max(args.lengths) + more
    theirs = None
    if args.shape:
        most = args.layers or layers_in_turn(args.shape, min(args.lengths), dtype)
        model = Transformer(shape_config(args.shape, longest, most)).to(args.device, dtype)
    elif args.model:
        model = load_model(args.model, args.device, dtype)
        if longest > model.config.context_length:
            raise UserError(f"{longest} tokens exceed the context of {model.config.context_length}")
        theirs = load_theirs(args.model, args.device, dtype)
    else:
        raise UserError("give a checkpoint, --model FOLDER, or a --shape without weights")
    caches = rows_to_time(args, model)
    rows = []
    for n in args.lengths:
        layers = 1
        if args.shape:
            layers = args.layers or layers_in_turn(args.shape, n, dtype)
            runners = layer_runners(model, caches, n, n + more, layers)
        else:
            generator = torch.Generator().manual_seed(0)
            prompt = torch.randint(model.config.vocab_size, (1, n), generator=generator)
            prompt = prompt.to(args.device)
            runners = our_runners(model, caches, prompt, n + more)
            if theirs:
                runners |= their_runners(theirs, prompt)
        rows += compare(runners, n, args.rounds, args.steps, args.device, layers)
    print(table(rows))
    write_json(args.json, rows)
    if args.picture and scores:
        tokens = max(args.lengths)
        ratios = {row["cache"]: row["decode_ratio"] for row in rows if row["tokens"] == tokens}
        times = {row.origin: ratios[row.label] for row in caches}
        figures.scores_against_time(scores, times, tokens, args.picture)
    elif args.picture:
        figures.time_against_tokens(rows, args.picture)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__)
    add_cache_options(parser)
    parser.set_defaults(bits="16,4")
    add, count = parser.add_argument, number(int, 1)
    add("--model", help="time this checkpoint, a folder or a hub name")
    add("--shape", choices=SHAPES, help="time one layer of this shape, with random weights")
    add("--layers", type=count, help="let so many layers of a --shape take turns")
    add("--lengths", type=comma_list(count), default="2048", help="prefill so many tokens (2048)")
    add("--group", type=number(int, 0), default=0, help="let so many tokens share a scale")
    add("--rounds", type=count, default=5, help="time so many rounds (default: 5)")
    add("--steps", type=count, default=8, help="decode so many tokens a round (default: 8)")
    add("--device", default="cpu", help="compute on cpu or cuda")
    add("--dtype", choices=DTYPES, default="float32", help="compute in it (default: float32)")
    add("--json", type=Path, help="write the rows to this file")
    add("--picture", type=Path, help="draw milliseconds against tokens, a PNG")
    help = "draw perplexity against time instead, that of --factors in the JSON of evaluate"
    add("--scores", type=Path, nargs="+", default=[], help=help)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
