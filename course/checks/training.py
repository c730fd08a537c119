"""Problem e: the loss, its gradients and its floor, and steps of AdamW written out."""

import torch
from torch import Tensor

from course.checks.bits import draw_rounded
from course.sandbox import Draw, Failed, Sandbox, expect, look

BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam, those that its paper and PyTorch have


def draw_regression(draw: Draw) -> dict[str, Tensor]:
    """x [B, T, hidden], k [B, T, d_kv], and A and B of some rank, in float32."""
    B, T = draw.integer(1, 3), draw.integer(2, 9)
    hidden, d_kv, rank = draw.integer(3, 9), draw.integer(3, 9), draw.integer(1, 3)
    shapes = {"x": (B, T, hidden), "k": (B, T, d_kv), "A": (hidden, rank), "B": (rank, d_kv)}
    return {name: draw.normal(*shape).float() for name, shape in shapes.items()}


def numbers(bits=16, clamped=False, dim=-2, double=False) -> dict:
    return {"bits": bits, "clamped": clamped, "dim": dim, "double": double}


def equation_1(student: Sandbox, draw: Draw) -> None:
    """L_K = MSE(K, K^), K^ = (x A) B, the mean over batch, tokens and channels. In float64 if asked
    for, and close to zero too: there the squares must not be taken apart."""
    for double in (False, True, True):
        tensors = draw_regression(draw)
        x, k, A, B = (tensors[name].double() for name in ("x", "k", "A", "B"))
        answer = student.ask("loss", tensors, **numbers(double=double))
        want = (k - x @ A @ B).square().sum() / k.numel()
        look(answer, "loss", (), torch.float64 if double else torch.float32)
        expect(answer, "loss", want, 1e-5)
        tensors["k"] = ((x @ A).float().double() @ B + 1e-3 * draw.normal(*k.shape)).float()
        if double:
            answer = student.ask("loss", tensors, **numbers(double=True))
            c = (tensors["x"] @ tensors["A"]).double()
            expect(answer, "loss", (tensors["k"].double() - c @ B).square().mean(), 1e-2, "near 0")


def gradients(student: Sandbox, draw: Draw) -> None:
    """The gradients of the loss with respect to A and B."""
    for _ in range(3):
        tensors = draw_regression(draw)
        x, k, A, B = (tensors[name].double() for name in ("x", "k", "A", "B"))
        answer = student.ask("loss", tensors, **numbers())
        x, error = x.flatten(0, 1), (x @ A @ B - k).flatten(0, 1) * 2 / k.numel()
        expect(answer, "A", x.T @ error @ B.T, 1e-4)
        expect(answer, "B", (x @ A).T @ error, 1e-4)


def latents_are_rounded(student: Sandbox, draw: Draw) -> None:
    """With fewer than 16 bits, latents are rounded along `dim` before B, and A's gradient passes
    the rounding. (With A the identity, latents are x: here they are drawn with known levels.)"""
    for dim in (-2, -1):
        for bits, clamped in ((2, False), (4, True), (4, False)):
            x, c, inside = draw_rounded(draw, bits, dim, clamped)
            rank, d_kv = x.shape[-1], draw.integer(2, 5)
            B, k = draw.normal(rank, d_kv).float(), draw.normal(*x.shape[:2], d_kv).float()
            tensors = {"x": x.float(), "A": torch.eye(rank), "B": B, "k": k}
            answer = student.ask("loss", tensors, **numbers(bits, clamped, dim))
            what = f"{bits} bits, dim {dim}, clamped {clamped}"
            error = c @ B.double() - k
            expect(answer, "loss", error.square().mean(), 1e-4, what)
            error = 2 / k.numel() * error @ B.double().T * inside
            want = x.flatten(0, 1).T @ error.flatten(0, 1)
            expect(answer, "A", want, 1e-4, f"{what}: the gradient of A")


def floor_is_dropped_eigenvalues(student: Sandbox, draw: Draw) -> None:
    """The floor is what the best factors of the rank leave, and 0, not rounding, where there are
    fewer tokens than ranks."""
    for extra in (20, 5, 0, 0, 0):
        d_kv = draw.integer(4, 12)
        rank = draw.integer(1, d_kv - 1)
        k = draw.normal(rank + extra, d_kv) * torch.exp(draw.normal(d_kv))
        answer = student.ask("floor", {"moment": k.T @ k}, rank=rank)
        if extra:
            U, S, V = torch.linalg.svd(k, full_matrices=False)
            best = U[:, :rank] * S[:rank] @ V[:rank]
            expect(answer, "floor", (k - best).square().sum(), 1e-7, f"rank {rank} of {d_kv}")
        else:
            expect(answer, "floor", torch.tensor(0.0), 0, "fewer tokens than ranks")


def one_step(student: Sandbox, draw: Draw) -> None:
    """Steps of AdamW without decay, at a learning rate that falls linearly from `lr` to 0 over the
    steps that are planned. Gradients are zero after each; `steps_done` counts."""
    for _ in range(2):
        hidden, rank, d_kv = draw.integer(2, 4), draw.integer(1, 3), draw.integer(2, 4)
        A, B = draw.normal(hidden, rank).float(), draw.normal(rank, d_kv).float()
        taken, size = draw.integer(3, 6), A.numel() + B.numel()
        planned, lr = taken + draw.integer(0, 3), draw.choose([1e-2, 5e-2])
        g = draw.normal(taken, 2, size).float()
        tensors = {"A": A, "B": B, "gradients": g}
        answer = student.ask("steps", tensors, planned=planned, lr=lr)
        start = torch.cat([A.flatten(), B.flatten()]).double()
        moved, first, second = torch.zeros(2, size), torch.zeros(2, size), torch.zeros(2, size)
        want = []
        for t, gradient in enumerate(g.double()):
            first = BETAS[0] * first + (1 - BETAS[0]) * gradient
            second = BETAS[1] * second + (1 - BETAS[1]) * gradient.square()
            m, v = first / (1 - BETAS[0] ** (t + 1)), second / (1 - BETAS[1] ** (t + 1))
            moved = moved - lr * (1 - t / planned) * m / (v.sqrt() + EPSILON)
            want.append(moved)
        # What the steps moved is compared: it is small beside the parameters.
        after = look(answer, "after", (taken, 2, size)).double()
        expect({"steps": after - start}, "steps", torch.stack(want), 1e-4, f"lr {lr:g}")
        if look(answer, "left", (taken, 2 * size)).any():
            raise Failed("gradients are left after a step; clear them")
        expect(answer, "done", torch.tensor(taken), 0, "steps_done")
