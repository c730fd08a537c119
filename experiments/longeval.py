"""Writes LongEval's "lines" cases, or passkey cases, from a seed (experiments/tasks/longeval.py).

python -m experiments.longeval --lines 50 --cases 1000 --seed 0 --out cases.jsonl
"""

import support.interrupt  # isort: skip # noqa: F401

import argparse
import json
import sys
from pathlib import Path

from experiments.tasks.longeval import make_cases
from support.command import Arguments, check_writable, number, replacing, run_command


def run(args: argparse.Namespace) -> None:
    check_writable(args.out)
    cases = make_cases(args.task, args.lines, args.cases, args.seed, args.spelled)
    with replacing(args.out) as temporary, temporary.open("w", encoding="utf-8") as file:
        for case in cases:
            row = {"text": case.text, "prompt": case.prompt, "answer": case.answer}
            file.write(json.dumps(row) + "\n")
    print(f"{args.out}: {args.cases} cases", file=sys.stderr)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__)
    add = parser.add_argument
    add("--task", choices=("longeval", "passkey"), default="longeval")
    add("--lines", type=number(int, 1), default=50, help="write so many in a record (default: 50)")
    add("--cases", type=number(int, 1), default=1000, help="write so many cases (default: 1000)")
    add("--seed", type=number(int, 0), default=0, help="draw them from this seed (default: 0)")
    add("--spelled", action="store_true", help="make keys of made-up words")
    add("--out", type=Path, required=True, help="write this JSON lines file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
