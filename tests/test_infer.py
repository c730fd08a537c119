"""The command line of infer.py, from its arguments to its output."""

import json
from itertools import count
from pathlib import Path

import pytest
import torch

import infer
from beyond.segments import FastCache
from cskv import BiBranchCache, bi_branch_cache, init_factors
from model import Rope
from support.factors_file import load_factors, save_factors
from support.huggingface.checkpoint import load_model
from support.huggingface.tokenizer import load_tokenizer
from tests.helpers import call, make_factors, save_checkpoint, tiny_model, tiny_tokens

ROOT = Path(__file__).parent.parent
PROMPT = "t5 t17 t30 t2 t44 t9 t21 t3 t50 t11"


def arguments(everything, *more):
    files = ["--model", everything / "model", "--factors", everything / "f"]
    return [*files, "--prompt", PROMPT, "--max-new-tokens", 12, *more]


@pytest.fixture
def answer(everything, capsys):
    """The result of a command line, which must be one object in JSON."""

    def run(*more):
        code, out, err = call(infer, capsys, *arguments(everything, *more, "--json"))
        assert (code, out.count("\n")) == (0, 1), err
        return json.loads(out)

    return run


def test_json_counts_live_bytes(answer):
    result = answer("--window", 5, "--sinks", 0)
    assert result["prompt_tokens"] == 10 and len(result["tokens"]) == 12
    assert result["text"] == " ".join(f"t{i}" for i in result["tokens"])
    tokens = 10 + 12 - 1  # the last new token is not fed back
    assert result["full_cache_bytes"] == 2 * 2 * 12 * 2 * tokens  # K and V, layers, d_kv, 16 bits
    ring = 2 * 5 * 12 * 4  # keys and values, window, d_kv, float32
    assert result["cache_bytes"] == 2 * (tokens * (4 + 4) * 2 + ring)
    ratio = 1 - result["cache_bytes"] / result["full_cache_bytes"]
    assert result["measured_ratio"] == pytest.approx(ratio)
    assert result["nominal_ratio"] == pytest.approx(1 - 4 / 12)
    # Four sinks, the default: exact, and without latents.
    exact = 2 * (4 + 5) * 12 * 4
    assert answer("--window", 5)["cache_bytes"] == 2 * ((tokens - 4) * (4 + 4) * 2 + exact)


def test_seconds_are_those_of_the_models_steps(answer, monkeypatch):
    """With a clock that shows n^2 when it is read for the n-th time, steps take 1, 5, 9, ..."""
    readings = count()
    monkeypatch.setattr(infer.time, "perf_counter", lambda: next(readings) ** 2)
    result = answer()
    assert result["prefill_seconds"] == 1 and result["decode_seconds_per_token"] == 25


@pytest.fixture
def saved(everything, tmp_path):
    """Writes the factors with other bits and information; returns the flag for that file."""

    def save(k_bits, v_bits, **info):
        model = load_model(everything / "model")
        factors = load_factors(everything / "f", model).in_bits(k_bits, v_bits)
        factors.info.update(info)
        save_factors(tmp_path / "other", factors, model)
        return ["--factors", tmp_path / "other"]

    return save


BITS = [([], 3, 8), (["--bits", 4], 4, 4), (["--bits", 2, "--v-bits", 3], 2, 3)]


@pytest.mark.parametrize("flags, k, v", [*BITS, (["--bits", 4, "--k-bits", 16], 16, 4)])
def test_bits_are_those_of_the_factors_or_of_the_flags(answer, saved, flags, k, v):
    """A longer prompt, so that one group of 32 tokens is packed: bytes tell which bits it has."""
    prompt = " ".join([f"t{i}" for i in range(40)])
    args = [*saved(3, 8), "--prompt", prompt, "--max-new-tokens", 1, "--window", 5, "--sinks", 0]
    result = answer(*args, *flags)
    packed = 32 * (4 * k + 4 * v)
    packed += 32 * 4 if k < 16 else 0  # a scale and a minimum for each channel
    packed += 32 * 32 if v < 16 else 0  # a scale and a minimum for each token
    ring = 2 * 2 * 5 * 12 * 4
    assert result["cache_bytes"] == 2 * (packed + (8 * 4 * 16) * 2) / 8 + ring
    assert result["nominal_ratio"] == pytest.approx(1 - 4 / 12 * (k + v) / 32)


