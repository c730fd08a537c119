"""CSKV: a KV cache with fewer channels. The paper's section 2, in its order.

Wang et al., "CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios",
2024. In every layer two thin matrices approximate the key projection, and two the value projection:

    K = x W_K  ~  (x A_K) B_K      x [T, hidden]   A [hidden, r]   B [r, d_kv]   r << d_kv

The cache stores the latents x A, r numbers a token instead of d_kv, and rebuilds keys and values
with B when attention needs them. The newest tokens stay in full precision beside them. The model
itself is frozen: it still reads the prompt with the exact W_K and W_V.

    in the paper        here                      what it is
    W_K, W_V            k_proj, v_proj            the frozen projections, W^T in nn.Linear
    A_K, B_K, A_V, B_V  factors.k.A, .k.B, ...    the factors of one layer
    h_in, h_out         hidden, d_kv              channels of the input, of a token's keys
    h_comp              r_k, r_v: LowRank.rank    channels of a latent
    l_w, m              window                    newest tokens in full precision
    (not there)         sinks                     first tokens in full precision
    n                   length                    tokens seen
    K_C, V_C            c_k, c_v                  latents, the compressed branch
    K_local, V_local    k, v of the cache         the full-precision branch
    K^, V^              k_hat, v_hat              rebuilt keys and values

Section 2.1 is `BiBranchCache`. Section 2.2 begins with what the layers see on a text (`calibrate`)
and ends with where the factors start (`init_factors`); train.py goes on from there.
beyond/segments.py has a cache of the same latents that is faster. Shapes as in model.py.

Sources:
    [1] Wang et al., 2024, the paper
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
    """W ~ A B: A [hidden, r] shrinks, B [r, d_kv] rebuilds.

    Only the product counts: A M and M^-1 B are the same factors for any invertible M [r, r].
    """

    A: Tensor
    B: Tensor
    bits: int = 16  # of a stored latent: 32, 16, or packed in 8, 4, 3 or 2
    clamped: bool = False  # quantized as the paper's published code does; see quant.py
    group: int | None = None  # tokens that share a scale in a channel; None: as in KIVI

    @property
    def rank(self) -> int:
        return self.A.shape[1]

    def grouping(self, dim: int) -> quant.Grouping:
        """How its latents are quantized, where KIVI groups those of its side along `dim`."""
        if self.group is None:
            return quant.Grouping(dim, clamped=self.clamped)
        return quant.Grouping(quant.TOKENS, self.group, self.clamped)


@dataclass(frozen=True)
class LayerFactors:
    """The factors of one layer's keys and values."""

    k: LowRank
    v: LowRank


@dataclass(eq=False)
class Latents:
    """Latents of n tokens. `quant.Packed` holds those of fewer bits by the same three calls."""

    dtype: torch.dtype
    expected: int = 0  # tokens in the end, which a subclass may make room for

    length = 0  # n
    packed = 0  # of them
    c = None  # [B, n, r], when there are some

    def append(self, c: Tensor) -> None:
        """c [B, m, r], the latents of the next m tokens."""
        c = c.to(self.dtype)
        if self.c is not None:
            c = torch.cat([self.c, c], dim=1)
        self.c = c
        self.length = c.shape[1]

    def read(self, start: int, stop: int) -> Tensor:
        """The latents [B, stop - start, r] of the tokens from `start` to `stop` - 1."""
        return self.c[:, start:stop]

    def tensors(self) -> list[Tensor]:
        return [] if self.c is None else [self.c]


def empty_latents(
    pair: LowRank, dim: int, window: int, expected: int = 0, latents: type[Latents] = Latents
) -> Latents | quant.Packed:
    """A place for latents of `pair.bits` bits. KIVI's groups lie along `dim`, and wait until they
    leave the window. 16 bits are A's type, or float16 where A is float32."""
    sixteen = pair.A.dtype if pair.A.dtype.itemsize == 2 else torch.float16
    if pair.bits in quant.BITS:
        residual = window if pair.group is None else 0
        return quant.Packed(pair.bits, pair.grouping(dim), residual, expected, sixteen)
    if pair.bits not in (16, 32):
        raise ValueError(f"{pair.bits}-bit latents; choose 2, 3, 4, 8, 16 or 32")
    return latents(torch.float32 if pair.bits == 32 else sixteen, expected)


