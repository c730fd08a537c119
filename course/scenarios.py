"""What is done with a student's functions, each scenario in a few lines. See worker.py.

A scenario gets tensors and numbers, calls the functions, and returns tensors and numbers. It
compares nothing: the checks do, in another process. Modules are imported in the scenarios, so that
an error while one is loaded is the student's result, not the worker's end.
"""

from importlib import import_module

import torch
from torch import Tensor


def small_config(H: int, H_kv: int, D: int, hidden: int, **changes):
    from model import Config

    values = dict(vocab_size=8, hidden_size=hidden, intermediate_size=4, num_hidden_layers=1)
    values |= dict(num_attention_heads=H, num_key_value_heads=H_kv, head_dim=D, rms_norm_eps=1e-5)
    values |= dict(rope_theta=100.0, rope_scaling=None, max_position_embeddings=10**6)
    values |= dict(tie_word_embeddings=False, attention_bias=False, mlp_bias=False)
    return Config(**{**values, "sliding_window": None, "eos_token_ids": (), **changes})


# ------------------------------------------------------------------------------------- problem a


def cache_bytes(used: int, **buffers: Tensor) -> dict:
    """nbytes() of a cache whose tensors are the first `used` tokens of buffers [B, T, C]."""
    from model import LayerCache

    class Holder(LayerCache):
        def tensors(self) -> list[Tensor]:
            return [buffer[:, :used] for buffer in buffers.values()]

    return {"nbytes": Holder().nbytes()}


def element_bits(bits: int, size: int | None) -> dict:
    from quant import bits_per_element

    return {"bits": bits_per_element(bits) if size is None else bits_per_element(bits, size)}


def full_cache_bytes(layers: int, H_kv: int, D: int, tokens: int) -> dict:
    import infer
    from model import Transformer

    config = small_config(H_kv, H_kv, D, 4, num_hidden_layers=layers)
    return {"bytes": infer.full_bytes(Transformer(config), tokens)}


def paper_ratio(H_kv: int, D: int, ranks: list, bits: list) -> dict:
    """ranks and bits: of keys and of values of every layer."""
    import infer
    from cskv import Factors, LayerFactors, LowRank
    from model import Transformer

    config = small_config(H_kv, H_kv, D, 4, num_hidden_layers=len(ranks))
    layers = [
        LayerFactors(
            *(
                LowRank(torch.zeros(4, r), torch.zeros(r, H_kv * D), b)
                for r, b in zip(rs, bs, strict=True)
            )
        )
        for rs, bs in zip(ranks, bits, strict=True)
    ]
    return {"ratio": infer.nominal_ratio(Transformer(config), Factors(layers))}


# ------------------------------------------------------------------------------------- problem b


def svd(W: Tensor, rank: int) -> dict:
    from cskv import svd_factors

    pair = svd_factors(W, rank)
    return {"A": pair.A, "B": pair.B}


def asvd(W: Tensor, x_abs: Tensor, rank: int, alpha: float | None) -> dict:
    from cskv import asvd_factors

    more = {} if alpha is None else {"alpha": alpha}
    pair = asvd_factors(W, rank, x_abs, **more)
    return {"A": pair.A, "B": pair.B}


def optimal(W: Tensor, moment: Tensor, rank: int, metric: Tensor | None = None) -> dict:
    from cskv import optimal_factors

    pair = optimal_factors(W, rank, moment, metric)
    return {"A": pair.A, "B": pair.B}


# ------------------------------------------------------------------------------- problems c and f

PLAIN, FAST = "cskv.BiBranchCache", "beyond.segments.FastCache"


def make_cache(kind: str, sizes: list, hidden: int, window: int, sinks: int, factors: dict, **more):
    """A cache for one layer. sizes: H, H_kv, D, and the sliding window or None. factors: A_k, B_k,
    A_v, B_v, and k_bias and v_bias if the projections have biases."""
    import cskv
    from model import Attention

    H, H_kv, D, sliding = sizes
    bias = "k_bias" in factors
    config = small_config(H, H_kv, D, hidden, sliding_window=sliding, attention_bias=bias)
    attention = Attention(config).to(factors["B_k"].dtype).requires_grad_(False)
    if bias:
        attention.k_proj.bias.copy_(factors["k_bias"])
        attention.v_proj.bias.copy_(factors["v_bias"])
    pairs = (cskv.LowRank(factors[f"A_{n}"], factors[f"B_{n}"], bits=32) for n in "kv")
    layer = cskv.LayerFactors(*pairs)
    module, name = kind.rsplit(".", 1)
    kind = getattr(import_module(module), name)
    return kind(attention, layer, window, sinks=sinks, **more), config


