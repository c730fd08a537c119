"""Statistics of what the attention makes of keys and values, against sums written out."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beyond.outputs import EVERY, calibrate_outputs
from cskv import calibrate
from support.command import UserError
from tests.drawn import quick, shapes, sinks, windows
from tests.helpers import layer_inputs, naive_rotate, tiny_model, tiny_tokens


@settings(quick, max_examples=10)
@given(shapes, windows, sinks, st.integers(1, 30))
def test_moment_and_metric_are_the_sums_written_out(shape, window, first, length):
    model = tiny_model(**shape)
    config, attention = model.config, model.model.layers[0].self_attn
    heads, D, half = config.num_attention_heads, config.head_dim, config.head_dim // 2
    samples = [tiny_tokens(model, 1, length, seed=1), tiny_tokens(model, 1, 30, seed=2)]
    group = heads // config.num_key_value_heads
    values = torch.zeros(config.d_kv, config.d_kv, dtype=torch.float64)
    queries, mass = torch.zeros(config.num_key_value_heads, D).double(), 0.0
    frequencies = model.rope.frequencies.double()
    for tokens in samples:
        (x, _, v), *_ = layer_inputs(model, tokens)  # v without its bias
        positions = torch.arange(x.shape[1]).double()
        rows = []
        for projection in (attention.q_proj, attention.k_proj):
            bias = 0 if projection.bias is None else projection.bias.double()
            rows.append((x[0] @ projection.weight.T.double() + bias).unflatten(1, (-1, D)))
        q = rows[0]
        q_turned, k_turned = (
            [naive_rotate(y[:, h], positions, frequencies) for h in range(y.shape[1])] for y in rows
        )
        for i in range(first + window, tokens.shape[1], EVERY):
            least = max(0, i + 1 - (config.sliding_window or i + 1))
            start = max(least, first)  # of the tokens that are read compressed
            stop = max(start, i + 1 - window)
            for h in range(heads):
                scores = k_turned[h // group][least : i + 1] @ q_turned[h][i]
                p = (scores / math.sqrt(D)).softmax(0)[start - least : stop - least]
                u = p @ v[0, start:stop]
                values += torch.outer(u, u)
                power = (q[i, h, :half].square() + q[i, h, half:].square()) / 2  # of each plane
                queries[h // group] += p.sum() * power.repeat(2)
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
