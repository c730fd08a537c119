"""Slow RoPE pairs need no rebuilding: most channels of the keys are absorbed into the query.

Old keys are rebuilt at every step because RoPE stands between B_k and the query: 2 r_k d_kv
operations a token. But most pairs of channels turn slowly. Take a segment of L tokens around its
middle t0. At the token t0 + tau, |tau| <= L / 2, a pair of frequency w stands turned by tau w from
where it is at t0. With z = w L / 2 and x = 2 tau / L within -1 and 1, this turn is a series of
Chebyshev polynomials T_p(x) = cos(p arccos x) (the Jacobi-Anger expansion [1]):

    exp(i tau w) = exp(i z x) = J_0(z) + 2 sum_{p >= 1} i^p J_p(z) T_p(x)

The token stands in T_p(x) alone, the pair in J_p(z) alone, and a slow pair, of small z, needs few
terms. For |J_p(z)| <= (z/2)^p / p! and |T_p(x)| <= 1, so the terms from the P-th on are together
at most

    2 sum_{p >= P} (z/2)^p / p!  <=  2 (z/2)^P / P! * 1 / (1 - z / (2 P + 2))       `remainder`

since each summand is at most z / (2 P + 2) times the one before it. Now let the query's pair, as
seen from t0, be the complex number q, and the key's be c B before RoPE, B [r] a complex column for
the pair. Its part of the score is the real part of conj(q) (c B) exp(i tau w). Put the series in:

    score of a token = sum_p T_p(x) (u_p c)      u_p = Re sum_pairs conj(q) a_p(z) i^p B     [r]
                                                 a_0 = J_0,  a_p = 2 J_p

So B_k is absorbed, as B_v is, but once for each segment, head and term: the vector u_p. For a token
there remain P products of r numbers a head. Only the fast pairs are rebuilt.

    operations a token      rebuilt     2 r d_kv                + 2 H D
                            absorbed    2 r 2 fast H_kv         + 2 H 2 fast
                                        + 2 r H P               the products u_p c
                                        + 2 r H 2 sum(made) / L     making u of made[p] pairs

A long segment spreads the last line over more tokens, a short one makes more pairs slow, more terms
do too: `choose_split` tries them all and counts. Absorbing pays most without grouped queries; with
many query heads a key head, H P approaches the key channels that it saves.

The bound holds for each pair, so a score's error is at most `precision` times |q| |k|. Angles are
made in float64 from the distance between the query and t0, never from positions. `Rope`'s tables
round the angle t w to float32 (as Hugging Face's do), off by up to 1.5e-5 at t w = 300. Rebuilding
has this error twice, in the query and in the key; the slow pairs here are without it.

Shapes as in model.py, and r the rank of the keys, L tokens a segment, P terms, m segments.

Sources:
    [1] Abramowitz and Stegun, "Handbook of Mathematical Functions", 1964: 9.1.10 (J_p as a series),
        9.1.44, 9.1.45 (Jacobi-Anger), 9.1.62 (the bound)
"""

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from cskv import ChunkedBiBranchCache, Factors, LayerFactors
from model import Attention, Config, Rope, Transformer
from support.processes import say

MOST_TERMS = 16
TOGETHER = 4  # terms whose u are made in one product: fewer calls, for some pairs too many
LENGTHS = 512, 1024  # of a segment; with shorter ones, writing all the u takes too long


def precision_for(bits: int) -> float:
    """Of the series: near float32's, or a fiftieth of what rounding to float16 does to a latent."""
    return 1e-6 if bits == 32 else 1e-5


def remainder(z: Tensor, terms: int) -> Tensor:
    """A bound of what the series of exp(i z x) lacks after `terms` terms, for z >= 0."""
    bound = 2 * (z / 2) ** terms / math.factorial(terms) / (1 - z / (2 * terms + 2))
    return torch.where(z < 2 * terms + 2, bound, math.inf)


def bessel(p: int, z: Tensor) -> Tensor:
    """J_p(z) = sum_m (-1)^m (z/2)^(2m + p) / (m! (m + p)!), for z below 2 MOST_TERMS [1]."""
    term = total = (z / 2) ** p / math.factorial(p)
    for m in range(1, 60):
        term = -term * (z / 2) ** 2 / (m * (m + p))
        total = total + term
    return total


# ------------------------------------------------------------------------------ counted operations


