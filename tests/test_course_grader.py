"""The course's command lines, and the processes that students' code runs in: ways to cheat."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile

import pytest

from course import confine, grade, gradescope, leaderboard, problems, release
from course.checks import factors
from course.problems import ROOT
from course.sandbox import Limits, Sandbox, Stopped
from support.command import UserError
from tests.helpers import call, tiny_model
from tests.test_course import PROBLEMS, REFERENCE, SOLVED, wrong

SVD = "cskv.svd_factors"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A student's folder."""
    folder = tmp_path_factory.mktemp("course") / "student"
    release.run(release.parse_arguments(["--out", str(folder)]))
    return folder


def command(folder, *words, **more):
    """python -m WORDS in a folder: a finished process."""
    words = [str(word) for word in words]
    run = [sys.executable, "-m", *words]
    return subprocess.run(run, cwd=folder, capture_output=True, text=True, timeout=300, **more)


def points(out):
    """The total in what `grade` printed."""
    return int(re.search(r"^total +(\d+) of ", out, re.M).group(1))


def solve(folder, *names):
    """Puts right functions into a student's folder."""
    for name in names:
        module = name.split(".")[0]
        file = folder / f"{module}.py"
        function = problems.function_text(SOLVED[module], name)
        file.write_text(problems.put_function(file.read_text(), name, function))


def write_modules(folder, modules):
    """Writes a student's files."""
    (folder / "beyond").mkdir(parents=True)
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)


# ------------------------------------------------------------------------------------- release


def test_release_has_no_solution(released):
    """Each line of a solution that is long enough to be one is gone from the files to write in, and
    no other file of a student's folder has it."""
    with zipfile.ZipFile(released / "course" / "given.zip") as archive:
        given = {name[:-3]: archive.read(name).decode() for name in archive.namelist()}
    assert given == problems.read_modules(released) == REFERENCE.given
    files = [*released.glob("course/**/*.py"), *released.glob("support/*.py")]
    files += [f for f in released.glob("beyond/*.py") if f"beyond/{f.stem}" not in given]
    # scenarios.py calls the functions, and so has lines that call them.
    others = "".join(f.read_text(encoding="utf-8") for f in files if f.name != "scenarios.py")
    for name in (name for problem in PROBLEMS.values() for name in problem.names):
        module = name.split(".")[0]
        empty = problems.function_text(given[module], name)
        function = problems.function_text(SOLVED[module], name)
        body = [line for line in function.splitlines() if line not in empty.splitlines()]
        assert body
        for line in body:
            assert given[module].count(line) < SOLVED[module].count(line), (name, line)
            assert len(line.strip()) < 45 or line.strip() not in others, (name, line)


def test_release_keeps_contracts(released):
    """Signatures and docstrings stay; the bodies name the problem and its page."""
    for id, problem in PROBLEMS.items():
        for name in problem.names:
            module = name.split(".")[0]
            text = (released / f"{module}.py").read_text()
            ours, theirs = (problems.find_function(t, name) for t in (SOLVED[module], text))
            assert ast.unparse(ours.args) == ast.unparse(theirs.args)
            assert ast.unparse(ours.returns) == ast.unparse(theirs.returns)
            assert ast.get_docstring(ours) == ast.get_docstring(theirs)
            assert f"problem {id}: " in problems.function_text(text, name)
    page = (released / "course" / "README.md").read_text()
    for id, problem in PROBLEMS.items():
        assert re.search(rf"^## Problem {id}\b.*{problem.points} points", page, re.M | re.I)
        for name in problem.names:
            assert f"`{name.split('.', 1)[1]}`" in page, name


