"""The fast cache: segments, their damping, and its numbers against a loop in float64."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quant
from beyond import segments
from beyond.segments import SEGMENTS, FastCache, SmallWindowCache, cut, damping
from cskv import LayerFactors, LowRank, bi_branch_cache, init_factors
from experiments.segments import measure_segments, parse_segments, text_of
from model import Attention, Rope
from tests import helpers
from tests.drawn import groups, quick, schedules, sinks, widths, windows
from tests.helpers import decode_all, in_bits, make_factors, tiny_config, tiny_model, tiny_tokens

shapes = st.fixed_dictionaries(
    {
        "num_key_value_heads": st.sampled_from([1, 2, 4]),
        "head_dim": st.sampled_from([4, 6, 16]),
        "attention_bias": st.booleans(),
        "sliding_window": st.sampled_from([None, None, 3, 50]),
        "rope_theta": st.sampled_from([1e2, 1e4, 1e6]),
        "rope_scaling": st.sampled_from(
            [None, {"rope_type": "linear", "factor": 8.0}, helpers.LLAMA3]
        ),
    }
)
chunks = st.sampled_from([1, 17, 32, 1000])

# ------------------------------------------------------------------------------------- segments


@quick
@given(st.floats(1e-4, 3.1), st.integers(1, 300))
def test_the_damping_is_the_nearest_constant_to_a_segment_s_turns(w, length):
    """The mean of exp(i tau w): no other number, real or not, is nearer in least squares."""
    tau = torch.arange(length, dtype=torch.float64) - (length - 1) / 2
    turns = torch.polar(torch.ones_like(tau), tau * w)
    a = damping(torch.tensor(w, dtype=torch.float64), length)
    torch.testing.assert_close(turns.mean(), a.to(turns.dtype), atol=1e-9, rtol=0)
    lost = (turns - a).abs().square().sum()
    for other in (a + 1e-3, a - 1e-3, a + 1e-3j):
        assert (turns - other).abs().square().sum() > lost
    torch.testing.assert_close(lost / length, 1 - a.square(), atol=1e-9, rtol=0)


@quick
@given(st.integers(0, 3000), st.integers(1, 3000), schedules)
def test_each_token_is_in_one_segment(start, n, schedule):
    """Segments of all lengths lie on the grid of their length, short ones near the query."""
    stop = start + n
    spans = cut(start, stop, schedule)
    starts = [span.start + i * span.length for span in spans for i in range(span.count)]
    lengths = [span.length for span in spans for _ in range(span.count)]
    ends = [s + length for s, length in zip(starts, lengths, strict=True)]
    assert all(s % length == 0 for s, length in zip(starts, lengths, strict=True))
    assert cut(start, start, schedule) == ()
    assert starts[0] <= start < ends[0] and starts[-1] < stop <= ends[-1]
    assert starts[1:] == ends[:-1]
    assert lengths == sorted(lengths, reverse=True)
    for length, tokens in schedule[:-1]:  # so many of the newest are in segments no longer
        newest = max(start, stop - tokens)
        short = [s for s, own in zip(starts, lengths, strict=True) if own <= length]
        assert short and short[0] <= newest


@quick
@given(schedules, st.integers(1, 2000), windows, sinks)
def test_tokens_that_come_together_see_the_same_segments(schedule, length, window, first):
    """As many as come at once; so an old token's segment is one for all of them."""
    model = tiny_model(num_hidden_layers=1)
    (cache,) = bi_branch_cache(model, make_factors(model, 3, 3), window, 0, FastCache, first)
    cache.segments, cache.length = schedule, length
    seen = {}  # the segment of each old token
    for t in range(length, length + cache.at_once()):
        old = max(0, t + 1 - window - first)
        for span in cut(0, old, schedule):
            for token in range(span.start, min(span.stop, old)):
                own = (token // span.length, span.length)
                assert seen.setdefault(token, own) == own


# ----------------------------------------------------------------- attention, against a naive loop


def naive_attend(config, cache, q, k, v, first, old, schedule):
    """`attend` for q, k before rotation: each old key is rebuilt, turned to the middle of its
    segment, and its pairs damped; one head after the other, in float64.

    q [B, H, 1, D] stands at `cache.length` - 1; k, v [B, H_kv, n, D] are the full branch with their
    positions: k is rotated already, as in `attend`.
    """
    S, D, w = cache.sinks, q.shape[3], helpers.naive_frequencies(config)

    def turn(distance):
        return torch.polar(torch.ones_like(w), distance * w)

    turns = torch.zeros(old - first, D // 2, dtype=torch.complex128)
    for span in cut(first - S, old - S, schedule):
        for token in range(max(first - S, span.start), min(old - S, span.stop)):
            half = (span.length - 1) / 2
            middle = token // span.length * span.length + half
            mean = sum(turn(j - half) for j in range(span.length)) / span.length
            turns[token - (first - S)] = turn(S + middle) * mean

    def rebuild(latents, B, bias, b, own):
        y = latents.read(first - S, old - S)[b].double() @ B[:, own].double()
        return y if bias is None else y + bias[own].double()

    out = torch.zeros_like(q, dtype=torch.float64)
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        g = h // (q.shape[1] // k.shape[1])
        own = slice(g * D, (g + 1) * D)
        query = torch.complex(*q[b, h, 0].double().split(D // 2)) * turn(cache.length - 1)
        k_hat = rebuild(cache.c_k, cache.B_k, cache.k_bias, b, own)
        keys = [torch.complex(*y.split(D // 2, 1)) for y in (k_hat, k[b, g].double())]
        scores = (query.conj() * torch.cat([keys[0] * turns, keys[1]])).real.sum(1)
        v_hat = rebuild(cache.c_v, cache.B_v, cache.v_bias, b, own)
        out[b, h, 0] = (scores / math.sqrt(D)).softmax(0) @ torch.cat([v_hat, v[b, g].double()])
    return out


@settings(quick, max_examples=80)
@given(shapes, schedules, st.integers(1, 100), windows, sinks, widths, widths, groups, chunks)
def test_segments_equal_a_naive_loop(
    shape, schedule, T, window, first, k_bits, v_bits, group, chunk
):
    """A decode step after T tokens, in batches of two, chunks of every length."""
    model = tiny_model(num_hidden_layers=1, scale=0.3, **shape)
    factors = in_bits(make_factors(model, 5, 4), k_bits, v_bits, group)
    (cache,) = bi_branch_cache(model, factors, window, kind=FastCache, sinks=first)
    cache.segments, cache.chunk = schedule, chunk
    model(tiny_tokens(model, 2, T), [cache])
    cache.length = T  # the new token is T - 1: all latents are there
    t, S = T - 1, min(first, T)
    seen = max(0, T - (shape["sliding_window"] or T))
    old = max(S, T - min(window, shape["sliding_window"] or window))
    start = min(max(S, seen), old)
    generator = torch.Generator().manual_seed(T)
    D, H_kv = shape["head_dim"], shape["num_key_value_heads"]
    q = torch.randn(2, 4, 1, D, generator=generator)
    k, v = torch.randn(2, 2, H_kv, T - old + 1, D, generator=generator)
    expected = naive_attend(model.config, cache, q, k, v, start, old, schedule)
    ours = cache.attend(model.rope.rotate(q, t), k, v, start, old, model.rope)
    torch.testing.assert_close(ours.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("n", [7, 8])
def test_a_sum_is_that_of_its_parts(n, monkeypatch):
    """One for each thread, if they come out even."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(2, 3, n, generator=generator)
    c = torch.randn(2, n, 7, generator=generator)
    for threads in (1, 2, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)  # noqa: B023
        torch.testing.assert_close(segments.weighted_sum(p, c), p @ c)


def cache_of(config, n, rank=3, before=0):
    """A cache whose latents are random, behind `before` tokens of zeros; and q, k, v."""
    generator = torch.Generator().manual_seed(0)
    B = torch.randn(rank, config.d_kv, generator=generator) / math.sqrt(rank)
    pair = LowRank(torch.zeros(config.hidden_size, rank), B, bits=32)
    cache = FastCache(Attention(config), LayerFactors(pair, pair), 1)
    c = torch.randn(2, 1, n, rank, generator=generator)
    for latents, own in zip((cache.c_k, cache.c_v), c, strict=True):
        latents.append(torch.cat([torch.zeros(1, before, rank), own], 1))
    cache.length = before + n
    heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
    q, k, v = (torch.randn(1, h, 1, config.head_dim, generator=generator) for h in heads)
    return cache, q, k, v


def test_far_positions_are_as_exact_as_near_ones():
    """The 90 newest tokens of 100, and of 131,072, against float64: the same error."""
    config = tiny_config(head_dim=16, rope_theta=1e4, num_attention_heads=2)
    rope = Rope(config)
    errors = []
    for before in (10, 130_982):
        cache, q, k, v = cache_of(config, 90, before=before)
        t, k = cache.length - 1, torch.zeros_like(k)  # a score of 0, wherever it stands
        expected = naive_attend(config, cache, q, k, v, before, t, SEGMENTS)
        ours = cache.attend(rope.rotate(q, t), k, v, before, t, rope)
        errors.append((ours - expected).abs().max().item())
    assert errors[0] < 2e-6 and errors[1] < 2e-6, errors


def test_memory_is_the_scores_and_one_chunk():
    """With 1 query head, scores are 1 number a token; anything else that grew would show."""
    shape = {"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 9999}
    model = tiny_model(num_hidden_layers=1, **shape)
    for bits_ in (16, 4):
        factors = in_bits(init_factors("svd", model, [4], [4]), bits_, bits_, 128)
        for T in (2000, 9000):
            cache = bi_branch_cache(model, factors, 8, T + 1, FastCache)[0]
            cache.chunk = 512
            x, q = torch.zeros(1, T, 24), torch.zeros(1, 1, T, 6)
            cache.remember(x, q, q, q, model.rope)
            inputs = torch.zeros(1, 1, 24), *(torch.zeros(1, 1, 1, 6) for _ in range(3))
            known = [*cache.tensors(), model.rope.cos, model.rope.sin]
            with helpers.LargestTensor(known) as seen:
                cache.decode(*inputs, model.rope)
            # Scores and a chunk's latents in float32; the turns of the middles in complex128.
            assert 4 * T <= seen.largest <= max(4 * (T + 24), 4 * 512 * 4 * 4)


def test_turns_are_made_once_for_all_layers(monkeypatch):
    """And for as many steps as the segments lie where they are: here all are of 16 tokens."""
    model = tiny_model(num_hidden_layers=5)
    cache = bi_branch_cache(model, make_factors(model, 3, 3), 2, kind=FastCache)
    tokens = tiny_tokens(model, 1, 50)
    model(tokens[:, :20], cache)
    segments.middles.cache_clear()
    for t in range(20, 50):
        model(tokens[:, t : t + 1], cache)
    info = segments.middles.cache_info()
    assert (info.misses, info.hits) == (2, 148)


@pytest.mark.parametrize("sign", [1, -1])
def test_an_infinite_latent_is_never_a_weight_of_zero(sign):
    """A score of minus infinity would drop its token in silence."""
    config = tiny_config(head_dim=4, num_attention_heads=2, num_key_value_heads=1)
    cache, q, k, v = cache_of(config, 40, rank=1)
    cache.c_k.c[:, 3] = sign * math.inf
    rope = Rope(config)
    out = cache.attend(rope.rotate(q, 39), k, v, 0, 39, rope)
    assert not out.isfinite().any()


# ------------------------------------------------------------------ what the measurement says


def test_undamped_is_something_else():
    """And without damping a segment of one token is itself still."""
    model = tiny_model()
    factors = make_factors(model, 12, 13).in_bits(32, 32)  # of full rank
    passages = [tiny_tokens(model, 1, 60, seed=n) for n in range(2)]
    choices = [(((16, 0),), True), (((16, 0),), False), (((1, 3), (1, 0)), False)]
    rows = measure_segments(model, passages, 20, factors, choices, 4, 0)
    plain, damped, undamped, ones = (row["kl"] for row in rows)
    assert max(plain, ones) < 1e-5 < damped and abs(damped - undamped) > 0.1


def test_a_row_is_the_mean_over_predictions():
    """The plain cache's, against decoding step by step."""
    model = tiny_model()
    factors = make_factors(model, 5, 4)
    passages = [tiny_tokens(model, 1, 40, seed=n) for n in range(2)]
    kl, worse = [], []
    for tokens in passages:
        exact = model(tokens)[0, 20:-1].log_softmax(-1)
        cache = bi_branch_cache(model, factors, 4, sinks=1)
        ours = decode_all(model, tokens, 20, cache)[0, 20:-1].log_softmax(-1)
        kl.append((exact.exp() * (exact - ours)).sum(1))
        worse.append((exact - ours).gather(1, tokens[0, 21:, None]))
    (row,) = measure_segments(model, passages, 20, factors, [], 4, 1)
    assert row["kl"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-4)
    assert row["of_full"] == pytest.approx(torch.cat(worse).mean().exp().item(), rel=1e-4)
    assert (row["segments"], row["kl_of_plain"], row["of_plain"]) == ("1", 1, 1)


@pytest.mark.parametrize("text", ["128", "16:512,128", "16:512,128:2048,512"])
def test_segments_are_read_as_they_are_written(text):
    assert text_of(parse_segments(text)) == text
    assert parse_segments("16:512,128") == ((16, 512), (128, 0))
    for wrong in ("", "0", "16:512,100", "a:b", "128:5,16"):
        with pytest.raises(ValueError):
            parse_segments(wrong)


# ------------------------------------------------------------------------ a window in 8 bits


@settings(quick, max_examples=10)
@given(shapes, st.integers(1, 40), st.integers(1, 40), windows, sinks, st.integers(0, 90))
def test_a_window_in_8_bits(shape, prompt, n, window, first, expected):
    """What it holds of a token is what `quantize` made of it when it came, and nothing else of the
    cache changes; in bytes it is 8 bits a number, and 32 for each head."""
    model = tiny_model(scale=0.3, **shape)
    config = model.config
    factors = make_factors(model, 5, 4)
    tokens = tiny_tokens(model, 2, prompt + n)
    caches = []
    for kind in (SmallWindowCache, FastCache):
        cache = bi_branch_cache(model, factors, window, expected, kind, first)
        ours = decode_all(model, tokens, prompt, cache)
        caches.append(cache)
    small, large = (cache[0] for cache in caches)
    grouping = quant.Grouping(quant.CHANNELS, config.head_dim)
    for ours, exact in zip(small.kept(), large.kept(), strict=True):
        expected = quant.dequantize(quant.quantize(exact, 8, grouping), grouping)
        assert torch.equal(ours, expected)
    ring = small.tensors()[-3].shape[2]  # codes of the values
    of_head = 2 * 2 * config.num_key_value_heads * ring  # batch of 2, keys and values
    saved = of_head * (4 * config.head_dim - config.head_dim - 4)
    assert large.nbytes() - small.nbytes() == saved
    assert ours.isfinite().all()
