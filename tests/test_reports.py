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

torch.set_grad_enabled(False)


# ------------------------------------------------------------------ numbers that are not finite


@pytest.mark.parametrize(("layer", "side"), [(0, "k"), (0, "v"), (1, "k"), (1, "v")])
def test_a_cost_that_is_not_finite_is_named(layer, side):
    """max(0.0, nan) is 0.0: it was the best cost of all, and every side got rank 1 in 2 bits."""
    model = tiny_model()
    texts = [tiny_tokens(model, 1, 40), tiny_tokens(model, 1, 40, seed=5)]
    probe = Probe(model, texts, 4, 2)
    pair = getattr(make_factors(model, 3, 3).layers[layer], side)
    assert probe.changed({Together(side, layer, 1): [pair]}).cost > 0
    pair.A[0, 0] = torch.inf
    name = {"k": "keys", "v": "values"}[side]
    with pytest.raises(UserError, match=f"layer {layer}, {name}: the cost is not finite"):
        probe.changed({Together(side, layer, 1): [pair]})


def test_one_token_that_overflows_is_enough():
    """A rare token in one passage of several, in the exact run."""
    model = tiny_model()
    texts = [tiny_tokens(model, 1, 40), tiny_tokens(model, 1, 40, seed=5)]
    texts[1][0, -1] = 60
    model.model.embed_tokens.weight[60] = torch.inf
    texts[0][texts[0] == 60] = 1
    probe = Probe(model, texts, 4, 2)
    with pytest.raises(UserError, match="not finite"):
        probe.changed({Together("k", 1, 1): [make_factors(tiny_model(), 3, 3).layers[1].k]})


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
        saved = load_factors(tmp_path / "f", model)
        cache = bi_branch_cache(model, saved, 4, sinks=2)
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
def test_a_budget_of_a_model_with_a_silent_layer(tmp_path, capsys, name):
    """It ended after all probing, with the advice to save as float32."""
    pytest.importorskip("matplotlib")
    save_checkpoint(silent(name), tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(f"t{i * i % 61}" for i in range(900)))
    args = ["--model", tmp_path / "model", "--data", tmp_path / "text.txt", "--samples", 4]
    args += ["--passages", 2, "--seq-len", 60, "--probe-len", 40, "--window", 4, "--sinks", 2]
    args += ["--length", 200, "--remove", 0.6, "--out", tmp_path / "f.safetensors"]
    code, _, err = call(budget, capsys, *args)
    assert code == 0, err


# ------------------------------------------------------------------------ biases in other types


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
    tokens = tiny_tokens(model, batch, 30)
    for part in (tokens[:, :28], tokens[:, 28:29], tokens[:, 29:]):
        ours, theirs = model(part, rounded)[:, -1], model(part, exact)[:, -1]
        if kind is BiBranchCache:  # the other one shares positions
            assert (ours - theirs).norm() < 0.2 * theirs.norm()
        assert ours.isfinite().all()


# --------------------------------------------------------------------------- what a model brings


def test_settings_of_generation_that_are_not_honoured_are_named(tmp_path, capsys):
    """They change the reference library's greedy text, and were ignored in silence."""
    save_checkpoint(tiny_model(), tmp_path / "model")
    args = ["--model", tmp_path / "model", "--cache", "full", "--prompt", "t1 t2"]
    file = tmp_path / "model" / "generation_config.json"
    neutral = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1}
    neutral |= {"suppress_tokens": None, "bad_words_ids": [], "temperature": 0.6, "top_p": 0.9}
    file.write_text(json.dumps({**neutral, "do_sample": True, "eos_token_id": 5}))
    code, _, err = call(infer, capsys, *args)
    assert code == 0 and "not honoured" not in err
    changed = {"repetition_penalty": 1.1, "num_beams": 4, "suppress_tokens": [3], "min_length": 9}
    file.write_text(json.dumps({**neutral, **changed}))
    code, _, err = call(infer, capsys, *args)
    named = [line for line in err.splitlines() if line.startswith("not honoured")]
    assert code == 0 and len(named) == 1 and all(name in named[0] for name in changed)
    assert "top_p" not in named[0] and "no_repeat" not in named[0]


