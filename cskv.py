"""CSKV: a KV cache with fewer channels. The method, whole: factors, where they start, the cache.

Wang et al., "CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios",
2024. In every layer the key (and value) projection is approximated by two thin matrices,

    K = x W_K  ~  (x A_K) B_K        x [T, hidden]   A [hidden, r]   B [r, d_kv]   r << d_kv

The cache stores the latents c = x A, r numbers a token instead of d_kv, and gets keys and values
back with B when attention needs them. The last `window` tokens stay in full precision beside them
(section 2.1). A and B come from the pretrained weights (section 2.2), with nothing of the model
itself changed: the prompt is still read with the exact W_K and W_V.

Shapes as in model.py, and r_k, r_v the ranks of keys and values, w the window.

Sources:
    [1] the paper above
    [2] Yuan et al., "ASVD", 2024: activation-aware SVD
    [3] Izenman, "Reduced-rank regression for the multivariate linear model", 1975: `optimal`
"""

import json
import math
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import quant
from model import (
    Attention,
    LayerCache,
    Rope,
    Transformer,
    UserError,
    causal_attention,
    replacing,
    reserve,
)

# ------------------------------------------------------------------------------------- factors


@dataclass
class LowRank:
    """W ~ A B, for x W: A [hidden, r] shrinks, B [r, d_kv] rebuilds.

    Only the product counts: A M and M^-1 B are the same factors for any invertible M [r, r].
    """

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[1]


@dataclass
class LayerFactors:
    k: LowRank
    v: LowRank


@dataclass
class Factors:
    """The factors of all layers.

    `info` says where they come from: `init`, the calibration `data`, how they were `trained`, the
    `k_bits` and `v_bits` they were made for, and the `quantizer` if it is not the usual one.
    """

    layers: list[LayerFactors]
    info: dict[str, str] = field(default_factory=dict)

    @property
    def pairs(self) -> list[LowRank]:
        """All pairs in one list: those of keys and of values, layer by layer."""
        return [pair for layer in self.layers for pair in (layer.k, layer.v)]

    @property
    def k_bits(self) -> int:
        return int(self.info.get("k_bits", 16))

    @property
    def v_bits(self) -> int:
        return int(self.info.get("v_bits", 16))

    @property
    def clamped_zero_point(self) -> bool:
        """Whether they were trained for that quantizer; see quant.py."""
        return self.info.get("quantizer") == "clamped zero-point"

    def to(self, like: Tensor) -> "Factors":
        """The same factors with the type and on the device of `like`, such as a model's weight."""
        pairs = [LowRank(pair.A.to(like), pair.B.to(like)) for pair in self.pairs]
        layers = zip(pairs[::2], pairs[1::2], strict=True)
        return Factors([LayerFactors(k, v) for k, v in layers], self.info)


def rank_for(ratio: float, d_kv: int) -> int:
    """The rank that removes the share `ratio` of d_kv channels: the paper's compression ratio."""
    if not 0 <= ratio < 1:
        raise UserError(
            f"compression ratio {ratio} is not in [0, 1): 0.8 keeps a fifth of the channels"
        )
    return max(1, round((1 - ratio) * d_kv))


def check_ranks(model: Transformer, *ranks: int) -> None:
    """Raises `UserError` for a rank that the model's key and value projections cannot have."""
    most = min(model.config.d_kv, model.config.hidden_size)
    for rank in ranks:
        if not 1 <= rank <= most:
            raise UserError(f"rank {rank} is not in 1 .. {most}, the channels of this model")


@dataclass
class Statistics:
    """What one layer sees on calibration text: all that `asvd` and `optimal` need to know of it.

    In float64, so that sums in another order, such as those of several processes, are the same. The
    second moments are not centred: the loss below has no bias that could absorb a mean.
    """

    x_abs: Tensor  # [hidden]       mean of |x|
    k_moment: Tensor  # [d_kv, d_kv]   mean of k k^T, k before RoPE and without bias
    v_moment: Tensor  # [d_kv, d_kv]   mean of v v^T


