"""Factors: the initializations against what they minimize, bits, and their files."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cskv
import quant
from cskv import Factors, LayerFactors, LowRank, init_factors, rank_for
from support.command import UserError
from support.factors_file import load_factors, save_factors
from support.processes import calibrate_together
from tests import helpers
from tests.drawn import quick
from tests.helpers import assert_same_factors, in_bits, make_factors, tiny_model, tiny_tokens

seeds = st.integers(0, 10**6)


@quick
@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([2, 4, 16]), st.booleans())
def test_latents_of_values_are_rotated_once_for_groups_of_channels(r_k, r_v, bits, trained):
    """The product A B stays, and the length of latents. In groups of tokens each channel has scales
    of its own."""
    model = tiny_model()
    factors = make_factors(model, r_k, r_v)
    if trained:
        factors = factors.in_bits(None, 4)
    x = torch.randn(50, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    for group in (None, 64):
        whole = factors.map(lambda pair, group=group: replace(pair, group=group))
        few = whole.in_bits(4, bits)
        assert few.info == whole.info == {"init": "optimal", "trained": "none"}
        assert few.info is not whole.info and whole.info is not factors.info
        for before, after in zip(whole.layers, few.layers, strict=True):
            assert after.k.A is before.k.A and after.k.B is before.k.B
            rotated = bits < 16 and not trained and group is None
            assert (after.v.A is not before.v.A) == rotated
            torch.testing.assert_close(after.v.A @ after.v.B, before.v.A @ before.v.B)
            torch.testing.assert_close((x @ after.v.A).norm(dim=1), (x @ before.v.A).norm(dim=1))
            assert (after.v.bits, after.v.group, after.v.clamped) == (bits, group, False)


def test_rotation_spreads_outliers():
    """What it is for: one large channel no longer sets the step for the 31 others of its group."""
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(64, 32, generator=generator), torch.randn(32, 48, generator=generator)
    A[:, 0] *= 20
    plain = Factors([LayerFactors(LowRank(A, B), LowRank(A, B))])
    x = torch.randn(200, 64, generator=generator)
    errors = []
    for factors in (plain, plain.in_bits(v_bits=4)):
        pair = factors.layers[0].v
        c = quant.fake_quantize(x @ pair.A, 4, quant.Grouping(quant.CHANNELS))
        errors.append((c @ pair.B - x @ A @ B).square().mean())
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize(
    "name, ranks, message",
    [
        ("SVD", [1, 1], "no initialization"),
        ("optimal", [1, 1], "needs calibration"),
        ("svd", [0, 1], "not in 1"),
        ("svd", [1, 13], "not in 1"),
        ("svd", [1], "zip"),
        ("svd", [3, 3], "layer 1: v_proj has weights that are not finite"),
    ],
)
def test_bad_initializations(name, ranks, message):
    model = tiny_model()
    model.model.layers[1].self_attn.v_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=message):
        init_factors(name, model, ranks, [1] * len(ranks))


def test_bad_ratios_and_no_text():
    for ratio in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="compression ratio"):
            rank_for(ratio, 12)
    with pytest.raises(ValueError, match="longer text"):
        cskv.calibrate(tiny_model(), [])
    with pytest.raises(UserError, match="0 samples for 1 processes; give longer text"):
        calibrate_together(tiny_model(), [])


def test_random_factors_come_from_the_seed_alone():
    drawn = []
    for global_seed, seed in ((1, 5), (2, 5), (2, 6)):
        torch.manual_seed(global_seed)
        drawn.append(init_factors("random", tiny_model(), [3, 3], [3, 3], seed=seed))
    one, two, other = drawn
    assert_same_factors(one, two)
    for a, c in zip(one.pairs, other.pairs, strict=True):
        assert not torch.equal(a.A, c.A) and not torch.equal(a.B, c.B)


def test_factors_in_another_type():
    factors = make_factors(tiny_model(), 3, 5).to(torch.zeros(1, dtype=torch.float16))
    assert {M.dtype for pair in factors.pairs for M in (pair.A, pair.B)} == {torch.float16}
    assert factors.info == {"init": "optimal", "trained": "none"}


def test_rank_is_of_the_whole_layer():
    """The published code rounds down a head: int(0.2 * 64) * 3 = 36 for SmolLM2. Ours is 38."""
    assert [rank_for(ratio, 192) for ratio in (0.8, 0.5, 0, 0.999)] == [38, 96, 192, 1]
    assert rank_for(0.8, 64) == 13  # of 12.8


def loss(x, W, pair):
    """The paper's equation 1, as a mean over tokens of the squared distance."""
    return (x @ W - x @ pair.A @ pair.B).square().sum(1).mean()


def disturbed(pair, size, generator):
    """A step away from a pair, as training takes."""

    def moved(M):
        return M + size * M.std() * torch.randn(M.shape, generator=generator, dtype=M.dtype)

    return LowRank(moved(pair.A), moved(pair.B))


