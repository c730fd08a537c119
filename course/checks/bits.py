"""Problem d: groups, codes, gradients and bytes, against loops over single numbers.

Groups are drawn so that scale and minimum are exact in 16 bits where a value is compared.
"""

import torch
from torch import Tensor

from course.sandbox import Draw, Failed, Sandbox, expect, look

DIMS = (-2, -1)  # tokens, channels


def groups_along(dim: int, n: int) -> list[slice]:
    """Index ranges of the groups of n neighbours."""
    return [slice(i, min(i + 32, n)) for i in range(0, n, 32)]


def limits_shape(x: Tensor, dim: int) -> list[int]:
    shape = list(x.shape)
    shape[dim] = len(groups_along(dim, shape[dim]))
    return shape


def spread(per_group: Tensor, dim: int, n: int) -> Tensor:
    """Each of n elements along `dim` gets the number of its group, in float64."""
    parts = [per_group.narrow(dim, g, 1).double() for g in range(per_group.shape[dim])]
    sizes = [s.stop - s.start for s in groups_along(dim, n)]
    return torch.cat([p.repeat_interleave(m, dim) for p, m in zip(parts, sizes, strict=True)], dim)


def draw_shape(draw: Draw, dim: int, last: tuple = (1, 7, 31, 32)) -> list[int]:
    """[B, T, C]; along `dim` some whole groups and one of a size in `last`."""
    shape = [draw.integer(1, 2), draw.integer(2, 5), draw.integer(2, 5)]
    shape[dim] = 32 * draw.integer(0, 2) + draw.choose(last)
    return shape


def limits_hold_the_group(student: Sandbox, draw: Draw) -> None:
    """Scale and minimum are 16-bit, one for each 32 neighbours along `dim`; minimum and
    minimum + (2^bits - 1) scale hold all of the group, and hardly more."""
    for bits in (2, 3, 4, 8):
        for dim in DIMS:
            x = draw.normal(*draw_shape(draw, dim)) * 2 + draw.choose([0, 10, -30])
            x = x.float()
            answer = student.ask("limits", {"x": x}, bits=bits, dim=dim, clamped=False)
            shape = limits_shape(x, dim)
            scale = look(answer, "scale", shape, torch.float16)
            minimum = look(answer, "minimum", shape, torch.float16)
            for g, part in enumerate(groups_along(dim, x.shape[dim])):
                group = x.narrow(dim, part.start, part.stop - part.start).double()
                low, high = group.amin(dim), group.amax(dim)
                step, least = scale.select(dim, g).double(), minimum.select(dim, g).double()
                most = least + step * (2**bits - 1)
                what = f"{bits} bits, dim {dim}, {x.shape[dim]} elements"
                if (least > low).any() or (most < high).any():
                    raise Failed(f"{what}: a group reaches beyond its limits; round outwards")
                slack = 0.01 * (high - low) + 0.005 * torch.maximum(low.abs(), high.abs()) + 1e-4
                if (low - least > slack).any() or (most - high > slack).any():
                    raise Failed(f"{what}: the limits lie far outside of the group")


def clamped_limits(student: Sandbox, draw: Draw) -> None:
    """`clamped`: scale = (max - min) / (2^bits - 1), the whole-number zero-point -min / scale is
    forced into 0 .. 2^bits - 1, and the minimum is that of the levels that are left."""
    for bits in (2, 4, 8):
        for dim in DIMS:
            levels, shape = 2**bits - 1, draw_shape(draw, dim, (7, 31, 32))
            x, _, step, least = draw_exact(draw, shape, bits, dim)
            answer = student.ask("limits", {"x": x.float()}, bits=bits, dim=dim, clamped=True)
            want = -step * (-least / step).clamp(0, levels)
            expect(answer, "scale", step, 1e-3, f"{bits} bits, dim {dim}")
            got = look(answer, "minimum", want.shape).double()
            if ((got - want).abs() > 1e-3 * want.abs() + 1e-6).any():
                raise Failed(f"{bits} bits, dim {dim}: minimum {got.flatten()[0]:g} and others")


