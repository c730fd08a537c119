"""The sets of a benchmark: what a `Task` asks, and its records, from a folder or from the hub."""

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments.tasks.prompts import read_prompt
from support.command import UserError, first_line
from support.huggingface.tokenizer import Tokenizer


@dataclass(frozen=True)
class Task:
    """One set of a benchmark: where its records are, how it asks and how it scores."""

    name: str  # of the set, of its file, `name`.jsonl, and of its prompt
    max_new_tokens: int
    score: Callable[[str, dict], float]  # (model's output, record) -> 0 .. 1
    repository: str  # of data, on the hub
    archive: str  # the .zip there that has the file
    fields: dict[str, type]  # what a record must have
    bucket: Callable[[dict], str]  # record -> the column that it counts in
    chat: bool = True  # in the model's chat template; few-shot prompts do better without

    def prompt(self, record: dict) -> str:
        return read_prompt(self.name).format_map(record)


def prompt_ids(task: Task, record: dict, tokenizer: Tokenizer, max_length: int) -> list[int]:
    """Token ids that ask the record's question, in the model's chat template if the task is.

    Of more than `max_length` tokens, the template's not counted, the first and the last half stay:
    at the ends are instructions and question. As in LongBench's own code the halves are decoded and
    joined as text, so tokens at the seam may merge.
    """
    text = task.prompt(record)
    ids = tokenizer.encode(text)
    if len(ids) > max_length:
        half = max_length // 2
        text = tokenizer.decode(ids[:half]) + tokenizer.decode(ids[len(ids) - half :])
    return tokenizer.encode_prompt(text, None if task.chat else False)


def read_records(task: Task, folder: Path | None = None) -> list[dict]:
    """The records of a task, from `folder` or one below it, or else from the hub."""
    name = f"{task.name}.jsonl"
    if folder is None:
        return parse_rows(fetch(task, name), task.fields, name)
    paths = sorted(folder.rglob(name))
    if not paths:
        raise UserError(f"no file {folder / name}; give the folder of the benchmark's .jsonl files")
    return read_rows(paths[0], task.fields)


def fetch(task: Task, name: str) -> bytes:
    """A file of the task's archive, which is downloaded if it is not in the hub's cache."""
    from huggingface_hub import hf_hub_download  # slow to import, and not needed for a folder

    try:
        path = hf_hub_download(task.repository, task.archive, repo_type="dataset")
        with zipfile.ZipFile(path) as archive:
            members = {Path(member).name: member for member in archive.namelist()}
            return archive.read(members[name])
    except Exception as error:  # client and archive raise many kinds, which mean the same here
        missing = f"the hub did not give {task.archive} of {task.repository} ({first_line(error)})"
        raise UserError(f"{missing}; give a folder that has {name}") from None


def read_rows(path: Path, fields: dict[str, type]) -> list[dict]:
    """JSON objects, one a line. Raises `UserError` for one without these fields."""
    return parse_rows(path.read_bytes(), fields, str(path))


def parse_rows(text: bytes, fields: dict[str, type], source: str) -> list[dict]:
    rows = []
    for i, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{source}, line {i}: not JSON ({error}); fetch it again") from None
        for name, kind in fields.items():
            if not isinstance(row, dict) or not isinstance(row.get(name), kind):
                wrong = f"no {name!r} of type {kind.__name__}"
                raise UserError(f"{source}, line {i}: {wrong}; fetch it again")
        rows.append(row)
    if not rows:
        raise UserError(f"{source} has no records; fetch it again")
    return rows