@contextmanager
def watching(model: Transformer, see: Callable[[int, Tensor, Tensor, Tensor], None]):
    """While the model runs, calls see(i, x, k, v) for every layer i, all of them in float32.

    x [B, T, hidden] is the layer's input, k and v [B, T, d_kv] are before RoPE and without bias:
    RoPE turns K and K^ alike, and a bias is added to both, so neither changes the loss.
    """

    def watch(i: int):
        def hook(attention: Attention, args: tuple) -> None:
            x, projections = args[0], (attention.k_proj, attention.v_proj)
            see(i, x.float(), *(F.linear(x, p.weight).float() for p in projections))

        return hook

    layers = model.model.layers
    hooks = [l.self_attn.register_forward_pre_hook(watch(i)) for i, l in enumerate(layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def collect_statistics(model: Transformer, batches: Iterable[Tensor]) -> list[Statistics]:
    """Runs the frozen model once over `batches` of tokens [B, T]: one `Statistics` a layer."""
    config, device = model.config, model.lm_head.weight.device
    shapes = (config.hidden_size,), (config.d_kv, config.d_kv), (config.d_kv, config.d_kv)
    result = [
        Statistics(*(torch.zeros(s, dtype=torch.float64, device=device) for s in shapes))
        for _ in model.model.layers
    ]

    def see(i: int, x: Tensor, k: Tensor, v: Tensor) -> None:
        # [B * T, hidden], [B * T, d_kv] twice
        x, k, v = (y.flatten(0, 1).double() for y in (x, k, v))
        result[i].x_abs += x.abs().sum(0)
        result[i].k_moment += k.T @ k
        result[i].v_moment += v.T @ v

    tokens_seen = 0
    with watching(model, see):
        for tokens in batches:
            model(tokens.to(device), logits_to_keep=1)
            tokens_seen += tokens.numel()
    if not tokens_seen:
        raise UserError("no calibration text; give at least one sample")
    for s in result:  # in place: the moments of LongChat-7B are 8.6 GB
        for total in (s.x_abs, s.k_moment, s.v_moment):
            total /= tokens_seen
    return result


# ------------------------------------------------------------ the initializations of A and B
# Each takes W [hidden, d_kv], the transposed weight of k_proj or v_proj, and a rank.


def random_factors(W: Tensor, rank: int, generator: torch.Generator) -> LowRank:
    """Gaussian, scaled to keep the variance of its input. The paper's negative control (C.1)."""
    A = torch.randn(W.shape[0], rank, generator=generator) / math.sqrt(W.shape[0])
    B = torch.randn(rank, W.shape[1], generator=generator) / math.sqrt(rank)
    return LowRank(A.to(W.device), B.to(W.device))


def svd_factors(W: Tensor, rank: int) -> LowRank:
    """The best A B for W itself: minimal |W - A B|, whatever x is."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = S[:rank].sqrt()  # split evenly, so that A and B are of one size
    return LowRank(U[:, :rank] * root, root[:, None] * Vh[:rank])


def asvd_factors(W: Tensor, rank: int, x_abs: Tensor, alpha: float = 0.5) -> LowRank:
    """SVD of S W, with S = diag(mean |x|^alpha): rows that meet large inputs count more [2].

    The paper's default (appendix B): absolute mean, alpha 0.5.
    """
    scale = x_abs.pow(alpha) + 1e-6  # [hidden]; a channel that is always 0 must not divide by 0
    scaled = svd_factors(scale[:, None] * W, rank)
    return LowRank(scaled.A / scale[:, None], scaled.B)


def optimal_factors(W: Tensor, rank: int, moment: Tensor, metric: Tensor | None = None) -> LowRank:
    """The minimum of the paper's loss |x W - x A B|^2 (equation 1) over all A, B, in closed form.

    Reduced-rank regression [3]: project k = x W on the top-r eigenvectors V_r of its second moment,
    x A B = k V_r V_r^T, so A = W V_r and B = V_r^T. What is lost is the sum of the eigenvalues left
    out. RoPE is a rotation, so it is the same loss before and after it.

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
    """What an error of the values costs in the layer's output, as e M e^T: M [d_kv, d_kv], with a
    block W_O^T W_O [D, D] for each value head, in float64.

    Head by head, since each weighs tokens in its own way; summed over the query heads that share a
    value head. (Keys have no such luck: to weigh their errors by the queries' second moment, turned
    by RoPE to where they meet, made SmolLM2 worse.)
    """
    config = attention.config
    W = attention.o_proj.weight.double()  # [hidden, H * D]
    W = W.unflatten(1, (config.num_key_value_heads, -1, config.head_dim))  # [hidden, H_kv, G, D]
    M = torch.block_diag(*torch.einsum("ohgd,ohge->hde", W, W))
    least = (1e-6 * M.diagonal().mean()).clamp(min=1e-12)  # W_O^T W_O may be singular, M must not
    return M + least * torch.eye(len(M)).to(M)


INITIALIZATIONS = ("random", "svd", "asvd", "optimal", "attention")
CALIBRATED = INITIALIZATIONS[2:]  # they need to know what the layers see


@torch.no_grad()
def init_factors(
    name: str,
    model: Transformer,
    k_ranks: list[int],
    v_ranks: list[int],
    statistics: list[Statistics] | None = None,
    seed: int = 0,
) -> Factors:
    """Factors of every layer by the initialization `name`, in float32, with a rank for each layer.

    `attention` is `optimal` with value errors weighed by `output_metric`. The `CALIBRATED` ones
    need the `statistics` of `collect_statistics`. Raises `UserError` for an unknown name and for
    ranks that do not fit.
    """
    if name not in INITIALIZATIONS:
        raise UserError(f"no initialization {name!r}; choose one of {', '.join(INITIALIZATIONS)}")
    if name in CALIBRATED and statistics is None:
        raise UserError(f"initialization {name!r} needs calibration text")
    layers = model.model.layers
    if not len(k_ranks) == len(v_ranks) == len(layers):
        raise UserError(f"{len(k_ranks)} and {len(v_ranks)} ranks for {len(layers)} layers")
    check_ranks(model, *k_ranks, *v_ranks)
    generator = torch.Generator().manual_seed(seed)

    def make(i: int, which: str, rank: int) -> LowRank:
        attention = layers[i].self_attn
        W = getattr(attention, f"{which}_proj").weight.T.float()  # [hidden, d_kv]
        if not W.isfinite().all():
            raise UserError(f"layer {i}: {which}_proj has weights that are not finite numbers")
        if name == "random":
            return random_factors(W, rank, generator)
        if name == "svd":
            return svd_factors(W, rank)
        if name == "asvd":
            return asvd_factors(W, rank, statistics[i].x_abs.float())
        metric = output_metric(attention) if (name, which) == ("attention", "v") else None
        return optimal_factors(W, rank, getattr(statistics[i], f"{which}_moment"), metric)

    result = [
        LayerFactors(make(i, "k", k_rank), make(i, "v", v_rank))
        for i, (k_rank, v_rank) in enumerate(zip(k_ranks, v_ranks, strict=True))
    ]
    return Factors(result, {"init": name, "trained": "none", "k_bits": "16", "v_bits": "16"})


@torch.no_grad()
def rotate_values(factors: Factors, seed: int = 0) -> Factors:
    """The same products A B with the values' latents turned by a random orthogonal R: A R, R^T B.

    Free, and made for quantization per token: there, a channel of large latents, such as the first
    ones of `svd` and `optimal`, sets the step for the 31 others of its group. R mixes all channels
    evenly. Keys, quantized per channel, need none. After Ashkboos et al., "QuaRot", 2024.
    """
    generator, layers = torch.Generator().manual_seed(seed), []
    for layer in factors.layers:
        R, _ = torch.linalg.qr(torch.randn(layer.v.rank, layer.v.rank, generator=generator))
        R = R.to(layer.v.A.device)
        A, B = (layer.v.A.float() @ R).to(layer.v.A), (R.T @ layer.v.B.float()).to(layer.v.B)
        layers.append(LayerFactors(layer.k, LowRank(A, B)))
    return Factors(layers, dict(factors.info))


# -------------------------------------------------------------------------------- factors files

FORMAT, VERSION = "cskv-factors", "1"


@torch.no_grad()
def fingerprint(model: Transformer) -> list[list[float]]:
    """For every k_proj and v_proj: its norm, then 16 sums over all its weights, in units of it.

    Not a hash, since the same model may be loaded in other bits. Rounding to 16 bits moves the sums
    by about 0.001, 4-bit weights by 0.04; those of another model lie about 0.7 away.
    """
    result = []
    for layer in model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            W = projection.weight.float().cpu()  # [d_kv, hidden]
            waves = [torch.outer(torch.arange(1.0, 5.0), torch.arange(n)).cos() for n in W.shape]
            sums = waves[0] @ W @ waves[1].T / W.norm()  # [4, 4]
            result.append([round(x, 4) for x in (W.norm().item(), *sums.flatten().tolist())])
    return result


def same_model(ours: list[list[float]], theirs: list[list[float]]) -> bool:
    """Whether two fingerprints are of one model: norms within 5%, sums within 0.1 (rms).

    A 4-bit copy passes, and so may a fine-tune that left these weights nearly as they were.
    """
    if len(ours) != len(theirs):
        return False
    a, b = torch.tensor(ours), torch.tensor(theirs)  # [2 * layers, 17]
    norms = (a[:, 0] / b[:, 0]).log().abs().max()
    return bool(norms < 0.05 and (a - b)[:, 1:].square().mean(1).sqrt().max() < 0.1)


def save_factors(
    path: str | Path, factors: Factors, model: Transformer, dtype: torch.dtype = torch.float16
) -> None:
    """Writes a safetensors file: A and B of every k_proj and v_proj, and as metadata what they are.

    Raises `UserError` if the factors do not fit into `dtype` or the file cannot be written.
    """
    tensors = {}
    for i, layer in enumerate(factors.layers):
        for name, pair in (("k_proj", layer.k), ("v_proj", layer.v)):
            prefix = f"model.layers.{i}.self_attn.{name}"
            tensors[f"{prefix}.A"] = pair.A.detach().to("cpu", dtype).contiguous()
            tensors[f"{prefix}.B"] = pair.B.detach().to("cpu", dtype).contiguous()
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{name} has values that {dtype} cannot hold; save as float32")
    metadata = {
        **factors.info,
        "format": FORMAT,
        "version": VERSION,
        "k_ranks": json.dumps([layer.k.rank for layer in factors.layers]),
        "v_ranks": json.dumps([layer.v.rank for layer in factors.layers]),
        "fingerprint": json.dumps(fingerprint(model)),
    }
    data = save(tensors, metadata)
    # safetensors orders metadata by chance; sorted, equal factors are equal files.
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":"))
    header = header.encode() + b" " * (-len(header.encode()) % 8)
    with replacing(path) as temporary:
        temporary.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])


