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

from course import grade, gradescope, problems, release, worker
from course.problems import MODULES, ROOT
from course.sandbox import Failed, Limits, Sandbox
from tests.helpers import LargestTensor, call

PROBLEMS = {problem.id: problem for problem in problems.load_problems()}
NAMES = [name for problem in PROBLEMS.values() for name in problem.names]
REFERENCE = problems.load_reference(PROBLEMS.values())
SOLVED = problems.read_modules(ROOT)


def ours():
    """The project's modules that are loaded, by name."""
    names = {*MODULES, "support", "scenarios"}
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
        (self.folder / "support").mkdir(parents=True)
        for module, text in self.files.items():
            (self.folder / f"{module}.py").write_text(text)
        for file in (ROOT / "support").glob("*.py"):
            (self.folder / "support" / file.name).symlink_to(file)
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


PLAIN, FAST = "cskv.BiBranchCache", "cskv.ChunkedBiBranchCache"
ZEROS = "return LowRank(torch.zeros(W.shape[0], rank).to(W), torch.zeros(rank, W.shape[1]).to(W))"
HALF = "torch.cat([eigenvectors[:, : rank // 2 + 1], eigenvectors[:, rank // 2 + 1 - rank :]], 1)"
WRONG = {
    "a": {
        "only what is used": ("model.LayerCache.nbytes", "untyped_storage().nbytes()", "nbytes"),
        "zero": ("model.LayerCache.nbytes", "return 0"),
        "short groups are free": ("quant.bits_per_element", "-(-size // GROUP)", "(size // GROUP)"),
        "no minimum": ("quant.bits_per_element", "2 * 16", "16"),
        "one size only": ("quant.bits_per_element", "return bits + 1"),
        "keys only": ("infer.full_bytes", "2 * 2 *", "2 *"),
        "bits forgotten": ("infer.nominal_ratio", "pair.rank * pair.bits", "pair.rank * 16"),
        "kept, not removed": ("infer.nominal_ratio", "return 1 - ", "return "),
    },
    "b": {
        "no root": ("cskv.svd_factors", "S[:rank].sqrt()", "S[:rank]"),
        "all in A": ("cskv.svd_factors", "* root, root[:, None] *", "* S[:rank],"),
        "the last ones": ("cskv.svd_factors", "U[:, :rank]", "U[:, -rank:]"),
        "zeros": ("cskv.svd_factors", ZEROS),
        "not scaled back": ("cskv.asvd_factors", "scaled.A / scale[:, None]", "scaled.A"),
        "alpha forgotten": ("cskv.asvd_factors", "x_abs.pow(alpha)", "x_abs"),
        "divides by zero": ("cskv.asvd_factors", " + 1e-6", ""),
        "half the ranks swapped": (
            "cskv.optimal_factors",
            "eigenvectors[:, -rank:].flip(1)",
            HALF,
        ),
        "svd instead": ("cskv.optimal_factors", "return svd_factors(W, rank)"),
        "metric forgotten": ("cskv.optimal_factors", "if metric is not None:", "if False:"),
        "L on the wrong side": ("cskv.optimal_factors", "L.T @ moment", "L @ moment"),
    },
    "c": {
        "window too short by one": (f"{PLAIN}.decode", "t + 1 - S, self.window)", "t - S, self.window - 1)"),
        "window too long by one": (f"{PLAIN}.decode", "t + 1 - m", "t + 2 - m"),
        "ring off by one": (f"{PLAIN}.decode", "(t - self.sinks) % self.window", "(t + 1) % self.window"),
        "key at the next position": (f"{PLAIN}.decode", "rope.rotate(k, t)", "rope.rotate(k, t + 1)"),
        "sliding window forgotten": (f"{PLAIN}.decode", "self.sliding_window or t + 1", "t + 1"),
        "rebuilt keys from position 0": (f"{PLAIN}.attend", "self.k_bias), first)", "self.k_bias), 0)"),
        "RoPE at the wrong stage": (f"{PLAIN}.prefill", "x[:, self.sinks :] @ self.A_k", "rope.rotate(x[:, self.sinks :].repeat(1, 1, 2), 0)[..., : x.shape[2]] @ self.A_k"),
        "bias forgotten": (f"{PLAIN}.attend", "B.T, bias)", "B.T)"),
        "zeros": (f"{PLAIN}.attend", "return torch.zeros_like(q)"),
        "the query": (f"{PLAIN}.attend", "return q"),
        "old tokens dropped": (f"{PLAIN}.attend", "return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)"),
        "sinks have latents": (f"{PLAIN}.prefill", "x[:, self.sinks :]", "x"),
        "prompt read with the factors": (f"{PLAIN}.prefill", "return causal_attention(q, k, v", "return causal_attention(q, k, v * 0.9"),
        "one head only": (f"{PLAIN}.attend", "enable_gqa=True", "enable_gqa=False"),
    },
    "d": {
        "wrong axis of limits": ("quant.group_limits", "n = x.shape[dim]", "dim = -1\n    n = x.shape[dim]"),
        "wrong axis of codes": ("quant.quantize", "n = x.shape[dim]", "dim = -2\n    n = x.shape[dim]"),
        "missing clamp": ("quant.quantize", ".round().clamp(0, 2**bits - 1)", ".round()"),
        "down, not to the nearest": ("quant.quantize", ".round()", ".floor()"),
        "limits rounded inwards": ("quant.group_limits", "minimum = round_down(low)", "minimum = low.half()"),
        "2^bits steps": ("quant.group_limits", "levels = 2**bits - 1", "levels = 2**bits"),
        "zero-point not clamped": ("quant.group_limits", ".round().clamp(0, levels)", ".round()"),
        "short group forgotten": ("quant.dequantize", "if rest:", "if False:"),
        "minimum forgotten": ("quant.dequantize", "groups.add_", "groups.clone().add_"),
        "gradient beyond the levels": ("quant.fake_quantize", "torch.where(inside, stored + (x - x.detach()), stored)", "stored + (x - x.detach())"),
        "x itself": ("quant.fake_quantize", "return x * 1"),
        "other order of tokens": ("quant.pack", "part << (i * width)", "part << ((per_byte - 1 - i) * width)"),
        "not packed": ("quant.pack", "return codes"),
        "four bits only": ("quant.unpack", "return torch.cat([packed & 15, packed >> 4], -2)"),
    },
    "e": {
        "sum, not mean": ("train.layer_loss", "k.to(dtype))", 'k.to(dtype), reduction="sum")'),
        "zero": ("train.layer_loss", "return ((x @ pair.A) @ pair.B).sum() * 0"),
        "not rounded": ("train.layer_loss", "pair.bits < 16", "False"),
        "clamped forgotten": ("train.layer_loss", "dim, pair.clamped", "dim"),
        "wrong axis": ("train.layer_loss", "dim, pair.clamped", "-1, pair.clamped"),
        "in float32": ("train.layer_loss", "c.to(dtype) @ pair.B.to(dtype), k.to(dtype)", "c @ pair.B, k"),
        "one eigenvalue too few": ("train.loss_floor", "- rank]", "- rank - 1]"),
        "largest eigenvalues": ("train.loss_floor", "[: len(moment) - rank]", "[rank:]"),
        "mere rounding": ("train.loss_floor", "dropped * (", "dropped + 0 * ("),
        "gradients pile up": ("train.Tuner.step", "self.optimizer.zero_grad(set_to_none=False)", "pass"),
        "rate does not fall": ("train.Tuner.step", "= self.rate", "= self.lr"),
        "steps not counted": ("train.Tuner.step", "self.steps_done += 1", "pass"),
    },
    "f": {
        "positions start at each chunk": (f"{FAST}.attend", "rope.cis[s:e, None]", "rope.cis[: e - s, None]"),
        "last chunk lost": (f"{FAST}.attend", "range(first, old, self.chunk)", "range(first, old - self.chunk + 1, self.chunk)"),
        "all at once": (f"{FAST}.attend", "chunks = [", "chunks = [(first, old)] if n else []\n        _ = ["),
        "not scaled": (f"{FAST}.attend", " / math.sqrt(D)", ""),
        "bias forgotten": (f"{FAST}.attend", "if self.v_bias is not None:", "if False:"),
        "zeros": (f"{FAST}.attend", "return torch.zeros_like(q)"),
        "values rebuilt": (
            f"{FAST}.attend",
            "p_old[..., s - first : e - first] @ self.c_v.read(s - S, e - S).to(p.dtype)",
            "p_old[..., s - first : e - first].view(B, self.H_kv, -1, e - s) @ (self.c_v.read(s - S, e - S).to(p.dtype)[:, None] @ self.B_v)",
            "p_c.view(B, self.H_kv, -1, p_c.shape[-1]) @ self.B_v",
            "p_c",
        ),
    },
}  # fmt: skip
ALL_WRONG = [(id, what) for id, ones in WRONG.items() for what in ones]


def graded(id, student, name=None, seed=1):
    """The verdict on a problem, or on the part of it that a function belongs to."""
    problem = PROBLEMS[id]
    if name:
        problem = replace(problem, parts=tuple(p for p in problem.parts if name in p.names))
    return grade.grade_problem(problem, REFERENCE, student, seed, Limits())


# ------------------------------------------------------------------------------------ what is graded


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
    for seed in (1, 2):
        verdict = graded(id, SOLVED, seed=seed)
        assert verdict.points == PROBLEMS[id].points, verdict.text()


@pytest.mark.parametrize("id, what", ALL_WRONG)
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
