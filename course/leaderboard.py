"""Problem g, for those who want more: a budget of bytes, and what it buys on the teaching model.

    python -m course.leaderboard                 measures plan.json in this folder

A plan gives every layer a rank and bits for its keys and for its values, one pair a layer:

    {"keys": [[13, 4], [8, 4], ...], "values": [[16, 3], ...]}

The factors are the closed form (`attention`) on texts that are always the same. Two things are
measured: the bytes that the cache really holds, which must be within the budget, and how surprised
the model is by the right digits, in nats a digit (the mean of -log p), with the text compressed
before the question comes. Less is better. A plan is numbers: for it, no code of a student
runs on the grader.
"""

import argparse
import io
import json
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import quant
from course.problems import LARGEST, ROOT
from cskv import Factors, LayerFactors, bi_branch_cache, rotate
from experiments.rounded import Rounded
from experiments.tasks import longeval as retrieval
from infer import full_bytes, held_bytes
from model import Transformer
from support.calibration import calibrate, init_factors
from support.command import Arguments, UserError, run_command
from support.demonstration import TEACHER
from support.huggingface.checkpoint import load_model
from support.huggingface.tokenizer import Tokenizer, load_tokenizer

BUDGET = 0.1  # of the bytes of a full 16-bit cache
WINDOW, LINES, CASES = 16, 40, 24
NAME = f"nats a digit, {BUDGET:.0%} of the bytes"


@dataclass(frozen=True)
class Score:
    share: float  # of a full 16-bit cache's bytes, the most over the cases
    nats: float


def read_plan(path: Path, model: Transformer) -> dict[str, list[list[int]]]:
    """Raises `UserError` for what is no plan for this model, with what is wrong."""
    layers, d_kv = model.config.num_hidden_layers, model.config.d_kv
    try:
        if path.is_symlink() or path.stat().st_size > LARGEST:
            raise ValueError("a link, or very large")
        plan = json.loads(path.read_text(encoding="utf-8"))
        both = [plan["keys"], plan["values"]]
        for side in both:
            if len(side) != layers:
                raise ValueError(f"{len(side)} pairs for {layers} layers")
            for rank, bits in side:
                if type(rank) is not int or not 1 <= rank <= d_kv:
                    raise ValueError(f"rank {rank} is not in 1 .. {d_kv}")
                if type(bits) is not int or bits not in (*quant.BITS, 16):
                    raise ValueError(f"{bits} bits; choose 2, 3, 4, 8 or 16")
    except FileNotFoundError:
        raise UserError(f"no plan {path}; write one, see course/README.md, Problem g") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is no plan ({error}); see course/README.md, Problem g") from None
    return {"k": both[0], "v": both[1]}


def plan_factors(model: Transformer, tokenizer: Tokenizer, plan: dict) -> Factors:
    """The closed form of each side's rank, in its bits; values of few bits are rotated first."""
    length = model.config.context_length
    texts = retrieval.samples(tokenizer, length, "longeval", [10, 20, 40], 48, seed=0)
    with redirect_stderr(io.StringIO()):  # without a bar of progress
        statistics = calibrate(model, texts)
    ranks = ([rank for rank, _ in plan[side]] for side in "kv")
    factors = init_factors("attention", model, *ranks, statistics)
    generator, layers = torch.Generator().manual_seed(0), []
    for i, layer in enumerate(factors.layers):
        bits = {side: plan[side][i][1] for side in "kv"}
        v = rotate(layer.v, generator) if bits["v"] in quant.BITS else layer.v
        layers.append(LayerFactors(replace(layer.k, bits=bits["k"]), replace(v, bits=bits["v"])))
    return Factors(layers).to(torch.empty(0, dtype=torch.bfloat16))


@torch.no_grad()
def measure(path: Path) -> Score:
    """The score of a plan, on the same cases for all. Raises `UserError` for what is no plan."""
    torch.set_num_threads(1)
    model = load_model(TEACHER)
    tokenizer = load_tokenizer(TEACHER, model.config.vocab_size)
    factors = plan_factors(model, tokenizer, read_plan(path, model))
    shares, losses = [], []
    for case in retrieval.make_cases("longeval", LINES, CASES, seed=1):
        context = tokenizer.encode_prompt(case.context, chat=False)
        ids = tokenizer.encode_prompt(case.text, chat=False)
        digits = len(ids) - len(tokenizer.encode_prompt(case.prompt, chat=False))
        pairs = enumerate(zip(ids, context, strict=False))
        start = next((i for i, (ours, other) in pairs if ours != other), len(context))
        plain = bi_branch_cache(model, factors, WINDOW, expected=len(ids) - 1)
        cache = [Rounded(layer, torch.bfloat16) for layer in plain]
        logits = [model(torch.tensor([ids[:start]]), cache, logits_to_keep=1)[0]]
        logits += [model(torch.tensor([[token]]), cache)[0] for token in ids[start:-1]]
        log_p = torch.cat(logits).double().log_softmax(-1)[-digits:]
        losses += (-log_p[range(digits), ids[-digits:]]).tolist()
        shares.append(held_bytes(cache) / full_bytes(model, cache[0].length))
    return Score(max(shares), sum(losses) / len(losses))


def judge(score: Score) -> str:
    """A score in a sentence, or why it does not count."""
    held = f"{score.share:.1%} of a full cache's bytes"
    if score.share > BUDGET:
        return f"{held}: more than the {BUDGET:.0%} allowed, so it does not count"
    return f"{held}, {score.nats:.3f} nats a digit"


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed."""
    print(judge(measure(args.folder / "plan.json")))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__.splitlines()[0])
    where = "with a plan.json (this one)"
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT, help=where)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
