"""What the command lines of `experiments/` may be told, each option described once."""

import argparse
from pathlib import Path

import quant
from cskv import INITIALIZATIONS
from support.command import DTYPES, comma_list, number, one_of

PROTOCOLS = ("prefill", "decode")

count, counts = number(int, 1), comma_list(number(int, 1))
flag = {"action": "store_true"}

OPTIONS = {
    "model": dict(required=True, help="checkpoint folder or hub name"),
    "device": dict(default="cpu"),
    "dtype": dict(choices=DTYPES, default="float32", help="to compute in"),
    "threads": dict(type=count, default=2, help="of the processor"),
    "json": dict(type=Path, help="write the rows to this file"),
    # caches
    "ratios": dict(
        type=comma_list(number(float, 0, 0.9999)), default=[0.5, 0.8],
        help="shares removed, of channels or of tokens",
    ),
    "inits": dict(
        type=comma_list(one_of(INITIALIZATIONS, "initialization")),
        help="factors to make for cskv; without --factors: optimal",
    ),
    "factors": dict(type=Path, nargs="*", default=[], help="factors files for cskv"),
    "bits": dict(
        type=comma_list(one_of((*quant.BITS, 16, 32), "number of bits")),
        help="of cskv's latents: 16,4; without it those of the factors",
    ),
    "clamped-zero-point": dict(
        help="quantize cskv's latents as the paper's published code does; see quant.py", **flag
    ),
    "window": dict(type=count, default=32, help="newest tokens in full precision, cskv and kivi"),
    "sinks": dict(type=number(int, 0), default=0, help="first tokens likewise; the paper has none"),
    "equal": dict(
        type=count, metavar="TOKENS",
        help="take --ratios as measured ones: streaming, h2o, asvd and cskv of --inits get the "
        "size, tokens kept or rank, at which they hold that much less than a full cache of TOKENS",
    ),
    "cache-dtype": dict(
        choices=DTYPES, default="bfloat16",
        help="of what caches hold; 16 bits are what measured ratios count with",
    ),
    # factors
    "calibrate": dict(type=Path, help="text to fit on (for LongEval: else cases of another seed)"),
    "samples": dict(type=count, default=256, help="to calibrate and to train on"),
    "seq-len": dict(type=number(int, 2), default=1024, help="tokens of a sample, at most"),
    "seed": dict(type=number(int, 0), default=0, help="of the samples and the cases"),
    "epochs": dict(type=count, default=1, help="of the training"),
    "lr": dict(
        type=number(float, 0), default=5e-3,
        help="of the training; table2 and figure4 have the paper's 5e-5 as well",
    ),
    "init": dict(
        choices=("outputs", "attention"), default="outputs",
        help="what factors keep: the attention's output, or keys and values; see outputs.py",
    ),
    "widths": dict(
        type=comma_list(one_of(quant.BITS, "number of bits")), default=[2, 3, 4],
        help="bits to choose from, beside 16",
    ),
    "no-copies": dict(
        help="leave texts as they are; else every second one is its first half, twice", **flag
    ),
    "group": dict(
        type=number(int, 0), default=128,
        help="tokens that share a scale in each channel, a multiple of 32; 0: groups as in KIVI",
    ),
    "length": dict(type=count, default=4000, help="tokens that the bytes are of"),
    "probe-len": dict(type=count, default=256, help="tokens of a passage, its last"),
    "predictions": dict(type=count, default=96, help="of a passage, to compare"),
    "spread": dict(
        type=count,
        help="tokens that predictions are spread over, a passage's last (half of --probe-len)",
    ),
    "measure-samples": dict(type=count, default=32, help="to measure losses on"),
    # cases
    "text": dict(type=Path, required=True, help="held-out .txt or .jsonl, for perplexity"),
    "context": dict(type=count, default=1024, help="tokens prefilled"),
    "steps": dict(type=count, default=256, help="tokens that are decoded one by one"),
    "passages": dict(type=count, default=16, help="of the held-out text"),
    "batch": dict(type=count, default=8, help="passages at a time"),
    "lines": dict(type=counts, help="of a LongEval record, or repetitions of passkey filler"),
    "cases": dict(type=count, help="of each length, or of each set (all)"),
    "question": dict(
        type=comma_list(one_of(PROTOCOLS, "protocol")), help="prefill, decode, or both protocols"
    ),
    "spelled": dict(help="keys of made-up words", **flag),
    "vicuna": dict(help="ask in Vicuna's chat template, as LongChat wants it", **flag),
    "no-chat": dict(help="ask without the model's chat template", **flag),
    "data": dict(type=Path, help="folder of the benchmark's files, else from the hub"),
    "sets": dict(type=lambda text: text.split(","), help="of the benchmark, else all"),
    "max-length": dict(type=number(int, 2), help="tokens of a prompt, its middle cut out"),
    # runs
    "lengths": dict(type=counts, default=[2048], help="of the prompt: 2048,8000"),
    "rounds": dict(type=count, default=5, help="timed rounds"),
    "out": dict(type=Path, help="folder for tables and figures"),
    "work": dict(type=Path, help="folder for factors in the making"),
}  # fmt: skip


def add_options(
    parser: argparse.ArgumentParser, names: str, helps: dict[str, str] | None = None, **defaults
) -> None:
    """Adds the options `names` to a command line, some with other defaults or with `helps` of this
    command's own."""
    for name in names.split():
        option = dict(OPTIONS[name])
        option |= {"help": helps[name]} if name in (helps or {}) else {}
        if (key := name.replace("-", "_")) in defaults:
            option |= {"default": defaults[key], "required": False}
        add_option(parser, name, **option)


def add_option(parser: argparse.ArgumentParser, name: str, help: str = "", **option) -> None:
    """Adds an option whose help ends with its default."""
    if (default := option.get("default")) not in (None, []):
        shown = ",".join(map(str, default)) if isinstance(default, list | tuple) else default
        help = f"{help} (default: {shown})".strip()
    parser.add_argument(f"--{name}", help=help, **option)
