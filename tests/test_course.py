"""The course: what is handed out, that right solutions have all points, and that wrong ones lose.

Solutions run in this process here, in a tenth of the time. test_course_grader.py has what must hold
of the processes that students' code runs in.
"""

import re
import secrets
import sys
from dataclasses import replace
from textwrap import indent
from unittest import mock

import pytest
import torch

from course import grade, problems, sandbox, worker
from course.problems import MODULES, function_text
from course.sandbox import Limits, Sandbox
from tests.wrong_solutions import WRONG

PROBLEMS = {problem.id: problem for problem in problems.load_problems()}
PROBLEM_OF = {name: id for id, problem in PROBLEMS.items() for name in problem.names}
PARTS = [part for problem in PROBLEMS.values() for part in problem.parts]
REFERENCE = problems.load_reference(PROBLEMS.values())
SOLVED = REFERENCE.solved


def swap_modules(new):
    """Puts other modules in the place of the project's, which are returned."""
    names = {*MODULES, "beyond", "support", "scenarios"}
    old = {name: m for name, m in sys.modules.items() if name.split(".")[0] in names}
    for name in old:
        del sys.modules[name]
    sys.modules.update(new)
    return old


class InThisProcess(Sandbox):
    """A sandbox without a process: modules of another folder, as long as a question lasts."""

    def __enter__(self):
        self.folder = self.parent / f"tree{len(list(self.parent.iterdir()))}"
        self.modules = {}
        problems.copy_project(self.folder, sandbox.COPIED, self.files)
        return self

    def __exit__(self, *_):
        pass

    def output(self):
        return ""

    def exchange(self, request):
        before = swap_modules(self.modules)
        path = [str(self.folder), str(self.folder / "course"), *sys.path]
        try:  # gradients: as in a process of its own, whatever other tests have set
            with mock.patch.object(sys, "path", path), torch.enable_grad():
                return worker.answer(request)
        finally:
            self.modules = swap_modules(before)


def grade_here(monkeypatch, tmp_path):
    """Grades in this process."""
    monkeypatch.setattr(InThisProcess, "parent", tmp_path, raising=False)
    monkeypatch.setattr(grade, "Sandbox", InThisProcess)


def put_solutions(modules, ids):
    """The files with right functions of these problems."""
    for id in ids:
        for name in PROBLEMS[id].names:
            modules = problems.put_function(modules, name, function_text(SOLVED, name))
    return modules


def write_body(modules, name, body):
    """The files with this body in the place of a function's."""
    empty = problems.empty_function(modules, name, "x")
    head, indentation, _ = re.split(r"( +)raise NotImplementedError", function_text(empty, name))
    return problems.put_function(modules, name, head + indent(body.rstrip(), indentation))


def wrong(name, change):
    """The reference's files with a change of wrong_solutions.py."""
    if isinstance(change, str):
        return write_body(SOLVED, name, change)
    function = function_text(SOLVED, name)
    assert change[0] in function, f"{name} has no {change[0]!r} any more"
    return problems.put_function(SOLVED, name, function.replace(*change))


ALL_WRONG = []
for name, changes in WRONG.items():
    for i, what in enumerate(changes):
        ALL_WRONG.append(pytest.param(name, what, marks=[pytest.mark.slow] if i else []))


def graded(id, student, name=None, seed=1, limits=Limits()):  # noqa: B008 (frozen)
    """The verdict on a problem, or on the part of it that a function belongs to."""
    problem = PROBLEMS[id]
    if name:
        problem = replace(problem, parts=[part for part in problem.parts if name in part.names])
    return grade.grade_problem(problem, REFERENCE, student, seed, limits)


# ---------------------------------------------------------------------------------- what is graded


def test_points():
    """100 in all; every function is in one problem, and some wrong solution is one of it."""
    assert "".join(PROBLEMS) == "abcdef"
    assert sum(problem.points for problem in PROBLEMS.values()) == 100
    names = [name for part in PARTS for name in part.names]
    assert set(names) == set(WRONG) and len(names) == len(WRONG)
    for part in PARTS:
        assert set(part.builds_on) <= set(names) - set(part.names)


@pytest.mark.parametrize("id", PROBLEMS)
def test_right_solution(id, monkeypatch, tmp_path):
    grade_here(monkeypatch, tmp_path)
    verdict = graded(id, SOLVED, seed=secrets.randbelow(2**31))
    assert verdict.points == PROBLEMS[id].points, verdict.text()


@pytest.mark.parametrize("name, what", ALL_WRONG)
def test_wrong_solution_loses_in_its_problem(name, what, monkeypatch, tmp_path):
    grade_here(monkeypatch, tmp_path)
    verdict = graded(PROBLEM_OF[name], wrong(name, WRONG[name][what]), name)
    assert verdict.points < verdict.problem.points


def test_a_wrong_solution_loses_in_no_other_problem():
    """The verdict on a part depends on the files that it is checked with, and these have nothing of
    a student but the part's functions: all else may be missing or damaged."""
    for part in PARTS:
        student = REFERENCE.given
        for name in part.names:
            student = problems.put_function(student, name, function_text(SOLVED, name))
        student = {module: f"import nothing\n{text}\n1 / 0\n" for module, text in student.items()}
        both = [problems.assemble(REFERENCE, part, files) for files in (student, SOLVED)]
        assert both[0] == both[1], part.names


def test_reference_is_out_of_reach():
    """The files that a part is checked with have the reference of what it builds on, and of nothing
    else that is graded: a student who hands in nothing gets nothing to run."""
    for part in PARTS:
        files = problems.assemble(REFERENCE, part, REFERENCE.given)
        for name in PROBLEM_OF:
            solved = function_text(files, name) == function_text(SOLVED, name)
            assert solved == (name in part.builds_on), (part.names, name)
