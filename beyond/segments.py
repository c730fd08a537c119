"""Old keys share a position: a decode step in which no key is rebuilt.

RoPE stands between the query and B_k. So the paper's cache rebuilds and rotates every old
key at every step: 2 r d_kv operations a token, at 80% 13 (SmolLM2) to 820 times (LongChat-7B)
the 2 H D of a full cache. If a whole segment of old tokens stood at one position t0, B_k could
go into the query instead, once a segment; R(n) turns a query by n positions:

    score = q R(t - t0) B_k^T c^T = u c^T        u = q R(t - t0) B_k^T    [r]

Segments. Cut the old tokens into segments of L neighbours, and let all of them stand at the
    middle t0. A token tau away has RoPE's plane f turned by tau w_f against there. The one
    number that is nearest to exp(i tau w_f) for all L of them, in least squares, is their
    mean:

        a_f = 1/L sum_tau exp(i tau w_f) = sin(w_f L / 2) / (L sin(w_f / 2))            (S1)

    So each plane of the query is damped: u = (a * q R(t - t0)) B_k^T. A slow one, which hardly
    turns within a segment, counts in full. A fast one, of which a segment holds all phases, counts
    for its mean, nearly nothing: 1 - a_f^2 of its energy is lost. L = 1 is the paper's cache.
    This is each plane's error; what it does to the output, nothing bounds.

        L = 128    w = 0.001: a = 0.9993    w = 0.01: a = 0.93    w = 0.1: a = 0.018
        L = 512    w = 0.001: a = 0.989     w = 0.01: a = 0.21    w = 0.1: a = 0.018

    Fast planes tell neighbours apart, which matters near the query ("the word before this
    one"); thousands of tokens away the slow ones say roughly where. This is a property of
    trained models, measured and not proved. So segments are short there, and long far away.
Values. RoPE does not touch them: B_v comes after the sum, p (C_v B_v) = (p C_v) B_v.
Few bits. Latents are dequantized a chunk at a time. Scale and minimum could go into u and out of
    the sum in the same way, and codes be multiplied as they are: tried, and no faster, for
    unpacking and the products take the time.

    operations of a score  rebuilt   2 r d_kv + 2 H D        here   2 r H + 2 r H D / L

Latents are kept before RoPE, and positions enter through the query alone: so nothing that
is stored depends on the segments, which are cut anew at each step. tests/test_segments.py
has the same as a loop, `naive_attend`. Shapes as in model.py, M segments, n tokens.
"""

import math
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import quant
from cskv import BiBranchCache, LayerFactors
from model import PIECE, Attention, Rope, reserve, seen_by

# Lengths of segments, the newest first, and how many old tokens at least lie in such: up to a
# multiple of the next length. Each is a multiple of the one before; the last has all that is left.
SEGMENTS = ((16, 1024), (512, 0))


class Span(NamedTuple):
    """Neighbouring segments of one length. Tokens are counted from the first behind the sinks."""

    start: int  # a multiple of `length`
    count: int  # segments
    length: int  # tokens of a segment

    @property
    def stop(self) -> int:
        return self.start + self.count * self.length


