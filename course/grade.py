"""Checks a student's functions and gives points: the same for the student and for the grader.

    python -m course.grade                  in a student's folder: what holds so far
    python -m course.grade DIR              of a student's folder, by the instructor
    python -m course.grade DIR --problem b
    python -m course.grade --all DIR --csv points.csv     of a class: a folder for each student

Only the functions that problems.toml names are taken from the student's files. Each part of a
problem runs in a process of its own (sandbox.py) with fresh inputs. Where one function builds on
another, the grader has the reference's; a student's folder has none, so there it is the student's.
"""

import support.interrupt  # isort: skip # noqa: F401

import argparse
import csv
import importlib
import inspect
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from course import problems
from course.problems import GIVEN, ROOT, NotFound, Part, Problem, Reference, function_text
from course.sandbox import Draw, Failed, Limits, Sandbox, Stopped, bounded
from support.command import Arguments, UserError, comma_list, number, replacing, run_command

SECONDS = 8 * 60  # for all problems of a student, who share them
EXIT = "exit codes: 0 all points (of a class: it is graded), 1 points are missing, 2 an error"


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
        return printable("\n".join(lines))


def printable(text: str) -> str:
    """A student's text without what would change the terminal that it is shown in."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def run_check(check: Callable, student: Sandbox, draw: Draw, place: Callable) -> str | None:
    """Why a check does not hold, or None if it does. `place` tells the student's line that an error
    comes from. Raises `Stopped`."""
    try:
        check(student, draw)
    except Failed as error:
        lines = [str(error), place(error.frames)]
        must = " ".join((inspect.getdoc(check) or check.__name__).split())
        lines.append(f"must hold: {must}")
        return "\n    ".join(filter(None, lines))
    except Stopped:
        raise
    except Exception as error:  # what came back was strange in a way nobody thought of
        return f"no check of this was possible: {str(error) or type(error).__name__}"
    return None


def check_part(
    verdict: Verdict, part: Part, reference: Reference, student: dict, seed: int, limits: Limits
) -> None:
    """Runs the checks of one part in one process. Raises `Stopped`, or `NotFound` if the student's
    files lack a function."""
    files = problems.assemble(reference, part, student)
    given = reference.given
    if all(function_text(files, name) == function_text(given, name) for name in part.names):
        raise NotFound(f"not written yet: {', '.join(part.names)}")
    module = importlib.import_module(f"course.checks.{verdict.problem.checks_in}")
    names = part.names if reference.solved else [*part.names, *part.builds_on]
    place = partial(problems.student_line, files, names, student)
    with Sandbox(files, limits) as sandbox, bounded(limits.seconds):
        try:
            for name, points in part.checks.items():
                draw = Draw(f"{seed}-{name}")
                reason = run_check(getattr(module, name), sandbox, draw, place)
                if reason is None:
                    verdict.points += points
                else:
                    verdict.lost.append(f"-{points}  {name}: {reason}")
        finally:
            verdict.output = f"{verdict.output}\n{sandbox.output()}".strip()


def grade_problem(
    problem: Problem, reference: Reference, student: dict[str, str], seed: int, limits: Limits
) -> Verdict:
    """The limit on seconds is one for all parts together."""
    verdict = Verdict(problem)
    end = time.monotonic() + limits.seconds
    for part in problem.parts:
        try:
            left = replace(limits, seconds=end - time.monotonic())
            check_part(verdict, part, reference, student, seed, left)
        except NotFound as error:
            verdict.lost.append(f"-{part.points}  {error}")
        except Stopped as error:
            reason = f"-{problem.points}  stopped in {', '.join(part.names)}: {error}"
            return Verdict(problem, 0, [reason], verdict.output)
    return verdict


def grade(folder: Path, seed: int, ids: list | None = None, seconds=SECONDS) -> Iterator[Verdict]:
    """The verdicts on a student's folder, problem by problem, each when it is known. Every problem
    has its share of the seconds that are left. Raises `UserError` if there is nothing to grade."""
    end = time.monotonic() + seconds
    student = problems.read_modules(problems.find_submission(folder))
    torch.set_num_threads(1)
    all_problems = problems.load_problems()
    reference = problems.load_reference(all_problems)
    chosen = [problem for problem in all_problems if ids is None or problem.id in ids]
    for i, problem in enumerate(chosen):
        share = (end - time.monotonic()) / (len(chosen) - i)
        yield grade_problem(problem, reference, student, seed, Limits(seconds=share))


def class_row(folder: Path, seed: int, ids: list[str]) -> dict:
    """A student's line of the table. What cannot be graded has 0 points, and the reason."""
    row = {"student": folder.name, **dict.fromkeys(ids, 0), "total": 0}
    reasons = []
    try:
        for verdict in grade(folder, seed, ids):
            row[verdict.problem.id] = verdict.points
            row["total"] += verdict.points
            if verdict.lost:
                reasons.append(f"{verdict.problem.id}: {verdict.lost[0].splitlines()[0]}")
    except (UserError, OSError) as error:
        reasons.append(str(error))
    return {**row, "reasons": printable("; ".join(reasons))}


def grade_class(folder: Path, table: Path, seed: int, ids: list[str]) -> None:
    """Writes the table anew after every student. Raises `UserError` if there is none."""
    students = sorted(path for path in folder.glob("*") if path.is_dir() or path.is_symlink())
    if not students:
        raise UserError(f"no folders in {folder}; give one that has a folder for each student")
    rows = []
    for i, student in enumerate(students):
        rows.append(class_row(student, seed, ids))
        with replacing(table) as temporary:
            with temporary.open("w", encoding="utf-8", errors="replace", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        progress = f"{i + 1} of {len(students)}: {student.name}, {rows[-1]['total']} points"
        print(progress, file=sys.stderr)
    print(f"{table}: {len(rows)} students, seed {seed}")


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed."""
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    if args.all:
        ids = args.problem or [problem.id for problem in problems.load_problems()]
        return grade_class(args.all, args.csv, seed, ids)
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
    if points < most:
        if GIVEN.exists() and folder == ROOT:
            print(
                "Earlier problems' functions are yours here; the instructor's grader has its own."
            )
        sys.exit(1)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__, epilog=EXIT)
    ids = tuple(problem.id for problem in problems.load_problems())
    parser.add_argument("folder", type=Path, nargs="?", help="of a student (this one)")
    problem = comma_list(str, ids)
    parser.add_argument("--problem", type=problem, help="check only this one, such as b or b,c")
    parser.add_argument("--seed", type=number(int, 0), help="repeat a run, with the inputs it had")
    parser.add_argument("--all", type=Path, help="grade a class: this has a folder a student")
    parser.add_argument("--csv", type=Path, help="table of a class to write")
    args = parser.parse_args(argv)
    if (args.all is None) != (args.csv is None) or (args.all and args.folder):
        parser.error("--all FOLDER and --csv FILE go together, without another folder")
    return args


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