def test_greedy_tokens_equal_recomputing_everything(everything, answer):
    """With the full cache, and with a window over everything: each token is the argmax of a forward
    pass over all before it."""
    model, tokenizer = load_model(everything / "model"), load_tokenizer(everything / "model")
    ids = tokenizer.encode(PROMPT)
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    for flags in (["--cache", "full"], ["--window", 100]):
        assert answer(*flags)["tokens"] == ids[10:]


def test_text_goes_to_stdout_and_notes_to_stderr(everything, answer, capsys):
    """And comparing answers twice."""
    text = answer()["text"]
    code, out, err = call(infer, capsys, *arguments(everything))
    assert code == 0 and out == text + "\n" and "measured ratio" in err
    _, out, _ = call(infer, capsys, *arguments(everything, "--compare"))
    assert out.startswith("--- full cache, 10 tokens of prompt")
    assert f"--- cskv cache, 10 tokens of prompt\n{text}\n\n" in out
    for line in out.splitlines():  # the full cache, in float32 here, has none
        assert "ratio" not in line or line.count("%") == 1
    both, full = answer("--compare"), answer("--cache", "full")
    assert both["full"]["tokens"] == full["tokens"]
    assert both["full"]["cache_bytes"] == 2 * full["full_cache_bytes"]


def test_the_fast_cache_is_the_default(answer, monkeypatch):
    """The plain one is asked for by name; where all tokens are in the window, both say the same."""
    kinds, real = [], infer.shared_cache

    def noted(model, factors, window, expected, kind, sinks):
        kinds.append(kind)
        return real(model, factors, window, expected, kind, sinks)

    monkeypatch.setattr(infer, "shared_cache", noted)
    results = [answer(*flags) for flags in ([], ["--cache", "cskv"], ["--cache", "cskv-plain"])]
    assert kinds == [FastCache, FastCache, BiBranchCache]
    assert len({(str(result["tokens"]), result["cache_bytes"]) for result in results}) == 1


def test_a_window_in_8_bits(answer, saved):
    """If the factors were made for it; in bytes see tests/test_segments.py."""
    made = saved(16, 16, window_bits="8")
    plain = answer()["cache_bytes"]
    assert answer(*made)["cache_bytes"] < plain
    assert answer(*made, "--cache", "cskv-plain")["cache_bytes"] == plain


def test_the_demonstration(capsys):
    """Without arguments: the embedded model's own case, from both caches, and the right number; in
    4 bits, too."""
    code, out, err = call(infer, capsys, "--json")
    result = json.loads(out)
    number = err.split("REGISTER_CONTENT is <")[1].split(">")[0]
    assert code == 0 and result["text"].strip() == result["full"]["text"].strip() == number
    assert result["cache_bytes"] < 0.25 * result["full"]["cache_bytes"]
    for name in ("cskv", "cskv-plain"):
        code, out, _ = call(infer, capsys, "--json", "--bits", 4, "--cache", name)
        assert code == 0 and json.loads(out)["text"].strip() == number
    code, out, _ = call(infer, capsys, "--json", "--max-new-tokens", 3)
    assert code == 0 and len(json.loads(out)["tokens"]) == 3
    code, _, err = call(infer, capsys, "--prompt", "Hello", "--max-new-tokens", 2)
    assert code == 0 and "only finds numbers" in err and "get_smollm2.py" in err


def test_sampling_follows_its_seed(answer):
    def sample(*more):
        return answer(*more)["tokens"]

    hot = ["--temperature", 3, "--seed"]
    assert sample(*hot, 1) == sample(*hot, 1) != sample(*hot, 2)
    assert sample(*hot, 1, "--top-p", 1e-6) == sample()  # a nucleus of one token is greedy


def test_top_p_is_the_smallest_set_that_reaches_p():
    p = torch.tensor([0.1, 0.5, 0.1, 0.3])
    draw = infer.make_sampler(1.0, 0.7, 0)
    drawn = [draw(p.log()) for _ in range(300)]
    assert set(drawn) == {1, 3}
    assert 0.5 < drawn.count(1) / 300 < 0.75  # 0.5 / 0.8


