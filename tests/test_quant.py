"""Group quantization: codes, their limits, the straight-through gradient, and packed storage."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

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


def naive_groups(x, dim, size):
    """Yields (group's place, its elements as a list), with Python's own loops."""
    for b, sequence in enumerate(x):
        for other, line in enumerate(sequence.T if dim == TOKENS else sequence):
            for g in range(math.ceil(len(line) / size)):
                place = (b, g, other) if dim == TOKENS else (b, other, g)
                yield place, line[g * size : (g + 1) * size].tolist()


@quick
@given(inputs(), bits, dims, groups, st.booleans())
def test_stored_value_is_the_nearest_level(x, bits, dim, size, clamped):
    """Of a narrow group, so the error is at most half a step. Or of the published code's: x is
    rounded to s (c - z), with s = (max - min) / levels and z = round(-min / s) clamped to the
    levels. In Python's numbers, group by group."""
    q, stored = (f(x, bits, Grouping(dim, size, clamped)) for f in (quantize, fake_quantize))
    assert q.codes.dtype == torch.uint8 and int(q.codes.max()) < 2**bits
    both = zip(naive_groups(x, dim, size), naive_groups(stored, dim, size), strict=True)
    for (place, before), (_, after) in both:
        scale, minimum, most = q.scale[place].item(), q.minimum[place].item(), 2**bits - 1
        levels = [minimum + scale * i for i in range(2**bits)]
        largest, width = max(map(abs, before)), max(before) - min(before)
        if clamped:
            assert scale == pytest.approx(max(width / most, 2**-24), rel=2e-3, abs=2**-24)
            zero, expected = -minimum / scale, min(max(round(-min(before) / scale), 0), most)
            assert zero == pytest.approx(expected, abs=0.02 * most + 0.51)
            assert 0 <= zero <= most * (1 + 1e-3)
        else:  # the limits hold the whole group, and are no wider than 16 bits make necessary
            assert minimum <= min(before) and levels[-1] >= max(before) - 1e-6 * largest
            assert scale * most <= width + largest * 6 / 1024 + 2**bits * 2**-23
        for a, b in zip(before, after, strict=True):
            nearest = min(abs(level - a) for level in levels)
            assert abs(b - a) <= nearest + 1e-6 * max(1e-4, abs(a))
            assert min(abs(b - level) for level in levels) <= 1e-6 * max(1e-4, abs(b))
            assert clamped or abs(a - b) <= scale / 2 * (1 + 1e-5) + 2**-22 * largest


@pytest.mark.parametrize("bits", BITS)  # drawn, 3 bits may not come up
@quick
@given(st.integers(1, 3), st.integers(1, 4), sizes, st.integers(0, 99))
def test_pack_holds_exactly_its_bits_and_unpack_gives_them_back(bits, batch, blocks, C, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = batch, blocks * GROUP, C
    codes = torch.randint(2**bits, shape, generator=generator, dtype=torch.uint8)
    packed = quant.pack(codes, bits)
    assert 8 * packed.numel() == bits * codes.numel() and packed.dtype == torch.uint8
    assert torch.equal(quant.unpack(packed, bits), codes)


def test_pack_by_hand():
    """Rows of 4 bits hold tokens i and i + 16."""
    codes = torch.zeros(32, 1, dtype=torch.uint8)
    codes[0], codes[16], codes[1], codes[31] = 5, 9, 2, 15
    assert quant.pack(codes, 4)[:, 0].tolist() == [9 * 16 + 5, 2] + [0] * 13 + [15 * 16]


@quick
@given(inputs(st.integers(1, 200)), bits, dims, groups, st.booleans(), residuals, st.data())
def test_packed_storage_returns_what_fake_quantization_returned(
    x, bits, dim, size, clamped, residual, data
):
    """Bit for bit, whole or in pieces, however it was filled, of whole groups older than the
    residual; of younger tokens what their type makes of them. And it costs what it should."""
    grouping, (B, T, C) = Grouping(dim, size, clamped), x.shape
    dtype = data.draw(st.sampled_from([torch.float16, torch.float32]))
    storage = Packed(bits, grouping, residual, data.draw(st.integers(0, 300)), dtype)
    for part in x.split(data.draw(st.integers(1, T)), 1):
        storage.append(part)
    packed = max(0, T - residual) // size * size
    assert storage.length == T and storage.packed == packed
    stored = x.to(dtype).float()
    if packed:
        stored[:, :packed] = fake_quantize(stored[:, :packed], bits, grouping)
    start = data.draw(st.integers(0, T - 1))
    stop = data.draw(st.integers(start + 1, T))
    assert torch.equal(storage.read(start, stop), stored[:, start:stop])
    waiting = B * (T - packed) * C * dtype.itemsize
    assert storage.waiting.untyped_storage().nbytes() == waiting

    exact = Packed(bits, grouping, residual, T, dtype)
    exact.append(x)
    shared = sum(1 for _ in naive_groups(x[:, :packed], dim, size)) * 2 * 16
    bits_packed = bits * B * packed * C + shared
    nbytes = sum(t.untyped_storage().nbytes() for t in exact.tensors())
    assert 8 * nbytes == bits_packed + 8 * waiting
    if packed:
        per_element = quant.bits_per_element(bits, size, (B, packed, C)[dim])
        assert bits_packed == pytest.approx(per_element * B * packed * C)
    exact.append(torch.zeros(B, exact.until_packed() - 1, C))
    assert (exact.packed, exact.until_packed()) == (packed, 1)
    exact.append(torch.zeros(B, 1, C))
    assert exact.packed == packed + size


def test_bits_per_element():
    assert [quant.bits_per_element(b) for b in BITS] == [3, 4, 5, 9]
    assert quant.bits_per_element(4, 128, 512) == 4.25
    assert quant.bits_per_element(4, length=38) == 4 + 2 * 32 / 38  # a group of 32 and one of 6


@pytest.mark.parametrize("size", [GROUP, 2 * GROUP, 16 * GROUP])
def test_packed_storage_grows_rarely(size):
    storage, places = Packed(4, Grouping(TOKENS, size)), set()
    for _ in range(1280 // size):
        storage.append(torch.randn(1, size, 3))
        places.add(tuple(t.data_ptr() for t in storage.tensors()))
        room = storage.buffers[0].shape[1] * size - storage.length
        assert 0 <= room < Packed.grow and storage.packed == storage.length
    assert len(places) <= 6


def test_packed_storage_of_nothing():
    assert Packed(4, Grouping(TOKENS)).tensors() == []
    with pytest.raises(ValueError, match="groups of 48 are packed in multiples of 32"):
        Packed(4, Grouping(TOKENS, 48))


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
    weights = torch.arange(1.0, x.numel() + 1).view(x.shape)
    x64, step = x.double(), 1e-9
    above, below = (y.maximum(low).minimum(high) for y in (x64 + step, x64 - step))
    kink = ((x64 - low).abs() < 1e-5) | ((x64 - high).abs() < 1e-5)  # not differentiable there
    kink |= (high - low) < 1e-3 * x64.abs()  # levels closer than float32 can tell
    ours = gradient_of(x, bits, grouping, weights).double()
    expected = (above - below) / (2 * step) * weights
    assert_close(ours[~kink], expected[~kink], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("numbers", "clamped", "gradient"),
    [
        ([10, 11, 12, 13], [3, 3, 3, 3], 0),  # the example at the top of quant.py
        ([-7, -6, -5, -4], [-3, -3, -3, -3], 0),  # levels -3 .. 0
        ([-1, 0, 1, 2], [-1, 0, 1, 2], 1),  # a group around zero
    ],
)
def test_clamped_zero_point_by_hand(numbers, clamped, gradient):
    x = torch.tensor(numbers).float()[:, None]
    stored = fake_quantize(x, 2, Grouping(TOKENS)).flatten().tolist()
    assert stored == pytest.approx(numbers, abs=0.03)
    assert fake_quantize(x, 2, CLAMPED).flatten().tolist() == pytest.approx(clamped, abs=0.01)
    assert gradient_of(x, 2, CLAMPED, 1).flatten().tolist() == [gradient] * 4


@pytest.mark.parametrize(("offset", "ours", "theirs"), [(5, 0.015, 0.275), (10, 0.008, 0.595)])
def test_minimum_keeps_groups_off_zero_and_clamped_zero_point_ruins_them(offset, ours, theirs):
    """The relative errors that a Gaussian of mean / std = 5 and 10 has in 4 bits."""
    x = torch.randn(6400, 32, generator=torch.Generator().manual_seed(0)) + offset
    for grouping, error in ((Grouping(TOKENS), ours), (CLAMPED, theirs)):
        lost = fake_quantize(x, 4, grouping) - x
        assert (lost.norm() / x.norm()).item() == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_inputs_keep_their_type(dtype):
    x = torch.randn(2, 40, 7).to(dtype)
    stored = fake_quantize(x, 4, Grouping(TOKENS))
    assert torch.equal(stored, fake_quantize(x.float(), 4, Grouping(TOKENS)).to(dtype))
    assert stored.dtype == dtype


# Of a group: its minimum, its scale, both; and what is no number.
BEYOND = [[-65505.0, 0.0], [65504.0 * 300, 0.0], [1e8, -1e8], [math.inf, 0.0], [math.nan, 0.0]]


@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("numbers", BEYOND, ids=str)
def test_limits_beyond_sixteen_bits_never_read_back_as_other_numbers(numbers, clamped):
    """A group whose minimum or scale float16 cannot hold is not finite, and so seen at once; the
    groups beside it are as they were."""
    x = torch.zeros(64, 2)
    x[32:35, 1] = torch.tensor([*numbers, 1.0])
    grouping = Grouping(TOKENS, clamped=clamped)
    packed = Packed(8, grouping)
    packed.append(x[None])
    for stored in (quant.dequantize(quantize(x, 8, grouping), grouping), packed.read(0, 64)[0]):
        assert not stored[32:, 1].isfinite().any()
        assert stored[:32].isfinite().all() and stored[32:, 0].isfinite().all()


def test_values_beyond_sixteen_bits_are_kept_where_the_limits_hold_them():
    """The levels go on above float16's range as far as the scale reaches."""
    x = torch.tensor([[1e6, -65504.0, 5.0, 0.0]]).T
    stored = fake_quantize(x, 8, Grouping(TOKENS))
    assert (stored - x).abs().max() < (1e6 + 65504) / 255 * 0.51
