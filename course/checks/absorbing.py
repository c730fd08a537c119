"""Problem f: values that are never rebuilt, and keys that share a position with neighbours."""

import torch
from torch import Tensor

from course.checks import attention
from course.checks.telling import finds_numbers
from course.sandbox import Draw, Sandbox, expect

TOLERANCE = 2e-4  # float32 rounds to 6e-8: a score of 20 is off by that, and values may cancel
SIZES = [4, 2, 4, None]  # H, H_kv, D, and no sliding window
SEGMENTS = [((1, 0),), ((2, 4), (4, 0)), ((3, 0),), ((4, 8), (8, 16), (16, 0))]


def damping_is_the_mean_turn(student: Sandbox, draw: Draw) -> None:
    """damping(w, L) is the mean of cos(tau w) over the L offsets tau from the middle of a segment,
    for fast and for slow w; 1 for L = 1."""
    for length in (1, 2, 3, draw.integer(4, 40), 512):
        w = 10 ** (-5 * draw.uniform(draw.integer(1, 9)))  # 0.00001 .. 1
        answer = student.ask("beyond.segments.damping", {"w": w}, length=length)
        expect(answer, "damping", attention.mean_turn(w, length), 1e-9, f"L = {length}")


def ask(student: Sandbox, scenario: str, tensors: dict[str, Tensor], **numbers) -> dict:
    """What a scenario makes of these tensors in float32, which has their numbers."""
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    return student.ask(f"scenarios.{scenario}", tensors, **numbers)


def weighted_values(student: Sandbox, draw: Draw) -> None:
    """`old_values` returns p times the values of the tokens from `begin` on, biases included,
    for every query head, whatever the length of a chunk. p's sum is below 1."""
    for i in range(6):
        n = draw.integer(5, 30)
        begin = draw.integer(0, 9)
        layer = attention.draw_layer(draw, 1, bias=i % 2 == 1)
        B, H = layer.tensors["q"].shape[:2]
        c_v = draw.normal(B, begin + n + 2, len(layer.tensors["B_v"]))
        p = draw.uniform(B, H, n) / 32
        values = layer.rebuilt("v", c_v[:, begin : begin + n])  # [B, H_kv, n, D]
        want = p.unflatten(1, (values.shape[1], -1)) @ values  # [B, H_kv, G, D]
        numbers = {"begin": begin, "chunk": [1, 3, 8, 100][i % 4], "sizes": layer.sizes}
        tensors = layer.tensors | {"p": p, "c_v": c_v}
        answer = ask(student, "old_values", tensors, **numbers)
        at = f"{n} tokens, {numbers}, biases {i % 2 == 1}"
        expect(answer, "out", want.flatten(0, 1), TOLERANCE, at)


def draw_large(draw: Draw) -> dict[str, Tensor]:
    """Factors for `SIZES`, and latents, that rebuild to 2^140: float32 cannot hold it. The first
    channel of latents is 2^100 and -2^100 by turns, the row of B for it 2^40."""
    c = draw.normal(1, 64, 2)
    c[..., 0] = torch.tensor([2.0**100, -(2.0**100)]).repeat(32)
    B = draw.normal(2, 2 * 4)
    B[0] = 2.0**40
    A = torch.zeros(3, 2)
    return {"A_k": A, "B_k": B, "A_v": A, "B_v": B, "c_k": c, "c_v": c}


def values_are_absorbed(student: Sandbox, draw: Draw) -> None:
    """Values are not rebuilt. Here C_v B_v has numbers that float32 cannot hold; in p C_v, with
    the same weight for all tokens, they cancel."""
    tensors = draw_large(draw)
    other = tensors.pop("c_k")[0, :, 1].mean() / 2
    tensors["p"] = torch.full((1, 4, 64), 1 / 128)
    chunk = draw.choose([6, 16, 100])
    answer = ask(student, "old_values", tensors, begin=0, sizes=SIZES, chunk=chunk)
    want = other * tensors["B_v"][1].view(2, 1, 4)
    expect(answer, "out", want.expand(2, 2, 4), TOLERANCE)


def tokens_share_a_position(student: Sandbox, draw: Draw) -> None:
    """`attend` returns one softmax over exact keys and over old ones: rebuilt, with their bias,
    turned to the middle of their segment, and damped there, pair by pair."""
    for i in range(12):
        segments = SEGMENTS[i % 4]
        # Tokens before `start` are behind the sliding window.
        sinks = draw.integer(0, 2)
        start = draw.integer(0, 15)
        stop = start + draw.choose([0, 1, 7, 20, 40, 45])
        # Latents of all tokens but the sinks, newer ones than `stop` too, as in a real cache.
        held = stop + draw.integer(1, 4)
        layer = attention.draw_layer(draw, draw.integer(1, 6), bias=i % 3 == 1)
        tensors = layer.tensors
        tensors["q"] = tensors["q"][:, :, :1]
        for name in "kv":
            tensors[f"c_{name}"] = draw.normal(len(tensors["q"]), held, len(tensors[f"B_{name}"]))
        k = layer.rebuilt("k", tensors["c_k"][:, start:stop])
        k = attention.rotate_in_segments(k, start, stop, sinks, segments)
        v = layer.rebuilt("v", tensors["c_v"][:, start:stop])
        q = attention.rotate(tensors["q"], torch.tensor([sinks + held - 1]))
        keys = torch.cat([k, tensors["k"]], 2)
        want = attention.softmax_attention(q, keys, torch.cat([v, tensors["v"]], 2))
        numbers = {"first": sinks + start, "old": sinks + stop, "sinks": sinks}
        numbers |= {"segments": segments, "chunk": [1, 5, 100][i // 4], "sizes": layer.sizes}
        answer = ask(student, "attend", tensors, **numbers)
        expect(answer, "out", want, TOLERANCE, f"{numbers}, biases {i % 3 == 1}")


def keys_are_absorbed(student: Sandbox, draw: Draw) -> None:
    """Keys are not rebuilt. Here C_k B_k has numbers that float32 cannot hold; the query is 0,
    and so are u = q R B_k^T and all scores."""
    tensors = draw_large(draw)
    full = draw.choose([2, 4, 8])
    tensors |= {"q": torch.zeros(1, 4, 1, 4), "c_v": tensors["c_v"] * 0}
    tensors |= {"k": draw.normal(1, 2, full, 4), "v": draw.normal(1, 2, full, 4)}
    numbers = {"first": 0, "old": 64, "sinks": 0, "sizes": SIZES, "chunk": 16}
    answer = ask(student, "attend", tensors, segments=draw.choose(SEGMENTS), **numbers)
    want = tensors["v"].sum(2, keepdim=True) / (64 + full)
    expect(answer, "out", want.repeat_interleave(2, 1), TOLERANCE)


def segments_tell(student: Sandbox, draw: Draw) -> None:
    """`infer.py` finds numbers in a text, in 16 bits and in 4."""
    finds_numbers(student, draw, fast=True, dtype="float32")
    finds_numbers(student, draw, fast=True, bits=4)
