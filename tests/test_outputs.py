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
from tests.helpers import naive_rotate, tiny_model, tiny_tokens


def inputs_of_first_layer(model, tokens):
    """Unrotated q [T, H, D], k [T, H_kv, D] and, without its bias, v, in float64."""
    layer = model.model.layers[0]
    x = layer.input_layernorm(model.model.embed_tokens(tokens))[0].double()
    q, k, v = (getattr(layer.self_attn, f"{name}_proj") for name in "qkv")
    plain = [x @ proj.weight.T.double() for proj in (q, k, v)]
    for y, proj in zip(plain, (q, k), strict=False):
        y += 0 if proj.bias is None else proj.bias.double()
    return [y.unflatten(-1, (-1, model.config.head_dim)) for y in plain]


def turned(y, model):
    """y [T, heads, D], each token turned to its position."""
    t, frequencies = torch.arange(len(y)).double(), model.rope.frequencies.double()
    return torch.stack([naive_rotate(y[:, h], t, frequencies) for h in range(y.shape[1])], 1)


@settings(quick, max_examples=10)
@given(shapes, windows, sinks, st.integers(1, 30))
def test_moment_and_metric_are_the_sums_written_out(shape, window, first, length):
    model = tiny_model(**shape)
    config, half = model.config, model.config.head_dim // 2
    samples = [tiny_tokens(model, 1, length, seed=1), tiny_tokens(model, 1, 30, seed=2)]
    d_kv, group = config.d_kv, config.num_attention_heads // config.num_key_value_heads
    values = torch.zeros(d_kv, d_kv, dtype=torch.float64)
    queries, mass = torch.zeros(config.num_key_value_heads, config.head_dim).double(), 0.0
    for tokens in samples:
        q, k, v = inputs_of_first_layer(model, tokens)
        q_turned, k_turned = turned(q, model), turned(k, model)
        for i in range(first + window, tokens.shape[1], EVERY):
            least = max(0, i + 1 - (config.sliding_window or i + 1))
            start = max(least, first)  # of the tokens that are read compressed
            stop = max(start, i + 1 - window)
            for h in range(config.num_attention_heads):
                scores = k_turned[least : i + 1, h // group] @ q_turned[i, h]
                p = (scores / math.sqrt(config.head_dim)).softmax(0)[start - least : stop - least]
                u = p @ v[start:stop].flatten(1)
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
