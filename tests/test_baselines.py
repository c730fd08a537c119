"""The baselines: each against a naive computation of its own, token by token, in float64."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cskv import init_factors
from experiments import baselines
from experiments.baselines import HeavyHitterCache, KiviCache, StreamingCache, TurboQuantCache
from model import Config, LayerCache, Rope, full_cache
from quant import CHANNELS, TOKENS, Grouping, bits_per_element, fake_quantize
from support.command import UserError
from tests import helpers
from tests.drawn import bits, quick, shapes, sinks
from tests.helpers import decode_all, tiny_config, tiny_model, tiny_tokens

heads = st.sampled_from([1, 2, 4])  # key/value heads, of 4 query heads
prompts, steps = st.integers(1, 20), st.integers(1, 12)
seeds = st.integers(0, 10**6)


class Sequence:
    """Random input of one layer, x, q, k, v for N tokens, and the layer's RoPE."""

    def __init__(self, config: Config, N: int, seed: int, batch: int = 2):
        g = torch.Generator().manual_seed(seed)
        H, H_kv, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.config, self.N, self.rope = config, N, Rope(config)
        self.x = torch.randn(batch, N, config.hidden_size, generator=g)
        self.q = 2 * torch.randn(batch, H, N, D, generator=g)
        self.k, self.v = torch.randn(2, batch, H_kv, N, D, generator=g).unbind(0)

    def feed(self, cache: LayerCache, prompt: int) -> Iterator[tuple[int, Tensor]]:
        return helpers.feed(cache, prompt, self.x, self.q, self.k, self.v, self.rope)

    def rotated(self, x: Tensor, start: int = 0) -> Tensor:
        """x [B, heads, T, D] in float64, turned to the positions from `start` on."""
        positions = start + torch.arange(x.shape[2])
        frequencies = helpers.naive_frequencies(self.config)
        rows = [helpers.naive_rotate(y.double(), positions, frequencies) for y in x.flatten(0, 1)]
        return torch.stack(rows).view(x.shape)

    def kv_head(self, h: int) -> int:
        return h // (self.config.num_attention_heads // self.config.num_key_value_heads)


