"""Makes the students' repository from this one: the same files with the functions to write emptied.

    python -m course.release --out DIR

What is emptied stands in problems.toml, by name. DIR gets the model, the checks, the teaching
model, a README of the commands, and a workflow for GitHub Classroom. `course/given/` in it has the
files to write in, as handed out: the checks put the student's functions into these.
"""

import support.interrupt  # isort: skip # noqa: F401

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from course import problems
from course.problems import CPU_INDEX, GIVEN, PROJECT, REQUIREMENTS, ROOT, write_modules
from support.command import Arguments, UserError, run_command

INSTALL = f"install -q {REQUIREMENTS.split()[0]} --index-url {CPU_INDEX}"
README = f"""# CSKV, to be written by you

The hand-out is [course/README.md](course/README.md). With Python 3.10 to 3.13, once:

    python3 -m venv .venv
    .venv/bin/pip {INSTALL}
    .venv/bin/pip install -q -r requirements.txt

and after every change, to see what holds:

    .venv/bin/python -m course.grade --problem a

The first `pip` command gets PyTorch for the CPU; with CUDA it is several GB. On Windows:

    py -m venv .venv
    .venv\\Scripts\\pip {INSTALL}
    .venv\\Scripts\\pip install -q -r requirements.txt
    .venv\\Scripts\\python -m course.grade --problem a

Notebooks need `pip install jupyter matplotlib` besides.
"""
WORKFLOW = f"""# For GitHub Classroom: the points of every push. It fails until all are there.
name: points
on: [push]
jobs:
  grade:
    runs-on: ubuntu-latest
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with:
          python-version: "3.12"
      - run: pip {INSTALL}
      - run: pip install -q -r requirements.txt
      - run: python -m course.grade
"""
FILES = {
    "README.md": README,
    "requirements.txt": REQUIREMENTS,
    ".github/workflows/classroom.yml": WORKFLOW,
    ".gitignore": ".venv/\n__pycache__/\n",
}


def write_release(folder: Path) -> None:
    """Fills a folder. Raises `UserError` where problems.toml names what there is not."""
    given = problems.load_reference(problems.load_problems()).given
    problems.copy_project(folder, PROJECT, given)
    (folder / "course" / "gradescope.py").unlink()
    write_modules(folder / GIVEN.relative_to(ROOT), given)
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed."""
    out = args.out
    if os.path.lexists(out):
        raise UserError(f"{out} is there already; choose another name")
    temporary = Path(tempfile.mkdtemp(dir=out.absolute().parent, prefix=f".{out.name}-"))
    try:
        write_release(temporary)
        temporary.chmod(0o755)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{out}: the students' files; their first command is in {out / 'README.md'}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to make, for students")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
