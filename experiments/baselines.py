"""The caches that the paper's Table 1 compares with, and KIVI and TurboQuant.

Each is one more `model.LayerCache`, for one layer. What they remember, of a prompt of T tokens at
compression ratio c:

    StreamingCache    all channels of (1 - c) T tokens: the first 4 and the newest [1]
    HeavyHitterCache  all channels of (1 - c) T tokens: the most attended and the newest [2]
    KiviCache         all channels of all tokens, in 4 or 2 bits but for the newest [3]
    TurboQuantCache   all channels of all tokens, rotated, in 2 to 4 bits [5]
    LowRankCache      (1 - c) d_kv channels of all tokens, the newest no better [4]

All but the last read the prompt exactly, and shrink after it. The last replaces W_K and
W_V themselves. Shapes as in model.py, and n the number of kept tokens.

Sources:
    [1] Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023
    [2] Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference", 2023
    [3] Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", 2024
    [4] Yuan et al., "ASVD", 2024; the paper takes W_K and W_V only (its appendix B)
    [5] Zandieh et al., "TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate",
        2025
    [6] Max, "Quantizing for minimum distortion", 1960
"""

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from beyond.segments import GrowingLatents
from cskv import BiBranchCache, LayerFactors
from model import Attention, Config, LayerCache, Rope
from quant import BITS, BLOCK, CHANNELS, TOKENS, Grouping, Packed, pack, unpack
from support.command import UserError


class PrunedCache(LayerCache):
    """What token-pruning caches share: a budget of tokens; the rest is gone.

    The budget is `budget`, or max(least, round((1 - ratio) * T)) of the prompt's length
    T, and fixed then: each new token evicts an old one before it attends. `length` still
    counts all.
    """

    least = 1  # tokens without which the method makes no sense

    def __init__(self, config: Config, ratio: float = 0.0, budget: int | None = None):
        if not 0 <= ratio < 1:
            raise ValueError(f"compression ratio {ratio} is not in [0, 1): 0.8 keeps a fifth")
        self.ratio = ratio
        self.budget = budget
        self.sliding_window = config.sliding_window

    def set_budget(self, T: int) -> None:
        budget = self.budget or max(self.least, round((1 - self.ratio) * T))
        self.budget = min(budget, self.sliding_window or budget)
        if self.budget < self.least:
            raise UserError(f"{self.budget} tokens are below {self.least}; use another cache")


