"""CSKV: a KV cache with fewer channels. The paper's section 2, in its order.

In every layer two thin matrices approximate the key projection [1], and two the value one:

    K = x W_K  ~  (x A_K) B_K    x [T, hidden]   A [hidden, r]   B [r, d_kv]   r << d_kv

The cache stores the latents x A, r numbers a token instead of d_kv, and rebuilds keys and
values with B when attention needs them. The newest tokens stay in full precision beside them.
The model itself is frozen: it still reads the prompt with the exact W_K and W_V.

    in the paper        here                      what it is
    W_K, W_V            k_proj, v_proj            the projections, W^T in nn.Linear
    A_K, B_K, A_V, B_V  factors.k.A, .k.B, ...    the factors of one layer
    h_in, h_out         hidden, d_kv              channels of the input and of keys
    h_comp              r_k, r_v: LowRank.rank    channels of a latent
    l_w, m              window                    newest tokens in full precision
    (not there)         sinks                     first tokens in full precision
    n                   length                    tokens seen
    K_C, V_C            c_k, c_v                  latents, the compressed branch
    K_local, V_local    k, v of the cache         the full-precision branch
    K^, V^              k_hat, v_hat              rebuilt keys and values

Sources:
    [1] Wang et al., "CSKV", 2024, arXiv 2409.10593: the paper
    [2] Yuan et al., "ASVD", 2024: activation-aware SVD
    [3] Izenman, "Reduced-rank regression for the multivariate linear model", 1975
    [4] Ashkboos et al., "QuaRot", 2024: rotations that spread outliers
    [5] Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import quant
from model import Attention, LayerCache, Rope, Transformer, causal_attention

# ------------------------------------------- section 2.1: inference with two branches


@dataclass(frozen=True)
class LowRank:
    """W ~ A B. Only the product counts: A M and M^-1 B are the same factors."""

    A: Tensor  # [hidden, r] shrinks
    B: Tensor  # [r, d_kv] rebuilds
    bits: int = 16  # of a stored latent: 32, 16, or packed in 8, 4, 3 or 2
    clamped: bool = False  # quantized as the paper's published code does; see quant.py
    # Tokens that share a scale in a channel, of values too, and are packed when they are complete,
    # also in the window; None: as in KIVI.
    group: int | None = None
    # Where channels differ in bits: (bits, channels) of each run, from the first on, and `bits`
    # is the least. See beyond/budget.py.
    runs: tuple[tuple[int, int], ...] = ()

    @property
    def rank(self) -> int:
        return self.A.shape[1]

    @property
    def all_runs(self) -> tuple[tuple[int, int], ...]:
        """`runs`, or the one of channels that do not differ."""
        return self.runs or ((self.bits, self.rank),)

    @property
    def bits_a_token(self) -> int:
        return sum(bits * channels for bits, channels in self.all_runs)

    def grouping(self, dim: int) -> quant.Grouping:
        """How its latents are quantized; KIVI groups those of its side along `dim`."""
        if self.group is None:
            return quant.Grouping(dim, clamped=self.clamped)
        return quant.Grouping(quant.TOKENS, self.group, self.clamped)


@dataclass(frozen=True)
class LayerFactors:
    k: LowRank
    v: LowRank


def empty_latents(pair: LowRank, dim: int, window: int, expected=0) -> quant.Packed:
    """A place for latents of `pair.bits` bits. KIVI's groups lie along `dim`, and wait
    until they leave the window. 16 bits are A's type, or float16 where A is float32."""
    if pair.bits not in (*quant.BITS, 16, 32):
        raise ValueError(f"{pair.bits}-bit latents; choose 2, 3, 4, 8, 16 or 32")
    dtype = torch.float32 if pair.bits == 32 else pair.A.dtype
    if pair.bits < 32 and dtype == torch.float32:
        dtype = torch.float16
    residual = window if pair.group is None else 0
    return quant.Packed(pair.bits, pair.grouping(dim), residual, expected, dtype)


