"""Problem c: the bi-branch cache, against attention with the window mask written out.

Tolerances are those of latents in 32 bits and of RoPE's table, which is in float32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from course.checks.attention import Layer, draw_attend, draw_layer, rotate
from course.sandbox import Draw, Failed, Sandbox, expect, look, relative_error

TOLERANCE = 1e-4


def run_texts(
    student: Sandbox, draw: Draw, scenario: str
) -> Iterator[tuple[Layer, int, dict, str]]:
    """Layers with the windows, sinks, biases and sliding windows that any right cache must manage,
    the length of each prompt, what a scenario returned for them, and a description."""
    settings = [
        {"window": 1},
        {"window": draw.integer(2, 4), "bias": True},
        {"window": draw.integer(2, 4), "sinks": draw.integer(1, 3)},
        {"window": draw.integer(5, 7), "sliding": draw.integer(8, 10), "sinks": 1},
        {"window": 40, "bias": True, "sinks": 2},  # longer than the text
    ]
    for choice in settings:
        layer = draw_layer(draw, draw.integer(20, 30), **choice)
        prompt = draw.integer(1, 15)
        numbers = {"sizes": layer.sizes, "window": layer.window, "sinks": layer.sinks}
        numbers |= {"prompt": prompt, "expected": draw.choose([0, layer.T])}
        answer = student.ask(scenario, layer.tensors, **numbers)
        at = f"prompt {prompt}, window {layer.window}, sinks {layer.sinks}"
        yield layer, prompt, answer, f"{at}, sliding window {layer.sliding}"


def prefill_is_exact(student: Sandbox, draw: Draw) -> None:
    """`prefill` returns causal attention with the exact keys and values, as if there were no
    factors: `remember` has left them as they were. `length` is set, so a second prefill is a
    ValueError."""
    for layer, prompt, answer, at in run_texts(student, draw, "scenarios.prefill_only"):
        k, v = layer.tensors["k"], layer.tensors["v"]
        want = torch.cat([layer.attend(t, k, v) for t in range(prompt)], 2)
        expect(answer, "prefill", want, TOLERANCE, at)
        expect(answer, "length", prompt, 0)
        if not look(answer, "refused", ()):
            raise Failed("a second prefill on the same cache was not refused")


def latents_of_all_but_sinks(student: Sandbox, draw: Draw) -> None:
    """After a prompt and further tokens, c_k and c_v hold x A of every token but the sinks, in
    order, before RoPE; the ring has room for the sinks and the window, and no more."""
    for layer, _, answer, at in run_texts(student, draw, "scenarios.branches"):
        x = layer.tensors["x"][:, layer.sinks :]
        expect(answer, "c_k", x @ layer.tensors["A_k"], 1e-5, at)
        expect(answer, "c_v", x @ layer.tensors["A_v"], 1e-5, at)
        ring = int(look(answer, "ring", ()))
        if ring > layer.sinks + layer.window:
            raise Failed(f"the ring has {ring} slots; {at}")
        expect(answer, "final_length", layer.T, 0)


def attend_is_one_softmax(student: Sandbox, draw: Draw) -> None:
    """`attend` rebuilds keys and values of the tokens first .. old - 1, biases included, turns the
    keys to their positions, and takes one softmax over them and the exact ones."""
    for i in range(6):
        sinks = draw.choose([0, 0, 2])
        n = draw.integer(3, 15) if i else 0
        tensors, numbers, want, at = draw_attend(draw, n, i % 2 == 1, sinks)
        expect(student.ask("scenarios.attend", tensors, **numbers), "out", want, TOLERANCE, at)


def each_token_one_branch(student: Sandbox, draw: Draw) -> None:
    """At every step `decode` hands `attend` exact, rotated keys and exact values of the sinks and
    the newest `window` tokens (in any order), and first .. old - 1 are all others that are seen."""
    for layer, prompt, answer, at in run_texts(student, draw, "scenarios.branches"):
        expect(answer, "calls", layer.T - prompt, 0, "attend is called once a step")
        for i, t in enumerate(range(prompt, layer.T)):
            seen = layer.seen(t)
            exact = layer.is_exact(seen, t)
            full, old = seen[exact], seen[~exact].tolist()
            first, stop = (int(look(answer, f"{name}{i}", ())) for name in ("first", "old"))
            if list(range(first, stop)) != old:
                raise Failed(f"step {t}: first {first}, old {stop}; compressed are {old}; {at}")
            q = rotate(layer.tensors["q"][:, :, t : t + 1], torch.tensor([t]))
            expect(answer, f"q{i}", q, TOLERANCE, f"the query of step {t}; {at}")
            k, v = rotate(layer.tensors["k"][:, :, full], full), layer.tensors["v"][:, :, full]
            error = error_of_tokens(answer, i, torch.cat([k, v], -1))
            if not error <= TOLERANCE:
                raise Failed(f"step {t}: other keys or values, relative error {error:.2g}; {at}")


def error_of_tokens(answer: dict, i: int, want: Tensor) -> float:
    """That of keys and values of step i side by side, [B, H_kv, n, 2 D], in whatever order."""
    B, H_kv, n, width = want.shape
    got = torch.cat([look(answer, f"{name}{i}", (B, H_kv, n, width // 2)) for name in "kv"], -1)
    # Each wanted token's nearest one, by the last value channel of the first head.
    in_order = [x[:, :, x[0, 0, :, -1].argsort()] for x in (got, want)]
    return relative_error(in_order[0], in_order[1])


def decode_step_by_step(student: Sandbox, draw: Draw) -> None:
    """All together: every decode step equals attention with the window mask written out."""
    for layer, prompt, answer, at in run_texts(student, draw, "scenarios.sequence"):
        want = torch.cat([layer.step(t) for t in range(prompt, layer.T)], 2)
        expect(answer, "steps", want, TOLERANCE, at)
