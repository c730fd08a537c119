"""LongBench-E [1]: the five sets of the paper's Table 1 and their scores.

A record has `input` (the question), `context`, `answers` (any is right) and `length` (in words).
The prompts, in `prompts/`, are LongBench's word for word.

Source:
    [1] Bai et al., "LongBench", 2023; github.com/THUDM/LongBench, pred.py, eval.py, metrics.py
"""

from bisect import bisect
from functools import partial

from experiments.tasks.records import Task
from experiments.tasks.scores import f1, rouge_l

MAX_LENGTH = 31_500  # tokens of a prompt in [1] for LongChat-32k: its context less 500
BUCKETS = ("0-4k", "4-8k", "8k+")  # of a record's words: the columns of the paper's Table 1


def best_f1(output: str, record: dict) -> float:
    return max([f1(output, answer) for answer in record["answers"]])


def first_line_f1(output: str, record: dict) -> float:
    """For few-shot prompts, after whose answer a model goes on with examples of its own."""
    return best_f1(output.lstrip("\n").split("\n")[0], record)


def best_rouge_l(output: str, record: dict) -> float:
    return max([rouge_l(output, answer) for answer in record["answers"]])


def length_bucket(record: dict) -> str:
    return BUCKETS[bisect((4000, 8000), record["length"])]


make_task = partial(
    Task,
    repository="THUDM/LongBench",
    archive="data.zip",
    fields={"input": str, "context": str, "answers": list, "length": int},
    bucket=length_bucket,
)
SETS = (
    make_task("hotpotqa_e", 32, best_f1),
    make_task("multifieldqa_en_e", 64, best_f1),
    make_task("gov_report_e", 512, best_rouge_l),
    make_task("triviaqa_e", 32, first_line_f1, chat=False),
    make_task("qasper_e", 128, best_f1),
)
TASKS = {task.name: task for task in SETS}
