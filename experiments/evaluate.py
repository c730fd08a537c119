"""Measures what a cache costs in quality.

    python -m experiments.evaluate perplexity --model M --text heldout.txt \
        --calibrate calibration.txt --inits svd,asvd,optimal --ratios 0.5,0.8

    python -m experiments.evaluate longeval --model weights/teacher --lines 20,50,100 --cases 50 \
        --factors weights/teacher/cskv-80.safetensors

Perplexity is measured in decode mode: the first `--context` tokens of a passage are prefilled, the
next `--steps` go through the cache one by one, and only their predictions count. (A single forward
pass over the text would measure nothing: prefill is exact for every cache here.)

Retrieval (`longeval`, `passkey`) has two protocols. In the paper's, `--question prefill`, the whole
prompt is prefilled, so that the first digit is read with exact keys and values. In the harder one,
`--question decode`, the context is prefilled and the question fed to the cache token by token: the
context was compressed before anyone knew what would be asked.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import cskv
from experiments.longeval import Case, is_correct, make_cases
from infer import generate, make_sampler
from model import (
    DTYPES,
    Arguments,
    LayerCache,
    Tokenizer,
    Transformer,
    UserError,
    check_device,
    check_folder,
    full_cache,
    load_model,
    load_tokenizer,
    number,
    numbers,
    replacing,
    run_command,
)
from train import read_documents, sample_tokens

ANSWER_TOKENS = 100  # LongEval's limit
ANSWER_ROOM = 8  # tokens that a number takes; a wordier answer makes the buffers grow


@torch.no_grad()
def decode_nll(model: Transformer, tokens: Tensor, context: int, cache: list[LayerCache]) -> Tensor:
    """Negative log likelihood [B, T - context] of the tokens [B, T] after the first `context`."""
    losses, logits = [], model(tokens[:, :context], cache, logits_to_keep=1)  # [B, 1, vocab]
    for t in range(context, tokens.shape[1]):
        losses.append(F.cross_entropy(logits[:, -1].float(), tokens[:, t], reduction="none"))
        if t + 1 < tokens.shape[1]:
            logits = model(tokens[:, t : t + 1], cache)
    return torch.stack(losses, dim=1)


def passages(ids: list[int], count: int, length: int) -> Tensor:
    """`count` passages of `length` tokens, spread evenly over a text, as [count, length]."""
    if len(ids) < count * length:
        raise UserError(f"the text has {len(ids)} tokens, {count} passages of {length} need more")
    starts = [i * (len(ids) - length) // max(1, count - 1) for i in range(count)]
    return torch.tensor([ids[s : s + length] for s in starts])


def wilson(right: int, cases: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share, by Wilson (1927): honest near 0 and 1, where it matters here."""
    p, n = right / cases, cases
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def retrieve(
    model: Transformer, tokenizer: Tokenizer, case: Case, cache: list[LayerCache], question: str
) -> str:
    """The answer that greedy decoding gives to a case, in one of the two protocols.

    Raises `UserError` for a case that leaves no room for a number in the model's context.
    """
    if question == "prefill":
        context, prompt = [], tokenizer.encode(case.prompt)
    else:
        context = tokenizer.encode(case.context)
        prompt = tokenizer.encode(case.question, special=False)
    length, limit = len(context) + len(prompt), model.config.context_length
    if length + ANSWER_ROOM > limit:
        raise UserError(
            f"a case of {length} tokens leaves no room in a context of {limit}; shorten it"
        )
    if context:
        device = model.lm_head.weight.device
        with torch.no_grad():
            model(torch.tensor([context], device=device), cache, logits_to_keep=1)
            for token in prompt[:-1]:
                model(torch.tensor([[token]], device=device), cache)
        prompt = prompt[-1:]
    new_tokens = min(ANSWER_TOKENS, limit - length)
    greedy = make_sampler(0.0, 1.0, 0)
    return tokenizer.decode(list(generate(model, prompt, cache, new_tokens, greedy)))


