"""Measures the teaching model with the full cache, and draws the learning curve of its training.

python -m weights.check_teacher --cases 200 --seed 1
python -m weights.check_teacher --data FOLDER
python -m weights.check_teacher --curve runs/teacher/curve.jsonl --png curve.png
"""

import argparse
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from experiments.tasks.retrieval import PUBLISHED, RetrievalCase, make_cases, read_cases
from experiments.tasks.scores import is_correct
from infer import generate, make_sampler
from model import Transformer, full_cache
from support.command import Arguments, UserError, number, replacing, run_command
from support.huggingface.checkpoint import load_model
from support.huggingface.tokenizer import Tokenizer, load_tokenizer

UNSEEN = (  # questions in words that train_teacher.py never asks
    "\nWhich value does line {key} have?",
    "\nPlease look up line {key} and tell me its number.",
    "\nNow the record is over. I need the number in line {key}.",
)


def count_right(
    model: Transformer, tokenizer: Tokenizer, cases: list[RetrievalCase]
) -> tuple[int, int]:
    """Cases that infer.py's greedy decoding answers rightly, and the longest prompt in tokens."""
    right = longest = 0
    for case in cases:
        prompt = tokenizer.encode(case.prompt)
        cache = full_cache(model, len(prompt) + 10)
        output = list(generate(model, prompt, cache, 100, make_sampler(0, 1, 0)))
        right += is_correct(tokenizer.decode(output), case.answer)
        longest = max(longest, len(prompt))
    return right, longest


def fresh_cases(count: int, seed: int) -> Iterator[tuple[str, Iterable[RetrievalCase]]]:
    """Our own cases: a name and `count` cases for each task, length and wording."""
    for n in (25, 50, 100, 200, 300, 400, 500):
        yield f"{n} lines", make_cases("longeval", n, count, seed)
    for n in (50, 200, 500):
        yield f"{n} lines, made-up words", make_cases("longeval", n, count, seed, spelled=True)
    for n in (25, 100, 500):
        yield f"passkey in {n} fillers", make_cases("passkey", n, count, seed)
    for n, wording in itertools.product((50, 500), UNSEEN):
        cases = (
            RetrievalCase(case.context, wording.format(key=key), case.answer)
            for case in make_cases("longeval", n, count, seed)
            for key in re.findall(r"in line (\S+)\?", case.question)
        )
        yield f"{n} lines, asked {wording.strip()!r}", cases


def published_cases(data: Path) -> Iterator[tuple[str, Iterable[RetrievalCase]]]:
    """LongEval's own files, whole."""
    for n in PUBLISHED:
        yield f"{n} lines, published", read_cases(data, n)


def check(folder: Path, sets: Iterable[tuple[str, Iterable[RetrievalCase]]]) -> None:
    """Prints what a finished model can do with the full cache: a line for each set of cases."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    for name, cases in sets:
        cases = list(cases)
        right, tokens = count_right(model, tokenizer, cases)
        print(f"{right:4} of {len(cases)}  {name} (up to {tokens} tokens)", flush=True)


def plot(curve: Path, png: Path) -> None:
    """Draws right answers and loss, means of 20 batches of a kind, and where levels begin."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("drawing needs matplotlib; install requirements-extra.txt") from None
    if not curve.is_file():
        raise UserError(f"no file {curve}; train_teacher.py writes it to its --work folder")
    rows = [json.loads(line) for line in curve.read_text().splitlines()]
    figure, axes = plt.subplots(2, 1, sharex=True, figsize=(8, 5), layout="constrained")
    names = {"words": "listed keys", "spelled": "made-up keys", "passkey": "passkey"}
    for axis, field in zip(axes, ("right", "loss"), strict=True):
        for kind, label in names.items():
            own = [row for row in rows if row["kind"] == kind]
            groups = [own[i : i + 20] for i in range(0, len(own), 20)]
            means = [sum(row[field] for row in group) / len(group) for group in groups]
            axis.plot([group[-1]["step"] for group in groups], means, label=label, linewidth=1)
    for before, row in itertools.pairwise(rows):
        if row["level"] > before["level"]:
            for axis in axes:
                axis.axvline(row["step"], color="0.8", linewidth=0.8, zorder=0)
            axes[0].text(row["step"], 0.02, f" {row['lines']}", fontsize=7, color="0.4")
    axes[0].set(ylabel="numbers right", ylim=(0, 1.02))
    axes[1].set(ylabel="loss", yscale="log", xlabel="step (numbers at the rules: lines at most)")
    axes[0].legend(loc="lower right")
    with replacing(png) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("weights/teacher"))
    parser.add_argument("--cases", type=number(int, 1), default=200, help="a line of the table")
    parser.add_argument("--seed", type=int, default=1, help="another seed gives other cases")
    parser.add_argument(
        "--data", type=Path, help="LongEval's own files (200_lines.jsonl, ...) instead of our cases"
    )
    parser.add_argument("--curve", type=Path, help="draw this log of train_teacher.py instead")
    parser.add_argument("--png", type=Path, default=Path("weights/teacher/learning_curve.png"))
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    if args.curve is not None:
        plot(args.curve, args.png)
    elif args.data is not None:
        check(args.model, published_cases(args.data))
    else:
        check(args.model, fresh_cases(args.cases, args.seed))


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
