"""Problem c: the bi-branch cache, against attention with the window mask written out."""

from collections.abc import Iterator

import torch

from course.checks.attention import draw_layer, rotate
from course.checks.telling import finds_numbers
from course.sandbox import Draw, Failed, Sandbox, expect, look

STEPS = 15  # of decode
TOLERANCE = 1e-4  # latents have 32 bits, and RoPE's table is in float32


def run_texts(student: Sandbox, draw: Draw, steps=STEPS) -> Iterator[tuple]:
    """Layers with the windows, sinks, biases and sliding windows that any right cache must manage.
    Each with the length of its prompt, what came back, and a description."""
    settings = [
        {"window": 1},
        {"window": draw.integer(2, 4), "bias": True},
        {"window": draw.integer(2, 4), "sinks": draw.integer(1, 3)},
        {"window": draw.integer(5, 7), "sliding": draw.integer(8, 10), "sinks": 1},
        {"window": 40, "bias": True, "sinks": 2},  # longer than the text
    ]
    # The last prompt is shorter than its sinks.
    for choice, most in zip(settings, (15, 15, 15, 15, 1), strict=True):
        prompt = draw.integer(1, most)
        layer = draw_layer(draw, prompt + steps, **choice)
        numbers = {"window": layer.window, "sinks": layer.sinks, "prompt": prompt}
        numbers["sizes"] = layer.sizes
        answer = student.ask("scenarios.sequence", layer.tensors, **numbers)
        yield layer, prompt, answer, str(numbers)


def prefill_is_exact(student: Sandbox, draw: Draw) -> None:
    """`prefill` returns causal attention with the exact keys and values, as if there were no
    factors. `remember` leaves x, q, k and v as they were, and sets `length`, so a second prefill is
    a ValueError."""
    for layer, prompt, answer, at in run_texts(student, draw, steps=0):
        k = layer.tensors["k"]
        v = layer.tensors["v"]
        want = torch.cat([layer.attend(t, k, v) for t in range(prompt)], 2)
        expect(answer, "prefill", want, TOLERANCE, at)
        expect(answer, "length", prompt, 0)


def latents_of_all_but_sinks(student: Sandbox, draw: Draw) -> None:
    """After a prompt and further tokens, c_k and c_v hold x A of every token but the sinks, in
    order, before RoPE. The memory behind k is that of the sinks and the window, and no more."""
    for layer, prompt, answer, at in run_texts(student, draw):
        x = layer.tensors["x"][:, layer.sinks :]
        expect(answer, "c_k", x @ layer.tensors["A_k"], 1e-5, at)
        expect(answer, "c_v", x @ layer.tensors["A_v"], 1e-5, at)
        room = int(look(answer, "room", ()))
        if room > layer.sinks + layer.window:
            raise Failed(f"the memory behind k has room for {room} tokens; copy slices; {at}")
        expect(answer, "final_length", prompt + STEPS, 0)


def each_token_one_branch(student: Sandbox, draw: Draw) -> None:
    """After every step k and v are the exact, rotated keys and the exact values of the sinks and of
    the newest `window` others. `branches` returns four positions: first_sink .. S - 1 are the sinks
    that are seen, first_old .. window_start - 1 are seen through latents, the others exactly."""
    for layer, prompt, answer, at in run_texts(student, draw):
        for i in range(STEPS):
            t = prompt + i
            at_t = f"step {t}; {at}"
            held = torch.arange(t + 1)
            held = held[layer.is_exact(held, t)]
            k = rotate(layer.tensors["k"][:, :, held], held)
            expect(answer, f"k{i}", k, TOLERANCE, at_t)
            expect(answer, f"v{i}", layer.tensors["v"][:, :, held], TOLERANCE, at_t)
            seen = layer.seen(t)
            S = min(t + 1, layer.sinks)
            sinks = int((seen < S).sum())
            exact = int(layer.is_exact(seen, t).sum())
            window_start = t + 1 - (exact - sinks)
            want = [S - sinks, S, window_start - (len(seen) - exact), window_start]
            got = look(answer, f"branches{i}", (4,)).tolist()
            if got != want:
                raise Failed(f"branches returned {got}, {want} was expected; {at_t}")


def decode_step_by_step(student: Sandbox, draw: Draw) -> None:
    """Every decode step is one softmax over the sinks that are seen, the keys and values of the
    tokens first_old .. window_start - 1, rebuilt with their biases, and the window."""
    for layer, prompt, answer, at in run_texts(student, draw):
        for i in range(STEPS):
            t = prompt + i
            expect(answer, f"out{i}", layer.step(t), TOLERANCE, f"step {t}; {at}")


def the_cache_tells(student: Sandbox, draw: Draw) -> None:
    """`infer.py` finds numbers in a text, with the plain cache in bfloat16, and the fast one."""
    finds_numbers(student, draw)
    finds_numbers(student, draw, dtype="float32", fast=True)
