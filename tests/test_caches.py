"""The registry: what all caches have in common, alone and together, and one more."""

import json
import re
from dataclasses import replace

import pytest
import torch

import cskv
import infer
import model
from beyond.segments import FastCache
from cskv import init_factors
from experiments import baselines, caches, evaluate, figures, speed
from model import Transformer
from support.huggingface.checkpoint import load_model
from tests.evaluating import ROOT, arguments, measured, storages, without_seconds
from tests.helpers import OneToken, call, tiny_model, tiny_tokens

ALL = ",".join(caches.CACHES)


@pytest.mark.parametrize("what", ["perplexity", "longeval"])
def test_together_equals_alone(everything, brief, tmp_path, capsys, what):
    """Caches that read a prompt together score and hold what each does that reads it alone."""
    together = measured(everything, capsys, tmp_path / "all", what, "--caches", ALL)
    alone = []
    for name in caches.CACHES:
        alone += measured(everything, capsys, tmp_path / "one", what, "--caches", name)
    assert without_seconds(together) == without_seconds(alone)


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
    assert len(rows) == len(caches.CACHES)
    prompts = [length for length in lengths if 70 < length < 400]  # 400: the calibration text
    assert len(prompts) == 2 * 2  # two cases, twice each
    layers = len(load_model(everything / "model").model.layers)
    assert sorted(length for length in attended if 70 < length < 400) == sorted(prompts * layers)


@pytest.mark.parametrize("bias", [False, True])
def test_caches_hold_16_bits_in_a_model_of_32(bias, monkeypatch):
    """Of every kind, with the logits of the model up to the rounding of keys and values."""
    monkeypatch.setattr(FastCache, "segments", OneToken.segments)
    model = tiny_model(attention_bias=bias)
    tokens, factors = tiny_tokens(model, 2, 50), init_factors("svd", model, [12, 12], [12, 12])

    def row(name, *args, **more):
        return caches.make_row(model, name, *args, dtype=torch.bfloat16, **more)

    rows = [row("full"), row("streaming", 0.0, budget=99), row("h2o", 0.0, budget=99)]
    rows += [row("asvd", 0, factors), row("cskv", 0, factors, window=4)]
    rows += [row("cskv-plain", 0, factors, window=4), row("kivi-4", window=17)]
    expected = model(tokens)
    for row in rows:
        cache = caches.make_cache(model, row, 50)
        model(tokens[:, :40], cache)
        for t in range(40, 50):
            logits = model(tokens[:, t : t + 1], cache)
        assert cache[0].length == 50
        kinds = {t.dtype for t in cache[0].tensors() if t.is_floating_point()}
        # H2O's scores are sums, in 32 bits; KIVI's limits are float16
        assert kinds - {torch.float32} <= {torch.bfloat16, torch.float16}, row.cache
        assert row.cache == "h2o" or torch.float32 not in kinds
        error = (logits[:, 0] - expected[:, -1]).abs().max() / expected[:, -1].abs().max()
        assert error < (0.3 if row.cache == "kivi-4" else 0.05), row.cache
    cache = caches.make_cache(model, rows[0], 50)
    model(tokens, cache)
    assert infer.held_bytes(cache) == infer.full_bytes(model, 2 * 50)


def test_the_added_cache_of_the_readme(everything, brief, tmp_path, capsys, monkeypatch):
    """Its class and its line, as they stand there, are all that is needed."""
    text = (ROOT / "experiments" / "README.md").read_text().split("## Add a cache")[1]
    added_class, added_line = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {**vars(baselines), **vars(caches)}
    exec(added_class, names)
    exec(f"ADDED = {{\n{added_line}}}", names)
    monkeypatch.setattr(caches, "CACHES", {**caches.CACHES, **names["ADDED"]})
    rows = measured(everything, capsys, tmp_path / "rows", "perplexity", "--caches", "full,newest")
    assert [row["cache"] for row in rows] == ["full", "newest"]
    assert rows[1]["measured_ratio"] == pytest.approx(1 - 2 * 20 / 49)  # in 32 bits
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


@pytest.mark.parametrize("name", caches.CACHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_keeps_nothing_that_is_not_counted(name, dtype):
    """No copy of a weight, no table, no buffer beside those of `nbytes()`: with every kind of
    factors, before and after groups are packed, with biases and grouped heads."""
    model = tiny_model(attention_bias=True, rope_theta=1e4)
    tokens = tiny_tokens(model, 2, 150)
    kinds = [None]
    if caches.CACHES[name].shrinks == "channels":
        whole = init_factors("svd", model, [5, 6], [4, 7])
        kinds = [whole.in_bits(bits, bits) for bits in (16, 32, 4, 3)]
        kinds += [whole.in_bits(2, 8).map(lambda pair: replace(pair, group=64))]
    for factors in kinds:
        row = caches.make_row(model, name, 0.5, factors, window=8, sinks=2, dtype=dtype)
        cache = caches.make_cache(model, row, 100)
        weights = storages(model, row.factors, factors)
        model(tokens[:, :90], cache)
        for t in range(90, 150):
            model(tokens[:, t : t + 1], cache)
        for layer in cache:
            kept = storages(layer)
            own = {at: size for at, size in kept.items() if at not in weights}
            assert sum(own.values()) == layer.nbytes(), (name, row.bits)
