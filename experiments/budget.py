"""One budget of bytes over all layers, keys, values and bits, spent where it buys most.

    python -m experiments.budget --model M --data TEXT --remove 0.9 --out F.safetensors
    torchrun --nproc-per-node 2 -m experiments.budget ...     shares the probing out

The paper leaves the choice of ratios for single layers, and for keys and values, to the future.
Here each side (the keys or the values) of each layer gets a rank and bits of its own, without any
training, such that a cache of `--length` tokens has so many bytes and loses as little as possible.

Take one side first: how to spend its bits on its channels? For Gaussian ones theory answers with
reverse water-filling (Cover and Thomas, "Elements of Information Theory", section 10.3.3): pour
water of one level D over the eigenvalues. A channel with an eigenvalue above D gets
1/2 log2(eigenvalue / D) bits and keeps an error D, one below is dropped and keeps all of its own.
Then one bit more lowers the error as much in every channel that has any, so none should be moved.
The values of SmolLM2's layer 10 have 192 channels with eigenvalues from 9.0 down to 0.013. With 192
bits a token the level is 0.038: 167 channels lie above, the first gets 3.9 bits, the 32nd 1.8, the
128th 0.6. The error is 12% of the energy. In 16 bits the same 192 bits hold 12 channels: 57%.

Between sides the rule is the same, if errors are counted in what they cost the model's answers. But
this differs by factors of hundreds, and eigenvalues do not tell. So it is measured:

1. Calibrate. Factors of all ranks come at once: those of rank r are the first r columns of A and
   rows of B of full rank. They keep the output of the attention: see beyond/outputs.py. Every
   second text, here and for the next step, is its first half twice: a long context is there to be
   looked up, and a model that copies reads its cache in layers where plain text hardly does.
2. Probe: one side of one layer at a few ranks and bits, all else exact. What it costs is the KL
   divergence, in nats, of the next token's distribution from the exact model's, in decode mode.
   Lower layers see nothing of it, so a probe starts from the stored input of its layer.
3. Spend: every side begins with its least choice; then again and again the step is taken that
   lowers the sum of costs most for a byte. That costs add up is assumed, not known.

For SmolLM2, two cores probe 11 minutes, after 2 of calibration. For LongChat-7B these would be
64 sides x 12 probes x 1,024 tokens x 16.5 layers x 0.4 GFLOP = 5e15 operations, a minute or two for
a GPU that does 1e14 a second, with 0.3 GB of stored inputs.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from beyond.outputs import calibrate_outputs
from beyond.probes import SIDES, Probe
from cskv import Factors, LayerFactors, LowRank, empty_latents, rotate
from experiments import figures
from experiments.notes import all_that_counts, delete_notes, run_all
from experiments.pictures import pyplot
from experiments.tables import write_json
from infer import full_bytes
from model import Transformer
from support.calibration import Statistics, calibrate, init_pair
from support.command import (
    DTYPES,
    Arguments,
    UserError,
    check_files,
    number,
    run_command,
    user_values,
)
from support.factors_file import save_factors
from support.huggingface.checkpoint import load_model
from support.huggingface.tokenizer import load_tokenizer
from support.options import add_option, add_options
from support.processes import place, processes, say
from support.text import sample_tokens, with_copies

SHARES = (1 / 24, 1 / 3, 2 / 3, 1)  # of the channels, probed with each of `--widths`
HELPS = {"passages": "of --data, to probe with"}
STEP = 4  # ranks to choose from are its multiples


# ----------------------------------------------------------------------------------- 2. probe


def cut(pair: LowRank, side: str, rank: int, bits: int) -> LowRank:
    """The first `rank` channels of a pair, in `bits`, values rotated as by `Factors.in_bits`."""
    pair = replace(pair, A=pair.A[:, :rank], B=pair.B[:rank])
    if side == "v" and bits < 16 and pair.group is None:
        pair = rotate(pair, torch.Generator().manual_seed(0))
    return replace(pair, bits=bits)


def probe_side(
    probe: Probe, seen: Statistics, i: int, side: str, widths: list[int], group: int | None
) -> list[list[float]]:
    """The costs of one side of layer i: for each of the widths in bits a list, for each of
    `probed_ranks`."""
    model = probe.model
    whole = init_pair("attention", model, i, side, probed_ranks(model)[-1], seen)
    like = model.lm_head.weight
    whole = LowRank(whole.A.to(like), whole.B.to(like), group=group)
    return [
        [probe.cost(i, {side: cut(whole, side, rank, bits)}) for rank in probed_ranks(model)]
        for bits in widths
    ]


def probed_ranks(model: Transformer) -> list[int]:
    most = min(model.config.d_kv, model.config.hidden_size)
    return sorted({max(1, STEP * round(share * most / STEP)) for share in SHARES[:-1]} | {most})


def plan_factors(
    model: Transformer, plan: list["Choice"], seen: list[Statistics], group: int | None = None
) -> Factors:
    """The factors of a plan: its choices are of the keys and the values of each layer in turn."""
    pairs = []
    for n, choice in enumerate(plan):
        i, side = n // 2, "kv"[n % 2]
        whole = init_pair("attention", model, i, side, choice.rank, seen[i])
        pairs.append(cut(replace(whole, group=group), side, choice.rank, choice.bits))
    layers = [LayerFactors(k, v) for k, v in zip(pairs[::2], pairs[1::2], strict=True)]
    return Factors(layers, {"trained": "none"})


# ----------------------------------------------------------------------------------- 3. spend


@dataclass(frozen=True)
class Choice:
    """What one side of a layer may be kept as, its bytes and what it costs, in nats."""

    rank: int
    bits: int
    nbytes: int
    cost: float


def latent_bytes(
    rank: int, bits: int, side: str, tokens: int, window: int, group: int | None = None
) -> int:
    """Bytes of a side's latents of `tokens`, as a cache really holds them: they are laid out in one
    that has shapes, but no memory."""
    A = torch.empty(0, rank, dtype=torch.float16)
    pair = LowRank(A, A.T, bits, group=group)
    latents = empty_latents(pair, SIDES[side], window, tokens)
    latents.append(torch.empty(1, tokens, rank, device="meta"))
    return sum(tensor.untyped_storage().nbytes() for tensor in latents.tensors())


def choices(
    costs: list[list[float]], nbytes: dict, probed: list[int], widths: list[int]
) -> list[Choice]:
    """All choices of one side from its probed `costs`: those of ranks between are interpolated, as
    straight lines of the logarithm. Full rank in 16 bits costs nothing.

    `nbytes` has the bytes of each (rank, bits) to choose from.
    """
    found = []
    for (rank, bits), size in nbytes.items():
        if bits in widths:
            logs = np.log(np.maximum(costs[widths.index(bits)], 1e-9))
            found.append(Choice(rank, bits, size, float(np.exp(np.interp(rank, probed, logs)))))
        else:
            found.append(Choice(rank, bits, size, 0.0))
    return found


def fall(a: Choice, b: Choice) -> float:
    """How much the cost falls for a byte, from a to b."""
    return (a.cost - b.cost) / (b.nbytes - a.nbytes)


def convex_hull(some: list[Choice]) -> list[Choice]:
    """Of some choices those on the lower convex hull of cost over bytes, up to the least cost: each
    step to the next one buys less for a byte than the step before."""
    kept: list[Choice] = []
    for choice in sorted(some, key=lambda c: (c.nbytes, c.cost)):
        if kept and choice.cost >= kept[-1].cost:
            continue  # more bytes for nothing
        while len(kept) > 1 and fall(kept[-2], kept[-1]) <= fall(kept[-1], choice):
            kept.pop()
        kept.append(choice)
    return kept


def spend(sides: list[list[Choice]], budget: float) -> list[Choice]:
    """A choice for each side, of at most `budget` bytes in all: greedily, so that no plan of as
    many bytes costs less if the choices of every side are convex.

    The first step that the budget does not have ends it, with what is left for the side of that
    step: so more bytes never buy a worse plan. Raises `ValueError` if even the least choices are
    too many bytes.
    """
    hulls = [convex_hull(side) for side in sides]
    plan = [hull[0] for hull in hulls]
    left = budget - sum(choice.nbytes for choice in plan)
    if left < 0:
        raise ValueError(f"the least cache has {-left:.0f} bytes more than that; remove less")
    steps = [(fall(a, b), s, b) for s, hull in enumerate(hulls) for a, b in pairwise(hull)]
    for _, s, choice in sorted(steps, key=lambda step: -step[0]):
        left += plan[s].nbytes
        if choice.nbytes > left:
            plan[s] = min((c for c in sides[s] if c.nbytes <= left), key=lambda c: c.cost)
            break
        plan[s], left = choice, left - choice.nbytes
    return plan


# ------------------------------------------------------------------------------- command line


def sizes(
    model: Transformer, side: str, tokens: int, window: int, widths: list[int], group: int | None
) -> dict[tuple[int, int], int]:
    """The bytes of each (rank, bits) that a side of a layer may be given."""
    least, *_, most = probed_ranks(model)
    ranks = [*range(least, most, STEP), most]
    kinds = [(rank, bits) for rank in ranks for bits in widths] + [(most, 16)]
    return {kind: latent_bytes(*kind, side, tokens, window, group) for kind in kinds}


def write_plan(
    out: Path, plan: list[Choice], factors: Factors, model: Transformer, costs: list, widths: list
) -> None:
    """Beside each other: the factors of a plan; its choices and the probed costs as JSON; and a
    picture of the choices."""
    save_factors(out, factors, model)
    rows = []
    for n, choice in enumerate(plan):
        row = {"layer": n // 2, "of": ("keys", "values")[n % 2], **asdict(choice)}
        probed = {f"costs_{bits}_bits": own for bits, own in zip(widths, costs[n], strict=True)}
        rows.append({**row, "probed_ranks": probed_ranks(model), **probed})
    write_json(out.with_suffix(".json"), rows)
    figures.budget_plan(rows, out.with_suffix(".png"))


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed."""
    if len(args.remove) != len(args.out):
        raise UserError(f"{len(args.remove)} --remove, but {len(args.out)} --out; give a file each")
    if args.group % 32:
        raise UserError(f"--group {args.group} is no multiple of 32; choose 128, or 0")
    pyplot()  # if it is missing, that is known before the work and not after
    files = [file for out in args.out for file in (out, *map(out.with_suffix, (".json", ".png")))]
    check_files({f"file {n} of --out": file for n, file in enumerate(files)}, {"--data": args.data})
    with processes(args.device) as device, user_values():
        model = load_model(args.model, device, DTYPES[args.dtype])
        config, limit = model.config, model.config.context_length
        tokenizer = load_tokenizer(args.model, config.vocab_size)
        window, sinks = min(args.window, config.sliding_window or args.window), args.sinks
        if args.length > limit:
            raise UserError(f"--length {args.length} exceeds the context of {limit}")
        # What each budget leaves for latents, once the full-precision branch has its bytes.
        full, exact = (
            full_bytes(model, n) for n in (args.length, min(args.length, window + sinks))
        )
        rooms = [(1 - remove) * full - exact for remove in args.remove]
        old = args.length - min(args.length, sinks)  # tokens that have latents
        group = args.group or None
        nbytes = [sizes(model, side, old, window, args.widths, group) for side in SIDES]
        nbytes = nbytes * config.num_hidden_layers
        spend([[Choice(*kind, own[kind], 0.0) for kind in own] for own in nbytes], min(rooms))

        drawn = args.samples + args.passages, min(args.seq_len, limit), args.seed, sinks
        samples = sorted(sample_tokens(args.data, tokenizer, *drawn), key=Tensor.numel)
        texts = [text[:, -args.probe_len :] for text in samples[-args.passages :]]
        samples = samples[: -args.passages]
        if not args.no_copies:
            samples, texts = with_copies(samples), with_copies(texts)
        if not samples or min(text.shape[1] for text in texts) <= window + sinks:
            raise UserError(f"{args.data} is too short to calibrate and to probe; give more text")
        if args.init == "attention":
            seen = calibrate(model, samples, sinks)
        else:
            seen = calibrate_outputs(model, samples, window, sinks)
        spread = args.spread or args.probe_len // 2
        probe = Probe(model, texts, window, sinks, args.predictions, spread)

        def probed(keys: list[tuple[int, int]]) -> Iterator[dict]:
            for i, n in keys:
                yield {"costs": probe_side(probe, seen[i], i, "kv"[n], args.widths, group)}

        counts = {**vars(args), "remove": None, "out": None, "length": None}
        counts = all_that_counts(counts, model, args.model)
        keys = [(i, n) for i in range(config.num_hidden_layers) for n in range(len(SIDES))]
        done = run_all([[key] for key in keys], probed, args.out[0], counts, "side")
        costs = [done[key]["costs"] for key in keys]
        ranks = probed_ranks(model)
        sides = [choices(*own, ranks, args.widths) for own in zip(costs, nbytes, strict=True)]
        if place()[0]:
            return
        for remove, room, out in zip(args.remove, rooms, args.out, strict=True):
            plan = spend(sides, room)
            factors = plan_factors(model, plan, seen, group)
            bought = f"{1 - remove:g} of a full cache's bytes at {args.length} tokens"
            factors.info.update(init=args.init, data=args.data.name, budget=bought)
            write_plan(out, plan, factors, model, costs, args.widths)
            removed = 1 - (exact + sum(choice.nbytes for choice in plan)) / full
            cost = sum(choice.cost for choice in plan)
            say(f"{out}: {removed:.1%} of the bytes removed, {cost:.3g} nats in all")
        delete_notes(args.out[0])


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__.splitlines()[0])
    several = {"nargs": "+", "action": "extend", "required": True}
    share = number(float, 0, 0.9999)
    add_option(parser, "remove", "shares of a full cache's bytes to remove", type=share, **several)
    add_option(parser, "out", "factors files to write, one each", type=Path, **several)
    add_option(parser, "data", "text to calibrate and to probe on", type=Path, required=True)
    add_options(parser, "model samples seq-len passages", HELPS, samples=64, passages=4)
    add_options(parser, "init no-copies widths group length probe-len predictions spread")
    add_options(parser, "window sinks seed device dtype", sinks=4)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