def naive_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One rotated query [D] over k and v [n, D]: the output [D] and the probabilities [n]."""
    p = (k.double() @ q.double() / math.sqrt(len(q))).softmax(0)
    return p @ v.double(), p


def assert_near(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours.double(), expected, atol=2e-5, rtol=2e-5)


def assert_attends(sequence, t, ours, q, k, v) -> None:
    """ours [B, H, D] is what token t makes of rotated keys k and of values v [B, H_kv, n, D] that
    it sees; q [B, H, N, D] are rotated."""
    for b, h in itertools.product(range(len(ours)), range(ours.shape[1])):
        group = sequence.kv_head(h)
        seen = k[b, group], v[b, group]
        assert_near(ours[b, h], naive_attention(q[b, h, t], *seen)[0])


# ------------------------------------------------------------------------- budgets of token pruning


@quick
@given(st.integers(1, 60), steps, st.floats(0, 0.99), st.sampled_from([None, 7]))
def test_the_budget_is_a_share_of_the_prompt_and_fixed_after_it(T, steps, ratio, window):
    """In tokens held, and in bytes."""
    sequence = Sequence(tiny_config(sliding_window=window), T + steps, 0)
    for kind, least, extra in ((StreamingCache, 5, 0), (HeavyHitterCache, 2, 4)):
        if kind is HeavyHitterCache and window:
            continue
        budget = min(max(least, round((1 - ratio) * T)), window or 1000)
        cache = kind(sequence.config, ratio)
        assert cache.nbytes() == 0
        token_bytes = 2 * 4 * 6 + extra  # key and value of 6 channels, and H2O's score
        for t, _ in sequence.feed(cache, T):
            held = {tensor.shape[2] for tensor in cache.tensors()}
            assert held == {min(t + 1, budget)}
            assert cache.nbytes() == 2 * 2 * token_bytes * min(t + 1, budget)
        assert cache.budget == budget


BAD = [
    (KiviCache, {}, {"bits": 16}, "in 16 bits"),
    (KiviCache, {}, {"residual": 0}, "residual 0"),
    (StreamingCache, {"sliding_window": 4}, {}, "4 tokens are below 5"),
    (StreamingCache, {}, {"budget": 4}, "4 tokens are below 5"),
    (HeavyHitterCache, {}, {"budget": 1}, "1 tokens are below 2"),
    (HeavyHitterCache, {"sliding_window": 9}, {}, "sees the last 9 only"),
    *[(HeavyHitterCache, {}, {"ratio": ratio}, "ratio") for ratio in (-0.1, 1.0, math.nan)],
]


@pytest.mark.parametrize("kind, shape, settings, message", BAD)
def test_bad_settings(kind, shape, settings, message):
    with pytest.raises((UserError, ValueError), match=message):
        kind(tiny_config(**shape), **settings).set_budget(100)


# --------------------------------------------------------------------------------- StreamingLLM


@quick
@given(heads, prompts, steps, st.integers(5, 20), st.sampled_from([None, 6, 9]), seeds)
def test_streaming_renumbers_the_positions_of_what_it_keeps(
    H_kv, prompt, steps, budget, window, seed
):
    config = tiny_config(num_key_value_heads=H_kv, sliding_window=window)
    sequence = Sequence(config, prompt + steps, seed)
    cache = StreamingCache(config, budget=budget)
    budget = min(budget, window or budget)
    kept = list(range(prompt))
    for t, ours in sequence.feed(cache, prompt):
        kept.append(t)
        while len(kept) > budget:
            del kept[4]  # the oldest token that is no sink
        k, v = (y[:, :, kept] for y in (sequence.k, sequence.v))
        q = sequence.q[:, :, t : t + 1]
        k, q = sequence.rotated(k, 0), sequence.rotated(q, len(kept) - 1)
        assert_attends(sequence, 0, ours, q, k, v)


# ------------------------------------------------------------------------------------------ H2O


@quick
@given(heads, st.integers(1, 40), steps, st.integers(2, 20), seeds)
def test_heavy_hitters_equal_a_naive_computation(H_kv, prompt, steps, budget, seed):
    """Scores, kept tokens and outputs, from whole attention matrices and Python's lists."""
    config = tiny_config(num_key_value_heads=H_kv)
    sequence = Sequence(config, prompt + steps, seed)
    cache = HeavyHitterCache(config, budget=budget)
    N, recent = prompt + steps, budget - budget // 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "QUERIES", 7)  # so that a short prompt makes chunks
        ours = dict(sequence.feed(cache, prompt))
    rotated_q, rotated_k = sequence.rotated(sequence.q), sequence.rotated(sequence.k)
    for b, group in itertools.product(range(2), range(H_kv)):
        k, v = rotated_k[b, group], sequence.v[b, group]
        heads = [h for h in range(4) if sequence.kv_head(h) == group]
        scores = torch.zeros(N).double()  # of every token seen, dropped or not
        for h, i in itertools.product(heads, range(prompt)):
            scores[: i + 1] += naive_attention(rotated_q[b, h, i], k[: i + 1], v[: i + 1])[1]
        kept = list(range(prompt))
        if prompt > budget:
            older = sorted(kept[: prompt - recent], key=scores.__getitem__)
            kept = sorted(older[-(budget - recent) :]) + kept[prompt - recent :]
        for t in range(prompt, N):
            if len(kept) == budget:  # the new token is one of the recent ones
                kept.remove(min(kept[: budget - recent + 1], key=scores.__getitem__))
            kept.append(t)
            for h in heads:
                expected, p = naive_attention(rotated_q[b, h, t], k[kept], v[kept])
                assert_near(ours[t][b, h], expected)
                scores[kept] += p
        # Which tokens the slots hold is seen by their values.
        held = cache.v[b, group, : min(N, budget)]
        found = [(v == value).all(1).nonzero().item() for value in held]
        assert sorted(found) == kept
        assert_near(cache.scores[b, group, : len(found), 0], scores[found])


