"""LV-Eval [1] at its shortest level, 16k words: the six English sets and their scores.

A record is one of `longbench.py`, and of most sets has also `answer_keywords`, the words without
which an answer is wrong. The prompts, in `prompts/`, are LV-Eval's, word for word. The five Chinese
sets are left out: to count the words of a Chinese sentence takes a segmenter. So our average is
over six sets, the paper's over eleven.

Source:
    [1] Yuan et al., "LV-Eval", 2024; github.com/infinigence/LVEval, config.py, metrics.py
"""

from collections import Counter
from functools import partial

from experiments.tables import ALL
from experiments.tasks.records import Task
from experiments.tasks.scores import f1, normalize

MAX_LENGTH = 15_500  # tokens of a prompt in [1] by default
GATE = 0.2  # recall of the keywords under which an answer counts nothing
BLACKLIST = """
    about and are as at be because being but by does for from had has have he her his in is it of on
    or she that their they this to was were what when which who with
""".split()  # noqa: SIM905 (else a line for each word)


def keyword_recall(output: str, keywords: str) -> float:
    """Share of the keywords' words that the output has; 1 if there are none to have.

    A blacklisted word never counts as had, though still as wanted: code of [1] and ours.
    """
    wanted = normalize(keywords)
    if not wanted:
        return 1.0
    had = Counter(normalize(output)) & Counter(wanted)
    for word in BLACKLIST:
        del had[word]
    return had.total() / len(wanted)


def first_f1(output: str, record: dict) -> float:
    return f1(output, record["answers"][0])


def gated_f1(output: str, record: dict) -> float:
    """F1 with the first answer, or 0 where the output lacks the keywords.

    The text of [1] also takes the blacklisted words out before F1. Its code does not, nor do we.
    """
    if keyword_recall(output, record["answer_keywords"]) < GATE:
        return 0.0
    return first_f1(output, record)


FIELDS = {"input": str, "context": str, "answers": list}
make_task = partial(Task, repository="Infinigence/LVEval", bucket=lambda record: ALL)  # one column
gated_task = partial(
    make_task, max_new_tokens=64, score=gated_f1, fields={**FIELDS, "answer_keywords": str}
)
SETS = (
    gated_task("hotpotwikiqa_mixup_16k", archive="hotpotwikiqa_mixup.zip"),
    gated_task("loogle_SD_mixup_16k", archive="loogle_SD_mixup.zip"),
    gated_task("loogle_CR_mixup_16k", archive="loogle_CR_mixup.zip"),
    gated_task("loogle_MIR_mixup_16k", archive="loogle_MIR_mixup.zip"),
    gated_task("multifieldqa_en_mixup_16k", archive="multifieldqa_en_mixup.zip"),
    make_task("factrecall_en_16k", 16, first_f1, archive="factrecall_en.zip", fields=FIELDS),
)
TASKS = {task.name: task for task in SETS}
