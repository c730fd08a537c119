"""Problem b: factors, against what each of them is the minimum of. All in float64."""

import torch
from torch import Tensor

from course.checks.telling import finds_numbers
from course.sandbox import Draw, Failed, Sandbox, expect, look, relative_error


def draw_weight(draw: Draw) -> tuple[Tensor, int]:
    """W [hidden, d_kv], and a rank below both."""
    hidden, d_kv = draw.integer(4, 24), draw.integer(4, 16)
    rank = draw.integer(1, min(hidden, d_kv) - 1)
    return draw.normal(hidden, d_kv), rank


def product(answer: dict, W: Tensor, rank: int) -> Tensor:
    """A B [hidden, d_kv]."""
    A = look(answer, "A", (W.shape[0], rank))
    return A.double() @ look(answer, "B", (rank, W.shape[1])).double()


def at_floor(name: str, lost: Tensor, whole: Tensor, rank: int, tolerance: float) -> None:
    """Raises `Failed` unless |lost|^2 is the least that a matrix of this rank can leave of `whole`:
    the sum of the squares of the singular values left out (Eckart and Young). It may be 0 but for
    rounding."""
    floor = torch.linalg.svdvals(whole)[rank:].square().sum()
    least = floor + 1e-10 * whole.square().sum()
    loss = lost.square().sum()
    if not loss <= least * (1 + tolerance):
        raise Failed(f"{name} is {loss / least:.6g} times the least that it can be")


def svd_is_nearest(student: Sandbox, draw: Draw) -> None:
    """No A B of this rank is nearer to W: |W - A B|^2 is the sum of the squares of the singular
    values left out (Eckart and Young)."""
    for _ in range(5):
        W, rank = draw_weight(draw)
        answer = student.ask("cskv.svd_factors", {"W": W}, rank=rank)
        at_floor("|W - A B|^2", W - product(answer, W, rank), W, rank, 1e-8)


def svd_is_balanced(student: Sandbox, draw: Draw) -> None:
    """The singular values are shared evenly: A^T A = B B^T = diag(S_r), the largest first."""
    for _ in range(3):
        W, rank = draw_weight(draw)
        answer = student.ask("cskv.svd_factors", {"W": W}, rank=rank)
        want = torch.linalg.svdvals(W)[:rank].diag()
        A, B = look(answer, "A", (len(W), rank)), look(answer, "B", (rank, W.shape[1]))
        for name, got in (("A^T A", A.T @ A), ("B B^T", B @ B.T)):
            expect({name: got}, name, want, 1e-8, "split S evenly")


def weigh_rows(student: Sandbox, x_abs: Tensor, W: Tensor, rank: int, **alpha) -> None:
    """Raises `Failed` unless the loss with rows weighed by x_abs^alpha is at its minimum."""
    answer = student.ask("cskv.asvd_factors", {"W": W, "x_abs": x_abs}, rank=rank, **alpha)
    S = x_abs.pow(alpha.get("alpha", 0.5))[:, None]
    lost = S * (W - product(answer, W, rank))
    at_floor(f"|S W - S A B|^2 with {alpha or 'no alpha'}", lost, S * W, rank, 1e-6)


def asvd_weighs_rows(student: Sandbox, draw: Draw) -> None:
    """No A B of this rank has a smaller |S W - S A B|^2, S = diag(mean |x|^alpha)."""
    for alpha in ({}, {"alpha": 0.5}, {"alpha": 1.0}, {"alpha": 0.25}):
        W, rank = draw_weight(draw)
        weigh_rows(student, torch.exp(2 * draw.normal(len(W))), W, rank, **alpha)


def asvd_meets_silent_channels(student: Sandbox, draw: Draw) -> None:
    """A channel of x that is always 0 makes nothing infinite."""
    W, rank = draw_weight(draw)
    x_abs = torch.exp(draw.normal(len(W)))
    x_abs[draw.integer(0, len(W) - 1)] = 0
    weigh_rows(student, x_abs, W, rank)


