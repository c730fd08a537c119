"""What the bi-branch cache holds: which token in which branch, and how many bytes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import quant
from beyond.segments import FastCache
from cskv import (
    BiBranchCache,
    LayerFactors,
    LowRank,
    bi_branch_cache,
    init_factors,
)
from experiments.baselines import KiviCache
from infer import nominal_ratio
from model import Attention, FullCache, Rope, full_cache
from tests.helpers import (
    bits,
    decode_all,
    dequantized,
    groups,
    kinds,
    make_factors,
    quick,
    shapes,
    sinks,
    tiny_config,
    tiny_model,
    tiny_tokens,
    windows,
)

torch.set_grad_enabled(False)


@quick
@given(st.integers(1, 10), st.integers(1, 30), windows, sinks, kinds)
def test_each_token_is_attended_through_exactly_one_branch(prompt, steps, window, first, kind):
    """Token j's exact value is the unit vector e_j, its rebuilt one e_(N + j). All scores are 0, so
    the output shows the weight 1/n of each token in the channel of the branch it came through."""
    N = prompt + steps
    config = tiny_config(
        hidden_size=N, num_attention_heads=1, num_key_value_heads=1, head_dim=2 * N
    )
    attention, rope = Attention(config), Rope(config)
    into_old = torch.cat([torch.zeros(N, N), torch.eye(N)], dim=1)  # [N, 2 N]
    some = LowRank(torch.ones(N, 1), torch.zeros(1, 2 * N), bits=32)
    factors = LayerFactors(some, LowRank(torch.eye(N), into_old, bits=32))
    cache = kind(attention, factors, window, sinks=first)
    x = torch.eye(N)[None]  # [1, N, N]: token j is e_j
    zeros, v = torch.zeros(1, 1, N, 2 * N), torch.zeros(1, 1, N, 2 * N)
    v[0, 0, :, :N] = torch.eye(N)
    cache.prefill(x[:, :prompt], *(y[:, :, :prompt] for y in (zeros, zeros, v)), rope)
    for t in range(prompt, N):
        now = slice(t, t + 1)
        out = cache.decode(x[:, now], *(y[:, :, now] for y in (zeros, zeros, v)), rope)[0, 0, 0]
        full = torch.arange(N) <= t
        old = (torch.arange(N) <= t - window) & (torch.arange(N) >= first)
        expected = torch.cat([full & ~old, old]).float() / (t + 1)
        torch.testing.assert_close(out, expected)
        assert cache.length == t + 1
        assert cache.c_k.length == cache.c_v.length == max(0, cache.length - first)
        assert min(cache.length, first + window) <= cache.k.shape[2] <= first + window


@quick
@given(
    shapes,
    st.integers(1, 300),
    st.integers(0, 20),
    windows,
    sinks,
    st.integers(0, 400),
    st.sampled_from([BiBranchCache, FastCache]),
    st.data(),
)
def test_bytes_are_those_of_the_tensors(shape, T, steps, window, first, expected, kind, data):
    """The plain cache holds what it needs, the fast one has room for what is expected."""
    model = tiny_model(**shape)
    d_kv, layers = model.config.d_kv, len(model.model.layers)
    k_rank, v_rank = data.draw(st.integers(1, d_kv)), data.draw(st.integers(1, d_kv))
    factors = init_factors("random", model, [k_rank] * layers, [v_rank] * layers)
    cache = bi_branch_cache(model, factors.in_bits(16, 32), window, expected, kind, first)
    assert sum(layer.nbytes() for layer in cache) == 0
    tokens = tiny_tokens(model, 2, T + steps)
    model(tokens[:, :T], cache, logits_to_keep=1)

    def check(length: int, room: int) -> None:
        ring = first + min(window, shape["sliding_window"] or window)
        for layer in cache:
            assert layer.nbytes() == sum(t.numel() * t.element_size() for t in layer.tensors())
            weights = {"A_k", "A_v", "B_k", "B_v", "k_bias", "v_bias"}  # and nothing else is kept
            parts = [*vars(layer).items(), *vars(layer.c_k).items(), *vars(layer.c_v).items()]
            kept = [t for name, t in parts if name not in weights and torch.is_tensor(t)]
            assert {id(t) for t in kept} == {id(t) for t in layer.tensors()}
            ring_room = layer.k.shape[2]
            assert min(length, ring) <= ring_room <= min(room, ring)
            floats = 2 * 4 * d_kv * ring_room  # the ring: keys and values in float32
            latents = max(0, room - first)
            assert layer.nbytes() == 2 * (
                latents * (2 * k_rank + 4 * v_rank) + floats
            )  # batch of 2

    plain = kind is BiBranchCache
    check(T, T if plain else max(T, expected))
    for i in range(T, T + steps):
        model(tokens[:, i : i + 1], cache)
    room = max(T, expected)  # past it, in steps of 256 tokens
    if T + steps > room:
        room += 256
    check(T + steps, T + steps if plain else room)


def test_growing_copies_rarely():
    """Buffers grow by 256 tokens: 600 steps past the prompt move them three times, not 600."""
    model = tiny_model(num_hidden_layers=1)
    factors = init_factors("svd", model, [3], [2])
    fast = bi_branch_cache(model, factors, 1000, kind=FastCache)
    for cache in (fast, full_cache(model)):
        model(tiny_tokens(model, 1, 5), cache)
        places = set()
        for _ in range(590):
            model(torch.tensor([[1]]), cache)
            places.add(tuple(t.data_ptr() for t in cache[0].tensors()))
            assert all(t.shape[-2] <= cache[0].length + 255 for t in cache[0].tensors())
        assert len(places) <= 3


@quick
@given(st.integers(1, 150), st.integers(0, 70), windows, st.integers(1, 40), bits, st.data())
def test_packed_latents_are_whole_groups_older_than_the_window(T, steps, window, rank, b, data):
    """Wherever it is read, a token's latent is what fake quantization makes of it once its group
    has left the window, and what 16 bits make of it before."""
    generator = torch.Generator().manual_seed(T)
    c = torch.randn(2, T + steps, rank, generator=generator) + 2
    dim = data.draw(st.sampled_from([quant.TOKENS, quant.CHANNELS]))
    group = data.draw(st.sampled_from([32, 64]))
    latents = quant.Packed(b, quant.Grouping(dim, group), window, dtype=torch.float16)
    latents.append(c[:, :T])
    for t in range(T, T + steps):
        latents.append(c[:, t : t + 1])
    old = max(0, T + steps - window)
    expected = dequantized(c, old // group * group, b, dim, group=group)
    assert latents.length == T + steps and latents.packed == old // group * group
    start = data.draw(st.integers(0, T + steps - 1))
    stop = data.draw(st.integers(start + 1, T + steps))
    assert torch.equal(latents.read(start, stop).float(), expected[:, start:stop])
    assert latents.waiting.untyped_storage().nbytes() == latents.waiting.numel() * 2


@quick
@given(
    st.integers(1, 200), st.integers(0, 40), windows, sinks, bits, bits, groups, kinds, st.data()
)
def test_bytes_in_bits_are_those_of_the_formula(
    T, steps, window, first, k_bits, v_bits, g, kind, data
):
    """Packed: bits, scale and minimum. Waiting: 16 bits. Sinks and ring: the model's 32 bits."""
    model = tiny_model(num_hidden_layers=1)
    d_kv = model.config.d_kv
    r_k, r_v = data.draw(st.integers(1, d_kv)), data.draw(st.integers(1, d_kv))
    factors = init_factors("random", model, [r_k], [r_v])
    factors = factors.in_bits(k_bits, v_bits).map(lambda pair: replace(pair, group=g))
    cache = bi_branch_cache(model, factors, window, T + steps, kind, first)
    tokens = tiny_tokens(model, 2, T + steps)
    decode_all(model, tokens, T, cache)
    latents = max(0, T + steps - first)
    packed = max(0, latents - window) // 32 * 32
    per_token = r_k * quant.bits_per_element(k_bits) + r_v * quant.bits_per_element(
        v_bits, length=r_v
    )
    if g:  # packed as soon as they are whole
        packed, per_token = latents // g * g, r_k * (k_bits + 32 / g) + r_v * (v_bits + 32 / g)
    waiting = (latents - packed) * 16 * (r_k + r_v)
    ring = min(T + steps, first + window) * 32 * 2 * d_kv
    assert 8 * cache[0].nbytes() == pytest.approx(2 * (packed * per_token + waiting + ring))
    nominal = 1 - (r_k * k_bits + r_v * v_bits) / (2 * 16 * d_kv)
    assert nominal_ratio(model, factors) == pytest.approx(nominal)


