"""The course's command lines, and the processes that students' code runs in: ways to cheat."""

import ast
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

from course import grade, gradescope, problems, release, worker
from course.checks import factors
from course.problems import ROOT, function_text, read_modules, write_modules
from course.sandbox import Failed, Limits, expect
from tests import test_course as tests
from tests.helpers import call
from tests.test_course import PARTS, PROBLEM_OF, PROBLEMS, REFERENCE, SOLVED

SLOW = pytest.mark.slow
SVD = "cskv.svd_factors"
ZEROS = "return LowRank(torch.zeros(W.shape[0], rank).to(W), torch.zeros(rank, W.shape[1]).to(W))"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A student's folder."""
    folder = tmp_path_factory.mktemp("course") / "student"
    release.run(release.parse_arguments(["--out", str(folder)]))
    return folder


def command(folder, *words):
    """python -m course.grade WORDS in a folder: the points in all, and what was printed."""
    run = [sys.executable, "-m", "course.grade", *map(str, words)]
    done = subprocess.run(run, cwd=folder, capture_output=True, text=True, timeout=300)
    total = re.search(r"^total +(\d+) of (\d+)", done.stdout, re.M)
    assert total, done.stdout + done.stderr
    assert done.returncode == (total[1] != total[2]), "0 means all points, 1 that some are missing"
    return int(total[1]), done.stdout


def solve(released, folder, ids):
    """A student's folder with right functions of these problems."""
    shutil.copytree(released, folder)
    write_modules(folder, tests.put_solutions(read_modules(folder), ids))
    return folder


# ------------------------------------------------------------------------------------- release


def test_release_has_no_solution(released):
    """Each line of a solution that is long enough to be one is gone from the files to write in, and
    no other file of a student's folder has it."""
    given = read_modules(released)
    assert given == read_modules(released / "course" / "given") == REFERENCE.given
    files = {str(file.relative_to(released)): file for file in released.rglob("*.py")}
    # scenarios.py calls the functions, and so has lines that call them.
    others = files.keys() - {f"{folder}{m}.py" for folder in ("", "course/given/") for m in given}
    text = "".join(files[name].read_text() for name in others - {"course/scenarios.py"})
    for name in PROBLEM_OF:
        module = name.split(".")[0]
        empty = function_text(given, name).splitlines()
        body = [line for line in function_text(SOLVED, name).splitlines() if line not in empty]
        assert body
        for line in body:
            assert given[module].count(line) < SOLVED[module].count(line), (name, line)
            assert len(line.strip()) < 45 or line.strip() not in text, (name, line)


def test_release_keeps_contracts(released):
    """Signatures and docstrings stay; the bodies and the page name the problem and its points."""
    given = read_modules(released)
    page = (released / "course" / "README.md").read_text()
    for name, id in PROBLEM_OF.items():
        ours, theirs = (problems.find_function(modules, name)[0] for modules in (SOLVED, given))
        assert ast.unparse(ours.args) == ast.unparse(theirs.args)
        assert ast.unparse(ours.returns) == ast.unparse(theirs.returns)
        assert ast.get_docstring(ours) == ast.get_docstring(theirs)
        assert len(theirs.body) == 1 + bool(ast.get_docstring(ours))
        assert f"problem {id}: " in function_text(given, name)
        assert f"`{name.split('.', 1)[1]}`" in page, name
        assert re.search(rf"^## Problem {id}\b.*{PROBLEMS[id].points} points", page, re.M | re.I)


def test_release_leaves_out_what_is_for_the_instructor(released):
    """And nothing else."""
    hidden = {"INSTRUCTOR.md", "answers.md", "walkthrough.ipynb", "gradescope.py", "release.py"}
    in_project = {path.name for path in (ROOT / "course").iterdir()}
    left = {path.name for path in (released / "course").iterdir()}
    assert in_project - left - {"__pycache__", ".ipynb_checkpoints"} == hidden


def test_release_pins_what_it_needs(released):
    """The same PyTorch as the project; the workflow installs it, and grades."""
    torch_pin, *others = (released / "requirements.txt").read_text().splitlines()
    assert all("==" in line for line in others)
    assert torch_pin in (ROOT / "requirements.txt").read_text().splitlines()
    workflow = (released / ".github" / "workflows" / "classroom.yml").read_text()
    assert torch_pin in workflow and "- run: python -m course.grade\n" in workflow
    assert torch_pin in gradescope.SETUP