def sequence(
    x: Tensor, q: Tensor, k: Tensor, v: Tensor, prompt: int, sizes: list, window: int, **more
) -> dict:
    """Prefill with the first `prompt` tokens, then decode the others, one by one.

    x [B, T, hidden], q [B, H, T, D], k and v [B, H_kv, T, D]. `more` are the factors, `sinks`, and
    `expected`, the length that the cache is told of.
    """
    from model import Rope

    sinks, expected = more.pop("sinks"), more.pop("expected")
    cache, config = make_cache(PLAIN, sizes, x.shape[2], window, sinks, more, expected=expected)
    rope = Rope(config)
    rope.reach(x.shape[1], x.device)
    first = x[:, :prompt], *(y[:, :, :prompt] for y in (q, k, v))
    result = {"prefill": cache.prefill(*first, rope), "length": cache.length}
    steps = []
    for t in range(prompt, x.shape[1]):
        steps.append(cache.decode(x[:, t : t + 1], *(y[:, :, t : t + 1] for y in (q, k, v)), rope))
    if steps:
        result["steps"] = torch.cat(steps, 2)
    return {**result, "final_length": cache.length}


def contents(cache) -> dict:
    """What a cache holds: latents, and how many tokens its ring has room for."""
    result = {"ring": cache.k.shape[2], "latents": cache.c_k.length}
    for name, latents in (("c_k", cache.c_k), ("c_v", cache.c_v)):
        if latents.length:
            result[name] = latents.read(0, latents.length)
    return result


def prefill_only(x: Tensor, q: Tensor, k: Tensor, v: Tensor, sizes: list, window: int, **more):
    """`sequence` without a decode step; then a second prefill, which must be refused."""
    from model import Rope

    sinks, expected = more.pop("sinks"), more.pop("expected")
    cache, config = make_cache(PLAIN, sizes, x.shape[2], window, sinks, more, expected=expected)
    rope = Rope(config)
    rope.reach(x.shape[1], x.device)
    out = cache.prefill(x, q, k, v, rope)
    length = cache.length
    refused = 0
    try:
        cache.prefill(x, q, k, v, rope)
    except ValueError:
        refused = 1
    return {"prefill": out, "length": length, "refused": refused}


def branches(
    x: Tensor, q: Tensor, k: Tensor, v: Tensor, prompt: int, sizes: list, window: int, **more
) -> dict:
    """What `decode` hands to `attend` at every step, q, k, v, `first` and `old`, and what the cache
    holds in the end. The student's `attend` is not called."""
    from model import Rope

    sinks, expected = more.pop("sinks"), more.pop("expected")
    cache, config = make_cache(PLAIN, sizes, x.shape[2], window, sinks, more, expected=expected)
    rope, seen = Rope(config), []
    rope.reach(x.shape[1], x.device)

    def attend(q, k, v, first, old, rope):
        seen.append((q.clone(), k.clone(), v.clone(), first, old))
        return torch.zeros_like(q)

    cache.attend = attend
    cache.prefill(x[:, :prompt], *(y[:, :, :prompt] for y in (q, k, v)), rope)
    result = {}
    for i, t in enumerate(range(prompt, x.shape[1])):
        cache.decode(x[:, t : t + 1], *(y[:, :, t : t + 1] for y in (q, k, v)), rope)
        result |= {f"{name}{i}": value for name, value in zip("qkvfo", seen[-1], strict=True)}
    return {**result, "calls": len(seen), "final_length": cache.length, **contents(cache)}


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c_k: Tensor,
    c_v: Tensor,
    kind: str,
    first: int,
    old: int,
    sizes: list,
    sinks: int,
    chunk: int | None = None,
    segments: list | None = None,
    **factors,
) -> dict:
    """`attend` alone, on a cache with these latents of the tokens from `sinks` on."""
    from model import Rope

    cache, config = make_cache(kind, sizes, factors["A_k"].shape[0], 1, sinks, factors)
    if segments:
        cache.chunk, cache.segments = chunk, tuple(map(tuple, segments))
    cache.c_k.append(c_k)
    cache.c_v.append(c_v)
    cache.length = sinks + c_k.shape[1]
    rope = Rope(config)
    rope.reach(cache.length, q.device)
    return {"out": cache.attend(q, k, v, first, old, rope)}


def segment_damping(w: Tensor, length: int) -> dict:
    from beyond.segments import damping

    return {"a": damping(w, length)}


