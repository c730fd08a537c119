"""The method: factors, their initializations, and the bi-branch cache."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import cskv
import quant
from cskv import (
    BiBranchCache,
    ChunkedBiBranchCache,
    Factors,
    LayerFactors,
    LowRank,
    bi_branch_cache,
)
from infer import nominal_ratio
from model import Attention, FullCache, Rope, full_cache
from support.calibration import Statistics, calibrate, init_factors, rank_for
from support.command import UserError
from support.factors_file import load_factors, save_factors
from tests.tiny import naive_forward, tiny_config, tiny_model, tiny_tokens

torch.set_grad_enabled(False)
quick = settings(max_examples=25, deadline=None, derandomize=True)

shapes = st.fixed_dictionaries(
    {
        "num_attention_heads": st.sampled_from([4]),
        "num_key_value_heads": st.sampled_from([1, 2, 4]),
        "attention_bias": st.booleans(),
        "sliding_window": st.sampled_from([None, None, 3, 9]),
    }
)
lengths = st.integers(1, 24)
windows = st.integers(1, 30)
kinds = st.sampled_from([BiBranchCache, ChunkedBiBranchCache])


def make_factors(model, k_rank, v_rank, init="optimal", seed=0):
    """Factors from statistics of random tokens, with the ranks varied from layer to layer."""
    statistics = calibrate(model, [tiny_tokens(model, 2, 40, seed)])
    n, most = len(model.model.layers), model.config.d_kv
    k_ranks = [max(1, min(most, k_rank + i)) for i in range(n)]
    v_ranks = [max(1, min(most, v_rank - i)) for i in range(n)]
    return init_factors(init, model, k_ranks, v_ranks, statistics)


def decode_all(model, tokens, prompt, cache):
    """Logits [B, T, vocab]: the first `prompt` tokens as a prompt, the others one by one."""
    steps = [tokens[:, :prompt]] + [tokens[:, i : i + 1] for i in range(prompt, tokens.shape[1])]
    return torch.cat([model(step, cache) for step in steps], dim=1)


# ------------------------------------------------------------------------------ the cache's output


@quick
@given(shapes, lengths, windows, st.integers(1, 24), st.integers(1, 3), st.integers(0, 300), kinds)
def test_prefill_is_bit_equal_to_the_model(shape, T, window, rank, batch, expected, kind):
    model = tiny_model(**shape)
    tokens = tiny_tokens(model, batch, T)
    factors = make_factors(model, min(rank, model.config.d_kv), 3)
    original = model(tokens)
    cache = bi_branch_cache(model, factors, window, expected, kind)
    assert torch.equal(model(tokens, cache), original)
    assert torch.equal(model(tokens, full_cache(model, expected)), original)


@quick
@given(shapes, st.integers(1, 12), st.integers(1, 14), windows, st.integers(1, 5), kinds)
def test_decode_equals_one_parallel_computation(shape, prompt, steps, window, rank, kind):
    model = tiny_model(**shape)
    factors = make_factors(model, rank, rank + 1)
    tokens = tiny_tokens(model, 2, prompt + steps)
    cache = bi_branch_cache(model, factors.in_bits(32, 32), window, kind=kind)
    for layer in cache:
        layer.chunk = 3  # so that a few tokens make several chunks
    logits = decode_all(model, tokens, prompt, cache)
    for sequence, ours in zip(tokens, logits, strict=True):
        expected = naive_forward(model, sequence, factors, window, prompt)
        torch.testing.assert_close(ours.double(), expected, atol=2e-4, rtol=2e-4)


@quick
@given(
    shapes,
    st.integers(1, 90),
    st.integers(1, 40),
    windows,
    st.sampled_from([2, 4, 16, 32]),
    st.sampled_from([2, 3, 8, 16, 32]),
)
def test_the_fast_cache_equals_the_plain_one(shape, prompt, steps, window, k_bits, v_bits):
    """Chunks, side-by-side pairs, absorbed values: other ways to the numbers of Figure 1b."""
    model = tiny_model(**shape)
    factors, tokens = make_factors(model, 5, 4), tiny_tokens(model, 2, prompt + steps)
    factors = factors.in_bits(k_bits, v_bits)
    plain = bi_branch_cache(model, factors, window, kind=BiBranchCache)
    fast = bi_branch_cache(model, factors, window, kind=ChunkedBiBranchCache)
    for layer in fast:
        layer.chunk = 17
    outs = [decode_all(model, tokens, prompt, cache) for cache in (plain, fast)]
    torch.testing.assert_close(*outs, atol=2e-3, rtol=2e-3)
    assert [layer.nbytes() for layer in plain] == [layer.nbytes() for layer in fast]


@quick
@given(shapes, st.integers(1, 12), st.integers(1, 14), windows, st.sampled_from(["svd", "optimal"]))
def test_full_rank_equals_the_full_cache(shape, prompt, steps, window, init):
    model = tiny_model(**shape)
    d_kv = model.config.d_kv
    statistics = calibrate(model, [tiny_tokens(model, 2, 40)])
    factors = init_factors(init, model, [d_kv] * 2, [d_kv] * 2, statistics)
    tokens = tiny_tokens(model, 2, prompt + steps)
    ours = decode_all(
        model, tokens, prompt, bi_branch_cache(model, factors.in_bits(32, 32), window)
    )
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


# -------------------------------------------------------------------- which token, which branch


@quick
@given(st.integers(1, 10), st.integers(1, 30), windows, kinds)
def test_each_token_is_attended_through_exactly_one_branch(prompt, steps, window, kind):
    """Token j's exact value is the unit vector e_j, its rebuilt one e_(N + j). All scores are 0, so
    the output shows the weight 1/n of each token in the channel of the branch it came through."""
    N = prompt + steps
    config = tiny_config(
        hidden_size=N, num_attention_heads=1, num_key_value_heads=1, head_dim=2 * N
    )
    attention, rope = Attention(config), Rope(config)
    rope.reach(N, torch.device("cpu"))
    into_old = torch.cat([torch.zeros(N, N), torch.eye(N)], dim=1)  # [N, 2 N]
    some = LowRank(torch.ones(N, 1), torch.zeros(1, 2 * N), bits=32)
    factors = LayerFactors(some, LowRank(torch.eye(N), into_old, bits=32))
    cache = kind(attention, factors, window)
    x = torch.eye(N)[None]  # [1, N, N]: token j is e_j
    zeros, v = torch.zeros(1, 1, N, 2 * N), torch.zeros(1, 1, N, 2 * N)
    v[0, 0, :, :N] = torch.eye(N)
    cache.prefill(x[:, :prompt], *(y[:, :, :prompt] for y in (zeros, zeros, v)), rope)
    for t in range(prompt, N):
        now = slice(t, t + 1)
        out = cache.decode(x[:, now], *(y[:, :, now] for y in (zeros, zeros, v)), rope)[0, 0, 0]
        full = torch.arange(N) <= t
        old = torch.arange(N) <= t - window
        expected = torch.cat([full & ~old, old]).float() / (t + 1)
        torch.testing.assert_close(out, expected)
        assert cache.length == t + 1
        assert cache.c_k.length == cache.c_v.length == cache.length
        assert min(cache.length, window) <= cache.k.shape[2] <= window


@quick
@given(shapes, st.integers(1, 300), st.integers(0, 20), windows, st.integers(0, 400), st.data())
def test_bytes_are_those_of_the_tensors(shape, T, steps, window, expected, data):
    model = tiny_model(**shape)
    d_kv, layers = model.config.d_kv, len(model.model.layers)
    k_rank, v_rank = data.draw(st.integers(1, d_kv)), data.draw(st.integers(1, d_kv))
    factors = init_factors("random", model, [k_rank] * layers, [v_rank] * layers)
    cache = bi_branch_cache(model, factors.in_bits(16, 32), window, expected)
    assert sum(layer.nbytes() for layer in cache) == 0
    tokens = tiny_tokens(model, 2, T + steps)
    model(tokens[:, :T], cache, logits_to_keep=1)

    def check(length: int, room: int) -> None:
        ring = min(window, shape["sliding_window"] or window)
        for layer in cache:
            assert layer.nbytes() == sum(t.numel() * t.element_size() for t in layer.tensors())
            weights = {"A_k", "A_v", "B_k", "B_v", "k_bias", "v_bias"}  # and nothing else is kept
            parts = [*vars(layer).items(), *vars(layer.c_k).items(), *vars(layer.c_v).items()]
            kept = [t for name, t in parts if name not in weights and torch.is_tensor(t)]
            assert {id(t) for t in kept} == {id(t) for t in layer.tensors()}
            ring_room = layer.k.shape[2]
            assert min(length, ring) <= ring_room <= min(room, ring)
            floats = 2 * 4 * d_kv * ring_room  # the ring: keys and values in float32
            assert layer.nbytes() == 2 * (room * (2 * k_rank + 4 * v_rank) + floats)  # batch of 2

    check(T, max(T, expected))
    for i in range(T, T + steps):
        model(tokens[:, i : i + 1], cache)
    room = max(T, expected)  # past it, in steps of 256 tokens
    check(T + steps, room if T + steps <= room else room + 256)


def test_growing_copies_rarely():
    """Buffers grow by 256 tokens: 600 steps past the prompt move them three times, not 600."""
    model = tiny_model(num_hidden_layers=1)
    factors = init_factors("svd", model, [3], [2])
    for cache in (bi_branch_cache(model, factors, 1000), full_cache(model)):
        model(tiny_tokens(model, 1, 5), cache)
        places = set()
        for _ in range(590):
            model(torch.tensor([[1]]), cache)
            places.add(tuple(t.data_ptr() for t in cache[0].tensors()))
            assert all(t.shape[-2] <= cache[0].length + 255 for t in cache[0].tensors())
        assert len(places) <= 3


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest memory that any operation takes, `known` tensors aside."""

    def __init__(self, known):
        super().__init__()
        self.known, self.largest = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            storage = out.untyped_storage()
            if storage.data_ptr() not in self.known:
                self.largest = max(self.largest, storage.nbytes())
        return out