def test_prefill_twice_and_decode_first_are_errors():
    model = tiny_model()
    factors, tokens = make_factors(model, 3, 3), tiny_tokens(model, 1, 5)
    for cache in (bi_branch_cache(model, factors), full_cache(model)):
        model(tokens, cache)
        with pytest.raises(ValueError, match="prefill on a cache that holds 5 tokens"):
            model(tokens, cache)
    for layer in (bi_branch_cache(model, factors)[0], FullCache(model.config)):
        one = torch.zeros(1, 2, 1, 6)
        with pytest.raises(ValueError, match="decode on an empty cache"):
            layer.decode(torch.zeros(1, 1, 24), torch.zeros(1, 4, 1, 6), one, one, model.rope)
        two = torch.zeros(1, 2, 2, 6)
        layer.length = 1
        with pytest.raises(ValueError, match="one token a step, got 2"):
            layer.decode(torch.zeros(1, 2, 24), torch.zeros(1, 4, 2, 6), two, two, model.rope)


@pytest.mark.parametrize(
    "arguments", [{"window": 0}, {"window": -3}, {"sinks": -1}, {"k_bits": 5}, {"v_bits": 1}]
)
def test_bad_cache_arguments(arguments):
    model = tiny_model()
    bits = {name: value for name, value in arguments.items() if "bits" in name}
    sizes = {name: value for name, value in arguments.items() if "bits" not in name}
    with pytest.raises(ValueError, match=r"is below 1|-bit latents; choose"):
        bi_branch_cache(model, make_factors(model, 3, 3).in_bits(**bits), **sizes)


