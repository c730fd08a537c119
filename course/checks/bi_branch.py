"""Problem c: the bi-branch cache, against attention with the window mask written out.

Tolerances are those of latents in 32 bits and of RoPE's table, which is in float32.
"""

import torch

from course.checks.attention import Layer, draw_attend, draw_layer, rotate
from course.sandbox import Draw, Failed, Sandbox, expect, look, relative_error

TOLERANCE = 1e-4


def settings(draw: Draw) -> list[dict]:
    """Windows, sinks, biases and sliding windows that any right cache must manage."""
    return [
        {"window": 1},
        {"window": draw.integer(2, 4), "bias": True},
        {"window": draw.integer(2, 4), "sinks": draw.integer(1, 3)},
        {"window": draw.integer(5, 7), "sliding": draw.integer(8, 10), "sinks": 1},
        {"window": 40, "bias": True, "sinks": 2},  # longer than the text
    ]


def prefill_is_exact(student: Sandbox, draw: Draw) -> None:
    """`prefill` returns causal attention with the exact keys and values, as if there were no
    factors: `remember` has left them as they were. `length` is set, so a second prefill is a
    ValueError."""
    for choice in settings(draw):
        T = draw.integer(6, 16)
        layer = draw_layer(draw, T, **choice)
        answer = student.ask("prefill_only", layer.tensors, **layer.settings, expected=0)
        expect(answer, "prefill", layer.prompt(T), TOLERANCE)
        expect(answer, "length", torch.tensor(T), 0)
        if not look(answer, "refused", ()):
            raise Failed("a second prefill on the same cache was not refused")


def run(student: Sandbox, draw: Draw, choice: dict, expected: int = 0) -> tuple[Layer, int, dict]:
    """A layer, the length of the prompt, and what `sequence` returned for a text of 20 or more."""
    T, prompt = draw.integer(20, 30), draw.integer(1, 15)
    layer = draw_layer(draw, T, **choice)
    numbers = {**layer.settings, "prompt": prompt, "expected": expected}
    return layer, prompt, student.ask("sequence", layer.tensors, **numbers)


def latents_of_all_but_sinks(student: Sandbox, draw: Draw) -> None:
    """After a prompt and further tokens, c_k and c_v hold x A of every token but the sinks, in
    order, before RoPE; the ring has room for the sinks and the window, and no more."""
    for choice in settings(draw):
        T, prompt = draw.integer(20, 30), draw.integer(1, 15)
        layer = draw_layer(draw, T, **choice)
        numbers = {**layer.settings, "prompt": prompt, "expected": draw.choose([0, T])}
        answer = student.ask("branches", layer.tensors, **numbers)
        for name in "kv":
            want = layer.tensors["x"][:, layer.sinks :] @ layer.tensors[f"A_{name}"]
            expect(answer, f"c_{name}", want, 1e-5, f"sinks {layer.sinks}, prompt {prompt}")
        ring = int(look(answer, "ring", ()))
        if ring > layer.sinks + layer.window:
            raise Failed(f"the ring has {ring} slots, window {layer.window}, sinks {layer.sinks}")
        expect(answer, "final_length", torch.tensor(T), 0)


def attend_is_one_softmax(student: Sandbox, draw: Draw) -> None:
    """`attend` rebuilds keys and values of the tokens first .. old - 1, biases included, turns the
    keys to their positions, and takes one softmax over them and the exact ones."""
    for i in range(6):
        bias, sinks = i % 2 == 1, draw.choose([0, 0, 2])
        n = 0 if i == 5 else draw.integer(3, 15)
        tensors, numbers, want = draw_attend(
            draw, "cskv.BiBranchCache", n, bias, sinks, torch.float64
        )
        answer = student.ask("attend", tensors, **numbers)
        what = f"first {numbers['first']}, old {numbers['old']}, sinks {sinks}, biases {bias}"
        expect(answer, "out", want, TOLERANCE, what)


def each_token_one_branch(student: Sandbox, draw: Draw) -> None:
    """At every step `decode` hands `attend` exact, rotated keys and exact values of the sinks and
    the newest `window` tokens (in any order), and first .. old - 1 are all others that are seen."""
    for choice in settings(draw):
        T, prompt = draw.integer(20, 30), draw.integer(1, 15)
        layer = draw_layer(draw, T, **choice)
        numbers = {**layer.settings, "prompt": prompt, "expected": draw.choose([0, T])}
        answer = student.ask("branches", layer.tensors, **numbers)
        expect(answer, "calls", torch.tensor(T - prompt), 0, "attend is called once a step")
        window = min(layer.window, layer.sliding or layer.window)
        for i, t in enumerate(range(prompt, T)):
            seen = [j for j in range(t + 1) if j > t - (layer.sliding or t + 1)]
            full = [j for j in seen if j < layer.sinks or j > t - window]
            old = [j for j in seen if j not in full]
            at = f"position {t}, window {window}, sinks {layer.sinks}"
            told = int(look(answer, f"f{i}", ())), int(look(answer, f"o{i}", ()))
            if list(range(*told)) != old:
                raise Failed(f"{at}: first {told[0]} and old {told[1]}; compressed are {old}")
            where = torch.tensor(full)
            q = rotate(layer.tensors["q"][:, :, t : t + 1], torch.tensor([t]))
            expect(answer, f"q{i}", q, TOLERANCE, f"{at}: the query")
            k, v = rotate(layer.tensors["k"][:, :, where], where), layer.tensors["v"][:, :, where]
            same_tokens(answer, i, torch.cat([k, v], -1), f"{at}: the full branch")


def same_tokens(answer: dict, i: int, want: torch.Tensor, what: str) -> None:
    """Keys and values of step i side by side, [B, H_kv, n, 2 D], are these but for their order."""
    shape = (*want.shape[:3], want.shape[3] // 2)
    got = torch.cat([look(answer, f"{name}{i}", shape) for name in "kv"], -1).double()
    # Each wanted token's nearest one, by the first value channel of the first head.
    order = want[0, 0].argsort(0)[:, -1], got[0, 0].argsort(0)[:, -1]
    error = relative_error(got[:, :, order[1]], want[:, :, order[0]])
    if not error <= TOLERANCE:
        raise Failed(f"{what} holds other keys or values: relative error {error:.2g}")


def decode_step_by_step(student: Sandbox, draw: Draw) -> None:
    """All together: every decode step equals attention with the window mask written out."""
    for choice in settings(draw):
        layer, prompt, answer = run(student, draw, choice, draw.choose([0, 25]))
        T = layer.tensors["x"].shape[1]
        want = torch.cat([layer.step(t) for t in range(prompt, T)], 2)
        what = f"prompt {prompt}, window {layer.window}, sinks {layer.sinks}"
        expect(answer, "steps", want, TOLERANCE, f"{what}, sliding window {layer.sliding}")
