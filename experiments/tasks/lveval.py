"""LV-Eval [1] at its shortest level, 16k words: the six English sets, their prompts and scores.

Questions whose evidence lies among distracting documents and confusing facts. A record is one of
`longbench.py`, and of most sets has also `answer_keywords`, the words without which an
answer is wrong. The prompts are LV-Eval's, word for word.

The five Chinese sets are left out: their scores are counts of words, and to find the words of a
Chinese sentence takes a segmenter. So our average is over six sets, the paper's over eleven.

Sources:
    [1] Yuan et al., "LV-Eval", 2024; github.com/infinigence/LVEval, config.py, metrics.py
"""

from collections import Counter

from experiments.tables import ALL
from experiments.tasks.prompts import read_prompt
from experiments.tasks.records import Task, choose
from experiments.tasks.scores import f1, normalize
from support.command import UserError

MAX_LENGTH = 15_500  # tokens of a prompt in [1] by default
LEVEL = "16k"
GATE = 0.2  # recall of the keywords under which an answer counts nothing

ENGLISH = (
    "hotpotwikiqa_mixup",
    "loogle_SD_mixup",
    "loogle_CR_mixup",
    "loogle_MIR_mixup",
    "multifieldqa_en_mixup",
    "factrecall_en",
)
CHINESE = ("multifieldqa_zh_mixup", "cmrc_mixup", "lic_mixup", "dureader_mixup", "factrecall_zh")

BLACKLIST = """
    about and are as at be because being but by does for from had has have he her his in is it of on
    or she that their they this to was were what when which who with
""".split()  # noqa: SIM905 (else a line for each word)


def keyword_recall(output: str, keywords: str) -> float:
    """Share of the keywords' words that the output has; 1 if there are none to have.

    A blacklisted word never counts as had, though still as wanted: code of [1] and ours.
    """
    wanted = normalize(keywords)
    found = Counter(normalize(output)) & Counter(wanted)
    had = sum(n for word, n in found.items() if word not in BLACKLIST)
    return had / len(wanted) if wanted else 1.0


def gated_f1(output: str, record: dict) -> float:
    """F1 with the first answer, or 0 where the output lacks the keywords.

    The text of [1] also takes the blacklisted words out before F1. Its code does not, nor do we.
    """
    if keyword_recall(output, record["answer_keywords"]) < GATE:
        return 0.0
    return plain_f1(output, record)


def plain_f1(output: str, record: dict) -> float:
    return f1(output, record["answers"][0])


def make_task(name: str) -> Task:
    fields = {"input": str, "context": str, "answers": list}
    if name == "factrecall_en":
        max_new_tokens, score = 16, plain_f1
    else:
        max_new_tokens, score = 64, gated_f1
        fields["answer_keywords"] = str
    return Task(
        name=f"{name}_{LEVEL}",
        repository="Infinigence/LVEval",
        archive=f"{name}.zip",
        template=read_prompt(name),
        max_new_tokens=max_new_tokens,
        score=score,
        bucket=lambda record: ALL,  # one length, one column
        fields=fields,
    )


TASKS = {task.name: task for task in map(make_task, ENGLISH)}


def select(names: list[str]) -> list[Task]:
    """The tasks of these names. Raises `UserError` for a name that is none of ours."""
    for name in names:
        if name.removesuffix(f"_{LEVEL}") in CHINESE:
            raise UserError(
                f"{name} is in Chinese: its score needs a word segmenter, which is left out here; "
                f"choose from {', '.join(TASKS)}"
            )
    return choose(names, TASKS)
