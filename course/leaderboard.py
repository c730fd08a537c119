"""Problem g, for those who want more: a budget of bytes, and what it buys on the teaching model.

    python -m course.leaderboard                 measures plan.json in this folder

A plan gives every layer a rank and bits for its keys and for its values, one pair a layer:

    {"keys": [[13, 4], [8, 4], ...], "values": [[16, 3], ...]}

The factors are the closed form (`attention`) on texts that are always the same. Measured are the
bytes that the cache really holds, and how surprised the model is by the right digits, in nats a
digit (the mean of -log p), with the text compressed before the question comes. A plan is numbers:
for it, no code of a student runs on the grader.
"""

import support.interrupt  # isort: skip # noqa: F401

import argparse
import io
import json
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import quant
from course.problems import ROOT, Unreadable, read_file
from cskv import Factors, LayerFactors, bi_branch_cache, in_bits, init_factors
from experiments.rounded import Rounded
from experiments.tasks import longeval
from infer import TEACHER, full_bytes, held_bytes
from model import Transformer
from support.command import Arguments, UserError, run_command
from support.huggingface.checkpoint import load_model
from support.huggingface.tokenizer import Tokenizer, load_tokenizer
from support.processes import calibrate_together

BUDGET = 0.1  # of the bytes of a full 16-bit cache
WINDOW, LINES, CASES = 16, 40, 24
NAME = f"nats a digit, {BUDGET:.0%} of the bytes"


@dataclass(frozen=True)
class Score:
    share: float  # of a full 16-bit cache's bytes, the most over the cases
    nats: float


def read_plan(path: Path, model: Transformer) -> tuple[list, list]:
    """[rank, bits] of the keys, and of the values, of every layer. Raises `UserError` for what is
    no plan for this model, with what is wrong."""
    layers, d_kv = model.config.num_hidden_layers, model.config.d_kv
    try:
        text = read_file(path.parent, path.name)
        if isinstance(text, Unreadable):
            raise ValueError(text)
        plan = json.loads(text)
        keys, values = plan["keys"], plan["values"]
        if len(keys) != layers or len(values) != layers:
            raise ValueError(f"not {layers} pairs each")
        for rank, bits in (*keys, *values):
            if type(rank) is not int or not 1 <= rank <= d_kv:
                raise ValueError(f"rank {rank} is not in 1 .. {d_kv}")
            if type(bits) is not int or bits not in (*quant.BITS, 16):
                raise ValueError(f"{bits} bits; choose 2, 3, 4, 8 or 16")
    except FileNotFoundError:
        raise UserError(f"no plan {path}; write one, see course/README.md, Problem g") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is no plan ({error}); see course/README.md, Problem g") from None
    return keys, values


def plan_factors(model: Transformer, tokenizer: Tokenizer, keys: list, values: list) -> Factors:
    """The closed form of each side's rank, in its bits; values of few bits are mixed first."""
    length = model.config.context_length
    texts = longeval.samples(tokenizer, length, "longeval", [10, 20, 40], 48, seed=0)
    with redirect_stderr(io.StringIO()):  # without a bar of progress
        statistics = calibrate_together(model, texts)
    k_ranks = [rank for rank, _ in keys]
    v_ranks = [rank for rank, _ in values]
    factors = init_factors("attention", model, k_ranks, v_ranks, statistics)
    generator = torch.Generator().manual_seed(0)
    layers = []
    for layer, (_, k_bits), (_, v_bits) in zip(factors.layers, keys, values, strict=True):
        k = in_bits(layer.k, k_bits, quant.TOKENS, False, generator)
        v = in_bits(layer.v, v_bits, quant.CHANNELS, False, generator)
        layers.append(LayerFactors(k, v))
    return Factors(layers).to(torch.empty(0, dtype=torch.bfloat16))


@torch.no_grad()
def measure(path: Path) -> Score:
    """The score of a plan, on the same cases for all. Raises `UserError` for what is no plan."""
    torch.set_num_threads(1)
    model = load_model(TEACHER)
    tokenizer = load_tokenizer(TEACHER, model.config.vocab_size)
    keys, values = read_plan(path, model)
    factors = plan_factors(model, tokenizer, keys, values)
    shares, losses = [], []
    for case in longeval.make_cases("longeval", LINES, CASES, seed=1):
        context = tokenizer.encode_prompt(case.context, chat=False)
        ids = tokenizer.encode_prompt(case.text, chat=False)
        digits = len(ids) - len(tokenizer.encode_prompt(case.prompt, chat=False))
        same = [a == b for a, b in zip(ids, context, strict=False)]
        start = [*same, False].index(False)  # where the question begins
        caches = bi_branch_cache(model, factors, WINDOW, expected=len(ids) - 1)
        caches = [Rounded(cache, torch.bfloat16) for cache in caches]
        logits = [model(torch.tensor([ids[:start]]), caches, logits_to_keep=1)[0]]
        logits += [model(torch.tensor([[token]]), caches)[0] for token in ids[start:-1]]
        answer = torch.cat(logits)[-digits:].double()
        losses.append(F.cross_entropy(answer, torch.tensor(ids[-digits:]), reduction="none"))
        shares.append(held_bytes(caches) / full_bytes(model, caches[0].length))
    return Score(max(shares), float(torch.cat(losses).mean()))


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
    parser = Arguments(description=__doc__)
    where = "with a plan.json (this one)"
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT, help=where)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
