"""Factors in a file: safetensors, with metadata that says what they are and whose.

A and B of every k_proj and v_proj are tensors, named after the projection; where A follows
from B, the metric that tells it stands in its place. Metadata are the ranks, the bits and
their groups, which layers share latents, how and on what the factors were made, and a
fingerprint of the projections they belong to: on another model they give fluent nonsense.
"""

import json
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
CLAMPED = "clamped zero-point"  # a quantizer; see quant.py
# Metadata that follow from factors and model; the rest is `info`.
KNOWN = ("format", "version", "k_ranks", "v_ranks", "k_bits", "v_bits", "fingerprint")
KNOWN += ("quantizer", "group", "together")


@torch.no_grad()
def fingerprint(model: Transformer) -> list[list[float]]:
    """For every k_proj and v_proj: its norm, then 16 sums over its weights, in units of it.

    Not a hash, for a model may be loaded in other bits. Rounding to 16 bits moves the sums by
    0.001, 4-bit weights by 0.04; those of another model lie about 0.7 away.
    """
    result = []
    for layer in model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            W = projection.weight.float().cpu()  # [d_kv, hidden]
            n = torch.arange(1.0, 5.0)
            waves = [torch.outer(n, torch.arange(size)).cos() for size in W.shape]
            norm = W.norm().item()
            sums = waves[0] @ W @ waves[1].T / W.norm().clamp(min=1e-38)  # W may be zeros
            sums = [round(x, 4) for x in sums.flatten().tolist()]
            result.append([round(norm, 4) if norm > 1 else float(f"{norm:.5g}"), *sums])
    return result


def same_model(ours: list[list[float]], theirs: list[list[float]]) -> bool:
    """Whether two fingerprints are of one model: norms within 5%, sums within 0.1 (rms). A
    4-bit copy passes, and so may a fine-tune that left these weights nearly as they were."""
    if len(ours) != len(theirs):
        return False
    a = torch.tensor(ours)  # [2 * layers, 17]
    b = torch.tensor(theirs)
    norms = (a[:, 0] / b[:, 0]).log().abs()
    norms[a[:, 0] == b[:, 0]] = 0  # both may be zeros
    sums = (a - b)[:, 1:].square().mean(1)
    return bool(norms.max() < 0.05 and sums.max() < 0.1**2)


def name_of(i: int, side: str, name: str) -> str:
    return f"model.layers.{i}.self_attn.{side}_proj.{name}"


def save_factors(path: Path, factors: Factors, model: Transformer, dtype=torch.float16):
    """Writes a file, in float32 if `dtype` cannot hold some number. Raises `UserError` for
    numbers that are not finite, and if the file cannot be written."""
    exact: dict[str, Tensor] = {}
    shared = {(i, some.side) for some in factors.together for i in some.layers}
    for i, layer in enumerate(factors.layers):
        for side, pair in vars(layer).items():
            A = pair.A.detach().to("cpu", torch.float32)
            B = pair.B.detach().to("cpu", torch.float32)
            stored = {"A": A, "B": B}
            if (i, side) in shared:
                attention = model.model.layers[i].self_attn
                metric = metric_between(A, B, attention, side, dtype)
                if metric is not None:
                    stored = in_8_bits(B) if pair.bits < 8 else {"B": B}
                    stored["metric"] = metric
            for name, tensor in stored.items():
                exact[name_of(i, side, name)] = tensor.contiguous()
    rounded = {}
    for name, tensor in exact.items():
        if not tensor.isfinite().all():
            raise UserError(f"{name} has numbers that are not finite; make it again")
        rounded[name] = tensor
        if name.endswith((".A", ".B")) and tensor.is_floating_point():
            rounded[name] = tensor.to(dtype)
    lost = [name for name, tensor in exact.items() if not holds(rounded[name], tensor)]
    data = save(exact if lost else rounded, metadata_of(factors, model))
    # safetensors orders metadata by chance; sorted, equal factors are equal files.
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":"))
    header = header.encode() + b" " * (-len(header.encode()) % 8)
    with replacing(path) as temporary:
        temporary.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])


