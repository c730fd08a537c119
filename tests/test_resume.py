"""Trainings that are killed, interrupted, short of disk, or several processes go on exactly."""

import os
import random
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import train
from support import processes
from support.command import UserError
from support.factors_file import load_factors
from support.huggingface.checkpoint import load_model
from tests import helpers
from tests.helpers import arguments, call, rows_of, tiny_model, written

ROOT = Path(__file__).parent.parent


@pytest.fixture
def interrupted(everything, tmp_path, capsys, monkeypatch):
    """Trains into the file `f`, up to one signal in a step: a second one would kill. Returns what
    it said, and the arguments to go on."""
    real = train.batch_of

    def run(step, *more, number=signal.SIGINT):
        sent = []

        def batch_of(samples, n, *order):
            if n == step and not sent:
                sent.append(signal.raise_signal(number))
            return real(samples, n, *order)

        args = arguments(everything, tmp_path / "f", *more)
        with monkeypatch.context() as patch:
            patch.setattr(train, "batch_of", batch_of)
            code, _, err = call(train, capsys, *args)
        assert code == 130 and not (tmp_path / "f").exists()
        return err, [*args, "--resume"]

    return run


def fail(*args):
    raise UserError("no")


@pytest.mark.parametrize("number, foreign", [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_a_signal_ends_the_step_and_resume_goes_on_exactly(
    interrupted, tmp_path, trained, monkeypatch, number, foreign
):
    """Whatever has happened to the log: its lines are those of this training, each once."""
    more = ["--epochs", 2, "--batch-size", 3, "--bits", 4, "--log"]
    trained("whole", *more, tmp_path / "w")
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    err, _ = interrupted(9, *more, tmp_path / "log", number=number)
    assert "10 of 16 steps" in err and "--resume" in err
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]  # as before
    if foreign:
        (tmp_path / "log").write_text('{"step": 0}\n' * 20)
    else:
        with (tmp_path / "log").open("a") as file:
            file.write('{"step": 10}\n{"step": 12, "lo')  # as a kill might leave it
    monkeypatch.setattr(train, "calibrate_together", None)  # the checkpoint has all of it
    assert "going on after step 10" in trained("f", *more, tmp_path / "log", "--resume")
    assert (tmp_path / "f").read_bytes() == (tmp_path / "whole").read_bytes()
    ours, theirs = rows_of(tmp_path / "log"), rows_of(tmp_path / "w")
    assert all(a["seconds"] <= b["seconds"] for a, b in pairwise(ours))
    for row in (*ours, *theirs):
        del row["seconds"]
    assert ours == theirs
    assert sorted(f.name for f in tmp_path.iterdir()) == ["f", "log", "w", "whole"]


def test_resume_after_the_last_step_of_nothing_and_of_a_finished_training(
    everything, tmp_path, trained, monkeypatch, refused
):
    more = ["--samples", 6, "--log", tmp_path / "log"]
    with monkeypatch.context() as patch:  # what is left of the training is to write its factors
        patch.setattr(train, "save_factors", fail)
        args = arguments(everything, tmp_path / "f", *more)
        refused(train, *args, notes=True, left=["log", "f.checkpoint"])
    assert "going on after step 6" in trained("f", *more, "--resume", "--checkpoint-every", 7)
    assert [row.get("step") for row in rows_of(tmp_path / "log")] == [*range(6), None]
    assert "no checkpoint" in trained("g", *more, "--resume")
    assert (tmp_path / "f").read_bytes() == (tmp_path / "g").read_bytes()
    before = written(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(train, "calibrate_together", None)
        assert "is finished" in trained("f", *more, "--resume")
    assert before == written(tmp_path)
    trained("f", *more)  # but without --resume it starts again
    assert before != written(tmp_path)


OTHERS = {"lr": 1e-3, "bits": 8, "v-ratio": 0.75, "samples": 9, "init": "asvd", "seed": 1}
OTHERS |= {"batch-size": 2, "epochs": 2, "data": "text.jsonl", "model": "model"}


def test_resume_with_other_arguments_is_refused(
    interrupted, everything, tmp_path, refused, monkeypatch, capsys
):
    """From a checkpoint, and of a file: it was "finished" whatever was asked for."""
    _, args = interrupted(3)
    monkeypatch.chdir(tmp_path)
    text = (everything / "text.jsonl").read_text()
    Path("text.jsonl").write_text(text.replace("t1 ", "t2 "))
    helpers.save_checkpoint(tiny_model(seed=1), tmp_path / "model")
    for name, value in OTHERS.items():
        error = refused(train, *args, f"--{name}", value, notes=True)
        assert f"was made with another --{name};" in error
    assert call(train, capsys, *args, "--checkpoint-every", 9)[0] == 0  # no matter
    for name, value in OTHERS.items():
        error = refused(train, *args, f"--{name}", value, notes=True)
        expected = "another model" if name == "model" else f"made with another --{name};"
        assert expected in error


@pytest.mark.parametrize("full", ["before", "midway"])
def test_a_full_disk_leaves_the_old_checkpoint_and_a_damaged_one_is_refused(
    interrupted, tmp_path, refused, capsys, monkeypatch, full
):
    _, args = interrupted(3)
    real = Path.write_bytes

    def write_bytes(path, data):
        if full == "midway":
            real(path, bytes(data)[:100])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_bytes)
        error = refused(train, *args, "--checkpoint-every", 1, notes=True)
    assert "cannot be written" in error and "No space" in error
    file = tmp_path / "f.checkpoint"
    data = file.read_bytes()
    torch.save({"plan": {}}, file)
    for damaged in (file.read_bytes(), b"", b"x" * 99, data[: len(data) // 2], data[:-30]):
        file.write_bytes(damaged)
        assert "f.checkpoint is damaged" in refused(train, *args, notes=True)
    file.write_bytes(data)
    assert call(train, capsys, *args)[0] == 0


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_first_process_has_a_second_to_speak(monkeypatch, rank):
    """torchrun ends all processes when one has ended: the silent ones must not be the first."""
    slept, ended = [], []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(processes.time, "sleep", slept.append)
    monkeypatch.setattr(processes.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(processes.dist, "init_process_group", lambda backend: None)
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.dist, "destroy_process_group", lambda: ended.append(1))
    for error, code in ((UserError("x"), 2), (KeyboardInterrupt(), 130)):
        with pytest.raises((UserError, KeyboardInterrupt, SystemExit)) as caught:
            with processes.processes("cpu"):
                raise error
        assert caught.value is error if rank == "0" else caught.value.code == code
    assert slept == ([] if rank == "0" else [1, 1]) and ended == [1, 1]


def test_killed_at_a_random_step_resume_is_exact(everything, tmp_path, trained):
    """The process gets no chance to clean up; checkpoints are written every second step."""
    more = ["--bits", 4, "--epochs", 3, "--checkpoint-every", 2]
    log, steps = tmp_path / "log", random.randint(1, 40)
    args = arguments(everything, tmp_path / "killed", *more, "--log", log)
    command = [sys.executable, "train.py", *args]
    killed = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    helpers.wait_for_lines(log, steps, killed)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL and not (tmp_path / "killed").exists()
    trained("killed", *more, "--log", log, "--resume")
    trained("whole", *more)
    ours, theirs = ((tmp_path / name).read_bytes() for name in ("killed", "whole"))
    assert ours == theirs, f"another file after a kill at step {steps}"
    assert [row.get("step") for row in rows_of(log)] == [*range(72), None]


def torchrun(everything, out, *more):
    """What trains in two processes. The -- keeps torchrun from reading --log as its --log-dir."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--", "train.py", *arguments(everything, out, *more)]
    return {"args": command, "cwd": ROOT, "text": True}


@pytest.mark.slow
def test_two_processes_equal_one(everything, tmp_path, trained):
    """Batches of 3: the second process has one sample of them, and none of the last. From `asvd`,
    whose start depends on the text that the two have read together."""
    more = ["--batch-size", 3, "--samples", 22, "--epochs", 2, "--lr", 1e-3, "--init", "asvd"]
    one, two = tmp_path / "one", tmp_path / "two"
    trained("one", *more, "--log", tmp_path / "1")
    command = torchrun(everything, two, *more, "--log", tmp_path / "2")
    done = subprocess.run(**command, capture_output=True)
    # Not its exit status: gloo's threads may abort a process that has already finished.
    assert two.exists() and done.stderr.count("22 samples") == 1, done.stderr  # one process speaks
    model = load_model(everything / "model")
    ours, theirs = (load_factors(path, model).pairs for path in (one, two))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.A, b.A, rtol=1e-3, atol=1e-6)  # in float16 in the files
        torch.testing.assert_close(a.B, b.B, rtol=1e-3, atol=1e-6)
    for a, b in zip(rows_of(tmp_path / "1"), rows_of(tmp_path / "2"), strict=True):
        for name in {"loss", "floor", "initial", "final"} & set(a):
            assert a[name] == pytest.approx(b[name], rel=1e-5)


@pytest.mark.slow
def test_an_error_of_the_first_process_alone_is_one_line(everything, tmp_path):
    """The first cannot write its log any more: the second must neither hang nor print a traceback
    of its broken connection. (Those of torchrun itself stay.)"""
    log = tmp_path / "log"
    command = torchrun(everything, tmp_path / "f", "--epochs", 999, "--log", log)
    process = subprocess.Popen(**command, stderr=subprocess.PIPE)
    helpers.wait_for_lines(log, 3, process)
    log.unlink()
    log.mkdir()
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and not (tmp_path / "f").exists()
    assert err.count("error: ") == 1 and f"error: {log} cannot be written" in err
    assert 'train.py"' not in err and "gloo" not in err and "stopped" not in err


@pytest.mark.slow
def test_two_interrupted_processes_resume_exactly(everything, tmp_path):
    more = ["--batch-size", 3, "--epochs", 20, "--lr", 1e-3, "--bits", 4]
    whole, out, log = tmp_path / "whole", tmp_path / "f", tmp_path / "log"
    done = subprocess.run(**torchrun(everything, whole, *more), capture_output=True)
    assert done.returncode == 0, done.stderr
    command = torchrun(everything, out, *more, "--log", log, "--resume")
    process = subprocess.Popen(**command, stderr=subprocess.PIPE, start_new_session=True)
    helpers.wait_for_lines(log, 7, process)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and not out.exists()
    assert err.count("of 160 steps are in") == 1 and err.count("interrupted\n") == 1
    done = subprocess.run(**command, capture_output=True)
    assert out.exists() and done.stderr.count("going on after step") == 1, done.stderr
    assert out.read_bytes() == whole.read_bytes()
    assert [row.get("step") for row in rows_of(log)] == [*range(160), None]
