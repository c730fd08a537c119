"""The registry: what all caches have in common, alone and together, and one more."""

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cskv
import infer
import model
from beyond.segments import SEGMENTS, FastCache
from cskv import Together, init_factors
from experiments import baselines, caches, evaluate, figures, speed
from experiments.caches import CACHES, CHANNELS, TOKENS, make_cache, make_row
from infer import held_bytes
from model import Transformer
from support.huggingface.checkpoint import load_model
from tests import test_gpu
from tests.drawn import groups, quick, schedules, shapes, sinks, widths, windows
from tests.evaluating import ROOT, arguments, measured, storages
from tests.helpers import OneToken, call, in_bits, make_factors, tiny_model, tiny_tokens
from tests.test_shared import side_by_side

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
    pair = [make_cache(model, row, 0) for _ in range(2)]
    if name == "cskv":
        for layer in pair[0] + pair[1]:
            layer.segments = schedule
    return pair


@pytest.mark.parametrize("name", CACHES)
@settings(quick, max_examples=10)
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
    for method in (cache[0].extend, cache[0].decode):
        with pytest.raises(ValueError, match="on an empty cache"):
            method(x, q, k, k, model.rope)
    model(tiny_tokens(model, 1, 5), cache)
    with pytest.raises(ValueError, match="prefill on a cache that holds 5 tokens"):
        cache[0].prefill(x, q, k, k, model.rope)
    with pytest.raises(ValueError, match="one token a step, got 2"):
        cache[0].decode(x, q, k, k, model.rope)


ALL = ",".join(CACHES)


@pytest.mark.parametrize("what", ["perplexity", "longeval"])
def test_together_equals_alone(everything, brief, tmp_path, capsys, what):
    """Caches that read a prompt together score and hold what each does that reads it alone."""
    together = measured(everything, capsys, tmp_path / "all", what, "--caches", ALL)
    alone = []
    for name in CACHES:
        alone += measured(everything, capsys, tmp_path / "one", what, "--caches", name)
    for row in together + alone:
        row.pop("of_full", None)  # a command has it that has the full cache
    assert together == alone


def test_the_prompt_is_read_once_by_all_but_asvd(everything, brief, tmp_path, capsys, monkeypatch):
    """And attended once in each layer, whatever the number of caches that remember it."""
    lengths, attended = [], []
    real, attend = Transformer.forward, model.causal_attention

    def forward(model, tokens, *rest, **more):
        lengths.append(tokens.shape[1])
        return real(model, tokens, *rest, **more)

    def causal_attention(q, *rest):
        attended.append(q.shape[2])
        return attend(q, *rest)

    monkeypatch.setattr(Transformer, "forward", forward)
    for module in (model, cskv):
        monkeypatch.setattr(module, "causal_attention", causal_attention)
    more = ["--caches", ALL, "--inits", "svd", "--calibrate", everything / "text.txt"]
    rows = measured(everything, capsys, tmp_path / "rows", "longeval", *more)
    assert len(rows) == len(CACHES)
    prompts = [length for length in lengths if 70 < length < 400]  # 400: the calibration text
    assert len(prompts) == 2 * 2  # two cases, twice each
    layers = len(load_model(everything / "model").model.layers)
    assert sorted(length for length in attended if 70 < length < 400) == sorted(prompts * layers)


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_caches_hold_16_bits(name, whole, dtype, monkeypatch):
    """In a model of 32, or of 16 as on a GPU: with everything kept, or nearly so, its logits up to
    the rounding of keys and values."""
    monkeypatch.setattr(FastCache, "segments", OneToken.segments)
    model = tiny_model(scale=0.2, attention_bias=True)
    tokens, factors = tiny_tokens(model, 2, 50), init_factors("svd", model, [12, 12], [12, 12])
    expected = model(tokens)[:, 40:]
    if whole:
        model = model.to(dtype)
    options = {"budget": 99} if CACHES[name].shrinks == TOKENS else {"window": 17}
    if CACHES[name].shrinks == CHANNELS:
        options["factors"] = factors
    cache = make_cache(model, make_row(model, name, 0.0, dtype=dtype, **options), 50)
    model(tokens[:, :40], cache)
    ours = torch.cat([model(token, cache) for token in tokens[:, 40:].split(1, dim=1)], 1)
    assert cache[0].length == 50 and ours.dtype == (dtype if whole else torch.float32)
    # Limits and norms are float16, H2O's scores are sums.
    held = {t.dtype for t in cache[0].tensors()} - {torch.uint8, torch.float16, dtype}
    assert held == ({torch.float32} if name == "h2o" else set())
    error = (ours.float() - expected).abs().max() / expected.abs().max()
    assert error < (0.5 if CACHES[name].bits < 16 else 0.05)
    if name == "full":
        assert held_bytes(cache) == infer.full_bytes(model, 2 * 50)


