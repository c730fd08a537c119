"""The command lines of infer.py and train.py, from their arguments to their output."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import infer
import train
from beyond.segments import FastCache
from cskv import (
    CALIBRATED,
    INITIALIZATIONS,
    BiBranchCache,
    Factors,
    LayerFactors,
    bi_branch_cache,
    init_factors,
)
from model import full_cache
from support.factors_file import load_factors, save_factors
from support.huggingface.checkpoint import load_model
from support.huggingface.tokenizer import Tokenizer, load_tokenizer
from support.text import read_documents, sample_tokens
from tests.helpers import call, save_checkpoint, tiny_model

ROOT = Path(__file__).parent.parent
PROMPT = "t5 t17 t30 t2 t44 t9 t21 t3 t50 t11"


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """A tiny checkpoint with factors of rank 4 of 12, and calibration text."""
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_model()
    save_checkpoint(model, folder / "model")
    factors = init_factors("svd", model, [4, 4], [4, 4])
    save_factors(folder / "factors.safetensors", factors, model)
    (folder / "text.txt").write_text(" ".join(f"t{i * i % 61}" for i in range(400)))
    return folder


def arguments(setup, *more):
    files = ["--model", setup / "model", "--factors", setup / "factors.safetensors"]
    return [*files, "--prompt", PROMPT, "--max-new-tokens", 12, *more]


def test_json_is_one_object_and_counts_live_bytes(setup, capsys):
    code, out, _ = call(infer, capsys, *arguments(setup, "--window", 5, "--sinks", 0, "--json"))
    result = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert result["prompt_tokens"] == 10 and len(result["tokens"]) == 12
    assert result["text"] == " ".join(f"t{i}" for i in result["tokens"])
    tokens = 10 + 12 - 1  # the last new token is not fed back
    assert result["full_cache_bytes"] == 2 * 2 * 12 * 2 * tokens  # K and V, layers, d_kv, 16 bits
    ring = 2 * 5 * 12 * 4  # keys and values, window, d_kv, float32
    assert result["cache_bytes"] == 2 * (tokens * (4 + 4) * 2 + ring)
    assert result["measured_ratio"] == pytest.approx(
        1 - result["cache_bytes"] / result["full_cache_bytes"]
    )
    assert result["nominal_ratio"] == pytest.approx(1 - 4 / 12)
    assert result["prefill_seconds"] > 0 and result["decode_seconds_per_token"] > 0
    # Four sinks, the default: exact, and without latents.
    result = json.loads(call(infer, capsys, *arguments(setup, "--window", 5, "--json"))[1])
    exact = 2 * (4 + 5) * 12 * 4
    assert result["cache_bytes"] == 2 * ((tokens - 4) * (4 + 4) * 2 + exact)


def test_bits_are_those_of_the_factors_or_of_the_flags(setup, capsys, tmp_path):
    """A longer prompt, so that one group of 32 tokens is packed: bytes tell which bits it has."""
    model = load_model(setup / "model")
    factors = load_factors(setup / "factors.safetensors", model)
    layers = [LayerFactors(replace(f.k, bits=3), replace(f.v, bits=8)) for f in factors.layers]
    factors = Factors(layers, factors.info)
    save_factors(tmp_path / "f.safetensors", factors, model)
    prompt = " ".join(f"t{i}" for i in range(40))

    def cache_bytes(*more):
        files = ["--model", setup / "model", "--factors", tmp_path / "f.safetensors"]
        common = ["--prompt", prompt, "--max-new-tokens", 1, "--window", 5, "--sinks", 0]
        common += ["--json", *more]
        result = json.loads(call(infer, capsys, *files, *common)[1])
        return result["cache_bytes"], result["nominal_ratio"]

    ring = 2 * 2 * 5 * 12 * 4
    for flags, k, v in (
        ([], 3, 8),
        (["--bits", 4], 4, 4),
        (["--bits", 2, "--v-bits", 3], 2, 3),
        (["--k-bits", 16], 16, 8),
    ):
        per_token = [4 * bits for bits in (k, v)]
        packed = 32 * sum(per_token)
        packed += 32 * 4 if k < 16 else 0  # a scale and a minimum for each channel
        packed += 32 * 32 if v < 16 else 0  # a scale and a minimum for each token
        held = 2 * (packed + (8 * 4 * 16) * 2) / 8 + ring
        assert cache_bytes(*flags) == (held, pytest.approx(1 - 4 / 12 * (k + v) / 32))


def test_greedy_tokens_equal_recomputing_everything(setup, capsys):
    """With the full cache, each token is the argmax of a forward pass over all before it."""
    _, out, _ = call(infer, capsys, *arguments(setup, "--cache", "full", "--json"))
    model, tokenizer = load_model(setup / "model"), load_tokenizer(setup / "model")
    ids = tokenizer.encode(PROMPT)
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert json.loads(out)["tokens"] == ids[10:]


def test_a_window_over_everything_gives_the_full_cache_tokens(setup, capsys):
    outs = [
        json.loads(call(infer, capsys, *arguments(setup, *more, "--json"))[1])["tokens"]
        for more in (["--cache", "full"], ["--window", 100])
    ]
    assert outs[0] == outs[1]


def test_text_goes_to_stdout_and_notes_to_stderr(setup, capsys):
    code, out, err = call(infer, capsys, *arguments(setup))
    expected = json.loads(call(infer, capsys, *arguments(setup, "--json"))[1])
    assert code == 0 and out == expected["text"] + "\n"
    assert "measured ratio" in err


def test_compare_answers_twice(setup, capsys):
    _, out, _ = call(infer, capsys, *arguments(setup, "--compare"))
    alone = call(infer, capsys, *arguments(setup))[1]
    assert out.startswith("--- full cache, 10 tokens of prompt")
    assert f"--- cskv cache, 10 tokens of prompt\n{alone}\n" in out
    for line in out.splitlines():  # the full cache, in float32 here, has none
        assert "ratio" not in line or line.count("%") == 1
    result = json.loads(call(infer, capsys, *arguments(setup, "--compare", "--json"))[1])
    full = json.loads(call(infer, capsys, *arguments(setup, "--cache", "full", "--json"))[1])
    assert result["full"]["tokens"] == full["tokens"]
    assert result["full"]["cache_bytes"] == 2 * full["full_cache_bytes"]  # it runs in float32 here


def test_the_fast_cache_is_the_default(setup, capsys, monkeypatch):
    """The plain one is asked for by name; where all tokens are in the window, both say the same."""
    kinds = []

    def noted(model, factors, window, expected, kind, sinks):
        kinds.append(kind)
        return bi_branch_cache(model, factors, window, expected, kind, sinks)

    monkeypatch.setattr(infer, "bi_branch_cache", noted)
    results = []
    for more in ([], ["--cache", "cskv"], ["--cache", "cskv-plain"]):
        code, out, err = call(infer, capsys, *arguments(setup, *more, "--json"))
        results.append(json.loads(out))
        assert code == 0 and "FLOP" not in out + err
    assert kinds == [FastCache, FastCache, BiBranchCache]
    assert len({str(result["tokens"]) for result in results}) == 1
    assert len({result["cache_bytes"] for result in results}) == 1


def test_the_demonstration(capsys):
    """Without arguments: the embedded model's own case, from both caches, and the right number."""
    code, out, err = call(infer, capsys, "--json")
    result = json.loads(out)
    number = err.split("REGISTER_CONTENT is <")[1].split(">")[0]
    assert code == 0 and result["text"].strip() == result["full"]["text"].strip() == number
    assert result["cache_bytes"] < 0.25 * result["full"]["cache_bytes"]
    code, _, err = call(infer, capsys, "--prompt", "Hello", "--max-new-tokens", 2)
    assert code == 0 and "only finds numbers" in err and "get_smollm2.py" in err


