"""The benchmark of speed: whose times it prints."""

import json

import pytest
import torch

from experiments import speed
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