def test_the_added_cache_of_the_readme(everything, brief, tmp_path, capsys, monkeypatch):
    """Its class and its line, as they stand there, are all that is needed, and hold what all do."""
    text = (ROOT / "experiments" / "README.md").read_text().split("## Add a cache")[1]
    added_class, added_line = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {**vars(baselines), **vars(caches)}
    exec(added_class, names)
    exec(f"ADDED = {{\n{added_line}}}", names)
    monkeypatch.setitem(CACHES, "newest", names["ADDED"]["newest"])
    rows = measured(everything, capsys, tmp_path / "rows", "perplexity", "--caches", "full,newest")
    assert [row["cache"] for row in rows] == ["full", "newest"]
    assert rows[1]["measured_ratio"] == pytest.approx(1 - 2 * 20 / 49)  # in 32 bits
    test_pieces_equal_token_by_token("newest")
    test_calls_in_a_wrong_order_are_errors("newest")
    test_caches_hold_16_bits("newest", True, torch.bfloat16, monkeypatch)
    test_a_cache_keeps_nothing_that_is_not_counted("newest", torch.float32)
    test_gpu.test_a_decode_step_makes_no_tensor_on_the_cpu("newest")
    monkeypatch.setattr(speed, "load_theirs", lambda *_: None)
    args = ["--model", everything / "model", "--lengths", 30, "--rounds", 1, "--caches", "newest"]
    code, out, _ = call(speed, capsys, *args, "--ratios", "0.5")
    assert code == 0 and "| newest 50% |" in out
    pytest.importorskip("matplotlib")
    figures.scores(rows, tmp_path / "picture.png", "measured_ratio", "measured ratio")
    assert (tmp_path / "picture.png").stat().st_size


def test_equal_bytes(everything, tmp_path, capsys):
    """No cache holds more than was asked for, none could hold a token or a rank more; what has no
    such size is left out with a word."""
    more = ["--caches", "streaming,h2o,asvd,cskv", "--equal", 49, "--ratios", "0.1,0.7"]
    more += ["--inits", "svd", "--bits", "16,4", "--cache-dtype", "bfloat16"]
    args = arguments(everything, "perplexity", *more, "--json", tmp_path / "rows")
    code, _, err = call(evaluate, capsys, *args)
    rows = json.loads((tmp_path / "rows").read_text())
    found = [(row["cache"], row["bits"], row["ratio"]) for row in rows]
    caches_16 = [(name, "16", r) for name in ("streaming", "h2o", "asvd") for r in (0.1, 0.7)]
    assert code == 0 and "cskv svd 10% 4 bits: no size" in err
    assert found == [*caches_16, ("cskv", "16", 0.1), ("cskv", "16", 0.7), ("cskv", "4", 0.7)]
    full = 2 * 12 * 2  # bytes of a token and layer
    more_of = {"streaming": full, "h2o": full + 2 * 4, "asvd": 49 * 4, "cskv": 49 * 4}
    for row in rows:
        spare = (row["measured_ratio"] - row["ratio"]) * 49 * full
        assert -1e-6 <= spare < more_of[row["cache"]], row


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_keeps_nothing_that_is_not_counted(name, dtype):
    """No copy of a weight, no table, no buffer beside those of `nbytes()`: with every kind of
    factors, before and after groups are packed, with biases and grouped heads; what layers share
    counts once."""
    model = tiny_model(attention_bias=True, rope_theta=1e4)
    tokens = tiny_tokens(model, 2, 150)
    kinds = [None]
    if CACHES[name].shrinks == CHANNELS:
        whole = init_factors("svd", model, [5, 6], [4, 7])
        kinds = [whole, in_bits(whole, 32, 4), in_bits(whole, 3, 3), in_bits(whole, 2, 8, 64)]
    if name.startswith("cskv"):
        kinds.append(side_by_side(kinds[-1], [Together("k", 0, 2)]))
    for factors in kinds:
        row = make_row(model, name, 0.5, factors, window=8, sinks=2, dtype=dtype)
        cache = make_cache(model, row, 100)
        weights = storages(model, row.factors, factors)
        for piece in tokens.split([90, 1, 1, 58], dim=1):
            model(piece, cache)
        own = {at: size for at, size in storages(cache).items() if at not in weights}
        assert sum(own.values()) == held_bytes(cache), (name, row.bits)