def load_factors(path: str | Path, model: Transformer) -> Factors:
    """Reads a factors file for `model`, on the model's device and in its precision.

    Raises `UserError` if it is no factors file, is damaged, or belongs to another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            info = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"no factors file {path}; make one with train.py") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({str(error).splitlines()[0]}); make it again"
        ) from None
    if info.get("format") != FORMAT:
        raise UserError(f"{path} is not a CSKV factors file; make one with train.py")
    if info.get("version") != VERSION:
        raise UserError(
            f"{path} has format version {info.get('version')}, this code reads {VERSION}; make it "
            "again with train.py"
        )
    try:
        theirs = json.loads(info["fingerprint"])
        int(info["k_bits"]), int(info["v_bits"])
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged (metadata: {error}); make it again") from None

    # A wrong model gives fluent nonsense, not an error, unless it is refused here.
    if not same_model(fingerprint(model), theirs):
        raise UserError(f"{path} belongs to another model; make factors for this one with train.py")

    def pair(prefix: str) -> LowRank:
        A, B = tensors[f"{prefix}.A"], tensors[f"{prefix}.B"]
        if A.shape != (model.config.hidden_size, len(B)) or B.shape[1] != model.config.d_kv:
            raise UserError(
                f"{path}: {prefix} has A {tuple(A.shape)} and B {tuple(B.shape)}, which do not fit "
                f"hidden size {model.config.hidden_size} and {model.config.d_kv} channels"
            )
        return LowRank(A, B)

    try:
        layers = [
            LayerFactors(
                *(pair(f"model.layers.{i}.self_attn.{name}") for name in ("k_proj", "v_proj"))
            )
            for i in range(len(model.model.layers))
        ]
    except KeyError as error:
        raise UserError(f"{path} lacks {error}; make it again with train.py") from None
    return Factors(layers, info).to(model.lm_head.weight)


# ------------------------------------------------------------------------------------- latents


class Latents:
    """Latents [B, T, r] of every token, in a 16- or 32-bit buffer for `expected` tokens or more."""

    length = 0  # tokens held

    def __init__(self, dtype: torch.dtype, expected: int = 0):
        self.dtype, self.expected = dtype, expected

    def append(self, c: Tensor) -> None:
        """c [B, n, r], the latents of the next n tokens."""
        B, n, r = c.shape
        if not self.length:
            self.buffer = c.new_empty(B, max(n, self.expected), r, dtype=self.dtype)
        start, self.length = self.length, self.length + n
        self.buffer = reserve(self.buffer, self.length)
        self.buffer[:, start : self.length] = c

    def read(self, start: int, stop: int) -> Tensor:
        """The latents [B, stop - start, r] of the tokens from `start` to `stop` - 1."""
        return self.buffer[:, start:stop]

    def tensors(self) -> list[Tensor]:
        return [self.buffer] if self.length else []


class PackedLatents:
    """Latents in 2, 3, 4 or 8 bits: packed 32 tokens at a time, once all 32 have left the window.

    Until then they wait in 16 bits, at most 31 tokens and the window:

        window 4, 70 tokens seen     tokens 0 .. 31 | 32 .. 63 | 64 65   66 67 68 69
                                            packed  |  packed  | wait    the window
    """

    length = 0  # tokens held

    def __init__(self, dtype: torch.dtype, window: int, packed: quant.Packed):
        self.dtype, self.window, self.packed = dtype, window, packed

    def append(self, c: Tensor) -> None:
        c = c.to(self.dtype)
        # A copy a step, but of fewer than window + 32 tokens, however long the text is.
        waiting = torch.cat([self.waiting, c], 1) if self.length else c
        self.length += c.shape[1]
        n = max(0, waiting.shape[1] - self.window) // quant.GROUP * quant.GROUP
        if n:
            self.packed.append(waiting[:, :n])
            waiting = waiting[:, n:].clone()  # a view would keep the memory of the packed ones
        self.waiting = waiting  # [B, at most window + 31, r]

    def read(self, start: int, stop: int) -> Tensor:
        packed, parts = self.packed.length, []
        if start < packed:
            parts.append(self.packed.read(start, min(stop, packed)))
        if stop > packed:
            parts.append(self.waiting[:, max(0, start - packed) : stop - packed])
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def tensors(self) -> list[Tensor]:
        return [*self.packed.tensors(), self.waiting] if self.length else []


# ----------------------------------------------------------------------------- bi-branch cache


def pairs(x: Tensor) -> Tensor:
    """Puts the channels f and f + D/2 of x [..., D], which RoPE turns together, side by side."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


