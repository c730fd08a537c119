"""Group quantization: codes, their limits, the straight-through gradient, and packed storage."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import quant
from quant import BITS, CHANNELS, GROUP, TOKENS, Grouping, Packed, fake_quantize, quantize
from tests.drawn import bits, quick

CLAMPED = Grouping(TOKENS, clamped=True)

dims = st.sampled_from([TOKENS, CHANNELS])
sizes = st.integers(1, 80)
groups = st.sampled_from([GROUP, 2 * GROUP])
residuals = st.sampled_from([0, 1, 4, 50])


@st.composite
def inputs(draw, tokens=sizes):
    """Numbers of any size and offset: groups that lie far off zero, and some with no width."""
    shape = draw(st.integers(1, 3)), draw(tokens), draw(sizes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(shape, generator=generator) * 10 ** draw(st.floats(-4, 2))
    x += draw(st.sampled_from([0.0, 3.0, -100.0, 1e-6]))
    return x if draw(st.booleans()) else x[..., :1].expand(shape).clone()


def naive_groups(x, dim, group):
    """Yields (group's place, its elements as a list), with Python's own loops."""
    for b in range(x.shape[0]):
        for other in range(x.shape[3 - (dim % 3)]):  # the one of dimensions 1 and 2 not grouped
            line = x[b, :, other] if dim == TOKENS else x[b, other]
            for g in range(math.ceil(len(line) / group)):
                place = (b, g, other) if dim == TOKENS else (b, other, g)
                yield place, line[g * group : (g + 1) * group].tolist()


@quick
@given(inputs(), bits, dims, groups)
def test_stored_value_is_the_nearest_level_of_a_narrow_group(x, bits, dim, group):
    """So the error is at most half a step."""
    q, stored = (f(x, bits, Grouping(dim, group)) for f in (quantize, fake_quantize))
    assert q.codes.dtype == torch.uint8 and int(q.codes.max()) < 2**bits
    for (place, before), (_, after) in zip(
        naive_groups(x, dim, group), naive_groups(stored, dim, group), strict=True
    ):
        scale, minimum = q.scale[place].item(), q.minimum[place].item()
        levels = [minimum + scale * i for i in range(2**bits)]
        largest = max(map(abs, before))
        # The stored limits hold the whole group, and are no wider than 16 bits make necessary.
        assert minimum <= min(before)
        assert levels[-1] >= max(before) - 1e-6 * largest
        slack = largest * 6 / 1024 + 2**bits * 2**-23
        assert scale * (2**bits - 1) <= max(before) - min(before) + slack
        rounding = 2**-22 * largest  # of float32
        for a, b in zip(before, after, strict=True):
            nearest = min(abs(level - a) for level in levels)
            assert abs(b - a) <= nearest + 1e-6 * max(1e-4, abs(a))
            assert min(abs(b - level) for level in levels) <= 1e-6 * max(1e-4, abs(b))
            assert abs(a - b) <= scale / 2 * (1 + 1e-5) + rounding


@pytest.mark.parametrize("bits", BITS)  # drawn, 3 bits may not come up
@quick
@given(st.integers(1, 3), st.integers(1, 4), sizes, st.integers(0, 99))
def test_pack_holds_exactly_its_bits_and_unpack_gives_them_back(bits, batch, groups, C, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = batch, groups * GROUP, C
    codes = torch.randint(2**bits, shape, generator=generator, dtype=torch.uint8)
    packed = quant.pack(codes, bits)
    assert 8 * packed.numel() == bits * codes.numel() and packed.dtype == torch.uint8
    assert torch.equal(quant.unpack(packed, bits), codes)


def test_pack_by_hand():
    """The layout that the docstring shows: rows of 4 bits hold tokens i and i + 16."""
    codes = torch.zeros(32, 1, dtype=torch.uint8)
    codes[0], codes[16], codes[1], codes[31] = 5, 9, 2, 15
    packed = quant.pack(codes, 4)[:, 0].tolist()
    assert packed == [9 * 16 + 5, 2] + [0] * 13 + [15 * 16]


@quick
@given(inputs(st.integers(1, 200)), bits, dims, groups, st.booleans(), residuals, st.data())
def test_packed_storage_returns_what_fake_quantization_returned(
    x, bits, dim, group, clamped, residual, data
):
    """Bit for bit, whole or in pieces, however it was filled, of whole groups older than the
    residual; of younger tokens what their type makes of them. And it costs what it should."""
    grouping, (B, T, C) = Grouping(dim, group, clamped), x.shape
    dtype = data.draw(st.sampled_from([torch.float16, torch.float32]))
    storage = Packed(bits, grouping, residual, data.draw(st.integers(0, 300)), dtype)
    for part in x.split(data.draw(st.integers(1, T)), 1):
        storage.append(part)
    packed = max(0, T - residual) // group * group
    assert storage.length == T and storage.packed == packed
    stored = x.to(dtype).float()
    if packed:
        stored[:, :packed] = fake_quantize(stored[:, :packed], bits, grouping)
    start = data.draw(st.integers(0, T - 1))
    stop = data.draw(st.integers(start + 1, T))
    assert torch.equal(storage.read(start, stop), stored[:, start:stop])
    assert storage.waiting.untyped_storage().nbytes() == B * (T - packed) * C * dtype.itemsize

    exact = Packed(bits, grouping, residual, T, dtype)
    exact.append(x)
    nbytes = sum(t.untyped_storage().nbytes() for t in exact.tensors())
    shared = sum(1 for _ in naive_groups(x[:, :packed], dim, group)) * 2 * 16
    waiting = B * (T - packed) * C * 8 * dtype.itemsize
    assert 8 * nbytes == bits * B * packed * C + shared + waiting
    if packed:
        per_element = quant.bits_per_element(bits, group, (B, packed, C)[dim])
        assert bits * B * packed * C + shared == pytest.approx(per_element * B * packed * C)


def test_bits_per_element():
    assert [quant.bits_per_element(b) for b in BITS] == [3, 4, 5, 9]
    assert quant.bits_per_element(4, length=64) == 5
    assert quant.bits_per_element(4, 128, 512) == 4.25
    assert quant.bits_per_element(4, length=38) == 4 + 2 * 32 / 38  # a group of 32 and one of 6
    assert quant.bits_per_element(2, length=1) == 34


@pytest.mark.parametrize("group", [GROUP, 2 * GROUP, 16 * GROUP])
def test_packed_storage_grows_rarely(group):
    storage, places = Packed(4, Grouping(TOKENS, group)), set()
    for _ in range(1280 // group):
        storage.append(torch.randn(1, group, 3))
        places.add(tuple(t.data_ptr() for t in storage.tensors()))
        room = storage.buffers[0].shape[1] * group - storage.length
        assert 0 <= room < Packed.grow and storage.packed == storage.length
    assert len(places) <= 6


def gradient_of(x, bits, grouping, weights):
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        (fake_quantize(x, bits, grouping) * weights).sum().backward()
    return x.grad


def test_the_ends_of_a_group_have_a_gradient():
    """They are within the levels, exactly on them."""
    x = torch.arange(4.0)[:, None]
    assert gradient_of(x, 2, Grouping(TOKENS), 1).flatten().tolist() == [1, 1, 1, 1]


@quick
@given(inputs(), bits, dims, st.booleans())
def test_gradient_is_that_of_a_clamp_to_the_levels(x, bits, dim, clamped):
    """Straight through: finite differences of clamp(x, lowest level, highest level), in double."""
    grouping = Grouping(dim, clamped=clamped)
    q, n = quantize(x, bits, grouping), x.shape[dim]
    low = quant.repeat_per_group(q.minimum, n, grouping).double()
    high = low + quant.repeat_per_group(q.scale, n, grouping).double() * (2**bits - 1)

    def clamp(y):
        return torch.minimum(torch.maximum(y, low), high)

    weights = torch.arange(1.0, x.numel() + 1).view(x.shape)
    gradient = gradient_of(x, bits, grouping, weights)
    x64, step = x.double(), 1e-9
    slope = (clamp(x64 + step) - clamp(x64 - step)) / (2 * step)
    kink = ((x64 - low).abs() < 1e-5) | ((x64 - high).abs() < 1e-5)  # not differentiable there
    kink |= (high - low) < 1e-3 * x64.abs()  # levels closer than float32 can tell
    expected = slope * weights
    torch.testing.assert_close(gradient.double()[~kink], expected[~kink], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("numbers", "plain", "clamped"),
    [
        ([10, 11, 12, 13], [10, 11, 12, 13], [3, 3, 3, 3]),  # the example at the top of quant.py
        ([-7, -6, -5, -4], [-7, -6, -5, -4], [-3, -3, -3, -3]),  # levels -3 .. 0
        ([-1, 0, 1, 2], [-1, 0, 1, 2], [-1, 0, 1, 2]),  # a group around zero
    ],
)
def test_clamped_zero_point_by_hand(numbers, plain, clamped):
    x = torch.tensor(numbers).float()[:, None]
    stored = fake_quantize(x, 2, Grouping(TOKENS)).flatten().tolist()
    assert stored == pytest.approx(plain, abs=0.03)
    assert fake_quantize(x, 2, CLAMPED).flatten().tolist() == pytest.approx(clamped, abs=0.01)


@quick
@given(inputs(), bits, dims)
def test_the_clamped_zero_point_is_that_of_the_published_code(x, bits, dim):
    """s = (max - min) / levels, z = round(-min / s) clamped to the levels; x is rounded to
    s (c - z). Computed in Python's numbers, group by group."""
    q, levels = quantize(x, bits, Grouping(dim, clamped=True)), 2**bits - 1
    for place, group in naive_groups(x, dim, GROUP):
        scale = q.scale[place].item()
        exact = (max(group) - min(group)) / levels
        assert scale == pytest.approx(max(exact, 2**-24), rel=2e-3, abs=2**-24)
        zero = -q.minimum[place].item() / scale
        assert zero == pytest.approx(
            min(max(round(-min(group) / scale), 0), levels), abs=0.02 * levels + 0.51
        )
        assert 0 <= zero <= levels * (1 + 1e-3)


@pytest.mark.parametrize(("offset", "ours", "theirs"), [(5, 0.015, 0.275), (10, 0.008, 0.595)])
def test_clamped_zero_point_ruins_groups_off_zero(offset, ours, theirs):
    """The relative errors that a Gaussian of mean / std = 5 and 10 has in 4 bits."""
    x = torch.randn(6400, 32, generator=torch.Generator().manual_seed(0)) + offset
    for grouping, error in ((Grouping(TOKENS), ours), (CLAMPED, theirs)):
        lost = fake_quantize(x, 4, grouping) - x
        assert (lost.norm() / x.norm()).item() == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_inputs_keep_their_type(dtype):
    x = torch.randn(2, 40, 7).to(dtype)
    expected = fake_quantize(x.float(), 4, Grouping(TOKENS)).to(dtype)
    stored = fake_quantize(x, 4, Grouping(TOKENS))
    assert stored.dtype == dtype and torch.equal(stored, expected)


LIMITS = [  # of a group: its minimum, its scale, both; and what is no number
    [-65505.0, 0.0, 1.0],
    [65504.0 * 300, 0.0, 1.0],
    [1e8, -1e8, 5.0],
    [math.inf, 0.0, 1.0],
    [math.nan, 0.0, 1.0],
]


@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("numbers", LIMITS, ids=str)
def test_limits_beyond_sixteen_bits_never_read_back_as_other_numbers(numbers, clamped):
    """A group whose minimum or scale float16 cannot hold is not finite, and so seen at once; the
    groups beside it are as they were."""
    x = torch.zeros(40, 2)
    x[32:35, 1] = torch.tensor(numbers)
    grouping = Grouping(TOKENS, clamped=clamped)
    stored = quant.dequantize(quantize(x, 8, grouping), grouping)
    assert not stored[32:, 1].isfinite().any()
    assert stored[:32].isfinite().all() and stored[32:, 0].isfinite().all()
    packed = Packed(8, grouping)
    packed.append(torch.cat([x, x[8:32]])[None])
    assert not packed.read(32, 64)[0, :, 1].isfinite().any()


def test_values_beyond_sixteen_bits_are_kept_where_the_limits_hold_them():
    """The levels go on above float16's range as far as the scale reaches."""
    x = torch.tensor([[1e6, -65504.0, 5.0, 0.0]]).T
    stored = fake_quantize(x, 8, Grouping(TOKENS))
    assert (stored - x).abs().max() < (1e6 + 65504) / 255 * 0.51
