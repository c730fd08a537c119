"""Tables as Markdown and as JSON, and how the value of each column is written."""

import json
import time
from pathlib import Path
from statistics import fmean

import torch

from support.command import replacing


def four_digits(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def interval(pair: tuple[float, float]) -> str:
    return "[{:.2f}, {:.2f}]".format(*pair)


FORMATS = {
    **dict.fromkeys(("question", "layer", "of", "cache"), str),
    **dict.fromkeys(("factors", "init", "window", "bits", "sinks", "mode"), str),
    "ratio": "{:.0%}".format,
    **dict.fromkeys(("kept_k", "kept_v"), "{:.1%}".format),
    "lr": "{:g}".format,
    **dict.fromkeys(("initial", "final", "loss", "floor"), four_digits),
    **dict.fromkeys(("text", "context", "set", "bucket", "lines", "cases"), str),
    "tokens": "{:.0f}".format,
    **dict.fromkeys(("prefill_s", "prefill_ratio"), "{:.2f}".format),
    "decode_ms": "{:.1f}".format,
    "decode_ratio": "{:.2f}".format,
    **dict.fromkeys(("cache_mb", "mflop", "read_mb"), four_digits),
    "accuracy": "{:.2f}".format,
    "interval": interval,
    "score": "{:.2f}".format,
    "perplexity": lambda value: f"{value:.2f}" if value < 1e6 else f"{value:.3g}",
    "of_full": "{:.3f}".format,  # times the full cache's
    **dict.fromkeys(("nominal_ratio", "measured_ratio"), "{:.1%}".format),
    **dict.fromkeys(("left_out_50%", "left_out_80%"), "{:.2%}".format),
    "seconds": "{:.0f}".format,
    **dict.fromkeys(("trained_together", "paper"), str),
}


SCORES = ["accuracy", "interval", "perplexity", "nominal_ratio", "measured_ratio"]


def table(rows: list[dict], columns: list[str] | None = None) -> str:
    """Rows as a Markdown table; of `columns`, or of all in FORMATS, those that the rows have."""
    columns = [name for name in columns or FORMATS if name in rows[0]]
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


def beside(accuracies: list[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in accuracies)


def side_by_side(rows: list[dict], columns: list[str]) -> tuple[list[dict], list[str]]:
    """Rows and columns with a column of accuracies for each protocol, those of all lengths in one
    cell; measured ratios are means over the lengths."""
    questions = list(dict.fromkeys(row["question"] for row in rows if "question" in row))
    if not questions:
        return rows, columns
    lengths = list(dict.fromkeys(row["lines"] for row in rows if "lines" in row))
    of = f", {' / '.join(map(str, lengths))} lines" if lengths else ""
    keys = [name for name in columns if name not in ("question", "lines", *SCORES)]
    merged = []
    for group in grouped(rows, *keys, "nominal_ratio").values():
        measured = fmean(row["measured_ratio"] for row in group)
        merged.append({**group[0], "measured_ratio": measured})
        for q in questions:
            merged[-1][q + of] = beside([r["accuracy"] for r in group if r["question"] == q])
    shown = [name for name in keys if name != "paper"]
    shown += ["nominal_ratio", "measured_ratio", *(q + of for q in questions)]
    return merged, shown + ["paper"] * ("paper" in columns)


def write_markdown(path: Path, command: str, tables: list[str], began: float) -> None:
    """Tables in a file: the command that made them above the first, when and on what below it.
    `began` is when the command was started last, as `time.monotonic` has it."""
    made = f"{time.strftime('%Y-%m-%d')}, PyTorch {torch.__version__}, "
    made += f"{torch.get_num_threads()} threads, {(time.monotonic() - began) / 60:.1f} "
    made += "minutes since it was started last"
    with replacing(path) as temporary:
        temporary.write_text("\n\n".join([f"`{command}`", tables[0], made, *tables[1:]]) + "\n")


ALL = "all"  # the bucket of a benchmark that has every case


def summarize(rows: list[dict], buckets: tuple[str, ...] = ()) -> list[dict]:
    """Means of rows {"set", "bucket", "score" 0 .. 1}, in percent, as {"set", "bucket", "cases",
    "score"}.

    For each set, in the rows' order, each bucket that it has and "all" its cases; last, as the set
    "average", each bucket's mean over the sets, whatever their sizes: a column of Table 1.
    """
    scores: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        for bucket in {row["bucket"], ALL}:
            scores.setdefault((row["set"], bucket), []).append(row["score"])
    means = []
    for name in dict.fromkeys(row["set"] for row in rows):
        for bucket in (*buckets, ALL):
            if values := scores.get((name, bucket)):
                mean = {"set": name, "bucket": bucket, "cases": len(values)}
                means.append({**mean, "score": 100 * fmean(values)})
    for bucket in (*buckets, ALL):
        if column := [mean for mean in means if mean["bucket"] == bucket]:
            mean = {"set": "average", "bucket": bucket, "cases": sum(m["cases"] for m in column)}
            means.append({**mean, "score": fmean(m["score"] for m in column)})
    return means