def metadata_of(factors: Factors, model: Transformer) -> dict[str, str]:
    metadata = factors.info | {"format": FORMAT, "version": VERSION}
    metadata["fingerprint"] = json.dumps(fingerprint(model))
    for side in "kv":
        pairs = [getattr(layer, side) for layer in factors.layers]
        bits = [pair.runs or pair.bits for pair in pairs]
        metadata[f"{side}_ranks"] = json.dumps([pair.rank for pair in pairs])
        alike = len(set(bits)) == 1 and not pairs[0].runs
        metadata[f"{side}_bits"] = json.dumps(bits[0] if alike else bits)
    if any(pair.clamped for pair in factors.pairs):
        metadata["quantizer"] = CLAMPED
    groups = {pair.group for pair in factors.pairs}
    if len(groups) > 1:
        raise UserError(f"groups of {groups} tokens in one file; give all the same")
    if groups != {None}:
        metadata["group"] = str(groups.pop())
    if factors.together:
        groups = [list(vars(some).values()) for some in factors.together]
        metadata["together"] = json.dumps(groups)
    return metadata


@torch.no_grad()
def metric_between(A: Tensor, B: Tensor, attention: Attention, side: str, dtype) -> Tensor | None:
    """Where factors are the closed form of a metric M that the model's weights, or d_kv
    numbers, tell, A = W M B^T follows from B: a third of a file or less is left.

    M is a diagonal [d_kv] for keys, `cskv.output_metric` times a number [1] for values. None
    if these are other factors, or if B in `dtype` would give another A.
    """
    W = getattr(attention, f"{side}_proj").weight.T.double().cpu()  # [hidden, d_kv]
    A, B = A.double(), B.double()
    if not all(M.isfinite().all() for M in (A, B, W)):
        return None
    if side == "k":
        gram = (W.T @ W) * (B.T @ B)
        right = ((W.T @ A) * B.T).sum(1, keepdim=True)
        metric = torch.linalg.lstsq(gram, right).solution[:, 0]
    else:
        plain = W @ output_metric(attention).cpu() @ B.T
        scale = plain.square().sum().clamp(min=1e-300)
        metric = (A * plain).sum(0, keepdim=True).sum(1) / scale
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
    """B [r, d_kv] as int8, times rows [r, 1] and columns [d_kv]. Columns that matter are
    small, for their errors count much."""
    columns = B.square().mean(0).sqrt().clamp(min=1e-30)
    rows = (B / columns).abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    codes = (B / columns / rows).round().to(torch.int8)
    return {"B": codes, "rows": rows, "columns": columns}


def holds(rounded: Tensor, exact: Tensor) -> bool:
    """Whether rounding to another type lost nothing but digits."""
    error = (rounded.float() - exact).abs().max()
    return bool(error <= 2**-7 * exact.abs().max())  # bfloat16 has 8 bits


def load_factors(path: str | Path, model: Transformer) -> Factors:
    """Factors for `model`, on its device and in its precision. Raises `UserError` if the file
    is none of factors, is damaged, or belongs to another model."""
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; give a factors file, made by train.py")
    try:
        with safe_open(path, framework="pt") as file:
            info = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if info.get("format") != FORMAT:
            raise UserError(f"{path} is not a CSKV factors file; make one with train.py")
        if info.get("version") != VERSION:
            other = f"format version {info.get('version')}, this code reads {VERSION}"
            raise UserError(f"{path} has {other}; make it again with train.py")
        # A wrong model gives fluent nonsense, not an error, unless it is refused here.
        if not same_model(fingerprint(model), json.loads(info["fingerprint"])):
            raise UserError(f"{path} belongs to another model; make it with train.py")
        return read_factors(info, tensors, model)
    except FileNotFoundError:
        raise UserError(f"no factors file {path}; make one with train.py") from None
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{path} lacks {error}; make it again with train.py") from None
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); make it again") from None


