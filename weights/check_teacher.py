"""Measures the teaching model with the full cache, and draws the learning curve of its training.

python -m weights.check_teacher --cases 200 --seed 1
python -m weights.check_teacher --data FOLDER
python -m weights.check_teacher --curve runs/teacher/curve.jsonl
"""

import support.interrupt  # isort: skip # noqa: F401

import argparse
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from experiments.figures import pyplot, save_figure
from experiments.tasks.longeval import PUBLISHED, RetrievalCase, make_cases, read_cases
from experiments.tasks.records import read_rows
from experiments.tasks.scores import is_correct
from infer import generate, make_sampler
from model import Transformer, full_cache
from support.command import Arguments, UserError, check_files, number, run_command
from support.huggingface.checkpoint import load_model
from support.huggingface.tokenizer import Tokenizer, load_tokenizer

TEACHER = Path("weights/teacher")
UNSEEN = (  # questions in words that train_teacher.py never asks
    "\nWhich value does line {key} have?",
    "\nPlease look up line {key} and tell me its number.",
    "\nNow the record is over. I need the number in line {key}.",
)
KINDS = {"words": "listed keys", "spelled": "made-up keys", "passkey": "passkey"}


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


def reword(case: RetrievalCase, wording: str) -> RetrievalCase:
    """The same case, asked in other words."""
    key = re.search(r"in line (\S+)\?", case.question)[1]
    return RetrievalCase(case.context, wording.format(key=key), case.answer)


def fresh_cases(count: int, seed: int) -> Iterator[tuple[str, list[RetrievalCase]]]:
    """Our own cases: a name and `count` cases for each task, length and wording."""
    for n in (25, 50, 100, 200, 300, 400, 500):
        yield f"{n} lines", list(make_cases("longeval", n, count, seed))
    for n in (50, 200, 500):
        yield f"{n} lines, made-up words", list(make_cases("longeval", n, count, seed, True))
    for n in (25, 100, 500):
        yield f"passkey in {n} fillers", list(make_cases("passkey", n, count, seed))
    for n in (50, 500):
        for wording in UNSEEN:
            cases = [reword(case, wording) for case in make_cases("longeval", n, count, seed)]
            yield f"{n} lines, asked {wording.strip()!r}", cases


def plot(curve: Path, png: Path) -> None:
    """Draws right answers and loss, means of 20 batches of a kind, and where levels begin."""
    if not curve.is_file():
        raise UserError(f"no file {curve}; train_teacher.py writes it to its --work folder")
    rows = read_rows(curve, {"step": int, "level": int, "lines": int, "kind": str})
    figure, axes = pyplot().subplots(2, 1, sharex=True, figsize=(8, 5), layout="constrained")
    for axis, field in zip(axes, ("right", "loss"), strict=True):
        for kind, label in KINDS.items():
            batches = [row for row in rows if row["kind"] == kind]
            groups = [batches[i : i + 20] for i in range(0, len(batches), 20)]
            steps = [group[-1]["step"] for group in groups]
            means = [fmean([row[field] for row in group]) for group in groups]
            axis.plot(steps, means, label=label, linewidth=1)
    for before, row in pairwise(rows):
        if row["level"] > before["level"]:
            axes[0].axvline(row["step"], color="0.8", linewidth=0.8, zorder=0)
            axes[1].axvline(row["step"], color="0.8", linewidth=0.8, zorder=0)
            axes[0].text(row["step"], 0.02, f" {row['lines']}", fontsize=7, color="0.4")
    axes[0].set(ylabel="numbers right", ylim=(0, 1.02))
    axes[1].set(ylabel="loss", yscale="log", xlabel="step (numbers at the rules: lines at most)")
    axes[0].legend(loc="lower right")
    save_figure(figure, png)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description="Measures the teaching model, or draws its learning curve.")
    help = "cases in each line of the table"
    parser.add_argument("--cases", type=number(int, 1), default=200, help=help)
    parser.add_argument("--seed", type=int, default=1, help="another seed gives other cases")
    help = "folder of LongEval's own files, 200_lines.jsonl and so on, to ask instead of our cases"
    parser.add_argument("--data", type=Path, help=help)
    help = "train_teacher.py's log of its steps, to draw as weights/teacher/learning_curve.png"
    parser.add_argument("--curve", type=Path, help=help)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Draws the curve, or prints a line for each set of cases."""
    if args.curve is not None:
        picture = TEACHER / "learning_curve.png"
        check_files({"the picture": picture}, {"--curve": args.curve})
        plot(args.curve, picture)
        return
    model = load_model(TEACHER)
    tokenizer = load_tokenizer(TEACHER)
    if args.data is None:
        sets = fresh_cases(args.cases, args.seed)
    else:
        sets = [(f"{n} lines, published", read_cases(args.data, n)) for n in PUBLISHED]
    for name, cases in sets:
        right, tokens = count_right(model, tokenizer, cases)
        print(f"{right:4} of {len(cases)}  {name} (up to {tokens} tokens)", flush=True)


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
