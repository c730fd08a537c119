"""The benchmark of speed: whose times it prints, and the bytes beside them."""

import json
from importlib.util import find_spec

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from experiments import figures, speed
from model import Transformer
from tests.helpers import call, save_checkpoint, tiny_model, tiny_tokens


def test_speed_command(everything, tmp_path, capsys, monkeypatch):
    """Each row is of its own cache: bytes by hand, of 2 layers and d_kv 12, in 32 bits."""
    monkeypatch.setattr(speed, "load_theirs", lambda *_: None)  # slow to import
    args = ["--model", everything / "model", "--lengths", "30,40", "--ratios", "0.5", "--rounds", 2]
    args += ["--bits", 16, "--factors", everything / "f", "--json", tmp_path / "rows.json"]
    code, out, _ = call(speed, capsys, *args)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert code == 0 and len(out.splitlines()) == 2 + len(rows)
    found = {(row["cache"], row["tokens"]): row["cache_mb"] for row in rows}
    expected = {}
    for tokens in (30, 40):
        length = tokens + 3 * 8  # with all steps, of which one round warms up
        window = 2 * 2 * 32 * 12 * 4
        expected["full", tokens] = 2 * 2 * 12 * 4 * length
        expected["cskv 50%", tokens] = 2 * (6 + 6) * 2 * length + window
        expected["cskv f 67%", tokens] = 2 * (4 + 4) * 2 * length + window
    assert found == {key: nbytes / 1e6 for key, nbytes in expected.items()}


def test_speed_times_each_cache_by_itself(monkeypatch):
    """On a clock that only the runners move; of one of 2 layers."""
    now = [0.0]

    def runner(seconds):
        waits = [9.0] * 4 + [seconds] * 4  # the first round warms up

        def step(cache):
            now[0] += waits.pop(0)

        return dict, step

    monkeypatch.setattr(speed, "clock", lambda device: now[0])
    runners = {"full": runner(0.25), "slow": runner(1.0), "fast": runner(0.125)}
    rows = speed.compare(runners, 9, rounds=1, steps=4, device="cpu", layers=2)
    assert [tuple(row.values()) for row in rows] == [
        ("full", 9, 125.0, 1.0, None),
        ("slow", 9, 500.0, 4.0, None),
        ("fast", 9, 62.5, 0.5, None),
    ]


def test_a_shape_needs_no_checkpoint(tmp_path, capsys):
    """Bytes of one layer, by hand: 2 heads of D 32, rank 13, and 16-bit latents; and a picture."""
    pytest.importorskip("matplotlib")
    args = ["--shape", "teacher", "--lengths", "100,300", "--ratios", "0.8", "--bits", "32,16"]
    args += ["--caches", "cskv,cskv-plain,kivi-2", "--rounds", 1, "--steps", 2]
    args += ["--json", tmp_path / "rows.json", "--picture", tmp_path / "times.png"]
    code, out, _ = call(speed, capsys, *args)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert code == 0 and len(out.splitlines()) == 2 + len(rows) == 2 + 2 * 6
    for row in rows:
        tokens = row["tokens"] + 2 * 2  # a round to warm up, and one that counts, of 2 steps each
        width = 4 if row["cache"].endswith("32 bits") else 2
        held = 2 * 64 * 4 * 32 + 2 * 13 * width * tokens
        if row["cache"] == "full":
            held = 2 * 64 * 4 * tokens
        assert row["cache"] == "kivi-2" or row["cache_mb"] == pytest.approx(held / 1e6)
    assert (tmp_path / "times.png").read_bytes()[:4] == b"\x89PNG"


