"""Statistics of what the attention makes of keys and values, against sums written out."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beyond.budget import sides_of
from beyond.outputs import EVERY, calibrate_outputs
from beyond.shared import calibrate_groups
from cskv import calibrate
from support.command import UserError
from tests.drawn import quick, shapes, sinks, windows
from tests.helpers import layer_inputs, tiny_model, tiny_tokens


def compressed_reads(model, attention, x, window, first):
    """What is read of x [T, hidden] through the compressed branch: for each head of each query that
    is looked at the key head, the query before RoPE [D], and the probabilities [T]."""
    T, D = len(x), model.config.head_dim
    q = attention.q_proj(x).unflatten(1, (-1, D)).transpose(0, 1)
    k = attention.k_proj(x).unflatten(1, (-1, D)).transpose(0, 1)
    q_turned, k_turned = model.rope.rotate(q, 0), model.rope.rotate(k, 0)
    for i in range(first + window, T, EVERY):
        seen = slice(max(0, i + 1 - (model.config.sliding_window or T)), i + 1)
        for h in range(len(q)):
            g = h // (len(q) // len(k))
            p = torch.zeros(T).double()
            p[seen] = (k_turned[g, seen] @ q_turned[h, i] / math.sqrt(D)).softmax(0)
            p[:first] = 0
            p[i + 1 - window :] = 0
            yield g, q[h, i], p


@settings(quick, max_examples=10)
@given(shapes, windows, sinks, st.integers(1, 30))
def test_moment_and_metric_are_the_sums_written_out(shape, window, first, length):
    model = tiny_model(**shape).double()
    config, attention = model.config, model.model.layers[0].self_attn
    samples = [tiny_tokens(model, 1, length, seed=1), tiny_tokens(model, 1, 30, seed=2)]
    values = torch.zeros(config.d_kv, config.d_kv).double()
    queries = torch.zeros(config.num_key_value_heads, config.head_dim).double()
    mass = 0.0
    for tokens in samples:
        (x, _, v), *_ = layer_inputs(model, tokens)  # v without its bias
        for g, q, p in compressed_reads(model, attention, x[0], window, first):
            u = p @ v[0]
            values += torch.outer(u, u)
            power = q.unflatten(0, (2, -1)).square().mean(0)  # of each plane
            queries[g] += p.sum() * power.repeat(2)
            mass += p.sum()
    if not mass:
        with pytest.raises(UserError, match="longer text"):
            calibrate_outputs(model, samples, window, first)
        return
    seen = calibrate_outputs(model, samples, window, first)[0]
    assert torch.equal(seen.k_moment, calibrate(model, samples, first)[0].k_moment)
    torch.testing.assert_close(seen.v_moment, values / mass, rtol=1e-3, atol=1e-5)
    metric = (queries / queries.mean()).flatten().clamp(min=1e-3).diag()
    torch.testing.assert_close(seen.k_metric, metric, rtol=1e-3, atol=1e-5)


def test_moments_of_groups_are_the_sums_written_out():
    """A token counts once, and again by the attention that it gets in all layers of the group."""
    model = tiny_model(num_hidden_layers=4, scale=0.3, sliding_window=19).double()
    samples = [tiny_tokens(model, 1, 40, seed=1), tiny_tokens(model, 1, 33, seed=2)]
    groups = sides_of(4, 2)
    _, moments = calibrate_groups(model, samples, groups, 4, 2)
    for group in groups:
        sums = torch.zeros(2, 24, 24).double()
        for tokens in samples:
            inputs = layer_inputs(model, tokens)
            rows, mass = [], 0
            for i in group.layers:
                x, k, v = (y[0] for y in inputs[i])
                rows.append(k if group.side == "k" else v)
                for _, _, p in compressed_reads(model, model.model.layers[i].self_attn, x, 4, 2):
                    mass += p
            Y = torch.cat(rows, 1)[2:]
            sums[0] += Y.T @ Y
            sums[1] += Y.T @ (Y * mass[2:, None])
        expected = sum(total / total.trace() for total in sums)
        torch.testing.assert_close(moments[group].double(), expected, atol=1e-5, rtol=1e-3)
