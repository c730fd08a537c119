"""Prefill equals the original model, bit for bit; decode equals independent computations."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cskv
import quant
from cskv import (
    BiBranchCache,
    LayerFactors,
    LowRank,
    bi_branch_cache,
    calibrate,
    init_factors,
)
from model import full_cache
from tests.helpers import (
    OneToken,
    bits,
    decode_all,
    dequantized,
    groups,
    kinds,
    lengths,
    make_factors,
    naive_forward,
    quick,
    shapes,
    sinks,
    tiny_model,
    tiny_tokens,
    windows,
)

torch.set_grad_enabled(False)


@quick
@given(
    shapes,
    lengths,
    windows,
    sinks,
    st.integers(1, 24),
    st.integers(1, 3),
    st.integers(0, 300),
    kinds,
)
def test_prefill_is_bit_equal_to_the_model(shape, T, window, first, rank, batch, expected, kind):
    model = tiny_model(**shape)
    tokens = tiny_tokens(model, batch, T)
    factors = make_factors(model, min(rank, model.config.d_kv), 3)
    original = model(tokens)
    cache = bi_branch_cache(model, factors, window, expected, kind, first)
    assert torch.equal(model(tokens, cache), original)
    assert torch.equal(model(tokens, full_cache(model, expected)), original)


@quick
@given(shapes, st.integers(1, 12), st.integers(1, 14), windows, sinks, st.integers(1, 5), kinds)
def test_decode_equals_one_parallel_computation(shape, prompt, steps, window, first, rank, kind):
    model = tiny_model(**shape)
    factors = make_factors(model, rank, rank + 1)
    tokens = tiny_tokens(model, 2, prompt + steps)
    cache = bi_branch_cache(model, factors.in_bits(32, 32), window, kind=kind, sinks=first)
    for layer in cache:
        layer.chunk = 3  # so that a few tokens make several chunks
    logits = decode_all(model, tokens, prompt, cache)
    for sequence, ours in zip(tokens, logits, strict=True):
        expected = naive_forward(model, sequence, factors, window, prompt, first)
        torch.testing.assert_close(ours.double(), expected, atol=2e-4, rtol=2e-4)


@quick
@given(
    shapes,
    st.integers(1, 90),
    st.integers(1, 40),
    windows,
    sinks,
    st.sampled_from([2, 4, 16, 32]),
    st.sampled_from([2, 3, 8, 16, 32]),
    groups,
)
def test_the_fast_cache_equals_the_plain_one(
    shape, prompt, steps, window, first, k_bits, v_bits, group
):
    """With segments of one token it absorbs B_k and B_v, and gets the numbers of Figure 1b."""
    model = tiny_model(**shape)
    factors, tokens = make_factors(model, 5, 4), tiny_tokens(model, 2, prompt + steps)
    factors = factors.in_bits(k_bits, v_bits).map(lambda pair: replace(pair, group=group))
    length = prompt + steps
    plain = bi_branch_cache(model, factors, window, length, BiBranchCache, first)
    fast = bi_branch_cache(model, factors, window, length, OneToken, first)
    for layer in fast:
        layer.chunk = 17
    outs = [decode_all(model, tokens, prompt, cache) for cache in (plain, fast)]
    torch.testing.assert_close(*outs, atol=2e-3, rtol=2e-3)
    assert [layer.nbytes() for layer in plain] == [layer.nbytes() for layer in fast]


@quick
@given(
    shapes,
    st.integers(1, 12),
    st.integers(1, 14),
    windows,
    sinks,
    st.sampled_from(["svd", "optimal"]),
)
def test_full_rank_equals_the_full_cache(shape, prompt, steps, window, first, init):
    model = tiny_model(**shape)
    d_kv = model.config.d_kv
    statistics = calibrate(model, [tiny_tokens(model, 2, 40)])
    factors = init_factors(init, model, [d_kv] * 2, [d_kv] * 2, statistics)
    tokens = tiny_tokens(model, 2, prompt + steps)
    cache = bi_branch_cache(model, factors.in_bits(32, 32), window, sinks=first)
    ours = decode_all(model, tokens, prompt, cache)
    full = decode_all(model, tokens, prompt, full_cache(model))
    torch.testing.assert_close(ours, full, atol=2e-4, rtol=2e-4)


@quick
@given(shapes, st.integers(1, 12), st.integers(1, 14), st.integers(0, 5))
def test_window_of_the_whole_length_equals_the_full_cache(shape, prompt, steps, more):
    model = tiny_model(**shape)
    tokens = tiny_tokens(model, 2, prompt + steps)
    factors = make_factors(model, 1, 1, "random")  # as wrong as can be, but never looked at
    cache = bi_branch_cache(model, factors, prompt + steps + more)
    ours = decode_all(model, tokens, prompt, cache)
    full = decode_all(model, tokens, prompt, full_cache(model))
    torch.testing.assert_close(ours, full, atol=1e-4, rtol=1e-4)


def test_sixteen_bit_latents_are_close():
    model = tiny_model()
    tokens, factors = tiny_tokens(model, 1, 30), make_factors(model, 8, 8)
    outs = [
        decode_all(model, tokens, 10, bi_branch_cache(model, factors.in_bits(bits, bits), 4))
        for bits in (16, 32)
    ]
    assert 0 < (outs[0] - outs[1]).abs().max() < 0.02 * outs[1].abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_sixteen_bit_model_decodes_closely(dtype, bias):
    """As on a GPU: latents, ring and factors in the model's own 16-bit type."""
    model = tiny_model(scale=0.1, attention_bias=bias)
    factors, tokens = init_factors("svd", model, [12, 12], [12, 12]), tiny_tokens(model, 2, 24)
    exact = decode_all(model, tokens, 8, full_cache(model))
    small = model.to(dtype)
    cache = bi_branch_cache(small, factors.to(small.lm_head.weight), 4)
    ours = decode_all(small, tokens, 8, cache)
    assert {t.dtype for t in cache[0].tensors()} == {dtype}
    assert (ours.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("group", [None, 32, 64])
@quick
@given(
    shapes,
    st.integers(1, 90),
    st.integers(1, 40),
    windows,
    sinks,
    bits,
    st.sampled_from([2, 4, 16]),
    st.booleans(),
)
def test_decode_in_bits_equals_decode_with_fake_quantized_latents(
    group, shape, prompt, steps, window, first, k_bits, v_bits, clamped
):
    """One layer against plain attention over what fake-quantized latents are rebuilt to."""
    model = tiny_model(num_hidden_layers=1, **shape)
    config, attention = model.config, model.model.layers[0].self_attn
    factors = make_factors(model, 5, 4)
    factors = factors.in_bits(k_bits, v_bits, clamped).map(lambda p: replace(p, group=group))
    pair, T = factors.layers[0], prompt + steps
    x = torch.randn(2, T, config.hidden_size, generator=torch.Generator().manual_seed(prompt))

    def heads(y):
        return y.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)

    q, k, v = (heads(p(x)) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    cache = bi_branch_cache(model, factors, window, sinks=first)[0]
    cache.chunk = 40  # not a multiple of 32
    cache.prefill(x[:, :prompt], *(y[:, :, :prompt] for y in (q, k, v)), model.rope)
    for t in range(prompt, T):
        now = slice(t, t + 1)
        out = cache.decode(x[:, now], *(y[:, :, now] for y in (q, k, v)), model.rope)

    ring = min(window, config.sliding_window or window)
    S = min(first, T)
    old = max(S, T - ring)  # S .. old - 1 come through latents
    rebuilt = []
    for p, b, dim, projection, exact in (
        (pair.k, k_bits, quant.TOKENS, attention.k_proj, k),
        (pair.v, v_bits, quant.CHANNELS, attention.v_proj, v),
    ):
        packed = (old - S) // 32 * 32
        if group:  # whichever side it is; and also what the window still covers
            dim, packed = quant.TOKENS, (T - S) // group * group
        hat = dequantized(x[:, S:] @ p.A, packed, b, dim, clamped, group or 32) @ p.B
        hat = heads(hat if projection.bias is None else hat + projection.bias)
        parts = exact[:, :, :S], hat[:, :, : old - S], exact[:, :, old:]
        rebuilt.append(torch.cat(parts, 2))
    seen = max(0, T - (config.sliding_window or T))
    k_all, v_all = model.rope.rotate(rebuilt[0], 0)[:, :, seen:], rebuilt[1][:, :, seen:]
    expected = torch.nn.functional.scaled_dot_product_attention(
        model.rope.rotate(q[:, :, -1:], T - 1), k_all, v_all, enable_gqa=True
    )
    # A latent that sits between two 16-bit numbers, or two levels, may round to either.
    torch.testing.assert_close(out, expected, atol=2e-3, rtol=2e-3)


@quick
@given(st.integers(1, 12), windows, st.integers(0, 1000))
def test_only_the_product_counts(rank, window, seed):
    """A M and M^-1 B give the same cache as A and B."""
    model = tiny_model()
    factors = make_factors(model, rank, rank)
    g = torch.Generator().manual_seed(seed)

    def mix(pair):
        r = pair.rank
        M = torch.eye(r) + 0.3 * torch.randn(r, r, generator=g) / math.sqrt(r)
        return LowRank(pair.A @ M, torch.linalg.solve(M, pair.B))

    mixed = cskv.Factors([LayerFactors(mix(f.k), mix(f.v)) for f in factors.layers])
    tokens = tiny_tokens(model, 1, 20)
    outs = [
        decode_all(model, tokens, 8, bi_branch_cache(model, f.in_bits(32, 32), window))
        for f in (factors, mixed)
    ]
    torch.testing.assert_close(*outs, atol=2e-3, rtol=2e-3)


@quick
@given(st.integers(1, 30), st.integers(0, 200), st.integers(1, 11))
def test_reconstruction_loss_is_the_same_after_rope(T, start, rank):
    model = tiny_model()
    k, k_hat = torch.randn(2, 2, T, 6, generator=torch.Generator().manual_seed(rank)).unbind(0)
    before = (k - k_hat).square().sum()
    after = (model.rope.rotate(k, start) - model.rope.rotate(k_hat, start)).square().sum()
    torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-5)
