"""Command lines as a shell sees them: what they write, where it cannot be written, how they end."""

import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from course.problems import read_modules
from cskv import init_factors
from experiments.notes import contents
from support.command import UserError, check_files, check_writable, run_command
from support.factors_file import save_factors
from support.text import read_documents
from tests.helpers import call, save_checkpoint, tiny_model

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
    "--work O/work",
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


# ------------------------------------------------------------- what no command line may do or meet

COMMANDS = ["infer.py", "train.py", "weights/get_smollm2.py"]
for folder, names in {
    "experiments": "evaluate paper speed budget english own_words segments longeval",
    "course": "grade gradescope release",
    "weights": "train_teacher check_teacher",
}.items():
    COMMANDS += [f"-m {folder}.{name}" for name in names.split()]


@pytest.mark.parametrize(
    "command",
    ["infer.py", *(pytest.param(c, marks=pytest.mark.slow) for c in COMMANDS if c != "infer.py")],
)
def test_help_without_docstrings(command):
    done = shell("-OO", *command.split(), "--help")
    assert done.returncode == 0 and b"usage:" in done.stdout, done.stderr


def test_english_needs_docstrings(tmp_path):
    done = shell("-OO", "-m", "experiments.english", "--out", tmp_path / "english")
    assert done.returncode == 2 and b"docstrings" in done.stderr
    assert not (tmp_path / "english").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if "get_smollm2" not in c])
def test_ctrl_c_while_modules_are_imported(command):
    """They take a second or more; get_smollm2.py imports next to nothing, and is done by then."""
    start = [sys.executable, *command.split(), "--help"]
    out = subprocess.PIPE
    running = subprocess.Popen(start, cwd=ROOT, stdout=out, stderr=out, text=True)
    time.sleep(0.3)
    running.send_signal(signal.SIGINT)
    stdout, stderr = running.communicate(timeout=60)
    assert (running.returncode, stdout, stderr) == (130, "", "interrupted\n")


# Each command with a file that it reads as one that it writes. M is the model's folder, T a text, F
# factors, D a folder of a benchmark's sets, O an empty folder; `name>X` in O is a hard link to X
# and `name->X` a symbolic one.
TRAIN = "train --model M --data T --init svd --epochs 0"
BUDGET = "experiments.budget --model M --data T --remove 0.5"
PERPLEXITY = "experiments.evaluate perplexity --model M --text T --caches full"
LONGBENCH = "experiments.evaluate longbench --model M --data D --caches full"
PAPER = f"experiments.paper table3 --model M {PASSAGES.replace('--text T', '')} --text T --work O/w"
OVERWRITES = {
    "the weights": (f"{TRAIN} --out M/model.safetensors", ""),
    "a new index beside them": (f"{TRAIN} --out M/model.safetensors.index.json", ""),
    "bin beside safetensors": (f"{TRAIN} --out M/pytorch_model.bin", ""),
    "the log is the config": (f"{TRAIN} --out O/f --log M/config.json", ""),
    "the log is the tokenizer": (f"{TRAIN} --out O/f --log M/tokenizer.json", ""),
    "new settings": (f"{TRAIN} --out O/f --log M/generation_config.json", ""),
    "a new adapter": (f"{TRAIN} --out M/adapter_model.safetensors", ""),
    "a new template": (f"{TRAIN} --out O/f --log M/chat_template.jinja", ""),
    "a link to the folder": (f"{TRAIN} --out O/ln/model.safetensors", "ln->M"),
    "a link to the weights": (f"{TRAIN} --out O/ln", "ln->M/model.safetensors"),
    "a hard link to the weights": (f"{TRAIN} --out O/ln", "ln>M/model.safetensors"),
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
    "words over the vocabulary": (
        "experiments.own_words --model M --data T --out M/vocab.jsonl",
        "",
    ),
    "segments over the factors": (
        "experiments.segments --model M --text T --factors F --json O/ln",
        "ln->F",
    ),
    "cases in a loop": ("experiments.longeval --out O/a", "a->O/b b->O/a"),
    "one text for two": ("experiments.english --out O", "heldout.txt->O/licences.txt"),
    "the grader over the course": ("course.gradescope --out O/ln", "ln->course/problems.toml"),
    "the grader over a module": ("course.gradescope --out O/ln", "ln->cskv.py"),
    "the model in a loop": ("infer --model O/a --prompt t1 --cache full", "a->O/b b->O/a"),
    "the data in a loop": ("train --model M --data O/a.txt --out O/f", "a.txt->O/a.txt"),
    "the output in a loop": (f"{TRAIN} --out O/a", "a->O/b b->O/a"),
    "the log in a loop": (f"{TRAIN} --out O/f --log O/a", "a->O/b b->O/a"),
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


def everything_in(folder):
    """The bytes of each file, where each link leads, and the names."""
    found = {}
    for file in sorted(folder.rglob("*")):
        found[str(file)] = os.readlink(file) if file.is_symlink() else None
        if file.is_file():
            found[str(file), "bytes"] = file.read_bytes()
    return found


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
    before = everything_in(places["O"].parent)
    module, *words = command.split()
    if module in ("experiments.paper", "experiments.budget"):
        pytest.importorskip("matplotlib")  # they look for it first
    arguments = [placed(places, word) for word in words]
    code, out, err = call(importlib.import_module(module), capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert ("are both" in err) != ("loop" in case) and "--help" not in err
    after = everything_in(places["O"].parent)
    made = {str(places["O"] / "w"), str(places["O"] / "w" / "model")}  # folders, still empty
    assert {name: after[name] for name in after if name not in made} == before


def test_what_a_model_or_data_folder_may_get(places):
    """Factors may lie beside the model, as the teacher's do, and results beside texts."""
    model, data = places["M"], places["D"]
    for file in (model / "cskv-50.safetensors", data / "f.safetensors", data / "rows.json"):
        for _ in range(2):  # new, then there
            check_files({"--out": file, "--log": None}, {"--data": data}, model)
            check_files({"--out": file}, {"--data": None}, "org/name")
            file.write_text("an earlier result")
    (data / "below" / "log.jsonl").write_text("{}")  # read in a folder of sets alone
    check_files({"--log": data / "below" / "log.jsonl"}, {"--data": data}, model)


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


def test_a_shard_of_any_name_is_a_file_of_the_model(places):
    index = places["M"] / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "part-one.st"}}))
    problem = "--out and a file of --model are both .*part-one.st; choose another name"
    with pytest.raises(UserError, match=problem):
        check_files({"--out": places["M"] / "part-one.st"}, {}, places["M"])
    check_files({"--out": places["M"] / "part-two.st"}, {}, places["M"])


