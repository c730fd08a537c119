"""The caches that the paper's Table 1 compares CSKV with: StreamingLLM, H2O, ASVD, and KIVI beside.

Each is one more `model.LayerCache`, for one layer, with the two methods remember and decode. What
they remember, of a prompt of T tokens at compression ratio c:

    StreamingCache    all channels of (1 - c) T tokens: the first 4 and the newest [1]
    HeavyHitterCache  all channels of (1 - c) T tokens: the most attended and the newest [2]
    KiviCache         all channels of all tokens, in 4 or 2 bits but for the newest tokens [3]
    LowRankCache      (1 - c) d_kv channels of all tokens, the newest no better than the rest [4]

The first three read the prompt exactly, with logits bit-equal to the model's, and shrink after it.
The last replaces W_K and W_V themselves, so its prefill is lossy too.

Shapes as in model.py, and n the number of kept tokens.

Sources:
    [1] Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023: StreamingLLM
    [2] Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference", 2023
    [3] Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", 2024
    [4] Yuan et al., "ASVD", 2024, of which the paper takes W_K and W_V only (its appendix B)
"""

import math
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from cskv import BiBranchCache, LayerFactors
from model import Attention, Config, LayerCache, Rope, reserve
from quant import BITS, CHANNELS, TOKENS, Grouping, Packed
from support.command import UserError


class PrunedCache(LayerCache):
    """What the two token-pruning caches share: a budget of tokens, kept whole; the rest is gone.

    The budget is max(least, round((1 - ratio) * T)), of the prompt's length T. It is fixed after
    prefill: from then on each new token evicts an old one, before it attends, so that no step
    attends to more than `budget` tokens, itself included. `length` still counts all tokens seen.

    Args:
        config: the model's.
        ratio: compression ratio, in [0, 1).
        expected: final length in tokens if known. It only counts when the budget is above T.
        budget: tokens to keep, instead of a ratio; it may be above T.
    """

    least = 1  # tokens without which the method makes no sense

    def __init__(
        self, config: Config, ratio: float = 0.0, expected: int = 0, budget: int | None = None
    ):
        if not 0 <= ratio < 1:
            raise UserError(
                f"compression ratio {ratio} is not in [0, 1): 0.8 keeps a fifth of the tokens"
            )
        if budget is not None and budget < self.least:
            raise UserError(f"a budget of {budget} tokens is below {self.least}; raise it")
        self.ratio, self.expected, self.budget = ratio, expected, budget
        self.sliding_window = config.sliding_window

    def set_budget(self, T: int) -> None:
        """From a ratio to tokens, now that the prompt's length T is known."""
        if self.budget is None:
            self.budget = max(self.least, round((1 - self.ratio) * T))

    def kept_of(self, x: Tensor, kept: Tensor) -> Tensor:
        """The tokens `kept` [B, H_kv, n, 1] of x [B, H_kv, T, C], with room for those to come.

        `kept` may have 1 for B and H_kv: the same tokens everywhere.
        """
        B, H_kv, T, C = x.shape
        room = min(self.budget, max(T, self.expected))
        buffer = x.new_empty(B, H_kv, room, C)
        buffer[:, :, : kept.shape[2]] = torch.take_along_dim(x, kept, 2)
        return buffer


