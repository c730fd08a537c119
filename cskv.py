"""CSKV: a KV cache with fewer channels. The paper's section 2, in its order.

Wang et al., "CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios",
2024. In every layer two thin matrices approximate the key projection, and two the value projection:

    K = x W_K  ~  (x A_K) B_K        x [T, hidden]   A [hidden, r]   B [r, d_kv]   r << d_kv

The cache stores the latents x A, r numbers a token instead of d_kv, and rebuilds keys and values
with B when attention needs them. The newest tokens stay in full precision beside them. The model
itself is frozen: it still reads the prompt with the exact W_K and W_V.

    in the paper        here                      what it is
    W_K, W_V            k_proj, v_proj            the frozen projections; nn.Linear stores W^T
    A_K, B_K, A_V, B_V  factors.k.A, .k.B, ...    the factors of one layer
    h_in, h_out         hidden, d_kv              channels of the input, of all keys of a token
    h_comp              r_k, r_v: LowRank.rank    channels of a latent
    l_w, m              window                    newest tokens in full precision
    (not there)         sinks                     first tokens in full precision; 0 is the paper's
    n                   length                    tokens seen
    K_C, V_C            c_k, c_v                  latents, the compressed branch
    K_local, V_local    k, v of the cache         the full-precision branch
    K^, V^              k_hat, v_hat              rebuilt keys and values

Section 2.1 is `BiBranchCache`, section 2.2 where the factors start (train.py goes on from there).
beyond/segments.py has a cache of the same latents that is faster. Shapes as in model.py.

Sources:
    [1] Wang et al., 2024, the paper
    [2] Yuan et al., "ASVD", 2024: activation-aware SVD
    [3] Izenman, "Reduced-rank regression for the multivariate linear model", 1975: `optimal`
    [4] Ashkboos et al., "QuaRot", 2024: rotations that spread outliers
    [5] Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import quant
from model import Attention, LayerCache, Rope, Transformer, reserve

# ------------------------------------------------------ section 2.1: inference with two branches


@dataclass(frozen=True)
class LowRank:
    """W ~ A B: A [hidden, r] shrinks, B [r, d_kv] rebuilds.

    Only the product counts: A M and M^-1 B are the same factors for any invertible M [r, r].
    """

    A: Tensor
    B: Tensor
    bits: int = 16  # of a stored latent: 32, 16, or packed in 8, 4, 3 or 2 (appendix C.4)
    clamped: bool = False  # quantized as the paper's published code does; see quant.py
    group: int | None = None  # tokens that share a scale in each channel; None: as in KIVI

    @property
    def rank(self) -> int:
        return self.A.shape[1]

    def quantizer(self, dim: int) -> dict:
        """How quant.py quantizes its latents, if KIVI groups those of its side along `dim`."""
        dim, group = (dim, quant.GROUP) if self.group is None else (quant.TOKENS, self.group)
        return {"dim": dim, "clamped": self.clamped, "group": group}


@dataclass(frozen=True)
class LayerFactors:
    k: LowRank
    v: LowRank


class BiBranchCache(LayerCache):
    """The paper's cache (Figure 1) for one layer, step by step.

    Compressed branch: the latents c_k [B, T, r_k] and c_v [B, T, r_v] of all but the first `sinks`
    tokens, before RoPE. Full-precision branch: rotated keys and values of the sinks and of the last
    `window` tokens, these in a ring buffer. At a decode step each token is attended once:

        sinks 1, window 4, token 10 arrives   positions 0  |  1 2 3 4 5 6  |  7 8 9 10
                                            attended by full | compressed  |  full
        slots 0 | 1 2 3 4 then hold           positions 0  |  9 10 7 8 (10 took the place of 6)

    Args:
        attention: the layer's projections, for their biases and sizes.
        factors: A and B, of x's type and device. They are weights, not counted as cache.
        window: newest tokens in full precision, at least 1. A sliding window caps it.
        expected: final length in tokens if known; memory is then taken once.
        sinks: first tokens in full precision. They attract much attention [5].
    """

    def __init__(self, attention: Attention, factors: LayerFactors, window=32, expected=0, sinks=0):
        if window < 1 or sinks < 0:
            raise ValueError(f"window {window} is below 1, or sinks {sinks} are below 0")
        self.D, self.sliding_window = attention.config.head_dim, attention.config.sliding_window
        self.window, self.expected = min(window, self.sliding_window or window), expected
        self.sinks, expected = sinks, max(0, expected - sinks)
        self.A_k, self.B_k, self.k_bias = factors.k.A, factors.k.B, attention.k_proj.bias
        self.A_v, self.B_v, self.v_bias = factors.v.A, factors.v.B, attention.v_proj.bias
        self.c_k = empty_latents(factors.k, quant.TOKENS, self.window, expected)
        self.c_v = empty_latents(factors.v, quant.CHANNELS, self.window, expected)

    def remember(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> None:
        """The whole prompt (Figure 1a): what both branches keep of it. `prefill` attends as the
        original model does, with all exact keys and values, which are dropped after it."""
        B, H_kv, T, D = k.shape
        # 1. Compressed branch: the latents of all tokens but the sinks.
        self.c_k.append(x[:, self.sinks :] @ self.A_k)  # [B, T - sinks, r_k]
        self.c_v.append(x[:, self.sinks :] @ self.A_v)  # [B, T - sinks, r_v]
        # 2. Full-precision branch: keys, rotated to positions 0 .. T - 1, and values of the sinks,
        #    then of the last m of the others, as a ring.
        k = rope.rotate(k, 0)
        S, m = min(T, self.sinks), max(0, min(T - self.sinks, self.window))
        room = min(max(T, self.expected), self.sinks + self.window)
        kept = torch.cat([torch.arange(S), torch.arange(T - m, T)]).to(x.device)
        slots = torch.where(kept < S, kept, S + (kept - S) % self.window)
        self.k = k.new_empty(B, H_kv, room, D)
        self.v = torch.empty_like(self.k)
        self.k[:, :, slots], self.v[:, :, slots] = k[:, :, kept], v[:, :, kept]
        self.length = T

    def decode(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        """One new token, at position t (Figure 1b)."""
        self.check_decode(q)
        t, self.length = self.length, self.length + 1
        # 1. Compressed branch: append the new token's latents, unless it is a sink.
        if t >= self.sinks:
            self.c_k.append(x @ self.A_k)  # [B, 1, r_k]
            self.c_v.append(x @ self.A_v)  # [B, 1, r_v]
        # 2. Full-precision branch: the new token takes the slot of the one that leaves the window.
        slot = t if t < self.sinks else self.sinks + (t - self.sinks) % self.window
        self.k = reserve(self.k, t + 1, most=self.sinks + self.window)
        self.v = reserve(self.v, t + 1, most=self.sinks + self.window)
        q, k = rope.rotate(torch.cat([q, k], dim=1), t).split([q.shape[1], k.shape[1]], dim=1)
        self.k[:, :, slot], self.v[:, :, slot] = k[:, :, 0], v[:, :, 0]
        # 3. Which token through which branch: first .. old - 1 compressed, sinks and ring full.
        S, seen = min(t + 1, self.sinks), max(0, t + 1 - (self.sliding_window or t + 1))
        m = min(t + 1 - S, self.window)
        first, old, full = max(S, seen), t + 1 - m, slice(min(S, seen), S + m)
        k, v = self.k[:, :, full], self.v[:, :, full]  # [B, H_kv, n, D]
        return self.attend(q, k, v, first, old, rope)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, first: int, old: int, rope: Rope) -> Tensor:
        """The rest of Figure 1b: q [B, H, 1, D] over the tokens first .. old - 1 of the compressed
        branch, and k, v [B, H_kv, n, D] of the full-precision one; q and k rotated."""
        start, stop = first - self.sinks, old - self.sinks  # sinks have no latents

        def rebuild(c: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
            hat = c.float() @ B.float()  # [B, old - first, d_kv]
            hat = hat if bias is None else hat + bias.float()
            return hat.unflatten(-1, (-1, self.D)).transpose(1, 2)  # [B, H_kv, old - first, D]

        # 4. Old keys and values are rebuilt, the keys rotated to their positions.
        k_hat = rope.rotate(rebuild(self.c_k.read(start, stop), self.B_k, self.k_bias), first)
        v_hat = rebuild(self.c_v.read(start, stop), self.B_v, self.v_bias)
        # 5. K = [K^, K_local], V = [V^, V_local], and one softmax over both branches.
        k = torch.cat([k_hat.to(q.dtype), k], dim=2)  # [B, H_kv, old - first + n, D]
        v = torch.cat([v_hat.to(q.dtype), v], dim=2)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def tensors(self) -> list[Tensor]:
        ring = [self.k, self.v] if self.length else []
        return self.c_k.tensors() + self.c_v.tensors() + ring


class Latents:
    """Latents [B, T, r] of every token, in a 16- or 32-bit buffer for `expected` tokens or more."""

    length, buffer = 0, None  # tokens held, and where

    def __init__(self, dtype: torch.dtype, expected: int = 0):
        self.dtype, self.expected = dtype, expected

    def append(self, c: Tensor) -> None:
        """c [B, n, r], the latents of the next n tokens."""
        B, n, r = c.shape
        if self.buffer is None:
            self.buffer = c.new_empty(B, max(n, self.expected), r, dtype=self.dtype)
        start, self.length = self.length, self.length + n
        self.buffer = reserve(self.buffer, self.length)
        self.buffer[:, start : self.length] = c

    def read(self, start: int, stop: int) -> Tensor:
        """The latents [B, stop - start, r] of the tokens from `start` to `stop` - 1."""
        return self.buffer[:, start:stop]

    def tensors(self) -> list[Tensor]:
        return [] if self.buffer is None else [self.buffer]


def empty_latents(pair: LowRank, dim: int, window: int, expected: int) -> Latents | quant.Packed:
    """A place for latents of `pair.bits` bits; KIVI's groups lie along `dim`, and wait for `window`
    newer tokens. 16 bits are the 16-bit type of A, or float16 if A is in float32."""
    sixteen = pair.A.dtype if pair.A.dtype.itemsize == 2 else torch.float16
    if pair.bits in quant.BITS:
        how, residual = pair.quantizer(dim), window if pair.group is None else 0
        return quant.Packed(pair.bits, residual=residual, expected=expected, dtype=sixteen, **how)
    if pair.bits not in (16, 32):
        raise ValueError(f"{pair.bits}-bit latents; choose 2, 3, 4, 8, 16 or 32")
    return Latents(sixteen if pair.bits == 16 else torch.float32, expected)


# ------------------------------------------------- section 2.2: the factors and where they start


@dataclass(frozen=True)
class Factors:
    """The factors of all layers; each layer, and each of K and V, has its own rank and bits.

    `info` says where they come from: `init`, the calibration `data`, how they were `trained`.
    """

    layers: list[LayerFactors]
    info: dict[str, str] = field(default_factory=dict)

    @property
    def pairs(self) -> list[LowRank]:
        """All pairs in one list: those of keys and of values, layer by layer."""
        return [pair for layer in self.layers for pair in (layer.k, layer.v)]

    def map(self, change: Callable[[LowRank], LowRank]) -> "Factors":
        """The factors with `change` applied to every pair."""
        layers = [LayerFactors(change(layer.k), change(layer.v)) for layer in self.layers]
        return Factors(layers, dict(self.info))

    def to(self, like: Tensor) -> "Factors":
        """The same factors with the type and on the device of `like`, such as a model's weight."""
        return self.map(lambda pair: replace(pair, A=pair.A.to(like), B=pair.B.to(like)))

    def in_bits(self, k_bits=None, v_bits=None, clamped=False) -> "Factors":
        """The same factors with latents in other bits; None leaves them as they are. Value latents
        that go from full precision to few bits in KIVI's groups are rotated first (`rotate`)."""
        generator, layers = torch.Generator().manual_seed(0), []
        for k, v in ((layer.k, layer.v) for layer in self.layers):
            if v_bits in quant.BITS and v.bits not in quant.BITS and v.group is None:
                v = rotate(v, generator)
            k = replace(k, bits=k_bits or k.bits, clamped=k.clamped or clamped)
            v = replace(v, bits=v_bits or v.bits, clamped=v.clamped or clamped)
            layers.append(LayerFactors(k, v))
        return Factors(layers, dict(self.info))


