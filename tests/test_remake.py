"""The list of commands that made experiments/results, and what runs them."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from experiments import paper
from experiments.remake import read_blocks, remake, words
from support.command import UserError

ROOT = Path(__file__).parent.parent
BLOCKS = read_blocks(paper.RESULTS / "commands.txt")


def test_every_result_has_one_command():
    listed = [file for files, _ in BLOCKS for file in files]
    assert len(listed) == len(set(listed))
    own = {paper.RESULTS / "paper.json", paper.RESULTS / "commands.txt"}
    there = {file for file in paper.RESULTS.rglob("*") if file.is_file()} - own
    assert {file.relative_to(ROOT) for file in there} <= set(listed)
    made = {file for file in listed if file.parts[:2] == ("experiments", "results")}
    assert made <= {file.relative_to(ROOT) for file in there}


@pytest.mark.parametrize("command", [command for _, command in BLOCKS])
def test_commands_are_ones_that_their_programs_take(command):
    """And what they write are the files of their block, and what they read of ours an earlier one's
    or one of `weights`."""
    _, m, module, *rest = words(command, Path("F"), 1)
    assert m == "-m"
    args = importlib.import_module(module).parse_arguments(rest)
    files = next(files for files, own in BLOCKS if own == command)
    out = args.json if getattr(args, "json", None) else args.out
    stems = {path.with_suffix("") for path in (out if isinstance(out, list) else [out])}
    if module == "experiments.paper":
        stems = {args.out / args.what}
    assert {file.with_suffix("") for file in files} == stems or set(files) >= {out / "heldout.txt"}
    before = [file for own, other in BLOCKS[: BLOCKS.index((files, command))] for file in own]
    for word in shlex.split(command):
        if re.match(r"runs/.*\.\w+$", word) and Path(word) not in files:
            assert Path(word) in before, word


@pytest.mark.parametrize("file", sorted(paper.RESULTS.rglob("*.md")), ids=lambda f: f.stem)
def test_tables_name_the_listed_command(file):
    (command,) = [c for files, c in BLOCKS if file.relative_to(ROOT) in files]
    plain = command.replace("torchrun", "python").replace("{data}", "FOLDER")
    assert file.read_text(encoding="utf-8").split("`")[1] == plain


def write(name: str) -> str:
    return f"""python -c 'open("{name}", "x").write("{{data}}")'"""


def test_a_list_is_made_and_goes_on(tmp_path, capsys, monkeypatch):
    """A command runs once; again if its file is gone; one that fails is named, and begun again."""
    monkeypatch.chdir(tmp_path)
    Path("list").write_text(f"# a\none\n    {write('one')}\n\nb/two\n    {write('b/two')}\n")
    remake(Path("list"), Path("d"), Path("done"), 1)
    assert Path("one").read_text() == Path("b/two").read_text() == "d"
    assert capsys.readouterr().out == f"one\n    {write('one')}\nb/two\n    {write('b/two')}\n"
    Path("b/two").unlink()
    remake(Path("list"), Path("e"), Path("done"), 1)
    assert (Path("one").read_text(), Path("b/two").read_text()) == ("d", "e")
    Path("list").write_text(f"one\n    {write('one')} --more\nthree\n    {write('three')}\n")
    with pytest.raises(UserError, match="--more"):  # the file is there, but another's
        remake(Path("list"), Path("d"), Path("done"), 1)
    assert not Path("three").exists()
    Path("one").unlink()
    remake(Path("list"), Path("d"), Path("done"), 1)
    assert Path("three").exists()
    Path("list").write_text("four\n    python -c 'pass'\n")
    with pytest.raises(UserError, match="four not written"):
        remake(Path("list"), Path("d"), Path("done"), 1)


def test_processes_share_what_torchrun_starts():
    assert words("torchrun -m a --b '{data} c'", Path("d"), 1)[1:] == ["-m", "a", "--b", "d c"]
    _, *rest = words("torchrun -m a", Path("d"), 3)
    assert rest == ["-m", "torch.distributed.run", "--nproc-per-node", "3", "--", "-m", "a"]
    assert words("python -m a", Path("d"), 3)[1:] == ["-m", "a"]
