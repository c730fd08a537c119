"""Problem d: groups, codes, gradients and bytes, each written out in another way."""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from course.checks.telling import finds_numbers
from course.sandbox import Draw, Failed, Sandbox, expect, look

DIMS = (-2, -1)  # tokens, channels
SIZES = (32, 16, 128)  # numbers of a group


class Groups(NamedTuple):
    """The arguments of a quant.Grouping."""

    dim: int
    size: int
    clamped: bool


def settings(draw: Draw, widths: tuple, clamped=(False,)) -> Iterator[tuple[int, Groups, str]]:
    """Bits and groups that are checked, and a description; every size in turn."""
    first = draw.integer(1, len(SIZES))
    for n, (bits, dim, clamp) in enumerate(product(widths, DIMS, clamped), first):
        groups = Groups(dim, SIZES[n % len(SIZES)], clamp)
        yield bits, groups, f"{bits} bits, {groups}"


def per_group(x: Tensor, groups: Groups, reduce=Tensor.amin) -> Tensor:
    """A number for every group: its least one, or as `reduce` says."""
    parts = x.split(groups.size, groups.dim)
    return torch.cat([reduce(part, groups.dim, keepdim=True) for part in parts], groups.dim)


def spread(numbers: Tensor, groups: Groups, x: Tensor) -> Tensor:
    """Each element of x gets the number of its group, in float64."""
    each = numbers.double().repeat_interleave(groups.size, groups.dim)
    return each.narrow(groups.dim, 0, x.shape[groups.dim])


def draw_shape(draw: Draw, groups: Groups, least=1) -> list[int]:
    """[B, T, C]; along `dim` some whole groups and one that may be short, of `least` or more. Of
    another size than 32 there are several, so that groups of 32 are others."""
    shape = [draw.integer(1, 2), draw.integer(2, 5), draw.integer(2, 5)]
    size = groups.size
    whole = draw.integer(0 if size == 32 else 1, 2)
    shape[groups.dim] = size * whole + draw.choose([least, 7, size - 1, size])
    return shape


def draw_far(draw: Draw, groups: Groups) -> Tensor:
    """x [B, T, C] that may be far from 0."""
    x = draw.normal(*draw_shape(draw, groups))
    return (2 * x + draw.choose([0, 10, -30])).float()


def limits_hold_the_group(student: Sandbox, draw: Draw) -> None:
    """Scale and minimum are 16-bit, one for each `size` neighbours along `dim`; minimum and
    minimum + (2^bits - 1) scale hold all of the group, and hardly more."""
    for bits, groups, at in settings(draw, (2, 3, 4, 8)):
        x = draw_far(draw, groups)
        answer = student.ask("scenarios.limits", {"x": x}, bits=bits, groups=groups)
        low = per_group(x, groups).double()
        high = per_group(x, groups, Tensor.amax).double()
        step = look(answer, "scale", low.shape, torch.float16).double()
        least = look(answer, "minimum", low.shape, torch.float16).double()
        most = least + step * (2**bits - 1)
        if (least > low).any() or (most < high).any():
            raise Failed(f"{at}: a group reaches beyond its limits; round outwards")
        slack = 0.01 * (high - low) + 0.005 * torch.maximum(low.abs(), high.abs()) + 1e-4
        if (low - least > slack).any() or (most - high > slack).any():
            raise Failed(f"{at}: the limits lie far outside of the group")


def clamped_limits(student: Sandbox, draw: Draw) -> None:
    """`clamped`: scale = (max - min) / (2^bits - 1), the whole-number zero-point -min / scale is
    forced into 0 .. 2^bits - 1, and the minimum is that of the levels that are left."""
    for bits, groups, at in settings(draw, (2, 4, 8), (True,)):
        x, _, step, least = draw_exact(draw, bits, groups)
        answer = student.ask("scenarios.limits", {"x": x.float()}, bits=bits, groups=groups)
        want = -step * (-least / step).clamp(0, 2**bits - 1)
        expect(answer, "scale", step, 1e-3, at, torch.float16)
        expect(answer, "minimum", want, 1e-3, at, torch.float16)


