"""The loop that runs every case on every cache, what it keeps of a run, and the tables it fills.

A case is a text to prefill and what comes after it. Since prefill is exact in nearly every cache,
the model reads the text once for all of these; then each cache goes on alone. Memory holds all
caches of one case at a time: if that is too much, run fewer of them at once.

Under torchrun each process has a copy of the model and takes every n-th case. With notes, every
finished case is kept in a file, and the same command goes on where it stopped, with as many
processes as one likes.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from experiments import longbench
from experiments.caches import Choice
from infer import full_bytes, held_bytes
from model import LayerCache, Rope, Transformer
from support.command import UserError, replacing
from support.processes import place, say


@dataclass(frozen=True)
class Text:
    """What a case reads. `score` gets the logits [B, 1, vocab] of the prompt's last token and the
    cache that holds the prompt, goes on as it likes, and returns a score for each sequence."""

    prompt: Tensor  # [B, T], prefilled
    length: int  # tokens in the end, as far as is known: what caches take memory for
    score: Callable[[Tensor, list[LayerCache]], list[float]]


# The columns of the rows that a case counts in, and a function that gives its text.
Case = tuple[dict, Callable[[], Text]]

# ---------------------------------------------------------------------------------- measuring


class Together(LayerCache):
    """Several caches with an exact prefill, reading one prompt: their output is the same."""

    def __init__(self, caches: tuple[LayerCache, ...]):
        self.caches = caches

    def prefill(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        outs = [cache.prefill(x, q, k, v, rope) for cache in self.caches]
        return outs[0]


def measure(
    model: Transformer,
    rows: list[Choice],
    cases: list[Case],
    notes: Path | None = None,
    arguments: dict | None = None,
) -> list[dict]:
    """Runs every case on every cache: a row {columns, "scores", "cases", "measured_ratio", ...} for
    each cache and each group of cases with the same columns.

    Processes share the cases out, and all return all rows. With `notes`, what is finished is kept
    in files of that name until `forget` removes them, and is not run again. Raises `UserError` if
    the notes are those of other `arguments`, and what a cache or a case raises.
    """
    for row in rows:
        row.make(0)  # a cache that refuses this model does so now, not after hours
    rank, count = place()
    done = read_notes(notes, arguments) if notes else {}
    if count > 1:
        # On the CPU, and patient: one process may have finished hours before another.
        group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        dist.barrier(group)  # before anyone writes notes, all have read the same
    file = start_notes(notes, rank, arguments) if notes else None

    left = {c: [r for r in range(len(rows)) if (r, c) not in done] for c in range(len(cases))}
    todo = [c for c in left if left[c]]
    failure = None
    try:
        for c in tqdm(todo[rank::count], unit="case", leave=False, disable=rank > 0):
            results = run_case(model, [rows[r] for r in left[c]], cases[c][1]())
            for r, result in zip(left[c], results, strict=True):
                done[r, c] = result
                if file:
                    write_note(file, {"row": r, "case": c, **result})
    except UserError as error:
        failure = error
    if count > 1:
        parts = [None] * count
        dist.all_gather_object(parts, (done, failure), group)
        done = {key: result for part, _ in parts for key, result in part.items()}
        failure = next((error for _, error in parts if error), None)
    if failure:
        raise failure

    groups: dict[tuple, list[int]] = {}
    for c, (columns, _) in enumerate(cases):
        groups.setdefault(tuple(columns.items()), []).append(c)
    return [
        {**row.columns, **dict(columns), **summary(model, [done[r, c] for c in members])}
        for columns, members in groups.items()
        for r, row in enumerate(rows)
    ]


@torch.no_grad()
def run_case(model: Transformer, rows: list[Choice], text: Text) -> Iterator[dict]:
    """Yields for each row, in order, what notes keep of the case."""
    caches = [row.make(text.length) for row in rows]
    exact = [cache for cache in caches if cache[0].exact_prefill]
    device = text.prompt.device
    start = clock(device)
    if exact:
        together = [Together(layer) for layer in zip(*exact, strict=True)]
        shared = model(text.prompt, together, logits_to_keep=1)  # [B, 1, vocab]
        share = (clock(device) - start) / len(exact)
    for row, cache in zip(rows, caches, strict=True):
        start = clock(device)
        if cache[0].exact_prefill:
            logits, start = shared, start - share
        else:
            logits = model(text.prompt, cache, logits_to_keep=1)
        result = run_cache(row, cache, logits, text)
        yield {**result, "seconds": clock(device) - start}


def run_cache(row: Choice, cache: list[LayerCache], logits: Tensor, text: Text) -> dict:
    """What becomes of one cache, which has read the prompt. `tokens` are those of all sequences of
    the batch, as `bytes` are."""
    scores = text.score(logits, cache)
    return {
        "scores": scores,
        "tokens": len(scores) * cache[0].length,
        "bytes": held_bytes(cache),
    }


def clock(device: str | torch.device) -> float:
    """Seconds, once all that the device was given to do is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def summary(model: Transformer, results: list[dict]) -> dict:
    """Finished cases together: `tokens` is the mean length, `seconds` the sum."""
    scores = [score for result in results for score in result["scores"]]
    tokens, held, seconds = (
        sum(r[name] for r in results) for name in ("tokens", "bytes", "seconds")
    )
    return {
        "cases": len(scores),
        "tokens": tokens / len(scores),
        "measured_ratio": 1 - held / full_bytes(model, tokens),
        "seconds": seconds,
        "scores": scores,
    }


