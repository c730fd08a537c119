"""What shared positions cost in quality, against the length of segments.

    python -m experiments.segments --model M --text heldout.txt --factors F.safetensors \
        --segments 128 16:512,128 16:512,128:2048,512

`16:512,128` are segments of 16 tokens for the newest 512 old ones, and of 128 for all before. Rows
compare with the full cache and with the plain one, of exact positions, over the last `--steps`
tokens of a passage. `--undamped` leaves a_f out of (S1).
"""

import support.interrupt  # isort: skip # noqa: F401

import argparse
import math
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from beyond.segments import SEGMENTS, FastCache
from beyond.shared import shared_cache
from cskv import BiBranchCache, Factors
from experiments.evaluate import perplexity_cases
from experiments.tables import table, write_json
from model import LayerCache, Transformer
from support.command import Arguments, check_files, number, run_command
from support.factors_file import load_factors
from support.huggingface.checkpoint import load_model
from support.huggingface.tokenizer import load_tokenizer
from support.processes import say

Segments = tuple[tuple[int, int], ...]
PLAIN = ((1, 0),)


def parse_segments(text: str) -> Segments:
    """`16:512,128` as ((16, 512), (128, 0))."""
    parts = [part.partition(":")[::2] for part in text.split(",")]
    segments = tuple((int(length), int(tokens or 0)) for length, tokens in parts)
    lengths = [length for length, _ in segments]
    if min(lengths) < 1 or any(longer % short for short, longer in pairwise(lengths)):
        raise ValueError
    return segments


def text_of(segments: Segments) -> str:
    *near, (last, _) = segments
    return ",".join([f"{length}:{tokens}" for length, tokens in near] + [str(last)])


@torch.no_grad()
def log_probabilities(
    model: Transformer, tokens: Tensor, n: int, cache: list[LayerCache] | None = None
) -> Tensor:
    """Of the last n tokens but the first of these, [1, n - 1, vocab]; the others are the prompt."""
    if cache is None:
        logits = model(tokens, logits_to_keep=n)
    else:
        model(tokens[:, :-n], cache, logits_to_keep=1)
        logits = model(tokens[:, -n:], cache)
    return logits[:, :-1].float().log_softmax(-1)


def measure_segments(
    model: Transformer,
    passages: list[Tensor],
    n: int,
    factors: Factors,
    choices: list[tuple[Segments, bool]],
    window: int,
    sinks: int,
) -> list[dict]:
    """A row for the plain cache and one for each of `choices`, of segments and whether damped:
    means over the last n tokens of the passages [1, T]."""
    full = [log_probabilities(model, tokens, n) for tokens in passages]
    rows = []
    for segments, damped in [(PLAIN, True), *choices]:
        kl, worse = [], []
        for tokens, exact in zip(passages, full, strict=True):
            kind = BiBranchCache if segments == PLAIN else FastCache
            cache = shared_cache(model, factors, window, tokens.shape[1], kind, sinks)
            for layer in cache:
                layer.segments = segments
                layer.damped = damped
            ours = log_probabilities(model, tokens, n, cache)
            kl.append((exact.exp() * (exact - ours)).sum(-1).mean().item())
            target = tokens[:, -n + 1 :, None]
            worse.append((exact - ours).gather(2, target).mean().item())
        row = {"segments": text_of(segments), "damped": damped, "kl": fmean(kl)}
        rows.append(row)
        row["kl_of_plain"] = row["kl"] / rows[0]["kl"]
        row["of_full"] = math.exp(fmean(worse))
        row["of_plain"] = row["of_full"] / rows[0]["of_full"]
    return rows


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed."""
    read = {str(file): file for file in (*args.text, *args.factors)}
    check_files({"--json": args.json}, read, args.model)
    model = load_model(args.model)
    tokenizer = load_tokenizer(args.model, model.config.vocab_size)
    choices = [(segments, True) for segments in args.segments]
    if args.undamped:
        choices += [(segments, False) for segments in args.segments]
    rows = []
    for text, file in product(args.text, args.factors):
        sizes = {"steps": args.steps, "count": args.passages, "batch": 1}
        cases = perplexity_cases(model, tokenizer, [text], [args.context], **sizes)
        passages = [torch.cat([case.prompt, case.following], 1) for case in cases]
        factors = load_factors(file, model)
        found = measure_segments(model, passages, args.steps, factors, choices, 32, args.sinks)
        rows += [{"text": text.stem, "factors": file.stem, **row} for row in found]
        say(f"{text.stem}, {file.stem}: done")
    print(table(rows, list(rows[0])))
    write_json(args.json, rows)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__)
    add, count = parser.add_argument, number(int, 1)
    add("--model", required=True, help="measure this checkpoint, a folder or a hub name")
    add("--text", type=Path, nargs="+", required=True, help="predict these texts")
    add("--factors", type=Path, nargs="+", required=True, help="use these files")
    help = "compare these, such as 16:512,128 (default: those of the fast cache)"
    add("--segments", type=parse_segments, nargs="+", default=[SEGMENTS], help=help)
    add("--undamped", action="store_true", help="compare each without damping too")
    add("--context", type=count, default=3000, help="attend exactly to so many tokens (3000)")
    add("--steps", type=count, default=1000, help="attend with so many as decoding does (1000)")
    add("--passages", type=count, default=2, help="measure on so many of each text (2)")
    add("--sinks", type=number(int, 0), default=4, help="keep so many first tokens exact (4)")
    add("--json", type=Path, help="write the rows to this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
