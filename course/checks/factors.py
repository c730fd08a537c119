"""Problem b: factors, against what each of them is the minimum of. All in float64."""

import torch
from torch import Tensor

from course.checks.telling import finds_numbers
from course.sandbox import Draw, Failed, Sandbox, expect, look


def draw_weight(draw: Draw) -> tuple[Tensor, int]:
    """W [hidden, d_kv], and a rank below both."""
    shape = [draw.integer(4, 24), draw.integer(4, 16)]
    rank = draw.integer(1, min(shape) - 1)
    return draw.normal(*shape), rank


def factorize(student: Sandbox, name: str, tensors: dict, rank: int, **numbers) -> tuple:
    """A [hidden, r] and B [r, d_kv] that a function returns, both of the type of W."""
    answer = student.ask(f"cskv.{name}_factors", tensors, rank=rank, **numbers)
    W = tensors["W"]
    A = look(answer, "A", (W.shape[0], rank), W.dtype)
    return A, look(answer, "B", (rank, W.shape[1]), W.dtype)


def at_floor(name: str, lost: Tensor, whole: Tensor, rank: int, tolerance: float) -> None:
    """Raises `Failed` unless |lost|^2 is the least that a matrix of this rank can leave of
    `whole`: the sum of the squares of the singular values left out (Eckart and Young)."""
    floor = torch.linalg.svdvals(whole)[rank:].square().sum()
    least = floor + 1e-10 * whole.square().sum()
    loss = lost.square().sum()
    if not loss <= least * (1 + tolerance):
        raise Failed(f"{name} is {loss / least:.6g} times the least that it can be")


def svd_is_nearest(student: Sandbox, draw: Draw) -> None:
    """No A B of this rank is nearer to W. The singular values are shared evenly: A^T A =
    B B^T = diag(S_r), the largest first."""
    for _ in range(5):
        W, rank = draw_weight(draw)
        A, B = factorize(student, "svd", {"W": W}, rank)
        at_floor("|W - A B|^2", W - A @ B, W, rank, 1e-8)
        want = torch.linalg.svdvals(W)[:rank].diag()
        for name, got in (("A^T A", A.T @ A), ("B B^T", B @ B.T)):
            expect({name: got}, name, want, 1e-8, "split S evenly")


def asvd_weighs_rows(student: Sandbox, draw: Draw) -> None:
    """No A B of this rank has a smaller |S W - S A B|^2, S = diag(mean |x|^alpha)."""
    for alpha in (0.5, 0.5, 1.0, 0.25):
        W, rank = draw_weight(draw)
        x_abs = torch.exp(2 * draw.normal(len(W)))
        A, B = factorize(student, "asvd", {"W": W, "x_abs": x_abs}, rank, alpha=alpha)
        S = x_abs.pow(alpha)[:, None]
        at_floor(f"the loss with alpha {alpha}", S * (W - A @ B), S * W, rank, 1e-6)


def draw_layer(draw: Draw, tokens: int = 48) -> tuple[dict[str, Tensor], Tensor, int]:
    """W and the moment E k^T k of k = x W, the inputs x [tokens, hidden], whose channels differ in
    size and go together, and a rank."""
    W, rank = draw_weight(draw)
    mix = draw.normal(len(W), len(W)) * torch.exp(draw.normal(len(W)))
    x = draw.normal(tokens, len(W)) @ mix
    k = x @ W
    return {"W": W, "moment": k.T @ k / tokens}, x, min(rank, W.shape[1] - 2)


def optimal_reaches_the_floor(student: Sandbox, draw: Draw) -> None:
    """The mean of |x W - x A B|^2 is the sum of the eigenvalues of E k^T k left out, so no
    other A B of this rank has less. Also with fewer tokens than channels."""
    for tokens in (3, 48, 48, 48, 48):
        tensors, x, rank = draw_layer(draw, tokens)
        W = tensors["W"]
        A, B = factorize(student, "optimal", tensors, rank)
        at_floor("the loss", x @ W - x @ A @ B, x @ W, rank, 1e-7)
        hint = "the rows of B are orthonormal, they are eigenvectors"
        expect({"B B^T": B @ B.T}, "B B^T", torch.eye(rank), 1e-8, hint)
        expect({"A": A}, "A", W @ B.T, 1e-8, "A is W V_r, where B = V_r^T")


def metric_weighs_errors(student: Sandbox, draw: Draw) -> None:
    """With a metric M the mean of e M e^T, e = x W - x A B, is at its least: the sum of the
    eigenvalues of L^T (E k^T k) L left out, M = L L^T."""
    for _ in range(4):
        tensors, x, rank = draw_layer(draw)
        W = tensors["W"]
        d_kv = W.shape[1]
        half = draw.normal(2 * d_kv, d_kv) * torch.exp(draw.normal(d_kv))
        tensors["metric"] = half.T @ half  # of full rank
        A, B = factorize(student, "optimal", tensors, rank)
        # |y half^T|^2 is y M y^T: no root of M is needed.
        at_floor("the loss", (x @ W - x @ A @ B) @ half.T, x @ W @ half.T, rank, 1e-6)


def svd_and_optimal_tell(student: Sandbox, draw: Draw) -> None:
    """With their factors the teaching model finds numbers. They have the type of W."""
    for init, rank in (("svd", 56), ("optimal", 48)):
        finds_numbers(student, draw, init=init, rank=rank)
    W, rank = draw_weight(draw)
    factorize(student, "svd", {"W": W.float()}, rank)
    factorize(student, "optimal", {"W": W.float(), "moment": W.T @ W}, rank)


def asvd_tells(student: Sandbox, draw: Draw) -> None:
    """With its factors the teaching model finds numbers. They have the type of W, and a
    channel of x that is always 0 makes nothing infinite."""
    finds_numbers(student, draw, init="asvd", rank=56)
    W, rank = draw_weight(draw)
    x_abs = W.abs().sum(1).float()
    x_abs[draw.integer(0, len(W) - 1)] = 0
    factorize(student, "asvd", {"W": W.float(), "x_abs": x_abs}, rank)
