"""The benchmark of speed: whose times it prints."""

import json

import pytest
import torch

from experiments import shapes, speed
from support import absorbed
from tests.helpers import call


def test_speed_command(everything, capsys, monkeypatch):
    monkeypatch.setattr(speed, "transformers_runner", lambda *_: None)  # slow to import
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

    def runner(prefill, step):
        def run(tokens, cache):
            now[0] += prefill if tokens.shape[1] > 1 else step

        return dict, run

    monkeypatch.setattr(speed, "clock", lambda device: now[0])
    runners = {"full": runner(2.0, 0.25), "slow": runner(3.0, 1.0), "fast": runner(1.0, 0.125)}
    rows = speed.compare(runners, torch.zeros(1, 9, dtype=torch.long), rounds=2, steps=4)
    names = "cache", "tokens", "prefill_s", "prefill_ratio", "decode_ms", "decode_ratio"
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("full", 9, 2.0, 1.0, 250.0, 1.0),
        ("slow", 9, 3.0, 1.5, 1000.0, 4.0),
        ("fast", 9, 1.0, 0.5, 125.0, 0.5),
    ]


def test_a_shape_needs_no_checkpoint(tmp_path, capsys):
    """Bytes and operations of one layer, by hand: 2 heads of D 32, rank 13, and 16-bit latents."""
    args = ["--shape", "teacher", "--lengths", "100,300", "--ratios", "0.8", "--bits", "32,16"]
    args += ["--caches", "cskv,cskv-absorbed,kivi-2", "--rounds", 1, "--steps", 2, "--threads", 1]
    code, out, _ = call(speed, capsys, *args, "--json", tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert code == 0 and len(out.splitlines()) == 2 + len(rows) == 2 + 2 * 6
    assert absorbed.choose_split(shapes.shape_config("teacher", 999), 13, 1e-6).slow
    for row in rows:
        name, tokens = row["cache"].split()[0], row["tokens"] + 5  # with a round to warm up, one
        old = tokens - 32  # that counts, of 2 steps each, and one more step
        full, ring, factors = (2 * 64 * n for n in (tokens, 32, 2 * 13))
        latents = 2 * 13 * tokens
        narrow = {"full": full, "kivi-2": 0}.get(name, ring + factors + latents)
        if narrow:
            wide = 2 * narrow - (latents if row["cache"].endswith("80%") else 0)
            assert row["gpu_read_us"] == pytest.approx(2 * narrow / 3.35e6)
            assert row["read_mb"] == pytest.approx(2 * wide / 1e6)
        new, values = 2 * 2 * 64 * 13, 2 * 2 * 13 * (old + 32)  # x A; p C_v, then B_v
        keys = old * (2 * 13 * 64 + 2 * 64)
        counts = {"full": 2 * full, "kivi-2": 2 * full, "cskv": 2 * ring + new + values + keys}
        if name in counts:
            assert row["mflop"] == pytest.approx(counts[name] / 1e6) and row["difference"] == 0
        else:
            assert row["mflop"] < counts["cskv"] / 1e6 and 0 < row["difference"] < 1e-5
        assert row["gpu_mflop_us"] == pytest.approx(row["mflop"] / 990)


def test_neither_checkpoint_nor_shape(capsys):
    code, out, err = call(speed, capsys, "--lengths", 30)
    assert (code, out, err.count("\n")) == (2, "", 1) and "--model FOLDER, or a --shape" in err
