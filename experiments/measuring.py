"""The loop that runs every case on every cache, and the rows of a table that it fills.

Since prefill is exact in nearly every cache, the model reads the text of a case once for all of
these; then each cache goes on alone. Memory holds all caches of one case at a time: if that is too
much, run fewer of them at once. Under torchrun each process takes every n-th case.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from cskv import BiBranchCache
from experiments.caches import Rounded, Row, make_cache
from experiments.notes import run_all
from experiments.tables import ALL, grouped
from experiments.tasks import longbench
from experiments.tasks.scores import wilson
from infer import full_bytes, held_bytes
from model import LayerCache, Rope, Transformer


@dataclass(frozen=True)
class Case:
    """A text to prefill, and what is asked of a cache that has read it (in subclasses)."""

    columns: dict  # of the table's rows that the case counts in
    prompt: Tensor  # [B, T], prefilled
    length: int  # tokens in the end, as far as is known: what caches take memory for

    def score(self, model: Transformer, logits: Tensor, cache: list[LayerCache]) -> list[float]:
        """A score for each sequence. `logits` [B, 1, vocab] are those of the prompt's last token;
        the cache holds the prompt, and the case goes on with it as it likes."""
        raise NotImplementedError


class SharedPrefill(LayerCache):
    """Several caches with an exact prefill, reading one prompt: its attention is computed once."""

    def __init__(self, caches: tuple[LayerCache, ...]):
        self.caches = caches

    def prefill(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        first, *others = self.caches
        for cache in others:
            cache.remember(x, q, k, v, rope)
        return first.prefill(x, q, k, v, rope)


def reads_exactly(cache: LayerCache) -> bool:
    """Whether its prefill attends with all exact keys and values."""
    inner = cache.cache if isinstance(cache, Rounded) else cache
    return type(inner).prefill in (LayerCache.prefill, BiBranchCache.prefill)


def measure(
    model: Transformer,
    rows: list[Row],
    cases: list[Case],
    notes: Path | None = None,
    arguments: dict | None = None,
) -> list[dict]:
    """Runs every case on every cache: a row {columns, "scores", "cases", "measured_ratio", ...} for
    each cache and each group of cases with the same columns, in all processes.

    `notes` and `arguments`, and what is raised: see `run_all`.
    """
    for row in rows:
        make_cache(model, row, 0)  # one that refuses this model does so now, not after hours

    def run(keys: list[tuple[int, int]]) -> Iterator[dict]:
        return run_case(model, rows, cases[keys[0][1]])

    keys = [[(r, c) for r in range(len(rows))] for c in range(len(cases))]
    done = run_all(keys, run, notes, arguments)
    groups: dict[tuple, list[int]] = {}
    for c, case in enumerate(cases):
        groups.setdefault(tuple(case.columns.items()), []).append(c)
    result = []
    for columns, members in groups.items():
        for r, row in enumerate(rows):
            finished = [done[r, c] for c in members]
            result.append({**row.columns, **dict(columns), **summary(model, finished)})
    return result


@torch.no_grad()
def run_case(model: Transformer, rows: list[Row], case: Case) -> Iterator[dict]:
    """Yields for each row, in order, what notes keep of the case."""
    caches = [make_cache(model, row, case.length) for row in rows]
    exact = [cache for cache in caches if reads_exactly(cache[0])]
    device = model.lm_head.weight.device
    prompt = case.prompt.to(device)
    start = clock(device)
    if exact:
        together = [SharedPrefill(layer) for layer in zip(*exact, strict=True)]
        shared = model(prompt, together, logits_to_keep=1)  # [B, 1, vocab]
        share = (clock(device) - start) / len(exact)
    for row, cache in zip(rows, caches, strict=True):
        start = clock(device)
        if reads_exactly(cache[0]):
            logits = shared
            start -= share
        else:
            logits = model(prompt, cache, logits_to_keep=1)
        result = run_cache(model, row, cache, logits, case)
        yield {**result, "seconds": clock(device) - start}


def run_cache(
    model: Transformer, row: Row, cache: list[LayerCache], logits: Tensor, case: Case
) -> dict:
    """What becomes of one cache, which has read the prompt; `tokens` are those of all the batch."""
    scores = case.score(model, logits, cache)
    tokens = len(scores) * cache[0].length
    return {"scores": scores, "tokens": tokens, "bytes": held_bytes(cache)}


def clock(device: str | torch.device) -> float:
    """Seconds, once all that the device was given to do is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def summary(model: Transformer, results: list[dict]) -> dict:
    """Finished cases together: `tokens` is the mean length, `seconds` the sum."""
    scores = list(chain.from_iterable([result["scores"] for result in results]))
    tokens = sum(result["tokens"] for result in results)
    held = sum(result["bytes"] for result in results)
    return {
        "cases": len(scores),
        "tokens": tokens / len(scores),
        "measured_ratio": 1 - held / full_bytes(model, tokens),
        "seconds": sum(result["seconds"] for result in results),
        "scores": scores,
    }


def with_score(rows: list[dict]) -> list[dict]:
    """The rows of `measure` with, for their `scores`, what the benchmark shows of them."""
    if "set" in rows[0]:
        return benchmark_rows(rows)
    for row in rows:
        scores = row.pop("scores")
        if "question" in row:
            row |= {"accuracy": fmean(scores), "interval": wilson(sum(scores), len(scores))}
        else:
            row["perplexity"] = math.exp(min(fmean(scores), 700))  # 1e304 for what is even more
    return rows


def benchmark_rows(rows: list[dict]) -> list[dict]:
    """For each cache a row for each set and bucket that has cases, and for "all" of the set; last,
    as the set "average", the same over the sets."""
    shown = []
    for own in grouped(rows, *Row.COLUMNS).values():
        columns = {name: own[0][name] for name in Row.COLUMNS}
        for name, of_set in [*grouped(own, "set").items(), ("average", own)]:
            for bucket in (*longbench.BUCKETS, ALL):
                some = [row for row in of_set if bucket in (row["bucket"], ALL)]
                if some:
                    shown.append({**columns, "set": name, "bucket": bucket, **mean_row(some)})
    return shown


def mean_row(rows: list[dict]) -> dict:
    """Several rows as one. Every set counts the same in the score, whatever its size: a column of
    the paper's Table 1, in percent. Every token counts the same in lengths and bytes."""
    means = []
    for own in grouped(rows, "set").values():
        means.append(fmean(chain.from_iterable([row["scores"] for row in own])))
    cases = sum(row["cases"] for row in rows)
    tokens = sum(row["tokens"] * row["cases"] for row in rows)
    removed = sum(row["measured_ratio"] * row["tokens"] * row["cases"] for row in rows)
    return {
        "cases": cases,
        "score": 100 * fmean(means),
        "tokens": tokens / cases,
        "measured_ratio": removed / tokens,
        "seconds": sum(row["seconds"] for row in rows),
    }