def test_generation_stops_at_the_end_of_text(answer, tmp_path):
    ids = answer()["tokens"]
    save_checkpoint(tiny_model(), tmp_path, eos_token_id=[ids[4], 60])
    assert answer("--model", tmp_path)["tokens"] == ids[: ids.index(ids[4])]


def test_generation_stops_at_the_end_of_the_context(everything, capsys):
    args = arguments(everything, "--json", "--prompt", " ".join(["t1"] * 597))
    code, out, err = call(infer, capsys, *args)
    assert code == 0 and len(json.loads(out)["tokens"]) == 3
    assert "only 3 new tokens" in err


LONG = " ".join(["t1"] * 600)
MISTAKES = [  # of the arguments, and of those without any
    (["--model", "no/such/folder"], "no folder no/such/folder"),
    (["--model", "x" * 300], "no folder"),
    (["--prompt", "  \n"], "prompt is empty"),
    (["--prompt", "t1 \udcc3"], "not valid UTF-8"),
    (["--prompt", LONG], "600 tokens, the model's context 600; shorten it"),
    (["--factors", "none.safetensors"], "no factors file none.safetensors"),
    (["--factors", "."], ". is a folder; give a factors file"),
    (["--window", 10**20], "is not a whole number from 1 to"),
    (["--window", 0], "'0' is not a whole number from 1 to"),
    (["--window", "wide"], "'wide' is not a whole number"),
    (["--max-new-tokens", 0], "--max-new-tokens"),
    (["--temperature", -1], "--temperature"),
    (["--temperature", "nan"], "--temperature"),
    (["--top-p", 2], "--top-p"),
    (["--seed", 10**30], "--seed"),
    (["--bits", 5], "--bits"),
    (["--cache", "half"], "--cache"),
    (["--windw", 3], "--windw"),
    (["--device", "abacus"], "no device 'abacus'"),
    (["--device", "meta"], "no device 'meta'"),
    (["--chat"], "no chat template"),
]
if not torch.cuda.is_available():
    MISTAKES.append((["--device", "cuda"], "no device 'cuda'"))


@pytest.mark.parametrize("more, message", MISTAKES)
def test_a_mistake_is_one_line(everything, refused, monkeypatch, more, message):
    """With the embedded model too: nothing is said before everything has been checked."""
    monkeypatch.chdir(ROOT)
    assert message in refused(infer, *arguments(everything, *more))
    if "--model" not in more and LONG not in more:
        assert message in refused(infer, *more)


def test_missing_arguments(everything, refused):
    model = ["--model", everything / "model"]
    assert "needs --factors" in refused(infer, *model, "--prompt", "t1")
    assert "prompt is empty" in refused(infer, *model, "--cache", "full")
    assert "prompt is empty" in refused(infer, "--ask")


def test_wrong_factors_are_one_line(everything, refused, tmp_path):
    path, good = tmp_path / "f", (everything / "f").read_bytes()
    other = tiny_model(seed=5)
    save_factors(path, init_factors("svd", other, [4, 4], [4, 4]), other)
    for data, message in (
        (good[:-50], "is damaged"),
        (path.read_bytes(), "another model"),
        (good.replace(b'"version":"1"', b'"version":"9"'), "format version 9"),
        ((everything / "model" / "model.safetensors").read_bytes(), "not a CSKV factors file"),
    ):
        path.write_bytes(data)
        assert message in refused(infer, *arguments(everything, "--factors", path))


def test_a_model_that_has_generated_can_be_trained():
    """Generating is in inference mode, whose tensors cannot be kept for a gradient; tables of RoPE
    stay from one call to the next."""
    tokens = tiny_tokens(tiny_model(), 1, 90)
    grads = []
    for generated in (True, False):
        model = tiny_model()
        cache = bi_branch_cache(model, make_factors(model, 5, 5), 4, kind=FastCache)
        model.rope = Rope(model.config)  # without tables
        if generated:
            list(infer.generate(model, tokens[0].tolist(), cache, 2, infer.make_sampler(0, 1, 0)))
        with torch.enable_grad():
            model.requires_grad_()
            model(tokens).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads)