@quick
@given(st.integers(3, 12), st.integers(2, 10), st.integers(20, 40), seeds, st.data())
def test_optimal_loses_the_dropped_eigenvalues_and_nothing_goes_below(hidden, d_kv, T, seed, data):
    """For inputs x with channels of very different sizes."""
    rank = data.draw(st.integers(1, min(hidden, d_kv)))
    g = torch.Generator().manual_seed(seed)
    sizes = torch.exp(2 * torch.randn(hidden, generator=g, dtype=torch.float64))
    x = torch.randn(T, hidden, generator=g, dtype=torch.float64) * sizes
    W = torch.randn(hidden, d_kv, generator=g, dtype=torch.float64)
    moment = (x @ W).T @ (x @ W) / len(x)
    dropped = torch.linalg.eigvalsh(moment)[: d_kv - rank].clamp(min=0).sum()
    scale = moment.trace()
    optimum = cskv.optimal_factors(W, rank, moment)
    best = loss(x, W, optimum)
    assert abs(best - dropped) < 1e-10 * scale
    svd = cskv.svd_factors(W, rank)
    others = [disturbed(optimum, size, g) for size in (1e-3, 1e-1)]
    for other in (*others, svd, cskv.asvd_factors(W, rank, x.abs().mean(0))):
        assert loss(x, W, other) >= best - 1e-10 * scale
    # And svd is the best for the weight alone.
    lost = (W - svd.A @ svd.B).square().sum()
    dropped = torch.linalg.svdvals(W)[rank:].square().sum()
    torch.testing.assert_close(lost, dropped, atol=1e-9, rtol=1e-6)