def test_settings_of_generation_may_stand_in_config_json(tmp_path):
    """Where there is no generation_config.json, as in older checkpoints."""
    folder = save_checkpoint(tiny_model(), tmp_path / "model", no_repeat_ngram_size=3)
    assert generation_settings(folder) == ["no_repeat_ngram_size"]
    (folder / "generation_config.json").write_text("{}")
    assert generation_settings(folder) == []


def test_the_list_of_settings_has_names_of_the_reference_library():
    transformers = pytest.importorskip("transformers")
    known = set(transformers.GenerationConfig().to_dict())
    assert set(NOT_HONOURED) - known <= {"constraints", "force_words_ids", "dola_layers"}


def test_weights_in_four_bit_floats_are_refused(tmp_path, capsys):
    """A float4 weight holds two numbers a byte: the message blamed its shape, or there was none."""
    folder = save_checkpoint(tiny_model(), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    for dtype in ("float4_e2m1fn_x2", "float8_e4m3fn", "int8"):
        half = torch.zeros(20, 12, dtype=torch.uint8).view(getattr(torch, dtype))
        save_file({**weights, name: half}, folder / "model.safetensors")
        args = ["--model", folder, "--cache", "full", "--prompt", "t1 t2"]
        code, out, err = call(infer, capsys, *args)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert name in err and "not quantized" in err


# -------------------------------------------------------------------------------- streamed text


def byte_tokens():
    """As in Llama 2: bytes for what has no piece, in a row all wrong if one is."""
    vocab = {f"<0x{i:02X}>": i for i in range(256)} | {"▁the": 256, "▁dog": 257}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return Tokenizer(backend, {}, None), 258


def cleaned_words():
    """With clean_up_tokenization_spaces a space, or two, go when the next word is there."""
    words = ["the", "dog", ".", ",", "'", "s", "'s", "n't", "do", "?", "!", "'m", "'re"]
    vocab = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="the"))
    return Tokenizer(backend, {}, None, clean_up=True), len(words)


def cleaned_pieces():
    """The same, where a word is more than one token: do, n, ', t."""
    pieces = ["▁do", "▁n", "'", "t", "▁", ".", "▁'", "▁x", "s", "▁the"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="▁x"))
    backend.decoder = decoders.Metaspace()
    return Tokenizer(backend, {}, None, clean_up=True), len(pieces)


def byte_level():
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, {}, None), len(vocab)


@pytest.mark.parametrize("make", [byte_tokens, cleaned_words, cleaned_pieces, byte_level])
def test_what_is_streamed_is_the_answer(monkeypatch, make):
    """Letters vanished ("do n'" for "don't"), and a cut emoji had other replacement characters."""
    tokenizer, size = make()
    model, cache = tiny_model(), full_cache(tiny_model())
    model(tiny_tokens(model, 1, 3), cache)
    generator = torch.Generator().manual_seed(0)
    for n in range(600):
        ids = torch.randint(size, (1 + n % 9,), generator=generator).tolist()
        if n % 3 == 0:  # whole letters too
            ids += tokenizer.encode("🙂 é") if size == 256 else []
        pieces = []
        monkeypatch.setattr(infer, "generate", lambda *a, ids=ids: iter(ids))
        result = infer.answer(model, tokenizer, [1], cache, 9, None, pieces.append)
        assert result["text"] == tokenizer.decode(ids)
        assert "".join(pieces) == result["text"], ids


def test_text_is_streamed_as_it_comes(monkeypatch):
    """Not only at the end: all but the last word is there when the last token comes."""
    tokenizer, _ = byte_tokens()
    ids = [256, 257, *"é".encode(), 256, 257]
    settled = [tokenizer.settled(ids[:n]) for n in range(1, len(ids) + 1)]
    assert settled == ["", "the", "the dog", "the dog", "the dogé", "the dogé the"]
