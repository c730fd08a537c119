"""The records of a benchmark's set: JSON lines from a folder, or from an archive of the hub."""

import json
import zipfile
import zlib
from pathlib import Path
from typing import IO

from support.command import UserError, first_line


def read_records(task, folder: Path | None = None) -> list[dict]:
    """The records of a task, from its file in `folder` or one folder below, or from the hub.

    `task` has the `name` of the set, the `archive` in a `repository` of the hub that holds its file
    `name`.jsonl, and the `fields` that a record must have, with their types.

    Raises `UserError` if there is no such file, or for the first line that is not such a record.
    """
    file = f"{task.name}.jsonl"
    source = find_file(folder, file) if folder is not None else fetch(task)
    try:
        if folder is not None:
            with source.open("rb") as lines:
                return parse_records(task, source, lines)
        with zipfile.ZipFile(source) as archive:
            members = [name for name in archive.namelist() if name.split("/")[-1] == file]
            if not members:
                raise UserError(f"{source} has no {file}; give a folder that has it")
            with archive.open(members[0]) as lines:
                return parse_records(task, f"{source}, {file}", lines)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{source} cannot be read ({error}); fetch it again") from None


def find_file(folder: Path, file: str) -> Path:
    """`folder/file`, or `folder/x/file`: the archives unpack into a folder each."""
    found = [*folder.glob(file), *sorted(folder.glob(f"*/{file}"))]
    if not found:
        raise UserError(f"no file {folder / file}; give the folder of the benchmark's .jsonl files")
    return found[0]


def fetch(task) -> Path:
    """The task's archive from the hub's cache, downloaded if it is not there."""
    from huggingface_hub import hf_hub_download  # slow to import, and not needed for a folder

    try:
        return Path(hf_hub_download(task.repository, task.archive, repo_type="dataset"))
    except Exception as error:  # the hub client raises many kinds, all of which mean the same here
        what = f"the hub did not give {task.archive} of {task.repository} ({first_line(error)})"
        raise UserError(f"{what}; give a folder that has {task.name}.jsonl") from None


def parse_records(task, source: Path | str, lines: IO[bytes]) -> list[dict]:
    """Records from JSON lines. Raises `UserError` that names `source`, the line and the field."""
    records = []
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{source}, line {i}: not JSON ({error}); fetch it again") from None
        for field, kind in task.fields.items():
            value = record.get(field) if isinstance(record, dict) else None
            if not isinstance(value, kind):
                raise UserError(
                    f"{source}, line {i}: no {field!r} of type {kind.__name__}; fetch it again"
                )
        answers = record["answers"]
        if not answers or not all(isinstance(answer, str) for answer in answers):
            raise UserError(f"{source}, line {i}: 'answers' is no list of texts; fetch it again")
        records.append(record)
    if not records:
        raise UserError(f"{source} has no records; fetch it again")
    return records
