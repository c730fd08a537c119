"""Command lines as a shell sees them: what they write, where it cannot be written, how they end."""

import importlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from course.problems import read_modules
from experiments.notes import contents
from support.command import UserError, check_files, check_writable, run_command
from support.text import read_documents
from tests.helpers import call

ROOT = Path(__file__).parent.parent
PROGRAMS = ["infer", "train", "weights.get_smollm2"]
for folder, names in {
    "experiments": "evaluate paper speed budget english own_words segments longeval",
    "course": "grade gradescope release",
    "weights": "train_teacher check_teacher",
}.items():
    PROGRAMS += [f"{folder}.{name}" for name in names.split()]
full_disk = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")


def shell(*args, stdout=subprocess.PIPE, **environment):
    """A command line in a process of its own; its output as bytes."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=env, stdout=stdout, stderr=subprocess.PIPE)


# ------------------------------------------------------------------------------------- output


@pytest.fixture
def ending(monkeypatch):
    """Runs a command in a terminal: its exit status, and what it wrote to each stream."""

    def run(command, encoding="utf-8", stdout=None):
        streams = {name: io.TextIOWrapper(io.BytesIO(), encoding) for name in ("stdout", "stderr")}
        for name, stream in streams.items():
            monkeypatch.setattr(sys, name, stream)
        if stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
        status = 0
        try:
            run_command(command)
        except SystemExit as end:
            status = end.code
        out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams.values())
        return status, out, err

    return run


@pytest.mark.parametrize(
    ("encoding", "seen"),
    [("utf-8", "模 é € ?"), ("cp1252", "? é € ?"), ("latin-1", "? é ? ?"), ("ascii", "? ? ? ?")],
)
def test_a_character_that_a_terminal_cannot_show_is_a_question_mark(ending, encoding, seen):
    text = "模 é € \ud83d"  # the last one is half a surrogate

    def fail():
        raise UserError(f"no file {text};\ngive another")

    assert ending(lambda: print(text), encoding) == (0, seen + "\n", "")
    assert ending(fail, encoding) == (2, "", f"error: no file {seen}; give another\n")


@full_disk
@pytest.mark.parametrize("end", [lambda: None, lambda: sys.exit(0)])
def test_output_that_cannot_be_written(ending, end):
    """A full disk is one line, also after a usage text; a reader that has seen enough is none."""

    def command():
        print("a table")
        end()

    with open("/dev/full", "w") as full:
        status, _, err = ending(command, stdout=full)
    assert status == 2 and err.count("\n") == 1
    assert err.startswith("error: the output cannot be written (") and "No space left" in err
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        assert ending(command, stdout=pipe) == (1, "", "")


def test_a_file_that_no_check_foresaw_is_one_line(ending, tmp_path):
    status, _, err = ending((tmp_path / "no" / "file").open)
    assert status == 2 and err.count("\n") == 1 and str(tmp_path / "no" / "file") in err


def test_closed_streams_lose_their_words_alone(everything, tmp_path):
    """Progress bars too are written to one."""
    command = f"{sys.executable} train.py --model {everything}/model --data {everything}/text.txt"
    command += f" --seq-len 40 --out {tmp_path}/f >&- 2>&-"
    assert subprocess.run(command, cwd=ROOT, shell=True).returncode == 0
    assert (tmp_path / "f").exists()


PASSAGES = "--text T --context 20 --steps 4 --passages 2 --calibrate T --samples 4 --seq-len 20"
PRINTING = [  # every command line that prints results; M the model, T the text, O a folder
    "infer --model M --cache full --prompt t5 --max-new-tokens 3",
    f"experiments.evaluate perplexity --model M {PASSAGES} --ratios 0.5",
    f"experiments.paper table3 --model M {PASSAGES} --ratios 0.5 --out O/paper --work O/work",
    "experiments.speed --model M --lengths 20 --rounds 1",
    "experiments.english --out O/english",
]


@full_disk
@pytest.mark.slow
@pytest.mark.parametrize("command", PRINTING)
def test_every_command_on_a_full_disk(places, command):
    with open("/dev/full", "wb") as full:
        done = shell("-m", *[placed(places, word) for word in command.split()], stdout=full)
    last = done.stderr.decode().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: the output cannot be written"), last


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_help_without_docstrings(program):
    done = shell("-OO", "-m", program, "--help")
    assert done.returncode == 0 and b"usage:" in done.stdout, done.stderr


@pytest.mark.slow
def test_english_needs_docstrings(tmp_path):
    done = shell("-OO", "-m", "experiments.english", "--out", tmp_path / "english")
    assert done.returncode == 2 and b"docstrings" in done.stderr
    assert not (tmp_path / "english").exists()


@pytest.mark.slow
@pytest.mark.parametrize("program", [p for p in PROGRAMS if "get_smollm2" not in p])
def test_ctrl_c_while_modules_are_imported(program):
    """They take a second or more; get_smollm2.py imports next to nothing, and is done by then."""
    start = [sys.executable, "-m", program, "--help"]
    out = subprocess.PIPE
    running = subprocess.Popen(start, cwd=ROOT, stdout=out, stderr=out, text=True)
    time.sleep(0.3)
    running.send_signal(signal.SIGINT)
    stdout, stderr = running.communicate(timeout=60)
    assert (running.returncode, stdout, stderr) == (130, "", "interrupted\n")


# ------------------------------------------------------------------------------ files to write


def test_what_cannot_be_written_is_known_before(tmp_path):
    file, pipe = tmp_path / "file", tmp_path / "pipe"
    file.write_text("kept")
    for path in (file, tmp_path / "new"):
        check_writable(path)
    assert [f.name for f in tmp_path.iterdir()] == ["file"] and file.read_text() == "kept"
    os.mkfifo(pipe)  # as /dev/null is no regular file, which a rename would replace
    refused = {
        tmp_path / "no" / "f": "no folder",
        file / "f": "no folder",  # a file is none
        tmp_path: "is not a regular file",
        pipe: "is not a regular file",
        tmp_path / ("x" * 250): "cannot be written",  # no room in the name for .tmp
        tmp_path / ("x" * 256): "cannot be written",
    }
    tmp_path.chmod(0o500)
    if not os.access(tmp_path, os.W_OK):
        refused[tmp_path / "f"] = "cannot be written"
    elif os.path.isdir("/proc/self"):  # refuses new files even to root
        refused[Path("/proc/self/f")] = "cannot be written"
    for path, message in refused.items():
        with pytest.raises(UserError, match=message) as caught:
            check_writable(path)
        assert "\n" not in str(caught.value)
    tmp_path.chmod(0o700)


# Each command with a file that it reads as one that it writes. M is the model's folder, T a text, F
# factors, D a folder of a benchmark's sets, O an empty folder; `name>X` in O is a hard link to X
# and `name->X` a symbolic one.
TRAIN = "train --model M --data T --init svd --epochs 0"
BUDGET = "experiments.budget --model M --data T --remove 0.5"
PERPLEXITY = "experiments.evaluate perplexity --model M --text T --caches full"
LONGBENCH = "experiments.evaluate longbench --model M --data D --caches full"
PAPER = f"experiments.paper table3 --model M {PASSAGES} --work O/w"
WORDS = "experiments.own_words --model M --data T"
SEGMENTS = "experiments.segments --model M --text T --factors F"
OVERWRITES = {
    "a link to the folder": (f"{TRAIN} --out O/ln/model.safetensors", "ln->M"),
    "the model through a link": ("train --model O/ln --data T --out M/model.safetensors", "ln->M"),
    "a hard link to the text": (f"{TRAIN} --out O/ln", "ln>T"),
    "the checkpoint is the text": (f"{TRAIN} --out O/f", "f.checkpoint>T"),
    "the checkpoint is the log": (f"{TRAIN} --out O/f --log O/f.checkpoint", ""),
    "two links to one file": (f"{TRAIN} --out O/a --log O/b", "c>F a->O/c b->O/c"),
    "a text of the folder": ("train --model M --data D --out O/f --log D/triviaqa_e.jsonl", ""),
    "a new text of the folder": ("train --model M --data D --out D/new.txt", ""),
    "rows over the config": (f"{PERPLEXITY} --json M/config.json", ""),
    "rows over the factors": (f"{PERPLEXITY} --factors F --json O/ln", "ln>F"),
    "rows over the text": (f"{PERPLEXITY} --json O/ln", "ln->T"),
    "rows over the calibration": (f"{PERPLEXITY} --calibrate D --json D/new.jsonl", ""),
    "perplexity's picture over the text": (f"{PERPLEXITY} --picture O/ln", "ln->T"),
    "notes over the text": (f"{PERPLEXITY} --json O/r", "r.cases-0.pt>T"),
    "rows over a set": (f"{LONGBENCH} --json D/triviaqa_e.jsonl", ""),
    "rows over a set one folder below": (f"{LONGBENCH} --json D/below/set.jsonl", ""),
    "a table over the text": (f"{PAPER} --out O", "table3.md>T"),
    "a table over the config": (f"{PAPER} --out O", "table3.json->M/config.json"),
    "a figure over the factors": (f"{PAPER} --out O --factors F", "table3.png>F"),
    "times over the tokenizer": ("experiments.speed --model M --json M/tokenizer.json", ""),
    "a picture over factors": ("experiments.speed --model M --factors F --picture O/p", "p>F"),
    "rows and picture": ("experiments.speed --model M --json O/p --picture O/p", ""),
    "a plan over the config": (f"{BUDGET} --out O/a.x", "a.json>M/config.json"),
    "a plan's picture over the text": (f"{BUDGET} --out O/a.x", "a.png->T"),
    "notes of probes over the text": (f"{BUDGET} --out O/a.x", "a.x.cases-0.pt->T"),
    "words over the text": ("experiments.own_words --model M --data D --out D/new.jsonl", ""),
    "words over the vocabulary": (f"{WORDS} --out M/vocab.jsonl", ""),
    "segments over the factors": (f"{SEGMENTS} --json O/ln", "ln->F"),
    "cases in a loop": ("experiments.longeval --out O/a", "a->O/b b->O/a"),
    "one text for two": ("experiments.english --out O", "heldout.txt->O/licences.txt"),
    "the grader over the course": ("course.gradescope --out O/ln", "ln->course/problems.toml"),
    "the model in a loop": ("infer --model O/a --prompt t1 --cache full", "a->O/b b->O/a"),
    "the data in a loop": ("train --model M --data O/a.txt --out O/f", "a.txt->O/a.txt"),
    "the output in a loop": (f"{TRAIN} --out O/a", "a->O/b b->O/a"),
    "the folder in a loop": ("experiments.english --out O/a", "a->O/b b->O/a"),
    "the release in a loop": ("course.release --out O/a", "a->O/b b->O/a"),
}


@pytest.fixture
def places(everything, tmp_path):
    """Copies of what the commands below read, by letter, and an empty folder O."""
    shutil.copytree(everything, tmp_path / "in")
    (tmp_path / "in" / "data" / "below").mkdir()
    shutil.copy(everything / "data" / "triviaqa_e.jsonl", tmp_path / "in/data/below/set.jsonl")
    (tmp_path / "out").mkdir()
    names = {"M": "in/model", "T": "in/text.txt", "F": "in/f", "D": "in/data", "O": "out"}
    return {letter: tmp_path / name for letter, name in names.items()}


def placed(places, word):
    """A path of the table above: its first part is a letter, or stands in this project."""
    first, *rest = word.split("/")
    return str(places[first].joinpath(*rest)) if first in places else word


def files_in(folder):
    """When each file was written, and each link made."""
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    return {path: path.lstat().st_mtime_ns for path in files}


@pytest.mark.parametrize("case", OVERWRITES)
def test_no_command_writes_over_what_it_reads(places, capsys, case):
    command, links = OVERWRITES[case]
    for link in links.split():
        name, kind, target = re.match(r"([^>]*?)(->|>)(.*)", link).groups()
        target = Path(ROOT, placed(places, target))
        if kind == ">":
            os.link(target, places["O"] / name)
        else:
            (places["O"] / name).symlink_to(target)
    before = files_in(places["O"].parent)
    module, *words = command.split()
    if module == "experiments.paper":
        pytest.importorskip("matplotlib")  # it looks for it before it makes folders
    arguments = [placed(places, word) for word in words]
    code, out, err = call(importlib.import_module(module), capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert ("are both" in err) != ("loop" in case) and "--help" not in err
    assert files_in(places["O"].parent) == before


def test_what_a_model_or_data_folder_may_get(places):
    """Factors may lie beside the model, as the teacher's do, and results beside texts; nothing that
    the next command would read as the model's."""
    model, data = places["M"], places["D"]
    for file in (model / "cskv-50.safetensors", data / "f.safetensors", data / "rows.json"):
        for _ in range(2):  # new, then there
            check_files({"--out": file, "--log": None}, {"--data": data}, model)
            check_files({"--out": file}, {"--data": None}, "org/name")
            file.write_text("an earlier result")
    (data / "below" / "log.jsonl").write_text("{}")  # read in a folder of sets alone
    check_files({"--log": data / "below" / "log.jsonl"}, {"--data": data}, model)
    names = "config.json generation_config.json tokenizer.json tokenizer.model vocab.json "
    names += "merges.txt special_tokens_map.json added_tokens.json chat_template.jinja "
    names += "adapter_model.safetensors model.safetensors model.safetensors.index.json "
    names += "model-00001-of-00002.safetensors pytorch_model.bin"
    for name in names.split():
        with pytest.raises(UserError, match="--out and a file of --model are both"):
            check_files({"--out": model / name}, {}, model)


