"""Command lines as a shell sees them: what they write, where it cannot be written, how they end."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from cskv import init_factors
from support.command import UserError, check_writable, run_command
from support.factors_file import save_factors
from tests.helpers import save_checkpoint, tiny_model

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """A tiny checkpoint whose tokens are words that few encodings have, factors, and text."""
    folder = tmp_path_factory.mktemp("command")
    model = tiny_model()
    save_checkpoint(model, folder / "model")
    words = Tokenizer(models.WordLevel({f"模{i}é": i for i in range(61)}, unk_token="模0é"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "model" / "tokenizer.json"))
    save_factors(folder / "factors", init_factors("svd", model, [4, 4], [4, 4]), model)
    text = " ".join(f"模{i * i % 61}é" for i in range(400))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return folder


def shell(*args, stdout=subprocess.PIPE, encoding="utf-8"):
    """A command line in a process of its own; its output as bytes."""
    env = {**os.environ, "PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=env, stdout=stdout, stderr=subprocess.PIPE)


def infer_arguments(setup):
    files = ["--model", setup / "model", "--factors", setup / "factors"]
    return ["infer.py", *files, "--prompt", "模5é 模6é", "--max-new-tokens", 3]


class Terminal(io.TextIOWrapper):
    """Standard output in an encoding, or one whose disk is full."""

    def __init__(self, encoding="utf-8", full=False):
        super().__init__(io.BytesIO(), encoding=encoding)
        self.full, self.begun = full, False

    def write(self, text):
        self.begun = True
        return super().write(text)

    def flush(self):
        if self.full and self.begun:
            raise OSError(28, "No space left on device")
        super().flush()

    def fileno(self):
        return os.open(os.devnull, os.O_WRONLY)


def ending(monkeypatch, command, **terminal):
    """The exit status of a command line, and what it wrote to each stream of such a terminal."""
    out, err = Terminal(**terminal), Terminal(terminal.get("encoding", "utf-8"))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    try:
        run_command(command)
        status = 0
    except SystemExit as end:
        status = end.code
    out.full = False
    return status, *(s.flush() or s.buffer.getvalue().decode(s.encoding) for s in (out, err))


@pytest.mark.parametrize(
    ("encoding", "seen"),
    [("utf-8", "模 é €"), ("cp1252", "? é €"), ("latin-1", "? é ?"), ("ascii", "? ? ?")],
)
def test_a_character_that_a_terminal_cannot_show_is_a_question_mark(monkeypatch, encoding, seen):
    found = ending(monkeypatch, lambda: print("模 é €"), encoding=encoding)
    assert found == (0, seen + "\n", "")

    def fail():
        raise UserError("no file 模 é €;\ngive another")

    found = ending(monkeypatch, fail, encoding=encoding)
    assert found == (2, "", f"error: no file {seen}; give another\n")


def test_half_a_surrogate_is_a_question_mark(monkeypatch):
    assert ending(monkeypatch, lambda: print("a\ud83d")) == (0, "a?\n", "")


@pytest.mark.parametrize("ends", ["well", "with a usage text"])
def test_a_full_disk_is_one_line(monkeypatch, ends):
    def command():
        print("a table")
        if ends != "well":
            sys.exit(0)

    status, _, err = ending(monkeypatch, command, full=True)
    assert status == 2 and err.count("\n") == 1
    assert err.startswith("error: the output cannot be written (") and "No space left" in err


def test_a_file_that_no_check_foresaw_is_one_line(monkeypatch, tmp_path):
    status, _, err = ending(monkeypatch, lambda: (tmp_path / "no" / "file").open("w"))
    assert status == 2 and err.count("\n") == 1 and str(tmp_path / "no" / "file") in err


def test_infer_in_a_small_encoding(setup):
    done = shell(*infer_arguments(setup), encoding="cp1252")
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    words = done.stdout.decode("cp1252").split()
    assert len(words) == 3 and all(w.startswith("?") and w.endswith("é") for w in words)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_infer_on_a_full_disk(setup):
    with open("/dev/full", "wb") as full:
        done = shell(*infer_arguments(setup), stdout=full)
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert done.stderr.decode().splitlines()[-1].startswith("error: the output cannot be written")


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-"])
def test_a_closed_stream_loses_its_words_alone(setup, tmp_path, closed):
    """Progress bars too are written to one."""
    train = [sys.executable, "train.py", "--model", setup / "model", "--data", setup / "text.txt"]
    command = " ".join(map(str, [*train, "--seq-len", 40, "--out", tmp_path / "f"]))
    done = subprocess.run(f"{command} {closed}", cwd=ROOT, shell=True, capture_output=True)
    assert done.returncode == 0 and (tmp_path / "f").exists(), done.stderr


PASSAGES = "--text T --context 20 --steps 4 --passages 2 --calibrate T --samples 4 --seq-len 20"
OTHERS = {  # every other command line that prints results; M the model, T the text, O a folder
    "evaluate": f"-m experiments.evaluate perplexity --model M {PASSAGES} --ratios 0.5",
    "paper": f"-m experiments.paper table3 --model M {PASSAGES} --ratios 0.5 --out O/paper "
    "--work O/work --measure-samples 2",
    "speed": "-m experiments.speed --model M --lengths 20 --rounds 1",
    "english": "-m experiments.english --out O/english",
}


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("name", OTHERS)
def test_every_command_on_a_full_disk_and_in_ascii(setup, tmp_path, name):
    places = {"M": setup / "model", "T": setup / "text.txt", "O": tmp_path}
    command = [
        places.get(word, word) for word in OTHERS[name].replace("O/", f"{tmp_path}/").split()
    ]
    with open("/dev/full", "wb") as full:
        done = shell(*command, stdout=full)
    last = done.stderr.decode().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: the output cannot be written"), last
    done = shell(*command, encoding="ascii")
    assert done.returncode == 0 and done.stdout and b"Traceback" not in done.stderr


def test_a_closed_pipe_is_no_traceback():
    command = " ".join(map(str, [sys.executable, "infer.py", "--help"]))
    done = subprocess.run(f"{command} | true", cwd=ROOT, shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_what_cannot_be_written_is_known_before(tmp_path):
    file, pipe = tmp_path / "file", tmp_path / "pipe"
    file.write_text("kept")
    for path in (None, file, tmp_path / "new"):
        check_writable(path)
    assert [f.name for f in tmp_path.iterdir()] == ["file"] and file.read_text() == "kept"
    os.mkfifo(pipe)  # as /dev/null is no regular file, which a rename would replace
    for path, message in {
        tmp_path / "no" / "f": "no folder",
        file / "f": "no folder",  # a file is none
        tmp_path: "is not a regular file",
        pipe: "is not a regular file",
        tmp_path / ("x" * 250): "cannot be written",  # no room in the name for .tmp
        tmp_path / ("x" * 256): "cannot be written",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            check_writable(path)
        assert "\n" not in str(caught.value)


def test_a_folder_without_permission_is_known_before(tmp_path):
    """/proc refuses new files even to root."""
    tmp_path.chmod(0o500)
    folder = Path("/proc/self") if os.access(tmp_path, os.W_OK) else tmp_path
    if not folder.is_dir():
        pytest.skip("root, and no /proc")
    with pytest.raises(UserError, match="cannot be written"):
        check_writable(folder / "f")