@dataclass(frozen=True)
class Split:
    """How slow pairs are absorbed: the last needs[0] of RoPE's pairs, which run from fast to slow,
    in segments of `length` tokens. Term p needs the first needs[p] of them, gets made[p]."""

    length: int
    needs: tuple[int, ...]  # pairs of each term; no term: all pairs are rebuilt

    @property
    def slow(self) -> int:
        return self.needs[0] if self.needs else 0

    @property
    def made(self) -> list[int]:
        return [self.needs[p - p % TOGETHER] for p in range(len(self.needs))]


def possible_splits(config: Config, precision: float) -> list[Split]:
    """For each length and number of terms, the split with every pair that is slow enough for it."""
    w, splits = Rope(config).frequencies.double(), []
    for length in LENGTHS:
        bounds = torch.stack([remainder(w * length / 2, p) for p in range(MOST_TERMS + 1)])
        terms = (bounds > precision).sum(0).tolist()  # that each pair needs
        for most in {0, *terms} & set(range(MOST_TERMS + 1)):
            slow = [n for n in terms if n <= most]
            splits.append(Split(length, tuple(sum(n > p for n in slow) for p in range(most))))
    return splits


def rebuilt_operations(config: Config, rank: int) -> float:
    """Multiplications and additions of the products that make an old token's scores, rebuilt."""
    return 2 * rank * config.d_kv + 2 * config.num_attention_heads * config.head_dim


def absorbed_operations(config: Config, rank: int, split: Split) -> float:
    """The same with the slow pairs of `split` absorbed: the table at the top of this file."""
    H, fast = config.num_attention_heads, config.head_dim // 2 - split.slow
    rebuilding = 4 * fast * (rank * config.num_key_value_heads + H)
    return rebuilding + 2 * rank * H * (len(split.needs) + 2 * sum(split.made) / split.length)


