"""Problem b: factors, against what each of them is the minimum of. All in float64."""

import torch
from torch import Tensor

from course.sandbox import Draw, Failed, Sandbox, expect, look, relative_error


def shapes(draw: Draw) -> tuple[int, int, int]:
    """hidden, d_kv and a rank below both."""
    hidden, d_kv = draw.integer(4, 24), draw.integer(4, 16)
    return hidden, d_kv, draw.integer(1, min(hidden, d_kv) - 1)


def product(answer: dict, W: Tensor, rank: int) -> Tensor:
    """A B [hidden, d_kv]."""
    A = look(answer, "A", (W.shape[0], rank))
    return A.double() @ look(answer, "B", (rank, W.shape[1])).double()


def dropped(values: Tensor, rank: int) -> Tensor:
    """The sum of all but the `rank` largest."""
    return values.sort(descending=True).values[rank:].sum()


def at_floor(what: str, loss: Tensor, floor: Tensor, whole: Tensor, tolerance: float) -> None:
    """Raises `Failed` unless a loss is at the least value that it can have, which may be 0 but for
    rounding. `whole` is the loss of A B = 0."""
    least = floor.clamp(min=0) + 1e-10 * whole
    if not loss <= least * (1 + tolerance):
        raise Failed(f"{what} is {loss / least:.6g} times the least that it can be")


def svd_is_nearest(student: Sandbox, draw: Draw) -> None:
    """No A B of this rank is nearer to W: |W - A B|^2 is the sum of the squares of the singular
    values left out (Eckart and Young)."""
    for _ in range(5):
        hidden, d_kv, rank = shapes(draw)
        W = draw.normal(hidden, d_kv)
        answer = student.ask("svd", {"W": W}, rank=rank)
        loss = (W - product(answer, W, rank)).square().sum()
        floor = dropped(torch.linalg.eigvalsh(W.T @ W), rank)
        at_floor("|W - A B|^2", loss, floor, W.square().sum(), 1e-8)


def svd_is_balanced(student: Sandbox, draw: Draw) -> None:
    """The singular values are shared evenly: A^T A = B B^T = diag(S_r), the largest first."""
    for _ in range(3):
        hidden, d_kv, rank = shapes(draw)
        W = draw.normal(hidden, d_kv)
        answer = student.ask("svd", {"W": W}, rank=rank)
        want = torch.linalg.eigvalsh(W.T @ W).flip(0)[:rank].sqrt().diag()
        A, B = look(answer, "A", (hidden, rank)), look(answer, "B", (rank, d_kv))
        for name, got in (("A^T A", A.T @ A), ("B B^T", B @ B.T)):
            expect({name: got}, name, want, 1e-8, "split S evenly")


def weighed(student: Sandbox, draw: Draw, x_abs: Tensor, W: Tensor, rank: int, alpha) -> Tensor:
    """A B, once the loss with rows weighed by x_abs^alpha is at its minimum."""
    answer = student.ask("asvd", {"W": W, "x_abs": x_abs}, rank=rank, alpha=alpha)
    alpha = 0.5 if alpha is None else alpha
    S = x_abs.pow(alpha)[:, None]
    AB = product(answer, W, rank)
    floor = dropped(torch.linalg.eigvalsh((S * W).T @ (S * W)), rank)
    loss, whole = (S * (W - AB)).square().sum(), (S * W).square().sum()
    at_floor(f"|S W - S A B|^2 with alpha {alpha}", loss, floor, whole, 1e-6)
    return AB


def asvd_weighs_rows(student: Sandbox, draw: Draw) -> None:
    """No A B of this rank has a smaller |S W - S A B|^2, S = diag(mean |x|^alpha)."""
    for alpha in (None, 0.5, 1.0, 0.25):
        hidden, d_kv, rank = shapes(draw)
        x_abs = torch.exp(2 * draw.normal(hidden))
        weighed(student, draw, x_abs, draw.normal(hidden, d_kv), rank, alpha)


def asvd_meets_silent_channels(student: Sandbox, draw: Draw) -> None:
    """A channel of x that is always 0 makes nothing infinite."""
    hidden, d_kv, rank = shapes(draw)
    x_abs = torch.exp(draw.normal(hidden))
    x_abs[draw.integer(0, hidden - 1)] = 0
    weighed(student, draw, x_abs, draw.normal(hidden, d_kv), rank, None)


def text(draw: Draw, hidden: int, d_kv: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Inputs x [tokens, hidden] of a layer, channels of different sizes that go together, and W."""
    mix = draw.normal(hidden, hidden) * torch.exp(draw.normal(hidden))
    return draw.normal(tokens, hidden) @ mix, draw.normal(hidden, d_kv)


def optimal_reaches_the_floor(student: Sandbox, draw: Draw) -> None:
    """The mean of |x W - x A B|^2 is the sum of the eigenvalues of E k^T k left out, so no other
    A B of this rank has less. Also with fewer tokens than channels."""
    for i in range(5):
        hidden, d_kv, rank = shapes(draw)
        rank = min(rank, d_kv - 2)
        tokens = 3 * d_kv if i else rank + 1
        x, W = text(draw, hidden, d_kv, tokens)
        k = x @ W
        moment = k.T @ k / tokens
        answer = student.ask("optimal", {"W": W, "moment": moment}, rank=rank)
        loss = (k - x @ product(answer, W, rank)).square().sum() / tokens
        floor = dropped(torch.linalg.svdvals(k).square() / tokens, rank)
        at_floor("the loss", loss, floor, moment.trace(), 1e-7)
        A, B = answer["A"], answer["B"]
        if relative_error(B @ B.T, torch.eye(rank)) > 1e-8:
            raise Failed("the rows of B are not orthonormal; they are eigenvectors")
        if relative_error(A, W @ B.T) > 1e-8:
            raise Failed("A is not W V_r, where B = V_r^T")


def metric_weighs_errors(student: Sandbox, draw: Draw) -> None:
    """With a metric M the mean of e M e^T, e = x W - x A B, is at its least: the sum of the
    eigenvalues of L^T (E k^T k) L left out, M = L L^T."""
    for _ in range(4):
        hidden, d_kv, rank = shapes(draw)
        tokens = 3 * d_kv
        x, W = text(draw, hidden, d_kv, tokens)
        k, half = x @ W, draw.normal(d_kv, d_kv) * torch.exp(draw.normal(d_kv))
        metric = half.T @ half + 1e-3 * torch.eye(d_kv, dtype=torch.float64)
        tensors = {"W": W, "moment": k.T @ k / tokens, "metric": metric}
        answer = student.ask("optimal", tensors, rank=rank)
        e = k - x @ product(answer, W, rank)
        loss = ((e @ metric) * e).sum() / tokens
        # The same by another way: the symmetric square root of M in the place of L.
        values, vectors = torch.linalg.eigh(metric)
        root = vectors * values.sqrt() @ vectors.T
        floor = dropped(torch.linalg.svdvals(k @ root).square() / tokens, rank)
        whole = (k @ root).square().sum() / tokens
        at_floor("the loss", loss, floor, whole, 1e-6)