def test_a_picture_of_scores(everything, tmp_path, capsys, monkeypatch):
    """Points have the times of the longest text; rows of other factors and the full cache's have
    none."""
    pytest.importorskip("matplotlib")
    row = {"text": "a", "context": 40, "factors": "f", "of_full": 1.25}
    rows = [{**row, "factors": "", "of_full": 1.0}, row, {**row, "factors": "g"}]
    (tmp_path / "scores.json").write_text(json.dumps(rows))
    drawn = []
    monkeypatch.setattr(figures, "draw", lambda points, *_, **axes: drawn.extend(points))
    args = ["--model", everything / "model", "--lengths", "40,30", "--rounds", 1, "--steps", 1]
    args += ["--factors", everything / "f", "--scores", tmp_path / "scores.json"]
    args += ["--json", tmp_path / "rows.json", "--picture", tmp_path / "times.png"]
    monkeypatch.setattr(speed, "load_theirs", lambda *_: None)
    code, _, err = call(speed, capsys, *args)
    assert code == 0, err
    times = json.loads((tmp_path / "rows.json").read_text())
    (of_f,) = [row for row in times if row["cache"] == "cskv f 67%" and row["tokens"] == 40]
    expected = {"panel": "a, 40 tokens", "label": "f", "x": of_f["decode_ratio"], "y": 1.25}
    assert drawn == [{**expected, "marks": "o"}]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[]", "--scores has no rows of these --factors"),
        ('[{"text": "a", "context": 9, "factors": "g", "of_full": 1}]', "has no rows of these"),
        ("{", "scores.json has no perplexities"),
        ('[{"factors": "f"}]', "scores.json has no perplexities"),
        ("3", "scores.json has no perplexities"),
        (None, "scores.json cannot be read"),
    ],
)
def test_scores_of_other_factors_are_refused(everything, tmp_path, refused, text, problem):
    if text:
        (tmp_path / "scores.json").write_text(text)
    args = ["--model", everything / "model", "--factors", everything / "f"]
    args += ["--picture", tmp_path / "times.png"]
    assert problem in refused(speed, *args, "--scores", tmp_path / "scores.json")


@pytest.mark.parametrize(
    ("shape", "tokens", "layers"),
    [("teacher", 2048, 4), ("smollm2", 2048, 30), ("smollm2", 8192, 11), ("longchat", 8192, 1)],
)
def test_layers_that_take_turns(shape, tokens, layers):
    """Full caches of 1, 3.1, 12.6 and 268 MB, until they are 134 MB or all of the model's."""
    assert speed.layers_in_turn(shape, tokens, torch.float32) == layers


def test_operations_of_a_step():
    """Products of one layer as experiments/README.md has them, with the window: 2 heads, D 32, rank
    13. The plain form of attention is one whose products can be counted."""
    tokens = 301
    args = ["--shape", "teacher", "--ratios", "0.8", "--caches", "cskv,cskv-plain,kivi-2"]
    args = speed.parse_arguments([*args, "--bits", "16", "--group", "64"])
    model = Transformer(speed.shape_config("teacher", tokens))
    rows = speed.rows_to_time(args, model)
    assert [row.factors.layers[0].k.group for row in rows if row.factors] == [64, 64]
    counts = {}
    for name, (start, step) in speed.layer_runners(model, rows, tokens - 1, tokens).items():
        cache = start()
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            step(cache)
        counts[name.split()[0]] = counter.get_total_flops()
    old = tokens - 32
    segments = -(-old // 16)  # all of 16 tokens, the last one filled up
    full, new = 4 * tokens * 64, 4 * 64 * 13  # scores and sums over values; x A
    rebuilt = 4 * old * 13 * 64
    fast = 4 * 32 * 64 + new + segments * 2 * 64 * 13 + 2 * 64 * 13 + 4 * 13 * 2 * 16 * segments
    expected = {"full": full, "kivi-2": full, "cskv-plain": full + new + rebuilt, "cskv": fast}
    assert counts == expected


@pytest.mark.slow  # imports transformers
@pytest.mark.parametrize(("head_dim", "length"), [(32, 53), (32, 51), (6, 20)])
def test_the_caches_of_transformers(tmp_path, head_dim, length):
    """Each takes a prompt and a token, and the full one gives our logits. hqq packs 256
    numbers together: where they did not come out even, it failed in the middle of a benchmark."""
    pytest.importorskip("transformers")
    model = tiny_model(head_dim=head_dim)
    save_checkpoint(model, tmp_path / "model")
    tokens = tiny_tokens(model, 1, length - 1)
    theirs = speed.load_theirs(str(tmp_path / "model"), "cpu", torch.float32)
    runners = speed.their_runners(theirs, tokens)
    assert "transformers, DynamicCache" in runners
    quantized = [name for name in runners if "Quantized" in name]
    assert len(quantized) == (2 if find_spec("hqq") and length == 53 else 0)
    expected = model(torch.cat([tokens, tokens[:, :1]], 1))[:, -1]
    for name, (start, step) in runners.items():
        logits = step(start())[:, -1]
        if "Dynamic" in name:
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        assert logits.shape == expected.shape and logits.isfinite().all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--model FOLDER, or a --shape"),
        (["--shape", "teacher", "--picture", "no/times.png"], "no folder no to write"),
        (["--model", "m", "--factors", "f", "--scores", "s.json"], "--scores are for a picture"),
        (["--model", "m", "--picture", "p.png", "--scores"], "expected at least one argument"),
    ],
)
def test_a_mistake_is_one_line(refused, words, message):
    assert message in refused(speed, *words)
