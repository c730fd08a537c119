"""Tables as Markdown and as JSON, and how the value of each column is written."""

import json
from pathlib import Path
from statistics import fmean

from support.command import replacing


def four_digits(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1e6 else f"{value:.3g}"


FORMATS = {  # of the columns that are not written as they are
    "ratio": "{:.0%}".format,
    **dict.fromkeys(("kept_k", "kept_v"), "{:.1%}".format),
    "lr": "{:g}".format,
    **dict.fromkeys(("initial", "final", "loss", "floor", "cache_mb"), four_digits),
    **dict.fromkeys(("tokens", "seconds"), "{:.0f}".format),
    "decode_ms": "{:.1f}".format,
    **dict.fromkeys(("decode_ratio", "accuracy", "score"), "{:.2f}".format),
    "interval": "[{0[0]:.2f}, {0[1]:.2f}]".format,
    "perplexity": perplexity,
    "of_full": "{:.3f}".format,  # times the full cache's
    **dict.fromkeys(("nominal_ratio", "measured_ratio"), "{:.1%}".format),
    **dict.fromkeys(("left_out_50%", "left_out_80%"), "{:.2%}".format),
}
ALL = "all"  # the bucket of a benchmark that has every case
SCORES = ["accuracy", "interval", "perplexity", "nominal_ratio", "measured_ratio"]


def table(rows: list[dict], columns: list[str] | None = None) -> str:
    """Rows as a Markdown table; of all columns, or of `columns` those that the rows have."""
    columns = [name for name in columns or rows[0] if name in rows[0]]
    lines = ["| " + " | ".join(columns).replace("_", " ") + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [FORMATS.get(name, str)(row[name]) for name in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_json(path: Path | None, rows: list[dict]) -> None:
    if path is not None:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(rows, indent=1) + "\n")


def grouped(rows: list[dict], *keys: str) -> dict:
    """Rows by the value of a key, or the values of several, in the order of first appearance."""
    result: dict = {}
    for row in rows:
        values = tuple(row.get(key, "") for key in keys)
        result.setdefault(values if len(keys) > 1 else values[0], []).append(row)
    return result


def compare_with_full(rows: list[dict]) -> None:
    """Adds `of_full`: perplexity over the full cache's, the first row of each text and context."""
    for group in grouped(rows, "text", "context").values():
        for row in group:
            row["of_full"] = row["perplexity"] / group[0]["perplexity"]


def beside(accuracies: list[float]) -> str:
    return " / ".join([f"{value:.2f}" for value in accuracies])


def side_by_side(rows: list[dict], columns: list[str]) -> tuple[list[dict], list[str]]:
    """Rows and columns with a column of accuracies for each protocol, those of all lengths in one
    cell; measured ratios are means over the lengths."""
    lengths = ""
    if "lines" in rows[0]:
        lengths = f", {' / '.join(map(str, grouped(rows, 'lines')))} lines"
    keys = [name for name in columns if name not in ("question", "lines", "paper", *SCORES)]
    merged = []
    for group in grouped(rows, *keys, "nominal_ratio").values():
        row = {**group[0], "measured_ratio": fmean(row["measured_ratio"] for row in group)}
        for question, own in grouped(group, "question").items():
            row[question + lengths] = beside([one["accuracy"] for one in own])
        merged.append(row)
    protocols = [question + lengths for question in grouped(rows, "question")]
    return merged, [*keys, "nominal_ratio", "measured_ratio", *protocols, "paper"]
