"""Numbers in fewer bits: rounded but still floats for training, packed for storage.

The numbers of a group share one scale and one minimum, each a 16-bit float (Liu et al., "KIVI",
2024, section 3; 32 numbers there). A number x becomes a whole number, its code,

    scale = (maximum - minimum) / (2^bits - 1)
    code  = round((x - minimum) / scale)          0, 1, ..., 2^bits - 1
    x     ~ minimum + scale * code                off by at most half a step, scale / 2

Keys are grouped along the tokens of a channel: key channels differ much in size, and one
of outliers must not spoil the others. Values are grouped along the channels of a token.
Tensors are [..., T, C] with T tokens and C channels.

CSKV's published code keeps no minimum but a whole-number zero-point, forced into 0 ..
2^bits - 1: x ~ scale * (code - zero). So zero is always one of the levels, and a group on
one side of it, as many groups of latents are, loses most of its levels, or all but one:

    x = 10.0, 11.0, 12.0, 13.0 in 2 bits        scale = (13 - 10) / 3 = 1
    with a minimum:   minimum 10   codes 0 1 2 3   ->  10 11 12 13
    with zero-point:  zero = clamp(-10, 0, 3) = 0   codes 3 3 3 3   ->  3 3 3 3

`clamped` asks for this, to be compared: likely the reason for PTQ = 0.00 in Table 5.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

BITS = (2, 3, 4, 8)
TOKENS, CHANNELS = -2, -1  # the dimension along which neighbours form a group
GROUP = 32  # numbers in a group of KIVI's
BLOCK = 32  # tokens that are packed together; packed groups are multiples of it


@dataclass(frozen=True)
class Grouping:
    """Which numbers share a scale and a minimum."""

    dim: int  # TOKENS: neighbours of one channel; CHANNELS: neighbours of one token
    size: int = GROUP  # numbers in a group; the last one along CHANNELS may have fewer
    clamped: bool = False  # the zero-point of CSKV's published code


def bits_per_element(bits: int, size: int = GROUP, length: int = GROUP) -> float:
    """Bits of storage an element, with scale and minimum. `length` elements are grouped; a
    short last group costs as much as others: 38 take 4 + 2 * 32 / 38 = 5.7 in 4 bits."""
    groups = -(-length // size)
    return bits + 2 * 16 * groups / length


@dataclass
class Quantized:
    codes: Tensor  # [..., T, C] uint8, each below 2^bits
    scale: Tensor  # float16, one a group
    minimum: Tensor  # likewise


def round_down(x: Tensor) -> Tensor:
    """x in float16, never above x: such limits of a group hold all of it. Beyond float16 it is
    infinite, and the group reads back as NaN or infinite, not as other numbers."""
    half = x.half()
    lower = (half.float() - half.float().abs() / 1024 - 2**-24).half()
    return torch.where(half > x, lower, half)


def group_limits(x: Tensor, bits: int, grouping: Grouping) -> tuple[Tensor, Tensor]:
    """Scale and minimum of every group of x [..., T, C], in float16."""
    dim, size = grouping.dim, grouping.size
    n = x.shape[dim]
    # A short last group is filled up with its last element: its limits stay.
    filled = -(-n // size) * size
    index = torch.arange(filled, device=x.device).clamp(max=n - 1)
    groups = x.float().index_select(dim, index).unflatten(dim, (-1, size))
    low = groups.amin(dim)
    high = groups.amax(dim)
    levels = 2**bits - 1
    if grouping.clamped:
        scale = ((high - low) / levels).clamp(min=2**-24).half()
        zero = (-low / scale.float()).round().clamp(0, levels)
        return scale, (-zero * scale.float()).half()
    minimum = round_down(low)
    scale = -round_down((minimum.float() - high) / levels)
    return scale, minimum


def repeat_per_group(per_group: Tensor, n: int, grouping: Grouping) -> Tensor:
    """Gives each of `n` elements the number of its group, in float32."""
    index = torch.arange(n, device=per_group.device) // grouping.size
    return per_group.float().index_select(grouping.dim, index)


def quantize(x: Tensor, bits: int, grouping: Grouping) -> Quantized:
    """x [..., T, C] in `bits` bits."""
    scale, minimum = group_limits(x, bits, grouping)
    n = x.shape[grouping.dim]
    step = repeat_per_group(scale, n, grouping).clamp(min=2**-24)  # equal numbers have scale 0
    low = repeat_per_group(minimum, n, grouping)
    codes = ((x.float() - low) / step).round().clamp(0, 2**bits - 1)
    return Quantized(codes.to(torch.uint8), scale, minimum)


def dequantize(q: Quantized, grouping: Grouping, out: Tensor | None = None) -> Tensor:
    """minimum + scale * code, [..., T, C] in float32, written to `out` if it is given."""
    dim, size = grouping.dim, grouping.size
    scale, minimum = q.scale.float(), q.minimum.float()
    if out is None:
        out = torch.empty_like(q.codes, dtype=torch.float32)
    out.copy_(q.codes)
    # In place: a decode step does this to the whole cache, and repeating scales takes longer.
    if dim == TOKENS and scale.shape[dim] == 1:  # a packed block
        return torch.addcmul(minimum, out, scale, out=out)
    whole, rest = divmod(out.shape[dim], size)
    for first, count, width in ((0, whole, size), (whole, 1, rest)):  # the last may be short
        if count * width:
            part = out.narrow(dim, first * size, count * width).unflatten(dim, (count, width))
            step = scale.narrow(dim, first, count).unsqueeze(dim)
            low = minimum.narrow(dim, first, count).unsqueeze(dim)
            if dim == TOKENS:  # in one pass, which along channels takes longer
                torch.addcmul(low, part, step, out=part)
            else:
                part.mul_(step).add_(low)
    return out


def fake_quantize(x: Tensor, bits: int, grouping: Grouping) -> Tensor:
    """What storage makes of x, in x's type and with a gradient, for training. Rounding has no
    useful one, so it is passed straight through (Bengio et al., 2013): as if this were the
    identity for an x within the levels of its group, and a constant for one beyond."""
    with torch.no_grad():
        q = quantize(x, bits, grouping)
        n = x.shape[grouping.dim]
        low = repeat_per_group(q.minimum, n, grouping)
        step = repeat_per_group(q.scale, n, grouping)
        inside = (x >= low) & (x <= low + step * (2**bits - 1))
        stored = dequantize(q, grouping).to(x.dtype)
    return torch.where(inside, stored + (x - x.detach()), stored)


# --------------------------------------------------------------------------------- to storage


def fields(bits: int) -> list[tuple[int, int]]:
    """How a code is cut to fit bytes: (width, lowest bit). 3 bits are stored as 2 and 1."""
    return [(2, 0), (1, 2)] if bits == 3 else [(bits, 0)]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., T, C], T a multiple of 32, as bytes [..., T * bits / 8, C]. A byte holds
    codes of one channel, in 4 bits those of tokens i and i + 16 of a block: in row 0 of 16,
    token 16 in bits 7654 and token 0 in bits 3210; in row 1, tokens 17 and 1."""
    blocks = codes.unflatten(TOKENS, (-1, BLOCK))  # [..., T / 32, 32, C]
    rows = []
    for width, lowest in fields(bits):
        field = (blocks >> lowest) & (2**width - 1)
        byte = 0
        for i, part in enumerate(field.chunk(8 // width, TOKENS)):  # of 4 * width tokens each
            byte = byte + (part << (i * width))
        rows.append(byte)
    return torch.cat(rows, TOKENS).flatten(-3, -2)


@lru_cache  # every decode step asks for it, twice a layer
def shifts(width: int, device: torch.device) -> Tensor:
    """How far each code of a byte is from its lowest bit, [8 / width, 1]."""
    return torch.arange(0, 8, width, dtype=torch.int32, device=device)[:, None]


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes [..., T, C] that `pack` got."""
    if bits == 8:
        return packed
    rows, C = packed.shape[TOKENS:]
    # Four bytes are one number: a quarter of the work. What a shift brings in from the byte
    # beside it, the mask takes out.
    words = packed.reshape(-1, 1, BLOCK * bits // 8 * C).view(torch.int32)  # [T / 32, 1, bits * C]
    codes = []
    for width, lowest in fields(bits):
        field = words if width == bits else words.narrow(2, lowest * C, width * C)
        field = field >> shifts(width, packed.device)  # [T / 32, 8 / width, width * C]
        field &= 0x01010101 * (2**width - 1)
        codes.append(field)
    if bits == 3:
        codes[0].view(-1).add_(codes[1].view(-1), alpha=4)
    return codes[0].view(torch.uint8).view(*packed.shape[:TOKENS], rows * 8 // bits, C)


@dataclass(eq=False)
class Packed:
    """Tokens [B, T, C] of a sequence in b bits. It grows.

    A block has as many tokens as a group has numbers. It is packed once all of them are older
    than the newest `residual`. Until then tokens wait as they are, fewer than residual +
    block of them; in 16 and 32 bits for ever. In blocks of 32:

        residual 4, 70 tokens held     0 .. 31 | 32 .. 63 | 64 65   66 67 68 69
                                        packed |  packed  | wait    the residual
    """

    bits: int
    grouping: Grouping
    residual: int = 0  # newest tokens that are not packed
    expected: int = 0  # final number of tokens, if known; memory is then taken once
    dtype: torch.dtype | None = None  # of the tokens that wait; None: as they come

    length = packed = 0  # tokens held, and how many of these are packed
    grow = 256  # tokens to make room for when there is none left

    def __post_init__(self):
        self.block = self.grouping.size
        if self.block % BLOCK:
            raise ValueError(f"groups of {self.block} are packed in multiples of {BLOCK} only")
        self.buffers: list[Tensor] = []  # codes, scales, minima; [B, blocks or more, rows, C]

    def append(self, x: Tensor) -> None:
        """x [B, n, C], the next n tokens."""
        if self.dtype:
            x = x.to(self.dtype)
        # A copy a step, but only of what waits.
        waiting = torch.cat([self.waiting, x], dim=1) if self.length else x.clone()
        self.length += x.shape[1]
        blocks = max(0, waiting.shape[1] - self.residual) // self.block
        if blocks and self.bits in BITS:
            n = blocks * self.block
            self.pack_blocks(waiting[:, :n], blocks)
            waiting = waiting[:, n:].clone()  # a view would keep the memory of the packed ones
        self.waiting = waiting

    def until_packed(self) -> int:
        """The next block is packed when so many more tokens have come, 1 or more."""
        return self.packed + self.block + self.residual - self.length

    def at_once(self) -> int:
        """How many tokens can come together, and read the same as if they came one by one."""
        return self.block if self.until_packed() == 1 else self.until_packed() - 1

    def pack_blocks(self, x: Tensor, blocks: int) -> None:
        """x [B, n, C], the n tokens of whole blocks."""
        start = self.packed // self.block
        stop = start + blocks
        q = quantize(x, self.bits, self.grouping)
        parts = [pack(q.codes, self.bits), q.scale, q.minimum]
        parts = [part.unflatten(1, (blocks, -1)) for part in parts]
        if not self.buffers:
            room = max(stop, (self.expected - self.residual) // self.block)
            self.buffers = [part.new_empty(len(x), room, *part.shape[2:]) for part in parts]
        missing = stop - self.buffers[0].shape[1]
        if missing > 0:
            missing += max(1, self.grow // self.block) - 1
            self.buffers = [F.pad(buffer, (0, 0, 0, 0, 0, missing)) for buffer in self.buffers]
        for buffer, part in zip(self.buffers, parts, strict=True):
            buffer[:, start:stop] = part
        self.packed += x.shape[1]

    def read(self, start: int, stop: int) -> Tensor:
        """The tokens from `start` to `stop` - 1 again, [B, stop - start, C] in float32."""
        return read_together([self], start, stop)

    def tensors(self) -> list[Tensor]:
        return [*self.buffers, self.waiting] if self.length else []


def read_together(parts: list[Packed], start: int, stop: int) -> Tensor:
    """`Packed.read` of several that hold the same tokens, in as large blocks: their channels side
    by side, [B, stop - start, C], in one piece of memory."""
    start = max(0, start)
    stop = max(0, stop)
    end, block = parts[0].packed, parts[0].block
    if start >= end:
        some = [part.waiting[:, start - end : stop - end].float() for part in parts]
        return some[0] if len(some) == 1 else torch.cat(some, dim=2)
    first = start // block  # of the blocks that they lie in
    last = -(-min(stop, end) // block)
    packed = (last - first) * block
    waiting = max(0, stop - end)
    like = parts[0].waiting
    sizes = [part.waiting.shape[2] for part in parts]
    x = like.new_empty(len(like), packed + waiting, sum(sizes), dtype=torch.float32)
    for part, own in zip(parts, x.split(sizes, 2), strict=True):
        codes, scale, minimum = [buffer[:, first:last] for buffer in part.buffers]
        codes = unpack(codes, part.bits)  # [B, blocks, tokens of one, C]
        q = Quantized(codes, scale, minimum)
        dequantize(q, part.grouping, own[:, :packed].unflatten(1, (last - first, block)))
        own[:, packed:] = part.waiting[:, :waiting]
    first *= block
    return x[:, start - first : stop - first]