def more_calls(split: Split, device: torch.device) -> float:
    """What the further calls of PyTorch for a chunk cost, in operations a token. However small its
    tensors are, a call takes some microseconds, in which a CPU does 1e6 operations, a GPU 5e9."""
    calls = 20 + 2 * -(-len(split.needs) // TOGETHER) if split.needs else 0
    return 1e6 * calls / 2048 if device.type == "cpu" else 5e9 * calls / 16384


def choose_split(config: Config, rank: int, precision: float) -> Split:
    """The split with the fewest operations."""
    splits = possible_splits(config, precision)
    return min(splits, key=lambda split: absorbed_operations(config, rank, split))


def cheapest_kind(model: Transformer, factors: Factors) -> type[ChunkedBiBranchCache]:
    """The cheaper of the two caches for these factors; says which, with the operations of both."""
    config, device = model.config, model.lm_head.weight.device
    rebuilt = absorbed = calls = 0.0
    kinds = Counter((layer.k.rank, layer.k.bits) for layer in factors.layers)
    for (rank, bits), layers in kinds.items():
        split = choose_split(config, rank, precision_for(bits))
        rebuilt += layers * rebuilt_operations(config, rank) / 1e6
        absorbed += layers * absorbed_operations(config, rank, split) / 1e6
        calls += layers * more_calls(split, device) / 1e6
    once, more = f"{rebuilt:.3g} MFLOP", f"{absorbed:.3g} MFLOP and calls worth {calls:.3g}"
    if absorbed + calls < rebuilt:
        say(f"keys are absorbed: {more} an old token; rebuilt: {once}")
        return AbsorbedBiBranchCache
    say(f"keys are rebuilt: {once} an old token; absorbed: {more}")
    return ChunkedBiBranchCache


# ---------------------------------------------------------------------------------------- the cache


class AbsorbedBiBranchCache(ChunkedBiBranchCache):
    """`ChunkedBiBranchCache` with the slow pairs of its keys absorbed into the query.

    The scores are the same up to |q| |k| times `precision_for(bits)`; see the top of this file.
    `split` has the fewest operations, unless it is given. Other arguments as in `BiBranchCache`.
    """

    def __init__(
        self, attention: Attention, factors: LayerFactors, *args, split: Split | None = None, **more
    ):
        super().__init__(attention, factors, *args, **more)
        config, B = attention.config, self.B_k.view(self.H_kv, self.D, -1)  # pairs side by side
        split = split or choose_split(config, factors.k.rank, precision_for(factors.k.bits))
        self.split, self.fast = split, self.D // 2 - split.slow
        # 1. Of B_k and the bias: rows of fast pairs for the parent class, of slow ones for here.
        rows, channels = slice(0, 2 * self.fast), slice(2 * self.fast, self.D)
        self.B_k, self.B_slow = B[:, rows].flatten(0, 1), B[:, channels]
        if self.k_bias is not None:
            bias = self.k_bias.view(self.H_kv, self.D, 1)
            self.k_bias = bias[:, rows].flatten()
            self.B_slow = torch.cat([self.B_slow, bias[:, channels]], 2)  # of a latent that is 1
        self.B_slow = self.B_slow.contiguous()  # [H_kv, 2 slow, r], with a bias r + 1
        if not split.needs:
            return
        self.chunk *= 2  # of fewer channels, so in no more memory
        # 2. The two tables of the series: conj(i^p) a_p of the pairs, T_p of the tokens.
        L, terms = split.length, range(len(split.needs))
        w = Rope(config).frequencies[self.fast :].double()  # [slow]
        a = [(2 if p else 1) * (-1j) ** p * bessel(p, w * L / 2) for p in terms]
        x = (2 * torch.arange(L, dtype=torch.float64) - (L - 1)) / L
        T = [(p * x.arccos()).cos() for p in terms]
        self.frequencies = w.to(B.device)
        self.series = torch.stack(a)[:, None, None, None].to(B.device, torch.complex64)
        self.chebyshev = torch.stack(T).to(B.device, torch.float32)  # [P, L]

    def old_scores(self, q: Tensor, c_k: Tensor, s: int, rope: Rope) -> Tensor:
        """q [B, H_kv, G, D] with the keys of c_k [B, n, r], from token s on: [B, H_kv, G, n]."""
        (B, H_kv, G, _), (n, r), L = q.shape, c_k.shape[1:], self.split.length
        if not self.split.needs:
            return super().old_scores(q, c_k, s, rope)
        if n > L and n % L:  # the last segment is a short one
            last = n - n % L
            parts = (c_k[:, :last], s), (c_k[:, last:], s + last)
            return torch.cat([self.old_scores(q, *part, rope) for part in parts], -1)
        fast, slow = q.split([2 * self.fast, 2 * self.split.slow], -1)  # side by side, fast first
        rebuilt = super().old_scores(fast, c_k, s, rope)  # [B, H_kv, G, n]
        # 1. The query as it is seen from each middle: turned back to where it was before RoPE, then
        #    on by the distance.
        t, segments = self.length - 1, c_k.unflatten(1, (-1, min(n, L)))  # [B, m, L, r]
        m = segments.shape[1]
        q = torch.view_as_complex(slow.unflatten(-1, (-1, 2)).contiguous())  # [B, H_kv, G, slow]
        q = (q * rope.cis[t, self.fast :].conj()).transpose(0, 1)  # [H_kv, B, G, slow]
        middles = s + (L - 1) / 2 + L * torch.arange(m, dtype=torch.float64, device=q.device)
        angle = torch.outer(t - middles, self.frequencies)  # [m, slow]
        turn = torch.polar(torch.ones_like(angle), angle).to(q.dtype)
        q = q[:, :, None] * turn[:, None]  # [H_kv, B, m, G, slow]
        # 2. The vectors u_p of each segment, head and term.
        q = (q[:, None] * self.series).contiguous()  # [H_kv, P, B, m, G, slow]
        x = torch.view_as_real(q).flatten(-2).flatten(2, 4).to(c_k.dtype)
        u = c_k.new_empty(B, m, H_kv, x.shape[1], G, self.B_slow.shape[2])
        for p in range(0, x.shape[1], TOGETHER):
            some, rows = slice(p, p + TOGETHER), slice(0, 2 * self.split.needs[p])
            u_p = x[:, some, :, rows].flatten(1, 2) @ self.B_slow[:, rows]  # [H_kv, .., r]
            u[:, :, :, some] = u_p.view(H_kv, -1, B, m, G, u.shape[-1]).permute(2, 3, 0, 1, 4, 5)
        # 3. Their products with the latents, times T_p, summed over the terms.
        u = u.flatten(2, 4)  # [B, m, H_kv * P * G, r]
        y = u[..., :r] @ segments.transpose(2, 3)  # [B, m, H_kv * P * G, L]
        if self.k_bias is not None:
            y = y + u[..., r:]
        y = y.float().unflatten(2, (H_kv, -1, G)).mul_(self.chebyshev[:, None, : min(n, L)])
        return rebuilt + y.sum(3).permute(0, 2, 3, 1, 4).flatten(3)
