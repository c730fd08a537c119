"""What is done with a student's functions, each scenario in a few lines. See worker.py.

A scenario gets tensors and numbers, calls the functions, and returns tensors and numbers. It
compares nothing: the checks do, in another process.
"""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

import cskv
import infer
import model
import quant
from beyond.segments import FastCache
from support.factors_file import load_factors
from support.huggingface.checkpoint import load_model, read_config
from train import Tuner, layer_loss, train_layers

TEACHER = Path(__file__).resolve().parents[1] / "weights" / "teacher"  # the embedded model


def small_config(H: int, H_kv: int, D: int, **changes) -> model.Config:
    """The embedded model's, with these heads and other changes."""
    config = replace(read_config(TEACHER), num_attention_heads=H, num_key_value_heads=H_kv)
    return replace(config, head_dim=D, rope_theta=100.0, **changes)


# ------------------------------------------------------------------------- the teaching model


def teacher(dtype: str) -> tuple[model.Transformer, cskv.Factors]:
    """The embedded model and its committed factors, as infer.py loads them."""
    network = load_model(TEACHER, "cpu", getattr(torch, dtype))
    return network, load_factors(TEACHER / "cskv-50.safetensors", network)


def tell(dtype="bfloat16", bits=16, fast=False, init="", rank=0, steps=0, **prompts) -> dict:
    """What infer.py generates after each prompt [1, T], 8 tokens. With `init` factors are new ones,
    and with `steps` trained, both on the first prompt. Losses are returned too."""
    network, factors = teacher(dtype)
    texts = [prompts["prompt0"]]
    if init:
        ranks = [rank] * len(factors.layers)
        statistics = cskv.calibrate(network, texts)
        factors = cskv.init_factors(init, network, ranks, ranks, statistics)
    factors = factors.to(network.lm_head.weight).in_bits(bits, bits)
    result = {}
    if steps:
        tuner = Tuner(factors, steps, 1e-3)
        losses = [loss.sum() for _, loss, _ in train_layers(network, [tuner], texts)]
        result["losses"] = torch.stack(losses)
        factors = tuner.factors
    kind = FastCache if fast else cskv.BiBranchCache
    for name, prompt in prompts.items():
        cache = cskv.bi_branch_cache(network, factors, kind=kind)
        sample = infer.make_sampler(0.0, 1.0, 0)
        tokens = list(infer.generate(network, prompt[0].tolist(), cache, 8, sample))
        end = network.config.eos_token_ids[0]
        result[name] = torch.tensor(tokens + [end] * (8 - len(tokens)))
    return result


def teacher_bytes(prompt: Tensor, room: int) -> dict:
    """What infer.py reports of the full cache, and of factors in 4 bits."""
    network, factors = teacher("bfloat16")
    cache = model.full_cache(network, room)
    network(prompt, cache)
    held = infer.held_bytes(cache)
    ratio = infer.nominal_ratio(network, factors.in_bits(4, 4))
    return {"held": held, "full": infer.full_bytes(network, room), "ratio": ratio}


# ------------------------------------------------------------------------------------- problem a


def cache_bytes(used: int, **buffers: Tensor) -> dict:
    """nbytes() of a cache whose tensors are the first `used` tokens of buffers [B, T, C]."""

    class Holder(model.LayerCache):
        def tensors(self) -> list[Tensor]:
            return [buffer[:, :used] for buffer in buffers.values()]

    return {"nbytes": Holder().nbytes()}


def full_cache_bytes(layers: int, H_kv: int, D: int, tokens: int) -> dict:
    config = small_config(H_kv, H_kv, D, num_hidden_layers=layers)
    return {"bytes": infer.full_bytes(model.Transformer(config), tokens)}


def paper_ratio(H_kv: int, D: int, layers: list) -> dict:
    """layers: [rank, bits] of keys, and of values, for every layer."""

    def pair(rank: int, bits: int) -> cskv.LowRank:
        return cskv.LowRank(torch.zeros(4, rank), torch.zeros(rank, H_kv * D), bits)

    config = small_config(H_kv, H_kv, D, num_hidden_layers=len(layers))
    factors = cskv.Factors([cskv.LayerFactors(pair(*k), pair(*v)) for k, v in layers])
    return {"ratio": infer.nominal_ratio(model.Transformer(config), factors)}


# ------------------------------------------------------------------------------- problems c and f


def make_cache(kind: type, sizes: list, window: int, sinks: int, factors: dict) -> tuple:
    """A cache for one layer, and RoPE. sizes: H, H_kv, D, and the sliding window or None. factors:
    A_k, B_k, A_v, B_v, and k_bias and v_bias if the projections have biases."""
    H, H_kv, D, sliding = sizes
    bias = "k_bias" in factors
    config = small_config(H, H_kv, D, sliding_window=sliding, attention_bias=bias)
    config = replace(config, hidden_size=len(factors["A_v"]))
    attention = model.Attention(config).to(factors["B_v"].dtype).requires_grad_(False)
    if bias:
        attention.k_proj.bias.copy_(factors["k_bias"])
        attention.v_proj.bias.copy_(factors["v_bias"])
    k = cskv.LowRank(factors["A_k"], factors["B_k"], bits=32)
    v = cskv.LowRank(factors["A_v"], factors["B_v"], bits=32)
    cache = kind(attention, cskv.LayerFactors(k, v), window, sinks=sinks)
    return cache, model.Rope(config)