@torch.no_grad()
def rotate(pair: LowRank, generator: torch.Generator) -> LowRank:
    """The same product A B with the latents turned by a random orthogonal R: A R and R^T B.

    Free, and made for quantization per token [4]: there, a channel of large latents, such as the
    first ones of `svd` and `optimal`, sets the step for the 31 others of its group. R mixes all
    channels evenly. Keys, quantized per channel, need none.
    """
    R = torch.linalg.qr(torch.randn(pair.rank, pair.rank, generator=generator)).Q.to(pair.A.device)
    A, B = (pair.A.float() @ R).to(pair.A), (R.T @ pair.B.float()).to(pair.B)
    return replace(pair, A=A, B=B)


# Each initialization takes W [hidden, d_kv], the transposed weight of k_proj or v_proj, and a rank.


def random_factors(W: Tensor, rank: int, generator: torch.Generator) -> LowRank:
    """The paper's negative control (appendix C.1): A ~ N(0, 1 / hidden), B ~ N(0, 1 / r)."""
    A = torch.randn(W.shape[0], rank, generator=generator) / math.sqrt(W.shape[0])
    B = torch.randn(rank, W.shape[1], generator=generator) / math.sqrt(rank)
    return LowRank(A.to(W.device), B.to(W.device))


def svd_factors(W: Tensor, rank: int) -> LowRank:
    """The best A B for W itself, whatever x is:

    min |W - A B|^2   at   A = U_r S_r^1/2, B = S_r^1/2 V_r^T   with   W = U S V^T
    """
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = S[:rank].sqrt()  # split evenly, so that A and B are of one size
    return LowRank(U[:, :rank] * root, root[:, None] * Vh[:rank])


