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
    plan: dict | None = None,
) -> list[dict]:
    """Runs every case on every cache. Returns the rows of a table, for each group of cases one for
    each cache, in all processes. `notes` and `plan`, and what is raised: see `run_all`."""
    for row in rows:
        make_cache(model, row, 0)  # one that refuses this model does so now, not after hours

    def run(c: int) -> list[dict]:
        return run_case(model, rows, cases[c])

    done = run_all(range(len(cases)), run, notes, plan)
    result = []
    for columns, members in groups_of(cases):
        for r, row in enumerate(rows):
            results = [{**cases[c].columns, **done[c][r]} for c in members]
            result.append({**columns, **row.columns, **summary(model, results)})
    return result


def groups_of(cases: list[Case]) -> Iterator[tuple[dict, list[int]]]:
    """The columns of each row of a table, and the numbers of the cases that count in it: those with
    these columns. A benchmark has rows also for "all" buckets, and for the "average" over sets."""
    numbered = [{"number": c, **case.columns} for c, case in enumerate(cases)]
    if "set" in numbered[0]:
        for name, of_set in [*grouped(numbered, "set").items(), ("average", numbered)]:
            for bucket in (*longbench.BUCKETS, ALL):
                members = [row["number"] for row in of_set if bucket in (row["bucket"], ALL)]
                if members:
                    yield {"set": name, "bucket": bucket}, members
    else:
        for group in grouped(numbered, *cases[0].columns).values():
            members = [row["number"] for row in group]
            yield cases[members[0]].columns, members


@torch.no_grad()
def run_case(model: Transformer, rows: list[Row], case: Case) -> list[dict]:
    """What notes keep of the case, for each row; `tokens` are those of all the batch."""
    caches = [make_cache(model, row, case.length) for row in rows]
    exact = [cache for cache in caches if reads_exactly(cache[0])]
    prompt = case.prompt.to(model.lm_head.weight.device)
    shared = None
    if exact:
        together = [SharedPrefill(layer) for layer in zip(*exact, strict=True)]
        shared = model(prompt, together, logits_to_keep=1)  # [B, 1, vocab]
    results = []
    for cache in caches:
        logits = shared
        if not reads_exactly(cache[0]):
            logits = model(prompt, cache, logits_to_keep=1)
        scores = case.score(model, logits, cache)
        tokens = len(scores) * cache[0].length
        results.append({"scores": scores, "tokens": tokens, "bytes": held_bytes(cache)})
    return results


def clock(device: str | torch.device) -> float:
    """Seconds, once all that the device was given to do is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def summary(model: Transformer, results: list[dict]) -> dict:
    """Finished cases together: `tokens` is the mean length."""
    scores = list(chain.from_iterable([result["scores"] for result in results]))
    tokens = sum([result["tokens"] for result in results])
    held = sum([result["bytes"] for result in results])
    row = {"cases": len(scores), "tokens": tokens / len(scores)}
    if "set" in results[0]:
        # In percent, and every set counts the same, whatever its size: the paper's Table 1.
        sets = grouped(results, "set").values()
        row["score"] = 100 * fmean([fmean([one["scores"][0] for one in own]) for own in sets])
    elif "question" in results[0]:
        row["accuracy"] = fmean(scores)
        row["interval"] = wilson(sum(scores), len(scores))
    else:
        row["perplexity"] = math.exp(min(fmean(scores), 700))  # 1e304 for what is even more
    row["measured_ratio"] = 1 - held / full_bytes(model, tokens)
    return row
