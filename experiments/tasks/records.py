"""The sets of a benchmark: what a `Task` asks, and its records, JSON lines from a folder or from an
archive of the hub.
"""

import json
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from support.command import UserError, first_line
from support.huggingface.tokenizer import Tokenizer


@dataclass(frozen=True)
class Task:
    """One set of a benchmark: where its records are, how it asks and how it scores."""

    name: str  # of the set, and of its file, `name`.jsonl
    repository: str  # of data, on the hub
    archive: str  # the .zip there that has the file
    template: str  # with the fields {context} and {input}
    max_new_tokens: int
    score: Callable[[str, dict], float]  # (model's output, record) -> 0 .. 1
    bucket: Callable[[dict], str]  # record -> the column that it counts in
    fields: dict[str, type]  # what a record must have
    chat: bool = True  # in the model's chat template; few-shot prompts do better without

    def prompt(self, record: dict) -> str:
        return self.template.format(context=record["context"], input=record["input"])


def choose(names: list[str], tasks: dict[str, Task]) -> list[Task]:
    """The tasks of these names. Raises `UserError` for a name that is not in `tasks`."""
    for name in names:
        if name not in tasks:
            raise UserError(f"no set {name!r}; choose from {', '.join(tasks)}")
    return [tasks[name] for name in names]


def truncate_middle(ids: list[int], max_length: int) -> tuple[list[int], list[int]]:
    """Up to `max_length` tokens as (all, none); of more, the first half and the last half of
    `max_length`: instructions and question stand at the ends. [0 .. 9] and 5 give [0, 1], [8, 9].
    """
    if len(ids) <= max_length:
        return ids, []
    half = max_length // 2
    return ids[:half], ids[len(ids) - half :]


def prompt_ids(
    task: Task, record: dict, tokenizer: Tokenizer, max_length: int, chat: bool = True
) -> list[int]:
    """Token ids that ask the record's question: truncated first, then put into the chat template.

    As in LongBench's own code the halves are decoded and joined as text: the tokens at the seam may
    merge, and the template comes on top of `max_length`. `chat=False` is for a model without one.
    """
    text = task.prompt(record)
    head, tail = truncate_middle(tokenizer.encode(text), max_length)
    if tail:
        text = tokenizer.decode(head) + tokenizer.decode(tail)
    return tokenizer.encode_prompt(text, chat and task.chat)


def read_records(task: Task, folder: Path | None = None) -> list[dict]:
    """The records of a task, from its file in `folder` or one folder below, or from the hub.

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


def fetch(task: Task) -> Path:
    """The task's archive from the hub's cache, downloaded if it is not there."""
    from huggingface_hub import hf_hub_download  # slow to import, and not needed for a folder

    try:
        return Path(hf_hub_download(task.repository, task.archive, repo_type="dataset"))
    except Exception as error:  # the hub client raises many kinds, all of which mean the same here
        what = f"the hub did not give {task.archive} of {task.repository} ({first_line(error)})"
        raise UserError(f"{what}; give a folder that has {task.name}.jsonl") from None


def parse_records(task: Task, source: Path | str, lines: IO[bytes]) -> list[dict]:
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