def draw_exact(draw: Draw, bits: int, groups: Groups) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, its codes, and scale and minimum of every group, all exact in 16 bits.

    x = minimum + scale * (code + u), |u| < 0.4; the least and the largest code occur in each group,
    with u = 0.
    """
    shape = draw_shape(draw, groups, least=2)
    levels = 2**bits - 1
    codes = draw.whole(0, levels, *shape)
    for part in codes.split(groups.size, groups.dim):
        part.narrow(groups.dim, 0, 1).fill_(0)
        part.narrow(groups.dim, 1, 1).fill_(levels)
    each = per_group(codes, groups).shape
    step = 2.0 ** draw.whole(-3, 1, *each).double()
    least = step * draw.whole(-2 * levels, levels, *each).double()
    u = 0.8 * (draw.uniform(*shape) - 0.5) * (codes > 0) * (codes < levels)
    x = spread(least, groups, codes) + spread(step, groups, codes) * (codes + u)
    return x, codes, step, least


def nearest_codes(student: Sandbox, draw: Draw) -> None:
    """Codes are whole numbers 0 .. 2^bits - 1 in uint8, and each is the nearest to its x among the
    levels minimum + scale * code that were chosen; also for `clamped`, where x may lie beyond."""
    for bits, groups, at in settings(draw, (2, 3, 4, 8), (False, True)):
        x = draw_far(draw, groups)
        answer = student.ask("scenarios.codes", {"x": x}, bits=bits, groups=groups)
        codes = look(answer, "codes", x.shape, torch.uint8).double()
        each = per_group(x, groups).shape
        step = spread(look(answer, "scale", each, torch.float16), groups, x)
        least = spread(look(answer, "minimum", each, torch.float16), groups, x)
        if (codes > 2**bits - 1).any():
            raise Failed(f"{at}: a code of {int(codes.max())}")
        error = (x - least - step * codes).abs()
        best = torch.stack([(x - least - step * code).abs() for code in range(2**bits)]).amin(0)
        if (error > best + 1e-3 * step + 1e-6).any():
            raise Failed(f"{at}: another level is nearer")


def levels_come_back(student: Sandbox, draw: Draw) -> None:
    """minimum + scale * code, in float32, for every group along `dim`, the short last one too;
    written to `out` where that is given."""
    for bits, groups, at in settings(draw, (2, 4, 8)):
        codes = draw.whole(0, 2**bits - 1, *draw_shape(draw, groups)).byte()
        each = per_group(codes, groups).shape
        scale = draw.uniform(*each).half()
        minimum = draw.normal(*each).half()
        tensors = {"codes": codes, "scale": scale, "minimum": minimum}
        answer = student.ask("scenarios.levels", tensors, groups=groups)
        want = spread(minimum, groups, codes) + spread(scale, groups, codes) * codes
        expect(answer, "x", want, 1e-6, at, torch.float32)
        expect(answer, "out", want, 1e-6, f"`out` was given; {at}")


def draw_rounded(draw: Draw, bits: int, groups: Groups) -> tuple[Tensor, Tensor, Tensor]:
    """x, and what storage makes of it, and which elements lie within their group's levels."""
    x, codes, step, least = draw_exact(draw, bits, groups)
    step = spread(step, groups, x)
    least = spread(least, groups, x)
    if not groups.clamped:
        return x, least + step * codes, torch.ones(x.shape)
    levels = 2**bits - 1
    zero = (-least / step).clamp(0, levels)  # the only levels are (0 .. levels - zero) * scale
    nearest = (x / step + zero).round().clamp(0, levels)
    inside = (x >= -zero * step) & (x <= (levels - zero) * step)
    return x, (nearest - zero) * step, inside.double()


def straight_through(student: Sandbox, draw: Draw) -> None:
    """fake_quantize returns minimum + scale * code, in the type of x. The gradient passes as if
    nothing was rounded, but for an x beyond its group's levels (`clamped`): there it is 0."""
    for bits, groups, at in settings(draw, (2, 3, 4), (False, True)):
        x, want, inside = draw_rounded(draw, bits, groups)
        x = x.to(draw.choose([torch.float32, torch.float64]))
        weight = draw.normal(*x.shape).to(x.dtype)
        tensors = {"x": x, "weight": weight}
        answer = student.ask("scenarios.rounded", tensors, bits=bits, groups=groups)
        expect(answer, "y", want, 1e-5, at, x.dtype)
        expect(answer, "gradient", weight * inside, 1e-6, at)


def pack_slowly(codes: Tensor, bits: int) -> Tensor:
    """The bytes of codes [B, T, C], in whole numbers, as the docstring of `pack` lays them out."""
    fields = [(2, 0), (1, 2)] if bits == 3 else [(bits, 0)]  # width, lowest bit
    result = []
    for block in codes.long().split(32, dim=1):
        for width, lowest in fields:
            field = block // 2**lowest % 2**width
            rows = field.chunk(8 // width, dim=1)  # those that lie side by side in a byte
            result.append(sum(part * 2 ** (i * width) for i, part in enumerate(rows)))
    return torch.cat(result, 1).to(torch.uint8)


def draw_packed(draw: Draw, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of one or two blocks of 32 tokens, and their bytes."""
    B, T, C = draw.integer(1, 2), 32 * draw.integer(1, 2), draw.integer(1, 4)
    codes = draw.whole(0, 2**bits - 1, B, T, C).byte()
    return codes, pack_slowly(codes, bits)


def packed_bytes(student: Sandbox, draw: Draw) -> None:
    """T * bits / 8 bytes of each channel, laid out as the docstring of `pack` says."""
    for bits in (2, 3, 4, 8):
        codes, want = draw_packed(draw, bits)
        answer = student.ask("quant.pack", {"codes": codes}, bits=bits)
        expect(answer, "pack", want, 0, f"{bits} bits, shape {list(codes.shape)}", torch.uint8)


def unpacked_codes(student: Sandbox, draw: Draw) -> None:
    """The codes that packed bytes stand for, whoever packed them."""
    for bits in (2, 3, 4, 8):
        want, packed = draw_packed(draw, bits)
        answer = student.ask("quant.unpack", {"packed": packed}, bits=bits)
        expect(answer, "unpack", want, 0, f"{bits} bits, shape {list(want.shape)}", torch.uint8)


def four_bits_tell(student: Sandbox, draw: Draw) -> None:
    """`infer.py --cache cskv-plain --bits 4` finds numbers in a text."""
    finds_numbers(student, draw, bits=4)
