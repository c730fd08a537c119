"""Problem f: the same results as the plain cache, without rebuilt values or all keys at once."""

import torch
from torch import Tensor

from course.checks.attention import draw_attend, rotate, softmax_attention
from course.sandbox import Draw, Failed, Sandbox, expect

KIND = "ChunkedBiBranchCache"
SHORT, LONG = 2_000, 60_000  # tokens
SIZES = (8, 8, 64)  # H, H_kv, D: rebuilt keys of LONG tokens take 123 MB
MOST = 60e6  # bytes more for LONG than for SHORT: a half of that


def same_as_plain(student: Sandbox, draw: Draw) -> None:
    """`attend` returns what problem c's does, whatever the length of a chunk."""
    for i in range(8):
        bias, sinks = i % 2 == 1, draw.choose([0, 0, 2])
        tensors, numbers, want = draw_attend(draw, KIND, bias, sinks, torch.float32, i > 5)
        chunk = draw.choose([1, 3, 5, 100])
        answer = student.ask("attend", tensors, **numbers, chunk=chunk)
        what = f"first {numbers['first']}, old {numbers['old']}, chunks of {chunk}, biases {bias}"
        expect(answer, "out", want, 1e-4, what)


def values_are_absorbed(student: Sandbox, draw: Draw) -> None:
    """Values are not rebuilt. Here every second latent is 2^100 and every other -2^100, B_v has
    numbers of 2^40, and all tokens weigh the same, 1/64. So p C_v is 0, and so is (p C_v) B_v; but
    C_v B_v would be 2^140, which float32 cannot hold."""
    H_kv, D, r, full = draw.choose([1, 2]), 4, draw.integer(1, 3), draw.choose([2, 4, 8])
    old = 64 - full
    sign = torch.tensor([1.0, -1.0]).repeat(old // 2)[None, :, None]
    v = draw.normal(1, H_kv, full, D).float()
    tensors = {
        "A_k": torch.zeros(3, r),
        "B_k": draw.normal(r, H_kv * D).float(),
        "A_v": torch.zeros(3, r),
        "B_v": torch.full((r, H_kv * D), 2.0**40),
        "c_k": draw.normal(1, old, r).float(),
        "c_v": (2.0**100 * sign).expand(1, old, r),
        "q": torch.zeros(1, 2 * H_kv, 1, D),
        "k": draw.normal(1, H_kv, full, D).float(),
        "v": v,
    }
    numbers = {"kind": KIND, "first": 0, "old": old, "sizes": [2 * H_kv, H_kv, D, None]}
    answer = student.ask("attend", tensors, **numbers, sinks=0, chunk=draw.choose([6, 16, 100]))
    want = (v.double().sum(2, keepdim=True) / 64).repeat_interleave(2, 1)
    expect(answer, "out", want, 1e-4)


def memory_of_one_chunk(student: Sandbox, draw: Draw) -> None:
    """A step with 60,000 old tokens takes hardly more memory than one with 2,000. The grader asks
    the operating system how much the process held, so it must be Linux or macOS."""
    H, H_kv, D = SIZES
    r, hidden = 4, 8
    peaks = []
    for old in (SHORT, LONG):
        tensors = {
            "A_k": torch.zeros(hidden, r),
            "B_k": draw.normal(r, H_kv * D).float(),
            "A_v": torch.zeros(hidden, r),
            "B_v": draw.normal(r, H_kv * D).float(),
            "c_k": draw.normal(1, old, r).float(),
            "c_v": draw.normal(1, old, r).float(),
            "q": draw.normal(1, H, 1, D).float(),
        }
        numbers = {"old": old, "longest": LONG, "sizes": [*SIZES, None]}
        answer, peak = student.peak("attend_long", tensors, **numbers)
        # RoPE's table is in float32: at position 60,000 an angle is off by 0.006 at the most.
        expect(answer, "out", long_attention(tensors, old), 1e-2, f"{old} tokens")
        peaks.append(peak)
    more = peaks[1] - peaks[0]
    if not more <= MOST:
        raise Failed(f"{more / 1e6:.0f} MB more for {LONG} tokens than for {SHORT}: work in chunks")


def long_attention(tensors: dict[str, Tensor], old: int) -> Tensor:
    """What `attend_long` must return, [1, H, 1, D], head by head."""
    c_k, c_v, q = (tensors[name].double() for name in ("c_k", "c_v", "q"))
    D, positions, one = SIZES[2], torch.arange(old), torch.ones(1, 1, 1, SIZES[2]).double()
    out = []
    for h in range(SIZES[1]):
        B_k, B_v = (tensors[n][:, h * D : (h + 1) * D].double() for n in ("B_k", "B_v"))
        k = torch.cat([rotate(c_k @ B_k, positions)[:, None], one], 2)
        v = torch.cat([(c_v @ B_v)[:, None], one], 2)
        out.append(softmax_attention(q[:, h : h + 1], k, v))
    return torch.cat(out, 1)