def asvd_factors(W: Tensor, rank: int, x_abs: Tensor, alpha: float = 0.5) -> LowRank:
    """The paper's default [2] (appendix B): rows that meet large inputs count more.

    min |S W - S A B|^2   with   S = diag(mean |x|^alpha)
    """
    scale = x_abs.pow(alpha) + 1e-6  # [hidden]; a channel that is always 0 must not divide by 0
    scaled = svd_factors(scale[:, None] * W, rank)
    return LowRank(scaled.A / scale[:, None], scaled.B)


def optimal_factors(W: Tensor, rank: int, moment: Tensor, metric: Tensor | None = None) -> LowRank:
    """The minimum of the paper's own loss (equation 1) over all A, B, in closed form [3]:

    min E |x W - x A B|^2   at   A = W V_r, B = V_r^T

    with V_r the top-r eigenvectors of `moment` = E k^T k, k = x W: project k on them. The loss is
    the sum of the eigenvalues left out. RoPE is a rotation: the loss is the same before and after.

    With a `metric` M = L L^T [d_kv, d_kv] an error e counts as e M e^T = |e L|^2, so the same holds
    for k L: A = W L V_r and B = V_r^T L^-1, with the eigenvectors of L^T `moment` L.
    """
    if metric is not None:
        L = torch.linalg.cholesky(metric.double())  # [d_kv, d_kv]
        plain = optimal_factors(W.double() @ L, rank, L.T @ moment.double() @ L)
        B = torch.linalg.solve_triangular(L, plain.B, upper=False, left=False)  # V_r^T L^-1
        return LowRank(plain.A.to(W.dtype), B.to(W.dtype))
    eigenvectors = torch.linalg.eigh(moment.double()).eigenvectors  # in columns, smallest first
    V_r = eigenvectors[:, -rank:].flip(1).to(W.dtype)  # [d_kv, r], largest first
    return LowRank(W @ V_r, V_r.T.contiguous())


def output_metric(attention: Attention) -> Tensor:
    """What an error of the values costs in the layer's output, as e M e^T: M [d_kv, d_kv], float64.

    M has a block W_O^T W_O [D, D] for each value head, the sum over the query heads that share it.
    """
    W = attention.o_proj.weight.double()  # [hidden, H * D]
    W = W.unflatten(1, (attention.config.num_key_value_heads, -1, attention.config.head_dim))
    M = torch.block_diag(*torch.einsum("ohgd,ohge->hde", W, W))  # W [hidden, H_kv, G, D]
    least = (1e-6 * M.diagonal().mean()).clamp(min=1e-12)  # W_O^T W_O may be singular, M must not
    return M + least * torch.eye(len(M)).to(M)


def bi_branch_cache(
    model: Transformer, factors: Factors, window=32, expected=0, kind=BiBranchCache, sinks=0
) -> list[LayerCache]:
    """A cache of that kind for every layer of `model`; other arguments are those of the class."""
    return [
        kind(layer.self_attn, f, window, expected, sinks)
        for layer, f in zip(model.model.layers, factors.layers, strict=True)
    ]
