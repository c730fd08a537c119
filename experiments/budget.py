"""One budget of bytes over all layers, keys, values and bits: beyond/budget.py as a command.

    python -m experiments.budget --model M --data TEXT --remove 0.9 --out F.safetensors
    torchrun --nproc-per-node 2 -m experiments.budget ...     shares the probing out

A long context is there to be looked up, and a model that copies reads its cache in layers where
plain text hardly does. So every second text to calibrate on is its first half twice, and every
fourth one to probe with, where only the second half counts. Give texts as long as those that the
cache is for: the more tokens there are, the harder it is to find one. The longest are for probing.
"""

import support.interrupt  # isort: skip # noqa: F401

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import count, islice
from pathlib import Path

from torch import Tensor

import quant
from beyond.budget import (
    WIDTHS,
    Choice,
    Fitted,
    Plan,
    free_choices,
    latent_bytes,
    make_plan,
    probe_alone,
    probe_around,
    probed_ranks,
    sides_of,
    spend,
)
from beyond.probes import NAMES, Probe
from beyond.shared import calibrate_groups
from cskv import Together
from experiments import figures
from experiments.notes import all_that_counts, delete_notes, own_notes, run_all
from experiments.tables import write_json
from infer import full_bytes
from model import Transformer
from support.command import (
    DTYPES,
    Arguments,
    UserError,
    check_files,
    comma_list,
    number,
    run_command,
    user_values,
)
from support.factors_file import save_factors
from support.huggingface.checkpoint import load_model
from support.huggingface.tokenizer import load_tokenizer
from support.processes import calibrate_together, place, processes, say
from support.text import sample_tokens, with_copies


def write_plan(out: Path, plan: Plan, model: Transformer) -> None:
    """Beside each other: the factors of a plan; its choices and the probed costs as JSON; and a
    picture of the choices."""
    save_factors(out, plan.factors, model)
    rows = []
    for side, choice in plan.choices.items():
        row = {"layer": side.first, "layers": side.count, "of": NAMES[side.side], **asdict(choice)}
        costs = plan.costs[side]
        row["bits"] = sum(bits * channels for bits, channels in choice.runs) / choice.rank
        row["probed_ranks"] = sorted({rank for rank, _ in costs})
        for bits in sorted({bits for _, bits in costs}):
            name = f"costs_{bits}_bits" if bits else "costs"
            row[name] = [costs[rank, bits] for rank in row["probed_ranks"]]
        rows.append(row)
    write_json(out.with_suffix(".json"), rows)
    figures.budget_plan(rows, out.with_suffix(".png"))


