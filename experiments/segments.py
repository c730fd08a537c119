"""What shared positions cost in quality, against the length of segments.

    python -m experiments.segments --model M --text heldout.txt --factors F.safetensors \
        --segments 128 16:512,128 16:512,128:2048,512

`16:512,128` are segments of 16 tokens for the newest 512 old ones, and of 128 for all before. Each
row compares with the full cache, and has beside it the plain cache, with exact positions.

A passage is read in one pass, as decoding token by token would read it: the last `--steps` tokens
of it see the older ones through latents, and are predicted. `--undamped` leaves a_f out of (1).
"""

import argparse
import math
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from beyond.probes import DecodeMode, branches
from beyond.segments import SEGMENTS, cut, damping
from cskv import Factors
from experiments.evaluate import perplexity_cases
from experiments.tables import table, write_json
from model import Rope, Transformer, causal_attention
from support.command import Arguments, check_writable, run_command, use_device
from support.factors_file import load_factors
from support.huggingface.checkpoint import load_model
from support.huggingface.tokenizer import load_tokenizer
from support.options import add_option, add_options
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
        at = torch.arange(T - n, T, device=x.device)
        seen, exact = branches(at, T, self.window, self.sinks, self.attention.config.sliding_window)
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
    choices = [(((1, 0),), True), *choices]
    sums = [[0.0, 0.0] for _ in choices]
    T = passages[0].shape[1]  # of all of them
    lengths = [segment_lengths(T - n, T, window, sinks, segments) for segments, _ in choices]
    for tokens in passages:
        exact = log_probabilities(model, tokens, n)
        target = tokens[:, -n + 1 :, None]
        for i, (_, damped) in enumerate(choices):
            more = {"window": window, "sinks": sinks, "lengths": lengths[i], "damped": damped}
            ours = log_probabilities(model, tokens, n, factors, **more)
            sums[i][0] += (exact.exp() * (exact - ours)).sum(-1).mean().item() / len(passages)
            worse = exact.gather(2, target) - ours.gather(2, target)
            sums[i][1] += worse.mean().item() / len(passages)
    rows = []
    for (segments, damped), (divergence, worse) in zip(choices, sums, strict=True):
        row = {"segments": text_of(segments), "damped": damped}
        row |= {"kl": divergence, "kl_of_plain": divergence / sums[0][0]}
        row |= {"of_full": math.exp(worse), "of_plain": math.exp(worse - sums[0][1])}
        rows.append(row)
    return rows


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed."""
    use_device(args.device)
    check_writable(args.json)
    torch.set_num_threads(args.threads)
    model = load_model(args.model, args.device)
    tokenizer = load_tokenizer(args.model, model.config.vocab_size)
    choices = [(segments, True) for segments in args.segments]
    choices += [(segments, False) for segments in args.segments if args.undamped]
    rows = []
    for text in args.text:
        sizes = args.context, args.steps, args.passages, 1
        cases = perplexity_cases(model, tokenizer, text, *sizes)
        passages = [torch.cat([case.prompt, case.following], 1) for case in cases]
        for file in args.factors:
            factors = load_factors(file, model)
            sides = {"window": args.window, "sinks": args.sinks}
            found = measure_segments(model, passages, args.steps, factors, choices, **sides)
            rows += [{"text": text.stem, "factors": file.stem, **row} for row in found]
            say(f"{text.stem}, {file.stem}: done")
    print(table(rows, list(rows[0])))
    write_json(args.json, rows)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__.splitlines()[0])
    texts = {"type": Path, "nargs": "+", "required": True}
    add_option(parser, "text", "held-out text, one or several", **texts)
    own = {"type": parse_segments, "nargs": "+", "default": [SEGMENTS]}
    parser.add_argument("--segments", **own, help="to compare (default: those of the fast cache)")
    parser.add_argument("--undamped", action="store_true", help="compare each without damping too")
    sizes = {"context": 3000, "steps": 1000, "passages": 2}
    add_options(parser, "model factors context steps passages", **sizes)
    add_options(parser, "window sinks threads device json", sinks=4)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
