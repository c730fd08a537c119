"""Prefill equals the original model, bit for bit; decode equals independent computations."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import cskv
import quant
from cskv import bi_branch_cache, init_factors
from model import full_cache
from tests import helpers
from tests.drawn import kinds, prompts, quick, ranks, shapes, sinks, steps, widths, windows
from tests.helpers import decode_all, in_bits, make_factors, tiny_model, tiny_tokens

counts = st.integers(1, 24)
rooms = st.integers(0, 300)
long_prompts = st.integers(1, 90)  # of whole groups
long_steps = st.integers(1, 40)


@quick
@given(shapes, counts, windows, sinks, counts, st.integers(1, 3), rooms, kinds)
def test_prefill_is_bit_equal_to_the_model(shape, T, window, first, rank, batch, expected, kind):
    model = tiny_model(**shape)
    tokens = tiny_tokens(model, batch, T)
    factors = make_factors(model, min(rank, model.config.d_kv), 3)
    original = model(tokens)
    cache = bi_branch_cache(model, factors, window, expected, kind, first)
    assert torch.equal(model(tokens, cache), original)
    assert torch.equal(model(tokens, full_cache(model, expected)), original)


@quick
@given(shapes, prompts, steps, windows, sinks, ranks, kinds, st.sampled_from(["svd", "optimal"]))
def test_decode_equals_one_parallel_computation(
    shape, prompt, steps, window, first, rank, kind, init
):
    model = tiny_model(**shape)
    factors = make_factors(model, rank, rank + 1, init)
    tokens = tiny_tokens(model, 2, prompt + steps)
    cache = bi_branch_cache(model, factors.in_bits(32, 32), window, kind=kind, sinks=first)
    for layer in cache:
        layer.chunk = 3  # so that a few tokens make several chunks
    logits = decode_all(model, tokens, prompt, cache)
    for sequence, ours in zip(tokens, logits, strict=True):
        expected = helpers.naive_forward(model, sequence, factors, window, prompt, first)
        torch.testing.assert_close(ours.double(), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("init", ["svd", "optimal", "random"])
@quick
@given(shapes, prompts, steps, windows, sinks)
def test_full_rank_or_a_window_of_the_whole_length_equals_the_full_cache(
    init, shape, prompt, steps, window, first
):
    """Random factors are as wrong as can be, but in such a window never looked at."""
    model, length = tiny_model(**shape), prompt + steps
    rank = model.config.d_kv
    if init == "random":
        rank, window = 1, length + window - 1
    seen = cskv.calibrate(model, [tiny_tokens(model, 2, 40)])
    factors = init_factors(init, model, [rank] * 2, [rank] * 2, seen).in_bits(32, 32)
    tokens = tiny_tokens(model, 2, length)
    ours = decode_all(model, tokens, prompt, bi_branch_cache(model, factors, window, sinks=first))
    full = decode_all(model, tokens, prompt, full_cache(model))
    torch.testing.assert_close(ours, full, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("group", [None, 32, 64])
@quick
@given(shapes, long_prompts, long_steps, windows, sinks, widths, widths, st.booleans(), kinds)
def test_decode_in_bits_equals_decode_with_fake_quantized_latents(
    group, shape, prompt, steps, window, first, k_bits, v_bits, clamped, kind
):
    """One layer against plain attention over what fake-quantized latents are rebuilt to. The fast
    cache, with segments of one token, absorbs B_k and B_v."""
    model = tiny_model(num_hidden_layers=1, **shape)
    config, attention = model.config, model.model.layers[0].self_attn
    factors = in_bits(make_factors(model, 5, 4), k_bits, v_bits, group, clamped)
    T = prompt + steps
    x = torch.randn(2, T, config.hidden_size, generator=torch.Generator().manual_seed(prompt))

    def heads(y):
        return y.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)

    q, k, v = (heads(p(x)) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    cache = bi_branch_cache(model, factors, window, T, kind, first)[0]
    cache.chunk = 17
    *_, (_, out) = helpers.feed(cache, prompt, x, q, k, v, model.rope)
    S = min(first, T)
    old = max(S, T - min(window, config.sliding_window or window))  # S .. old - 1 through latents
    rebuilt = []
    for side, dim, exact in (("k", quant.TOKENS, k), ("v", quant.CHANNELS, v)):
        pair = getattr(factors.layers[0], side)
        packed = (old - S) // 32 * 32
        if group:  # whichever side it is; and also what the window still covers
            dim, packed = quant.TOKENS, (T - S) // group * group
        c = x[:, S:] @ pair.A
        c = c if pair.bits == 32 else c.half().float()
        if packed and pair.bits < 16:
            grouping = quant.Grouping(dim, group or 32, clamped)
            c[:, :packed] = quant.fake_quantize(c[:, :packed], pair.bits, grouping)
        hat = heads(F.linear(c, pair.B.T, getattr(attention, f"{side}_proj").bias))
        rebuilt.append(torch.cat([exact[:, :, :S], hat[:, :, : old - S], exact[:, :, old:]], 2))
    seen = max(0, T - (config.sliding_window or T))
    k_all, v_all = model.rope.rotate(rebuilt[0], 0)[:, :, seen:], rebuilt[1][:, :, seen:]
    q_last = model.rope.rotate(q[:, :, -1:], T - 1)
    expected = F.scaled_dot_product_attention(q_last, k_all, v_all, enable_gqa=True)[:, :, 0]
    # A latent that sits between two 16-bit numbers, or two levels, may round to either.
    torch.testing.assert_close(out, expected, atol=2e-3, rtol=2e-3)