def retrieval(args: argparse.Namespace) -> list[dict]:
    """Rows of the table: cache, ratio, lines, accuracy with its interval, both ratios, seconds."""
    model, tokenizer = (
        load_model(args.model, args.device, DTYPES[args.dtype]),
        load_tokenizer(args.model),
    )
    config = model.config
    token_bytes = 2 * 2 * config.num_hidden_layers * config.d_kv  # of a full cache in 16 bits
    rows = []
    choices = list(cache_choices(args, model))
    for lines in args.lines:
        cases = list(make_cases(args.what, lines, args.cases, args.seed, args.spelled))
        for name, ratio, nominal, make in choices:
            start, right, held, seen = time.perf_counter(), 0, 0, 0
            for case in tqdm(cases, f"{lines} lines, {name} {ratio:.0%}", leave=False):
                cache = make(len(tokenizer.encode(case.prompt)) + ANSWER_ROOM)
                right += is_correct(
                    retrieve(model, tokenizer, case, cache, args.question), case.answer
                )
                held += sum(layer.nbytes() for layer in cache)
                seen += cache[0].length
            low, high = wilson(right, len(cases))
            rows.append(
                {
                    "cache": name,
                    "ratio": ratio,
                    "lines": lines,
                    "tokens": round(seen / len(cases)),
                    "accuracy": right / len(cases),
                    "interval": [low, high],
                    "nominal_ratio": nominal,
                    "honest_ratio": 1 - held / (token_bytes * seen),
                    "seconds": time.perf_counter() - start,
                }
            )
    return rows


def cache_choices(args: argparse.Namespace, model: Transformer) -> Iterator[tuple]:
    """Yields (name, ratio, nominal ratio, function that makes an empty cache), one a row."""

    def cskv_choice(name: str, ratio: float, factors: cskv.Factors) -> tuple:
        def make(expected: int) -> list[LayerCache]:
            return cskv.bi_branch_cache(model, factors, args.window, expected)

        return name, ratio, cskv.nominal_ratio(model, factors), make

    yield "full", 0.0, 0.0, lambda expected: full_cache(model, expected)
    for file in args.factors:
        factors = cskv.load_factors(file, model)
        name = f"cskv, {Path(file).name}"
        yield cskv_choice(name, cskv.nominal_ratio(model, factors), factors)
    if args.calibrate:
        tokenizer = load_tokenizer(args.model)
        length = min(args.seq_len, model.config.context_length)
        samples = sample_tokens(args.calibrate, tokenizer, args.samples, length, args.seed)
        statistics = cskv.collect_statistics(model, tqdm(samples, "calibrating", leave=False))
        for ratio in args.ratios:
            ranks = [cskv.rank_for(ratio, model.config.d_kv)] * len(model.model.layers)
            for init in args.inits:
                factors = cskv.init_factors(init, model, ranks, ranks, statistics, args.seed)
                yield cskv_choice(f"cskv, {init}", ratio, factors.to(model.lm_head.weight))


def perplexity(args: argparse.Namespace) -> list[dict]:
    """Rows of the table: cache, ratio, nominal and honest ratio, perplexity, seconds."""
    model = load_model(args.model, args.device, DTYPES[args.dtype])
    text = "\n\n".join(read_documents(args.text))
    length = args.context + args.steps
    if length > model.config.context_length:
        raise UserError(f"{length} tokens do not fit into {model.config.context_length} of context")
    tokens = passages(load_tokenizer(args.model).encode(text), args.passages, length)
    tokens = tokens.to(args.device)
    full_bytes = 2 * 2 * model.config.num_hidden_layers * model.config.d_kv * (length - 1)
    rows = []
    for name, ratio, nominal, make in cache_choices(args, model):
        start, nll, held = time.perf_counter(), [], 0
        for batch in tqdm(tokens.split(args.batch), name, leave=False):
            cache = make(length - 1)
            nll.append(decode_nll(model, batch, args.context, cache))
            held += sum(layer.nbytes() for layer in cache)
        rows.append(
            {
                "cache": name,
                "ratio": ratio,
                "nominal_ratio": nominal,
                "honest_ratio": 1 - held / (full_bytes * len(tokens)),
                "perplexity": math.exp(torch.cat(nll).mean().item()),
                "seconds": time.perf_counter() - start,
            }
        )
        print(f"{name} {ratio:.0%}: {rows[-1]['perplexity']:.2f}", file=sys.stderr)
    return rows


