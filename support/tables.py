"""Tables as Markdown and as JSON."""

import json
from collections.abc import Callable
from pathlib import Path

from support.command import replacing


def table(rows: list[dict], columns: dict[str, Callable]) -> str:
    """Rows as a Markdown table; `columns` maps a row's key to what writes its value."""
    columns = {key: write for key, write in columns.items() if key in rows[0]}
    lines = ["| " + " | ".join(columns).replace("_", " ") + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(write(row[key]) for key, write in columns.items()) + " |")
    return "\n".join(lines)


def write_json(path: Path | None, rows: list[dict]) -> None:
    if path is not None:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(rows, indent=1) + "\n")
