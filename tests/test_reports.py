"""Faults that users of other projects reported, and that were found here too."""

import json

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers

import infer
from beyond.outputs import calibrate_outputs
from beyond.probes import Probe
from beyond.segments import FastCache
from cskv import BiBranchCache, Together, bi_branch_cache, calibrate, init_factors, output_metric
from experiments import budget
from experiments.caches import Rounded
from model import full_cache
from support.command import UserError
from support.factors_file import load_factors, save_factors
from support.huggingface.checkpoint import NOT_HONOURED, generation_settings
from support.huggingface.tokenizer import Tokenizer
from tests.helpers import call, make_factors, save_checkpoint, tiny_model, tiny_tokens

# ------------------------------------------------------------------ numbers that are not finite


@pytest.mark.parametrize("layer, side, name", [(0, "k", "keys"), (1, "v", "values")])
def test_a_cost_that_is_not_finite_is_named(layer, side, name):
    """max(0.0, nan) is 0.0: it was the best cost of all, and every side got rank 1 in 2 bits. One
    token of one passage is enough."""
    model = tiny_model()
    texts = [tiny_tokens(model, 1, 40), tiny_tokens(model, 1, 40, seed=5)]
    texts[0][texts[0] == 60] = 1
    texts[1][0, -1] = 60
    probe = Probe(model, texts, 4, 2)
    pair = getattr(make_factors(model, 3, 3).layers[layer], side)
    side_of = Together(side, layer, 1)
    assert probe.changed({side_of: [pair]}).cost > 0
    A = pair.A.clone()
    pair.A[0, 0] = torch.inf
    with pytest.raises(UserError, match=f"layer {layer}, {name}: the cost is not finite"):
        probe.changed({side_of: [pair]})
    pair.A.copy_(A)
    model.model.embed_tokens.weight[60] = torch.inf
    with pytest.raises(UserError, match="not finite"):
        Probe(model, texts, 4, 2).changed({side_of: [pair]})


# ------------------------------------------------------------------------------- silent layers


def silent(name):
    """A model with a layer that was added for later training, or that is dead."""
    model = tiny_model()
    layer = model.model.layers[0 if name in ("o_proj", "k_proj") else 1]
    layer.get_submodule(name if "norm" in name else f"self_attn.{name}").weight.zero_()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["o_proj", "q_proj", "k_proj", "v_proj", "input_layernorm"])
def test_a_silent_layer_has_factors_that_can_be_saved(tmp_path, name, dtype):
    """With o_proj 0 an absolute least metric of 1e-12 made B of 1e6; with queries of 0 a mean of 0
    made NaN, and the message said "overflow; try another --dtype"."""
    model = silent(name).to(dtype)
    samples = [tiny_tokens(model, 1, 50, seed=seed) for seed in range(3)]
    for statistics in (calibrate(model, samples), calibrate_outputs(model, samples, 4, 2)):
        factors = init_factors("attention", model, [5, 5], [5, 5], statistics)
        assert all(pair.A.isfinite().all() and pair.B.abs().max() < 1e4 for pair in factors.pairs)
        save_factors(tmp_path / "f", factors, model)
        cache = bi_branch_cache(model, load_factors(tmp_path / "f", model), 4, sinks=2)
        model(samples[0][:, :40], cache)
        assert model(samples[0][:, 40:41], cache).isfinite().all()


@pytest.mark.parametrize("scale", [2**-10, 1, 2**10])
def test_a_metric_is_relative_to_its_own_scale(scale):
    attention = tiny_model().model.layers[0].self_attn
    before = output_metric(attention)
    attention.o_proj.weight.mul_(scale)
    torch.testing.assert_close(output_metric(attention), before * scale**2)
    attention.o_proj.weight.zero_()
    assert torch.equal(output_metric(attention), torch.eye(12, dtype=torch.float64))


@pytest.mark.parametrize("name", ["o_proj", "input_layernorm"])
def test_a_budget_of_a_model_with_a_silent_layer(everything, tmp_path, capsys, name):
    """It ended after all probing, with the advice to save as float32."""
    pytest.importorskip("matplotlib")
    save_checkpoint(silent(name), tmp_path)
    args = ["--model", tmp_path, "--data", everything / "text.txt", "--samples", 4]
    args += ["--passages", 2, "--seq-len", 60, "--probe-len", 40, "--window", 4, "--sinks", 2]
    args += ["--length", 200, "--remove", 0.6, "--out", tmp_path / "f.safetensors"]
    code, _, err = call(budget, capsys, *args)
    assert code == 0, err


