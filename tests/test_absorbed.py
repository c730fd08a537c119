"""Absorbed keys: the series and its bound, the scores against float64, the rule against a counter.

Tiny models turn fast, so that segments of the lengths that the cache chooses from have no slow
pairs in them: here they are shorter.
"""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cskv import (
    BiBranchCache,
    ChunkedBiBranchCache,
    Factors,
    LayerFactors,
    LowRank,
    bi_branch_cache,
)
from model import Attention, Rope
from support import absorbed
from support.absorbed import AbsorbedBiBranchCache, Split, bessel, remainder
from support.calibration import init_factors
from support.shapes import SHAPES, shape_config
from tests.helpers import (
    LLAMA3,
    LargestTensor,
    decode_all,
    make_factors,
    most_slow,
    naive_frequencies,
    quick,
    sinks,
    tiny_config,
    tiny_model,
    tiny_tokens,
    windows,
)

torch.set_grad_enabled(False)
CPU = torch.device("cpu")
scalings = st.sampled_from([None, {"rope_type": "linear", "factor": 8.0}, LLAMA3])
thetas = st.sampled_from([1e2, 1e4, 1e6])
shapes = st.fixed_dictionaries(
    {
        "num_key_value_heads": st.sampled_from([1, 2, 4]),
        "head_dim": st.sampled_from([4, 6, 32]),
        "attention_bias": st.booleans(),
        "sliding_window": st.sampled_from([None, None, 3, 50]),
        "rope_theta": thetas,
        "rope_scaling": scalings,
    }
)


@quick
@given(st.floats(0, 20), st.integers(1, 16), st.floats(-1, 1))
def test_the_series_is_as_near_as_its_bound(z, terms, x):
    """Against exp itself, in float64."""
    z, x = (torch.tensor(value, dtype=torch.float64) for value in (z, x))
    series = sum(
        (2 if p else 1) * 1j**p * bessel(p, z) * torch.cos(p * x.arccos()) for p in range(terms)
    )
    exact = torch.polar(torch.ones_like(z), z * x)
    assert (series - exact).abs() <= remainder(z, terms) + 1e-9


def test_bessel_functions_are_their_integral():
    """J_p(z) is the mean of cos(p theta - z sin theta), exact for so many points."""
    z = torch.linspace(0, 20, 50, dtype=torch.float64)
    theta = torch.arange(128, dtype=torch.float64) * (2 * math.pi / 128)
    for p in range(17):
        mean = (p * theta - torch.outer(z, theta.sin())).cos().mean(1)
        torch.testing.assert_close(bessel(p, z), mean, atol=1e-9, rtol=0)


@quick
@given(shapes, st.sampled_from([8, 64, 256, 1024]), st.sampled_from([1e-6, 1e-5]))
def test_slow_pairs_keep_the_promised_precision(shape, length, precision):
    """The tables of a cache, put together for every token of a segment and every slow pair."""
    config = tiny_config(**shape)
    split = most_slow(config, length, precision)
    rank, d_kv = 2, config.d_kv
    pair = LowRank(torch.ones(24, rank), torch.ones(rank, d_kv), 32)
    cache = AbsorbedBiBranchCache(Attention(config), LayerFactors(pair, pair), split=split)
    assert list(split.needs) == sorted(split.needs, reverse=True)
    if not split.slow:
        return
    tau = torch.arange(length, dtype=torch.float64) - (length - 1) / 2
    w = naive_frequencies(config)[-split.slow :]
    exact = torch.polar(torch.ones(length, split.slow).double(), torch.outer(tau, w))
    series = torch.zeros_like(exact)
    for p, need in enumerate(split.needs):
        a = cache.series[p].flatten().conj().to(series.dtype)
        series[:, :need] += torch.outer(cache.chebyshev[p].to(series.dtype), a[:need])
    assert (series - exact).abs().max() <= precision + 2e-6  # tables in float32, sums of up to 16