# -------------------------------------------------------------------------------------- notes
# A file for each process, JSON lines: the arguments, then a line for each finished case. A run that
# is killed leaves half a line at the most: that case does not count as finished.


def note_files(notes: Path) -> list[Path]:
    return sorted(f for f in notes.parent.iterdir() if f.name.startswith(f"{notes.name}.cases-"))


def read_notes(notes: Path, arguments: dict | None) -> dict[tuple[int, int], dict]:
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
        write_note(file, arguments or {})
    return file


def write_note(file: Path, note: dict) -> None:
    try:
        with file.open("a") as lines:
            lines.write(json.dumps(note) + "\n")
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error}); choose another place") from None


def forget(notes: Path) -> None:
    for file in note_files(notes):
        file.unlink()


# -------------------------------------------------------------------------------------- tables


def wilson(right: float, cases: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share, by Wilson (1927): right near 0 and 1, where it matters here."""
    p, n = right / cases, cases
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def with_score(what: str, rows: list[dict]) -> list[dict]:
    """The rows of `measure` with, for their `scores`, what the benchmark `what` shows of them."""
    if "set" in rows[0]:
        return benchmark_rows(rows)
    shown = []
    for row in rows:
        scores = row["scores"]
        if what == "perplexity":
            score = {"perplexity": math.exp(fmean(scores))}
        else:
            score = {"accuracy": fmean(scores), "interval": wilson(sum(scores), len(scores))}
        shown.append({**{name: row[name] for name in row if name != "scores"}, **score})
    return shown


def benchmark_rows(rows: list[dict]) -> list[dict]:
    """For each cache the means that `longbench.summarize` makes, in percent: a row for each set and
    bucket, for each set, and over the sets."""
    caches: dict[tuple, list[dict]] = {}
    for row in rows:
        caches.setdefault(tuple((name, row[name]) for name in Choice.COLUMNS), []).append(row)
    shown = []
    for columns, own in caches.items():
        scores = [
            {"set": row["set"], "bucket": row["bucket"], "score": score}
            for row in own
            for score in row["scores"]
        ]
        for mean in longbench.summarize(scores):
            counted = [
                row
                for row in own
                if mean["set"] in (row["set"], "average")
                and mean["bucket"] in (row["bucket"], longbench.ALL)
            ]
            tokens = [row["tokens"] * row["cases"] for row in counted]
            removed = [row["measured_ratio"] * t for row, t in zip(counted, tokens, strict=True)]
            total = {
                "tokens": sum(tokens) / mean["cases"],
                "measured_ratio": sum(removed) / sum(tokens),
                "seconds": sum(row["seconds"] for row in counted),
            }
            shown.append({**dict(columns), **mean, **total})
    return shown


COLUMNS = {
    "question": str,
    "cache": str,
    "factors": str,
    "bits": str,
    "ratio": "{:.0%}".format,
    "set": str,
    "bucket": str,
    "lines": str,
    "cases": str,
    "tokens": "{:.0f}".format,
    "accuracy": "{:.3f}".format,
    "interval": lambda pair: "[{:.2f}, {:.2f}]".format(*pair),
    "score": "{:.2f}".format,
    "perplexity": "{:.2f}".format,
    "nominal_ratio": "{:.1%}".format,
    "measured_ratio": "{:.1%}".format,
    "seconds": "{:.0f}".format,
}


def table(rows: list[dict], columns: dict[str, Callable] = COLUMNS) -> str:
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
