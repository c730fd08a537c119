"""Checks a student's functions and gives points: the same for the student and for the grader.

    python -m course.grade                  in a student's folder: what holds so far
    python -m course.grade DIR              of a student's folder, by the instructor
    python -m course.grade DIR --problem b

Only the functions that problems.toml names are taken from the student's files. Each part of a
problem runs in a process of its own (sandbox.py) with fresh inputs. Where one function builds on
another, the grader has the reference's; a student's folder has none, so there it is the student's.
"""

import support.interrupt  # isort: skip # noqa: F401

import argparse
import importlib
import inspect
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from course import problems
from course.problems import GIVEN, ROOT, NotFound, Part, Problem, Reference
from course.sandbox import Draw, Failed, Limits, Sandbox, Stopped, protect_memory
from support.command import Arguments, UserError, comma_list, number, one_of, run_command


@dataclass
class Verdict:
    """Of one problem."""

    problem: Problem
    points: int = 0
    lost: list[str] = field(default_factory=list)  # what does not hold, a few lines each
    output: str = ""  # what the student's functions printed, if something was lost

    def text(self) -> str:
        head = f"{self.problem.id}  {self.problem.title}"
        lines = [f"{head:50} {self.points:3} of {self.problem.points}"]
        for entry in self.lost:
            lines += [f"     {line}" for line in entry.splitlines()]
        if self.lost and self.output:
            lines += ["     printed by these functions, the end:"]
            lines += [f"     | {line}" for line in self.output.splitlines()[-8:]]
        return "\n".join(lines)


def run_check(check: Callable, student: Sandbox, draw: Draw) -> str | None:
    """Why a check does not hold, or None if it does. Raises `Stopped`."""
    try:
        check(student, draw)
    except Failed as error:
        must = " ".join((inspect.getdoc(check) or check.__name__).split())
        return f"{error}\n    must hold: {must}"
    except Stopped:
        raise
    except Exception as error:  # what came back was strange in a way nobody thought of
        return f"no check of this was possible: {error}"
    return None


def check_part(
    verdict: Verdict, part: Part, files: dict[str, str], seed: int, limits: Limits
) -> None:
    """Runs the checks of one part in one process. Raises `Stopped`."""
    module = importlib.import_module(f"course.checks.{verdict.problem.checks_in}")
    with Sandbox(files, limits) as student:
        try:
            for name, points in part.checks.items():
                reason = run_check(getattr(module, name), student, Draw(f"{seed}-{name}"))
                if reason is None:
                    verdict.points += points
                else:
                    verdict.lost.append(f"-{points}  {name}: {reason}")
        finally:
            verdict.output = student.output() or verdict.output


def grade_problem(
    problem: Problem, reference: Reference, student: dict[str, str], seed: int, limits: Limits
) -> Verdict:
    verdict = Verdict(problem)
    for part in problem.parts:
        names = ", ".join(part.names)
        if not any(problems.is_written(reference, name, student) for name in part.names):
            verdict.lost.append(f"-{part.points}  not written yet: {names}")
            continue
        try:
            check_part(verdict, part, problems.assemble(reference, part, student), seed, limits)
        except NotFound as error:
            verdict.lost.append(f"-{part.points}  {error}")
        except Stopped as error:
            reason = f"-{problem.points}  stopped in {names}: {error}"
            return Verdict(problem, 0, [reason], verdict.output)
    return verdict


def grade(folder: Path, seed: int, ids: list[str] | None = None) -> Iterator[Verdict]:
    """The verdicts on a student's folder, problem by problem, each when it is known.

    Raises `UserError` if there is nothing to grade.
    """
    student = problems.read_modules(folder)
    if not student:
        raise UserError(f"{folder} has no cskv.py or other file of the course; give its folder")
    protect_memory()
    torch.set_num_threads(1)
    all_problems = problems.load_problems()
    reference = problems.load_reference(all_problems)
    for problem in all_problems:
        if ids is None or problem.id in ids:
            yield grade_problem(problem, reference, student, seed, Limits())


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed."""
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    folder = args.folder or ROOT
    if args.folder is None and not GIVEN.exists():
        raise UserError("no folder of a student; python -m course.grade DIR")
    points = 0
    most = 0
    print(f"seed {seed}")
    for verdict in grade(folder, seed, args.problem):
        points += verdict.points
        most += verdict.problem.points
        print(verdict.text(), flush=True)
    print(f"{'total':50} {points:3} of {most}")
    if points < most and GIVEN.exists() and folder == ROOT:
        print("Where a problem builds on an earlier one, the grader uses its own solution of that.")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__)
    ids = tuple(problem.id for problem in problems.load_problems())
    parser.add_argument("folder", type=Path, nargs="?", help="of a student (this one)")
    problem = comma_list(one_of(ids, "problem"))
    parser.add_argument("--problem", type=problem, help="check only this one, such as b or b,c")
    repeat = "repeat a run with the inputs that it had (new ones at every run)"
    parser.add_argument("--seed", type=number(int, 0), help=repeat)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
