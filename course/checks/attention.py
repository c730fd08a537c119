"""One layer's attention with the window mask written out, in float64: what problems c and f are
checked with. Nothing here is taken from cskv.py or model.py.

Shapes as in model.py.
"""

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


def split_heads(y: Tensor, D: int) -> Tensor:
    """[B, T, d_kv] -> [B, H_kv, T, D]"""
    return torch.stack(y.split(D, dim=-1), 1)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, H, 1, D] over k and v [B, H_kv, n, D], head by head -> [B, H, 1, D]."""
    G = q.shape[1] // k.shape[1]
    out = []
    for h in range(q.shape[1]):
        scores = q[:, h] @ k[:, h // G].transpose(1, 2) / math.sqrt(q.shape[-1])  # [B, 1, n]
        weights = (scores - scores.max()).exp()
        out.append(weights / weights.sum(-1, keepdim=True) @ v[:, h // G])
    return torch.stack(out, 1)


@dataclass
class Layer:
    """A layer, its factors, and a text of T tokens for it. Exact keys and values, k and v, have
    nothing to do with x A B: so it shows at once which of them a token is attended through."""

    H: int
    H_kv: int
    D: int
    sliding: int | None
    window: int
    sinks: int
    tensors: dict[str, Tensor]  # x, q, k, v, A_k, B_k, A_v, B_v, perhaps k_bias, v_bias

    @property
    def sizes(self) -> list:
        return [self.H, self.H_kv, self.D, self.sliding]

    @property
    def settings(self) -> dict:
        """Numbers for a scenario."""
        return {"sizes": self.sizes, "window": self.window, "sinks": self.sinks}

    @property
    def factors(self) -> dict[str, Tensor]:
        names = ("A_k", "B_k", "A_v", "B_v", "k_bias", "v_bias")
        return {name: self.tensors[name] for name in names if name in self.tensors}

    def rebuilt(self, name: str, c: Tensor | None = None) -> Tensor:
        """Keys or values from latents c [B, T, r] (x A if none are given), [B, H_kv, T, D]."""
        c = self.tensors["x"] @ self.tensors[f"A_{name}"] if c is None else c
        flat = c @ self.tensors[f"B_{name}"] + self.tensors.get(f"{name}_bias", 0)
        return split_heads(flat, self.D)

    def step(self, t: int) -> Tensor:
        """What a decode step of the token at position t returns, [B, H, 1, D]."""
        positions = torch.arange(t + 1)
        i = positions[positions > t - self.sliding] if self.sliding else positions
        exact = (i < self.sinks) | (i > t - self.window)
        k = torch.where(exact[:, None], self.tensors["k"][:, :, i], self.rebuilt("k")[:, :, i])
        v = torch.where(exact[:, None], self.tensors["v"][:, :, i], self.rebuilt("v")[:, :, i])
        q = rotate(self.tensors["q"][:, :, t : t + 1], torch.tensor([t]))
        return softmax_attention(q, rotate(k, i), v)

    def prompt(self, T: int) -> Tensor:
        """What a prefill of the first T tokens returns, [B, H, T, D]."""
        out = []
        for t in range(T):
            i = torch.arange(max(0, t + 1 - (self.sliding or t + 1)), t + 1)
            q = rotate(self.tensors["q"][:, :, t : t + 1], torch.tensor([t]))
            k, v = rotate(self.tensors["k"][:, :, i], i), self.tensors["v"][:, :, i]
            out.append(softmax_attention(q, k, v))
        return torch.cat(out, 2)


def draw_layer(draw: Draw, T: int, bias=False, sliding=None, window=3, sinks=0) -> Layer:
    """A layer of a size that is drawn."""
    H_kv, D = draw.choose([1, 2, 3]), draw.choose([4, 6, 8])
    H, B = H_kv * draw.choose([1, 2, 3]), draw.integer(1, 2)
    hidden, r_k, r_v = draw.integer(5, 12), draw.integer(1, 4), draw.integer(1, 4)
    tensors = {
        "x": draw.normal(B, T, hidden),
        "q": draw.normal(B, H, T, D),
        "k": draw.normal(B, H_kv, T, D),
        "v": draw.normal(B, H_kv, T, D),
        "A_k": draw.normal(hidden, r_k) / math.sqrt(hidden),
        "B_k": draw.normal(r_k, H_kv * D) / math.sqrt(r_k),
        "A_v": draw.normal(hidden, r_v) / math.sqrt(hidden),
        "B_v": draw.normal(r_v, H_kv * D) / math.sqrt(r_v),
    }
    if bias:
        tensors |= {"k_bias": draw.normal(H_kv * D), "v_bias": draw.normal(H_kv * D)}
    return Layer(H, H_kv, D, sliding, window, sinks, tensors)


def draw_attend(
    draw: Draw, kind: str, n: int, bias: bool, sinks: int, dtype: torch.dtype, segments=((1, 0),)
) -> tuple:
    """Tensors and numbers for the scenario `attend`, and what it must return. n tokens are attended
    through the compressed branch. Some before them may be behind the sliding window."""
    full, first = draw.integer(1, 6), sinks + draw.integer(0, 15)
    old = first + n
    layer = draw_layer(draw, full, bias, sinks=sinks)
    tensors = layer.factors
    # Latents of all tokens from `sinks` on, newer ones than `old` too, as in a real cache.
    B, held = len(layer.tensors["x"]), old - sinks + draw.integer(1, 4)
    tensors["c_k"] = draw.normal(B, held, tensors["B_k"].shape[0])
    tensors["c_v"] = draw.normal(B, held, tensors["B_v"].shape[0])
    tensors["q"] = draw.normal(B, layer.H, 1, layer.D)
    tensors |= {name: draw.normal(B, layer.H_kv, full, layer.D) for name in "kv"}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    layer.tensors |= exact
    start, stop = first - sinks, old - sinks
    k_hat = layer.rebuilt("k", exact["c_k"][:, start:stop])
    k_hat = rotate_in_segments(k_hat, start, stop, sinks, segments)
    v_hat = layer.rebuilt("v", exact["c_v"][:, start:stop])
    k, v = torch.cat([k_hat, exact["k"]], 2), torch.cat([v_hat, exact["v"]], 2)
    numbers = {"kind": kind, "first": first, "old": old, "sizes": layer.sizes, "sinks": sinks}
    return tensors, numbers, softmax_attention(exact["q"], k, v)