def draw_exact(draw: Draw, shape: list, bits: int, dim: int) -> tuple:
    """x, its codes, and scale and minimum of every group, all exact in 16 bits.

    x = minimum + scale * (code + u), |u| < 0.4; the least and the largest code occur in each group,
    with u = 0.
    """
    levels, n = 2**bits - 1, shape[dim]
    per_group = list(shape)
    per_group[dim] = len(groups_along(dim, n))
    step = 2.0 ** draw.whole(-3, 1, *per_group).double()
    least = step * draw.whole(-2 * levels, levels, *per_group).double()
    codes = draw.whole(0, levels, *shape)
    for part in groups_along(dim, n):
        codes.narrow(dim, part.start, 1).fill_(0)
        codes.narrow(dim, part.start + 1, 1).fill_(levels)
    u = 0.8 * (draw.uniform(*shape) - 0.5) * (codes > 0) * (codes < levels)
    x = spread(least, dim, n) + spread(step, dim, n) * (codes + u)
    return x, codes, step, least


def nearest_codes(student: Sandbox, draw: Draw) -> None:
    """Codes are whole numbers 0 .. 2^bits - 1 in uint8, and each is the nearest to its x among the
    levels minimum + scale * code that were chosen; also for `clamped`, where x may lie beyond."""
    for bits in (2, 3, 4, 8):
        for dim in DIMS:
            for clamped in (False, True):
                x = draw.normal(*draw_shape(draw, dim)) * 2 + draw.choose([0, 3, -20])
                x = x.float()
                answer = student.ask("codes", {"x": x}, bits=bits, dim=dim, clamped=clamped)
                codes = look(answer, "codes", x.shape, torch.uint8).double()
                shape = limits_shape(x, dim)
                n = x.shape[dim]
                step = spread(look(answer, "scale", shape, torch.float16), dim, n)
                least = spread(look(answer, "minimum", shape, torch.float16), dim, n)
                what = f"{bits} bits, dim {dim}, clamped {clamped}"
                if (codes > 2**bits - 1).any():
                    raise Failed(f"{what}: a code of {int(codes.max())}")
                got = (x - least - step * codes).abs()
                every = torch.arange(2**bits, dtype=torch.float64)
                best = (x[..., None] - least[..., None] - step[..., None] * every).abs().amin(-1)
                if (got > best + 1e-3 * step + 1e-6).any():
                    raise Failed(f"{what}: another level is nearer")


def levels_come_back(student: Sandbox, draw: Draw) -> None:
    """minimum + scale * code, in float32, for every group along `dim`, the short last one too."""
    for bits in (2, 4, 8):
        for dim in DIMS:
            shape = draw_shape(draw, dim)
            codes = draw.whole(0, 2**bits - 1, *shape).to(torch.uint8)
            per_group = limits_shape(codes, dim)
            scale, minimum = draw.uniform(*per_group).half(), draw.normal(*per_group).half()
            tensors = {"codes": codes, "scale": scale, "minimum": minimum}
            answer = student.ask("levels", tensors, dim=dim)
            n = shape[dim]
            want = spread(minimum, dim, n) + spread(scale, dim, n) * codes
            look(answer, "x", shape, torch.float32)
            expect(answer, "x", want, 1e-6, f"dim {dim}, shape {shape}")


def draw_rounded(draw: Draw, bits: int, dim: int, clamped: bool) -> tuple:
    """x, and what storage makes of it, and which elements lie within their group's levels."""
    shape = draw_shape(draw, dim, (7, 31, 32))
    x, codes, step, least = draw_exact(draw, shape, bits, dim)
    n, levels = shape[dim], 2**bits - 1
    if not clamped:
        return x, spread(least, dim, n) + spread(step, dim, n) * codes, torch.ones(shape)
    step, least = spread(step, dim, n), spread(least, dim, n)
    zero = (-least / step).clamp(0, levels)  # the only levels are (0 .. levels - zero) * scale
    nearest = (x / step + zero).round().clamp(0, levels)
    inside = (x >= -zero * step) & (x <= (levels - zero) * step)
    return x, (nearest - zero) * step, inside.double()