def test_a_prompt_is_scored_in_chunks():
    """No matrix of all queries by all keys: the working memory grows with T, not its square."""
    config = tiny_config()
    for T in (320, 640):  # whole chunks
        sequence = Sequence(config, T, 0, batch=1)
        q, k = (sequence.rope.rotate(y, 0) for y in (sequence.q, sequence.k))
        with helpers.LargestTensor([q, k]) as seen:
            baselines.attention_received(q, k)
        assert seen.largest == 4 * 4 * baselines.QUERIES * T  # 4 heads, float32


# ----------------------------------------------------------------------------------------- KIVI


def packed_tokens(length: int, residual: int) -> int:
    """Counted, not calculated: whole groups of 32 whose last token is older than the residual."""
    return 32 * sum(1 for last in range(31, length - residual, 32))


kivis = st.fixed_dictionaries({"bits": bits, "residual": st.integers(1, 50), "sinks": sinks})


@quick
@given(kivis, heads, st.integers(1, 110), steps, st.sampled_from([None, None, 5, 50]), seeds)
def test_kivi_attends_to_quantized_keys_and_values(kivi, H_kv, prompt, steps, window, seed):
    D = (6, 40)[seed % 2]
    config = tiny_config(num_key_value_heads=H_kv, sliding_window=window, head_dim=D)
    sequence = Sequence(config, prompt + steps, seed)
    cache = KiviCache(config, **kivi, expected=seed % 200)
    # Rotated in float32 as the cache does: in other digits, some number might round another way.
    k, q, v = sequence.rope.rotate(sequence.k, 0), sequence.rope.rotate(sequence.q, 0), sequence.v
    for t, ours in sequence.feed(cache, prompt):
        cache.chunk = 32  # so that a few tokens make several chunks
        S = min(kivi["sinks"], t + 1)
        old = S + packed_tokens(t + 1 - S, kivi["residual"])
        seen = slice(max(0, t + 1 - (window or t + 1)), t + 1)
        k_hat, v_hat = k.clone(), v.clone()
        if old > S:
            k_hat[:, :, S:old] = fake_quantize(k[:, :, S:old], kivi["bits"], Grouping(TOKENS))
            v_hat[:, :, S:old] = fake_quantize(v[:, :, S:old], kivi["bits"], Grouping(CHANNELS))
        assert_attends(sequence, t, ours, q, k_hat[:, :, seen], v_hat[:, :, seen])


@quick
@given(kivis, prompts, st.integers(1, 300), st.integers(0, 400), st.sampled_from([6, 32, 40]))
def test_kivi_takes_the_bytes_of_its_formula(kivi, prompt, steps, expected, D):
    config = tiny_config(head_dim=D, max_position_embeddings=1000)
    sequence = Sequence(config, prompt + steps, 0)
    cache = KiviCache(config, **kivi, expected=expected)
    assert cache.nbytes() == 0
    bits, sinks = kivi["bits"], kivi["sinks"]
    room = packed_tokens(max(prompt, expected) - sinks, kivi["residual"])
    for t, _ in sequence.feed(cache, prompt):
        length = t + 1
        old = packed_tokens(length - sinks, kivi["residual"])
        if room < old:
            room += 256 if room else 32  # an empty store starts with what it is given
        waiting = 2 * 4 * D * (length - old)  # float32
        assert kivi["residual"] <= length - sinks - old <= kivi["residual"] + 31 or not old
        taken = room if old else 0
        packed = round(D * taken * (bits_per_element(bits) + bits_per_element(bits, length=D)) / 8)
        assert cache.nbytes() == 2 * 2 * (packed + waiting)  # batch of 2, 2 heads
        assert cache.nbytes() == sum(s.numel() * s.element_size() for s in cache.tensors())


def test_kivi_unpacks_two_megabytes_at_a_time_or_1024_tokens():
    for D, chunk in ((32, 16384), (1024, 1024)):
        config = tiny_config(num_attention_heads=1, num_key_value_heads=1, head_dim=D)
        sequence = Sequence(config, 2 * chunk + 102, 0, batch=1)
        cache = KiviCache(config, 4, expected=2 * chunk + 102)
        steps = sequence.feed(cache, 2 * chunk + 100)
        next(steps)
        inputs = [sequence.x, sequence.q, sequence.k, sequence.v]
        known = [*cache.tensors(), *inputs, *vars(sequence.rope).values()]
        with helpers.LargestTensor(known) as seen:
            next(steps)
        assert seen.largest == 4 * chunk * D  # in float32


