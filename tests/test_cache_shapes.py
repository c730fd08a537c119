"""What the bi-branch cache holds: which token in which branch, and how many bytes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cskv
import quant
from beyond.segments import FastCache
from cskv import BiBranchCache, LayerFactors, LowRank, bi_branch_cache, init_factors
from infer import nominal_ratio
from model import Attention, Rope, full_cache
from tests import helpers
from tests.drawn import bits, groups, kinds, quick, shapes, sinks, windows
from tests.helpers import decode_all, in_bits, make_factors, tiny_config, tiny_model, tiny_tokens

channels = st.integers(1, 12)
both = st.sampled_from([BiBranchCache, FastCache])
BAD = [(0, 0, 16, 16), (-3, 0, 16, 16), (32, -1, 16, 16), (32, 0, 5, 16), (32, 0, 16, 1)]


@quick
@given(st.integers(1, 10), st.integers(1, 30), windows, sinks, kinds)
def test_each_token_is_attended_through_exactly_one_branch(prompt, steps, window, first, kind):
    """Token j's exact value is the unit vector e_j, its rebuilt one e_(N + j). All scores are 0, so
    the output shows the weight 1/n of each token in the channel of the branch it came through."""
    N = prompt + steps
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2 * N}
    config = tiny_config(hidden_size=N, **heads)
    into_old = torch.cat([torch.zeros(N, N), torch.eye(N)], dim=1)  # [N, 2 N]
    some = LowRank(torch.ones(N, 1), torch.zeros(1, 2 * N), bits=32)
    factors = LayerFactors(some, LowRank(torch.eye(N), into_old, bits=32))
    rope, cache = Rope(config), kind(Attention(config), factors, window, sinks=first)
    x = torch.eye(N)[None]  # [1, N, N]: token j is e_j
    zeros, v = torch.zeros(1, 1, N, 2 * N), torch.eye(N, 2 * N)[None, None]
    for t, out in helpers.feed(cache, prompt, x, zeros, zeros, v, rope):
        full = torch.arange(N) <= t
        old = (torch.arange(N) <= t - window) & (torch.arange(N) >= first)
        expected = torch.cat([full & ~old, old]).float() / (t + 1)
        torch.testing.assert_close(out[0, 0], expected)
        assert cache.c_k.length == cache.c_v.length == max(0, cache.length - first)
        exact = cache.tensors()[-1]  # values of the full-precision branch
        assert min(cache.length, first + window) <= exact.shape[2] <= first + window


@quick
@given(shapes, st.integers(1, 300), st.integers(0, 20), windows, sinks, both, st.data())
def test_bytes_are_those_of_the_tensors(shape, T, steps, window, first, kind, data):
    """The plain cache holds what it needs, the fast one has room for what is expected."""
    model = tiny_model(**shape)
    d_kv, layers = model.config.d_kv, len(model.model.layers)
    k_rank, v_rank = data.draw(st.integers(1, d_kv)), data.draw(st.integers(1, d_kv))
    expected = data.draw(st.integers(0, 400))
    factors = init_factors("random", model, [k_rank] * layers, [v_rank] * layers)
    cache = bi_branch_cache(model, factors.in_bits(16, 32), window, expected, kind, first)
    assert sum(layer.nbytes() for layer in cache) == 0
    decode_all(model, tiny_tokens(model, 2, T + steps), T, cache)
    length, room = T + steps, max(T, expected)
    if length > room:  # past it, in steps of 256 tokens
        room += 256
    if kind is BiBranchCache:
        room = length
    ring = first + min(window, shape["sliding_window"] or window)
    for layer in cache:
        ring_room = layer.tensors()[-1].shape[2]
        assert min(length, ring) <= ring_room <= min(room, ring)
        latents = max(0, room - first) * (2 * k_rank + 4 * v_rank)
        floats = 2 * 4 * d_kv * ring_room  # the ring: keys and values in float32
        assert layer.nbytes() == 2 * (latents + floats)  # batch of 2
        assert layer.nbytes() == sum(t.numel() * t.element_size() for t in layer.tensors())


def test_growing_copies_rarely():
    """Buffers grow by 256 tokens: 400 steps past the prompt move them twice, not 400 times."""
    model = tiny_model(num_hidden_layers=1)
    factors = init_factors("svd", model, [3], [2])
    for cache in (bi_branch_cache(model, factors, 1000, kind=FastCache), full_cache(model)):
        model(tiny_tokens(model, 1, 5), cache)
        places = set()
        for _ in range(400):
            model(torch.tensor([[1]]), cache)
            places.add(tuple(t.data_ptr() for t in cache[0].tensors()))
            assert all(t.shape[-2] <= cache[0].length + 255 for t in cache[0].tensors())
        assert len(places) <= 2


@quick
@given(st.integers(1, 200), st.integers(0, 40), windows, sinks, bits, bits, groups, st.data())
def test_bytes_in_bits_are_those_of_the_formula(T, steps, window, first, k_bits, v_bits, g, data):
    """Packed: bits, scale and minimum. Waiting: 16 bits. Sinks and ring: the model's 32 bits."""
    model = tiny_model(num_hidden_layers=1)
    d_kv, length = model.config.d_kv, T + steps
    r_k, r_v, kind = data.draw(channels), data.draw(channels), data.draw(kinds)
    factors = in_bits(init_factors("random", model, [r_k], [r_v]), k_bits, v_bits, g)
    cache = bi_branch_cache(model, factors, window, length, kind, first)
    decode_all(model, tiny_tokens(model, 2, length), T, cache)
    latents = max(0, length - first)
    packed = max(0, latents - window) // 32 * 32
    per_token = r_k * quant.bits_per_element(k_bits)
    per_token += r_v * quant.bits_per_element(v_bits, length=r_v)
    if g:  # packed as soon as they are whole
        packed, per_token = latents // g * g, r_k * (k_bits + 32 / g) + r_v * (v_bits + 32 / g)
    waiting = (latents - packed) * 16 * (r_k + r_v)
    ring = min(length, first + window) * 32 * 2 * d_kv
    assert 8 * cache[0].nbytes() == pytest.approx(2 * (packed * per_token + waiting + ring))
    nominal = 1 - (r_k * k_bits + r_v * v_bits) / (2 * 16 * d_kv)
    assert nominal_ratio(model, factors) == pytest.approx(nominal)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_latents_wait_in_the_type_of_their_bits(dtype):
    """16 bits are those of the factors, and float16 for factors in float32."""
    pair = make_factors(tiny_model(), 3, 3).to(torch.zeros(1, dtype=dtype)).pairs[0]
    half = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    for width, expected in ((32, torch.float32), (16, half), (4, half)):
        latents = cskv.empty_latents(replace(pair, bits=width), quant.TOKENS, window=4)
        latents.append(torch.randn(1, 3, 3))
        assert latents.waiting.dtype == expected