def test_release_is_whole_or_not_there(tmp_path, capsys, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    for out, what in (
        (tmp_path / "full", "not an empty folder"),
        (tmp_path / "no" / "x", "make it"),
    ):
        code, _, err = call(release, capsys, "--out", out)
        assert code == 2 and what in err and err.count("\n") == 1
    monkeypatch.setattr(release, "write_given", lambda given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(release, capsys, "--out", tmp_path / "half")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_name_that_is_no_more_is_an_error(capsys, monkeypatch, tmp_path):
    renamed = {**SOLVED, "quant": SOLVED["quant"].replace("def unpack(", "def unpack_all(")}
    monkeypatch.setattr(problems, "read_modules", lambda folder: renamed)
    code, _, err = call(release, capsys, "--out", tmp_path / "x")
    assert code == 2 and "problem d: quant.py has no function unpack" in err


def test_the_students_own_check(released, tmp_path):
    """In the released folder, with nothing else of the project, and one problem solved."""
    folder = tmp_path / "student"
    shutil.copytree(released, folder)
    solve(folder, *PROBLEMS["a"].names)
    done = command(folder, "course.grade")
    assert done.returncode == 0 and points(done.stdout) == 10, done.stdout + done.stderr
    assert done.stdout.count("not written yet") == 10


@pytest.mark.slow
def test_the_student_has_no_reference(released, tmp_path):
    """A function that builds on one of another problem: named there, and right for the grader."""
    folder = tmp_path / "student"
    shutil.copytree(released, folder)
    solve(folder, *PROBLEMS["e"].names)
    done = command(folder, "course.grade", "--problem", "e")
    assert points(done.stdout) == 13 and "problem d: fake_quantize is to be written" in done.stdout
    done = command(ROOT, "course.grade", folder, "--problem", "e")
    assert points(done.stdout) == 15, done.stdout


@pytest.mark.slow
def test_reference_and_empty_release(released):
    """The three commands' results, and their time: well under the three minutes allowed."""
    start = time.time()
    done = command(ROOT, "course.grade", ROOT)
    assert done.returncode == 0 and points(done.stdout) == 100, done.stdout + done.stderr
    assert time.time() - start < 180
    assert points(command(ROOT, "course.grade", released).stdout) == 0


def test_mistakes_are_one_line(tmp_path, capsys):
    for words in ([tmp_path], [tmp_path / "none"], [], [ROOT, "--problem", "x"]):
        code, _, err = call(grade, capsys, *words)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    code, _, err = call(gradescope, capsys)
    assert code == 2 and "--out autograder.zip" in err


def test_the_same_seed_draws_the_same_inputs():
    """So that a run can be repeated; another seed draws others."""
    draws = [grade.Draw(f"{seed}-x").normal(5) for seed in (1, 1, 2)]
    assert draws[0].equal(draws[1]) and not draws[0].equal(draws[2])


# --------------------------------------------------------------------------------------- cheats

FAST = Limits(cpu_seconds=4, seconds=12, memory=2**28)
ZEROS = "return LowRank(torch.zeros(W.shape[0], rank).to(W), torch.zeros(rank, W.shape[1]).to(W))"
CHEATS = {
    "the interpreter is left": ("import sys; sys.exit(0)", "ended the process, with status 0"),
    "the process is left": ("import os; os._exit(0)", "ended the process, with status 0"),
    "an endless loop": ("while True: pass", "at most 4 seconds"),
    "sleep": ("import time; time.sleep(1000)", "did not end within"),
    "a print flood": ("while True: print('x' * 1000)", "it printed"),
    "a quiet flood": (
        f"try:\n        while True: print('x' * 1000)\n    except OSError: pass\n    {ZEROS}",
        "it printed",
    ),
    "all of the memory": ("[bytearray(2**28) for _ in range(1000)]", "MemoryError"),
    "a crash": ("import signal; signal.raise_signal(signal.SIGSEGV)", "crashed with signal 11"),
    "a file elsewhere": ("open('{elsewhere}/x', 'w').write('100')", "not allowed in a graded"),
    "a file in its folder": ("open('note', 'w').write('100')", "not allowed in a graded"),
    "the reference is read": ("exec(open('{root}/cskv.py').read())", "PermissionError"),
    "the reference is read by code in C": (
        "raw = torch.from_file('{root}/cskv.py', size=20000, dtype=torch.uint8)\n"
        "    text = bytes(raw.tolist()).decode(errors='replace')\n"
        "    start, end = text.index('def svd_factors'), text.index('def asvd_factors')\n"
        "    own = dict(globals()); exec(text[start:end], own)\n"
        "    return own['svd_factors'](W, rank)",
        "RuntimeError: unable to open file",
    ),
    "the reference is imported": (
        "import sys; sys.path.insert(0, '{root}'); sys.modules.pop('cskv')\n"
        "    import importlib; importlib.invalidate_caches()\n"
        "    import experiments",
        "No module named",
    ),
    "the grader is stopped": ("import os; os.kill(os.getppid(), 9)", "not allowed in a graded"),
    "another process": ("import subprocess; subprocess.run(['ls'])", "not allowed in a graded"),
    "a copy of the process": ("import os; os.fork()", "not allowed in a graded"),
    "the limits are lifted": (
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (9**9, 9**9))",
        "not allowed in a graded",
    ),
    "machine code": ("import ctypes; ctypes.CDLL(None).exit(0)", "not allowed in a graded"),
    "the network": ("import socket; socket.socket()", "not allowed in a graded"),
    "torch is patched": (
        "zero = lambda *a, **k: torch.zeros(1000)\n"
        "    torch.linalg.eigvalsh = torch.linalg.svdvals = zero\n"
        "    torch.equal = torch.allclose = lambda *a, **k: True\n"
        "    torch.Tensor.__le__ = torch.Tensor.__eq__ = lambda *a: True\n"
        f"    {ZEROS}",
        "times the least",
    ),
    "the checks are patched": (
        "import sys, types\n"
        "    for name in ('pytest', 'course', 'course.sandbox', 'course.checks.factors'):\n"
        "        sys.modules[name] = types.ModuleType(name)\n"
        "    sys.modules['course.sandbox'].expect = lambda *a, **k: None\n"
        "    sys.modules['course.checks.factors'].svd_is_nearest = lambda *a: None\n"
        f"    {ZEROS}",
        "times the least",
    ),
    "the answer is forged": (
        "import sys; main = sys.modules['__main__']\n"
        "    main.answer = lambda request: main.save({{}}, {{'points': '100', 'ok': '1'}})\n"
        f"    {ZEROS}",
        "A was not returned",
    ),
    "points are written to the grader": (
        "import os\n"
        "    for stream in range(3, 20):\n"
        "        try: os.write(stream, b'total 100 of 100' * 100)\n"
        "        except OSError: pass\n"
        f"    {ZEROS}",
        "",
    ),
    "a huge answer": ("return LowRank(torch.zeros(2**25), torch.zeros(2**25))", "bytes"),
    "no numbers": (ZEROS.replace("torch.zeros(W", "torch.nan * torch.zeros(W"), "not finite"),
    "the answer is searched for": (
        "import gc, sys\n"
        "    for frame in sys._current_frames().values():\n"
        "        while frame:\n"
        "            if 'floor' in frame.f_locals or 'want' in frame.f_locals: raise SystemExit\n"
        "            frame = frame.f_back\n"
        "    for thing in gc.get_objects():\n"
        "        if type(thing).__name__ in ('Sandbox', 'Verdict', 'Draw'): raise SystemExit\n"
        f"    {ZEROS}",
        "times the least",
    ),
    "a thread goes on": (
        "import threading, time\n"
        "    def later():\n"
        "        while True: time.sleep(0.1)\n"
        "    threading.Thread(target=later).start()\n"
        f"    {ZEROS}",
        "times the least",
    ),
    "a trap at the end": (
        f"import atexit, time; atexit.register(time.sleep, 1000)\n    {ZEROS}",
        "times the least",
    ),
}
QUICK = ("torch is patched", "a file elsewhere")


def cheat(body):
    """A student's files with nothing but this body, in the place of svd_factors."""
    module = problems.function_text(wrong(SVD, body)["cskv"], SVD)
    return {
        **REFERENCE.given,
        "cskv": problems.put_function(REFERENCE.given["cskv"], SVD, module),
    }


@pytest.mark.parametrize(
    "what",
    [pytest.param(w, marks=[] if w in QUICK else pytest.mark.slow) for w in CHEATS],
)
def test_cheat_has_no_points(what, tmp_path):
    if "code in C" in what and not confine.version():
        pytest.skip("no Landlock here")
    body, said = CHEATS[what]
    body = body.replace("{elsewhere}", str(tmp_path)).replace("{root}", str(ROOT))
    body = body.replace("{{", "{").replace("}}", "}")
    tmp_path.chmod(0o777)  # the file could be written, were it allowed
    verdict = grade.grade_problem(PROBLEMS["b"], REFERENCE, cheat(body), 1, FAST)
    assert verdict.points == 0, verdict.text()
    assert said in verdict.text(), verdict.text()
    assert not list(tmp_path.iterdir())


def test_strange_answers_are_no_end_of_the_grader(monkeypatch):
    """An error in a check, and a process that is gone when its memory is asked for."""

    def strange(student, draw):
        raise ValueError("strange")

    monkeypatch.setattr(factors, "svd_is_nearest", strange)
    verdict = grade.grade_problem(PROBLEMS["b"], REFERENCE, cheat("return 0"), 1, FAST)
    assert verdict.points == 0 and "no check of this was possible: strange" in verdict.text()
    with Sandbox(REFERENCE.given, FAST) as student:
        assert problems.read_modules(student.folder) == REFERENCE.given
        student.process.kill()
        student.process.wait()
        with pytest.raises(Stopped):
            student.most_memory()


def test_a_link_to_the_reference_is_no_solution(tmp_path):
    """A link to a file, or to its folder."""
    for module in problems.MODULES:
        if "/" not in module:
            (tmp_path / f"{module}.py").symlink_to(ROOT / f"{module}.py")
    (tmp_path / "beyond").symlink_to(ROOT / "beyond")
    assert problems.read_modules(tmp_path) == {}
    (tmp_path / "link").symlink_to(ROOT)  # the whole folder may be one
    assert problems.read_modules(tmp_path / "link") == SOLVED


@pytest.mark.slow
def test_others_are_graded(tmp_path):
    """A file that is no Python and one that is missing cost their own problems alone; so does a
    function that ends the process."""
    write_modules(tmp_path, SOLVED)
    (tmp_path / "quant.py").write_text("def quantize(:\n")
    (tmp_path / "train.py").unlink()
    (tmp_path / "cskv.py").write_text(wrong(SVD, "import os; os._exit(0)")["cskv"])
    verdicts = {v.problem.id: v for v in grade.grade(tmp_path, 1)}
    assert {id: v.points for id, v in verdicts.items()} == dict(a=0, b=0, c=25, d=0, e=0, f=10)
    assert "quant.py, line 1 is not Python" in verdicts["d"].text()
    assert "there is no file train.py" in verdicts["e"].text()


# ------------------------------------------------------------------------------------- gradescope


def unpack(folder, student):
    """What Gradescope makes of the zip file and a submission. Returns the environment."""
    gradescope.run(gradescope.parse_arguments(["--out", str(folder / "autograder.zip")]))
    shutil.unpack_archive(folder / "autograder.zip", folder / "source")
    for name in ("setup.sh", "run_autograder"):
        with zipfile.ZipFile(folder / "autograder.zip") as archive:
            assert archive.getinfo(name).external_attr >> 16 & 0o111
        (folder / "source" / name).chmod(0o755)
        assert subprocess.run(["bash", "-n", folder / "source" / name]).returncode == 0
    write_modules(folder / "submission", student)
    return {**os.environ, "AUTOGRADER": str(folder), "PYTHON": sys.executable}


def check_results(folder):
    """results.json, after a look at what Gradescope demands of it."""
    results = json.loads((folder / "results" / "results.json").read_text())
    assert [test["max_score"] for test in results["tests"]] == [10, 20, 25, 20, 15, 10]
    for test in results["tests"]:
        assert 0 <= test["score"] <= test["max_score"]
        assert test["visibility"] == "visible" and test["output"] and test["name"]
    assert results["leaderboard"][0]["value"] == sum(test["score"] for test in results["tests"])
    return results


@pytest.mark.slow
def test_gradescope(tmp_path):
    """In a fresh folder, with nothing of the project around: the zip, a submission, its results."""
    student = {**REFERENCE.given, "model": SOLVED["model"]}
    done = subprocess.run(
        [tmp_path / "source" / "run_autograder"],
        env=unpack(tmp_path, student),
        cwd="/",
        capture_output=True,
        text=True,
    )
    results = check_results(tmp_path)
    assert done.returncode == 0, done.stderr
    assert [test["score"] for test in results["tests"]] == [3, 0, 0, 0, 0, 0]
    assert "not written yet" in results["tests"][1]["output"]


@pytest.mark.parametrize("how", ["crash", "time"])
def test_gradescope_has_results_after_a_crash(tmp_path, how):
    """Zero points and a message, whatever becomes of the grader: here Python cannot start, or all
    is killed before the first problem is done."""
    environment = unpack(tmp_path, SOLVED)
    run = [tmp_path / "source" / "run_autograder"]
    if how == "crash":
        environment["PYTHON"] = "/no/python"
        assert subprocess.run(run, env=environment, capture_output=True).returncode
    else:
        with pytest.raises(subprocess.TimeoutExpired):
            subprocess.run(run, env=environment, capture_output=True, timeout=0.7)
    results = check_results(tmp_path)
    assert sum(test["score"] for test in results["tests"]) == 0
    assert "not come to an end" in results["output"]


@pytest.mark.slow
def test_gradescope_measures_a_plan(tmp_path):
    """Within the budget it is on the leaderboard, beyond it or damaged it is not, with a reason."""
    layers = json.loads((ROOT / "weights" / "teacher" / "config.json").read_text())[
        "num_hidden_layers"
    ]
    (tmp_path / "cskv.py").write_text("")
    for pairs, what in (
        ([[4, 2]] * layers, "nats a digit"),
        ([[60, 16]] * layers, "does not count"),
    ):
        (tmp_path / "plan.json").write_text(json.dumps({"keys": pairs, "values": pairs}))
        gradescope.grade_submission(tmp_path, tmp_path / "results.json")
        results = json.loads((tmp_path / "results.json").read_text())
        assert what in results["output"], results["output"]
        assert len(results["leaderboard"]) == (2 if what == "nats a digit" else 1)


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"keys": []}', '{"keys": [[1, 4]], "values": [[1, 4]]}', "[" * 10**5, "1e999"]
    + [
        json.dumps({"keys": [[r, b]] * 2, "values": [[1, 4]] * 2})
        for r, b in ((0, 4), (1, 5), (13, 4))
    ],
)
def test_a_plan_that_is_none(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UserError, match="is no plan"):
        leaderboard.read_plan(tmp_path / "plan.json", tiny_model())


def test_gradescope_without_files(tmp_path):
    gradescope.grade_submission(tmp_path, tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    assert "cskv.py, " in results["output"] and "hand in these files" in results["output"]


def test_gradescope_submission_in_a_folder(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "cskv.py").write_text("")
    assert gradescope.find_files(tmp_path) == tmp_path / "inner"