# ----------------------------------------------------------------------------- channel shrinking


@quick
@given(heads, prompts, steps, st.integers(1, 6), st.booleans(), st.sampled_from([None, 1, 9]))
def test_low_rank_equals_a_model_of_low_rank(H_kv, prompt, steps, rank, bias, window):
    shape = {"num_key_value_heads": H_kv, "attention_bias": bias, "sliding_window": window}
    model, changed = tiny_model(**shape), tiny_model(**shape)
    factors = init_factors("svd", model, [rank] * 2, [rank // 2 + 1] * 2)
    for layer, f in zip(changed.model.layers, factors.layers, strict=True):
        layer.self_attn.k_proj.weight.data = (f.k.A @ f.k.B).T
        layer.self_attn.v_proj.weight.data = (f.v.A @ f.v.B).T
    tokens = tiny_tokens(model, 2, prompt + steps)
    expected = decode_all(changed, tokens, prompt, full_cache(changed))
    pairs = list(zip(model.model.layers, factors.in_bits(32, 32).layers, strict=True))
    cache = [baselines.LowRankCache(layer.self_attn, own) for layer, own in pairs]
    ours = decode_all(model, tokens, prompt, cache)
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=2e-4)
    latents = 2 * (prompt + steps) * 4  # bytes of a channel of the batch of 2
    for layer, (_, own) in zip(cache, pairs, strict=True):  # and one token's keys and values
        channels = own.k.rank + own.v.rank
        assert layer.nbytes() == latents * channels + 2 * 2 * 4 * model.config.d_kv


# ----------------------------------------------------------------------------------- TurboQuant


@pytest.mark.parametrize("bits, error", [(2, 0.117), (3, 0.03454), (4, 0.009497)])
def test_turboquant_loses_what_the_best_levels_lose(bits, error):
    """Each level is the mean of what is nearest to it of a normal distribution, here of two million
    numbers. The squared errors are those of [6, table I], also for vectors with some large
    channels; nearly, since 256 channels are not quite normal."""
    generator = torch.Generator().manual_seed(0)
    above = torch.tensor(baselines.LEVELS[bits])
    levels = torch.cat([-above.flip(0), above])
    z = torch.randn(2_000_000, generator=generator)
    nearest = torch.bucketize(z, (levels[1:] + levels[:-1]) / 2)
    means = torch.stack([z[nearest == n].mean() for n in range(len(levels))])
    torch.testing.assert_close(means, levels, atol=6e-3, rtol=0)
    y = torch.randn(2, 2, 500, 256, generator=generator)
    y[..., :32] *= 4
    cache = TurboQuantCache(tiny_config(head_dim=256), bits)
    codes, norms = cache.encode(y)
    assert codes.dtype == torch.uint8 and codes.shape == (2, 2, 500, 256 * bits // 8)
    lost = (cache.rebuild(codes, norms, y) - y).square().sum(3) / y.square().sum(3)
    assert lost.mean() == pytest.approx(error, rel=0.05)


@quick
@given(shapes, st.integers(1, 30), st.integers(1, 30), st.sampled_from([2, 3, 4]))
def test_turboquant_attends_to_what_it_keeps(shape, prompt, n, bits):
    """A layer, step by step, over keys and values that were encoded alone."""
    config = tiny_config(**shape)
    cache = TurboQuantCache(config, bits, prompt)
    sequence = Sequence(config, prompt + n, seed=0)
    k, q = (sequence.rope.rotate(y, 0) for y in (sequence.k, sequence.q))
    k_hat, v_hat = (cache.rebuild(*cache.encode(y), y) for y in (k, sequence.v))
    for t, ours in sequence.feed(cache, prompt):
        seen = slice(max(0, t + 1 - (config.sliding_window or t + 1)), t + 1)
        assert_attends(sequence, t, ours, q, k_hat[:, :, seen], v_hat[:, :, seen])
