"""What shared positions cost in quality, against the length of segments.

    python -m experiments.segments --model M --text heldout.txt --factors F.safetensors \
        --segments 128 16:512,128 16:512,128:2048,512

`16:512,128` are segments of 16 tokens for the newest 512 old ones, and of 128 for all before. Rows
compare with the full cache and with the plain one, of exact positions. A passage is read in one
pass, its last `--steps` tokens as in decoding. `--undamped` leaves a_f out of (S1).
"""

import support.interrupt  # isort: skip # noqa: F401

import argparse
import math
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

from beyond.probes import DecodeMode
from beyond.segments import SEGMENTS, cut, damping, is_exact
from cskv import Factors
from experiments.evaluate import perplexity_cases
from experiments.tables import table, write_json
from model import Rope, Transformer, causal_attention, seen_by
from support.command import Arguments, check_files, number, run_command
from support.factors_file import load_factors
from support.huggingface.checkpoint import load_model
from support.huggingface.tokenizer import load_tokenizer
from support.processes import say

Segments = tuple[tuple[int, int], ...]


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


def segment_lengths(first: int, T: int, window: int, sinks: int, segments: Segments) -> Tensor:
    """For the queries first .. T - 1 and all T tokens, the length of the token's segment:
    [T - first, T]. Meant where the query reads the token through its latents."""
    lengths = torch.zeros(T - first, T, dtype=torch.long)
    for i in range(first, T):
        stop = i + 1 - window - sinks
        for span in cut(0, stop, segments):
            lengths[i - first, sinks + span.start : sinks + span.stop] = span.length
    return lengths


class SegmentMode(DecodeMode):
    """`DecodeMode` with old keys in segments, for the last n of T tokens; the others attend
    exactly, as a prompt does. `lengths` [n, T] are those of `segment_lengths`."""

    def __init__(self, attention, pairs, window, sinks, lengths: Tensor, damped: bool = True):
        super().__init__(attention, pairs, window, sinks)
        self.lengths = lengths
        self.damped = damped

    def prefill(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        n, T = self.lengths.shape
        k_hat, v_hat = self.rebuild("k", x, k), self.rebuild("v", x, v)
        q, k = rope.rotate(q, 0), rope.rotate(k, 0)
        j = torch.arange(T, device=x.device)
        seen = seen_by(j[-n:], j, self.attention.config.sliding_window)
        exact = is_exact(j[-n:], j, self.window, self.sinks)
        # Every token is there exact, and rebuilt for each length of segments; a query sees it once.
        keys, masks = [k], [seen & exact]
        for length in self.lengths[self.lengths > 0].unique().tolist():
            keys.append(self.turned(k_hat, length, rope))
            masks.append(seen & ~exact & (self.lengths == length))
        values = torch.cat([v, *[v_hat] * (len(keys) - 1)], dim=2)
        head = causal_attention(q[:, :, :-n], k[:, :, :-n], v[:, :, :-n])
        tail = F.scaled_dot_product_attention(
            q[:, :, -n:], torch.cat(keys, 2), values, attn_mask=torch.cat(masks, 1), enable_gqa=True
        )
        return torch.cat([head, tail], dim=2)

    def turned(self, k: Tensor, length: int, rope: Rope) -> Tensor:
        """k [B, H_kv, T, D] turned to the middles of segments of one length, and damped."""
        w = rope.frequencies.double()
        token = torch.arange(k.shape[2], dtype=torch.float64) - self.sinks
        middle = self.sinks + (token / length).floor() * length + (length - 1) / 2
        angle = torch.outer(middle, w)
        a = damping(w, length) if self.damped else 1.0
        cos, sin = (a * angle.cos()).to(k), (a * angle.sin()).to(k)
        x1, x2 = k.chunk(2, dim=-1)
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


@torch.no_grad()
def log_probabilities(
    model: Transformer, tokens: Tensor, n: int, factors: Factors | None = None, **settings
) -> Tensor:
    """Of the last n tokens but the first of these: [1, n - 1, vocab]. `settings` are those of
    `SegmentMode`, if there are factors."""
    caches = None
    if factors is not None:
        caches = []
        for layer, pair in zip(model.model.layers, factors.layers, strict=True):
            pairs = {"k": pair.k, "v": pair.v}
            caches.append(SegmentMode(layer.self_attn, pairs, **settings))
    return model(tokens, caches, logits_to_keep=n)[:, :-1].float().log_softmax(-1)


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
    T = passages[0].shape[1]  # of all of them
    rows = []
    for segments, damped in [(((1, 0),), True), *choices]:
        lengths = segment_lengths(T - n, T, window, sinks, segments)
        settings = {"window": window, "sinks": sinks, "lengths": lengths, "damped": damped}
        kl, worse = [], []
        for tokens, exact in zip(passages, full, strict=True):
            ours = log_probabilities(model, tokens, n, factors, **settings)
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
        sizes = {"context": args.context, "steps": args.steps, "count": args.passages, "batch": 1}
        cases = perplexity_cases(model, tokenizer, text, **sizes)
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