@lru_cache(maxsize=64)  # all layers of a step ask the same
def cut(start: int, stop: int, segments=SEGMENTS) -> tuple[Span, ...]:
    """Segments for the tokens `start` .. `stop` - 1, oldest first.

    Each begins at a multiple of its length, so the first may begin before `start`, and the last may
    end behind `stop`. With ((16, 512), (128, 0)):

        cut(5, 1000)     0 .. 383 in 3 segments of 128, 384 .. 1007 in 39 of 16
        cut(5, 1024)     0 .. 511 in 4 of 128, 512 .. 1023 in 32 of 16
    """
    spans = []
    end = stop
    for i, (length, tokens) in enumerate(segments):
        if end <= start:
            break
        border = start // length * length
        if i + 1 < len(segments):
            longer = segments[i + 1][0]
            border = max(border, (stop - tokens) // longer * longer)
        if border < end:
            count = -(-(end - border) // length)
            spans.append(Span(border, count, length))
            end = border
    return tuple(reversed(spans))


def is_exact(i: Tensor, j: Tensor, window: int, sinks: int) -> Tensor:
    """Whether the tokens at positions i [n] see those at positions j [m] in full precision, if
    they see them: [n, m]."""
    return (j < sinks) | (j > i[:, None] - window)


def damping(w: Tensor, length: int) -> Tensor:
    """a_f (S1) of the frequencies w."""
    return (w * length / 2).sin() / (length * (w / 2).sin())


# Angles are made in float64: at position 131,072 one of float32 is off by up to 0.004.


@lru_cache(maxsize=8)  # a GPU waits for what comes from the processor
def frequencies(rope: Rope, device: torch.device) -> Tensor:
    """RoPE's w [D/2], in float64."""
    return rope.frequencies.to(device, torch.float64)


def tables(turns: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [..., D] for `turn`, of complex numbers [..., D/2]."""
    turns = turns.to(torch.complex64)
    cos, sin = turns.real, turns.imag
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., D], half-split, turned as in `Rope.rotate`."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


@lru_cache(maxsize=8)  # the same for PIECE steps
def near(rope: Rope, block: int, device: torch.device) -> tuple:
    """`start` = (block - 1) PIECE, and two tables for the 2 PIECE positions from there on: those of
    RoPE itself, whose angles are float32; and what they lack. A query that was rotated by the first
    and is turned by the second stands at its exact position."""
    start = max(0, block - 1) * PIECE
    stop = (block + 1) * PIECE
    rope.reach(stop, device)
    own = torch.complex(rope.cos[start:stop], rope.sin[start:stop])
    t = torch.arange(start, stop, dtype=torch.float64, device=device)
    angle = torch.outer(t, frequencies(rope, device))
    exact = torch.polar(torch.ones_like(angle), angle)
    return start, tables(own), tables(exact / own)


@lru_cache(maxsize=8)  # the same for some steps
def middles(
    rope: Rope, sinks: int, spans: tuple[Span, ...], device: torch.device, damped: bool = True
) -> tuple:
    """Tables [M, D] that turn a query at position 0 back by each segment's middle t0, and damp it:
    of a exp(-i t0 w)."""
    w = frequencies(rope, device)
    turns = []
    for span in spans:
        segment = torch.arange(span.count, dtype=torch.float64, device=device)
        t0 = sinks + span.start + segment * span.length + (span.length - 1) / 2
        angle = torch.outer(-t0, w)
        a = damping(w, span.length if damped else 1)
        turns.append(torch.polar(a.expand_as(angle), angle))
    return tables(torch.cat(turns))


class GrowingLatents:
    """Latents [B, n, r] of 16 or 32 bits in a buffer for the `expected` tokens, or more as they
    come: a copy every 256 steps, and not at every one."""

    length = packed = 0

    def __init__(self, dtype: torch.dtype, expected: int):
        self.dtype = dtype
        self.expected = expected
        self.c: Tensor | None = None

    def append(self, c: Tensor) -> None:
        B, m, r = c.shape
        start = self.length
        if self.c is None:
            self.c = c.new_empty(B, max(m, self.expected), r, dtype=self.dtype)
        self.length = start + m
        self.c = reserve(self.c, self.length)
        self.c[:, start : self.length] = c

    def read(self, start: int, stop: int) -> Tensor:
        return self.c[:, start:stop]

    def tensors(self) -> list[Tensor]:
        return [] if self.c is None else [self.c]

    def at_once(self) -> int:
        """As many as you like: see `quant.Packed`."""
        return PIECE


class Ring:
    """Keys or values of the full-precision branch in slots, [B, H_kv, slots, D]. In 8 bits a head
    of a token has a scale and a minimum: 32 bits more."""

    def __init__(self, bits: int):
        self.bits = bits
        self.parts: list[Tensor] = []  # as they are; or codes, scale and minimum

    def reserve(self, y: Tensor, slots: int, most: int) -> None:
        """Room for so many slots, which like y are of [B, H_kv, n, D], `most` in the end."""
        if not self.parts:
            for part in self.encode(y[:, :, :1]):
                self.parts.append(part.new_empty(*part.shape[:2], slots, part.shape[3]))
            self.dtype = y.dtype
        self.parts = [reserve(part, slots, most) for part in self.parts]

    def write(self, slots: slice | list[int], y: Tensor) -> None:
        for part, new in zip(self.parts, self.encode(y), strict=True):
            part[:, :, slots] = new

    def read(self, slots: slice | list[int]) -> Tensor:
        return self.decode([part[:, :, slots] for part in self.parts])

    def rounded(self, y: Tensor) -> Tensor:
        return self.decode(self.encode(y))

    def decode(self, parts: list[Tensor]) -> Tensor:
        if self.bits == 8:
            grouping = quant.Grouping(quant.CHANNELS, parts[0].shape[3])
            return quant.dequantize(quant.Quantized(*parts), grouping).to(self.dtype)
        return parts[0]

    def encode(self, y: Tensor) -> list[Tensor]:
        if self.bits == 8:
            q = quant.quantize(y, 8, quant.Grouping(quant.CHANNELS, y.shape[3]))
            return [q.codes, q.scale, q.minimum]
        return [y]


class FastCache(BiBranchCache):
    """`BiBranchCache` with its steps 3 and 4 done in segments. The arguments are the same; with
    `expected`, all memory is taken once.

    On a CPU, for long texts, a step is faster than with a full cache at 80%, and about as fast with
    a budget of 90%. It loses what (S1) loses. Both are measured in experiments/README.md, "What a
    decode step costs".

    Nothing is moved at a step. The window is a ring behind the sinks, and buffers grow in steps:

        sinks 1, window 4, token 10 arrives   slots 0 | 1 2 3 4   hold positions 0 | 9 10 7 8
    """

    segments = SEGMENTS  # ((1, 0),) gives the results of `BiBranchCache`
    damped = True  # without a_f long segments near the query lose much: experiments/segments.py
    window_bits = 16  # or more: those of the model
    written = 0  # tokens that the rings have seen

    def __init__(
        self,
        attention: Attention,
        factors: LayerFactors,
        window: int = 32,
        expected: int = 0,
        sinks: int = 0,
    ):
        super().__init__(attention, factors, window, expected, sinks)
        if factors.k.bits not in quant.BITS:
            self.c_k = GrowingLatents(self.c_k.dtype, self.c_k.expected)
        if factors.v.bits not in quant.BITS:
            self.c_v = GrowingLatents(self.c_v.dtype, self.c_v.expected)
        self.k, self.v = Ring(self.window_bits), Ring(self.window_bits)
        self.H = attention.config.num_attention_heads
        self.H_kv = attention.config.num_key_value_heads
        self.r_k, self.r_v = factors.k.rank, factors.v.rank
        # B by heads; views, no copies.
        self.head_k = self.B_k.view(-1, self.H_kv, self.D).permute(1, 2, 0)  # [H_kv, D, r_k]
        self.head_v = self.B_v.view(-1, self.H_kv, self.D).transpose(0, 1)  # [H_kv, r_v, D]
        on_cpu = self.B_k.device.type == "cpu"
        self.dtype = torch.float32 if on_cpu else self.B_k.dtype  # a CPU is slow in 16 bits
        # Tokens of a chunk. On a CPU its latents take 8 MB: in smaller ones calls take the time.
        self.chunk = max(1, 2**12 // max(self.r_k, self.r_v)) * 512 if on_cpu else 2**15

    def keep(self, k: Tensor, v: Tensor) -> None:
        positions = self.held_positions()
        new = [n for n, t in enumerate(positions) if t >= self.written]
        slots = [self.slot(positions[n]) for n in new]
        most = self.sinks + self.window
        room = min(max(self.length, self.expected), most)
        for ring, y in ((self.k, k), (self.v, v)):
            ring.reserve(y, self.length if self.written else room, most)
            ring.write(slots, self.sinks_and_window(y)[:, :, new])
        self.written = self.length

    def kept(self) -> tuple[Tensor, Tensor]:
        """k and v of the full-precision branch, in the order of the text."""
        slots = [self.slot(t) for t in self.held_positions()]
        return self.k.read(slots), self.v.read(slots)

    def tensors(self) -> list[Tensor]:
        if not self.length:
            return []
        return [*self.c_k.tensors(), *self.c_v.tensors(), *self.k.parts, *self.v.parts]

    def held_positions(self) -> list[int]:
        """Of the sinks and the window, in the order of the text."""
        _, S, _, window_start = self.branches()
        return [*range(S), *range(window_start, self.length)]

    def slot(self, t: int) -> int:
        return t if t < self.sinks else self.sinks + (t - self.sinks) % self.window

    def at_once(self) -> int:
        """How many of the next tokens read the same latents, packed or waiting, in the same
        segments: `cut` puts a border between two lengths at a multiple of the longer one, and
        moves it in such steps."""
        n = min(PIECE, self.c_k.at_once(), self.c_v.at_once())
        first = max(0, self.length + 1 - self.window - self.sinks)  # where its old tokens end
        for (_, tokens), (longer, _) in pairwise(self.segments):
            n = min(n, longer - (first - tokens) % longer)
        return n

    def decode(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        """One new token, at position t."""
        self.check_decode(q)
        t = self.length
        self.length = t + 1
        # 1. Compressed branch: append the new token's latents, unless it is a sink.
        if t >= self.sinks:
            self.c_k.append(x @ self.A_k)  # [B, 1, r_k]
            self.c_v.append(x @ self.A_v)  # [B, 1, r_v]
        # 2. Full-precision branch: it takes the slot of the one that leaves the window.
        start, (cos, sin), _ = near(rope, t // PIECE, q.device)
        both = turn(torch.cat([q, k], dim=1), cos[t - start], sin[t - start]).to(k.dtype)
        q, k = both[:, : self.H], both[:, self.H :]
        for ring, y in ((self.k, k), (self.v, v)):
            ring.reserve(y, t + 1, self.sinks + self.window)
            ring.write(slice(self.slot(t), self.slot(t) + 1), y)
        self.written = t + 1
        # 3. and 4. in segments. The ring's order is no matter: its keys are rotated already.
        first_sink, S, first_old, window_start = self.branches()
        full = slice(first_sink, S + t + 1 - window_start)  # slots of the sinks and the window
        k, v = self.k.read(full), self.v.read(full)
        return self.attend(q, k, v, first_old, window_start, rope)

    def extend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        """n new tokens, at positions t .. t + n - 1; each attends as if they had come one by one.

        sinks 1, window 4, tokens 10, 11 and 12 arrive

                         sink    full precision        compressed
        10 attends to     0       7  8  9 10            1 .. 6
        11                0          8  9 10 11         1 .. 7
        12                0             9 10 11 12      1 .. 8
        """
        self.check_extend()
        t = self.length
        n = x.shape[1]
        # 1. Compressed branch: append the new tokens' latents, unless they are sinks.
        sinks = max(0, self.sinks - t)
        self.c_k.append(x[:, sinks:] @ self.A_k)  # [B, n - sinks, r_k]
        self.c_v.append(x[:, sinks:] @ self.A_v)  # [B, n - sinks, r_v]
        # 2. Full-precision branch: the new tokens stand behind the window. None leaves it yet: the
        #    first new one still sees all of it but one.
        positions = [*self.held_positions(), *range(t, t + n)]
        held_k, held_v = self.kept()
        k = torch.cat([held_k, rope.rotate(k, t)], dim=2)
        v = torch.cat([held_v, v], dim=2)
        # 3. From the oldest token that the first new one sees compressed to the newest of the last.
        first_old = max(self.sinks, t + 1 - (self.sliding_window or t + 1))
        self.length = t + n
        window_start = self.branches()[3]
        first_old = min(first_old, window_start)  # there is none yet
        # 4. Attention: what left the window of one new token is still in that of another.
        q = rope.rotate(q, t)
        at = torch.tensor(positions, device=x.device)
        out = self.attend(q, k, v, first_old, window_start, rope, at)
        # 5. Only now the window moves.
        self.keep(k, v)
        return out

    def mask(self, n: int, positions: Tensor, first: int, stop: int) -> Tensor:
        """Which keys the newest n tokens see: the latents of first .. stop - 1, then exact ones at
        `positions`. A token may be in both, and each query sees it through one."""
        i = torch.arange(self.length - n, self.length, device=positions.device)
        j = torch.arange(first, stop, device=positions.device)
        compressed = ~is_exact(i, j, self.window, self.sinks)
        exact = is_exact(i, positions, self.window, self.sinks)
        seen = seen_by(i, torch.cat([j, positions]), self.sliding_window)
        return seen & torch.cat([compressed, exact], dim=1)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        first: int,
        old: int,
        rope: Rope,
        positions: Tensor | None = None,
    ) -> Tensor:
        """The newest tokens' q [B, H, n, D], rotated, attend to k and v, which stand in full
        precision at `positions`, and to the compressed tokens first .. old - 1. `positions` None:
        of one token, which sees all of k and v."""
        B, H, T, D = q.shape
        m = k.shape[2]
        start = first - self.sinks  # sinks have no latents
        stop = old - self.sinks
        spans = cut(start, stop, self.segments)
        begin = end = start
        if spans:
            begin = spans[0].start
            end = spans[-1].stop
        n = end - begin
        # 3. Scores, a column for each token of the segments, then for those of k. Queries of a
        #    group share a key head, G T rows; products are of [batch * heads, rows, columns].
        scores = q.new_empty(B, H * T, n + m, dtype=torch.float32)
        q = q.float() * D**-0.5
        if spans:
            start_of_block, _, (cos, sin) = near(rope, (self.length - 1) // PIECE, q.device)
            i = self.length - start_of_block
            exact = turn(q, cos[i - T : i], sin[i - T : i])
            self.old_scores(exact.view(B * self.H_kv, -1, D), spans, rope, scores)
        q = q.reshape(B * self.H_kv, -1, D)
        y = torch.bmm(q, k.flatten(0, 1).float().transpose(1, 2))
        scores.narrow(2, n, m).copy_(y.view(B, H * T, m))
        if positions is not None:
            mask = self.mask(T, positions, self.sinks + begin, self.sinks + end)
            scores.unflatten(1, (H, T)).masked_fill_(~mask, -math.inf)
        # A segment may end behind the old tokens, and begin before a sliding window.
        scores[..., stop - begin : n] = -math.inf
        if begin < start:
            scores[..., : start - begin] = -math.inf
        # 4. One softmax over both branches, then the values of both.
        p = scores.softmax(-1).to(self.dtype)  # [B, H T, n + m]
        p_full = p.narrow(2, n, m).reshape(B * self.H_kv, -1, m)  # [B * H_kv, G T, m]
        v_full = v.flatten(0, 1).to(self.dtype)
        if spans:
            out = torch.baddbmm(self.old_values(p.narrow(2, 0, n), begin), p_full, v_full)
        else:
            out = torch.bmm(p_full, v_full)  # [B * H_kv, G T, D]
        return out.to(v.dtype).view(B, H, T, D)

    def old_scores(self, q: Tensor, spans: tuple[Span, ...], rope: Rope, out: Tensor) -> None:
        """Scores of q [B * H_kv, G, D], rotated and divided by the root of D, with all tokens of
        `spans`: into out [B, H, n]. T tokens at once are as many more heads, in G and in H."""
        B, H, _ = out.shape
        H_kv, D = self.H_kv, self.D
        # 1. The query as each segment sees it.
        cos, sin = middles(rope, self.sinks, spans, q.device, self.damped)  # [M, D]
        q = q.view(B, H_kv, -1, 1, D).permute(1, 2, 0, 3, 4)  # [H_kv, G, B, 1, D]
        seen = turn(q, cos, sin).to(self.dtype).reshape(H_kv, -1, D)  # [H_kv, G * B * M, D]
        # 2. B_k, and the bias, absorbed into it.
        u = torch.bmm(seen, self.head_k.to(self.dtype))
        u = u.view(H, B, -1, self.r_k).permute(1, 2, 0, 3)  # [B, M, H, r]
        constant = None
        if self.k_bias is not None:
            constant = torch.bmm(seen, self.k_bias.to(self.dtype).view(H_kv, D, 1))
            constant = constant.view(H, B, -1, 1).transpose(0, 1)  # [B, H, M, 1]
        # 3. Times the latents.
        begin, stop = spans[0].start, spans[-1].stop
        done = 0  # segments
        held = begin  # where the latents end that are read
        for part in parts_of(spans, self.chunk):
            m, L = part.count, part.length
            if part.stop > held:
                first = part.start
                held = min(stop, max(part.stop, first + self.chunk))
                c = read(self.c_k, first, held, self.dtype)  # [B, held - first, r]
            some = u.narrow(1, done, m).reshape(B * m, H, -1)
            own = c.narrow(1, part.start - first, m * L).reshape(B * m, L, -1)
            y = torch.bmm(some, own.transpose(1, 2)).view(B, m, H, L).transpose(1, 2)
            target = out.narrow(2, part.start - begin, m * L).view(B, H, m, L)
            # A score of -inf would be a weight of 0 in silence. 0 * y makes it NaN: a latent beyond
            # 16 bits must not go unnoticed.
            torch.add(y, y, alpha=0, out=target)
            if constant is not None:
                target += constant.narrow(2, done, m)
            done += m

    def old_values(self, p: Tensor, begin: int) -> Tensor:
        """p [B, H, n] times the values of n tokens from `begin` on: [B * H_kv, G, D]."""
        B, _, n = p.shape
        sums = 0  # [B, H, r]
        for s in range(0, n, self.chunk):
            m = min(self.chunk, n - s)
            c = read(self.c_v, begin + s, begin + s + m, p.dtype)  # [B, m, r]
            sums = weighted_sum(p.narrow(2, s, m), c) + sums
        sums = sums.view(B, self.H_kv, -1, self.r_v).transpose(0, 1)  # [H_kv, B, G, r]
        out = torch.bmm(sums.flatten(1, 2), self.head_v.to(p.dtype))  # [H_kv, B * G, D]
        if self.v_bias is not None:
            total = p.sum(-1).view(B, self.H_kv, -1).transpose(0, 1).reshape(self.H_kv, -1, 1)
            out += total * self.v_bias.to(p.dtype).view(self.H_kv, 1, -1)
        return out.unflatten(1, (B, -1)).transpose(0, 1).flatten(0, 1)


class SmallWindowCache(FastCache):
    """The fast cache with its full-precision branch in 8 bits."""

    window_bits = 8

    def attend(self, q, k, v, first, old, rope, positions=None) -> Tensor:
        if positions is not None:  # a token that comes with others reads itself as it is kept, too
            n = q.shape[2]
            k = torch.cat([k[:, :, :-n], self.k.rounded(k[:, :, -n:])], dim=2)
            v = torch.cat([v[:, :, :-n], self.v.rounded(v[:, :, -n:])], dim=2)
        return super().attend(q, k, v, first, old, rope, positions)


@lru_cache(maxsize=64)
def parts_of(spans: tuple[Span, ...], chunk: int) -> tuple[Span, ...]:
    """The spans in parts of at most `chunk` tokens, or one segment."""
    parts = []
    for span in spans:
        most = max(1, chunk // span.length)
        for first in range(0, span.count, most):
            start = span.start + first * span.length
            parts.append(Span(start, min(most, span.count - first), span.length))
    return tuple(parts)


def read(latents: GrowingLatents | quant.Packed, start: int, stop: int, dtype) -> Tensor:
    """Latents [B, stop - start, r]; of tokens that are still to come, zeros."""
    c = latents.read(start, min(stop, latents.length)).to(dtype)
    missing = stop - start - c.shape[1]
    return F.pad(c, (0, 0, 0, missing)) if missing else c


def weighted_sum(p: Tensor, c: Tensor) -> Tensor:
    """p [B, H, n] times c [B, n, r]: [B, H, r]. With few rows H and many columns n the threads of a
    CPU do not share the work; so each gets a part of the columns."""
    B, H, n = p.shape
    parts = 1 if p.is_cuda else math.gcd(n, torch.get_num_threads())
    p = p.unflatten(2, (parts, -1)).transpose(1, 2).flatten(0, 1)  # [B * parts, H, n / parts]
    y = torch.bmm(p, c.unflatten(1, (parts, -1)).flatten(0, 1))
    return y.view(B, parts, H, -1).sum(1)