def old_values(p: Tensor, c_v: Tensor, begin: int, sizes: list, chunk: int, **factors) -> dict:
    cache, _ = make_cache(FAST, sizes, factors["A_v"].shape[0], 1, 0, factors)
    cache.chunk = chunk
    cache.c_v.append(c_v)
    return {"out": cache.old_values(p, begin)}


def attend_long(
    q: Tensor, c_k: Tensor, c_v: Tensor, longest: int, sizes: list, segments: list, **factors
) -> dict:
    """`attend` to all of these latents and to one token of the other branch, of key 0 and value 1.
    q comes before RoPE."""
    from model import Rope

    _, H_kv, D, _ = sizes
    cache, config = make_cache(FAST, sizes, factors["A_k"].shape[0], 1, 0, factors)
    cache.segments = tuple(map(tuple, segments))
    rope = Rope(config)
    rope.reach(longest + 1, q.device)
    old = c_k.shape[1]
    cache.c_k.append(c_k)
    cache.c_v.append(c_v)
    cache.length = old + 1
    k, v = torch.zeros(1, H_kv, 1, D), torch.ones(1, H_kv, 1, D)
    return {"out": cache.attend(rope.rotate(q, old), k, v, 0, old, rope)}


# ------------------------------------------------------------------------------------- problem d


def limits(x: Tensor, bits: int, dim: int, clamped: bool) -> dict:
    from quant import group_limits

    scale, minimum = group_limits(x, bits, dim, clamped)
    return {"scale": scale, "minimum": minimum}


def codes(x: Tensor, bits: int, dim: int, clamped: bool) -> dict:
    from quant import quantize

    q = quantize(x, bits, dim, clamped)
    return {"codes": q.codes, "scale": q.scale, "minimum": q.minimum}


def levels(codes: Tensor, scale: Tensor, minimum: Tensor, dim: int) -> dict:
    from quant import Quantized, dequantize

    return {"x": dequantize(Quantized(codes, scale, minimum), dim)}


def rounded(x: Tensor, weight: Tensor, bits: int, dim: int, clamped: bool) -> dict:
    """fake_quantize(x), and the gradient of its sum with these weights."""
    from quant import fake_quantize

    x = x.requires_grad_()
    y = fake_quantize(x, bits, dim, clamped)
    (y * weight).sum().backward()
    return {"y": y, "gradient": x.grad}


def packed(codes: Tensor, bits: int) -> dict:
    from quant import pack

    return {"packed": pack(codes, bits)}


def unpacked(packed: Tensor, bits: int) -> dict:
    from quant import unpack

    return {"codes": unpack(packed, bits)}


# ------------------------------------------------------------------------------------- problem e


def loss(
    A: Tensor, B: Tensor, x: Tensor, k: Tensor, bits: int, clamped: bool, dim: int, double: bool
) -> dict:
    """layer_loss and its gradients."""
    from cskv import LowRank
    from train import layer_loss

    pair = LowRank(A.requires_grad_(), B.requires_grad_(), bits, clamped)
    more = [torch.float64] if double else []
    value = layer_loss(pair, x, k, dim, *more)
    value.backward()
    return {"loss": value, "A": A.grad, "B": B.grad}


def floor(moment: Tensor, rank: int) -> dict:
    from train import loss_floor

    return {"floor": loss_floor(moment, rank)}


def steps(A: Tensor, B: Tensor, gradients: Tensor, planned: int, lr: float) -> dict:
    """Steps of a `Tuner` with one layer, whose keys and values both have A [h, r] and B [r, d].

    gradients [steps, 2, h * r + r * d], of keys and of values at every step. Returns all parameters
    after every step, in the same order, the steps done, and the gradients that are left.
    """
    from cskv import Factors, LayerFactors, LowRank
    from train import Tuner

    tuner = Tuner(Factors([LayerFactors(LowRank(A, B), LowRank(A, B))]), planned, lr)
    after, left = [], []
    for step in gradients:
        for pair, flat in zip(tuner.factors.pairs, step, strict=True):
            for M, part in zip((pair.A, pair.B), flat.split([A.numel(), B.numel()]), strict=True):
                if M.grad is None:
                    M.grad = torch.zeros_like(M)
                M.grad += part.view_as(M)
        tuner.step()
        after.append(torch.stack([flatten(p.A, p.B) for p in tuner.factors.pairs]))
        zero = [torch.zeros_like(M) if M.grad is None else M.grad for M in tuner.parameters]
        left.append(flatten(*zero))
    return {"after": torch.stack(after), "left": torch.stack(left), "done": tuner.steps_done}


def flatten(*tensors: Tensor) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])
