"""The course: what is handed out, that right solutions have all points, and that wrong ones lose.

Solutions run in this process here, in a tenth of the time. test_course_grader.py has what must hold
of the processes that students' code runs in.
"""

import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save

from course import grade, problems, worker
from course.problems import MODULES, ROOT
from course.sandbox import Failed, Limits, Sandbox
from tests.helpers import LargestTensor
from tests.wrong_solutions import WRONG

PROBLEMS = {problem.id: problem for problem in problems.load_problems()}
NAMES = [name for problem in PROBLEMS.values() for name in problem.names]
REFERENCE = problems.load_reference(PROBLEMS.values())
SOLVED = problems.read_modules(ROOT)


def ours():
    """The project's modules that are loaded, by name."""
    names = {*MODULES, "beyond", "support", "scenarios"}
    return {name: m for name, m in sys.modules.items() if name.split(".")[0] in names}


def swap_modules(new):
    """Puts other modules in the place of the project's, which are returned."""
    old = ours()
    for name in old:
        del sys.modules[name]
    sys.modules.update(new)
    return old


class InThisProcess(Sandbox):
    """A sandbox without a process: modules of another folder, as long as a question lasts."""

    def __enter__(self):
        self.folder, self.modules = self.parent / f"tree{len(list(self.parent.iterdir()))}", {}
        for name in ("support", "beyond"):
            for file in (ROOT / name).rglob("*.py"):
                place = self.folder / file.relative_to(ROOT)
                place.parent.mkdir(parents=True, exist_ok=True)
                if str(file.relative_to(ROOT).with_suffix("")) not in MODULES:
                    place.symlink_to(file)
        for module, text in self.files.items():
            (self.folder / f"{module}.py").write_text(text)
        (self.folder / "scenarios.py").symlink_to(ROOT / "course" / "scenarios.py")
        return self

    def __exit__(self, *_):
        pass

    def output(self):
        return ""

    def ask(self, scenario, tensors, **numbers):
        tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        request = save(tensors, {"scenario": scenario, "numbers": json.dumps(numbers)})
        before = swap_modules(self.modules)
        sys.path.insert(0, str(self.folder))
        try:
            with torch.enable_grad():  # as in a process of its own, whatever other tests have set
                answer = worker.answer(request)
        finally:
            sys.path.remove(str(self.folder))
            self.modules = swap_modules(before)
        if "error" in (said := worker.metadata(answer)):
            raise Failed(said["error"])
        return load(answer)

    def peak(self, scenario, tensors, **numbers):
        """With the largest tensor in the place of the process's memory."""
        with LargestTensor([]) as largest:
            answer = self.ask(scenario, tensors, **numbers)
        return answer, largest.largest


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Grades in this process."""
    monkeypatch.setattr(InThisProcess, "parent", tmp_path, raising=False)
    monkeypatch.setattr(grade, "Sandbox", InThisProcess)


def wrong(name, *changes):
    """The reference's files with a function changed: each change is a text in it and another. No
    change but a text: the body is this text."""
    module = name.split(".")[0]
    function = problems.function_text(SOLVED[module], name)
    if len(changes) == 1:
        empty = problems.empty_function(SOLVED[module], name, "x")
        function = problems.function_text(empty, name)
        start = function.index("raise NotImplementedError(")
        function = function[:start] + changes[0] + "\n"
    for old, new in zip(changes[::2], changes[1::2], strict=False):
        assert function.count(old) >= 1, f"{name} has no {old!r} any more"
        function = function.replace(old, new)
    return {**SOLVED, module: problems.put_function(SOLVED[module], name, function)}


ALL_WRONG = [(id, what) for id, ones in WRONG.items() for what in ones]
FIRST = 3  # wrong solutions of each problem in a quick run
QUICK = [(id, what) for id, ones in WRONG.items() for what in list(ones)[:FIRST]]
SLOW = [pytest.param(*one, marks=pytest.mark.slow) for one in ALL_WRONG if one not in QUICK]


def graded(id, student, name=None, seed=1):
    """The verdict on a problem, or on the part of it that a function belongs to."""
    problem = PROBLEMS[id]
    if name:
        problem = replace(problem, parts=tuple(p for p in problem.parts if name in p.names))
    return grade.grade_problem(problem, REFERENCE, student, seed, Limits())


# ---------------------------------------------------------------------------------- what is graded


def test_points():
    assert "".join(PROBLEMS) == "abcdef"
    assert sum(problem.points for problem in PROBLEMS.values()) == 100
    for id, problem in PROBLEMS.items():
        assert len(WRONG[id]) >= 4
        for part in problem.parts:
            assert not set(part.names) & set(part.builds_on)
            graded_too = [name for other in PROBLEMS.values() for name in other.names]
            assert set(part.builds_on) <= set(graded_too)


def test_every_function_is_in_one_problem():
    assert len(NAMES) == len(set(NAMES))


@pytest.mark.parametrize("id", PROBLEMS)
def test_right_solution(id, here):
    verdict = graded(id, SOLVED, seed=grade.fresh_seed())
    assert verdict.points == PROBLEMS[id].points, verdict.text()


@pytest.mark.parametrize("id, what", QUICK + SLOW)
def test_wrong_solution_loses_in_its_problem(id, what, here):
    name, *changes = WRONG[id][what]
    verdict = graded(id, wrong(name, *changes), name)
    most = sum(sum(p.checks.values()) for p in PROBLEMS[id].parts if name in p.names)
    assert verdict.points < most


def test_wrong_solution_loses_in_no_other():
    """The verdict on a part depends on nothing but the files that it is checked with. These have of
    a student only the functions of the part (the next test): and each wrong solution differs from
    the right one in one function, which is in one part."""
    for id, what in ALL_WRONG:
        name, *changes = WRONG[id][what]
        student = wrong(name, *changes)
        assert name in PROBLEMS[id].names
        for other in NAMES:
            module = other.split(".")[0]
            functions = [
                problems.function_text(files[module], other) for files in (student, SOLVED)
            ]
            assert (functions[0] != functions[1]) == (other == name), (what, other)


def test_a_missing_file_costs_its_own_problem():
    student = {module: text for module, text in SOLVED.items() if module != "beyond/segments"}
    verdict = graded("f", student)
    assert verdict.points == 0
    assert verdict.text().count("there is no file beyond/segments.py") == len(PROBLEMS["f"].parts)
    for id in "abcde":
        for part in PROBLEMS[id].parts:
            both = [problems.assemble(REFERENCE, part, files) for files in (student, SOLVED)]
            assert both[0] == both[1]


def test_parts_have_nothing_else_of_a_student():
    """A student's files in which everything but a part's functions is damaged are as good."""
    for problem in PROBLEMS.values():
        for part in problem.parts:
            student = dict(SOLVED)
            for name in NAMES:
                module = name.split(".")[0]
                if name not in part.names:
                    student[module] = problems.empty_function(student[module], name, "x")
            student = {
                module: f"import nothing\n{text}\n1 / 0\n" for module, text in student.items()
            }
            both = [problems.assemble(REFERENCE, part, files) for files in (student, SOLVED)]
            assert both[0] == both[1], part.names


def test_reference_is_out_of_reach():
    """The files that a part is checked with have the reference of what it builds on, and of nothing
    else that is graded: a student who hands in nothing gets nothing to run."""
    for problem in PROBLEMS.values():
        for part in problem.parts:
            files = problems.assemble(REFERENCE, part, REFERENCE.given)
            for other in PROBLEMS.values():
                for name in other.names:
                    module = name.split(".")[0]
                    function = problems.function_text(files[module], name)
                    solved = problems.function_text(SOLVED[module], name)
                    assert (function == solved) == (name in part.builds_on), (part.names, name)
