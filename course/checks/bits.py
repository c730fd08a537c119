"""Problem d: groups, codes, gradients and bytes, each written out in another way.

Groups are drawn so that scale and minimum are exact in 16 bits where a value is compared.
"""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from course.checks.telling import finds_numbers
from course.sandbox import Draw, Failed, Sandbox, expect, look

DIMS = (-2, -1)  # tokens, channels
SIZES = (32, 16, 128)  # numbers of a group


def per_group(x: Tensor, dim: int, size: int, reduce=Tensor.amin) -> Tensor:
    """A number for every group of neighbours along `dim`: its least one, or as `reduce` says."""
    return torch.cat([reduce(part, dim, keepdim=True) for part in x.split(size, dim)], dim)


def spread(numbers: Tensor, dim: int, size: int, n: int) -> Tensor:
    """Each of n elements along `dim` gets the number of its group, in float64."""
    return numbers.double().repeat_interleave(size, dim).narrow(dim, 0, n)


def draw_shape(draw: Draw, dim: int, size: int, least=1) -> list[int]:
    """[B, T, C]; along `dim` some whole groups and one that may be short, of `least` or more."""
    shape = [draw.integer(1, 2), draw.integer(2, 5), draw.integer(2, 5)]
    shape[dim] = size * draw.integer(0, 2) + draw.choose([least, 7, size - 1, size])
    return shape


def draw_codes(draw: Draw, bits: int, shape: list | tuple) -> Tensor:
    return draw.whole(0, 2**bits - 1, *shape).to(torch.uint8)


def settings(draw: Draw, widths: tuple, clamped=(False,)) -> Iterator[tuple]:
    """Bits, dim and size of groups that are checked, and the same with `clamped` for a scenario."""
    for bits, dim, clamp in product(widths, DIMS, clamped):
        size = draw.choose(SIZES)
        yield bits, dim, size, {"bits": bits, "dim": dim, "size": size, "clamped": clamp}


def limits_hold_the_group(student: Sandbox, draw: Draw) -> None:
    """Scale and minimum are 16-bit, one for each `size` neighbours along `dim`; minimum and
    minimum + (2^bits - 1) scale hold all of the group, and hardly more."""
    for bits, dim, size, numbers in settings(draw, (2, 3, 4, 8)):
        x = draw.normal(*draw_shape(draw, dim, size)) * 2 + draw.choose([0, 10, -30])
        x = x.float()
        answer = student.ask("scenarios.limits", {"x": x}, **numbers)
        low, high = per_group(x, dim, size).double(), per_group(x, dim, size, Tensor.amax).double()
        step = look(answer, "scale", low.shape, torch.float16).double()
        least = look(answer, "minimum", low.shape, torch.float16).double()
        most = least + step * (2**bits - 1)
        if (least > low).any() or (most < high).any():
            raise Failed(f"{numbers}: a group reaches beyond its limits; round outwards")
        slack = 0.01 * (high - low) + 0.005 * torch.maximum(low.abs(), high.abs()) + 1e-4
        if (low - least > slack).any() or (most - high > slack).any():
            raise Failed(f"{numbers}: the limits lie far outside of the group")


def clamped_limits(student: Sandbox, draw: Draw) -> None:
    """`clamped`: scale = (max - min) / (2^bits - 1), the whole-number zero-point -min / scale is
    forced into 0 .. 2^bits - 1, and the minimum is that of the levels that are left."""
    for bits, dim, size, numbers in settings(draw, (2, 4, 8), (True,)):
        x, _, step, least = draw_exact(draw, bits, dim, size)
        answer = student.ask("scenarios.limits", {"x": x.float()}, **numbers)
        want = -step * (-least / step).clamp(0, 2**bits - 1)
        expect(answer, "scale", step, 1e-3, f"{numbers}", torch.float16)
        expect(answer, "minimum", want, 1e-3, f"{numbers}", torch.float16)