def test_release_is_whole_or_not_there(tmp_path, refused, monkeypatch):
    (tmp_path / "full").mkdir()
    for out, message in (("full", "is there already"), ("no/x", "check where it is")):
        assert message in refused(release, "--out", tmp_path / out)
    renamed = {**SOLVED, "quant": SOLVED["quant"].replace("def unpack(", "def unpack_all(")}
    monkeypatch.setattr(problems, "read_modules", lambda folder: renamed)
    assert "quant.py has no function unpack" in refused(release, "--out", tmp_path / "half")
    monkeypatch.undo()
    monkeypatch.setattr(release, "write_modules", lambda folder, given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        release.run(release.parse_arguments(["--out", str(tmp_path / "half")]))
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_the_students_own_check(released, tmp_path):
    """In the released folder, with nothing else of the project, and one problem solved."""
    points, out = command(solve(released, tmp_path / "student", "a"))
    assert points == 10 and out.count("not written yet") == len(PARTS) - 1


@SLOW
def test_the_student_has_no_reference(released, tmp_path):
    """A function that builds on one of another problem: named there, and right for the grader."""
    student = solve(released, tmp_path / "student", "e")
    points, out = command(student, "--problem", "e")
    assert points == 11 and "problem d: fake_quantize is to be written" in out
    assert command(ROOT, student, "--problem", "e")[0] == 15


@SLOW
def test_reference_and_empty_release(released):
    """The three commands' results, and their time: well under the three minutes allowed."""
    start = time.time()
    assert command(ROOT, ROOT)[0] == 100
    assert time.time() - start < 180
    assert command(ROOT, released)[0] == 0


def test_mistakes_are_one_line(tmp_path, refused, capsys):
    for words in ([tmp_path], [tmp_path / "none"], [], [ROOT, "--problem", "x"]):
        code, _, err = call(grade, capsys, *words)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert "--out" in refused(gradescope)
    assert "are both" in refused(gradescope, "--out", ROOT / "cskv.py")


def test_the_same_seed_draws_the_same_inputs():
    """So that a run can be repeated; another seed draws others."""
    draws = [grade.Draw(f"{seed}-x").normal(5) for seed in (1, 1, 2)]
    assert draws[0].equal(draws[1]) and not draws[0].equal(draws[2])


# --------------------------------------------------------------------------------------- cheats

FORGED = "import sys; m = sys.modules['__main__']; m.answer = lambda _: "
PATCHED = """torch.linalg.svdvals = torch.linalg.eigvalsh = lambda *a, **k: torch.zeros(1000)
torch.equal = torch.allclose = lambda *a, **k: True
torch.Tensor.__le__ = torch.Tensor.__eq__ = lambda *a: True"""
NO_CHECKS = """import sys, types
for name in ('course', 'course.sandbox', 'course.checks.factors'):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].expect = sys.modules[name].svd_is_nearest = lambda *a: None"""
SEARCH = """import gc
for thing in gc.get_objects():
    if type(thing).__name__ in ('Sandbox', 'Verdict', 'Draw'): raise SystemExit"""
WRITE = """import os
for stream in range(3, 20):
    try: os.write(stream, b'total 100 of 100' * 100)
    except OSError: pass"""
FAST = Limits(cpu_seconds=4, seconds=40, memory=2**28)  # of a machine that has other work
WRONG, STRANGE = "times the least", "something else than its answer"
CHEATS = [  # and what is said of them, if more than that the answer is wrong
    (PATCHED, WRONG),
    (NO_CHECKS, WRONG),
    (SEARCH, WRONG),
    ("import threading, time; threading.Thread(target=time.sleep, args=[1000]).start()", WRONG),
    ("import sys; sys.exit(0)", "ended the process, with status 0"),
    ("while True: pass", "over 4 seconds"),
    ("import time; time.sleep(1000)", "did not end within"),
    ("while True: print('x' * 1000)", "File too large"),
    (WRITE, ""),
    ("[bytearray(2**28) for _ in range(1000)]", "MemoryError"),
    ("import signal; signal.raise_signal(signal.SIGSEGV)", "crashed with signal 11"),
    (FORGED + "m.json.dumps({'tensors': m.encode({})})", "A was not returned"),
    ("return LowRank(torch.zeros(2**25), torch.zeros(2**25))", "bytes"),
    (FORGED + "'[' * 10**6", STRANGE),
    (FORGED + "m.json.dumps({'error': 'x', 'frames': 10**9})", STRANGE),
    (FORGED + "m.json.dumps({'tensors': m.base64.b64encode(b'\\xff' * 99).decode()})", STRANGE),
    ("return [W]", "was expected"),
    ("return LowRank(torch.zeros(0, 2**40), torch.zeros(0))", "was expected"),
    ("return LowRank(torch.zeros(1).expand(10**12), W)", "Error: "),
    ("return LowRank(W.to_sparse(), W)", "Error: "),
    ("return 10**400", "Error: "),
    ("open('x', 'wb').write(b'x' * 2**21)", "Error: "),
    ("raise ValueError('x' * 10**8)", "Error: "),
    ("return svd_factors(W, rank)", "Error: "),  # deep recursion
    (ZEROS.replace("torch.zeros(W", "torch.nan * torch.zeros(W"), "not finite"),
]


def graded_body(body, limits=FAST):
    """The verdict on a student who wrote nothing but this body of a function."""
    student = tests.write_body(REFERENCE.given, SVD, body)
    return tests.graded("b", student, SVD, limits=limits)


SLOW_CHEATS = [pytest.param(*cheat, marks=SLOW) for cheat in CHEATS[1:]]


@pytest.mark.parametrize("body, message", [CHEATS[0], *SLOW_CHEATS])
def test_cheat_has_no_points(body, message):
    verdict = graded_body(f"{body}\n{ZEROS}")  # it goes on with a wrong answer
    assert verdict.points == 0, verdict.text()
    assert message in verdict.text(), verdict.text()


IMPOSSIBLE = "-5  svd_is_nearest: no check of this was possible: "
CHECKS = [  # that go wrong with an answer, in seconds, and what is said of it
    (lambda *_: 1 / 0, 40, f"{IMPOSSIBLE}division by zero"),
    (lambda *_: list(range(4 * 10**7)), 40, f"{IMPOSSIBLE}MemoryError"),
    (lambda *_: time.sleep(100), 1, "did not end within"),
]


@pytest.mark.parametrize("check, seconds, message", CHECKS)
def test_an_answer_costs_no_more_than_its_problem(monkeypatch, tmp_path, check, seconds, message):
    """Whatever a check does with it: an error, a long list, a long wait."""
    tests.grade_here(monkeypatch, tmp_path)
    monkeypatch.setattr(factors, "svd_is_nearest", check)
    verdict = graded_body(ZEROS, limits=Limits(seconds=seconds))
    assert verdict.points == 0 and message in verdict.text()


def link_files(folder, link):
    for module in problems.MODULES:
        file = folder / f"{module}.py"
        file.parent.mkdir(exist_ok=True)
        link(file, folder.parents[1] / "source" / f"{module}.py")


LINKS = {  # how a submission leads to the reference, in its parent's folder `source`
    "the submission": lambda folder: folder.symlink_to("../source"),
    "a folder in it": lambda folder: (folder / "inner").symlink_to("../../source"),
    "the folder beyond": lambda folder: (folder / "beyond").symlink_to("../../source/beyond"),
    "files": lambda folder: link_files(folder, Path.symlink_to),
    "hard links": lambda folder: link_files(folder, Path.hardlink_to),
}


@pytest.mark.parametrize("kind", LINKS)
def test_no_link_leads_out_of_a_submission(kind, tmp_path, capsys):
    """By the command, and on Gradescope, where it may be in a folder of the zip file."""
    write_modules(tmp_path / "source", SOLVED)
    student = tmp_path / "class" / "student"
    (student if kind != "the submission" else student.parent).mkdir(parents=True)
    LINKS[kind](student)
    code, out, err = call(grade, capsys, student, "--problem", "a,f")
    assert code in (1, 2) and " link" in out + err
    results = grade_submission(student.parent)
    assert results["leaderboard"][0]["value"] == 0 and " link" in json.dumps(results)


def test_a_file_that_cannot_be_read_says_why(tmp_path):
    contents = {"not in UTF-8 (byte 0)": b"\xff\xfe", "1048576 bytes": b"#" * 2**20}
    for reason, content in contents.items():
        (tmp_path / "quant.py").write_bytes(content)
        verdict = grade.grade_problem(PROBLEMS["d"], REFERENCE, read_modules(tmp_path), 1, FAST)
        assert "quant.py " in verdict.text() and reason in verdict.text()


def test_messages_teach():
    """The student's own line; what was got and wanted; what to do about it."""
    student = tests.write_body(REFERENCE.given, SVD, "x = 1\nhelper(W)")
    student["cskv"] = f"#\n#\n{student['cskv']}"  # two lines further down than ours
    line = student["cskv"].split("\n").index("    helper(W)") + 1
    text = tests.graded("b", student, SVD, limits=FAST).text()
    only = "only the function is taken"
    assert f"cskv.py, line {line}: helper(W)" in text and only in text
    for thing, ours in ((Limits(), True), (Path("x"), False)):
        with pytest.raises(AttributeError) as caught:
            thing.helper()
        assert (only in worker.explain(caught.value)) == ours
    for error in ("cannot unpack non-iterable NoneType", "B is of type NoneType"):
        message = worker.explain(TypeError(error))
        assert "returned nothing: is there a `return`?" in message and error in message
    got = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    want = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    with pytest.raises(Failed, match=r"x is 3 at \[1, 1\], 0 was expected; relative error 1.5"):
        expect({"x": got}, "x", want, 0.1)


@pytest.mark.parametrize("end", ["import os; os._exit(0)", pytest.param("", marks=SLOW)])
def test_prints_are_shown(end):
    """Without the end of a line too, and when the process ends."""
    body = f"import sys\nprint('one', end='')\nsys.stdout.write('two')\n{end}\n{ZEROS}"
    assert "| onetwo" in graded_body(body).text()


def test_one_syntax_error_costs_its_function():
    """The other functions of the file are found by their indentation."""
    wanted = {name: function_text(SOLVED, name) for name in PROBLEM_OF}
    for name in wanted:
        module = name.split(".")[0]
        function = wanted[name]
        line = "    " * name.count(".") + "return ("
        broken = {**SOLVED, module: SOLVED[module].replace(function, f"{function}\n{line}")}
        assert broken != SOLVED
        for other in wanted.keys() - {name}:
            assert function_text(broken, other).rstrip().startswith(wanted[other]), (name, other)
        with pytest.raises(problems.NotFound, match=rf"{module}.py, line \d+: .*: return \("):
            function_text(broken, name)


@SLOW
@pytest.mark.parametrize("length", ["10**13", "4 * 10**7"])
def test_a_number_of_tokens_that_there_are_not(length):
    """Costs the checks of its problem that decode, and no more."""
    body = f"return q + torch.arange({length}).sum()"
    student = tests.write_body(SOLVED, "cskv.BiBranchCache.decode", body)
    verdict = grade.grade_problem(PROBLEMS["c"], REFERENCE, student, 1, Limits(seconds=60))
    assert verdict.points == 2 and "prefill_is_exact" not in verdict.text()


@pytest.mark.parametrize("text", ["-" * 10**5 + "1", "(" * 10**5, "x" + ".a" * 10**5, "\0"])
def test_a_text_that_is_hard_to_parse(text):
    """Costs its function."""
    student = {**SOLVED, "quant": f"{SOLVED['quant']}\n\ndef pack():\n    return {text}\n"}
    assert function_text(student, "quant.unpack") in SOLVED["quant"] + "\n"
    with pytest.raises(problems.NotFound, match=r"quant.py, line \d+: \w+"):
        function_text(student, "quant.pack")


@SLOW
def test_problems_that_hang_share_the_time(tmp_path):
    """The one that does not hang, among three that do, has its points. The results are there before
    the time is over."""
    student = tests.put_solutions(REFERENCE.given, "d")
    for name, id in PROBLEM_OF.items():
        if id in "abe":
            student = tests.write_body(student, name, "import time\ntime.sleep(1000)")
    write_modules(tmp_path, student)
    start = time.monotonic()
    results = grade_submission(tmp_path, seconds=90)
    assert 15 < time.monotonic() - start < 90
    assert [test["score"] for test in results["tests"]] == [0, 0, 0, 20, 0, 0]


@SLOW
def test_a_class(tmp_path, capsys):
    """A line for each student, whatever was handed in."""
    write_modules(tmp_path / "class" / "ann", SOLVED)
    partly = tests.write_body(SOLVED, "quant.bits_per_element", "1 / 0")
    write_modules(tmp_path / "class" / "bob", partly)
    (tmp_path / "class" / "cy").mkdir()
    table = tmp_path / "points.csv"
    words = ("--all", tmp_path / "class", "--csv", table, "--problem", "a")
    code, _, err = call(grade, capsys, *words)
    assert code == 0 and "3 of 3: cy, 0 points" in err
    rows = list(csv.DictReader(table.open()))
    points = {row["student"]: (row["a"], row["total"]) for row in rows}
    assert points == {"ann": ("10", "10"), "bob": ("8", "8"), "cy": ("0", "0")}
    assert rows[0]["reasons"] == "" and "a: -2  short_groups_cost: Zero" in rows[1]["reasons"]
    assert "has none of quant.py" in rows[2]["reasons"]


@SLOW
def test_others_are_graded(tmp_path):
    """Files that have nothing of a function, or are missing, cost their own problems alone; so does
    a function that ends the process."""
    write_modules(tmp_path, tests.write_body(SOLVED, SVD, "import os; os._exit(0)"))
    (tmp_path / "quant.py").write_text("def quantize(:\n")
    (tmp_path / "train.py").unlink()
    (tmp_path / "beyond" / "segments.py").unlink()
    verdicts = {v.problem.id: v for v in grade.grade(tmp_path, 1)}
    assert {id: v.points for id, v in verdicts.items()} == dict(a=0, b=0, c=25, d=0, e=0, f=0)
    assert "quant.py, line 1: invalid syntax: def quantize(:" in verdicts["d"].text()
    assert "train.py is not in the folder" in verdicts["e"].text()
    missing = verdicts["f"].text().count("beyond/segments.py is not in the folder")
    assert missing == len(PROBLEMS["f"].parts)


# ------------------------------------------------------------------------------------- gradescope


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """What Gradescope makes of the zip file."""
    folder = tmp_path_factory.mktemp("gradescope")
    gradescope.run(gradescope.parse_arguments(["--out", str(folder / "autograder.zip")]))
    with ZipFile(folder / "autograder.zip") as archive:
        archive.extractall(folder / "source")
        for name in ("setup.sh", "run_autograder"):
            assert archive.getinfo(name).external_attr >> 16 & 0o111
            (folder / "source" / name).chmod(0o755)
            assert subprocess.run(["bash", "-n", folder / "source" / name]).returncode == 0
    return folder


def run_autograder(image, student, python=sys.executable, timeout=None):
    """As Gradescope runs it on a submission, with nothing of the project around. Returns
    results.json, after a look at what Gradescope demands of it."""
    for name in ("submission", "results"):
        shutil.rmtree(image / name, ignore_errors=True)
    write_modules(image / "submission", student)
    env = {**os.environ, "AUTOGRADER": str(image), "PYTHON": python}
    with suppress(subprocess.TimeoutExpired):
        subprocess.run([image / "source" / "run_autograder"], env=env, cwd="/", timeout=timeout)
    results = json.loads((image / "results" / "results.json").read_text())
    assert [test["max_score"] for test in results["tests"]] == [10, 20, 25, 20, 15, 10]
    for test in results["tests"]:
        assert 0 <= test["score"] <= test["max_score"]
        assert test["visibility"] == "visible" and test["output"] and test["name"]
    assert results["leaderboard"][0]["value"] == sum(test["score"] for test in results["tests"])
    return results


@SLOW
def test_gradescope(image):
    """The zip, a submission, its results."""
    results = run_autograder(image, {**REFERENCE.given, "model": SOLVED["model"]})
    assert [test["score"] for test in results["tests"]] == [3, 0, 0, 0, 0, 0]
    assert "not written yet" in results["tests"][1]["output"] and "seed" in results["output"]


@pytest.mark.parametrize("more", [{"python": "/no/python"}, {"timeout": 0.7}])
def test_gradescope_has_results_after_a_crash(image, more):
    """Zero points and a message, whatever becomes of the grader: here Python cannot start, or all
    is killed before the first problem is done."""
    results = run_autograder(image, SOLVED, **more)
    assert results["leaderboard"][0]["value"] == 0
    assert "not come to an end" in results["output"]


def grade_submission(folder, **seconds):
    gradescope.grade_submission(folder, folder / "results.json", **seconds)
    return json.loads((folder / "results.json").read_text())


def test_gradescope_looks_for_the_files(tmp_path):
    results = grade_submission(tmp_path)
    assert "cskv.py, " in results["output"] and "hand in these files" in results["output"]
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "cskv.py").write_text("")
    assert problems.find_submission(tmp_path) == tmp_path / "inner"