class BiBranchCache(LayerCache):
    """The paper's cache (Figure 1) for one layer.

    Compressed branch: the latents c_k [B, n, r_k] and c_v [B, n, r_v] of all n tokens
    but the sinks, before RoPE. Full-precision branch: k and v [B, H_kv, S + m, D], rotated
    keys and values of the S <= sinks first tokens, which attract much attention [5], then
    of the newest m <= window others. A token in the window is stored twice, attended once:

        sinks 1, window 4, token 10 arrives     0   |  1 2 3 4 5 6  |  7 8 9 10
                                              full  |  compressed   |  full

    `expected` is the final length, if known: packed latents then take memory once.
    """

    def __init__(self, attention: Attention, factors: LayerFactors, window=32, expected=0, sinks=0):
        if window < 1 or sinks < 0:
            raise ValueError(f"window {window} is below 1 or sinks {sinks} are below 0")
        self.D = attention.config.head_dim
        self.sliding_window = attention.config.sliding_window
        self.window = min(window, self.sliding_window or window)
        self.sinks = sinks
        self.expected = expected
        self.A_k, self.B_k = factors.k.A, factors.k.B
        self.A_v, self.B_v = factors.v.A, factors.v.B
        self.k_bias, self.v_bias = attention.k_proj.bias, attention.v_proj.bias
        old = max(0, expected - sinks)
        self.c_k = empty_latents(factors.k, quant.TOKENS, self.window, old)
        self.c_v = empty_latents(factors.v, quant.CHANNELS, self.window, old)

    def prefill(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        """The whole prompt (Figure 1a)."""
        self.check_prefill()
        # 1. The original model's attention, with all exact keys and values.
        q_rotated, k_rotated = rope.rotate(q, 0), rope.rotate(k, 0)
        out = causal_attention(q_rotated, k_rotated, v, self.sliding_window)
        # 2. and 3. What both branches keep. All else is dropped.
        self.remember(x, q, k, v, rope)
        return out

    def remember(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> None:
        """What both branches keep of the prompt. x, q, k and v stay as they are."""
        # 2. Compressed branch: the latents of all tokens but the sinks.
        self.c_k.append(x[:, self.sinks :] @ self.A_k)  # [B, T - sinks, r_k]
        self.c_v.append(x[:, self.sinks :] @ self.A_v)  # [B, T - sinks, r_v]
        # 3. Full-precision branch: the sinks and the last `window` tokens.
        self.length = x.shape[1]
        self.keep(rope.rotate(k, 0), v)

    def decode(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        """One new token, at position t (Figure 1b)."""
        self.check_decode(q)
        t = self.length
        self.length = t + 1
        # 1. Compressed branch: append the new token's latents, unless it is a sink.
        if t >= self.sinks:
            self.c_k.append(x @ self.A_k)  # [B, 1, r_k]
            self.c_v.append(x @ self.A_v)  # [B, 1, r_v]
        # 2. Full-precision branch: the new token enters the window, and the oldest leaves it:
        #    its exact key and value are dropped, its latents are there since it came.
        held_k = torch.cat([self.k, rope.rotate(k, t)], dim=2)
        self.keep(held_k, torch.cat([self.v, v], dim=2))
        # 3. The tokens between are rebuilt, and their keys rotated to their positions.
        first_sink, S, first_old, window_start = self.branches()
        k_hat = self.rebuild(self.c_k, self.B_k, self.k_bias, first_old, window_start)
        k_hat = rope.rotate(k_hat, first_old).to(k.dtype)  # [B, H_kv, old tokens, D]
        v_hat = self.rebuild(self.c_v, self.B_v, self.v_bias, first_old, window_start).to(v.dtype)
        # 4. K = [sinks, K^, K_local] in the order of the text, and one softmax over it.
        keys = torch.cat([self.k[:, :, first_sink:S], k_hat, self.k[:, :, S:]], dim=2)
        values = torch.cat([self.v[:, :, first_sink:S], v_hat, self.v[:, :, S:]], dim=2)
        return F.scaled_dot_product_attention(rope.rotate(q, t), keys, values, enable_gqa=True)

    def keep(self, k: Tensor, v: Tensor) -> None:
        """What the full-precision branch holds of rotated keys and of values."""
        self.k = self.sinks_and_window(k)
        self.v = self.sinks_and_window(v)

    def sinks_and_window(self, y: Tensor) -> Tensor:
        """Of y [B, H_kv, n, D] the sinks, and the last `window` of the others."""
        others = y[:, :, self.sinks :]
        return torch.cat([y[:, :, : self.sinks], others[:, :, -self.window :]], dim=2)

    def branches(self) -> tuple[int, int, int, int]:
        """Positions that the newest token attends to: first_sink .. S - 1, the sinks, in full
        precision, first_old .. window_start - 1 compressed, and all later ones in full
        precision. Without the model's sliding window first_sink is 0, and first_old is S."""
        S = min(self.length, self.sinks)
        behind = max(0, self.length - (self.sliding_window or self.length))
        window_start = max(S, self.length - self.window)
        return min(S, behind), S, max(S, behind), window_start

    def rebuild(self, latents: quant.Packed, B: Tensor, bias, first: int, old: int) -> Tensor:
        """Keys or values [B, H_kv, old - first, D] of the tokens first .. old - 1."""
        c = latents.read(first - self.sinks, old - self.sinks)  # sinks have no latents
        y = c.float() @ B.float()  # [B, old - first, d_kv]
        if bias is not None:
            y = y + bias.float()
        return y.unflatten(-1, (-1, self.D)).transpose(1, 2)

    def tensors(self) -> list[Tensor]:
        return [*self.c_k.tensors(), *self.c_v.tensors(), self.k, self.v] if self.length else []


# ------------------------------------- section 2.2: the factors, and where they start


@dataclass(frozen=True)
class Together:
    """Neighbouring layers with one latent for their keys ("k") or values ("v"); or one layer."""

    side: str
    first: int  # layer
    count: int  # layers

    @property
    def layers(self) -> range:
        return range(self.first, self.first + self.count)


@dataclass(frozen=True)
class Factors:
    """The factors of all layers. Each layer, and each of K and V, has a rank and bits."""

    layers: list[LayerFactors]
    info: dict[str, str] = field(default_factory=dict)  # how and on what they were made
    together: tuple[Together, ...] = ()  # see beyond/shared.py

    @property
    def pairs(self) -> list[LowRank]:
        return [pair for layer in self.layers for pair in (layer.k, layer.v)]

    @property
    def stored(self) -> list[LowRank]:
        """Of the layers that share latents only the first one's."""
        sides = {(i, side) for i in range(len(self.layers)) for side in "kv"}
        for some in self.together:
            sides -= {(i, some.side) for i in some.layers[1:]}
        return [getattr(self.layers[i], side) for i, side in sorted(sides)]

    def map(self, change: Callable[[LowRank], LowRank]) -> "Factors":
        layers = [LayerFactors(change(both.k), change(both.v)) for both in self.layers]
        return replace(self, layers=layers, info=dict(self.info))

    def to(self, like: Tensor) -> "Factors":
        """The same factors with the type and on the device of `like`."""
        return self.map(lambda p: replace(p, A=p.A.to(like), B=p.B.to(like)))

    def in_bits(self, k_bits: int | None = None, v_bits=None, clamped=False) -> "Factors":
        """The same factors with latents in other bits; None leaves them as they are."""
        for some in self.together:
            if getattr(self.layers[some.first], some.side).group is None:
                raise ValueError("shared latents have groups of tokens, not KIVI's")
        generator = torch.Generator().manual_seed(0)
        layers = []
        for layer in self.layers:
            v = in_bits(layer.v, v_bits, quant.CHANNELS, clamped, generator)
            k = in_bits(layer.k, k_bits, quant.TOKENS, clamped, generator)
            layers.append(LayerFactors(k, v))
        return replace(self, layers=layers, info=dict(self.info))


@torch.no_grad()
def in_bits(pair: LowRank, bits: int | None, dim: int, clamped: bool, generator) -> LowRank:
    """The same product A B with latents in other bits; None leaves them as they are.

    Latents that go from full precision to few bits in groups along a token's channels are turned
    first, A R and R^T B with a random orthogonal R. This mixes all channels: else one of large
    latents, as the first of `svd`, sets the step for all others of its group [4].
    """
    to_few = bits in quant.BITS and pair.bits not in quant.BITS
    if to_few and pair.grouping(dim).dim == quant.CHANNELS:
        noise = torch.randn(pair.rank, pair.rank, generator=generator)
        R = torch.linalg.qr(noise).Q.to(pair.A.device)
        A = pair.A.float() @ R
        B = R.T @ pair.B.float()
        pair = replace(pair, A=A.to(pair.A), B=B.to(pair.B))
    if bits:
        pair = replace(pair, bits=bits, runs=())
    return replace(pair, clamped=pair.clamped or clamped)


class Observer(LayerCache):
    """Appendix B: attends as the original model does, and shows what its layer gets of a text.

    `see(x, k, v)` gets x [B, T, hidden], the layer's input, and k and v [B, T, d_kv] without RoPE,
    which turns K and K^ alike, and without bias, which both get. All are in float32, and without
    the first `sinks` tokens: a cache that keeps these exact has no latents of them."""

    def __init__(self, attention: Attention, see: Callable, sinks: int = 0):
        self.attention = attention
        self.sliding_window = attention.config.sliding_window
        self.see = see
        self.sinks = sinks

    def remember(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> None:
        x = x[:, self.sinks :]
        if x.shape[1]:
            k = F.linear(x, self.attention.k_proj.weight)
            v = F.linear(x, self.attention.v_proj.weight)
            self.see(x.float(), k.float(), v.float())


@dataclass
class Statistics:
    """What one layer sees on a text: means over tokens, in float64, so that sums in another order,
    as of several processes, are the same. Not centred: the loss has no bias to absorb a mean."""

    x_abs: Tensor  # [hidden]       of |x|
    k_moment: Tensor  # [d_kv, d_kv]   of k^T k
    v_moment: Tensor  # [d_kv, d_kv]   of v^T v
    k_metric: Tensor | None = None  # [d_kv, d_kv]   what errors of keys cost, if known
    tokens: Tensor | None = None

    def add(self, x: Tensor, k: Tensor, v: Tensor) -> None:
        x = x.flatten(0, 1).double()  # [B * T, hidden]
        k = k.flatten(0, 1).double()  # [B * T, d_kv]
        v = v.flatten(0, 1).double()
        self.x_abs += x.abs().sum(0)
        self.k_moment += k.T @ k
        self.v_moment += v.T @ v
        self.tokens += len(x)


@torch.no_grad()
def calibrate(
    model: Transformer, samples: Iterable[Tensor], sinks=0, summed=lambda y: y, kind=Observer
) -> list[Statistics]:
    """What each layer of the frozen model sees on `samples`, token ids [B, T], in one run.

    `summed` adds a total up, in place, over the processes that share the samples out; `kind` makes
    an observer. Raises `ValueError` for no tokens, and for keys or values that overflow."""
    zero = model.lm_head.weight.new_zeros((), dtype=torch.float64)
    square = model.config.d_kv, model.config.d_kv
    result = []
    cache = []
    for layer in model.model.layers:
        x_abs = zero.repeat(model.config.hidden_size)
        moments = zero.repeat(square), zero.repeat(square)
        seen = Statistics(x_abs, *moments, tokens=zero.clone())
        result.append(seen)
        cache.append(kind(layer.self_attn, seen.add, sinks))
    for tokens in samples:
        model(tokens.to(zero.device), cache, logits_to_keep=1)
    for i, seen in enumerate(result):
        if not summed(seen.tokens):
            raise ValueError(f"no sample is longer than {sinks} tokens; give longer text")
        for total in (seen.x_abs, seen.k_moment, seen.v_moment):
            summed(total).div_(seen.tokens)  # in place: LongChat-7B's are 8.6 GB
        if not (seen.k_moment.isfinite().all() and seen.v_moment.isfinite().all()):
            raise ValueError(f"keys or values of layer {i} overflow; try another --dtype")
    return result


def random_factors(W: Tensor, rank: int, generator: torch.Generator) -> LowRank:
    """The paper's negative control (C.1): A ~ N(0, 1 / hidden), B ~ N(0, 1 / r). W [hidden, d_kv]
    is the weight of k_proj or v_proj, transposed, as for those below."""
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
    scale = x_abs.pow(alpha) + 1e-6  # [hidden]; not 0, for a channel that is always 0
    scaled = svd_factors(scale[:, None] * W, rank)
    return LowRank(scaled.A / scale[:, None], scaled.B)


def optimal_factors(W: Tensor, rank: int, moment: Tensor, metric: Tensor | None = None) -> LowRank:
    """The minimum of the paper's loss (equation 1) over all A, B, in closed form [3]:

    min E |x W - x A B|^2   at   A = W V_r, B = V_r^T

    with V_r the top-r eigenvectors of `moment` = E k^T k, k = x W: project k on them. The
    loss is trace(moment) - trace(V_r^T moment V_r), the sum of the eigenvalues left out, d_kv
    times that of `train.layer_loss`. RoPE is a rotation: the loss is the same behind it.

    With a `metric` M = L L^T [d_kv, d_kv] an error e counts as e M e^T = |e L|^2, so this is
    true for k L: A = W L V_r, B = V_r^T L^-1, with the eigenvectors of L^T `moment` L.
    """
    if metric is None:
        eigenvectors = torch.linalg.eigh(moment.double()).eigenvectors  # smallest first
        V_r = eigenvectors[:, -rank:].flip(1).to(W.dtype)  # [d_kv, r], largest first
        return LowRank(W @ V_r, V_r.T.contiguous())
    L = torch.linalg.cholesky(metric.double())  # [d_kv, d_kv]
    plain = optimal_factors(W.double() @ L, rank, L.T @ moment.double() @ L)
    B = torch.linalg.solve_triangular(L, plain.B, upper=False, left=False)  # V_r^T L^-1
    return LowRank(plain.A.to(W.dtype), B.to(W.dtype))


def output_metric(attention: Attention) -> Tensor:
    """What an error of the values costs in the layer's output, as e M e^T: M [d_kv, d_kv] has
    blocks W_O^T W_O [D, D], sums over the query heads that share a value head."""
    c = attention.config
    W = attention.o_proj.weight.double()  # [hidden, H * D]
    W = W.unflatten(1, (c.num_key_value_heads, -1, c.head_dim))  # [hidden, H_kv, G, D]
    M = torch.block_diag(*torch.einsum("ohgd,ohge->hde", W, W))
    scale = M.diagonal().mean()
    least = 1e-6 * scale if scale else 1.0  # M must not be singular, nor zero with W_O
    return M + least * torch.eye(len(M)).to(M)


def attention_metric(attention: Attention, side: str, seen: Statistics) -> Tensor | None:
    """What errors of keys ("k") or values ("v") cost in the layer's output, if known."""
    return output_metric(attention) if side == "v" else seen.k_metric


INITIALIZATIONS = ("random", "svd", "asvd", "optimal", "attention")
CALIBRATED = ("asvd", "optimal", "attention")  # they need `Statistics`


@torch.no_grad()
def init_pair(
    name: str, model: Transformer, i: int, side: str, rank: int, seen=None, generator=None
) -> LowRank:
    """A and B of the keys ("k") or values ("v") of layer i, in float32. `attention` is
    `optimal` with errors weighed by `attention_metric`."""
    if name not in INITIALIZATIONS:
        raise ValueError(f"no initialization {name!r}; choose of {INITIALIZATIONS}")
    if name in CALIBRATED and seen is None:
        raise ValueError(f"initialization {name!r} needs calibration text")
    most = min(model.config.d_kv, model.config.hidden_size)
    if not 1 <= rank <= most:
        raise ValueError(f"rank {rank} is not in 1 .. {most}, the model's channels")
    attention = model.model.layers[i].self_attn
    W = getattr(attention, f"{side}_proj").weight.T.float()  # [hidden, d_kv]
    if not W.isfinite().all():
        raise ValueError(f"layer {i}: {side}_proj has weights that are not finite")
    if name == "random":
        return random_factors(W, rank, generator)
    if name == "svd":
        return svd_factors(W, rank)
    if name == "asvd":
        return asvd_factors(W, rank, seen.x_abs.float())
    metric = attention_metric(attention, side, seen) if name == "attention" else None
    return optimal_factors(W, rank, getattr(seen, f"{side}_moment"), metric)


def init_factors(
    name: str, model: Transformer, k_ranks: list, v_ranks: list, statistics=None, seed=0
) -> Factors:
    """Factors of every layer by `init_pair`, with ranks and `Statistics` for each."""
    generator = torch.Generator().manual_seed(seed)
    seen = statistics or [None] * len(model.model.layers)
    layers = []
    for i, (k_rank, v_rank, one) in enumerate(zip(k_ranks, v_ranks, seen, strict=True)):
        k = init_pair(name, model, i, "k", k_rank, one, generator)
        v = init_pair(name, model, i, "v", v_rank, one, generator)
        layers.append(LayerFactors(k, v))
    return Factors(layers, {"init": name, "trained": "none"})


def rank_for(ratio: float, d_kv: int) -> int:
    """The rank that removes a share of the d_kv channels, the paper's compression ratio."""
    if not 0 <= ratio < 1:
        raise ValueError(f"compression ratio {ratio} is not in [0, 1)")
    return max(1, round((1 - ratio) * d_kv))


def bi_branch_cache(
    model: Transformer, factors: Factors, window=32, expected=0, kind=BiBranchCache, sinks=0
) -> list[LayerCache]:
    """A cache of that kind for every layer."""
    if factors.together:
        raise ValueError("layers share latents; use beyond.shared.shared_cache")
    layers = zip(model.model.layers, factors.layers, strict=True)
    return [kind(a.self_attn, pairs, window, expected, sinks) for a, pairs in layers]