def rounded_values(student: Sandbox, draw: Draw) -> None:
    """fake_quantize returns minimum + scale * code, in the type of x."""
    for bits in (2, 3, 4):
        for dim in DIMS:
            x, want, _ = draw_rounded(draw, bits, dim, False)
            x = x.to(draw.choose([torch.float32, torch.float64]))
            numbers = {"bits": bits, "dim": dim, "clamped": False}
            answer = student.ask("rounded", {"x": x, "weight": torch.ones_like(x)}, **numbers)
            look(answer, "y", x.shape, x.dtype)
            expect(answer, "y", want, 1e-5, f"{bits} bits, dim {dim}")


def straight_through(student: Sandbox, draw: Draw) -> None:
    """The gradient passes as if nothing was rounded, but for an x beyond the levels of its group,
    which `clamped` can have: there it is 0."""
    for bits in (2, 4):
        for dim in DIMS:
            for clamped in (False, True):
                x, y, inside = draw_rounded(draw, bits, dim, clamped)
                weight = draw.normal(*x.shape)
                numbers = {"bits": bits, "dim": dim, "clamped": clamped}
                answer = student.ask("rounded", {"x": x, "weight": weight}, **numbers)
                what = f"{bits} bits, dim {dim}, clamped {clamped}"
                expect(answer, "y", y, 1e-5, what)
                expect(answer, "gradient", weight * inside, 1e-9, what)


def bits_of(code: int, width: int, lowest: int) -> int:
    return code // 2**lowest % 2**width


def pack_slowly(codes: Tensor, bits: int) -> Tensor:
    """The bytes of codes [B, T, C], number by number, as the docstring of `pack` lays them out."""
    B, T, C = codes.shape
    blocks = []
    for start in range(0, T, 32):
        for width, lowest in [(2, 0), (1, 2)] if bits == 3 else [(bits, 0)]:
            per_byte = 8 // width
            rows = 32 // per_byte
            part = torch.zeros(B, rows, C, dtype=torch.uint8)
            for b in range(B):
                for row in range(rows):
                    for c in range(C):
                        part[b, row, c] = sum(
                            bits_of(int(codes[b, start + row + i * rows, c]), width, lowest)
                            * 2 ** (i * width)
                            for i in range(per_byte)
                        )
            blocks.append(part)
    return torch.cat(blocks, 1)


def packed_bytes(student: Sandbox, draw: Draw) -> None:
    """T * bits / 8 bytes of each channel, laid out as the docstring of `pack` says."""
    for bits in (2, 3, 4, 8):
        shape = draw.integer(1, 2), 32 * draw.integer(1, 2), draw.integer(1, 4)
        codes = draw.whole(0, 2**bits - 1, *shape).to(torch.uint8)
        answer = student.ask("packed", {"codes": codes}, bits=bits)
        want = pack_slowly(codes, bits)
        look(answer, "packed", want.shape, torch.uint8)
        expect(answer, "packed", want, 0, f"{bits} bits, shape {list(shape)}")


def unpacked_codes(student: Sandbox, draw: Draw) -> None:
    """The codes that packed bytes stand for, whoever packed them."""
    for bits in (2, 3, 4, 8):
        shape = draw.integer(1, 2), 32 * draw.integer(1, 2), draw.integer(1, 4)
        codes = draw.whole(0, 2**bits - 1, *shape).to(torch.uint8)
        answer = student.ask("unpacked", {"packed": pack_slowly(codes, bits)}, bits=bits)
        look(answer, "codes", codes.shape, torch.uint8)
        expect(answer, "codes", codes, 0, f"{bits} bits, shape {list(shape)}")