# --------------------------------------------------------------------------- names and text

LATIN = "caf\udce9"  # what Python makes of the byte E9 on a command line
NO_NAMES = [
    ("infer", "--model", ["--prompt", "t1"]),
    ("infer", "--factors", ["--prompt", "t1"]),
    ("infer", "--prompt", []),
    ("train", "--data", ["--model", "M", "--out", "f"]),
    ("train", "--out", ["--model", "M"]),
    ("train", "--log", ["--model", "M", "--out", "f"]),
    ("experiments.evaluate", "--factors", ["longeval", "--model", "M"]),
    ("experiments.paper", "--text", ["table1"]),
    ("experiments.speed", "--picture", ["--model", "M"]),
    ("experiments.budget", "--out", ["--model", "M", "--data", "T", "--remove", "0.5"]),
    ("experiments.english", "--out", []),
    ("experiments.own_words", "--data", ["--model", "M", "--out", "f.jsonl"]),
    ("experiments.segments", "--text", ["--model", "M", "--factors", "f"]),
    ("experiments.longeval", "--out", []),
    ("course.gradescope", "--out", []),
    ("course.release", "--out", []),
    ("weights.train_teacher", "--work", []),
    ("weights.check_teacher", "--curve", []),
]


@pytest.mark.parametrize(("module", "flag", "others"), NO_NAMES)
@pytest.mark.parametrize(("encoding", "name"), [("utf-8", LATIN), ("ascii", "café")])
def test_names_that_no_file_can_hold(monkeypatch, capsys, module, flag, others, encoding, name):
    """Training used to end, hours later, with a name that no metadata can hold."""
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: encoding)
    with pytest.raises(SystemExit) as end:
        importlib.import_module(module).parse_arguments([*others, flag, name])
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {flag} 'caf\\") and "set LC_ALL=C.UTF-8" in err


def test_a_folder_of_a_student_is_named_without_a_flag(capsys):
    with pytest.raises(SystemExit):
        importlib.import_module("course.grade").parse_arguments([LATIN])
    err = capsys.readouterr().err
    assert err.startswith(r"error: folder 'caf\udce9' is not valid UTF-8; ")


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_files_of_any_name_in_a_folder_of_text(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["of a table"]}), tmp_path / "x.parquet")
    (tmp_path / "x.parquet").rename(tmp_path / f"{LATIN}.parquet")
    (tmp_path / f"{LATIN}.txt").write_text("of a text")
    assert sorted(read_documents(tmp_path)) == ["of a table", "of a text"]


@pytest.mark.parametrize("flag", ["--out", "--data"])
def test_an_accent_where_names_are_ascii(setup, tmp_path, flag):
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    files = {"--model": setup / "model", "--data": setup / "text.txt", "--out": tmp_path / "f"}
    files[flag] = tmp_path / "é.txt"
    words = [str(word) for pair in files.items() for word in pair]
    done = subprocess.run(
        [sys.executable, "train.py", *words], cwd=ROOT, env=env, capture_output=True
    )
    assert done.returncode == 2 and not any(tmp_path.iterdir())
    assert done.stderr.startswith(f"error: {flag} ".encode()) and done.stderr.count(b"\n") == 1