def draw_inputs(draw: Draw, hidden: int, tokens: int) -> Tensor:
    """Inputs x [tokens, hidden] of a layer, channels of different sizes that go together."""
    mix = draw.normal(hidden, hidden) * torch.exp(draw.normal(hidden))
    return draw.normal(tokens, hidden) @ mix


def optimal_reaches_the_floor(student: Sandbox, draw: Draw) -> None:
    """The mean of |x W - x A B|^2 is the sum of the eigenvalues of E k^T k left out, so no other
    A B of this rank has less. Also with fewer tokens than channels."""
    for i in range(5):
        W, rank = draw_weight(draw)
        rank = min(rank, W.shape[1] - 2)
        tokens = 3 * W.shape[1] if i else rank + 1
        x = draw_inputs(draw, len(W), tokens)
        k = x @ W
        answer = student.ask(
            "cskv.optimal_factors", {"W": W, "moment": k.T @ k / tokens}, rank=rank
        )
        at_floor("the loss", k - x @ product(answer, W, rank), k, rank, 1e-7)
        A, B = answer["A"], answer["B"]
        if relative_error(B @ B.T, torch.eye(rank)) > 1e-8:
            raise Failed("the rows of B are not orthonormal; they are eigenvectors")
        if relative_error(A, W @ B.T) > 1e-8:
            raise Failed("A is not W V_r, where B = V_r^T")


def metric_weighs_errors(student: Sandbox, draw: Draw) -> None:
    """With a metric M the mean of e M e^T, e = x W - x A B, is at its least: the sum of the
    eigenvalues of L^T (E k^T k) L left out, M = L L^T."""
    for _ in range(4):
        W, rank = draw_weight(draw)
        d_kv = W.shape[1]
        tokens = 3 * d_kv
        x = draw_inputs(draw, len(W), tokens)
        k = x @ W
        half = draw.normal(d_kv, d_kv) * torch.exp(draw.normal(d_kv))
        metric = half.T @ half + 1e-3 * torch.eye(d_kv, dtype=torch.float64)
        tensors = {"W": W, "moment": k.T @ k / tokens, "metric": metric}
        answer = student.ask("cskv.optimal_factors", tensors, rank=rank)
        # The same by another way: the symmetric square root of M in the place of L.
        values, vectors = torch.linalg.eigh(metric)
        root = vectors * values.sqrt() @ vectors.T
        lost = k - x @ product(answer, W, rank)
        at_floor("the loss", lost @ root, k @ root, rank, 1e-6)


def svd_and_optimal_tell(student: Sandbox, draw: Draw) -> None:
    """From keys and values that are rebuilt with their factors, the teaching model finds numbers.
    Factors have the type of W."""
    for init, rank in (("svd", 56), ("optimal", 48)):
        finds_numbers(student, draw, "scenarios.told_by_factors", init=init, rank=rank)
    W, rank = draw_weight(draw)
    moment = W.T @ W
    for function, more in (("svd_factors", {}), ("optimal_factors", {"moment": moment})):
        answer = student.ask(f"cskv.{function}", {"W": W.float(), **more}, rank=rank)
        look(answer, "A", (len(W), rank), torch.float32)
        look(answer, "B", (rank, W.shape[1]), torch.float32)


def asvd_tells(student: Sandbox, draw: Draw) -> None:
    """From keys and values that are rebuilt with asvd's factors, the model finds numbers.
    They have the type of W."""
    finds_numbers(student, draw, "scenarios.told_by_factors", init="asvd", rank=56)
    W, rank = draw_weight(draw)
    tensors = {"W": W.float(), "x_abs": W.abs().sum(1).float()}
    answer = student.ask("cskv.asvd_factors", tensors, rank=rank)
    look(answer, "A", (len(W), rank), torch.float32)
    look(answer, "B", (rank, W.shape[1]), torch.float32)