class BiBranchCache(LayerCache):
    """The paper's cache (section 2.1, Figure 1), for one layer.

    Compressed branch: the latents c_k [B, T, r_k] and c_v [B, T, r_v] of every token, before RoPE.
    Full-precision branch: rotated keys and values of the last `window` tokens, a ring in which
    position t has slot t mod window. At a decode step each token is attended through one branch:

        window 4, token 10 arrives      positions 0 1 2 3 4 5 6 | 7 8 9 10
                                        attended by  compressed  |  full
        ring slots 0 1 2 3 then hold    positions 8 9 10 7 (10 took the place of 6)

    Latents are stored in `k_bits` and `v_bits`: 16 is the 16-bit type of A and B, or float16 if
    they are in float32; 32 is float32; 2, 3, 4 and 8 are packed, keys per channel and values per
    token (appendix C.4). The ring has the precision of the keys and values that come in.

    Args:
        attention: the layer's projections, for their biases and sizes.
        factors: A and B, of x's type and device. They are weights, not counted as cache.
        window: tokens kept in full precision, at least 1. A sliding window caps it.
        expected: final length in tokens if known; memory is then taken once.
        clamped_zero_point: quantize as the paper's published code does; see quant.py.
    """

    def __init__(
        self,
        attention: Attention,
        factors: LayerFactors,
        window: int = 32,
        expected: int = 0,
        k_bits: int = 16,
        v_bits: int = 16,
        clamped_zero_point: bool = False,
    ):
        config, like = attention.config, factors.k.A
        if window < 1:
            raise UserError(f"window {window} is below 1; the newest token needs a place in it")
        self.sliding_window, self.expected = config.sliding_window, expected
        self.window = min(window, self.sliding_window or window)
        self.H_kv, self.D = config.num_key_value_heads, config.head_dim
        sixteen = like.dtype if like.dtype.itemsize == 2 else torch.float16

        def latents(bits: int, dim: int) -> Latents | PackedLatents:
            if bits in quant.BITS:
                room = max(0, expected - self.window)
                packed = quant.Packed(bits, dim, room, clamped_zero_point)
                return PackedLatents(sixteen, self.window, packed)
            if bits not in (16, 32):
                raise UserError(f"{bits}-bit latents; choose 2, 3, 4, 8, 16 or 32")
            return Latents(sixteen if bits == 16 else torch.float32, expected)

        self.c_k, self.c_v = latents(k_bits, quant.TOKENS), latents(v_bits, quant.CHANNELS)
        # On a CPU a chunk of rebuilt keys should stay in its cache; a GPU wants few, large steps.
        self.chunk = 1024 if like.device.type == "cpu" else 8192

        def heads(x: Tensor) -> Tensor:  # [..., d_kv] -> [..., H_kv, D]
            return x.unflatten(-1, (self.H_kv, self.D))

        # B works in 32 bits on a CPU, where products of 16-bit floats are slow.
        dtype = torch.float32 if like.device.type == "cpu" else like.dtype
        k_B, v_B = factors.k.B.to(dtype), factors.v.B.to(dtype)
        # Rebuilt keys come out of B with RoPE's pairs side by side, ready to be complex numbers.
        self.A_k, self.A_v = factors.k.A, factors.v.A
        self.B_k = pairs(heads(k_B)).flatten(-2).T.contiguous()  # [d_kv, r_k]
        self.B_v = heads(v_B).transpose(0, 1).contiguous()  # [H_kv, r_v, D]
        k_bias, v_bias = attention.k_proj.bias, attention.v_proj.bias
        self.k_bias = None if k_bias is None else pairs(heads(k_bias.to(dtype))).flatten()  # [d_kv]
        self.v_bias = None if v_bias is None else heads(v_bias.to(dtype))[:, None]  # [H_kv, 1, D]

    def prefill(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        """The whole prompt (Figure 1a). Its output is exactly the original model's."""
        self.check_prefill()
        B, H_kv, T, D = k.shape
        room, m = max(T, self.expected), min(T, self.window)
        # 1. Compressed branch: the latents of all T tokens.
        self.c_k.append(x @ self.A_k)
        self.c_v.append(x @ self.A_v)
        # 2. Exact keys, rotated to positions 0 .. T - 1, and exact values.
        q, k = rope.rotate(q, 0), rope.rotate(k, 0)
        # 3. Full-precision branch: the last m of them, copied into the ring.
        slots = torch.arange(T - m, T, device=x.device) % self.window
        self.k = k.new_empty(B, H_kv, min(room, self.window), D)
        self.v = torch.empty_like(self.k)
        self.k[:, :, slots], self.v[:, :, slots] = k[:, :, T - m :], v[:, :, T - m :]
        self.length = T
        # 4. Attention with the exact keys and values, which are dropped after it.
        return causal_attention(q, k, v, self.sliding_window)

    def decode(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        """One new token, at position t (Figure 1b)."""
        self.check_decode(q)
        B, H, _, D = q.shape
        t, self.length = self.length, self.length + 1
        # 1. Compressed branch: append the new token's latents.
        self.c_k.append(x @ self.A_k)
        self.c_v.append(x @ self.A_v)
        # 2. Full-precision branch: the new token takes the slot of the one that leaves the window.
        self.k = reserve(self.k, t + 1, most=self.window)
        self.v = reserve(self.v, t + 1, most=self.window)
        self.k[:, :, t % self.window] = rope.rotate(k, t)[:, :, 0]
        self.v[:, :, t % self.window] = v[:, :, 0]
        # 3. Who is attended through which branch: first .. old - 1 compressed, the rest full.
        m = min(self.length, self.window)
        first, old = max(0, self.length - (self.sliding_window or self.length)), self.length - m
        chunks = [(s, min(s + self.chunk, old)) for s in range(first, old, self.chunk)]
        # 4. Scores. Old keys are rebuilt and rotated chunk by chunk, so the working memory is one
        #    chunk however long the sequence is. Queries of a group share a key head: [.., G, D].
        q = rope.rotate(q, t).view(B, self.H_kv, -1, D) / math.sqrt(D)  # [B, H_kv, G, D]
        scores = q.new_empty(*q.shape[:3], old - first + m, dtype=torch.float32)
        q, q_pairs = q.float(), pairs(q).float()
        for s, e in chunks:
            c_k = self.c_k.read(s, e).to(self.B_k.dtype)  # [B, e - s, r_k]
            k_hat = F.linear(c_k, self.B_k, self.k_bias).float()  # [B, e - s, d_kv]
            k_hat = k_hat.view(B, e - s, self.H_kv, D // 2, 2)  # pairs: complex numbers
            torch.view_as_complex(k_hat).mul_(rope.cis[s:e, None])  # RoPE, in place
            k_hat = k_hat.view(B, e - s, self.H_kv, D).permute(0, 2, 3, 1)  # [B, H_kv, D, e - s]
            scores[..., s - first : e - first] = q_pairs @ k_hat
        scores[..., old - first :] = q @ self.k[:, :, :m].transpose(-1, -2).float()
        # 5. One softmax over both branches.
        p = scores.softmax(-1).to(self.B_v.dtype)  # [B, H_kv, G, old - first + m]
        p_old, p_new = p[..., : old - first], p[..., old - first :]
        out = p_new @ self.v[:, :, :m].to(p.dtype)  # [B, H_kv, G, D]
        # 6. Old values need no rebuilding: p (C_v B_v) = (p C_v) B_v costs r_v a token, not D.
        if chunks:
            p_c = p_old.flatten(1, 2)  # [B, H, old - first]: all heads share the latents
            p_c = sum(
                p_c[..., s - first : e - first] @ self.c_v.read(s, e).to(p.dtype) for s, e in chunks
            )
            out = out + p_c.view(B, self.H_kv, -1, p_c.shape[-1]) @ self.B_v
            if self.v_bias is not None:
                out = out + p_old.sum(-1, keepdim=True) * self.v_bias
        return out.to(x.dtype).reshape(B, H, 1, D)

    def tensors(self) -> list[Tensor]:
        ring = [self.k, self.v] if self.length else []
        return self.c_k.tensors() + self.c_v.tensors() + ring


def bi_branch_cache(
    model: Transformer,
    factors: Factors,
    window: int = 32,
    expected: int = 0,
    k_bits: int = 16,
    v_bits: int = 16,
    clamped_zero_point: bool = False,
) -> list[LayerCache]:
    """A `BiBranchCache` for every layer of `model`; the arguments are those of the class.

    Factors made for full-precision values are rotated first if values are to be quantized.
    """
    if v_bits in quant.BITS and factors.v_bits not in quant.BITS:
        factors = rotate_values(factors)
    return [
        BiBranchCache(layer.self_attn, f, window, expected, k_bits, v_bits, clamped_zero_point)
        for layer, f in zip(model.model.layers, factors.layers, strict=True)
    ]


def nominal_ratio(
    model: Transformer, factors: Factors, k_bits: int = 16, v_bits: int = 16
) -> float:
    """The paper's compression ratio: 1 - density * bits / 16, nothing but latents counted."""
    kept = sum(f.k.rank * k_bits + f.v.rank * v_bits for f in factors.layers)
    return 1 - kept / (2 * 16 * model.config.d_kv * len(factors.layers))