def split_texts(
    drawn: list[Tensor], passages: int, probe_len: int, copies: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Texts to calibrate on, and the ends of the longest ones to probe with."""
    drawn = sorted(drawn, key=Tensor.numel)
    samples = drawn[:-passages]
    texts = [text[:, -probe_len:] for text in drawn[-passages:]]
    if copies:
        return with_copies(samples, 2), with_copies(texts, 4)
    return samples, texts


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed."""
    if len(args.remove) != len(args.out):
        raise UserError(f"{len(args.remove)} --remove, but {len(args.out)} --out; give a file each")
    if args.group % quant.BLOCK:
        raise UserError(f"--group {args.group} is no multiple of {quant.BLOCK}; choose 128, or 0")
    if args.layers_together > 1 and (not args.group or args.init != "outputs"):
        problem = "--layers-together needs groups of tokens and --init outputs"
        raise UserError(f"{problem}; leave --group and --init as they are")
    if args.channel_price and args.layers_together == 1:
        problem = "--channel-price is for layers that share latents"
        raise UserError(f"{problem}; leave it out, or give --layers-together")
    if args.widths is None:
        args.widths = (*WIDTHS, 8) if args.layers_together > 1 else WIDTHS
    files = {"the notes of --out": own_notes(args.out[0])}
    for out in args.out:
        for file in (out, out.with_suffix(".json"), out.with_suffix(".png")):
            files[f"file {len(files)} of --out"] = file
    check_files(files, {"--data": args.data}, args.model)
    figures.pyplot()  # if it is missing, that is known before the work and not after
    with processes(args.device) as device, user_values():
        model = load_model(args.model, device, DTYPES[args.dtype])
        config = model.config
        sinks = args.sinks
        window = args.window = min(args.window, config.sliding_window or args.window)
        if args.length > config.context_length:
            limit = config.context_length
            raise UserError(f"--length {args.length} exceeds the context of {limit}")

        # 1. What each budget leaves for latents, once the full-precision branch has its bytes.
        full = full_bytes(model, args.length)
        exact = full_bytes(model, min(args.length, window + sinks))
        if args.window_bits == 8:  # a scale and a minimum for each head and token
            exact *= quant.bits_per_element(8, config.head_dim, config.head_dim) / 16
        rooms = [(1 - remove) * full - exact for remove in args.remove]
        old = max(0, args.length - sinks)  # tokens that have latents
        group = args.group or None
        sides = sides_of(config.num_hidden_layers, args.layers_together)
        least = []
        for side in sides:
            kind = probed_ranks(model, side.count)[0], min(args.widths)
            size = latent_bytes(*kind, side.side, old, window, group)
            least.append([Choice(*kind, size, 0.0, ())])
        spend(least, min(rooms))  # is there a plan of so few bytes?

        # 2. Texts, and what follows from them.
        reach = window + sinks  # tokens that no compressed one lies before
        for flag, length in (("--probe-len", args.probe_len), ("--seq-len", args.seq_len)):
            if length <= reach:
                raise UserError(f"{flag} {length} is not above --window and --sinks, {reach}")
        tokenizer = load_tokenizer(args.model, config.vocab_size)
        length = min(args.seq_len, config.context_length)
        most = args.samples + args.passages
        drawn = sample_tokens(args.data, tokenizer, most, length, args.seed, sinks)
        samples, texts = split_texts(drawn, args.passages, args.probe_len, not args.no_copies)
        if not samples or min(text.shape[1] for text in texts) <= reach:
            problem = f"{args.data} is too short to calibrate and to probe"
            raise UserError(f"{problem}; give more and longer text")
        if args.init == "attention":
            fitted = Fitted(model, calibrate_together(model, samples, sinks), group, args.widths)
        else:
            groups = [side for side in sides if side.count > 1]
            seen, moments = calibrate_groups(model, samples, groups, window, sinks)
            fitted = Fitted(model, seen, group, args.widths, args.channel_price, moments)
        settings = args.predictions, args.spread, args.steps
        probe = Probe(model, texts, window, sinks, *settings)
        counted = all_that_counts({**vars(args), "out": None}, model, args.model)

        def shared_out(probed: Callable[[Together], dict], stage: int) -> dict[Together, dict]:
            """What is probed of each side, by all processes together."""

            keys = [(n, stage) for n in range(len(sides))]
            done = run_all(keys, lambda key: probed(sides[key[0]]), args.out[0], counted, "side")
            return {side: done[n, stage] for n, side in enumerate(sides)}

        # 3. A plan for each budget, and one around it while that is better.
        alone = shared_out(partial(probe_alone, probe, fitted), 0)
        for side, of_side in alone.items():
            fitted.weights[side] = of_side["weights"]  # those that others have probed, too
        free = {side: free_choices(fitted, side, old, window) for side in sides}
        stages = count(1)

        def best_plan(room: float) -> Plan:
            plan = make_plan(probe, fitted, free, alone, room)
            for stage in islice(stages, args.again):
                again = shared_out(partial(probe_around, plan, fitted), stage)
                other = make_plan(probe, fitted, free, again, room)
                if other.probe.cost >= plan.probe.cost:
                    break
                plan = other
            return plan

        for remove, room, out in zip(args.remove, rooms, args.out, strict=True):
            plan = best_plan(room)
            info = plan.factors.info
            if args.window_bits == 8:
                info["window_bits"] = "8"
            bought = f"{1 - remove:g} of a full cache's bytes at {args.length} tokens"
            info.update(init=args.init, data=args.data.name, budget=bought)
            if place()[0] == 0:
                write_plan(out, plan, model)
            held = exact + sum(choice.nbytes for choice in plan.choices.values())
            removed = f"{1 - held / full:.1%} of the bytes removed"
            say(f"{out}: {removed}, {plan.probe.cost:.3g} nats in all")
            del plan  # its probe has as many bytes as the texts: gone before the next one comes
        if place()[0] == 0:
            delete_notes(args.out[0])


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__)
    add = parser.add_argument
    whole = number(int, 1)
    share = number(float, 0, 0.9999)
    widths = comma_list(number(int, 1), quant.BITS)
    several = {"nargs": "+", "action": "extend", "required": True}
    add("--model", required=True, help="checkpoint folder or hub name of the frozen model")
    add("--data", type=Path, required=True, help="text to calibrate and to probe on")
    add("--remove", type=share, **several, help="shares of a full cache's bytes to remove")
    add("--out", type=Path, **several, help="factors files to write, one for each --remove")
    add("--length", type=whole, default=4000, help="count the bytes of so many tokens (4000)")
    add("--samples", type=whole, default=64, help="calibrate on so many pieces of text (64)")
    add("--seq-len", type=number(int, 2), default=1024, help="cut pieces of so many tokens (1024)")
    add("--passages", type=whole, default=4, help="probe with so many other pieces (4)")
    add("--probe-len", type=whole, default=256, help="probe with their last tokens, so many (256)")
    add("--steps", type=whole, default=96, help="decode so many of them, the last ones (96)")
    add("--predictions", type=whole, default=96, help="compare so many predictions of each (96)")
    add("--spread", type=whole, help="spread them over so many last tokens (those of --steps)")
    add("--again", type=number(int, 0), default=1, help="probe so often around the plan (1)")
    add("--no-copies", action="store_true", help="leave all texts as they are")
    init = "keep the attention's output, or keys and values (outputs)"
    add("--init", choices=("outputs", "attention"), default="outputs", help=init)
    add("--layers-together", type=whole, default=1, help="let so many layers share latents (1)")
    help = "choose from these bits, or all channels in 16 (2,3,4; together 2,3,4,8)"
    add("--widths", type=widths, help=help)
    help = "of layers together, count a channel's time as so many bits more (0)"
    add("--channel-price", type=number(float, 0), default=0, help=help)
    group = "tokens that share a scale in a channel, a multiple of 32; 0: groups as in KIVI (128)"
    add("--group", type=number(int, 0), default=128, help=group)
    add("--window", type=whole, default=32, help="keep so many newest tokens exactly (32)")
    add("--sinks", type=number(int, 0), default=4, help="keep so many first tokens exactly (4)")
    help = "let infer.py keep both in 8 bits; the costs leave that out (16)"
    add("--window-bits", type=int, choices=(8, 16), default=16, help=help)
    add("--seed", type=number(int, 0), default=0, help="draw other pieces of the text (0)")
    add("--device", default="cpu", help="compute on cpu (default), cuda, cuda:1, ...")
    add("--dtype", choices=DTYPES, default="float32", help="run the model in this type (float32)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
