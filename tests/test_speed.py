"""The benchmark of speed: whose times it prints."""

import json
from importlib.util import find_spec

import pytest
import torch

from experiments import speed
from tests.helpers import call, save_checkpoint, tiny_model, tiny_tokens

torch.set_grad_enabled(False)


def test_speed_command(everything, capsys, monkeypatch):
    monkeypatch.setattr(speed, "load_theirs", lambda *_: None)  # slow to import
    args = ["--model", everything / "model", "--lengths", "30,40", "--ratios", "0.5", "--rounds", 2]
    args += ["--threads", 1]
    code, out, _ = call(speed, capsys, *args, "--json", everything / "speed.json")
    rows = json.loads((everything / "speed.json").read_text())
    full = [row for row in rows if row["cache"] == "full"]
    assert code == 0 and [row["tokens"] for row in full] == [30, 40]
    assert all(row["prefill_ratio"] == row["decode_ratio"] == 1 for row in full)
    for row, own in ((r, f) for r in rows for f in full if f["tokens"] == r["tokens"]):
        assert row["prefill_ratio"] == pytest.approx(row["prefill_s"] / own["prefill_s"])
        assert row["decode_ratio"] == pytest.approx(row["decode_ms"] / own["decode_ms"])
    assert {"full", "cskv 50%"} <= {row["cache"] for row in rows}
    for row in rows:  # each row is of its own cache: bytes by hand, of 2 layers and d_kv 12
        length = row["tokens"] + 3 * 8  # with all steps, of which one round warms up
        packed = (length - 32) // 32 * 32
        few = packed * (6 * 5 + 6 * (4 + 32 / 6)) / 8 + (length - packed) * 12 * 2
        own = {
            "full": 2 * 12 * 4 * (length + 1),
            "cskv 50%": 12 * 2 * (length + 1) + 2 * 32 * 12 * 4,
        }
        own["cskv 50% 4 bits"] = few + 2 * 32 * 12 * 4
        assert row["cache_mb"] == pytest.approx(2 * own[row["cache"]] / 1e6), row["cache"]
    assert len(out.splitlines()) == 2 + len(rows)


def test_speed_times_each_cache_by_itself(monkeypatch):
    """On a clock that only the runners move."""
    now = [0.0]

    def wait(seconds):
        now[0] += seconds

    def runner(prefill, step):
        warm_up = [9.0]  # the first time
        return (
            dict,
            lambda _: wait(prefill + (warm_up.pop() if warm_up else 0)),
            lambda _: wait(step),
        )

    monkeypatch.setattr(speed, "clock", lambda device: now[0])
    runners = {"full": runner(2.0, 0.25), "slow": runner(3.0, 1.0), "fast": runner(1.0, 0.125)}
    rows = speed.compare(runners, 9, rounds=2, steps=4, prefills=2, device="cpu", caches={})
    names = "cache", "tokens", "prefill_s", "prefill_ratio", "decode_ms", "decode_ratio"
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("full", 9, 2.0, 1.0, 250.0, 1.0),
        ("slow", 9, 3.0, 1.5, 1000.0, 4.0),
        ("fast", 9, 1.0, 0.5, 125.0, 0.5),
    ]


def test_a_shape_needs_no_checkpoint(tmp_path, capsys):
    """Bytes and operations of one layer, by hand: 2 heads of D 32, rank 13, and 16-bit latents."""
    args = ["--shape", "teacher", "--lengths", "100,300", "--ratios", "0.8", "--bits", "32,16"]
    args += ["--caches", "cskv,cskv-plain,kivi-2", "--rounds", 1, "--steps", 2, "--threads", 1]
    code, out, _ = call(speed, capsys, *args, "--json", tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert code == 0 and len(out.splitlines()) == 2 + len(rows) == 2 + 2 * 6
    for row in rows:
        name, tokens = row["cache"].split()[0], row["tokens"] + 5  # with a round to warm up, one
        old = tokens - 32  # that counts, of 2 steps each, and one more step
        full, ring, factors = (2 * 64 * n for n in (tokens, 32, 2 * 13))
        latents = 2 * 13 * tokens
        if name != "kivi-2":
            wide = 2 * full if name == "full" else 2 * (ring + factors + latents)
            wide -= latents if row["cache"].endswith("80%") else 0
            assert row["read_mb"] == pytest.approx(2 * wide / 1e6)
        new, rebuilt = 2 * 2 * 64 * 13, 2 * old * 2 * 13 * 64  # x A; C B, of keys and values
        segments = -(-old // 16)  # all of 16 tokens, the last one filled up
        into_query = segments * 2 * 64 * 13  # B_k, once a segment; B_v, once a step
        products = 2 * 2 * 13 * 2 * 16 * segments  # u c^T and p C of two heads
        counts = {
            "full": 2 * full,
            "kivi-2": 2 * full,
            "cskv-plain": 2 * full + new + rebuilt,
            "cskv": 2 * ring + new + into_query + 2 * 64 * 13 + products,
        }
        assert row["mflop"] == pytest.approx(counts[name] / 1e6), row["cache"]


def test_the_picture_of_times(tmp_path, capsys):
    """A line for each cache; a place that cannot be written is known before the work."""
    pytest.importorskip("matplotlib")
    args = ["--shape", "teacher", "--lengths", "40,80", "--rounds", 1, "--steps", 1]
    args += ["--threads", 1]
    code, _, _ = call(speed, capsys, *args, "--picture", tmp_path / "times.png")
    assert code == 0 and (tmp_path / "times.png").read_bytes()[:4] == b"\x89PNG"
    code, out, err = call(speed, capsys, *args, "--picture", tmp_path / "no" / "times.png")
    assert (code, out, err.count("\n")) == (2, "", 1)


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
    for name, (make, fill, step) in runners.items():
        cache = make()
        fill(cache)
        logits = step(cache)[:, -1]
        if "Dynamic" in name:
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        assert logits.shape == expected.shape and logits.isfinite().all()


def test_neither_checkpoint_nor_shape(capsys):
    code, out, err = call(speed, capsys, "--lengths", 30)
    assert (code, out, err.count("\n")) == (2, "", 1) and "--model FOLDER, or a --shape" in err