def draw_exact(draw: Draw, bits: int, dim: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, its codes, and scale and minimum of every group, all exact in 16 bits.

    x = minimum + scale * (code + u), |u| < 0.4; the least and the largest code occur in each group,
    with u = 0.
    """
    shape = draw_shape(draw, dim, size, least=2)
    levels, n = 2**bits - 1, shape[dim]
    codes = draw.whole(0, levels, *shape)
    for part in codes.split(size, dim):
        part.narrow(dim, 0, 1).fill_(0)
        part.narrow(dim, 1, 1).fill_(levels)
    groups = per_group(codes, dim, size).shape
    step = 2.0 ** draw.whole(-3, 1, *groups).double()
    least = step * draw.whole(-2 * levels, levels, *groups).double()
    u = 0.8 * (draw.uniform(*shape) - 0.5) * (codes > 0) * (codes < levels)
    x = spread(least, dim, size, n) + spread(step, dim, size, n) * (codes + u)
    return x, codes, step, least


def nearest_codes(student: Sandbox, draw: Draw) -> None:
    """Codes are whole numbers 0 .. 2^bits - 1 in uint8, and each is the nearest to its x among the
    levels minimum + scale * code that were chosen; also for `clamped`, where x may lie beyond."""
    for bits, dim, size, numbers in settings(draw, (2, 3, 4, 8), (False, True)):
        x = draw.normal(*draw_shape(draw, dim, size)) * 2 + draw.choose([0, 3, -20])
        x = x.float()
        answer = student.ask("scenarios.codes", {"x": x}, **numbers)
        codes = look(answer, "codes", x.shape, torch.uint8).double()
        groups = per_group(x, dim, size).shape
        step = spread(look(answer, "scale", groups, torch.float16), dim, size, x.shape[dim])
        least = spread(look(answer, "minimum", groups, torch.float16), dim, size, x.shape[dim])
        if (codes > 2**bits - 1).any():
            raise Failed(f"{numbers}: a code of {int(codes.max())}")
        error = (x - least - step * codes).abs()
        every = torch.arange(2**bits, dtype=torch.float64)
        best = ((x - least)[..., None] - step[..., None] * every).abs().amin(-1)
        if (error > best + 1e-3 * step + 1e-6).any():
            raise Failed(f"{numbers}: another level is nearer")


def levels_come_back(student: Sandbox, draw: Draw) -> None:
    """minimum + scale * code, in float32, for every group along `dim`, the short last one too;
    written to `out` where that is given."""
    for bits, dim, size, _ in settings(draw, (2, 4, 8)):
        codes = draw_codes(draw, bits, draw_shape(draw, dim, size))
        groups = per_group(codes, dim, size).shape
        tensors = {"scale": draw.uniform(*groups).half(), "minimum": draw.normal(*groups).half()}
        scale, minimum = (spread(t, dim, size, codes.shape[dim]) for t in tensors.values())
        answer = student.ask("scenarios.levels", {**tensors, "codes": codes}, dim=dim, size=size)
        at = f"dim {dim}, groups of {size}, shape {list(codes.shape)}"
        expect(answer, "x", minimum + scale * codes, 1e-6, at, torch.float32)
        expect(answer, "out", minimum + scale * codes, 1e-6, f"`out` was given; {at}")


def draw_rounded(
    draw: Draw, bits: int, dim: int, size: int, clamped: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x, and what storage makes of it, and which elements lie within their group's levels."""
    x, codes, step, least = draw_exact(draw, bits, dim, size)
    step, least = spread(step, dim, size, x.shape[dim]), spread(least, dim, size, x.shape[dim])
    if not clamped:
        return x, least + step * codes, torch.ones(x.shape)
    levels = 2**bits - 1
    zero = (-least / step).clamp(0, levels)  # the only levels are (0 .. levels - zero) * scale
    nearest = (x / step + zero).round().clamp(0, levels)
    inside = (x >= -zero * step) & (x <= (levels - zero) * step)
    return x, (nearest - zero) * step, inside.double()


def straight_through(student: Sandbox, draw: Draw) -> None:
    """fake_quantize returns minimum + scale * code, in the type of x. The gradient passes as if
    nothing was rounded, but for an x beyond its group's levels (`clamped`): there it is 0."""
    for bits, dim, size, numbers in settings(draw, (2, 3, 4), (False, True)):
        x, want, inside = draw_rounded(draw, bits, dim, size, numbers["clamped"])
        x = x.to(draw.choose([torch.float32, torch.float64]))
        weight = draw.normal(*x.shape).to(x.dtype)
        answer = student.ask("scenarios.rounded", {"x": x, "weight": weight}, **numbers)
        expect(answer, "y", want, 1e-5, f"{numbers}", x.dtype)
        expect(answer, "gradient", weight * inside, 1e-6, f"{numbers}")


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
    shape = [draw.integer(1, 2), 32 * draw.integer(1, 2), draw.integer(1, 4)]
    codes = draw_codes(draw, bits, shape)
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
