"""Numbers that leave the range of their type: one line, wherever logits or latents are used."""

import json
import math

import pytest
import torch

import cskv
import infer
import train
from beyond.segments import FastCache
from cskv import init_factors
from experiments import evaluate
from model import full_cache
from support.command import UserError
from support.factors_file import load_factors, save_factors
from tests.helpers import OneToken, call, make_factors, save_checkpoint, tiny_model, tiny_tokens

torch.set_grad_enabled(False)


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


@pytest.fixture(scope="module", params=["mlp", "keys", "values", "logits"])
def large(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = large_model(request.param)
    save_checkpoint(model, folder)
    save_factors(folder / "f", init_factors("svd", model, [6, 6], [6, 6]), model, torch.float32)
    (folder / "text.txt").write_text(" ".join(f"t{i * i % 61}" for i in range(400)))
    return folder


def refused(code, out, err):
    last = err.splitlines()[-1]
    return code == 2 and last.startswith("error: ") and "--dtype" in last and "Traceback" not in err


@pytest.mark.parametrize(
    "more", [[], ["--temperature", 1], ["--json"]], ids=["", "sampled", "json"]
)
def test_infer_refuses_logits_that_are_not_finite(large, capsys, more):
    args = ["--model", large, "--cache", "full", "--prompt", "t5 t6 t7", *more]
    assert refused(*call(infer, capsys, *args, "--dtype", "float16"))
    for dtype in ("bfloat16", "float32"):
        assert call(infer, capsys, *args, "--dtype", dtype)[0] == 0


@pytest.mark.parametrize("what", ["perplexity", "longeval"])
def test_evaluate_refuses_logits_that_are_not_finite(large, tmp_path, capsys, what):
    text = ["--text", large / "text.txt", "--context", 20, "--steps", 4, "--passages", 2]
    own = text if what == "perplexity" else ["--lines", 2, "--cases", 1]
    args = [what, "--model", large, "--caches", "full", *own, "--json", tmp_path / "rows"]
    assert refused(*call(evaluate, capsys, *args, "--dtype", "float16"))
    assert not (tmp_path / "rows").exists()


def test_train_refuses_numbers_that_are_not_finite(large, tmp_path, capsys):
    if "logits" in str(large):
        pytest.skip("training does not read the logits")
    args = [
        "--model",
        large,
        "--data",
        large / "text.txt",
        "--seq-len",
        40,
        "--out",
        tmp_path / "f",
    ]
    assert refused(*call(train, capsys, *args, "--dtype", "float16"))
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("kind", [cskv.BiBranchCache, OneToken, FastCache])
def test_latents_beyond_float16_are_never_wrong_numbers(side, bits, kind):
    """In a float32 model, in every store of 16 bits and below: the logits say so as soon as such a
    latent is attended; in 32 bits they are right."""
    model = large_model(side)
    tokens, factors = tiny_tokens(model, 2, 80), make_factors(model, 12, 13)
    names = {}
    for name, width in (("stored", bits), ("exact", 32)):
        cache = cskv.bi_branch_cache(model, factors.in_bits(width, width), 4, 80, kind)
        model(tokens[:, :70], cache)
        names[name] = torch.cat([model(tokens[:, t : t + 1], cache) for t in range(70, 80)], 1)
    assert not names["stored"].isfinite().all(-1).any()
    assert names["exact"].isfinite().all()
    if kind is not FastCache:  # its positions are shared
        torch.testing.assert_close(names["exact"], model(tokens)[:, 70:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", [16, 4])
def test_infer_names_the_bits_of_such_latents(tmp_path, capsys, bits):
    model = large_model("keys")
    save_checkpoint(model, tmp_path)
    save_factors(tmp_path / "f", make_factors(model, 6, 6), model, torch.float32)
    prompt = " ".join(f"t{i % 61}" for i in range(70))
    args = ["--model", tmp_path, "--factors", tmp_path / "f", "--window", 2, "--prompt", prompt]
    code, out, err = call(infer, capsys, *args, "--bits", bits)
    assert refused(code, out, err) and "--bits 32" in err
    assert call(infer, capsys, *args, "--bits", 32)[0] == 0


def test_a_huge_loss_is_still_a_number(tmp_path, capsys):
    """exp(nll) beyond the largest float64 is written as 1e304."""
    model = tiny_model()
    model.lm_head.weight *= 1e4
    save_checkpoint(model, tmp_path)
    (tmp_path / "text.txt").write_text(" ".join(f"t{i * i % 61}" for i in range(400)))
    text = ["--text", tmp_path / "text.txt", "--context", 20, "--steps", 4, "--passages", 2]
    args = ["--model", tmp_path, "--caches", "full", *text, "--json", tmp_path / "rows"]
    assert call(evaluate, capsys, "perplexity", *args)[0] == 0
    (row,) = json.loads((tmp_path / "rows").read_text())
    assert math.isfinite(row["perplexity"]) and row["perplexity"] > 1e300


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_weight_that_is_not_finite_is_named(tmp_path, capsys, name, value):
    model = tiny_model()
    model.state_dict()[name].view(-1)[3] = value
    save_checkpoint(model, tmp_path)
    args = ["--model", tmp_path, "--cache", "full", "--prompt", "t1 t2"]
    code, out, err = call(infer, capsys, *args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert name in err and "not finite; fetch it again" in err


def test_a_weight_beyond_its_type_is_named_with_one_that_holds_it(tmp_path, capsys):
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    save_checkpoint(model, tmp_path)
    args = ["--model", tmp_path, "--cache", "full", "--prompt", "t1 t2", "--dtype"]
    code, _, err = call(infer, capsys, *args, "float16")
    assert code == 2 and "float16 cannot hold; try --dtype bfloat16" in err
    assert call(infer, capsys, *args, "bfloat16")[0] == 0


def zeroed(names):
    model = tiny_model()
    for i, name in names:
        getattr(model.model.layers[i].self_attn, name).weight.zero_()
    return model


@pytest.mark.parametrize("init", ["random", "svd", "asvd", "optimal", "attention"])
@pytest.mark.parametrize(
    "names",
    [[(0, "v_proj")], [(1, "k_proj")], [(i, n) for i in (0, 1) for n in ("k_proj", "v_proj")]],
    ids=["values", "keys", "all"],
)
def test_a_projection_of_zeros_has_factors_of_its_own(tmp_path, capsys, names, init):
    """As a pruned layer has: trained, saved, loaded, and used."""
    save_checkpoint(zeroed(names), tmp_path)
    (tmp_path / "text.txt").write_text(" ".join(f"t{i * i % 61}" for i in range(400)))
    data = ["--data", tmp_path / "text.txt", "--seq-len", 40, "--samples", 3]
    args = ["--model", tmp_path, "--k-ratio", 0.66, "--v-ratio", 0.66, "--init", init, *data]
    code, _, err = call(train, capsys, *args, "--out", tmp_path / "f")
    assert code == 0, err
    args = ["--model", tmp_path, "--factors", tmp_path / "f", "--prompt", "t1 t2", "--window", 1]
    assert call(infer, capsys, *args, "--max-new-tokens", 4)[0] == 0


def test_zeros_do_not_hide_another_model(tmp_path):
    model = zeroed([(0, "v_proj")])
    save_factors(tmp_path / "f", init_factors("svd", model, [4, 4], [4, 4]), model)
    assert load_factors(tmp_path / "f", model)
    for other in (tiny_model(), zeroed([(0, "k_proj")]), zeroed([(0, "v_proj"), (1, "v_proj")])):
        with pytest.raises(UserError, match="another model"):
            load_factors(tmp_path / "f", other)
    small = tiny_model(scale=1e-6)  # norms are compared as shares of each other, however small
    save_factors(tmp_path / "f", init_factors("svd", small, [4, 4], [4, 4]), small, torch.float32)
    assert load_factors(tmp_path / "f", small)
    with pytest.raises(UserError, match="another model"):
        load_factors(tmp_path / "f", tiny_model(seed=1, scale=1e-6))


def test_a_full_cache_of_zeros_is_unharmed():
    model = zeroed([(0, "k_proj"), (0, "v_proj")])
    tokens = tiny_tokens(model, 1, 9)
    cache = full_cache(model)
    model(tokens[:, :8], cache)
    torch.testing.assert_close(model(tokens[:, 8:], cache)[:, 0], model(tokens)[:, 8])