class StreamingCache(PrunedCache):
    """StreamingLLM [1, section 3.2]: the first 4 tokens, the attention sinks, and the newest.

    Keys are stored before RoPE, in order of age, and positions count within the cache: the
    key in slot i stands at position i, the query at n - 1. Budget 7, token 10 arrives:

        slots / positions   0 1 2 3 | 4 5 6
        tokens before       0 1 2 3 | 7 8 9
        tokens attended     0 1 2 3 | 8 9 10

    The budget is at least 5, the sinks and the new token. A sliding window caps it: all that is
    kept lies in the window by its position in the cache, so the sinks are never lost.
    """

    sinks = 4
    least = sinks + 1

    def remember(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> None:
        self.length = k.shape[2]
        self.set_budget(self.length)
        self.k = self.within_budget(k)  # before RoPE
        self.v = self.within_budget(v)

    def decode(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        self.check_decode(q)
        self.length += 1
        # 1. Append the new token, evict the oldest behind the sinks.
        self.k = self.within_budget(torch.cat([self.k, k], dim=2))
        self.v = self.within_budget(torch.cat([self.v, v], dim=2))
        # 2. Positions are those in the cache: 0 .. n - 1 for keys, n - 1 for the query.
        q = rope.rotate(q, self.k.shape[2] - 1)
        k = rope.rotate(self.k, 0)
        return F.scaled_dot_product_attention(q, k, self.v, enable_gqa=True)

    def within_budget(self, y: Tensor) -> Tensor:
        """Of y [B, H_kv, n, D] the sinks and the newest others, `budget` in all."""
        newest = max(self.sinks, y.shape[2] - self.budget + self.sinks)
        return torch.cat([y[:, :, : self.sinks], y[:, :, newest:]], dim=2)

    def tensors(self) -> list[Tensor]:
        return [self.k, self.v] if self.length else []


QUERIES = 64  # of a prompt whose attention probabilities are in memory at once


def attention_received(q: Tensor, k: Tensor) -> Tensor:
    """The sum of the probabilities with which all queries of a prompt, of all heads that share the
    key, attend to each key: q [B, H, T, D] and k [B, H_kv, T, D], rotated -> [B, H_kv, T, 1]."""
    B, H_kv, T, D = k.shape
    q = q.view(B, H_kv, -1, T, D) / math.sqrt(D)  # [B, H_kv, G, T, D]
    k = k.float().mT  # [B, H_kv, D, T]
    received = k.new_zeros(B, H_kv, T, 1)
    for start in range(0, T, QUERIES):
        stop = min(start + QUERIES, T)
        n = stop - start  # these queries see the keys 0 .. stop - 1 at most
        queries = q[..., start:stop, :].flatten(2, 3).float()  # [B, H_kv, G * n, D]
        scores = (queries @ k[..., :stop]).unflatten(2, (-1, n))  # [B, H_kv, G, n, stop]
        seen = torch.ones(n, stop, dtype=torch.bool, device=k.device).tril(start)
        p = scores.masked_fill_(~seen, -math.inf).softmax(-1)
        received[:, :, :stop] += p.sum((2, 3)).unsqueeze(-1)
    return received


class HeavyHitterCache(PrunedCache):
    """H2O [2, section 4]: half of the budget for the most attended tokens and half for
    the newest.

    A token's score is the sum of the attention probabilities it has received, over all queries of
    the prompt and all decode steps since; each KV head keeps its own tokens. When a new token
    arrives, the lowest score of the heavy tokens and the oldest recent one is dropped for good.
    Keys stay rotated at their original positions.

    Slots 0 .. heavy - 1 hold the heavy tokens in no order, the others the recent ones in order of
    age. Budget 5 = 2 heavy + 3 recent, token 10 arrives:

        slots              0 1 | 2 3 4
        tokens before      0 6 | 7 8 9      scores of 0, 6 and 7: say 5, 1 and 2
        tokens attended    0 7 | 8 9 10     6 is dropped

    (In H2O's own code the new token attends before one is evicted: to one more than the budget.)
    A model with a sliding window would not see heavy tokens beyond it, and is refused.
    """

    least = 2

    def __init__(self, config: Config, ratio: float = 0.0, budget: int | None = None):
        super().__init__(config, ratio, budget)
        if config.sliding_window is not None:
            seen = f"this model sees the last {config.sliding_window} only (sliding_window)"
            raise UserError(f"H2O keeps tokens of any age, but {seen}; use another cache")

    def remember(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> None:
        T = k.shape[2]
        self.length = T
        self.set_budget(T)
        self.heavy = self.budget // 2
        # 1. Scores: the attention that each token receives in the prompt.
        self.k = rope.rotate(k, 0)
        self.v = v
        self.scores = attention_received(rope.rotate(q, 0), self.k)  # [B, H_kv, T, 1]
        # 2. The highest scores outside the recent part, and the recent part.
        kept = torch.arange(T, device=k.device).expand(*k.shape[:2], T).unsqueeze(-1)
        if self.budget < T:
            recent = T - (self.budget - self.heavy)
            heavy = self.scores[:, :, :recent].topk(self.heavy, dim=2).indices
            kept = torch.cat([heavy, kept[:, :, recent:]], dim=2)  # [B, H_kv, budget, 1]
        self.keep(kept)

    def decode(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        self.check_decode(q)
        B, H_kv, _, D = k.shape
        t = self.length
        self.length = t + 1
        # 1. Evict: of the heavy tokens and the oldest recent one, the lowest score.
        if t >= self.budget:
            rivals = self.scores[:, :, : self.heavy + 1]
            lowest = rivals.argmin(2, keepdim=True)  # [B, H_kv, 1, 1]
            slots = torch.arange(self.budget - 1, device=k.device).unsqueeze(-1)
            self.keep(slots + (slots >= lowest))  # [B, H_kv, budget - 1, 1]
        # 2. The new token is the last of the recent ones.
        self.k = torch.cat([self.k, rope.rotate(k, t)], dim=2)
        self.v = torch.cat([self.v, v], dim=2)
        self.scores = F.pad(self.scores, (0, 0, 0, 1))
        # 3. Attention over all that is kept. Queries of a group share a key head.
        q = rope.rotate(q, t).view(B, H_kv, -1, D).float() / math.sqrt(D)  # [B, H_kv, G, D]
        p = (q @ self.k.float().mT).softmax(-1)  # [B, H_kv, G, n]
        # 4. Every kept token's score grows by the attention it has just received.
        self.scores += p.sum(2).unsqueeze(-1)
        return (p.to(v.dtype) @ self.v).view(B, -1, 1, D)

    def keep(self, slots: Tensor) -> None:
        """Keeps the tokens in `slots` [B, H_kv, n, 1], in that order, and no others."""
        self.k = torch.take_along_dim(self.k, slots, 2)
        self.v = torch.take_along_dim(self.v, slots, 2)
        self.scores = torch.take_along_dim(self.scores, slots, 2)

    def tensors(self) -> list[Tensor]:
        return [self.k, self.v, self.scores] if self.length else []


class KiviCache(LayerCache):
    """KIVI [3, section 3]: keys and values of all tokens in few bits, but for the newest.

    Keys, rotated, are quantized per channel in groups of 32 tokens; values per token in groups of
    32 channels of a head. A group of 32 tokens is packed as soon as all of them are older than the
    newest `residual`; up to then, they wait in the model's own precision. With residual 32:

        length 95     tokens  0 .. 31 packed | 32 .. 94 in full precision, 63 of them
        length 96     tokens  0 .. 63 packed | 64 .. 95 in full precision, 32 of them

    Under a sliding window old tokens are kept, but not attended. The first `sinks` tokens are in
    full precision too (KIVI has none, CSKV has). `expected` is the final length, if it is known:
    memory for packed tokens is taken once.
    """

    def __init__(self, config: Config, bits: int = 4, residual=32, expected: int = 0, sinks=0):
        if bits not in BITS or residual < 1:
            raise ValueError(f"KIVI in {bits} bits, not {BITS}; or residual {residual} below 1")
        self.sinks = sinks
        self.sliding_window = config.sliding_window
        # Heads count as sequences: [B * H_kv, T, D].
        self.k = Packed(bits, Grouping(TOKENS), residual, max(0, expected - sinks))
        self.v = Packed(bits, Grouping(CHANNELS), residual, max(0, expected - sinks))

    def remember(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> None:
        self.length = k.shape[2]
        # A CPU unpacks 2 MB of keys at once, in 32 bits; a GPU wants few, large steps.
        self.chunk = 8192
        if k.device.type == "cpu":
            self.chunk = max(1024, 2**19 // k[0, :, 0].numel())
        k = rope.rotate(k, 0)
        self.first_k = k[:, :, : self.sinks].clone()
        self.first_v = v[:, :, : self.sinks].clone()
        self.k.append(k[:, :, self.sinks :].flatten(0, 1))
        self.v.append(v[:, :, self.sinks :].flatten(0, 1))

    def decode(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        self.check_decode(q)
        B, H_kv, _, D = k.shape
        t = self.length
        self.length = t + 1
        # 1. The new token joins those that wait; a group older than the residual is packed.
        k = rope.rotate(k, t)
        if t < self.sinks:
            self.first_k = torch.cat([self.first_k, k], dim=2)
            self.first_v = torch.cat([self.first_v, v], dim=2)
        else:
            self.k.append(k.flatten(0, 1))
            self.v.append(v.flatten(0, 1))
        # 2. Scores. Queries of a group share a key head.
        q = rope.rotate(q, t).view(B, H_kv, -1, D).float() / math.sqrt(D)  # [B, H_kv, G, D]
        scores = [q @ k_hat.mT for k_hat in self.parts(self.first_k, self.k)]
        # 3. One softmax over all of them; values are unpacked in the same parts.
        p = torch.cat(scores, dim=3).softmax(-1)  # [B, H_kv, G, tokens that are seen]
        out = torch.zeros_like(q)
        start = 0
        for v_hat in self.parts(self.first_v, self.v):
            stop = start + v_hat.shape[2]
            out += p[..., start:stop] @ v_hat
            start = stop
        return out.to(v.dtype).view(B, -1, 1, D)

    def parts(self, first: Tensor, packed: Packed) -> Iterator[Tensor]:
        """The tokens that the newest one sees, in float32, [B, H_kv, n, D]: the sinks, then at most
        `chunk` at a time. So the working memory is one chunk, however long the sequence is."""
        B, H_kv, S, D = first.shape
        seen = max(0, self.length - (self.sliding_window or self.length))
        if seen < S:
            yield first[:, :, seen:].float()
        for start in range(max(0, seen - S), packed.length, self.chunk):
            stop = min(start + self.chunk, packed.length)
            yield packed.read(start, stop).view(B, H_kv, -1, D)

    def tensors(self) -> list[Tensor]:
        if not self.length:
            return []
        return [*self.k.tensors(), *self.v.tensors(), self.first_k, self.first_v]


# The best levels for a normal distribution, those above 0 [6, table I].
LEVELS = {
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1520),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326),
}


class TurboQuantCache(LayerCache):
    """TurboQuant [5, algorithm 1]: a random rotation makes the channels of any vector nearly
    normal, so the same levels are best for all. Of every key, after RoPE, and value it keeps codes
    of `bits` and a norm of 16. `expected` is the final length in tokens, if known."""

    def __init__(self, config: Config, bits: int = 2, expected: int = 0):
        self.sliding_window = config.sliding_window
        self.bits = bits
        # Codes and norms of the keys, then of the values; heads count as sequences.
        types = (torch.uint8, torch.float16)
        self.parts = [GrowingLatents(dtype, expected) for dtype in types * 2]

    def remember(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> None:
        k = rope.rotate(k, self.length)
        self.length += k.shape[2]
        new = [*self.encode(k), *self.encode(v)]
        for part, tokens in zip(self.parts, new, strict=True):
            part.append(tokens.flatten(0, 1))

    def decode(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        self.check_decode(q)
        self.remember(x, q, k, v, rope)
        first = max(0, self.length - (self.sliding_window or self.length))
        seen = [part.read(first, self.length) for part in self.parts]
        k_hat = self.rebuild(seen[0], seen[1], k)
        v_hat = self.rebuild(seen[2], seen[3], v)
        q = rope.rotate(q, self.length - 1)
        return F.scaled_dot_product_attention(q, k_hat, v_hat, enable_gqa=True)

    def encode(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y [B, H_kv, n, D] as codes [B, H_kv, n, D * bits / 8], and norms, a column."""
        rotation, levels = turboquant_tables(y.shape[3], self.bits, y.device)
        norms = y.float().norm(dim=3, keepdim=True)
        z = y.float() / norms.clamp(min=1e-30) @ rotation
        codes = torch.bucketize(z, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
        codes = F.pad(codes, (0, -y.shape[3] % BLOCK))
        return pack(codes.mT, self.bits).mT, norms.half()

    def rebuild(self, codes: Tensor, norms: Tensor, like: Tensor) -> Tensor:
        rotation, levels = turboquant_tables(like.shape[3], self.bits, like.device)
        z = levels[unpack(codes.mT, self.bits).mT.int()]
        y = z[..., : like.shape[3]] @ rotation.T * norms.float()
        return y.to(like.dtype).view(*like.shape[:2], -1, like.shape[3])

    def tensors(self) -> list[Tensor]:
        return [tensor for part in self.parts for tensor in part.tensors()]


@lru_cache
def turboquant_tables(D: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A rotation [D, D] and levels for vectors of norm 1, the same for all caches."""
    noise = torch.randn(D, D, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(noise).Q
    above = torch.tensor(LEVELS[bits]) / math.sqrt(D)
    return rotation.to(device), torch.cat([-above.flip(0), above]).to(device)


class LowRankCache(BiBranchCache):
    """Channel shrinking alone, as Table 1's ASVD: W_K and W_V replaced by A B [4].

    Every token, of the prompt too, attends and is attended with k = x A_k B_k and v = x A_v B_v,
    plus biases. That is the bi-branch cache fed with these instead of the exact ones: its window
    makes no difference then, so it has the least, one token.
    """

    def __init__(self, attention: Attention, factors: LayerFactors, expected: int = 0):
        super().__init__(attention, factors, 1, expected)

    def project(self, x: Tensor) -> list[Tensor]:
        """x [B, T, hidden] -> keys and values x A B, [B, H_kv, T, D] each."""
        kv = []
        k = self.A_k, self.B_k, self.k_bias
        v = self.A_v, self.B_v, self.v_bias
        for A, B, bias in (k, v):
            y = x @ A @ B  # [B, T, d_kv]
            if bias is not None:
                y = y + bias.to(y)
            kv.append(y.unflatten(-1, (-1, self.D)).transpose(1, 2))
        return kv

    def prefill(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        return super().prefill(x, q, *self.project(x), rope)

    def decode(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        return super().decode(x, q, *self.project(x), rope)
