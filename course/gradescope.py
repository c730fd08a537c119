"""The grader for Gradescope: a zip file to upload, and what runs there.

    python -m course.gradescope --out autograder.zip

It needs 2 CPUs and 2 GB (Gradescope: Settings, Container Specifications). The grader ends before
Gradescope's limit of 10 minutes, after which a submission has no result, and `run_autograder`
writes zero points first. Each problem's points are added when they are known. Students hand in
cskv.py, infer.py, model.py, quant.py, train.py and beyond/segments.py.
"""

import support.interrupt  # isort: skip # noqa: F401

import argparse
import json
import secrets
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from course import problems
from course.grade import SECONDS, Verdict, grade
from course.problems import CPU_INDEX, PROJECT, REQUIREMENTS, ROOT
from support.command import Arguments, UserError, check_files, replacing, run_command

SETUP = f"""#!/usr/bin/env bash
# Gradescope runs this once, to make the image.
set -euo pipefail
home=${{AUTOGRADER:-/autograder}}
apt-get update && apt-get install -y python3-venv
python3 -m venv "$home/venv"
# PyTorch for the CPU: with CUDA it is several GB.
"$home/venv/bin/pip" install -q {REQUIREMENTS.split()[0]} --index-url {CPU_INDEX}
"$home/venv/bin/pip" install -q -r "$home/source/requirements.txt"
"""
RUN = """#!/usr/bin/env bash
# Gradescope runs this for every submission.
home=${AUTOGRADER:-/autograder}
python=${PYTHON:-$home/venv/bin/python}
mkdir -p "$home/results"
# No points yet: what counts if nothing else comes.
cp "$home/source/no_points.json" "$home/results/results.json"
# Students' functions run as another user, who must not write here.
chmod -R go-w "$home/source" "$home/results" "$home/submission"
cd "$home/source" || exit 1
export OMP_NUM_THREADS=1
timeout 580 "$python" -m course.gradescope --grade "$home"
"""


def write_results(path: Path, verdicts: list[Verdict], message: str) -> None:
    """results.json: the verdicts so far, and zero points for the other problems."""
    missing = "not graded: the grader ended before. Submit again, or ask the instructor."
    known = {verdict.problem.id: verdict for verdict in verdicts}
    tests = []
    for problem in problems.load_problems():
        verdict = known.get(problem.id, Verdict(problem, lost=[missing]))
        test = {
            "name": f"{problem.id}  {problem.title}",
            "score": verdict.points,
            "max_score": problem.points,
            "output": verdict.text(),
            "visibility": "visible",
        }
        tests.append(test)
    total = sum(test["score"] for test in tests)
    board = [{"name": "points", "value": total, "order": "desc"}]
    content = {"output": message, "tests": tests, "leaderboard": board}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


def grade_submission(submission: Path, path: Path, seconds: float = SECONDS) -> None:
    """Writes results.json anew after every problem, the last time before the seconds are over.
    Raises `UserError` if it cannot be written."""
    seed = secrets.randbelow(2**31)
    verdicts = []
    message = f"seed {seed}"
    try:
        for verdict in grade(submission, seed, seconds=seconds):
            verdicts.append(verdict)
            write_results(path, verdicts, message)
    except UserError as error:
        message = str(error)
    write_results(path, verdicts, message)


def write_zip(path: Path) -> None:
    """Raises `UserError` if it cannot be written, or problems.toml names what there is not."""
    reference = problems.load_reference(problems.load_problems())
    with replacing(path) as temporary, TemporaryDirectory() as work:
        folder = Path(work) / "source"
        problems.copy_project(folder, PROJECT, reference.solved)
        write_results(folder / "no_points.json", [], "the grader did not come to an end")
        texts = {"requirements.txt": REQUIREMENTS, "setup.sh": SETUP, "run_autograder": RUN}
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
            (folder / name).chmod(0o755)
        shutil.move(shutil.make_archive(f"{work}/autograder", "zip", folder), temporary)


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed."""
    if args.grade is not None:
        grade_submission(args.grade / "submission", args.grade / "results" / "results.json")
        return
    names = (*PROJECT, *ROOT.glob("*.py"))
    read = {str(file): file for name in names for file in (ROOT / name, *(ROOT / name).rglob("*"))}
    check_files({"--out": args.out}, read)
    write_zip(args.out)
    print(f"{args.out}: upload it to Gradescope; choose 2 CPUs and 2 GB there")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--out", type=Path, help="zip file to write, such as autograder.zip")
    where = "Gradescope's folder, where run_autograder grades what was submitted"
    task.add_argument("--grade", type=Path, help=where)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
