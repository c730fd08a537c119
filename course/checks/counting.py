"""Problem a: bytes."""

from math import prod

import torch

from course.sandbox import Draw, Sandbox, expect


def room_counts(student: Sandbox, draw: Draw) -> None:
    """nbytes() sums the bytes of the memory behind all tensors, room for tokens to come included,
    whatever type they have."""
    for _ in range(4):
        B, room, used = draw.integer(1, 3), draw.integer(9, 20), draw.integer(1, 8)
        buffers = {}
        for name in ("buffer0", "buffer1", "buffer2"):
            dtype = draw.choose([torch.float32, torch.float16, torch.uint8])
            buffers[name] = torch.zeros(B, room, draw.integer(1, 9), dtype=dtype)
        want = sum(b.numel() * b.element_size() for b in buffers.values())
        answer = student.ask("scenarios.cache_bytes", buffers, used=used)
        expect(answer, "nbytes", want, 0, "count the room that is not used yet")


def short_groups_cost(student: Sandbox, draw: Draw) -> None:
    """Every group, the last and short one too, adds 32 bits to the bits of the codes."""
    answer = student.ask("quant.bits_per_element", {}, bits=4)
    expect(answer, "bits_per_element", 5, 1e-12, "4 bits, 32 elements in groups of 32")
    for size in (32, 32, 32, 128, 128):
        bits, length = draw.choose([2, 3, 4, 8]), draw.integer(1, 300)
        groups = len(range(0, length, size))
        want = (length * bits + 32 * groups) / length
        answer = student.ask("quant.bits_per_element", {}, bits=bits, size=size, length=length)
        expect(answer, "bits_per_element", want, 1e-12, f"{length} elements in groups of {size}")


def a_full_cache(student: Sandbox, draw: Draw) -> None:
    """A key and a value of every channel, layer and token, each of two bytes."""
    for _ in range(3):
        sizes = {"layers": draw.integer(1, 4), "H_kv": draw.integer(1, 4)}
        sizes |= {"D": 2 * draw.integer(1, 8), "tokens": draw.integer(1, 5000)}
        answer = student.ask("scenarios.full_cache_bytes", {}, **sizes)
        expect(answer, "bytes", 2 * 2 * prod(sizes.values()), 0)


def what_the_paper_counts(student: Sandbox, draw: Draw) -> None:
    """The nominal ratio: the bits of all latents of a token, of keys and values and all layers,
    beside 16 bits for each of the channels that they stand for."""
    for _ in range(4):
        count, H_kv, D = draw.integer(1, 4), draw.integer(1, 3), 2 * draw.integer(2, 6)
        ranks = draw.whole(1, H_kv * D, count, 2)
        bits = torch.tensor([2, 4, 8, 16, 32])[draw.whole(0, 4, count, 2)]
        want = 1 - float((ranks * bits).sum()) / (count * 2 * H_kv * D * 16)
        layers = torch.stack([ranks, bits], 2).tolist()  # [layers, K and V, rank and bits]
        answer = student.ask("scenarios.paper_ratio", {}, H_kv=H_kv, D=D, layers=layers)
        expect(answer, "ratio", want, 1e-9, f"rank and bits {layers}")


def what_infer_reports(student: Sandbox, draw: Draw) -> None:
    """The bytes that infer.py reports for the teaching model, of 4 layers with 64 channels, and the
    nominal ratio of its factors of rank 32 in 4 bits."""
    room = draw.integer(900, 2000)
    answer = student.ask(
        "scenarios.teacher_bytes", {"prompt": draw.whole(0, 999, 1, 40)}, room=room
    )
    expect(answer, "held", 2 * 4 * 64 * 2 * room, 0, "of a full cache")
    expect(answer, "full", 2 * 4 * 64 * 2 * room, 0)
    expect(answer, "ratio", 1 - 4 * 32 / (16 * 64), 1e-9)