def read_factors(info: dict[str, str], tensors: dict[str, Tensor], model: Transformer) -> Factors:
    """Raises `KeyError` for what is missing, `ValueError` or `TypeError` for what is wrong."""
    count = len(model.model.layers)
    bits = {side: for_each(json.loads(info[f"{side}_bits"]), count) for side in "kv"}
    clamped = info.get("quantizer") == CLAMPED
    group = int(info["group"]) if "group" in info else None
    if group is not None and (group < 1 or group % quant.BLOCK):
        raise ValueError(f"group {group} is no multiple of {quant.BLOCK}")
    layers = []
    for i, layer in enumerate(model.model.layers):
        pairs = {}
        for side in "kv":
            A, B = read_pair(tensors, layer.self_attn, i, side)
            pairs[side] = LowRank(
                A, B, clamped=clamped, group=group, **bits_or_runs(bits[side][i], len(B))
            )
        layers.append(LayerFactors(**pairs))
    together = tuple([Together(*some) for some in json.loads(info.get("together", "[]"))])
    free = {(side, i) for side in "kv" for i in range(count)}
    for some in together:
        if not some.layers or not all((some.side, i) in free for i in some.layers):
            raise ValueError(f"{some} is no group of {count} layers, each in one")
        free -= {(some.side, i) for i in some.layers}
        pairs = [getattr(layers[i], some.side) for i in some.layers]
        kept = {(pair.rank, pair.bits, pair.runs) for pair in pairs}
        if len(kept) > 1 or group is None:
            raise ValueError(f"layers together of ranks and bits {kept}")
    for side, i in sorted(free):
        if getattr(layers[i], side).runs or name_of(i, side, "metric") in tensors:
            raise ValueError(f"{side}_proj of layer {i} is in no group, but shares latents")
    info = {name: value for name, value in info.items() if name not in KNOWN}
    return Factors(layers, info, together).to(model.lm_head.weight)


def read_pair(tensors: dict, attention: Attention, i: int, side: str) -> tuple[Tensor, Tensor]:
    """A and B. Raises `KeyError` for a missing tensor, `ValueError` for another size, and for
    numbers that are not finite."""
    B = tensors[name_of(i, side, "B")]
    hidden, d_kv = attention.config.hidden_size, attention.config.d_kv
    r = B.shape[0] if B.dim() else 0
    shapes = {"A": (hidden, r), "B": (r, d_kv), "rows": (r, 1), "columns": (d_kv,)}
    shapes["metric"] = (d_kv,) if side == "k" else (1,)
    for name, shape in shapes.items():
        found = tensors.get(name_of(i, side, name))
        if found is not None and found.shape != shape:
            raise ValueError(f"{name_of(i, side, name)} has the size {tuple(found.shape)}")
        if found is not None and not found.isfinite().all():
            raise ValueError(f"{name_of(i, side, name)} has numbers that are not finite")
    if B.dtype == torch.int8:
        rows = tensors[name_of(i, side, "rows")]
        B = B * rows * tensors[name_of(i, side, "columns")]
    metric = tensors.get(name_of(i, side, "metric"))
    if metric is None:
        return tensors[name_of(i, side, "A")], B
    return shrinking(B, attention, side, metric).float(), B


def for_each(bits: int | list, count: int) -> list[int | list]:
    """The bits of each layer, or its runs, from a list or one number."""
    each = bits if isinstance(bits, list) else [bits] * count
    if len(each) != count:
        raise ValueError(f"{bits} is no number of bits for {count} layers")
    return each


def bits_or_runs(given: int | list, rank: int) -> dict:
    """What of these a pair has."""
    runs = given if isinstance(given, list) else [[given, rank]]
    known = quant.BITS if runs is given else (*quant.BITS, 16, 32)
    for bits, channels in runs:
        if type(bits) is not int or type(channels) is not int or bits not in known or channels < 1:
            raise ValueError(f"{channels} channels of {bits} bits are none")
    if sum([channels for _, channels in runs]) != rank:
        raise ValueError(f"{given} is no number of bits of {rank} channels")
    widths = [bits for bits, _ in runs]
    return {"bits": min(widths), "runs": tuple(map(tuple, runs)) if runs is given else ()}
