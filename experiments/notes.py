"""A long run of many cases: shared out among processes, and what is finished is kept in files.

A file for each process, written after each case. A run that is killed goes on with the same
command, with as many processes as one likes.
"""

import hashlib
from collections.abc import Callable, Hashable, Iterable
from glob import escape
from pathlib import Path

from tqdm import tqdm

from model import Transformer
from support.command import TEXTS, UserError
from support.factors_file import fingerprint
from support.huggingface.checkpoint import find_checkpoint
from support.processes import gathered, patient_group, place, say
from support.resume import load_state, save_state


def run_all(
    keys: Iterable[Hashable],
    run: Callable[[Hashable], object],
    notes: Path | None,
    plan: dict | None = None,
    unit: str = "case",
) -> dict:
    """What `run` makes of each key, plain numbers in lists and dictionaries, in every process.

    Results are kept in files named `notes` until `delete_notes`, and not made again. Raises
    `UserError` if the notes are those of another `plan`, and the first one of `run`.
    """
    rank, count = place()
    plan = plan or {}
    done = {}
    for file in note_files(notes):
        if file.suffix == ".pt":  # else half-written
            done |= load_state(file, plan, ("results",))["results"]
    if done:
        say(f"{len(done)} {unit}s are done already")
    group = patient_group()
    gathered(None, group)  # before anyone writes notes, all have read the same
    failure = None
    todo = [key for key in keys if key not in done]
    try:
        for key in tqdm(todo[rank::count], unit=unit, leave=False, disable=rank > 0):
            done[key] = run(key)
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
    return sorted(notes.parent.glob(f"{escape(notes.name)}.cases-*")) if notes else []


def delete_notes(notes: Path | None) -> None:
    for file in note_files(notes):
        file.unlink()


def contents(path: Path) -> str:
    """A digest of a file, or of the text in a folder: notes may be kept there as well."""
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if TEXTS.match(file.name))
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()


def all_that_counts(options: dict, model: Transformer, path: str) -> dict:
    """What must be the same to go on with noted cases: the command's options by name, files by
    their contents, and the checkpoint at `path`."""
    plan = {}
    for name, value in options.items():
        if name not in ("json", "device"):
            values = value if isinstance(value, list) else [value]
            plan[name] = [contents(v) if isinstance(v, Path) else str(v) for v in values]
    plan["model"] = [fingerprint(model)]
    for file in sorted(find_checkpoint(path).iterdir()):
        if file.suffix in (".json", ".jinja", ".model"):  # what a checkpoint has beside weights
            plan["model"].append(contents(file))
    return plan