# --------------------------------------------------------------------------- what a model brings


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [BiBranchCache, FastCache])
def test_biases_in_caches_of_16_bits(kind, dtype, batch):
    """With one sequence a float32 bias met a 16-bit B, and F.linear raised."""
    model = tiny_model(attention_bias=True)
    factors = make_factors(model, 12, 13).to(torch.empty(0, dtype=dtype))
    cache = bi_branch_cache(model, factors, 4, kind=kind, sinks=1)
    rounded = [Rounded(layer, dtype) for layer in cache]
    exact = full_cache(model)
    for part in tiny_tokens(model, batch, 30).split([28, 1, 1], dim=1):
        ours, theirs = model(part, rounded)[:, -1], model(part, exact)[:, -1]
        if kind is BiBranchCache:  # the other one shares positions
            assert (ours - theirs).norm() < 0.2 * theirs.norm()
        assert ours.isfinite().all()


def test_settings_of_generation_that_are_not_honoured_are_named(tmp_path, capsys):
    """They change the reference library's greedy text, and were ignored in silence. They stand in
    config.json where there is no generation_config.json, as in older checkpoints."""
    save_checkpoint(tiny_model(), tmp_path, no_repeat_ngram_size=3)
    assert generation_settings(tmp_path) == ["no_repeat_ngram_size"]
    settings = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1}
    settings |= {"suppress_tokens": None, "bad_words_ids": [], "temperature": 0.6, "top_p": 0.9}
    settings |= {"do_sample": True, "eos_token_id": 5}
    changed = {"repetition_penalty": 1.1, "num_beams": 4, "suppress_tokens": [3], "min_length": 9}
    for expected in ({}, changed):
        settings |= expected
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
        args = ["--model", tmp_path, "--cache", "full", "--prompt", "t1 t2"]
        code, _, err = call(infer, capsys, *args)
        named = [line for line in err.splitlines() if line.startswith("not honoured")]
        assert code == 0 and len(named) == bool(expected)
        assert set(generation_settings(tmp_path)) == set(expected)
        assert all(name in named[0] for name in expected)


@pytest.mark.slow
def test_the_list_of_settings_has_names_of_the_reference_library():
    transformers = pytest.importorskip("transformers")
    known = set(transformers.GenerationConfig().to_dict())
    assert set(NOT_HONOURED) <= known


@pytest.mark.parametrize("dtype", ["float4_e2m1fn_x2", "float8_e4m3fn", "int8"])
def test_weights_in_four_bit_floats_are_refused(tmp_path, refused, dtype):
    """A float4 weight holds two numbers a byte: the message blamed its shape, or there was none."""
    weights = load_file(save_checkpoint(tiny_model(), tmp_path) / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = torch.zeros(20, 12, dtype=torch.uint8).view(getattr(torch, dtype))
    save_file(weights, tmp_path / "model.safetensors")
    error = refused(infer, "--model", tmp_path, "--cache", "full", "--prompt", "t1 t2")
    assert name in error and "not quantized" in error


# -------------------------------------------------------------------------------- streamed text

BYTES = {f"<0x{i:02X}>": i for i in range(256)} | {"▁the": 256, "▁dog": 257}
LETTERS = {letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
STEPS = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


TOKENIZERS = {  # a model and a decoder
    # As in Llama 2: bytes for what has no piece, in a row all wrong if one is.
    "bytes": (
        models.BPE(BYTES, [], byte_fallback=True),
        decoders.Sequence([*STEPS, decoders.Strip(" ", 1, 0)]),
    ),
    "letters": (models.BPE(LETTERS, []), decoders.ByteLevel()),
}


def make_tokenizer(name):
    model, decoder = TOKENIZERS[name]
    backend = tokenizers.Tokenizer(model)
    backend.decoder = decoder
    return Tokenizer(backend, {}, None)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_is_streamed_is_the_answer(monkeypatch, name):
    """Letters vanished ("do n'" for "don't"), and a cut emoji had other replacement characters."""
    tokenizer = make_tokenizer(name)
    model, cache = tiny_model(), full_cache(tiny_model())
    model(tiny_tokens(model, 1, 3), cache)
    source = infer.Source(model, tokenizer, cache, None, 0.0)
    generator = torch.Generator().manual_seed(0)
    size = tokenizer.backend.get_vocab_size()
    for n in range(300):
        ids = torch.randint(size, (1 + n % 9,), generator=generator).tolist()
        if name == "letters" and n % 3 == 0:  # whole ones too
            ids += tokenizer.encode("🙂 é")
        pieces = []
        monkeypatch.setattr(infer, "generate", lambda *a, ids=ids: iter(ids))
        result = source.answer([1], 9, pieces.append)
        assert result["text"] == tokenizer.decode(ids) == "".join(pieces), ids


def test_text_is_streamed_as_it_comes():
    """Not only at the end: all but the last word is there when the last token comes."""
    ids = [256, 257, *"é".encode(), 256, 257]
    settled = [make_tokenizer("bytes").settled(ids[:n]) for n in range(1, len(ids) + 1)]
    assert settled == ["", "the", "the dog", "the dog", "the dogé", "the dogé the"]
