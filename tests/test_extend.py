"""Several new tokens at once: as if they had come one by one, for every cache of the registry."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beyond.segments import SEGMENTS
from experiments.caches import CACHES, CHANNELS, make_cache, make_row
from infer import held_bytes
from tests.drawn import groups, quick, schedules, shapes, sinks, widths, windows
from tests.helpers import in_bits, make_factors, tiny_model, tiny_tokens

# The first piece is the prompt.
pieces = st.lists(st.sampled_from([1, 2, 3, 17, 40, 70]), min_size=2, max_size=4)


def caches_for(name, model, window, first, factors, schedule):
    """Two empty caches of a kind."""
    dtype = model.lm_head.weight.dtype
    options = {"window": window, "sinks": first if CACHES[name].sinks else 0, "dtype": dtype}
    if CACHES[name].shrinks == CHANNELS:
        options["factors"] = factors
    else:
        options["ratio"] = 0.3
    row = make_row(model, name, **options)
    caches = [make_cache(model, row, 0) for _ in range(2)]
    if name == "cskv":
        for layer in caches[0] + caches[1]:
            layer.segments = schedule
    return caches


@pytest.mark.parametrize("name", CACHES)
@settings(quick, max_examples=15)
@given(shapes, pieces, windows, sinks, widths, widths, groups, schedules)
def test_pieces_equal_token_by_token(
    name, shape, lengths, window, first, k_bits, v_bits, group, schedule
):
    """Logits within rounding, and the bytes, for a text in pieces of any lengths. Of the prompt
    they are those of the model to the last bit, but for a cache of low-rank keys and values."""
    if name == "h2o" or (name == "streaming" and shape["sliding_window"] == 3):
        shape = {**shape, "sliding_window": None}
    # One layer, in float64: numbers beside the border of two codes do not fall to either side.
    model = tiny_model(num_hidden_layers=1, scale=0.3, **shape).double()
    factors = in_bits(make_factors(model, 5, 4), k_bits, v_bits, group)
    together, alone = caches_for(name, model, window, first, factors, schedule)
    tokens = tiny_tokens(model, 2, sum(lengths))
    for piece in tokens.split(lengths, dim=1):
        ours = model(piece, together)
        if alone[0].length:
            expected = torch.cat([model(token, alone) for token in piece.split(1, dim=1)], 1)
        else:
            expected = model(piece, alone)
            assert torch.equal(expected, model(piece)) == (name != "asvd")
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
        assert together[0].length == alone[0].length
        assert held_bytes(together) == held_bytes(alone)


@pytest.mark.parametrize("name", CACHES)
def test_calls_in_a_wrong_order_are_errors(name):
    model = tiny_model()
    cache = caches_for(name, model, 4, 1, make_factors(model, 3, 3), SEGMENTS)[0]
    x = torch.zeros(1, 2, 24)
    q = torch.zeros(1, 4, 2, 6)
    k = torch.zeros(1, 2, 2, 6)
    for call in (cache[0].extend, cache[0].decode):
        with pytest.raises(ValueError, match="on an empty cache"):
            call(x, q, k, k, model.rope)
    model(tiny_tokens(model, 1, 5), cache)
    with pytest.raises(ValueError, match="prefill on a cache that holds 5 tokens"):
        cache[0].prefill(x, q, k, k, model.rope)
    with pytest.raises(ValueError, match="one token a step, got 2"):
        cache[0].decode(x, q, k, k, model.rope)