def table(rows: list[dict], columns: dict[str, Callable]) -> str:
    """Rows as a Markdown table; `columns` maps a row's key to what writes its value."""
    lines = ["| " + " | ".join(columns).replace("_", " ") + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(write(row[key]) for key, write in columns.items()) + " |")
    return "\n".join(lines)


def write_json(path: Path | None, rows: list[dict]) -> None:
    if path is not None:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(rows, indent=1) + "\n")


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed."""
    check_device(args.device)
    check_folder(args.json)
    unknown = set(args.inits) - set(cskv.INITIALIZATIONS)
    if unknown:
        raise UserError(f"no initialization {unknown.pop()!r}; {', '.join(cskv.INITIALIZATIONS)}")
    rows = perplexity(args) if args.what == "perplexity" else retrieval(args)
    columns = {
        "cache": str,
        "ratio": "{:.0%}".format,
        "lines": str,
        "tokens": str,
        "accuracy": "{:.3f}".format,
        "interval": lambda pair: "[{:.2f}, {:.2f}]".format(*pair),
        "nominal_ratio": "{:.1%}".format,
        "honest_ratio": "{:.1%}".format,
        "perplexity": "{:.2f}".format,
        "seconds": "{:.0f}".format,
    }
    print(table(rows, {key: write for key, write in columns.items() if key in rows[0]}))
    write_json(args.json, rows)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    shared = Arguments(add_help=False)
    p = shared
    p.add_argument("--model", required=True, help="checkpoint folder or hub name")
    p.add_argument("--factors", nargs="*", default=[], help="factors files to measure")
    p.add_argument("--calibrate", type=Path, help="text to make factors from, besides")
    p.add_argument(
        "--inits", type=names, default=["svd", "asvd", "optimal"], help="svd,asvd,optimal"
    )
    p.add_argument(
        "--ratios", type=numbers(float, 0, 0.9999), default=[0.5, 0.8], help="default: 0.5,0.8"
    )
    p.add_argument("--samples", type=number(int, 1), default=256, help="calibration samples")
    p.add_argument("--seq-len", type=number(int, 2), default=1024, help="tokens of a sample")
    p.add_argument("--window", type=number(int, 1), default=32, help="full-precision tokens")
    p.add_argument("--seed", type=number(int, 0), default=0, help="of the samples and the cases")
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", choices=DTYPES, default="float32")
    p.add_argument("--json", type=Path, help="write the rows to this file as well")

    parser = Arguments(description=__doc__.splitlines()[0])
    what = parser.add_subparsers(dest="what", required=True, parser_class=Arguments)
    p = what.add_parser(
        "perplexity", parents=[shared], help="of held-out text, decoded token by token"
    )
    p.add_argument("--text", type=Path, required=True, help="held-out .txt or .jsonl")
    p.add_argument("--context", type=number(int, 1), default=1024, help="tokens prefilled")
    p.add_argument("--steps", type=number(int, 1), default=256, help="tokens measured, one by one")
    p.add_argument("--passages", type=number(int, 1), default=16, help="of the held-out text")
    p.add_argument("--batch", type=number(int, 1), default=8, help="passages at a time")
    for task, unit in (("longeval", "lines of a record"), ("passkey", "repetitions of the filler")):
        p = what.add_parser(task, parents=[shared], help=f"retrieval, {task} cases from a seed")
        p.add_argument("--lines", type=numbers(int, 1), default=[50], help=f"{unit}: 10,30,100")
        p.add_argument("--cases", type=number(int, 1), default=50, help="of each length")
        p.add_argument(
            "--question", choices=("prefill", "decode"), default="prefill", help="the protocol"
        )
        p.add_argument("--spelled", action="store_true", help="keys of made-up words")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