@quick
@given(
    shapes,
    st.integers(1, 90),
    st.integers(1, 40),
    windows,
    sinks,
    st.sampled_from([2, 3, 4, 16, 32]),
    st.sampled_from([1, 7, 16, 64]),
    st.sampled_from([17, 48, 1024]),
)
def test_absorbed_equals_rebuilt(shape, prompt, steps, window, first, bits, length, chunk):
    """Step by step, with the plain cache and the chunked one; batches of two."""
    model = tiny_model(num_hidden_layers=1, scale=0.3, **shape)
    factors = make_factors(model, 5, 4).in_bits(bits, 16)
    tokens = tiny_tokens(model, 2, prompt + steps)
    kind = partial(AbsorbedBiBranchCache, split=most_slow(model.config, length))
    caches = [
        bi_branch_cache(model, factors, window, kind=kind, sinks=first)
        for kind in (BiBranchCache, ChunkedBiBranchCache, kind)
    ]
    for cache in caches:
        cache[0].chunk = chunk
    plain, chunked, ours = (decode_all(model, tokens, prompt, cache) for cache in caches)
    torch.testing.assert_close(ours, chunked, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours, plain, atol=2e-3, rtol=2e-3)
    assert caches[0][0].nbytes() == caches[2][0].nbytes()