@pytest.mark.parametrize(("window", "sinks", "k_bits", "v_bits"), BAD)
def test_bad_cache_arguments(window, sinks, k_bits, v_bits):
    factors = make_factors(tiny_model(), 3, 3).in_bits(k_bits, v_bits)
    with pytest.raises(ValueError, match=r"is below 1|-bit latents; choose"):
        bi_branch_cache(tiny_model(), factors, window, sinks=sinks)
    with pytest.raises(ValueError, match="zip"):
        bi_branch_cache(tiny_model(num_hidden_layers=3), make_factors(tiny_model(), 3, 3))


@pytest.mark.parametrize("kind", [BiBranchCache, FastCache])
def test_defaults_are_the_paper_s_window_and_no_sinks(kind):
    model = tiny_model()
    factors = make_factors(model, 3, 3)
    alone = kind(model.model.layers[0].self_attn, factors.layers[0])
    for cache in (*bi_branch_cache(model, factors, kind=kind), alone):
        assert (cache.window, cache.sinks, cache.expected) == (32, 0, 0)


def test_nominal_ratio_counts_bits_and_ranks_of_every_layer():
    model = tiny_model()  # d_kv 12, 2 layers
    factors = init_factors("svd", model, [2, 4], [6, 12])
    assert nominal_ratio(model, factors) == pytest.approx(1 - (2 + 4 + 6 + 12) / 48)
    assert nominal_ratio(model, factors.in_bits(32, 16)) == pytest.approx(1 - (2 * 6 + 18) / 48)
