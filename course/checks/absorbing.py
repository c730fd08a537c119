"""Problem f: values that are never rebuilt, and keys that share a position with neighbours."""

import torch
from torch import Tensor

from course.checks import attention
from course.checks.telling import finds_numbers
from course.sandbox import Draw, Sandbox, expect

TOLERANCE = 2e-4  # float32 rounds to 6e-8: a score of 20 is off by that, and values may cancel
SEGMENTS = [((1, 0),), ((2, 4), (4, 0)), ((3, 0),), ((4, 8), (8, 16), (16, 0))]


def damping_is_the_mean_turn(student: Sandbox, draw: Draw) -> None:
    """damping(w, L) is the mean of cos(tau w) over the L offsets tau from the middle of a segment,
    for fast and for slow w; 1 for L = 1."""
    for length in (1, 2, 3, draw.integer(4, 40), 512):
        w = 10 ** (-5 * draw.uniform(draw.integer(1, 9)))  # 0.00001 .. 1
        answer = student.ask("beyond.segments.damping", {"w": w}, length=length)
        expect(answer, "damping", attention.mean_turn(w, length), 1e-9, f"L = {length}")


def weighted_values(student: Sandbox, draw: Draw) -> None:
    """`old_values` returns p times the values of the tokens from `begin` on, biases included, for
    every query head, whatever the length of a chunk. p's sum is below 1."""
    for i in range(6):
        n, begin = draw.integer(5, 30), draw.integer(0, 9)
        bias = i % 2 == 1
        chunk = [1, 3, 8, 100][i % 4]
        layer = attention.draw_layer(draw, 1, bias)
        B, H, _, _ = layer.tensors["q"].shape
        c_v = draw.normal(B, begin + n + 2, len(layer.tensors["B_v"]))
        p = draw.uniform(B, H, n) / n
        values = layer.rebuilt("v", c_v[:, begin : begin + n])  # [B, H_kv, n, D]
        want = p.unflatten(1, (values.shape[1], -1)) @ values  # [B, H_kv, G, D]
        tensors = {**layer.tensors, "p": p, "c_v": c_v}
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
        numbers = {"begin": begin, "chunk": chunk}
        answer = student.ask("scenarios.old_values", tensors, sizes=layer.sizes, **numbers)
        at = f"{n} tokens, {numbers}, biases {bias}"
        expect(answer, "out", want.flatten(0, 1), TOLERANCE, at)


def draw_large(draw: Draw) -> tuple[dict[str, Tensor], list]:
    """Factors and latents that rebuild to 2^140, which float32 cannot hold, and sizes. The first
    channel of latents is 2^100 and -2^100 by turns, the row of B for it 2^40."""
    H_kv = draw.choose([1, 2])
    c = draw.normal(1, 64, 2).float()
    c[..., 0] = torch.tensor([2.0**100, -(2.0**100)]).repeat(32)
    B = draw.normal(2, H_kv * 4).float()
    B[0] = 2.0**40
    A = torch.zeros(3, 2)
    tensors = {"A_k": A, "B_k": B, "A_v": A, "B_v": B, "c_k": c, "c_v": c}
    return tensors, [2 * H_kv, H_kv, 4, None]


def values_are_absorbed(student: Sandbox, draw: Draw) -> None:
    """Values are not rebuilt. Here C_v B_v has numbers that float32 cannot hold; in p C_v, with the
    same weight for all tokens, they cancel."""
    tensors, sizes = draw_large(draw)
    H, H_kv, _, _ = sizes
    other = tensors.pop("c_k")[0, :, 1].double().sum() / 128
    tensors["p"] = torch.full((1, H, 64), 1 / 128)
    chunk = draw.choose([6, 16, 100])
    answer = student.ask("scenarios.old_values", tensors, begin=0, sizes=sizes, chunk=chunk)
    want = other * tensors["B_v"][1].double().view(H_kv, 1, 4)
    expect(answer, "out", want.expand(H_kv, 2, 4), TOLERANCE)


def tokens_share_a_position(student: Sandbox, draw: Draw) -> None:
    """`attend` returns one softmax over exact keys and over old ones: rebuilt, with their bias,
    turned to the middle of their segment, and damped there, pair by pair."""
    for i in range(12):
        # Tokens before `start` are behind the sliding window.
        sinks, start = draw.integer(0, 2), draw.integer(0, 15)
        stop = start + draw.choose([0, 1, 7, 20, 40, 45])
        layer = attention.draw_layer(draw, draw.integer(1, 6), bias=i % 3 == 1)
        # Latents of all tokens but the sinks, newer ones than `stop` too, as in a real cache.
        held = stop + draw.integer(1, 4)
        tensors = layer.tensors
        tensors["q"] = tensors["q"][:, :, :1]
        B = len(tensors["q"])
        tensors |= {f"c_{name}": draw.normal(B, held, len(tensors[f"B_{name}"])) for name in "kv"}
        tensors = {name: tensor.float() for name, tensor in tensors.items() if name != "x"}
        numbers = {"first": sinks + start, "old": sinks + stop, "sinks": sinks}
        numbers |= {"segments": SEGMENTS[i % 4], "chunk": [1, 5, 100][i // 4]}
        answer = student.ask("scenarios.attend", tensors, sizes=layer.sizes, **numbers)
        tensors = {name: tensor.double() for name, tensor in tensors.items()}
        layer.tensors = tensors
        k, v = (layer.rebuilt(name, tensors[f"c_{name}"][:, start:stop]) for name in "kv")
        k = attention.rotate_in_segments(k, start, stop, sinks, SEGMENTS[i % 4])
        k, v = torch.cat([k, tensors["k"]], 2), torch.cat([v, tensors["v"]], 2)
        q = attention.rotate(tensors["q"], torch.tensor([sinks + held - 1]))
        want = attention.softmax_attention(q, k, v)
        expect(answer, "out", want, TOLERANCE, f"{numbers}, biases {i % 3 == 1}")


def keys_are_absorbed(student: Sandbox, draw: Draw) -> None:
    """Keys are not rebuilt. Here C_k B_k has numbers that float32 cannot hold; the query is 0, and
    so are u = q R B_k^T and all scores."""
    tensors, sizes = draw_large(draw)
    H, H_kv, D, _ = sizes
    full = draw.choose([2, 4, 8])
    tensors |= {"q": torch.zeros(1, H, 1, D), "c_v": tensors["c_v"] * 0}
    tensors |= {name: draw.normal(1, H_kv, full, D).float() for name in "kv"}
    numbers = {"first": 0, "old": 64, "sinks": 0, "segments": draw.choose(SEGMENTS), "chunk": 16}
    answer = student.ask("scenarios.attend", tensors, sizes=sizes, **numbers)
    want = tensors["v"].double().sum(2, keepdim=True) / (64 + full)
    expect(answer, "out", want.repeat_interleave(2, 1), TOLERANCE)


def segments_tell(student: Sandbox, draw: Draw) -> None:
    """`infer.py` finds numbers in a text, in 16 bits and in 4."""
    finds_numbers(student, draw, fast=True, dtype="float32")
    finds_numbers(student, draw, fast=True, bits=4)