def test_sampling_follows_its_seed(setup, capsys):
    def sample(*more):
        return json.loads(call(infer, capsys, *arguments(setup, *more, "--json"))[1])["tokens"]

    hot = ["--temperature", 3, "--seed"]
    assert sample(*hot, 1) == sample(*hot, 1) != sample(*hot, 2)
    assert sample(*hot, 1, "--top-p", 1e-6) == sample()  # a nucleus of one token is greedy


def test_top_p_is_the_smallest_set_that_reaches_p():
    p = torch.tensor([0.1, 0.5, 0.1, 0.3])
    draw = infer.make_sampler(1.0, 0.7, 0)
    drawn = [draw(p.log()) for _ in range(300)]
    assert set(drawn) == {1, 3}
    assert 0.5 < drawn.count(1) / 300 < 0.75  # 0.5 / 0.8


def test_generation_stops_at_the_end_of_text(setup, tmp_path, capsys):
    ids = json.loads(call(infer, capsys, *arguments(setup, "--json"))[1])["tokens"]
    save_checkpoint(tiny_model(), tmp_path, eos_token_id=[ids[4], 60])
    args = ["--model", tmp_path, *arguments(setup, "--json")[2:]]
    result = json.loads(call(infer, capsys, *args)[1])
    assert result["tokens"] == ids[: ids.index(ids[4])]


