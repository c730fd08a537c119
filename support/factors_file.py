"""Factors in a file: safetensors, with metadata that says what they are and whose.

A and B of every k_proj and v_proj are tensors, named after the projection; where A follows from B,
the metric that tells it stands in its place. The metadata hold the format's version, the ranks, the
bits and their groups, which layers share latents, the initialization, what trained them on what,
and a fingerprint of the projections they belong to: on another model they would give fluent
nonsense.
"""

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import quant
from cskv import Factors, LayerFactors, LowRank, Together, output_metric
from model import Attention, Transformer
from support.command import UserError, first_line, replacing

FORMAT, VERSION = "cskv-factors", "1"
CLAMPED = "clamped zero-point"  # the quantizer of factors that were trained for it; see quant.py
# Metadata that follow from factors and model; the rest is `info`.
ALWAYS = ("format", "version", "k_ranks", "v_ranks", "k_bits", "v_bits", "fingerprint")
SOMETIMES = ("quantizer", "group", "together")


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
            sums = waves[0] @ W @ waves[1].T / W.norm().clamp(min=1e-38)  # [4, 4]; W may be zeros
            norm = W.norm().item()
            sums = [round(x, 4) for x in sums.flatten().tolist()]
            result.append([round(norm, 4) if norm > 1 else float(f"{norm:.5g}"), *sums])
    return result


def same_model(ours: list[list[float]], theirs: list[list[float]]) -> bool:
    """Whether two fingerprints are of one model: norms within 5%, sums within 0.1 (rms).

    A 4-bit copy passes, and so may a fine-tune that left these weights nearly as they were.
    """
    if len(ours) != len(theirs):
        return False
    a, b = torch.tensor(ours), torch.tensor(theirs)  # [2 * layers, 17]
    # Of two projections of zeros the norms are equal, whatever 0 / 0 is.
    norms = (a[:, 0] / b[:, 0]).log().abs().masked_fill(a[:, 0] == b[:, 0], 0).max()
    return bool(norms < 0.05 and (a - b)[:, 1:].square().mean(1).sqrt().max() < 0.1)


def save_factors(
    path: str | Path, factors: Factors, model: Transformer, dtype: torch.dtype = torch.float16
) -> None:
    """Writes a safetensors file: A and B of every k_proj and v_proj, and as metadata what they are.

    The file is in float32 if `dtype` cannot hold some number. Raises `UserError` for numbers that
    are not finite, and if the file cannot be written.
    """
    shared = {(i, group.side) for group in factors.together for i in group.layers}
    exact = {}
    for i, layer in enumerate(factors.layers):
        for side, pair in vars(layer).items():
            prefix = f"model.layers.{i}.self_attn.{side}_proj"
            A = pair.A.detach().to("cpu", torch.float32)
            B = pair.B.detach().to("cpu", torch.float32)
            metric = None
            if (i, side) in shared:  # a sum is the latent, so its parts have one scale
                metric = metric_between(A, B, model.model.layers[i].self_attn, side, dtype)
            else:
                A, B = balanced(A, B)
            if metric is None:
                exact[f"{prefix}.A"] = A.contiguous()
                exact[f"{prefix}.B"] = B.contiguous()
                continue
            exact[f"{prefix}.metric"] = metric
            if pair.bits < 8:  # latents are rounded far more
                for name, tensor in in_8_bits(B).items():
                    exact[f"{prefix}.{name}"] = tensor
            else:
                exact[f"{prefix}.B"] = B.contiguous()
    tensors = {}
    for name, tensor in exact.items():
        if not tensor.isfinite().all():
            raise UserError(f"{name} has numbers that are not finite; make the factors again")
        rounded = name.endswith((".A", ".B")) and tensor.is_floating_point()
        tensors[name] = tensor.to(dtype) if rounded else tensor
    if not all(holds(tensors[name], tensor) for name, tensor in exact.items()):
        tensors = exact
    metadata = {
        **factors.info,
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": json.dumps(fingerprint(model)),
    }
    for side in ("k", "v"):
        pairs = [getattr(layer, side) for layer in factors.layers]
        bits = [pair.bits for pair in pairs]
        metadata[f"{side}_ranks"] = json.dumps([pair.rank for pair in pairs])
        metadata[f"{side}_bits"] = json.dumps(bits[0] if len(set(bits)) == 1 else bits)
    if any(pair.clamped for pair in factors.pairs):
        metadata["quantizer"] = CLAMPED
    groups = {pair.group for pair in factors.pairs}
    if len(groups) > 1:
        raise UserError(f"factors with groups of {groups} tokens in one file; give all the same")
    if groups != {None}:
        metadata["group"] = str(groups.pop())
    if factors.together:
        metadata["together"] = json.dumps([[*vars(some).values()] for some in factors.together])
    data = save(tensors, metadata)
    # safetensors orders metadata by chance; sorted, equal factors are equal files.
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":"))
    header = header.encode() + b" " * (-len(header.encode()) % 8)
    with replacing(path) as temporary:
        temporary.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])


