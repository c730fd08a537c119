"""Numbers that leave the range of their type: one line, wherever logits or latents are used."""

import json
import math

import pytest
import torch

import infer
import train
from beyond.segments import FastCache
from cskv import BiBranchCache, bi_branch_cache, init_factors
from experiments import evaluate
from support.command import UserError
from support.factors_file import load_factors, save_factors
from tests import helpers
from tests.helpers import call, make_factors, save_checkpoint, tiny_model, tiny_tokens

SMALL = ["--context", 20, "--steps", 4, "--passages", 2, "--caches", "full"]


def large_model(which):
    """A model whose numbers float16 cannot hold, but bfloat16 and float32 can."""
    model = tiny_model()
    weight = {
        "mlp": model.model.layers[0].mlp.up_proj.weight,
        "keys": model.model.layers[0].self_attn.k_proj.weight,
        "values": model.model.layers[1].self_attn.v_proj.weight,
        "logits": model.lm_head.weight,
    }[which]
    weight *= 6e4 / weight.abs().max()  # float16 holds the weight, not what it makes
    return model


@pytest.mark.parametrize("which", ["mlp", "keys", "values", "logits"])
def test_commands_refuse_numbers_that_are_not_finite(which, everything, tmp_path, refused, capsys):
    model = ["--model", save_checkpoint(large_model(which), tmp_path / "model"), "--dtype"]
    prompt = ["--cache", "full", "--prompt", "t5 t6 t7"]
    for more in ([], ["--temperature", 1], ["--json"]):
        assert "--dtype" in refused(infer, *model, "float16", *prompt, *more)
    for dtype in ("bfloat16", "float32"):
        assert call(infer, capsys, *model, dtype, *prompt)[0] == 0
    perplexity = ["perplexity", "--text", everything / "text.txt", *SMALL]
    longeval = ["longeval", "--lines", 2, "--cases", 1, "--caches", "full"]
    for args in (perplexity, longeval):
        args += [*model, "float16", "--json", tmp_path / args[0]]
        assert "--dtype" in refused(evaluate, *args, notes=True)
    if which != "logits":  # training does not read them
        args = helpers.arguments(everything, tmp_path / "f", "--init", "optimal")
        assert "--dtype" in refused(train, *args, *model, "float16", notes=True)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("kind", [BiBranchCache, helpers.OneToken, FastCache])
def test_latents_beyond_float16_are_never_wrong_numbers(side, bits, kind):
    """In a float32 model, in every store of 16 bits and below: the logits say so as soon as such a
    latent is attended; in 32 bits they are right."""
    model = large_model(side)
    tokens, factors = tiny_tokens(model, 2, 80), make_factors(model, 12, 13)
    logits = []
    for width in (bits, 32):
        cache = bi_branch_cache(model, factors.in_bits(width, width), 4, 80, kind)
        logits.append(helpers.decode_all(model, tokens, 70, cache)[:, 70:])
    stored, exact = logits
    assert not stored.isfinite().all(-1).any()
    assert exact.isfinite().all()
    if kind is not FastCache:  # its positions are shared
        torch.testing.assert_close(exact, model(tokens)[:, 70:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", [16, 4])
def test_infer_names_the_bits_of_such_latents(tmp_path, refused, capsys, bits):
    model = large_model("keys")
    save_checkpoint(model, tmp_path)
    save_factors(tmp_path / "f", make_factors(model, 6, 6), model, torch.float32)
    prompt = " ".join([f"t{i % 61}" for i in range(70)])
    args = ["--model", tmp_path, "--factors", tmp_path / "f", "--window", 2, "--prompt", prompt]
    error = refused(infer, *args, "--bits", bits)
    assert "--bits 32" in error and "--dtype" in error
    assert call(infer, capsys, *args, "--bits", 32)[0] == 0


def test_a_huge_loss_is_still_a_number(everything, tmp_path, capsys):
    """exp(nll) beyond the largest float64 is written as 1e304."""
    model = tiny_model()
    model.lm_head.weight *= 1e4
    args = ["--model", save_checkpoint(model, tmp_path), "--json", tmp_path / "rows"]
    args += ["--text", everything / "text.txt"]
    assert call(evaluate, capsys, "perplexity", *args, *SMALL)[0] == 0
    (row,) = json.loads((tmp_path / "rows").read_text())
    assert math.isfinite(row["perplexity"]) and row["perplexity"] > 1e300


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e5])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_weight_beyond_its_type_is_named(tmp_path, refused, capsys, name, value):
    model = tiny_model()
    model.state_dict()[name].view(-1)[3] = value
    args = ["--model", save_checkpoint(model, tmp_path), "--cache", "full", "--prompt", "t1 t2"]
    error = refused(infer, *args, "--dtype", "float16")
    assert name in error
    if math.isfinite(value):
        assert "float16 cannot hold; try --dtype bfloat16" in error
        assert call(infer, capsys, *args, "--dtype", "bfloat16")[0] == 0
    else:
        assert "not finite; fetch it again" in error
        assert "not finite; fetch it again" in refused(infer, *args)


def zeroed(*names):
    """A model with projections of zeros, named as `k0`."""
    model = tiny_model()
    for side, i in names:
        getattr(model.model.layers[int(i)].self_attn, f"{side}_proj").weight.zero_()
    return model


@pytest.mark.parametrize("init", ["random", "svd", "asvd", "optimal", "attention"])
@pytest.mark.parametrize("names", [["v0"], ["k1"], ["k0", "v0", "k1", "v1"]])
def test_a_projection_of_zeros_has_factors(everything, tmp_path, trained, capsys, names, init):
    """As a pruned layer has: trained, saved, loaded, and used."""
    model = ["--model", save_checkpoint(zeroed(*names), tmp_path)]
    trained("f", *model, "--init", init, "--samples", 3, "--seq-len", 40)
    args = [*model, "--factors", tmp_path / "f", "--prompt", "t1 t2", "--window", 1]
    assert call(infer, capsys, *args, "--max-new-tokens", 4)[0] == 0


def test_zeros_do_not_hide_another_model(tmp_path):
    small = tiny_model(scale=1e-6)  # norms are compared as shares of each other, however small
    for model, others in (
        (zeroed("v0"), [tiny_model(), zeroed("k0"), zeroed("v0", "v1")]),
        (small, [tiny_model(seed=1, scale=1e-6)]),
    ):
        factors = init_factors("svd", model, [4, 4], [4, 4])
        save_factors(tmp_path / "f", factors, model, torch.float32)
        assert load_factors(tmp_path / "f", model)
        for other in others:
            with pytest.raises(UserError, match="another model"):
                load_factors(tmp_path / "f", other)
