"""A long run of many cases: shared out among processes, and what is finished is kept in files.

A file for each process, JSON lines: the arguments, then a line for each finished case. A run that
is killed leaves half a line at the most: that case does not count as finished. The same command
goes on where it stopped, with as many processes as one likes.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from tqdm import tqdm

from model import Transformer
from support.command import UserError, append_line
from support.factors_file import fingerprint
from support.huggingface.checkpoint import find_checkpoint
from support.processes import gathered, patient_group, place, say

Key = tuple[int, int]  # of a piece of work: its row and its case


def run_all(
    groups: list[list[Key]],
    run: Callable[[list[Key]], Iterable[dict]],
    notes: Path | None,
    arguments: dict | None = None,
    unit: str = "case",
) -> dict[Key, dict]:
    """The results of all work, by key, in every process.

    Args:
        groups: keys whose work is done together, by one process.
        run: yields a result, which JSON can hold, for each key that it is given, in turn.
        notes: results are kept in files of that name until `delete_notes`, and are not made again;
            None keeps none.
        arguments: what must be the same to go on with the notes.

    Raises `UserError` if the notes are those of other `arguments`, and the first one of `run`.
    """
    rank, count = place()
    done = read_notes(notes, arguments) if notes else {}
    group = patient_group()
    gathered(None, group)  # before anyone writes notes, all have read the same
    file = start_notes(notes, rank, arguments) if notes else None
    left = [[key for key in keys if key not in done] for keys in groups]
    todo = [keys for keys in left if keys]
    failure = None
    try:
        for keys in tqdm(todo[rank::count], unit=unit, leave=False, disable=rank > 0):
            for key, result in zip(keys, run(keys), strict=True):
                done[key] = result
                if file:
                    append_line(file, {"row": key[0], "case": key[1], **result})
    except UserError as error:
        failure = error
    for part, error in gathered((done, failure), group):
        if error:
            raise error
        done |= part
    return done


def note_files(notes: Path) -> list[Path]:
    return sorted(f for f in notes.parent.iterdir() if f.name.startswith(f"{notes.name}.cases-"))


def read_notes(notes: Path, arguments: dict | None) -> dict[Key, dict]:
    """The finished cases of an earlier run, by row and case. Raises `UserError` for a run with
    other arguments, naming one, and for a damaged file."""
    arguments = json.loads(json.dumps(arguments or {}))  # as they come back from a file
    done, other = {}, None
    for file in note_files(notes):
        try:
            lines = file.read_text().splitlines(keepends=True)
            theirs, *results = [json.loads(line) for line in lines if line.endswith("\n")] or [None]
            if theirs is not None and theirs != arguments:
                both = {**theirs, **arguments}
                other = next(name for name in both if theirs.get(name, 0) != arguments.get(name, 0))
            done |= {(result.pop("row"), result.pop("case")): result for result in results}
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise UserError(f"{file} is damaged ({error}); delete it to start again") from None
        if other:
            flag = "command" if other == "what" else "--" + other.replace("_", "-")
            raise UserError(
                f"{file} has cases of a run with another {flag}; delete it to start again, or "
                "write to another place"
            )
    if done:
        say(f"{len(done)} runs of a cache on a case are done already")
    return done


def start_notes(notes: Path, rank: int, arguments: dict | None) -> Path:
    """The notes of this process, with the arguments in them and without half a line at the end."""
    file = notes.with_name(f"{notes.name}.cases-{rank}")
    try:
        with file.open("a+b") as lines:
            lines.seek(0)
            end = lines.read().rfind(b"\n") + 1
            lines.truncate(end)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error}); choose another place") from None
    if not end:
        append_line(file, arguments or {})
    return file


def delete_notes(notes: Path | None) -> None:
    for file in note_files(notes) if notes else []:
        file.unlink()


def contents(path: Path) -> str:
    """A digest of a file, or of all files in a folder."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
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