def test_working_memory_is_the_scores_and_one_chunk():
    """With 1 query head, scores are 1 number a token; anything else that grew would show."""
    shape = {"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 5000}
    model = tiny_model(num_hidden_layers=1, **shape)
    factors = init_factors("svd", model, [4], [4])
    for T in (1000, 4000):
        cache = bi_branch_cache(model, factors, 8, expected=T + 1)
        cache[0].chunk = 64
        model(tiny_tokens(model, 1, T), cache, logits_to_keep=1)
        inputs = [torch.zeros(1, 1, 24), *(torch.zeros(1, 1, 1, 6) for _ in range(3))]
        known = [*cache[0].tensors(), model.rope.cos, model.rope.sin, model.rope.cis]
        with LargestTensor(known) as seen:
            cache[0].decode(*inputs, model.rope)
        assert 4 * 64 * 6 <= seen.largest <= 4 * max(T + 1, 64 * 6)  # float32


# --------------------------------------------------------------------------------------- in bits


bits = st.sampled_from([2, 3, 4, 8])


def dequantized(c, quantized, b, dim, clamped=False):
    """What a cache reads back of the latents c [B, T, r]: the first `quantized` tokens in b bits,
    the others in 16, as the cache first gets them all."""
    c = c.half().float()
    if b == 16 or not quantized:
        return c
    return torch.cat([quant.fake_quantize(c[:, :quantized], b, dim, clamped), c[:, quantized:]], 1)


@quick
@given(st.integers(1, 150), st.integers(0, 70), windows, st.integers(1, 40), bits, st.data())
def test_packed_latents_are_whole_groups_older_than_the_window(T, steps, window, rank, b, data):
    """Wherever it is read, a token's latent is what fake quantization makes of it once its group
    of 32 has left the window, and what 16 bits make of it before."""
    generator = torch.Generator().manual_seed(T)
    c = torch.randn(2, T + steps, rank, generator=generator) + 2
    dim = data.draw(st.sampled_from([quant.TOKENS, quant.CHANNELS]))
    latents = quant.Packed(b, dim, window, dtype=torch.float16)
    latents.append(c[:, :T])
    for t in range(T, T + steps):
        latents.append(c[:, t : t + 1])
    old = max(0, T + steps - window)
    expected = dequantized(c, old // 32 * 32, b, dim)
    assert latents.length == T + steps and latents.packed == old // 32 * 32
    start = data.draw(st.integers(0, T + steps - 1))
    stop = data.draw(st.integers(start + 1, T + steps))
    assert torch.equal(latents.read(start, stop).float(), expected[:, start:stop])
    assert latents.waiting.untyped_storage().nbytes() == latents.waiting.numel() * 2


@quick
@given(
    shapes,
    st.integers(1, 90),
    st.integers(1, 40),
    windows,
    bits,
    st.sampled_from([2, 4, 16]),
    st.booleans(),
)
def test_decode_in_bits_equals_decode_with_fake_quantized_latents(
    shape, prompt, steps, window, k_bits, v_bits, clamped
):
    """One layer against plain attention over what fake-quantized latents are rebuilt to."""
    model = tiny_model(num_hidden_layers=1, **shape)
    config, attention = model.config, model.model.layers[0].self_attn
    factors = make_factors(model, 5, 4)
    factors = factors.in_bits(k_bits, v_bits, clamped)
    pair, T = factors.layers[0], prompt + steps
    model.rope.reach(T, torch.device("cpu"))
    x = torch.randn(2, T, config.hidden_size, generator=torch.Generator().manual_seed(prompt))

    def heads(y):
        return y.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)

    q, k, v = (heads(p(x)) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    cache = bi_branch_cache(model, factors, window)[0]
    cache.chunk = 40  # not a multiple of 32
    cache.prefill(x[:, :prompt], *(y[:, :, :prompt] for y in (q, k, v)), model.rope)
    for t in range(prompt, T):
        now = slice(t, t + 1)
        out = cache.decode(x[:, now], *(y[:, :, now] for y in (q, k, v)), model.rope)

    ring = min(window, config.sliding_window or window)
    old = max(0, T - ring)
    rebuilt = []
    for p, b, dim, projection, exact in (
        (pair.k, k_bits, quant.TOKENS, attention.k_proj, k),
        (pair.v, v_bits, quant.CHANNELS, attention.v_proj, v),
    ):
        hat = dequantized(x @ p.A, old // 32 * 32, b, dim, clamped) @ p.B
        hat = heads(hat if projection.bias is None else hat + projection.bias)
        rebuilt.append(torch.cat([hat[:, :, :old], exact[:, :, old:]], 2))
    first = max(0, T - (config.sliding_window or T))
    k_all, v_all = model.rope.rotate(rebuilt[0], 0)[:, :, first:], rebuilt[1][:, :, first:]
    expected = torch.nn.functional.scaled_dot_product_attention(
        model.rope.rotate(q[:, :, -1:], T - 1), k_all, v_all, enable_gqa=True
    )
    # A latent that sits between two 16-bit numbers, or two levels, may round to either.
    torch.testing.assert_close(out, expected, atol=2e-3, rtol=2e-3)


@quick
@given(st.integers(1, 200), st.integers(0, 40), windows, bits, bits, st.data())
def test_bytes_in_bits_are_those_of_the_formula(T, steps, window, k_bits, v_bits, data):
    """Packed: bits, scale and minimum. Waiting: 16 bits. The ring: the model's 32 bits."""
    model = tiny_model(num_hidden_layers=1)
    d_kv = model.config.d_kv
    r_k, r_v = data.draw(st.integers(1, d_kv)), data.draw(st.integers(1, d_kv))
    factors = init_factors("random", model, [r_k], [r_v])
    factors = factors.in_bits(k_bits, v_bits)
    cache = bi_branch_cache(model, factors, window, T + steps)
    tokens = tiny_tokens(model, 2, T + steps)
    decode_all(model, tokens, T, cache)
    packed = max(0, T + steps - window) // 32 * 32
    per_token = r_k * quant.bits_per_element(k_bits) + r_v * quant.bits_per_element(v_bits, r_v)
    waiting = (T + steps - packed) * 16 * (r_k + r_v)
    ring = min(T + steps, window) * 32 * 2 * d_kv
    assert 8 * cache[0].nbytes() == pytest.approx(2 * (packed * per_token + waiting + ring))
    nominal = 1 - (r_k * k_bits + r_v * v_bits) / (2 * 16 * d_kv)
    assert nominal_ratio(model, factors) == pytest.approx(nominal)


@quick
@given(st.integers(1, 12), st.integers(1, 12))
def test_rotated_values_have_the_same_product_and_latents_of_the_same_length(r_k, r_v):
    model = tiny_model()
    factors = make_factors(model, r_k, r_v)
    rotated = factors.in_bits(None, 4)
    x = torch.randn(50, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    for before, after in zip(factors.layers, rotated.layers, strict=True):
        assert after.k.A is before.k.A and after.k.B is before.k.B
        torch.testing.assert_close(after.v.A @ after.v.B, before.v.A @ before.v.B)
        torch.testing.assert_close((x @ after.v.A).norm(dim=1), (x @ before.v.A).norm(dim=1))


def test_rotation_spreads_outliers():
    """What it is for: one large channel no longer sets the step for the 31 others of its group."""
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(64, 32, generator=generator), torch.randn(32, 48, generator=generator)
    A[:, 0] *= 20
    plain = Factors([LayerFactors(LowRank(A, B), LowRank(A, B))])
    x, errors = torch.randn(200, 64, generator=generator), []
    for factors in (plain, plain.in_bits(v_bits=4)):
        pair = factors.layers[0].v
        c = x @ pair.A
        v_hat = quant.fake_quantize(c, 4, quant.CHANNELS) @ pair.B
        errors.append((v_hat - c @ pair.B).square().mean().item())
    assert errors[1] < errors[0] / 2


def test_factors_trained_in_bits_are_not_rotated_again():
    model = tiny_model()
    factors = make_factors(model, 4, 4)
    trained = factors.in_bits(4, 4)
    assert bi_branch_cache(model, trained.in_bits(4, 4), 4)[0].A_v is trained.layers[0].v.A
    assert bi_branch_cache(model, trained.in_bits(2, 2), 4)[0].A_v is trained.layers[0].v.A
    assert bi_branch_cache(model, factors.in_bits(4, 4), 4)[0].A_v is not factors.layers[0].v.A
    assert bi_branch_cache(model, factors.in_bits(4, 16), 4)[0].A_v is factors.layers[0].v.A


# ------------------------------------------------------------------------------- wrong handling


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


@pytest.mark.parametrize("arguments", [{"window": 0}, {"window": -3}, {"k_bits": 5}, {"v_bits": 1}])
def test_bad_cache_arguments(arguments):
    model = tiny_model()
    bits = {name: arguments.pop(name) for name in list(arguments) if name != "window"}
    with pytest.raises(ValueError, match=r"is below 1|-bit latents; choose"):
        bi_branch_cache(model, make_factors(model, 3, 3).in_bits(**bits), **arguments)


def test_bad_initializations():
    model = tiny_model()
    for bad in ("best", "SVD", ""):
        with pytest.raises(ValueError, match="no initialization"):
            init_factors(bad, model, [1, 1], [1, 1])
    with pytest.raises(ValueError, match="needs calibration"):
        init_factors("optimal", model, [1, 1], [1, 1])
    for ranks in ([0, 1], [1, 13], [-1, 1]):
        with pytest.raises(ValueError, match="not in 1"):
            init_factors("svd", model, ranks, [1, 1])
    with pytest.raises(ValueError, match="ranks for 2 layers"):
        init_factors("svd", model, [1], [1])
    for ratio in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="compression ratio"):
            rank_for(ratio, 12)
    with pytest.raises(UserError, match="no calibration text"):
        calibrate(model, [])


# -------------------------------------------------------------------------------------- factors


def test_rank_is_of_the_whole_layer():
    """The published code rounds down a head: int(0.2 * 64) * 3 = 36 for SmolLM2. Ours is 38."""
    assert rank_for(0.8, 192) == 38
    assert rank_for(0.5, 192) == 96
    assert rank_for(0, 192) == 192
    assert rank_for(0.999, 192) == 1


def loss(x, W, pair):
    """The paper's equation 1, as a mean over tokens of the squared distance."""
    return (x @ W - x @ pair.A @ pair.B).square().sum(1).mean()


data = st.tuples(st.integers(3, 12), st.integers(2, 10), st.integers(20, 40), st.integers(0, 10**6))


def random_problem(hidden, d_kv, tokens, seed):
    """Inputs x with channels of very different sizes, and a weight W."""
    g = torch.Generator().manual_seed(seed)
    spread = torch.exp(2 * torch.randn(hidden, generator=g, dtype=torch.float64))
    x = torch.randn(tokens, hidden, generator=g, dtype=torch.float64) * spread
    return x, torch.randn(hidden, d_kv, generator=g, dtype=torch.float64), g


@quick
@given(data, st.data())
def test_optimal_loses_the_dropped_eigenvalues_and_nothing_goes_below(problem, draw):
    x, W, g = random_problem(*problem)
    rank = draw.draw(st.integers(1, min(W.shape)))
    moment = (x @ W).T @ (x @ W) / len(x)
    dropped = torch.linalg.eigvalsh(moment)[: W.shape[1] - rank].clamp(min=0).sum()
    scale = moment.trace()

    def double(pair):
        return LowRank(pair.A.double(), pair.B.double())

    best = loss(x, W, double(cskv.optimal_factors(W, rank, moment)))
    assert abs(best - dropped) < 1e-10 * scale
    others = [
        cskv.svd_factors(W, rank),
        cskv.asvd_factors(W, rank, x.abs().mean(0)),
        double(cskv.random_factors(W, rank, torch.Generator().manual_seed(0))),
    ]
    optimum = cskv.optimal_factors(W, rank, moment)
    for size in (1e-3, 1e-1):  # and no step away from it, which is what training takes
        noise = [
            size * torch.randn(m.shape, generator=g, dtype=torch.float64) * m.std()
            for m in (optimum.A, optimum.B)
        ]
        others.append(LowRank(optimum.A + noise[0], optimum.B + noise[1]))
    others.append(LowRank(optimum.A * 1.001, optimum.B))
    for other in others:
        assert loss(x, W, double(other)) >= best - 1e-10 * scale


@quick
@given(data, st.data())
def test_svd_is_the_best_for_the_weight_alone(problem, draw):
    _, W, _ = random_problem(*problem)
    rank = draw.draw(st.integers(1, min(W.shape)))
    pair = cskv.svd_factors(W, rank)
    dropped = torch.linalg.svdvals(W)[rank:].square().sum()
    torch.testing.assert_close((W - pair.A @ pair.B).square().sum(), dropped, atol=1e-9, rtol=1e-6)


def test_asvd_by_hand():
    """W = diag(3, 1), one direction kept, which plain SVD takes from the first channel.

    S = diag(mean |x|^0.5): for (1, 4), S W = diag(3, 2), the first still; for (1, 16), diag(3, 4).
    """
    W, first, second = torch.diag(torch.tensor([3.0, 1.0])), [[3.0, 0.0]], [[0.0, 1.0]]
    for x_abs, kept in (((1.0, 4.0), first), ((1.0, 16.0), second)):
        pair = cskv.asvd_factors(W, 1, torch.tensor(x_abs))
        expected = torch.zeros(2, 2)
        expected[int(kept is second)] = torch.tensor(kept[0])
        torch.testing.assert_close(pair.A @ pair.B, expected, atol=1e-4, rtol=1e-4)
    dead = cskv.asvd_factors(torch.eye(2), 1, torch.tensor([0.0, 1.0]))  # a channel always 0
    assert (dead.A @ dead.B).isfinite().all()


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
    model.rope.reach(300, torch.device("cpu"))
    k, k_hat = torch.randn(2, 2, T, 6, generator=torch.Generator().manual_seed(rank)).unbind(0)
    before = (k - k_hat).square().sum()
    after = (model.rope.rotate(k, start) - model.rope.rotate(k_hat, start)).square().sum()
    torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-5)


def test_statistics_equal_a_naive_computation():
    """Both moments and the absolute mean, over batches of different shapes, biases left out."""
    model = tiny_model(attention_bias=True)
    batches = [tiny_tokens(model, 2, 7, 1), tiny_tokens(model, 1, 5, 2)]
    inputs = {}
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, i=i: inputs.setdefault(i, []).append(args[0].flatten(0, 1))
        )
    statistics = calibrate(model, batches)
    for i, layer in enumerate(model.model.layers):
        x = torch.cat(inputs[i])
        assert len(x) == 19
        k = (x @ layer.self_attn.k_proj.weight.T).double()
        torch.testing.assert_close(
            statistics[i].x_abs, x.double().abs().mean(0), rtol=1e-5, atol=1e-6
        )
        moment = torch.einsum("ti,tj->ij", k, k) / 19  # k itself is rounded in float32
        torch.testing.assert_close(statistics[i].k_moment, moment, rtol=1e-5, atol=1e-5)


def output_error(model, layer, pair, x):
    """Mean square of what the values' error adds to the layer's output, head by head, in double."""
    c, attention = model.config, model.model.layers[layer].self_attn
    error = x.double() @ (attention.v_proj.weight.T.double() - pair.A.double() @ pair.B.double())
    total, group = 0.0, c.num_attention_heads // c.num_key_value_heads
    for head in range(c.num_attention_heads):
        mine = slice(head * c.head_dim, (head + 1) * c.head_dim)
        shared = slice(head // group * c.head_dim, (head // group + 1) * c.head_dim)
        W_O = attention.o_proj.weight[:, mine].T.double()  # [D, hidden]
        total += (error[:, shared] @ W_O).square().sum(1).mean().item()
    return total


@pytest.mark.parametrize("rank_of_W_O", [0, 1])
def test_attention_factors_where_W_O_is_singular(rank_of_W_O):
    """Keeps out a metric in float32, whose rounding is larger than what makes it invertible."""
    model = tiny_model(hidden_size=64, num_key_value_heads=2, head_dim=32, num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    if rank_of_W_O:
        attention.o_proj.weight[:] = torch.outer(torch.arange(64.0), torch.randn(128)) / 64
    else:
        attention.o_proj.weight.zero_()
    statistics = calibrate(model, [tiny_tokens(model, 2, 100)])
    factors = init_factors("attention", model, [9], [9], statistics)
    assert all(M.isfinite().all() for pair in factors.pairs for M in (pair.A, pair.B))
    plain = init_factors("optimal", model, [9], [9], statistics)
    x = torch.randn(50, 64)
    ours, theirs = (output_error(model, 0, f.layers[0].v, x) for f in (factors, plain))
    assert ours <= theirs + 1e-6


def test_weights_that_are_not_finite_are_refused():
    model = tiny_model()
    model.model.layers[1].self_attn.v_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="layer 1: v_proj has weights that are not finite"):
        init_factors("svd", model, [3, 3], [3, 3])


@quick
@given(st.sampled_from([1, 2, 4]), st.integers(1, 5), st.integers(0, 20), st.data())
def test_attention_factors_are_the_best_for_the_output(H_kv, rank, seed, data):
    """No factors of that rank, `optimal` or disturbed ones, err less in what W_O makes of values;
    and what they err is the sum of the dropped eigenvalues of the weighed moment."""
    model = tiny_model(seed, num_key_value_heads=H_kv, num_hidden_layers=1)
    x = torch.randn(200, model.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    attention, d_kv = model.model.layers[0].self_attn, model.config.d_kv
    v = x @ attention.v_proj.weight.T
    k = x @ attention.k_proj.weight.T
    statistics = [Statistics(x.abs().mean(0), k.T @ k / 200, v.T @ v / 200)]
    ours, plain = (
        init_factors(name, model, [rank], [rank], statistics).layers[0]
        for name in ("attention", "optimal")
    )
    torch.testing.assert_close(ours.k.A @ ours.k.B, plain.k.A @ plain.k.B)
    least = output_error(model, 0, ours.v, x)
    assert least <= output_error(model, 0, plain.v, x) * (1 + 1e-4)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    for size in (1e-3, 1e-1):
        moved = [
            M + size * M.std() * torch.randn(M.shape, generator=generator)
            for M in (ours.v.A, ours.v.B)
        ]
        assert least <= output_error(model, 0, LowRank(*moved), x) * (1 + 1e-4)
    M = cskv.output_metric(attention).double()
    weighed = torch.linalg.eigvals(statistics[0].v_moment.double() @ M).real.sort().values
    assert least == pytest.approx(weighed[: d_kv - rank].sum().item(), rel=1e-3)


# --------------------------------------------------------------------------------- factors files


def test_factors_survive_a_file(tmp_path):
    model = tiny_model()
    factors = make_factors(model, 3, 5)
    factors.info["data"] = "some text"
    path = tmp_path / "f.safetensors"
    save_factors(path, factors, model, torch.float32)
    again = load_factors(path, model)
    assert again.info["init"] == "optimal" and again.info["data"] == "some text"
    for a, b in zip(factors.layers, again.layers, strict=True):
        for x, y in ((a.k, b.k), (a.v, b.v)):
            assert torch.equal(x.A, y.A) and torch.equal(x.B, y.B)
    assert [p.name for p in tmp_path.iterdir()] == ["f.safetensors"]


def test_factors_fit_the_same_model_in_other_bits_and_no_other(tmp_path):
    model = tiny_model()
    path = tmp_path / "f.safetensors"
    save_factors(path, make_factors(model, 3, 5), model)
    for dtype in (torch.float16, torch.bfloat16):
        loaded = load_factors(path, tiny_model().to(dtype))
        assert loaded.layers[0].k.A.dtype == dtype
    others = [tiny_model(seed=1), tiny_model(num_hidden_layers=3), tiny_model(hidden_size=30)]
    altered = tiny_model()
    altered.model.layers[1].self_attn.v_proj.weight.data.mul_(-1)
    for other in [*others, altered]:
        with pytest.raises(UserError, match="another model"):
            load_factors(path, other)


def test_infinite_factors_are_not_saved(tmp_path):
    model = tiny_model()
    factors = make_factors(model, 3, 5)
    factors.layers[0].k.A[0, 0] = 1e6  # more than float16 holds
    with pytest.raises(UserError, match="cannot hold"):
        save_factors(tmp_path / "f.safetensors", factors, model)
    assert list(tmp_path.iterdir()) == []


def test_nominal_ratio_counts_bits_and_ranks_of_every_layer():
    model = tiny_model()  # d_kv 12, 2 layers
    factors = init_factors("svd", model, [2, 4], [6, 12])
    assert nominal_ratio(model, factors) == pytest.approx(1 - (2 + 4 + 6 + 12) / 48)
    assert nominal_ratio(model, factors.in_bits(32, 16)) == pytest.approx(1 - (2 * 6 + 18) / 48)


def test_equal_factors_are_equal_files(tmp_path):
    """Keeps out the random order that safetensors gives to metadata."""
    model = tiny_model()
    factors = make_factors(model, 3, 4)
    for i in range(5):
        save_factors(tmp_path / str(i), factors, model)
    assert len({(tmp_path / str(i)).read_bytes() for i in range(5)}) == 1
    data = (tmp_path / "0").read_bytes()
    assert int.from_bytes(data[:8], "little") % 8 == 0  # tensors stay aligned