def test_notes_may_be_kept_beside_the_text_that_they_are_of(places):
    """A run with its notes in the folder of its text was refused when it was to go on."""
    before = contents(places["D"])
    (places["D"] / "rows.json.cases-0.pt").write_text("")
    assert contents(places["D"]) == before
    (places["D"] / "below" / "new.jsonl").write_text("{}")
    assert contents(places["D"]) != before


def test_a_student_s_folder_in_a_loop_has_no_files(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert read_modules(tmp_path / "loop") == {}


# ---------------------------------------------------------------------------- names and text

LATIN = "caf\udce9"  # what Python makes of the byte E9 on a command line


@pytest.mark.parametrize("program", [p for p in PROGRAMS if "get_smollm2" not in p])
@pytest.mark.parametrize(("encoding", "name"), [("utf-8", LATIN), ("ascii", "café")])
def test_names_that_no_file_can_hold(monkeypatch, capsys, program, encoding, name):
    """Training used to end, hours later, with a name that no metadata can hold."""
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: encoding)
    with pytest.raises(SystemExit) as end:
        importlib.import_module(program).parse_arguments(["--out", name])
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {name!a} is not valid ") and "set LC_ALL=C.UTF-8" in err


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_files_of_any_name_in_a_folder_of_text(tmp_path):
    (tmp_path / f"{LATIN}.jsonl").write_text('{"text": "of a line"}')
    (tmp_path / f"{LATIN}.txt").write_text("of a text")
    assert sorted(read_documents(tmp_path)) == ["of a line", "of a text"]


@pytest.mark.slow
def test_an_accent_where_names_are_ascii(everything, tmp_path):
    files = ["--model", everything / "model", "--data", everything / "text.txt"]
    ascii = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = shell("train.py", *files, "--out", tmp_path / "é.txt", **ascii)
    assert done.returncode == 2 and not any(tmp_path.iterdir())
    assert done.stderr.startswith(b"error: '") and done.stderr.count(b"\n") == 1
