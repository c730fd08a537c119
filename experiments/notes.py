"""A long run of many cases: shared out among processes, and what is finished is kept in files.

A file for each process, written after each case. A run that is killed goes on with the same
command, with as many processes as one likes.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from tqdm import tqdm

from model import Transformer
from support.command import TEXTS, UserError
from support.factors_file import fingerprint
from support.huggingface.checkpoint import find_checkpoint
from support.processes import gathered, patient_group, place, say
from support.resume import changed_flag, load_state, save_state

Key = tuple[int, int]  # of a piece of work: its row and its case


def run_all(
    groups: list[list[Key]],
    run: Callable[[list[Key]], Iterable[dict]],
    notes: Path | None,
    arguments: dict | None = None,
    unit: str = "case",
) -> dict[Key, dict]:
    """The results of all work, by key, in every process. Keys of a group are done by one process.

    `run` yields a result, of plain numbers and lists, for each key that it is given. Results are
    kept in files named `notes` until `delete_notes`, and not made again. Raises `UserError` if the
    notes are those of other `arguments`, by option, and the first one of `run`.
    """
    rank, count = place()
    plan = arguments or {}
    done = read_notes(notes, plan)
    group = patient_group()
    gathered(None, group)  # before anyone writes notes, all have read the same
    failure = None
    todo = [keys for keys in groups if not done.keys() >= set(keys)]
    try:
        for keys in tqdm(todo[rank::count], unit=unit, leave=False, disable=rank > 0):
            done |= zip(keys, run(keys), strict=True)
            if notes:
                save_state(own_notes(notes), {"plan": plan, "results": done})
    except UserError as error:
        failure = error
    for part, error in gathered((done, failure), group):
        if error:
            raise error
        done |= part
    return done


def own_notes(notes: Path | None) -> Path | None:
    """The file of that name which this process writes."""
    return notes and notes.with_name(f"{notes.name}.cases-{place()[0]}.pt")


def note_files(notes: Path | None) -> list[Path]:
    if notes is None:
        return []
    return sorted(f for f in notes.parent.iterdir() if f.name.startswith(f"{notes.name}.cases-"))


def read_notes(notes: Path | None, plan: dict) -> dict[Key, dict]:
    """The finished cases of an earlier run. Raises `UserError` for a run with another plan, naming
    an option that differs, and for a damaged file."""
    done = {}
    for file in note_files(notes):
        if file.suffix != ".pt":  # half-written
            continue
        state = load_state(file, {}, ("plan", "results"))
        flag = changed_flag(plan, state["plan"]) or changed_flag(state["plan"], plan)
        if flag:
            flag = "command" if flag == "--what" else flag
            message = f"{file} has cases of a run with another {flag}"
            raise UserError(f"{message}; delete it to start again, or write to another place")
        done |= state["results"]
    if done:
        say(f"{len(done)} runs of a cache on a case are done already")
    return done


def delete_notes(notes: Path | None) -> None:
    for file in note_files(notes):
        file.unlink()


def contents(path: Path) -> str:
    """A digest of a file, or of the text in a folder: notes may be kept there as well."""
    digest = hashlib.sha256()
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if TEXTS.match(file.name))
    for file in files:
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()


SMALL = (".json", ".jinja", ".model")  # a checkpoint's files that are not its weights


def all_that_counts(options: dict, model: Transformer, path: str) -> dict:
    """What must be the same to go on with noted cases: the command's options by name, files by
    their contents, and the checkpoint at `path`."""

    def shown(value: object) -> object:
        if isinstance(value, list):
            return [shown(item) for item in value]
        return contents(value) if isinstance(value, Path) else str(value)

    named = {name: shown(v) for name, v in options.items() if name not in ("json", "device")}
    files = sorted(find_checkpoint(path).iterdir())
    small = [contents(file) for file in files if file.suffix in SMALL]
    return {**named, "model": [fingerprint(model), small]}
