"""LongBench-E [1]: the five sets of the paper's Table 1, their prompts, and their scores.

Questions about long documents, a summary and a few-shot task, in English. A record is a JSON object
with `input` (the question), `context`, `answers` (any is right) and `length` (in words). The
prompts, in `experiments/prompts/`, are LongBench's word for word. What LV-Eval needs too (a `Task`,
truncation, token F1, the table of means) is here, and `experiments/lveval.py` adds its sets.

Sources:
    [1] Bai et al., "LongBench", 2023; github.com/THUDM/LongBench, pred.py, eval.py, metrics.py
    [2] Rajpurkar et al., "SQuAD", 2016: token F1
    [3] Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, section 3.2: Rouge-L of
        summaries; and the PyPI package rouge 1.0.1, which LongBench scores with
"""

import re
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from experiments.prompts import read_prompt
from support.command import UserError
from support.records import read_records  # noqa: F401 (in its place beside the tasks)
from support.tokenizer import Tokenizer

MAX_LENGTH = 31_500  # tokens of a prompt in [1] for LongChat-32k: its context less 500
BUCKETS = ("0-4k", "4-8k", "8k+")  # of a record's words: the columns of the paper's Table 1
ALL = "all"


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
    chat: bool = True  # in the model's chat template; few-shot prompts do better without, says [1]

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

    As in [1] the halves are decoded and joined as text: the tokens at the seam may merge, and the
    template comes on top of `max_length`. `chat=False` is for a model without a template.
    """
    text = task.prompt(record)
    head, tail = truncate_middle(tokenizer.encode(text), max_length)
    if tail:
        text = tokenizer.decode(head) + tokenizer.decode(tail)
    return tokenizer.encode_prompt(text, chat and task.chat)


def normalize(text: str) -> list[str]:
    """The words that count in [2]: lowercase, without ASCII punctuation, without a, an, the."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(output: str, answer: str) -> float:
    """Token F1 [2]: 2 P R / (P + R) of the words in common, counted as often as both have them.

    With c words in common of n and m, P = c / n and R = c / m make it 2 c / (n + m).
    """
    ours, theirs = normalize(output), normalize(answer)
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def lcs(x: list[str], y: list[str]) -> list[str]:
    """A longest common subsequence of x and y; of several, the one that `rouge` finds."""
    length = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]  # of x[:i] and y[:j]
    for i, a in enumerate(x):
        for j, b in enumerate(y):
            longer = length[i][j] + 1 if a == b else max(length[i][j + 1], length[i + 1][j])
            length[i + 1][j + 1] = longer
    words, i, j = [], len(x), len(y)
    while i and j:
        if x[i - 1] == y[j - 1]:
            i, j = i - 1, j - 1
            words.append(x[i])
        elif length[i - 1][j] > length[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words[::-1]


def rouge_l(output: str, reference: str) -> float:
    """Rouge-L F of a summary, as the package of [3] computes it.

    Sentences end at every "."; words are what stands between spaces, case and commas included.
    Every sentence of the reference is aligned (`lcs`) with every one of the output, and the words
    of all alignments are put together (the union LCS of [3]). Unlike [3], the package counts
    distinct words: with u of them aligned of n and m, P = u / n and R = u / m.
    """
    # A sentence of spaces alone is one empty word: "".split(" ") == [""]. As in the package.
    ours, theirs = (
        [" ".join(part.split()).split(" ") for part in text.split(".") if part]
        for text in (output, reference)
    )
    if not ours or not theirs:
        return 0.0
    aligned = {word for x in theirs for y in ours for word in lcs(x, y)}
    P, R = (len(aligned) / len(set().union(*sentences)) for sentences in (ours, theirs))
    return 2 * P * R / (P + R + 1e-8)


def best_f1(output: str, record: dict) -> float:
    return max(f1(output, answer) for answer in record["answers"])


def first_line_f1(output: str, record: dict) -> float:
    """For few-shot prompts, after whose answer a model goes on with examples of its own."""
    return best_f1(output.lstrip("\n").split("\n")[0], record)


def best_rouge_l(output: str, record: dict) -> float:
    return max(rouge_l(output, answer) for answer in record["answers"])


def length_bucket(record: dict) -> str:
    """LongBench-E's bucket of a record, by its words: under 4000, under 8000, the rest."""
    return BUCKETS[(record["length"] >= 4000) + (record["length"] >= 8000)]


def summarize(rows: list[dict]) -> list[dict]:
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
        for bucket in (*BUCKETS, ALL):
            if values := scores.get((name, bucket)):
                mean = {"set": name, "bucket": bucket, "cases": len(values)}
                means.append({**mean, "score": 100 * fmean(values)})
    for bucket in (*BUCKETS, ALL):
        if column := [mean for mean in means if mean["bucket"] == bucket]:
            mean = {"set": "average", "bucket": bucket, "cases": sum(m["cases"] for m in column)}
            means.append({**mean, "score": fmean(m["score"] for m in column)})
    return means


def make_task(name: str, max_new_tokens: int, score: Callable, chat: bool = True) -> Task:
    fields = {"input": str, "context": str, "answers": list, "length": int}
    place = ("THUDM/LongBench", "data.zip")
    return Task(name, *place, read_prompt(name), max_new_tokens, score, length_bucket, fields, chat)


TASKS = {
    task.name: task
    for task in (
        make_task("hotpotqa_e", 32, best_f1),
        make_task("multifieldqa_en_e", 64, best_f1),
        make_task("gov_report_e", 512, best_rouge_l),
        make_task("triviaqa_e", 32, first_line_f1, chat=False),
        make_task("qasper_e", 128, best_f1),
    )
}

select = partial(choose, tasks=TASKS)
