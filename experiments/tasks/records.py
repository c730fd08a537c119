"""The sets of a benchmark: what a `Task` asks, and its records, from a folder or from the hub."""

import json
import zipfile
import zlib
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


def choose(names: list[str], tasks: dict[str, Task]) -> list[Task]:
    """The tasks of these names. Raises `UserError` for a name that is not in `tasks`."""
    for name in names:
        if name not in tasks:
            raise UserError(f"no set {name!r}; choose from {', '.join(tasks)}")
    return [tasks[name] for name in names]


def prompt_ids(
    task: Task, record: dict, tokenizer: Tokenizer, max_length: int, chat: bool = True
) -> list[int]:
    """Token ids that ask the record's question, in the chat template if `chat` and the task's.

    Of more than `max_length` tokens, the template's not counted, the first and the last half stay:
    at the ends are instructions and question. As in LongBench's own code the halves are decoded and
    joined as text, so tokens at the seam may merge.
    """
    text = task.prompt(record)
    ids = tokenizer.encode(text)
    if len(ids) > max_length:
        half = max_length // 2
        text = tokenizer.decode(ids[:half]) + tokenizer.decode(ids[len(ids) - half :])
    return tokenizer.encode_prompt(text, chat and task.chat)


def read_records(task: Task, folder: Path | None = None) -> list[dict]:
    """The records of a task, from `folder`, or else from the hub. Raises `UserError` if there is no
    such file, or for the first line that is not such a record."""
    place = folder if folder is not None else fetch(task)
    try:
        return read_rows(find_file(place, f"{task.name}.jsonl"), task.fields)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{place} cannot be read ({error}); fetch it again") from None


def fetch(task: Task) -> Path:
    """The task's archive from the hub's cache, downloaded if it is not there."""
    from huggingface_hub import hf_hub_download  # slow to import, and not needed for a folder

    try:
        return Path(hf_hub_download(task.repository, task.archive, repo_type="dataset"))
    except Exception as error:  # the hub client raises many kinds, all of which mean the same here
        missing = f"the hub did not give {task.archive} of {task.repository} ({first_line(error)})"
        raise UserError(f"{missing}; give a folder that has {task.name}.jsonl") from None


def find_file(place: Path, file: str) -> Path | zipfile.Path:
    """A file of this name in a folder, or one folder below; or anywhere in an archive."""
    if place.suffix == ".zip":
        members = zipfile.ZipFile(place).namelist()
        paths = [zipfile.Path(place, name) for name in members if name.split("/")[-1] == file]
    else:
        paths = [*place.glob(file), *sorted(place.glob(f"*/{file}"))]
    if not paths:
        raise UserError(f"no file {place / file}; give the folder of the benchmark's .jsonl files")
    return paths[0]


def read_rows(source: Path | zipfile.Path, fields: dict[str, type]) -> list[dict]:
    """JSON objects, one a line. Raises `UserError` for one without these fields, lists of texts."""
    rows = []
    for i, line in enumerate(source.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{source}, line {i}: not JSON ({error}); fetch it again") from None
        for field, kind in fields.items():
            value = row.get(field) if isinstance(row, dict) else None
            texts = value if isinstance(value, list) else [""]
            if not isinstance(value, kind) or {type(text) for text in texts} != {str}:
                wanted = "list of texts" if kind is list else kind.__name__
                wrong = f"no {field!r} of type {wanted}"
                raise UserError(f"{source}, line {i}: {wrong}; fetch it again")
        rows.append(row)
    if not rows:
        raise UserError(f"{source} has no records; fetch it again")
    return rows