def balanced(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Where the largest number of one is below 0.001, which may be too small for 16 bits, a power
    of two is moved from one to the other: A B stays, bit for bit."""
    a, b = A.abs().max().item(), B.abs().max().item()
    if 0 < min(a, b) < 1e-3 and math.isfinite(a + b):
        scale = 2.0 ** round(math.log2(b / a) / 2)
        A, B = A * scale, B / scale
    return A, B


@torch.no_grad()
def metric_between(
    A: Tensor, B: Tensor, attention: Attention, side: str, dtype: torch.dtype
) -> Tensor | None:
    """Where factors are the closed form of a metric M that the model's weights, or d_kv numbers,
    tell, A = W M B^T follows from B and need not be stored: a third of a file or less is left.

    M is a diagonal [d_kv] for keys, and for values `cskv.output_metric` times a number [1]. None if
    these are other factors, or if B in `dtype` would give another A.
    """
    projection = getattr(attention, f"{side}_proj")
    W = projection.weight.T.double().cpu()  # [hidden, d_kv]
    A, B = A.double(), B.double()
    if not (A.isfinite().all() and B.isfinite().all() and W.isfinite().all()):
        return None
    if side == "k":
        gram = (W.T @ W) * (B.T @ B)
        metric = torch.linalg.lstsq(gram, ((W.T @ A) * B.T).sum(1, keepdim=True)).solution[:, 0]
    else:
        plain = W @ output_metric(attention).cpu() @ B.T
        metric = (A * plain).sum(0, keepdim=True).sum(1) / plain.square().sum().clamp(min=1e-300)
    metric = metric.float()
    again = shrinking(B.to(dtype), attention, side, metric)
    same = (again - A).norm() <= 2e-3 * A.norm()
    return metric if same and metric.isfinite().all() else None


@torch.no_grad()
def shrinking(B: Tensor, attention: Attention, side: str, metric: Tensor) -> Tensor:
    """A = W M B^T, see `metric_between`: [hidden, r] in float64 on the CPU."""
    W = getattr(attention, f"{side}_proj").weight.T.double().cpu()
    metric = metric.double().cpu()
    M = metric.diag() if side == "k" else metric * output_metric(attention).cpu()
    return W @ (M @ B.double().cpu().T)


def in_8_bits(B: Tensor) -> dict[str, Tensor]:
    """B [r, d_kv] as int8 with a scale for each row and for each column: B, rows [r, 1] and columns
    [d_kv], whose product it is. Columns that matter are small, for their errors count much."""
    columns = B.square().mean(0).sqrt().clamp(min=1e-30)
    rows = (B / columns).abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return {"B": (B / columns / rows).round().to(torch.int8), "rows": rows, "columns": columns}


def holds(rounded: Tensor, exact: Tensor) -> bool:
    """Whether rounding to another type lost nothing but digits."""
    error = (rounded.float() - exact).abs().max()
    return bool(error <= 2**-7 * exact.abs().max())  # bfloat16 has 8 bits


def load_factors(path: str | Path, model: Transformer) -> Factors:
    """Reads a factors file for `model`, on the model's device and in its precision.

    Raises `UserError` if it is no factors file, is damaged, or belongs to another model.
    """
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; give a factors file, made by train.py")
    try:
        with safe_open(path, framework="pt") as file:
            info = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"no factors file {path}; make one with train.py") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); make it again") from None
    if info.get("format") != FORMAT:
        raise UserError(f"{path} is not a CSKV factors file; make one with train.py")
    if info.get("version") != VERSION:
        raise UserError(
            f"{path} has format version {info.get('version')}, this code reads {VERSION}; make it "
            "again with train.py"
        )
    count = len(model.model.layers)
    try:
        theirs = json.loads(info["fingerprint"])
        k_bits = for_each(info["k_bits"], count)
        v_bits = for_each(info["v_bits"], count)
        group = int(info["group"]) if "group" in info else None
        if group is not None and (group < 1 or group % quant.BLOCK):
            raise ValueError(f"group {group} is no multiple of {quant.BLOCK}")
        together = read_together(json.loads(info.get("together", "[]")), count)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged (metadata: {error}); make it again") from None

    # A wrong model gives fluent nonsense, not an error, unless it is refused here.
    if not same_model(fingerprint(model), theirs):
        raise UserError(f"{path} belongs to another model; make factors for this one with train.py")

    clamped = info.get("quantizer") == CLAMPED

    def read_pair(i: int, side: str, bits: int) -> LowRank:
        prefix = f"model.layers.{i}.self_attn.{side}_proj"
        B = tensors[f"{prefix}.B"]
        if B.dtype == torch.int8:
            rows, columns = tensors[f"{prefix}.rows"], tensors[f"{prefix}.columns"]
            if B.dim() != 2 or rows.shape != (len(B), 1) or columns.shape != B.shape[1:]:
                raise UserError(f"{path}: {prefix} has scales of another size; make it again")
            B = B * rows * columns
        metric = tensors.get(f"{prefix}.metric")
        if metric is None:
            A = tensors[f"{prefix}.A"]
        elif B.dim() != 2 or metric.numel() != (B.shape[1] if side == "k" else 1):
            raise UserError(f"{path}: {prefix} has a metric of another size; make it again")
        else:
            A = shrinking(B, model.model.layers[i].self_attn, side, metric).float()
        if A.shape != (model.config.hidden_size, len(B)) or B.shape[1] != model.config.d_kv:
            raise UserError(
                f"{path}: {prefix} has A {tuple(A.shape)} and B {tuple(B.shape)}, which do not fit "
                f"hidden size {model.config.hidden_size} and {model.config.d_kv} channels"
            )
        return LowRank(A, B, bits, clamped, group)

    layers = []
    try:
        for i in range(count):
            k = read_pair(i, "k", k_bits[i])
            v = read_pair(i, "v", v_bits[i])
            layers.append(LayerFactors(k, v))
    except KeyError as error:
        raise UserError(f"{path} lacks {error}; make it again with train.py") from None
    for some in together:
        kept = {(p.rank, p.bits) for p in (getattr(layers[i], some.side) for i in some.layers)}
        if len(kept) > 1 or group is None:
            raise UserError(f"{path} is damaged (layers together of ranks and bits {kept})")
    info = {name: value for name, value in info.items() if name not in ALWAYS + SOMETIMES}
    return Factors(layers, info, together).to(model.lm_head.weight)


def read_together(groups: list, layers: int) -> tuple[Together, ...]:
    """The groups of layers that a file names. Raises `ValueError` if they are none."""
    together = tuple(Together(*group) for group in groups)
    for some in together:
        if some.side not in ("k", "v") or not 0 <= some.first < some.first + some.count <= layers:
            raise ValueError(f"{some} is no group of {layers} layers")
    used = [(some.side, i) for some in together for i in some.layers]
    if len(used) > len(set(used)):
        raise ValueError("a layer is in two groups")
    return together


def for_each(text: str, count: int) -> list[int]:
    """The bits of each layer: a list, or one number for all. Raises `ValueError` for anything
    else."""
    value = json.loads(text)
    values = value if isinstance(value, list) else [value] * count
    if len(values) != count or not all(bits in (2, 3, 4, 8, 16, 32) for bits in values):
        raise ValueError(f"{value} is no number of bits for {count} layers")
    return values