def test_new_tokens_end_with_the_context(setup, capsys):
    prompt = " ".join(["t1"] * 597)
    args = [*arguments(setup, "--json"), "--prompt", prompt]
    code, out, err = call(infer, capsys, *args)
    assert code == 0 and len(json.loads(out)["tokens"]) == 3
    assert "only 3 new tokens" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu(setup, capsys):
    code, out, err = call(infer, capsys, *arguments(setup, "--device", "cuda"))
    assert (code, out) == (2, "") and "no device 'cuda'" in err


MISTAKES = {
    "no such model": (["--model", "no/such/folder"], "no folder no/such/folder"),
    "no prompt": (["--prompt", ""], "prompt is empty"),
    "only spaces": (["--prompt", "  \n"], "prompt is empty"),
    "half a character": (["--prompt", "t1 \udcc3"], "not valid UTF-8"),
    "a long prompt": (["--prompt", " ".join(["t1"] * 600)], "600 tokens"),
    "no factors file": (["--factors", "none.safetensors"], "no factors file none.safetensors"),
    "factors is a folder": (["--factors", "."], ". is a folder; give a factors file"),
    "a window beyond all": (["--window", 10**12], "is not a whole number from 1 to"),
    "factors is text": (["--factors", "README.md"], "README.md is damaged"),
    "window 0": (["--window", 0], "'0' is not a whole number of at least 1"),
    "window of words": (["--window", "wide"], "'wide' is not a whole number"),
    "window 1.5": (["--window", 1.5], "'1.5' is not a whole number"),
    "no new tokens": (["--max-new-tokens", 0], "--max-new-tokens"),
    "cold": (["--temperature", -1], "--temperature"),
    "nan": (["--temperature", "nan"], "--temperature"),
    "top-p 2": (["--top-p", 2], "--top-p"),
    "5 bits": (["--bits", 5], "--bits"),
    "unknown cache": (["--cache", "half"], "--cache"),
    "unknown flag": (["--windw", 3], "--windw"),
    "unknown device": (["--device", "abacus"], "no device 'abacus'"),
    "chat": (["--chat"], "no chat template"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(setup, capsys, monkeypatch, mistake):
    monkeypatch.chdir(ROOT)
    more, message = MISTAKES[mistake]
    before = sorted(setup.rglob("*"))
    code, out, err = call(infer, capsys, *arguments(setup, *more))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and message in err and "Traceback" not in err
    assert sorted(setup.rglob("*")) == before


@pytest.mark.parametrize(
    "more, message",
    [
        (["--prompt", ""], "prompt is empty"),
        (["--factors", "none.safetensors"], "no factors file"),
        (["--window", 10**20], "--window"),
        (["--seed", 10**30], "--seed"),
        (["--device", "meta"], "no device 'meta'"),
        (["--prompt", "t1", "--cache", "full", "--model", "x" * 300], "no folder"),
    ],
)
def test_mistakes_with_the_embedded_model(capsys, more, message):
    """Nothing is said or answered before everything has been checked."""
    code, out, err = call(infer, capsys, *more)
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err


def test_streamed_text_is_the_whole_text(setup, monkeypatch, capsys):
    """Bytes of one character arrive token by token: it is written when it is complete, or at the
    end as it stands. SentencePiece tokenizers drop the space before the first word."""
    import tokenizers
    from tokenizers import decoders, models

    vocab = {f"<0x{i:02X}>": i for i in range(256)} | {"▁the": 256, "▁end": 257}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    model, tokenizer = tiny_model(), Tokenizer(backend, {}, None)
    for text, tail in (("é🙂ß", []), ("naïve", [0xE2, 0x82])):
        ids = [256, *text.encode(), 257, *tail]

        def generate(*args, ids=ids):
            args[-1].append(0.1)
            return iter(ids)

        monkeypatch.setattr(infer, "generate", generate)
        cache, pieces = full_cache(model), []
        model(torch.tensor([[1]]), cache)
        result = infer.answer(model, tokenizer, [1], cache, 9, None, pieces.append)
        assert "".join(pieces) == result["text"] and result["text"].startswith(f"the{text} end")
        assert len(pieces) > 2


def test_missing_arguments(setup, capsys):
    _, _, err = call(infer, capsys, "--model", setup / "model", "--prompt", "t1")
    assert "needs --factors" in err
    _, _, err = call(infer, capsys, "--model", setup / "model", "--cache", "full")
    assert "no prompt" in err


@pytest.mark.parametrize(
    "file, keep, message",
    [
        ("model.safetensors", 500, "model.safetensors is damaged"),
        ("model.safetensors", 0, "model.safetensors is damaged"),
        ("config.json", 20, "config.json cannot be read as JSON"),
        ("tokenizer.json", 30, "tokenizer.json is damaged"),
    ],
)
def test_a_truncated_checkpoint_is_one_line(setup, tmp_path, capsys, file, keep, message):
    save_checkpoint(tiny_model(), tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:keep])
    code, out, err = call(infer, capsys, *arguments(setup, "--model", tmp_path))
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err


def test_an_unsupported_checkpoint_is_one_line(setup, tmp_path, capsys):
    save_checkpoint(tiny_model(), tmp_path, model_type="mamba")
    code, out, err = call(infer, capsys, *arguments(setup, "--model", tmp_path))
    assert (code, out, err.count("\n")) == (2, "", 1) and "'mamba' is not supported" in err


def damaged_factors(setup, folder, name):
    path, good = folder / "f.safetensors", (setup / "factors.safetensors").read_bytes()
    if name == "truncated":
        path.write_bytes(good[:-50])
    elif name == "empty":
        path.write_bytes(b"")
    elif name == "another model's":
        other = tiny_model(seed=5)
        save_factors(path, init_factors("svd", other, [4, 4], [4, 4]), other)
    elif name == "a newer version":
        path.write_bytes(good.replace(b'"version":"1"', b'"version":"9"'))
    elif name == "no factors":
        path.write_bytes((setup / "model" / "model.safetensors").read_bytes())
    return path


@pytest.mark.parametrize(
    "name, message",
    [
        ("truncated", "is damaged"),
        ("empty", "is damaged"),
        ("another model's", "another model"),
        ("a newer version", "format version 9"),
        ("no factors", "not a CSKV factors file"),
    ],
)
def test_wrong_factors_are_one_line(setup, tmp_path, capsys, name, message):
    path = damaged_factors(setup, tmp_path, name)
    code, out, err = call(infer, capsys, *arguments(setup, "--factors", path))
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err


def test_as_a_program(setup):
    """From the shell, in a process of its own: the exit codes and streams that scripts see."""
    command = [sys.executable, "infer.py", *map(str, arguments(setup, "--json"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and len(json.loads(done.stdout)["tokens"]) == 12
    done = subprocess.run([*command, "--window", "0"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


# ----------------------------------------------------------------------------------- train.py


@pytest.mark.parametrize("init", INITIALIZATIONS)
def test_train_writes_factors_that_infer_reads(setup, tmp_path, capsys, init):
    out = tmp_path / "f.safetensors"
    base = ["--model", setup / "model", "--data", setup / "text.txt", "--init", init]
    ranks = ["--k-ratio", 0.5, "--v-ratio", 0.83]
    code, _, err = call(train, capsys, *base, *ranks, "--epochs", 0, "--out", out)
    assert code == 0, err
    factors = load_factors(out, load_model(setup / "model"))
    assert [(f.k.rank, f.v.rank) for f in factors.layers] == [(6, 2), (6, 2)]
    assert factors.info["init"] == init and factors.info["trained"] == "none"
    assert factors.info.get("data") == ("text.txt" if init in CALIBRATED else None)
    assert call(infer, capsys, *arguments(setup, "--factors", out))[0] == 0


def test_train_reads_documents_from_every_kind_of_file(tmp_path):
    (tmp_path / "b.txt").write_text("one\ntwo")
    (tmp_path / "a.jsonl").write_text('{"text": "x", "id": 1}\n\n{"text": "y"}\n')
    (tmp_path / "notes.md").write_text("not read")
    assert list(read_documents(tmp_path)) == ["x", "y", "one\ntwo"]


def test_samples_are_whole_documents_or_their_pieces(setup, tmp_path):
    tokenizer = load_tokenizer(setup / "model")
    lines = [" ".join(["t1"] * 3), " ".join(f"t{i}" for i in range(10)), "t4"]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    samples = sample_tokens(tmp_path, tokenizer, 10, 4, seed=0)
    found = sorted(sample[0].tolist() for sample in samples)
    assert found == [[0, 1, 2, 3], [1, 1, 1], [4, 5, 6, 7], [8, 9]]  # one token teaches nothing
    assert len(sample_tokens(tmp_path, tokenizer, 2, 4, seed=0)) == 2


TRAIN_MISTAKES = {
    "no data": (["--data", "none.txt"], "no file none.txt"),
    "another kind": (["--data", "model.py"], "not a .txt or .jsonl"),
    "ratio 1": (["--k-ratio", 1], "compression ratio 1.0"),
    "ratio -1": (["--v-ratio", -1], "compression ratio -1.0"),
    "no folder": (["--out", "no/such/f.safetensors"], "no folder no/such"),
    "unknown init": (["--init", "best"], "--init"),
    "no samples": (["--samples", 0], "--samples"),
}


@pytest.mark.parametrize("mistake", TRAIN_MISTAKES)
def test_a_mistake_in_training_is_one_line(setup, tmp_path, capsys, monkeypatch, mistake):
    monkeypatch.chdir(ROOT)
    more, message = TRAIN_MISTAKES[mistake]
    out = tmp_path / "f.safetensors"
    base = ["--model", setup / "model", "--data", setup / "text.txt", "--out", out]
    code, _, err = call(train, capsys, *base, *more)
    error = err.splitlines()[-1]
    assert code == 2 and error.startswith("error: ") and message in error
    assert "Traceback" not in err and list(tmp_path.iterdir()) == []


def test_damaged_text_names_its_line(setup, tmp_path, capsys):
    base = ["--model", setup / "model", "--out", tmp_path / "f.safetensors", "--data"]
    for line in ('{"text": ', "[1]", '{"other": "x"}', '{"text": 3}'):
        (tmp_path / "d.jsonl").write_text('{"text": "t1 t2"}\n' + line + "\n")
        code, _, err = call(train, capsys, *base, tmp_path / "d.jsonl")
        assert code == 2 and "d.jsonl, line 2" in err
    (tmp_path / "e.txt").write_bytes(b"\xff\xfe")
    assert "UTF-8" in call(train, capsys, *base, tmp_path / "e.txt")[2]
    (tmp_path / "empty.txt").write_text("")
    assert "holds no text" in call(train, capsys, *base, tmp_path / "empty.txt")[2]
    (tmp_path / "folder").mkdir()
    assert "no .txt or .jsonl" in call(train, capsys, *base, tmp_path / "folder")[2]
    assert call(train, capsys, *base[:4])[2].startswith("error: --init optimal calibrates on text")