def test_defaults_are_the_paper_s_window_and_no_sinks():
    model = tiny_model()
    for kind in (BiBranchCache, FastCache):
        (one, _) = bi_branch_cache(model, make_factors(model, 3, 3), kind=kind)
        assert (one.window, one.sinks, one.expected) == (32, 0, 0)
        alone = kind(model.model.layers[0].self_attn, make_factors(model, 3, 3).layers[0])
        assert (alone.window, alone.sinks, alone.expected) == (32, 0, 0)


def test_factors_of_another_number_of_layers_are_an_error():
    model = tiny_model()
    for layers in (1, 3):
        factors = make_factors(tiny_model(num_hidden_layers=layers), 3, 3)
        with pytest.raises(ValueError, match="zip"):
            bi_branch_cache(model, factors)


@pytest.mark.parametrize(("D", "chunk"), [(64, 4096), (96, 2730), (256, 1024), (300, 1024)])
def test_a_chunk_of_kivi_s_keys_takes_two_megabytes(D, chunk):
    """On a CPU, and has at least 1,024 tokens."""
    config = tiny_config(num_key_value_heads=2, num_attention_heads=2, head_dim=D)
    kivi, x = KiviCache(config), torch.zeros(1, 2, 1, D)
    rope = Rope(config)
    kivi.remember(x, x, x, x, rope)
    assert kivi.chunk == chunk


def test_nominal_ratio_counts_bits_and_ranks_of_every_layer():
    model = tiny_model()  # d_kv 12, 2 layers
    factors = init_factors("svd", model, [2, 4], [6, 12])
    assert nominal_ratio(model, factors) == pytest.approx(1 - (2 + 4 + 6 + 12) / 48)
    assert nominal_ratio(model, factors.in_bits(32, 16)) == pytest.approx(1 - (2 * 6 + 18) / 48)
