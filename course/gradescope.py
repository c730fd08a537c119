"""The grader for Gradescope: a zip file to upload, and what runs there.

    python -m course.gradescope --out autograder.zip

The zip has this project's files, `setup.sh`, which installs what they need, and `run_autograder`,
which writes zero points to results/results.json first. So there is a result after a crash and
after Gradescope's time limit too; each problem's points are added when they are known.
Students hand in cskv.py, infer.py, model.py, quant.py, train.py and beyond/segments.py, and perhaps
a plan.json, for the leaderboard.
"""

import support.interrupt  # isort: skip # noqa: F401

import argparse
import json
import os
import secrets
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from course import leaderboard
from course.grade import Verdict, grade
from course.problems import MODULES, PROJECT, ROOT, copy_project, load_problems, load_reference
from support.command import Arguments, UserError, check_files, replacing, run_command

SETUP = """#!/usr/bin/env bash
# Gradescope runs this once, to make the image.
set -euo pipefail
home=${AUTOGRADER:-/autograder}
if ! python3 -m venv "$home/venv"; then  # a bare Ubuntu lacks the package
    apt-get update && apt-get install -y python3-venv
    python3 -m venv "$home/venv"
fi
# On Linux this PyTorch includes CUDA, several GB. For a smaller image install the CPU build of this
# version before it, as PyTorch's own page says.
"$home/venv/bin/pip" install -q -r "$home/source/requirements.txt"
"""

RUN = """#!/usr/bin/env bash
# Gradescope runs this for every submission.
home=${AUTOGRADER:-/autograder}
python=${PYTHON:-$home/venv/bin/python}
mkdir -p "$home/results"
# No points yet: what counts if nothing else comes.
cp "$home/source/no_points.json" "$home/results/results.json"
# Students' functions run as another user, who must not find the reference.
chmod -R go-rwx "$home/source" "$home/results" "$home/submission"
cd "$home/source" || exit 1
export OMP_NUM_THREADS=1
"$python" -m course.gradescope --grade "$home"
"""


def results(verdicts: list[Verdict], message: str, score: leaderboard.Score | None = None) -> dict:
    """results.json: the verdicts so far, and zero points for the other problems; `score` is that of
    a plan, problem g."""
    missing = "not graded: the grader ended before. Submit again, or ask the instructor."
    points = {verdict.problem.id: verdict.points for verdict in verdicts}
    texts = {verdict.problem.id: verdict.text() for verdict in verdicts}
    tests = []
    for problem in load_problems():
        test = {
            "name": f"{problem.id}  {problem.title}",
            "score": points.get(problem.id, 0),
            "max_score": problem.points,
            "output": texts.get(problem.id, missing),
            "visibility": "visible",
        }
        tests.append(test)
    board = [{"name": "points", "value": sum(points.values()), "order": "desc"}]
    if score and score.share <= leaderboard.BUDGET:
        board.append({"name": leaderboard.NAME, "value": round(score.nats, 4), "order": "asc"})
    return {"output": message, "tests": tests, "leaderboard": board}


def write_results(path: Path, content: dict) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


def find_files(submission: Path) -> Path:
    """The folder of a submission that has the files: itself or, if zipped with one, that folder."""
    folders = [submission, *sorted(path for path in submission.glob("*") if path.is_dir())]
    for folder in folders:
        if any((folder / f"{module}.py").is_file() for module in MODULES):
            return folder
    names = ", ".join(f"{module}.py" for module in MODULES)
    raise UserError(f"none of {names}; hand in these files, as a zip file")


def grade_submission(submission: Path, path: Path) -> None:
    """Writes results.json anew after every problem. Raises `UserError` if it cannot be written."""
    seed = secrets.randbelow(2**31)
    verdicts = []
    try:
        folder = find_files(submission)
        for verdict in grade(folder, seed):
            verdicts.append(verdict)
            write_results(path, results(verdicts, f"seed {seed}"))
        plan = folder / "plan.json"
        if plan.exists():
            score = leaderboard.measure(plan)
            message = f"seed {seed}; problem g, plan.json: {leaderboard.judge(score)}"
            write_results(path, results(verdicts, message, score))
    except UserError as error:
        write_results(path, results(verdicts, str(error)))


def write_zip(path: Path) -> None:
    """Raises `UserError` if it cannot be written, or problems.toml names what there is not."""
    reference = load_reference(load_problems())
    with replacing(path) as temporary, TemporaryDirectory() as work:
        folder = Path(work) / "source"
        copy_project(folder, PROJECT, reference.solved)
        no_points = results([], "the grader did not come to an end")
        write_results(folder / "no_points.json", no_points)
        for name, text in (("setup.sh", SETUP), ("run_autograder", RUN)):
            (folder / name).write_text(text, encoding="utf-8")
            (folder / name).chmod(0o755)
        shutil.move(shutil.make_archive(f"{work}/autograder", "zip", folder), temporary)


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed."""
    if args.grade is not None:
        grade_submission(args.grade / "submission", args.grade / "results" / "results.json")
        return
    read = {}
    for name in (*PROJECT, *[f"{module}.py" for module in MODULES]):
        for file in (ROOT / name, *(ROOT / name).rglob("*")):
            read[str(file)] = file
    check_files({"--out": args.out}, read)
    write_zip(args.out)
    print(f"{args.out}: upload it to Gradescope, {os.path.getsize(args.out) / 1e6:.2f} MB")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--out", type=Path, help="zip file to write, such as autograder.zip")
    where = "Gradescope's folder, where run_autograder grades what was submitted"
    task.add_argument("--grade", type=Path, help=where)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