def sequence(prompt: int, sizes: list, window: int, sinks: int, **tensors) -> dict:
    """Prefill with the first `prompt` tokens, then decode, token by token: what every step returns,
    what both branches hold after it, and which tokens `branches` says are seen through them. In the
    end also the length, and for how many tokens the memory behind k has room. With nothing to
    decode a second prefill, which must be refused. tensors: x, q, k, v of all tokens, and the
    factors."""
    x, q, k, v = (tensors.pop(name) for name in "xqkv")
    cache, rope = make_cache(cskv.BiBranchCache, sizes, window, sinks, tensors)
    first = x[:, :prompt], q[:, :, :prompt], k[:, :, :prompt], v[:, :, :prompt]
    before = [tensor.clone() for tensor in first]
    result = {"prefill": cache.prefill(*first, rope), "length": cache.length}
    if x.shape[1] == prompt:
        if not all(map(torch.equal, first, before)):
            raise ValueError("`remember` has changed x, q, k or v")
        with suppress(ValueError):
            cache.prefill(*first, rope)
            raise RuntimeError("a second prefill on the same cache was not refused")
        return result
    parts = (x.split(1, 1), q.split(1, 2), k.split(1, 2), v.split(1, 2))
    for i, new in enumerate(list(zip(*parts, strict=True))[prompt:]):
        result[f"out{i}"] = cache.decode(*new, rope)
        result |= {f"k{i}": cache.k.clone(), f"v{i}": cache.v.clone()}
        result[f"branches{i}"] = torch.tensor(cache.branches())
    result["room"] = cache.k.untyped_storage().nbytes() // cache.k[:, :, :1].nbytes
    result["final_length"] = cache.length
    result["c_k"] = cache.c_k.read(0, cache.c_k.length)
    result["c_v"] = cache.c_v.read(0, cache.c_v.length)
    return result


def attend(
    first: int, old: int, sizes: list, sinks: int, segments: list, chunk: int, **tensors
) -> dict:
    """`attend` alone, of a fast cache with latents c_k and c_v of the tokens from `sinks` on. q,
    before RoPE, is that of the last token; k and v are those of the full branch."""
    length = sinks + tensors["c_k"].shape[1]
    cache, rope = make_cache(FastCache, sizes, 1, sinks, tensors)
    cache.segments = tuple(map(tuple, segments))
    cache.chunk = chunk
    cache.c_k.append(tensors["c_k"])
    cache.c_v.append(tensors["c_v"])
    cache.length = length
    q = rope.rotate(tensors["q"], length - 1)
    return {"out": cache.attend(q, tensors["k"], tensors["v"], first, old, rope)}


def old_values(p: Tensor, c_v: Tensor, begin: int, sizes: list, chunk: int, **factors) -> dict:
    cache, _ = make_cache(FastCache, sizes, 1, 0, factors)
    cache.chunk = chunk
    cache.c_v.append(c_v)
    return {"out": cache.old_values(p, begin)}


# ------------------------------------------------------------------------------------- problem d


def limits(x: Tensor, bits: int, groups: list) -> dict:
    scale, minimum = quant.group_limits(x, bits, quant.Grouping(*groups))
    return {"scale": scale, "minimum": minimum}


def codes(x: Tensor, bits: int, groups: list) -> dict:
    before = x.clone()
    q = quant.quantize(x, bits, quant.Grouping(*groups))
    if not torch.equal(x, before):
        raise ValueError("quantize has changed x")
    return {"codes": q.codes, "scale": q.scale, "minimum": q.minimum}


def levels(codes: Tensor, scale: Tensor, minimum: Tensor, groups: list) -> dict:
    """Returned, and what is then in a part of a larger tensor that was given as `out`."""
    q = quant.Quantized(codes, scale, minimum)
    grouping = quant.Grouping(*groups)
    x = quant.dequantize(q, grouping)
    larger = torch.zeros(2 * len(codes), *codes.shape[1:])
    quant.dequantize(q, grouping, larger[: len(codes)])
    return {"x": x, "out": larger[: len(codes)]}


def rounded(x: Tensor, weight: Tensor, bits: int, groups: list) -> dict:
    """fake_quantize(x), and the gradient of its sum with these weights."""
    x = x.requires_grad_()
    y = quant.fake_quantize(x, bits, quant.Grouping(*groups))
    (y * weight).sum().backward()
    return {"y": y, "gradient": x.grad}


# ------------------------------------------------------------------------------------- problem e


def loss(A: Tensor, B: Tensor, x: Tensor, k: Tensor, dim=-2, dtype="float32", **pair) -> dict:
    """layer_loss and its gradients."""
    pair = cskv.LowRank(A.requires_grad_(), B.requires_grad_(), **pair)
    value = layer_loss(pair, x, k, dim, getattr(torch, dtype))
    value.backward()
    return {"loss": value, "A": A.grad, "B": B.grad}


def steps(A: Tensor, B: Tensor, gradients: Tensor, planned: int, lr: float) -> dict:
    """Steps of a `Tuner` with one layer, whose keys and values both have A [h, r] and B [r, d].
    gradients [steps, 2 (h r + r d)], of keys and of values; those of another process are all 1."""
    layer = cskv.LayerFactors(cskv.LowRank(A, B), cskv.LowRank(A, B))
    tuner = Tuner(cskv.Factors([layer]), planned, lr)
    sizes = [M.numel() for M in tuner.parameters]
    other = SimpleNamespace(all_reduce=lambda tensor: tensor.add_(1))
    after = []
    left = []
    for gradient in gradients:
        for M, part in zip(tuner.parameters, gradient.split(sizes), strict=True):
            M.grad += part.view_as(M)
        with mock.patch.multiple("support.processes", place=lambda: (0, 2), dist=other):
            tuner.step()
        if any(M.grad is None for M in tuner.parameters):
            raise ValueError("a gradient is None after the step; set it to zeros")
        after.append(parameters_to_vector(tuner.parameters))
        left.append(parameters_to_vector([M.grad for M in tuner.parameters]))
    return {"after": torch.stack(after), "left": torch.stack(left), "done": tuner.steps_done}
