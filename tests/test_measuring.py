"""The loop over cases and caches: resumed, shared out, and refused in time."""

import json
import signal
import subprocess
import time

import pytest

from cskv import init_factors
from experiments import caches, evaluate, measuring, notes
from experiments.tables import table
from experiments.tasks.scores import wilson
from support.command import UserError
from support.factors_file import save_factors
from support.resume import load_state
from tests.evaluating import (
    ALL,
    ROOT,
    arguments,
    command,
    interrupt_after,
    measured,
    notes_beside,
    torchrun,
)
from tests.helpers import call, save_checkpoint, tiny_model, tiny_tokens


def test_wilson_by_hand():
    """46 of 50: (0.92 + 3.8416 / 100 -+ 1.96 sqrt(0.92 * 0.08 / 50 + 3.8416 / 10^4)) / 1.076832."""
    assert wilson(46, 50) == pytest.approx((0.8116, 0.9685), abs=1e-4)
    assert wilson(50, 50)[0] == pytest.approx(0.9287, abs=1e-4)


def test_a_cache_that_refuses_the_model_does_so_first(tmp_path, monkeypatch):
    """Before an hour of other caches: H2O does not know what to keep under a sliding window."""
    model, begun = tiny_model(sliding_window=9), interrupt_after(monkeypatch, 0)
    rows = [caches.make_row(model, "full"), caches.make_row(model, "h2o", 0.5)]
    with pytest.raises(UserError, match="sliding_window"):
        measuring.measure(model, rows, [measuring.Case({}, tiny_tokens(model, 1, 5), 5)])
    assert not begun


LONGEVAL = ("longeval", "--caches", "full,streaming,cskv", "--cases", 3, "--lines", "2,3")


@pytest.mark.parametrize("count", [0, 2, 13])
def test_an_interrupted_run_goes_on(everything, brief, tmp_path, capsys, monkeypatch, count):
    """Twice: no finished case of three caches is run again, and the table is the same."""
    whole, path = tmp_path / "whole", tmp_path / "rows"
    expected = measured(everything, capsys, whole, *LONGEVAL)  # 6 cases
    args = arguments(everything, *LONGEVAL, "--json", path)
    for stop in (count, 4):
        with monkeypatch.context() as patch:
            interrupt_after(patch, stop)
            assert call(evaluate, capsys, *args)[0] == 130
    (noted,) = notes_beside(path)
    noted.with_name(f"{noted.name}.123.tmp").write_bytes(b"half")  # killed while it wrote
    begun = interrupt_after(monkeypatch, 18)
    rows = measured(everything, capsys, path, *LONGEVAL)
    assert len(begun) == 3 * (6 - count // 3 - 1)
    assert rows == expected
    assert not notes_beside(path) and not notes_beside(whole)


@pytest.mark.parametrize("other", ["--cases", "--factors", "--model", "--what", "is damaged"])
def test_notes_of_another_run_are_refused(
    everything, brief, tmp_path, capsys, monkeypatch, refused, other
):
    """Of factors and models it is the content that counts."""
    path, factors, model = tmp_path / "rows", tmp_path / "f", tmp_path / "model"
    save_checkpoint(tiny_model(), model)
    own = ["--factors", factors, "--model", model, "--json", path]
    save_factors(factors, init_factors("svd", tiny_model(), [4, 4], [4, 4]), tiny_model())
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert call(evaluate, capsys, *arguments(everything, *LONGEVAL, *own))[0] == 130
    (noted,) = notes_beside(path)
    what, message = LONGEVAL, f"was made with another {other}"
    if other == "--cases":
        own += ["--cases", 4]
    elif other == "--factors":
        save_factors(factors, init_factors("svd", tiny_model(), [3, 3], [3, 3]), tiny_model())
    elif other == "--model":
        changed = tiny_model()
        changed.model.layers[0].self_attn.k_proj.weight *= 1.01  # still that of the factors
        save_checkpoint(changed, model)
    elif other == "--what":
        what = ["passkey"]
    else:
        noted.write_bytes(noted.read_bytes()[:-99])
        message = other
    error = refused(evaluate, *arguments(everything, *what, *own))
    assert message in error and str(noted) in error


@pytest.mark.slow
def test_a_killed_run_goes_on(everything, tmp_path, capsys):
    path, many = tmp_path / "rows", [*LONGEVAL, "--lines", 2, "--cases", 4]
    expected = measured(everything, capsys, tmp_path / "whole", *many)
    start = command(everything, *many, "--json", path)
    killed = subprocess.Popen(start, cwd=ROOT, stderr=subprocess.DEVNULL)
    noted, deadline = tmp_path / "rows.cases-0.pt", time.monotonic() + 60
    while not noted.exists():
        assert killed.poll() is None and time.monotonic() < deadline, "it never came that far"
        time.sleep(0.001)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL and not path.exists()
    done = len(load_state(noted, {}, ("results",))["results"])
    code, _, err = call(evaluate, capsys, *arguments(everything, *many, "--json", path))
    assert code == 0 and f"{done} cases are done already" in err
    assert json.loads(path.read_text()) == expected


@pytest.mark.slow
def test_two_processes_print_the_table_of_one(everything, tmp_path, capsys, monkeypatch):
    """They take up, too, what a single one left."""
    path, what = tmp_path / "rows", [*LONGEVAL, "--caches", ALL, "--lines", 2]
    expected = measured(everything, capsys, tmp_path / "whole", *what)
    with monkeypatch.context() as patch:
        interrupt_after(patch, len(caches.CACHES) + 1)
        assert call(evaluate, capsys, *arguments(everything, *what, "--json", path))[0] == 130
    done = torchrun(*command(everything, *what, "--json", path))
    assert done.stdout, done.stderr  # not its status: gloo may abort a process that has finished
    assert done.stderr.count("1 cases are done already") == 1
    rows = json.loads(path.read_text())
    assert rows == expected
    assert done.stdout == table(rows) + "\n"
    assert not notes_beside(path)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_mistake_of_one_process_is_raised_in_all(monkeypatch, failing):
    """Of the case that one process has and no other. What the other found is not lost."""
    monkeypatch.setattr(notes, "place", lambda: (0, 2))
    monkeypatch.setattr(notes, "patient_group", lambda: None)
    monkeypatch.setattr(notes, "gathered", lambda part, _: [part, ({1: "b"}, mistakes[1])])
    mistakes = [None, None]
    mistakes[failing] = UserError("too sad")

    def run(key):
        if mistakes[0]:
            raise mistakes[0]
        return "a"

    with pytest.raises(UserError, match="too sad"):
        notes.run_all([0, 1], run, None)
    mistakes[failing] = None
    assert notes.run_all([0, 1], run, None) == {0: "a", 1: "b"}