class StreamingCache(PrunedCache):
    """StreamingLLM [1, section 3.2]: the first 4 tokens, the attention sinks, and the newest ones.

    Keys are stored before RoPE, in order of age, and positions count within the cache: the key in
    slot i stands at position i, the query at n - 1. With a budget of 7, when token 10 arrives:

        slots / positions   0 1 2 3 | 4 5 6
        tokens before       0 1 2 3 | 7 8 9
        tokens attended     0 1 2 3 | 8 9 10

    The budget is at least 5, the sinks and the new token. A sliding window caps it: then all that
    is kept lies in the window by its position in the cache, and the sinks are seen for ever, where
    the model itself would lose them. `Transformer` ends at the model's context length, so endless
    streams, the paper's subject, are not what this is for.
    """

    sinks = 4
    least = sinks + 1

    def __init__(self, config: Config, *args, **more):
        super().__init__(config, *args, **more)
        if config.sliding_window is not None and config.sliding_window < self.least:
            raise UserError(
                f"a sliding window of {config.sliding_window} has no room for {self.sinks} sinks "
                "and a new token; use another cache"
            )

    def set_budget(self, T: int) -> None:
        super().set_budget(T)
        self.budget = min(self.budget, self.sliding_window or self.budget)

    def remember(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> None:
        """The sinks, and as many of the newest tokens as the budget leaves. Keys before RoPE."""
        T = k.shape[2]
        self.set_budget(T)
        n = min(T, self.budget)
        slots = torch.arange(n, device=k.device)
        kept = torch.where(slots < self.sinks, slots, slots + T - n)[None, None, :, None]
        self.k, self.v = self.kept_of(k, kept), self.kept_of(v, kept)
        self.length = T

    def decode(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        """One new token: the oldest one behind the sinks makes way for it."""
        self.check_decode(q)
        t, self.length = self.length, self.length + 1
        n = min(self.length, self.budget)
        self.k = reserve(self.k, n, most=self.budget)
        self.v = reserve(self.v, n, most=self.budget)
        # 1. Evict: slots behind the sinks move up by one. This copies the cache, and so does the
        #    rotation in step 3, which renumbering makes necessary at every step.
        if t >= self.budget:
            for kept in (self.k, self.v):
                kept[:, :, self.sinks :] = kept[:, :, self.sinks :].roll(-1, dims=2)
        # 2. The new token takes the last slot.
        self.k[:, :, n - 1], self.v[:, :, n - 1] = k[:, :, 0], v[:, :, 0]
        # 3. Positions are those in the cache: 0 .. n - 1 for keys, n - 1 for the query.
        q, k = rope.rotate(q, n - 1), rope.rotate(self.k[:, :, :n], 0)
        return F.scaled_dot_product_attention(q, k, self.v[:, :, :n], enable_gqa=True)

    def tensors(self) -> list[Tensor]:
        return [self.k, self.v] if self.length else []


QUERIES = 64  # of a prompt whose attention probabilities are in memory at once


def attention_received(q: Tensor, k: Tensor) -> Tensor:
    """The sum of the probabilities with which all queries of a prompt attend to each key.

    q [B, H, T, D] and k [B, H_kv, T, D], both rotated -> [B, H_kv, T, 1] in float32. The query
    heads of a group are summed too: they share the key.
    """
    B, H_kv, T, D = k.shape
    q = q.view(B, H_kv, -1, T, D) / math.sqrt(D)  # [B, H_kv, G, T, D]
    k = k.float().transpose(-1, -2)  # [B, H_kv, D, T]
    received = k.new_zeros(B, H_kv, T, 1)
    for s in range(0, T, QUERIES):
        e = min(s + QUERIES, T)  # queries s .. e - 1 see the keys 0 .. e - 1 at most
        scores = q[..., s:e, :].flatten(2, 3).float() @ k[..., :e]  # [B, H_kv, G * (e - s), e]
        scores = scores.unflatten(2, (-1, e - s))  # [B, H_kv, G, e - s, e]
        seen = torch.ones(e - s, e, dtype=torch.bool, device=k.device).tril(s)
        p = scores.masked_fill_(~seen, -math.inf).softmax(-1)
        received[:, :, :e, 0] += p.sum((2, 3))
    return received


class HeavyHitterCache(PrunedCache):
    """H2O [2, section 4]: half of the budget for the most attended tokens, half for the newest.

    A token's score is the sum of the attention probabilities it has received, over all queries of
    the prompt and all decode steps since; each KV head has its own scores and keeps its own tokens.
    When a new token arrives, the oldest of the recent tokens leaves the recent part and stands
    against the heavy ones; the lowest score of these is dropped for good. Keys stay rotated at
    their original positions.

    Slots 0 .. heavy - 1 hold the heavy tokens in no order, the others the recent ones, a ring in
    which token t has slot heavy + (t - heavy) mod recent. Budget 5 = 2 heavy + 3 recent, token 10:

        slots              0 1 | 2 3 4
        tokens before      0 6 | 8 9 7      scores of 0, 6 and 7: say 5, 1 and 2
        tokens attended    0 7 | 8 9 10     6 is dropped, 7 takes its slot, 10 the slot of 7

    (H2O's own code evicts after the new token has attended, not before: that token then still sees
    the one that goes, one more than the budget, and its attention counts in the choice.) The budget
    is at least 2. A model with a sliding window is refused: heavy tokens may be of any age, but it
    would not see those beyond its window.
    """

    least = 2

    def __init__(self, config: Config, *args, **more):
        super().__init__(config, *args, **more)
        if config.sliding_window is not None:
            raise UserError(
                f"H2O keeps tokens of any age, but this model sees the last {config.sliding_window}"
                " only (sliding_window); use another cache"
            )

    def remember(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> None:
        """The tokens that the prompt attends to most, and the newest."""
        T = k.shape[2]
        self.set_budget(T)
        self.heavy = self.budget // 2
        self.recent = self.budget - self.heavy
        q, k = rope.rotate(q, 0), rope.rotate(k, 0)
        # 1. Scores: the attention that each token receives in the prompt.
        received = attention_received(q, k)  # [B, H_kv, T, 1]
        # 2. The highest scores outside the recent part, and the recent part, as a ring.
        if self.budget < T:
            heavy = received[:, :, : T - self.recent].topk(self.heavy, dim=2).indices
            ring = torch.arange(T - self.recent, T, device=k.device)
            ring = ring.roll((T - self.heavy) % self.recent)[:, None]  # [recent, 1]
            kept = torch.cat([heavy, ring.expand(*heavy.shape[:2], -1, -1)], dim=2)
        else:
            kept = torch.arange(T, device=k.device)[None, None, :, None]
        self.k, self.v = self.kept_of(k, kept), self.kept_of(v, kept)
        self.scores = self.kept_of(received, kept)
        self.length = T

    def decode(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        """One new token, at position t."""
        self.check_decode(q)
        B, H, _, D = q.shape
        t, self.length = self.length, self.length + 1
        n, slot = min(self.length, self.budget), t
        self.k, self.v, self.scores = (
            reserve(kept, n, most=self.budget) for kept in (self.k, self.v, self.scores)
        )
        # 1. Evict: of the heavy tokens and the one that leaves the recent part, the lowest score.
        if t >= self.budget:
            slot = self.heavy + (t - self.heavy) % self.recent
            rivals = self.scores.clone()  # [B, H_kv, budget, 1]
            rivals[:, :, self.heavy :] = math.inf
            rivals[:, :, slot] = self.scores[:, :, slot]
            lowest = rivals.argmin(2, keepdim=True)  # [B, H_kv, 1, 1]
            for kept in (self.k, self.v, self.scores):
                leaving = kept[:, :, slot : slot + 1].clone()  # [B, H_kv, 1, C]
                kept.scatter_(2, lowest.expand_as(leaving), leaving)
        # 2. The new token takes the slot that is free now.
        self.k[:, :, slot], self.v[:, :, slot] = rope.rotate(k, t)[:, :, 0], v[:, :, 0]
        self.scores[:, :, slot] = 0
        # 3. Attention over all that is kept. Queries of a group share a key head: [.., G, D].
        q = rope.rotate(q, t).view(B, k.shape[1], -1, D).float() / math.sqrt(D)  # [B, H_kv, G, D]
        p = (q @ self.k[:, :, :n].float().transpose(-1, -2)).softmax(-1)  # [B, H_kv, G, n]
        # 4. Every kept token's score grows by the attention it has just received.
        self.scores[:, :, :n] += p.sum(2).unsqueeze(-1)
        return (p.to(v.dtype) @ self.v[:, :, :n]).view(B, H, 1, D)

    def tensors(self) -> list[Tensor]:
        return [self.k, self.v, self.scores] if self.length else []


class KiviCache(LayerCache):
    """KIVI [3, section 3]: keys and values of all tokens in few bits, but for the newest.

    Keys, rotated, are quantized per channel in groups of 32 tokens; values per token in groups of
    32 channels of a head. A group of 32 tokens is packed as soon as all of them are older than the
    newest `residual`; up to then, they wait in the model's own precision. With residual 32:

        length 95     tokens  0 .. 31 packed | 32 .. 94 in full precision      63 of them, the most
        length 96     tokens  0 .. 63 packed | 64 .. 95 in full precision      32, the fewest

    An element of a packed key takes quant.bits_per_element(bits) bits, of a packed value
    bits_per_element(bits, length=D). Under a sliding window old tokens are kept, but not attended.

    Args:
        config: the model's.
        bits: of keys and values, one of quant.BITS; KIVI has 4 and 2.
        residual: newest tokens in full precision, at least 1.
        expected: final length in tokens if known; memory for packed tokens is then taken once.
        sinks: first tokens in full precision too. KIVI has none; with them rows compare with CSKV.
    """

    def __init__(self, config: Config, bits: int = 4, residual=32, expected: int = 0, sinks=0):
        if bits not in BITS:
            raise UserError(f"KIVI in {bits} bits; choose one of {', '.join(map(str, BITS))}")
        if residual < 1:
            raise UserError(f"residual {residual} is below 1; the newest token needs a place in it")
        self.bits, self.residual, self.expected = bits, residual, max(0, expected - sinks)
        self.sliding_window, self.sinks = config.sliding_window, sinks

    def remember(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> None:
        """Groups older than the residual, packed; the rest waits for it."""
        # On a CPU 2 MB of unpacked keys, in 32 bits; a GPU wants few, large steps.
        self.chunk = max(1024, 2**19 // k[0, :, 0].numel()) if k.device.type == "cpu" else 8192
        k = rope.rotate(k, 0)
        # Heads count as sequences: [B * H_kv, T, D].
        sizes = self.residual, self.expected
        self.k, self.v = (Packed(self.bits, Grouping(dim), *sizes) for dim in (TOKENS, CHANNELS))
        self.k.append(k[:, :, self.sinks :].flatten(0, 1))
        self.v.append(v[:, :, self.sinks :].flatten(0, 1))
        self.first_k, self.first_v = (y[:, :, : self.sinks].clone() for y in (k, v))
        self.length = k.shape[2]

    def decode(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        """One new token, at position t."""
        self.check_decode(q)
        B, H_kv, _, D = k.shape
        t, self.length = self.length, self.length + 1
        # 1. The new token joins those that wait; a group that is older than the residual is packed.
        k = rope.rotate(k, t)
        if t < self.sinks:
            self.first_k = torch.cat([self.first_k, k], dim=2)
            self.first_v = torch.cat([self.first_v, v], dim=2)
        else:
            self.k.append(k.flatten(0, 1))
            self.v.append(v.flatten(0, 1))
        # 2. Attended are the tokens first .. t in chunks: the sinks, the packed ones, the others.
        S, first = min(self.sinks, t + 1), max(0, t + 1 - (self.sliding_window or t + 1))
        start, old = max(first, S), max(first, S + self.k.packed)
        ends = first, start, *range(start, old, self.chunk), old, t + 1
        chunks = [(s, e) for s, e in pairwise(ends) if s < e]

        def read(exact: Tensor, packed: Packed, s: int, e: int) -> Tensor:
            y = exact[:, :, s:e] if e <= S else packed.read(s - S, e - S)
            return y.view(B, H_kv, e - s, D).float()

        # 3. Scores. Old keys are unpacked chunk by chunk, so the working memory is one chunk
        #    however long the sequence is. Queries of a group share a key head: [.., G, D].
        q = rope.rotate(q, t).view(B, H_kv, -1, D).float() / math.sqrt(D)  # [B, H_kv, G, D]
        scores = q.new_empty(*q.shape[:3], self.length - first)
        for s, e in chunks:
            k_hat = read(self.first_k, self.k, s, e)
            scores[..., s - first : e - first] = q @ k_hat.transpose(-1, -2)
        # 4. One softmax over both parts; old values are unpacked in the same chunks.
        p = scores.softmax(-1)  # [B, H_kv, G, length - first]
        out = torch.zeros_like(q)
        for s, e in chunks:
            v_hat = read(self.first_v, self.v, s, e)
            out += p[..., s - first : e - first] @ v_hat
        return out.to(v.dtype).view(B, -1, 1, D)

    def tensors(self) -> list[Tensor]:
        if not self.length:
            return []
        return [*self.k.tensors(), *self.v.tensors(), self.first_k, self.first_v]


class LowRankCache(BiBranchCache):
    """Channel shrinking alone, as Table 1's ASVD: W_K and W_V replaced by A B [4].

    Every token, of the prompt too, attends and is attended with k = x A_k B_k and v = x A_v B_v,
    plus biases. That is the bi-branch cache fed with these keys and values instead of the exact
    ones: its window no longer makes a difference, so it has the least, one token.

    The arguments are those of `BiBranchCache`, without a window; `bits` is 16, or 32 for tests.
    """

    def __init__(
        self, attention: Attention, factors: LayerFactors, expected: int = 0, bits: int = 16
    ):
        pairs = (replace(pair, bits=bits) for pair in (factors.k, factors.v))
        super().__init__(attention, LayerFactors(*pairs), 1, expected)
        self.projections = (factors.k, self.k_bias), (factors.v, self.v_bias)

    def project(self, x: Tensor) -> list[Tensor]:
        """x [B, T, hidden] -> keys and values x A B, [B, H_kv, T, D] each."""
        kv = []
        for pair, bias in self.projections:
            y = F.linear(x @ pair.A, pair.B.T, None if bias is None else bias.to(pair.B))
            kv.append(y.unflatten(-1, (-1, self.D)).transpose(1, 2))
        return kv

    def prefill(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        """The whole prompt, not exactly: k and v are replaced."""
        return super().prefill(x, q, *self.project(x), rope)

    def decode(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        """One new token; its k and v are replaced."""
        return super().decode(x, q, *self.project(x), rope)