def test_asvd_by_hand():
    """W = diag(3, 1), one direction kept, which plain SVD takes from the first channel.

    S = diag(mean |x|^0.5): for (1, 8.5), S W = diag(3, 2.92), the first still; for (1, 9.5), it is
    diag(3, 3.08). An exponent of 0.48 or 0.52 is another.
    A channel that is always 0 has no infinite factors.
    """
    W = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    cases = ((1.0, 8.5), [3.0, 0.0]), ((1.0, 9.5), [0.0, 1.0]), ((0.0, 1.0), [0.0, 1.0])
    for x_abs, kept in cases:
        pair = cskv.asvd_factors(W, 1, torch.tensor(x_abs))
        expected = torch.tensor(kept).diag()
        torch.testing.assert_close(pair.A @ pair.B, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sliding_window", [None, 5])
@pytest.mark.parametrize("first", [0, 1, 4])
def test_statistics_equal_a_naive_computation(first, sliding_window):
    """Of all tokens behind the sinks, in samples of different shapes, one of sinks alone. Biases
    are left out."""
    model = tiny_model(attention_bias=True, sliding_window=sliding_window)
    shapes = (2, 7), (1, 3), (1, 30)
    samples = [tiny_tokens(model, *shape, seed) for seed, shape in enumerate(shapes)]
    inputs = [helpers.layer_inputs(model, sample) for sample in samples]
    for i, seen in enumerate(cskv.calibrate(model, samples, first)):
        layer = zip(*(of_sample[i] for of_sample in inputs), strict=True)
        x, k, v = (torch.cat([y[:, first:].flatten(0, 1) for y in parts]) for parts in layer)
        assert seen.tokens == len(x) == sum(B * max(0, T - first) for B, T in shapes)
        torch.testing.assert_close(seen.x_abs, x.abs().mean(0), rtol=1e-5, atol=1e-6)
        for moment, y in ((seen.k_moment, k), (seen.v_moment, v)):
            expected = torch.einsum("ti,tj->ij", y, y) / len(y)  # y is rounded there to float32
            torch.testing.assert_close(moment, expected, rtol=1e-5, atol=1e-5)


def output_error(attention, pair, x):
    """Mean square of what the values' error adds to the layer's output, head by head, in double."""
    c = attention.config
    heads = c.num_attention_heads
    error = x.double() @ (attention.v_proj.weight.T.double() - pair.A.double() @ pair.B.double())
    error = error.unflatten(1, (c.num_key_value_heads, c.head_dim))
    error = error.repeat_interleave(heads // c.num_key_value_heads, dim=1)  # [T, H, D]
    W_O = attention.o_proj.weight.double().unflatten(1, (heads, c.head_dim))
    return torch.einsum("thd,ohd->tho", error, W_O).square().sum((1, 2)).mean().item()


def test_attention_factors_where_W_O_is_singular():
    """Keeps out a metric in float32, whose rounding is larger than what makes it invertible."""
    model = tiny_model(hidden_size=64, num_key_value_heads=2, head_dim=32, num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    attention.o_proj.weight[:] = torch.outer(torch.arange(64.0), torch.randn(128)) / 64
    statistics = cskv.calibrate(model, [tiny_tokens(model, 2, 100)])
    x, errors = torch.randn(50, 64), []
    for name in ("attention", "optimal"):
        factors = init_factors(name, model, [9], [9], statistics)
        assert all(M.isfinite().all() for pair in factors.pairs for M in (pair.A, pair.B))
        errors.append(output_error(attention, factors.layers[0].v, x))
    assert errors[0] <= errors[1] + 1e-6


def test_attention_factors_where_W_O_is_zero():
    """Nothing is lost then, whatever is kept: they are `optimal`."""
    model = tiny_model(num_hidden_layers=1)
    model.model.layers[0].self_attn.o_proj.weight.zero_()
    statistics = cskv.calibrate(model, [tiny_tokens(model, 2, 100)])
    weighed, plain = [
        init_factors(name, model, [3], [3], statistics).layers[0].v
        for name in ("attention", "optimal")
    ]
    torch.testing.assert_close(weighed.A @ weighed.B, plain.A @ plain.B)


@quick
@given(st.sampled_from([1, 2, 4]), st.integers(1, 5), st.integers(0, 20))
def test_attention_factors_are_the_best_for_the_output(H_kv, rank, seed):
    """No factors of that rank, `optimal` or disturbed ones, err less in what W_O makes of values;
    and what they err is the sum of the dropped eigenvalues of the weighed moment."""
    model = tiny_model(seed, num_key_value_heads=H_kv, num_hidden_layers=1)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, model.config.hidden_size, generator=generator)
    attention = model.model.layers[0].self_attn
    k, v = x @ attention.k_proj.weight.T, x @ attention.v_proj.weight.T
    statistics = [cskv.Statistics(x.abs().mean(0), k.T @ k / 200, v.T @ v / 200)]
    factors = [init_factors(n, model, [rank], [rank], statistics) for n in ("attention", "optimal")]
    ours, plain = (some.layers[0] for some in factors)
    torch.testing.assert_close(ours.k.A @ ours.k.B, plain.k.A @ plain.k.B)
    least = output_error(attention, ours.v, x)
    others = [disturbed(ours.v, size, generator) for size in (1e-3, 1e-1)]
    for other in (plain.v, *others):
        assert least <= output_error(attention, other, x) * (1 + 1e-4)
    M = cskv.output_metric(attention).double()
    weighed = torch.linalg.eigvals(statistics[0].v_moment.double() @ M).real.sort().values
    assert least == pytest.approx(weighed[:-rank].sum().item(), rel=1e-3)


@pytest.mark.parametrize("group", [None, 32, 128])
def test_factors_survive_a_file(tmp_path, group):
    """In equal files, though safetensors gives metadata a random order."""
    model, files = tiny_model(), [tmp_path / str(i) for i in range(5)]
    factors = in_bits(make_factors(model, 3, 5), 4, 2, group)
    factors.info["data"] = "some text"
    for path in files:
        save_factors(path, factors, model, torch.float32)
    again = load_factors(path, model)
    assert again.info == factors.info and again.info["init"] == "optimal"
    assert_same_factors(again, factors)
    assert [(pair.bits, pair.group) for pair in again.pairs] == [(4, group), (2, group)] * 2
    assert sorted(tmp_path.iterdir()) == files
    (data,) = {path.read_bytes() for path in files}
    assert int.from_bytes(data[:8], "little") % 8 == 0  # tensors stay aligned


def test_factors_fit_the_same_model_in_other_bits_and_no_other(tmp_path):
    model, path = tiny_model(), tmp_path / "f"
    save_factors(path, make_factors(model, 3, 5), model)
    for dtype in (torch.float16, torch.bfloat16):
        loaded = load_factors(path, tiny_model().to(dtype))
        assert loaded.layers[0].k.A.dtype == dtype
    model.model.layers[1].self_attn.v_proj.weight.mul_(-1)
    shapes = {"seed": 1}, {"num_hidden_layers": 3}, {"hidden_size": 30}
    for other in (model, *(tiny_model(**shape) for shape in shapes)):
        with pytest.raises(UserError, match="another model"):
            load_factors(path, other)


def test_what_a_file_cannot_hold_is_not_saved(tmp_path):
    model, path = tiny_model(), tmp_path / "f"
    factors = make_factors(model, 3, 5)
    mixed = [replace(layer, k=replace(layer.k, group=64)) for layer in factors.layers]
    with pytest.raises(UserError, match="in one file; give all the same"):
        save_factors(path, Factors(mixed, factors.info), model)
    for value in (math.inf, math.nan):
        factors.layers[0].k.A[0, 0] = value
        with pytest.raises(UserError, match=r"k_proj\.A has numbers that are not finite"):
            save_factors(path, factors, model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sides", ["A", "B", "AB"])
def test_numbers_beyond_the_type_of_the_file_lose_nothing(tmp_path, sides, dtype):
    """k_proj times 1e-7 lost 40% in float16 in silence."""
    model = tiny_model()
    for scale in (1e-30, 1e-7, 1e-4, 1.0, 1e6):
        factors = make_factors(model, 3, 5)
        expected = []
        for pair in factors.pairs:
            expected.append(pair.A.double() @ pair.B.double() * scale ** len(sides))
            for side in sides:
                getattr(pair, side).mul_(scale)
        save_factors(tmp_path / "f", factors, model, dtype)
        for pair, product in zip(load_factors(tmp_path / "f", model).pairs, expected, strict=True):
            error = (pair.A.double() @ pair.B.double() - product).norm() / product.norm()
            assert error < 0.01
