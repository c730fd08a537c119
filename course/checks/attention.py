"""One layer's attention with the window mask written out, in float64: what problems c and f are
checked with. Nothing here is taken from cskv.py or model.py; shapes are as there."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from course.sandbox import Draw

THETA = 100.0  # of `scenarios.small_config`


def frequencies(D: int) -> Tensor:
    """RoPE's w_f = THETA^(-2f/D) [D/2]. The model has them in float32: those are the true ones."""
    w = THETA ** (-torch.arange(0, D, 2, dtype=torch.float32) / D)
    return w.double()


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """x [..., T, D] turned to these positions: the pair (f, f + D/2) is a complex number, which is
    multiplied by exp(i t w_f)."""
    half = x.shape[-1] // 2
    angle = positions.double()[:, None] * frequencies(2 * half)  # [T, D/2]
    turn = torch.polar(torch.ones_like(angle), angle)
    turned = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat([turned.real, turned.imag], -1)


def mean_turn(w: Tensor, length: int) -> Tensor:
    """The mean of exp(i tau w) over the offsets tau of a segment's tokens from its middle. The
    imaginary parts of tau and -tau cancel."""
    tau = torch.arange(length, dtype=torch.float64) - (length - 1) / 2
    return torch.outer(tau, w.double()).cos().mean(0)


def rotate_in_segments(k: Tensor, start: int, stop: int, sinks: int, segments: tuple) -> Tensor:
    """Keys [..., stop - start, D] of these tokens, each turned to the middle of its segment and
    damped there. `stop` - 1 is the newest old token, and sinks are not counted. With segments of
    one token that is the paper's: a token's own position, and no damping."""
    token, w = torch.arange(start, stop).double(), frequencies(k.shape[-1])
    middle, a = torch.zeros_like(token), torch.zeros(len(token), len(w)).double()
    border = stop  # of the tokens in segments of this length or a longer one
    for (length, tokens), (longer, _) in zip(segments, (*segments[1:], (1, 0)), strict=True):
        older = token < border
        middle[older] = sinks + token[older] // length * length + (length - 1) / 2
        a[older] = mean_turn(w, length)
        border = (stop - tokens) // longer * longer
    return rotate(k, middle) * torch.cat([a, a], -1)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, H, 1, D] over k and v [B, H_kv, n, D], which neighbouring heads share, [B, H, 1, D]."""
    shared = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(shared, 1)
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])  # [B, H, 1, n]
    return scores.softmax(-1) @ v.repeat_interleave(shared, 1)


@dataclass
class Layer:
    """A layer, its factors, and a text for it. Exact keys and values, k and v, have
    nothing to do with x A B: so it shows at once which of them a token is attended through."""

    sizes: list  # H, H_kv, D, and the sliding window or None
    window: int
    sinks: int
    tensors: dict[str, Tensor]  # x, q, k, v, A_k, B_k, A_v, B_v, perhaps k_bias, v_bias

    def rebuilt(self, name: str, c: Tensor) -> Tensor:
        """Keys or values [B, H_kv, T, D] from latents c [B, T, r]."""
        flat = c @ self.tensors[f"B_{name}"] + self.tensors.get(f"{name}_bias", 0)
        return flat.unflatten(-1, self.sizes[1:3]).transpose(1, 2)

    def seen(self, t: int) -> Tensor:
        """The positions that the token at position t sees."""
        return torch.arange(max(0, t + 1 - (self.sizes[3] or t + 1)), t + 1)

    def is_exact(self, positions: Tensor, t: int) -> Tensor:
        """Which of these positions a decode step at position t sees exactly."""
        return (positions < self.sinks) | (positions > t - self.window)

    def attend(self, t: int, k: Tensor, v: Tensor) -> Tensor:
        """What the token at position t gets from all that it sees of k and v, [B, H, 1, D]."""
        i = self.seen(t)
        q = rotate(self.tensors["q"][:, :, t : t + 1], torch.tensor([t]))
        return softmax_attention(q, rotate(k[:, :, i], i), v[:, :, i])

    def step(self, t: int) -> Tensor:
        """What a decode step of the token at position t returns, [B, H, 1, D]."""
        positions = torch.arange(self.tensors["x"].shape[1])
        exact = self.is_exact(positions, t)[:, None]
        both = []
        for name in "kv":
            c = self.tensors["x"] @ self.tensors[f"A_{name}"]
            both.append(torch.where(exact, self.tensors[name], self.rebuilt(name, c)))
        return self.attend(t, both[0], both[1])


def draw_layer(draw: Draw, T: int, bias=False, sliding=None, window=3, sinks=0) -> Layer:
    """A layer of a size that is drawn."""
    H_kv, D = draw.choose([1, 2, 3]), draw.choose([4, 6, 8])
    H, B = H_kv * draw.choose([1, 2, 3]), draw.integer(1, 2)
    hidden = draw.integer(5, 12)
    tensors = {
        "x": draw.normal(B, T, hidden),
        "q": draw.normal(B, H, T, D),
        "k": draw.normal(B, H_kv, T, D),
        "v": draw.normal(B, H_kv, T, D),
    }
    for name in "kv":
        r = draw.integer(1, 4)
        tensors[f"A_{name}"] = draw.normal(hidden, r) / 2
        tensors[f"B_{name}"] = draw.normal(r, H_kv * D) / 2
        if bias:
            tensors[f"{name}_bias"] = draw.normal(H_kv * D)
    return Layer([H, H_kv, D, sliding], window, sinks, tensors)
