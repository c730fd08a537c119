"""Problem e: the loss, its gradients and its floor, and steps of AdamW written out."""

import torch
from torch import Tensor

from course.checks.bits import Groups, draw_rounded
from course.checks.telling import finds_numbers
from course.sandbox import Draw, Failed, Sandbox, expect, look

BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam, those that its paper and PyTorch have
SETTINGS = [  # bits, clamped, tokens of a group or None, dim
    (2, False, None, -2),
    (4, True, None, -1),
    (4, False, None, -1),
    (2, False, 64, -2),
    (4, True, 64, -2),
]


def draw_regression(draw: Draw) -> dict[str, Tensor]:
    """x [B, T, hidden], k [B, T, d_kv], and A and B of some rank, in float32."""
    B, T = draw.integer(1, 3), draw.integer(2, 9)
    hidden, d_kv, rank = draw.integer(3, 9), draw.integer(3, 9), draw.integer(1, 3)
    shapes = {"x": (B, T, hidden), "k": (B, T, d_kv), "A": (hidden, rank), "B": (rank, d_kv)}
    return {name: draw.normal(*shape).float() for name, shape in shapes.items()}


def equation_1(student: Sandbox, draw: Draw) -> None:
    """L_K = MSE(K, K^), K^ = (x A) B, the mean over batch, tokens and channels, and its gradients.
    In float64 if asked for, and close to zero too: there the squares must not be taken apart."""
    for name in ("float32", "float64", "float64"):
        dtype = getattr(torch, name)
        tensors = draw_regression(draw)
        x, k, A, B = (tensors[name].double() for name in "xkAB")
        c = x @ A
        error = c @ B - k
        answer = student.ask("scenarios.loss", tensors, dtype=name)
        expect(answer, "loss", error.square().mean(), 1e-5, dtype=dtype)
        error = 2 / k.numel() * error
        expect(answer, "A", (x.mT @ error @ B.T).sum(0), 1e-4, "the gradient of A")
        expect(answer, "B", (c.mT @ error).sum(0), 1e-4, "the gradient of B")
        tensors["k"] = (c @ B + 3e-4 * draw.normal(*k.shape)).float()
        answer = student.ask("scenarios.loss", tensors, dtype=name)
        want = (tensors["k"].double() - c @ B).square().mean()
        expect(answer, "loss", want, 2e-2, "near 0", dtype)


def latents_are_rounded(student: Sandbox, draw: Draw) -> None:
    """With fewer than 16 bits, latents are rounded along `dim` before B, and A's gradient passes
    the rounding. (With A the identity, latents are x: here they are drawn with known levels.)"""
    for bits, clamped, group, dim in SETTINGS:
        x, c, inside = draw_rounded(draw, bits, Groups(dim, group or 32, clamped))
        batch, tokens, rank = x.shape
        B = draw.normal(rank, draw.integer(2, 5)).float()
        k = draw.normal(batch, tokens, B.shape[1]).float()
        tensors = {"x": x.float(), "A": torch.eye(rank), "B": B, "k": k}
        numbers = {"bits": bits, "clamped": clamped, "group": group, "dim": dim}
        answer = student.ask("scenarios.loss", tensors, **numbers)
        error = c @ B.double() - k
        expect(answer, "loss", error.square().mean(), 1e-4, f"{numbers}")
        error = 2 / k.numel() * error @ B.double().T * inside
        want = x.flatten(0, 1).T @ error.flatten(0, 1)
        expect(answer, "A", want, 1e-4, f"{numbers}: the gradient of A")


def floor_is_dropped_eigenvalues(student: Sandbox, draw: Draw) -> None:
    """The floor is what the best factors of the rank leave, and 0, not rounding, where there are
    fewer tokens than ranks."""
    for extra in (20, 5, 0, 0, 0):
        d_kv = draw.integer(4, 12)
        rank = draw.integer(1, d_kv - 1)
        k = draw.normal(rank + extra, d_kv) * torch.exp(draw.normal(d_kv))
        answer = student.ask("train.loss_floor", {"moment": k.T @ k}, rank=rank)
        want = torch.linalg.svdvals(k)[rank:].square().sum() if extra else 0
        expect(answer, "loss_floor", want, 1e-7, f"rank {rank} of {d_kv}, {len(k)} tokens")


def adam(gradients: Tensor, planned: int, lr: float) -> Tensor:
    """What steps of Adam have moved each parameter by after every step, [steps, parameters]."""
    moved, first, second = torch.zeros(3, gradients.shape[1], dtype=torch.float64)
    result = []
    for t, gradient in enumerate(gradients.double()):
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient.square()
        mean = first / (1 - BETAS[0] ** (t + 1))
        square = second / (1 - BETAS[1] ** (t + 1))
        moved = moved - lr * (1 - t / planned) * mean / (square.sqrt() + EPSILON)
        result.append(moved)
    return torch.stack(result)


def one_step(student: Sandbox, draw: Draw) -> None:
    """Steps of AdamW without decay, at a rate that falls linearly from `lr` to 0 over the planned
    steps, with the gradients of two processes, which are 0 after each. `steps_done` counts."""
    for _ in range(2):
        hidden, rank, d_kv = draw.integer(2, 4), draw.integer(1, 3), draw.integer(2, 4)
        A, B = draw.normal(hidden, rank).float(), draw.normal(rank, d_kv).float()
        start = torch.cat([A.flatten(), B.flatten()] * 2).double()  # of keys and of values
        taken = draw.integer(3, 6)
        planned, lr = taken + draw.integer(0, 3), draw.choose([1e-2, 5e-2])
        gradients = draw.normal(taken, len(start)).float()
        tensors = {"A": A, "B": B, "gradients": gradients}
        answer = student.ask("scenarios.steps", tensors, planned=planned, lr=lr)
        # What the steps moved is compared: it is small beside the parameters.
        moved = look(answer, "after", gradients.shape).double() - start
        want = adam(gradients + 1, planned, lr)  # 1: the other process's
        expect({"steps": moved}, "steps", want, 1e-4, f"lr {lr:g}")
        if look(answer, "left", gradients.shape).any():
            raise Failed("gradients are left after a step; clear them")
        expect(answer, "done", taken, 0, "steps_done")


def training_tells(student: Sandbox, draw: Draw) -> None:
    """Some steps on a text, in 4 bits: the loss falls, and numbers are found with what was
    trained."""
    answer = finds_numbers(student, draw, dtype="float32", bits=4, steps=5)
    losses = look(answer, "losses", (5,))
    if not losses[-1] < losses[0]:
        raise Failed(f"the loss went from {losses[0]:.4g} to {losses[-1]:.4g}")