def exact_scores(config, B_k, bias, q, c, t):
    """Scores [H, n] of a query before RoPE, at t, with the keys of latents c [n, r] from token 0
    on, turned by their distance, all in float64."""
    D, H_kv = config.head_dim, config.num_key_value_heads
    k = c.double() @ B_k.double() + (0 if bias is None else bias.double())
    k = k.unflatten(-1, (H_kv, 2, D // 2))  # half-split pairs
    q = q.double().unflatten(-1, (2, D // 2)) / math.sqrt(D)  # [H, 2, D/2]
    k, q = torch.complex(k[:, :, 0], k[:, :, 1]), torch.complex(q[:, 0], q[:, 1])
    distance = t - torch.arange(len(c), dtype=torch.float64)
    angle = torch.outer(distance, Rope(config).frequencies.double())
    turned = q.view(H_kv, -1, 1, D // 2) * torch.polar(torch.ones_like(angle), angle)
    return (turned.conj() * k.transpose(0, 1)[:, None]).real.sum(-1).flatten(0, 1)


def layer_of(config, rank, bits=32, seed=0, **more):
    """An attention of random weights, random factors for its keys, and a generator."""
    generator = torch.Generator().manual_seed(seed)
    attention = Attention(config)
    if config.attention_bias:
        attention.k_proj.bias.data = torch.randn(config.d_kv, generator=generator)
    A = torch.randn(config.hidden_size, rank, generator=generator) / math.sqrt(config.hidden_size)
    B = torch.randn(rank, config.d_kv, generator=generator) / math.sqrt(rank)
    pair = LowRank(A, B, bits)
    return attention, LayerFactors(pair, pair), generator


def scores_of(kind, config, attention, factors, q, c, t):
    """Scores [H, n] of `old_scores`, with q [H, D] before RoPE, of a cache that holds t tokens."""
    rope = Rope(config)
    rope.reach(t + 1, CPU)
    cache = kind(attention, factors)
    cache.length = t + 1
    q = rope.rotate(q[None, :, None], t).view(1, config.num_key_value_heads, -1, config.head_dim)
    q = q.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) / math.sqrt(config.head_dim)
    c = c[None]
    parts = [
        cache.old_scores(q, c[:, s : s + 1024], s, rope)[0] for s in range(0, c.shape[1], 1024)
    ]
    return torch.cat(parts, -1).flatten(0, 1)


@settings(quick, max_examples=12)
@given(
    st.sampled_from([1, 2, 4]),
    st.sampled_from([4, 8, 32]),
    st.booleans(),
    st.sampled_from([1e2, 1e4, 1e6]),
    scalings,
    st.integers(1, 32_000),
    st.integers(32, 500),
    st.sampled_from([16, 128, 256, 1024]),
)
def test_scores_equal_float64_ones_up_to_32k(heads, D, bias, theta, scaling, n, ahead, length):
    """And slow pairs are as near to the truth as the promise, however far away, where rebuilt keys
    have the rounding of their angles."""
    config = tiny_config(
        num_key_value_heads=heads,
        head_dim=D,
        attention_bias=bias,
        rope_theta=theta,
        rope_scaling=scaling,
    )
    attention, factors, g = layer_of(config, 3)
    q, c = torch.randn(4, D, generator=g), torch.randn(n, 3, generator=g)
    kind = partial(AbsorbedBiBranchCache, split=most_slow(config, length))
    args = config, attention, factors, q, c, n + ahead
    ours, rebuilt = (scores_of(k, *args) for k in (kind, ChunkedBiBranchCache))
    exact = exact_scores(config, factors.k.B, attention.k_proj.bias, q, c, n + ahead)
    k = c @ factors.k.B + (attention.k_proj.bias if bias else 0)
    size = q.norm(dim=-1).max() * k.view(n, heads, D).norm(dim=-1).max() / math.sqrt(D)
    error, theirs = ((y - exact).abs().max() / size for y in (ours, rebuilt))
    fast = kind(attention, factors).fast
    assert error <= (6e-6 if fast == 0 else 6e-6 + theirs)
    assert error <= 6e-3  # 32,000 in float32


def test_far_positions_lose_nothing():
    """All pairs slow at 32,000 tokens: ten times nearer to the truth than rebuilt keys."""
    config = tiny_config(head_dim=32, rope_theta=1e4)
    attention, factors, g = layer_of(config, 5)
    q, c, t = torch.randn(4, 32, generator=g), torch.randn(32_000, 5, generator=g), 32_100
    kind = partial(AbsorbedBiBranchCache, split=most_slow(config, 8))
    assert kind(attention, factors).fast == 0
    args = config, attention, factors, q, c, t
    exact = exact_scores(config, factors.k.B, None, q, c, t)
    ours, rebuilt = (
        (scores_of(k, *args) - exact).abs().max() for k in (kind, ChunkedBiBranchCache)
    )
    assert ours < 1e-5 < 1e-4 < rebuilt


def test_the_working_memory_is_one_chunk():
    """With 1 query head, scores are 1 number a token; anything else that grew would show."""
    shape = {"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 9999}
    model = tiny_model(num_hidden_layers=1, rope_theta=1e6, **shape)
    factors, largest = init_factors("svd", model, [4], [4]), []
    for T in (3000, 9000):
        kind = partial(AbsorbedBiBranchCache, split=most_slow(model.config, 256))
        cache = bi_branch_cache(model, factors, 8, T + 1, kind)[0]
        cache.chunk = 2048
        x, q = torch.zeros(1, T, 24), torch.zeros(1, 1, T, 6)
        model.rope.reach(T + 1, CPU)
        cache.remember(x, q, q, q, model.rope)
        known = [*cache.tensors(), model.rope.cos, model.rope.sin, model.rope.cis]
        x, q = torch.zeros(1, 1, 24), torch.zeros(1, 1, 1, 6)
        with LargestTensor(known) as seen:
            cache.decode(x, q, q, q, model.rope)
        largest.append(seen.largest)
    assert largest[1] <= max(largest[0], 4 * 9001)


# ----------------------------------------------------------------------------------------- the rule


RANKS = {"longchat": 819, "mistral": 205, "smollm2": 38, "teacher": 13}  # at 80%


@pytest.mark.parametrize("name", SHAPES)
def test_counted_operations_are_those_of_the_products(name):
    """Those that PyTorch's own counter sees, of a chunk."""
    config, rank, n = shape_config(name, 3000), RANKS[name] // 10 + 7, 1024
    attention, factors, g = layer_of(config, rank)
    split = absorbed.choose_split(config, rank, 1e-6)
    q = torch.randn(config.num_attention_heads, config.head_dim, generator=g)
    c = torch.randn(n, rank, generator=g)
    for kind, expected in (
        (ChunkedBiBranchCache, absorbed.rebuilt_operations(config, rank)),
        (AbsorbedBiBranchCache, absorbed.absorbed_operations(config, rank, split)),
    ):
        with FlopCounterMode(display=False) as counter:
            scores_of(kind, config, attention, factors, q, c, n + 5)
        assert counter.get_total_flops() == pytest.approx(n * expected)


@pytest.mark.parametrize("name", SHAPES)
def test_the_split_has_the_fewest_operations(name):
    """Of all that keep the precision: each length, number of terms and number of slow pairs."""
    config, rank = shape_config(name, 2000), RANKS[name]
    best = absorbed.choose_split(config, rank, 1e-6)
    count = absorbed.absorbed_operations(config, rank, best)
    for length in (512, 1024):
        z = Rope(config).frequencies.double() * length / 2
        need = [next((p for p in range(17) if remainder(y, p) <= 1e-6), 99) for y in z]
        for slow in range(1, len(need) + 1):
            terms = need[-slow:]
            if terms[0] <= 16:
                needs = tuple(sum(n > p for n in terms) for p in range(terms[0]))
                other = absorbed.absorbed_operations(config, rank, Split(length, needs))
                assert count <= other * (1 + 1e-9), (length, slow)
    assert best.slow and count < absorbed.rebuilt_operations(config, rank)


@pytest.mark.parametrize("name", SHAPES)
def test_the_rule_takes_the_cheaper_one(name, capsys):
    """Operations counted here by PyTorch, and the price of the calls added."""
    config, rank = shape_config(name, 2000), RANKS[name]
    model = tiny_model()
    model.config = config
    attention, pair, g = layer_of(config, rank)
    kind = absorbed.cheapest_kind(model, Factors([pair, pair]))
    said = capsys.readouterr().err
    q = torch.randn(config.num_attention_heads, config.head_dim, generator=g)
    c, counts = torch.randn(1024, rank, generator=g), []
    for each in (ChunkedBiBranchCache, AbsorbedBiBranchCache):
        with FlopCounterMode(display=False) as counter:
            scores_of(each, config, attention, pair, q, c, 1030)
        counts.append(2 * counter.get_total_flops() / 1024)
    calls = 2 * absorbed.more_calls(absorbed.choose_split(config, rank, 1e-6), CPU)
    cheaper = counts[1] + calls < counts[0]
    assert kind is (AbsorbedBiBranchCache if cheaper else ChunkedBiBranchCache)
    word, count = ("rebuilt", "absorbed")[cheaper], counts[cheaper] / 1e6
    assert said.startswith(f"keys are {word}: {count:.3g} MFLOP") and said.count("\n") == 1
    assert word == ("absorbed" if name in ("longchat", "mistral") else "rebuilt")


def test_layers_count_by_their_own_ranks_and_bits(capsys):
    """A model of one large layer and one small one: the sum decides, not the first or the last."""
    config, model = shape_config("longchat", 2000), tiny_model()
    model.config = config
    attention, large, _ = layer_of(config, 200)
    small = layer_of(config, 1, bits=4)[1]
    for layers in ([large, small], [small, large]):
        assert absorbed.cheapest_kind(model, Factors(layers)) is AbsorbedBiBranchCache
    assert absorbed.cheapest_kind(model, Factors([small])) is ChunkedBiBranchCache
    said = capsys.readouterr().err.splitlines()
    assert said[0] == said[1]
    six, five = absorbed.choose_split(config, 200, 1e-6), absorbed.choose_split(config, 1, 1e-5)
    assert AbsorbedBiBranchCache(attention, large).split == six
    assert AbsorbedBiBranchCache(attention, small).split == five
    count = absorbed.absorbed_operations
    total = count(config, 200, six) + count(config, 1, five)
    assert f"absorbed: {total / 1e6:.3g} MFLOP" in said[0]


def test_more_calls_is_how_many_there_are():
    """Operations that PyTorch runs, views aside, give or take a few."""

    class Calls(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            aliases = [r.alias_info for r in function._schema.returns]
            views = any(alias is not None and not alias.is_write for alias in aliases)
            self.count += not views and "view" not in str(function)
            return function(*args, **(kwargs or {}))

    for name in SHAPES:
        config = shape_config(name, 2000)
        attention, factors, g = layer_of(config, 8)
        rope, counts = Rope(config), []
        rope.reach(2000, CPU)
        heads = config.num_key_value_heads
        q = torch.randn(1, heads, config.num_attention_heads // heads, config.head_dim)
        for kind in (ChunkedBiBranchCache, AbsorbedBiBranchCache):
            cache = kind(attention, factors)
            cache.length = 1030
            with Calls() as calls:
                cache.old_scores(q, torch.randn(1, 1024, 8, generator=g), 0, rope)
            counts.append(calls.count)
        price = absorbed.more_calls(cache.split, CPU) * 2048 / 1e6
        assert counts[1] - counts[0] == pytest.approx(price, abs=2)
        assert absorbed.more_calls(Split(256, ()), CPU) == 0