class BiBranchCache(LayerCache):
    """The paper's cache (Figure 1) for one layer, to be read beside it.

    Compressed branch: the latents c_k [B, n, r_k] and c_v [B, n, r_v] of all n tokens but the
    sinks, before RoPE. Full-precision branch: k and v [B, H_kv, S + m, D], rotated keys and values
    of the S <= sinks first tokens, then of the newest m <= window others. So a token in the window
    is stored twice, exactly and as latents.

    At a decode step each token is attended through one branch:

        sinks 1, window 4, token 10 arrives     0   |  1 2 3 4 5 6  |  7 8 9 10
                                              full  |  compressed   |  full

    Args:
        attention: the layer's projections, for their biases and sizes.
        factors: A and B, of x's type and device. They are weights, not counted as cache.
        window: newest tokens in full precision, at least 1. A sliding window caps it.
        expected: final length in tokens, if known. It changes no result: packed latents then take
            memory once.
        sinks: first tokens in full precision. They attract much attention [5]; the paper
            has none.
    """

    kept_in = Latents  # latents of 16 and 32 bits

    def __init__(
        self,
        attention: Attention,
        factors: LayerFactors,
        window: int = 32,
        expected: int = 0,
        sinks: int = 0,
    ):
        if window < 1 or sinks < 0:
            raise ValueError(f"window {window} is below 1, or sinks {sinks} are below 0")
        self.D = attention.config.head_dim
        self.sliding_window = attention.config.sliding_window
        self.window = min(window, self.sliding_window or window)
        self.sinks = sinks
        self.expected = expected
        self.A_k, self.B_k = factors.k.A, factors.k.B
        self.A_v, self.B_v = factors.v.A, factors.v.B
        self.k_bias, self.v_bias = attention.k_proj.bias, attention.v_proj.bias
        old = max(0, expected - sinks)
        self.c_k = empty_latents(factors.k, quant.TOKENS, self.window, old, self.kept_in)
        self.c_v = empty_latents(factors.v, quant.CHANNELS, self.window, old, self.kept_in)

    def prefill(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        """The whole prompt (Figure 1a)."""
        self.check_prefill()
        # 1. The original model's attention, with all exact keys and values.
        q_rotated = rope.rotate(q, 0)
        k_rotated = rope.rotate(k, 0)
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
        # 2. Full-precision branch: the new token enters the window. The oldest leaves it: its exact
        #    key and value are dropped, its latents are there since it came.
        self.k = self.sinks_and_window(torch.cat([self.k, rope.rotate(k, t)], dim=2))
        self.v = self.sinks_and_window(torch.cat([self.v, v], dim=2))
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
        """Of rotated keys and of values [B, H_kv, n, D] what the full-precision branch holds."""
        self.k = self.sinks_and_window(k)
        self.v = self.sinks_and_window(v)

    def branches(self) -> tuple[int, int, int, int]:
        """Positions of the tokens that the newest one attends to: the sinks first_sink .. S - 1 in
        full precision, first_old .. window_start - 1 compressed, all later ones in full precision.

        Without a sliding window of the model's, first_sink is 0 and first_old is S, the number of
        sinks that there are: all tokens, while these are fewer than `sinks`.
        """
        S = min(self.length, self.sinks)
        behind = max(0, self.length - (self.sliding_window or self.length))
        window_start = max(S, self.length - self.window)
        return min(S, behind), S, max(S, behind), window_start

    def sinks_and_window(self, y: Tensor) -> Tensor:
        """Of y [B, H_kv, n, D] the sinks, and the last `window` of the others."""
        others = y[:, :, self.sinks :]
        return torch.cat([y[:, :, : self.sinks], others[:, :, -self.window :]], dim=2)

    def rebuild(
        self, latents: Latents, B: Tensor, bias: Tensor | None, first: int, old: int
    ) -> Tensor:
        """Keys or values [B, H_kv, old - first, D] of the tokens first .. old - 1, float32."""
        c = latents.read(first - self.sinks, old - self.sinks)  # sinks have no latents
        y = c.float() @ B.float()  # [B, old - first, d_kv]
        if bias is not None:
            y = y + bias.float()
        return y.unflatten(-1, (-1, self.D)).transpose(1, 2)

    def tensors(self) -> list[Tensor]:
        if not self.length:
            return []
        return [*self.c_k.tensors(), *self.c_v.tensors(), self.k, self.v]


def is_exact(i: Tensor, j: Tensor, window: int, sinks: int) -> Tensor:
    """Whether the tokens at positions i [n] see those at positions j [m] in full precision, if
    they see them: [n, m]."""
    return (j < sinks) | (j > i[:, None] - window)


# ------------------------------------- section 2.2: the factors, and where they start


@dataclass(frozen=True)
class Together:
    """Neighbouring layers that share the latents of their keys ("k") or values ("v"); see
    beyond/shared.py."""

    side: str
    first: int  # layer
    count: int  # layers

    @property
    def layers(self) -> range:
        return range(self.first, self.first + self.count)


@dataclass(frozen=True)
class Factors:
    """The factors of all layers; each layer, and each of K and V, has its own rank and bits.

    `info` says where they come from: `init`, the calibration `data`, how they were `trained`.
    `together` are groups of layers with one latent for all of them.
    """

    layers: list[LayerFactors]
    info: dict[str, str] = field(default_factory=dict)
    together: tuple[Together, ...] = ()

    @property
    def pairs(self) -> list[LowRank]:
        """All pairs A, B in one list: those of keys and of values, layer by layer."""
        return [pair for layer in self.layers for pair in (layer.k, layer.v)]

    @property
    def stored(self) -> list[LowRank]:
        """The pairs whose latents are stored: of layers that share them, the first one's."""
        sides = {(i, side) for i in range(len(self.layers)) for side in "kv"}
        for group in self.together:
            sides -= {(i, group.side) for i in group.layers[1:]}
        return [getattr(self.layers[i], side) for i, side in sorted(sides)]

    def map(self, change: Callable[[LowRank], LowRank]) -> "Factors":
        """The factors with `change` applied to every pair."""
        layers = [LayerFactors(change(layer.k), change(layer.v)) for layer in self.layers]
        return replace(self, layers=layers, info=dict(self.info))

    def to(self, like: Tensor) -> "Factors":
        """The same factors with the type and on the device of `like`, such as a weight."""
        return self.map(lambda pair: replace(pair, A=pair.A.to(like), B=pair.B.to(like)))

    def in_bits(
        self, k_bits: int | None = None, v_bits: int | None = None, clamped: bool = False
    ) -> "Factors":
        """The same factors with latents in other bits; None leaves them as they are."""
        for group in self.together:
            if getattr(self.layers[group.first], group.side).group is None:
                raise ValueError("layers that share latents have groups of tokens, not KIVI's")
        generator = torch.Generator().manual_seed(0)
        layers = []
        for layer in self.layers:
            v = in_bits(layer.v, v_bits, quant.CHANNELS, clamped, generator)
            k = in_bits(layer.k, k_bits, quant.TOKENS, clamped, generator)
            layers.append(LayerFactors(k, v))
        return replace(self, layers=layers, info=dict(self.info))


def in_bits(
    pair: LowRank, bits: int | None, dim: int, clamped: bool, generator: torch.Generator
) -> LowRank:
    """The same product A B with latents in other bits; None leaves them as they are.

    Latents that go from full precision to few bits in groups along the channels of a token are
    mixed first: else a channel of large latents, such as the first ones of `svd` and `optimal`,
    sets the step for all others of its group [4].
    """
    to_few = bits in quant.BITS and pair.bits not in quant.BITS
    if to_few and pair.grouping(dim).dim == quant.CHANNELS:
        pair = mix_latents(pair, generator)
    return replace(pair, bits=bits or pair.bits, clamped=pair.clamped or clamped)


@torch.no_grad()
def mix_latents(pair: LowRank, generator: torch.Generator) -> LowRank:
    """The same product A B with the latents turned by a random orthogonal R: A R and R^T B. All
    channels are mixed evenly, at no cost [4]."""
    noise = torch.randn(pair.rank, pair.rank, generator=generator)
    R = torch.linalg.qr(noise).Q.to(pair.A.device)
    A = pair.A.float() @ R
    B = R.T @ pair.B.float()
    return replace(pair, A=A.to(pair.A), B=B.to(pair.B))


# Appendix B: what the layers of the frozen model see on a text.


class Observer(LayerCache):
    """Attends as the original model does, remembers nothing, and shows what its layer gets.

    `see(x, k, v)` is called with x [B, T, hidden], the layer's input, and with k and v [B, T, d_kv]
    before RoPE and without bias: RoPE turns K and K^ alike, and both get the bias. All in float32,
    and without the first `sinks` tokens: a cache that keeps these exact has no latents of them.
    """

    def __init__(
        self, attention: Attention, see: Callable[[Tensor, Tensor, Tensor], None], sinks=0
    ):
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
    """What one layer sees on calibration text: all that `asvd` and `optimal` need of it.

    In float64, so that sums in another order, such as those of several processes, are the same. The
    second moments are not centred: the loss has no bias to absorb a mean.
    """

    x_abs: Tensor  # [hidden]       mean of |x|
    k_moment: Tensor  # [d_kv, d_kv]   mean of k^T k
    v_moment: Tensor  # [d_kv, d_kv]   mean of v^T v
    k_metric: Tensor | None = None  # [d_kv, d_kv]   what errors of keys cost, if it is known
    tokens: Tensor | None = None  # how many they are means of

    @staticmethod
    def empty(attention: Attention) -> "Statistics":
        """Sums of nothing yet."""
        zero = attention.k_proj.weight.new_zeros((), dtype=torch.float64)
        hidden, d_kv = attention.config.hidden_size, attention.config.d_kv
        moments = zero.repeat(d_kv, d_kv), zero.repeat(d_kv, d_kv)
        return Statistics(zero.repeat(hidden), *moments, tokens=zero.clone())

    def add(self, x: Tensor, k: Tensor, v: Tensor) -> None:
        """Adds tokens to the sums, which `finish` makes means."""
        x = x.flatten(0, 1).double()  # [B * T, hidden]
        k = k.flatten(0, 1).double()  # [B * T, d_kv]
        v = v.flatten(0, 1).double()
        self.x_abs += x.abs().sum(0)
        self.k_moment += k.T @ k
        self.v_moment += v.T @ v
        self.tokens += len(x)

    def finish(self, summed: Callable[[Tensor], Tensor]) -> None:
        summed(self.tokens)
        for total in (self.x_abs, self.k_moment, self.v_moment):
            summed(total).div_(self.tokens)  # in place: the moments of LongChat-7B are 8.6 GB


@torch.no_grad()
def calibrate(
    model: Transformer,
    samples: Iterable[Tensor],
    sinks: int = 0,
    summed: Callable[[Tensor], Tensor] = lambda total: total,
    kind: Callable[..., Observer] = Observer,
) -> list[Statistics]:
    """What each layer of the frozen model sees on `samples`, token ids [B, T], in one run: means
    over all tokens but the first `sinks` of a sample.

    `summed` adds a total up, in place, over the processes that share the samples out; `kind` makes
    an observer of a layer. Raises `ValueError` if there is no token to look at, and for keys or
    values that overflow.
    """
    layers = [layer.self_attn for layer in model.model.layers]
    result = [Statistics.empty(attention) for attention in layers]
    cache = [kind(a, seen.add, sinks) for a, seen in zip(layers, result, strict=True)]
    for tokens in samples:
        model(tokens.to(model.lm_head.weight.device), cache, logits_to_keep=1)
    for i, seen in enumerate(result):
        seen.finish(summed)
        if not seen.tokens:
            raise ValueError(f"no sample is longer than {sinks} sinks; give longer text")
        if not (seen.k_moment.isfinite().all() and seen.v_moment.isfinite().all()):
            raise ValueError(f"keys or values of layer {i} overflow; try another --dtype")
    return result


# Each initialization takes W [hidden, d_kv], the transposed weight of k_proj or v_proj,
# and a rank.


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
    scale = x_abs.pow(alpha) + 1e-6  # [hidden]; not 0, for a channel that is always 0
    scaled = svd_factors(scale[:, None] * W, rank)
    return LowRank(scaled.A / scale[:, None], scaled.B)


def optimal_factors(W: Tensor, rank: int, moment: Tensor, metric: Tensor | None = None) -> LowRank:
    """The minimum of the paper's own loss (equation 1) over all A, B, in closed form [3]:

    min E |x W - x A B|^2   at   A = W V_r, B = V_r^T

    with V_r the top-r eigenvectors of `moment` = E k^T k, k = x W: project k on them. The loss is
    trace(moment) - trace(V_r^T moment V_r), the sum of the eigenvalues left out, d_kv times that of
    `train.layer_loss`. RoPE is a rotation: the loss is the same before and after.

    With a `metric` M = L L^T [d_kv, d_kv] an error e counts as e M e^T = |e L|^2, so the same holds
    for k L: A = W L V_r and B = V_r^T L^-1, with the eigenvectors of L^T `moment` L.
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
    """What an error of the values costs in the layer's output, as e M e^T.

    M [d_kv, d_kv], float64, has a block W_O^T W_O [D, D] for each value head: the sum over the
    query heads that share it.
    """
    config = attention.config
    W = attention.o_proj.weight.double()  # [hidden, H * D]
    W = W.unflatten(1, (config.num_key_value_heads, -1, config.head_dim))
    blocks = torch.einsum("ohgd,ohge->hde", W, W)  # W [hidden, H_kv, G, D]
    M = torch.block_diag(*blocks)
    scale = M.diagonal().mean()
    least = 1e-6 * scale if scale else 1.0  # M must not be singular, nor zero with W_O
    return M + least * torch.eye(len(M)).to(M)


def attention_metric(attention: Attention, side: str, statistics: Statistics) -> Tensor | None:
    """What errors of keys ("k") or values ("v") cost in the layer's output, if it is known."""
    return output_metric(attention) if side == "v" else statistics.k_metric


INITIALIZATIONS = ("random", "svd", "asvd", "optimal", "attention")
CALIBRATED = ("asvd", "optimal", "attention")  # they need `Statistics`


@torch.no_grad()
def init_pair(
    name: str,
    model: Transformer,
    i: int,
    side: str,
    rank: int,
    statistics: Statistics | None = None,
    generator: torch.Generator | None = None,
) -> LowRank:
    """A and B of the keys ("k") or the values ("v") of layer i, in float32.

    `attention` is `optimal` with value errors weighed by `output_metric`. Raises `ValueError` for
    an unknown name, a rank that does not fit, and weights that are not finite.
    """
    if name not in INITIALIZATIONS:
        names = ", ".join(INITIALIZATIONS)
        raise ValueError(f"no initialization {name!r}; choose one of {names}")
    if name in CALIBRATED and statistics is None:
        raise ValueError(f"initialization {name!r} needs calibration text")
    most = min(model.config.d_kv, model.config.hidden_size)
    if not 1 <= rank <= most:
        raise ValueError(f"rank {rank} is not in 1 .. {most}, the channels of this model")
    attention = model.model.layers[i].self_attn
    W = getattr(attention, f"{side}_proj").weight.T.float()  # [hidden, d_kv]
    if not W.isfinite().all():
        raise ValueError(f"layer {i}: {side}_proj has weights that are not finite numbers")
    if name == "random":
        return random_factors(W, rank, generator)
    if name == "svd":
        return svd_factors(W, rank)
    if name == "asvd":
        return asvd_factors(W, rank, statistics.x_abs.float())
    metric = attention_metric(attention, side, statistics) if name == "attention" else None
    return optimal_factors(W, rank, getattr(statistics, f"{side}_moment"), metric)


def init_factors(
    name: str,
    model: Transformer,
    k_ranks: list[int],
    v_ranks: list[int],
    statistics: list[Statistics] | None = None,
    seed: int = 0,
) -> Factors:
    """Factors of every layer by the initialization `name`, with a rank for each layer.

    The `CALIBRATED` ones need the `statistics` of `calibrate`. Raises `ValueError` as `init_pair`
    does, and for another number of ranks than layers.
    """
    count = len(model.model.layers)
    if not len(k_ranks) == len(v_ranks) == count:
        raise ValueError(f"{len(k_ranks)} and {len(v_ranks)} ranks for {count} layers")
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for i in range(count):
        seen = statistics[i] if statistics else None
        k = init_pair(name, model, i, "k", k_ranks[i], seen, generator)
        v = init_pair(name, model, i, "v", v_ranks[i], seen, generator)
        layers.append(LayerFactors(k, v))
    return Factors(layers, {"init": name, "trained": "none"})


def rank_for(ratio: float, d_kv: int) -> int:
    """The rank that removes the share `ratio` of d_kv channels: the paper's compression ratio."""
    if not 0 <= ratio < 1:
        raise ValueError(f"compression ratio {ratio} is not in [0, 1): 0.8 keeps a fifth")
    return max(1, round((1 - ratio) * d_kv))


def bi_branch_cache(
    model: Transformer,
    factors: Factors,
    window: int = 32,
    expected: int = 0,
    kind: type[BiBranchCache] = BiBranchCache,
    sinks: int = 0,
) -> list[LayerCache]:
    """A cache of that kind for every layer; the other arguments are those of the class. Raises
    `ValueError` for factors with layers that share latents."""
    if factors.together:
        raise ValueError("layers that share latents: beyond.shared.shared_cache makes their caches")
    cache = []
    for layer, pairs in zip(model.model.layers, factors.layers, strict=True):
        cache.append(kind(layer.self_attn, pairs, window, expected, sinks))
    return cache
