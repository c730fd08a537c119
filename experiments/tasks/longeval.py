"""LongEval's "lines" task [1] and passkey retrieval [2]: cases from a seed, and LongEval's own.

A case of LongEval is a record of lines, each with a key and a number, and a question for the
number of one of the keys. The prompts are LongEval's, word for word. The words that the keys are
made of are a list of our own. A passkey case hides a single number in filler text.

Sources:
    [1] Li et al., "How long can open-source LLMs truly promise on context length?", 2023;
        github.com/DachengLi1/LongChat, longeval/
    [2] Mohtashami and Jaggi, "Landmark Attention", 2023
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiments.tasks.prompts import read_prompt
from support.command import UserError
from support.huggingface.tokenizer import Tokenizer

PREAMBLE = read_prompt("longeval_preamble")
LINE = "line {key}: REGISTER_CONTENT is <{number}>\n"
QUESTION = read_prompt("longeval_question")
LARGEST = 50_000  # numbers are uniform in 1 .. LARGEST
PUBLISHED = [
    200,
    300,
    400,
    500,
]  # lines of LongEval's own cases: the columns of the paper's Table 1

PASSKEY_PREAMBLE = read_prompt("passkey_preamble")
PASSKEY_FILLER = read_prompt("passkey_filler")
PASSKEY_LINE = "The pass key is {number}. Remember it. {number} is the pass key. "
PASSKEY_QUESTION = "\n\nWhat is the pass key? The pass key is"

ADJECTIVES = read_prompt("longeval_adjectives").split()
NOUNS = read_prompt("longeval_nouns").split()
CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"


@dataclass(frozen=True)
class RetrievalCase:
    """What to read, a question about it, and the number that answers it."""

    context: str
    question: str
    answer: int

    @property
    def prompt(self) -> str:
        return self.context + self.question

    @property
    def text(self) -> str:
        """Prompt and answer as running text, to train or to calibrate on."""
        return f"{self.prompt} {self.answer}"


def spell(rng: random.Random) -> str:
    """A made-up word of 3 to 8 letters; every second one can be pronounced."""
    length = rng.randint(3, 8)
    if rng.random() < 0.5:
        return "".join(rng.choice(CONSONANTS + VOWELS) for _ in range(length))
    start = rng.randrange(2)
    return "".join(rng.choice((CONSONANTS, VOWELS)[(start + i) % 2]) for i in range(length))


def draw_key(rng: random.Random, spelled: bool = False) -> str:
    """`adjective-noun` from the lists, or two made-up words."""
    if spelled:
        return f"{spell(rng)}-{spell(rng)}"
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def draw_record(rng: random.Random, lines: int, spelled: bool = False) -> dict[str, int]:
    """`lines` distinct keys and their numbers, in the order of the record."""
    if lines < 1:
        raise UserError(f"a record needs at least 1 line, got {lines}")
    most = len(ADJECTIVES) * len(NOUNS) // 2  # half of all keys: drawing new ones stays quick
    if not spelled and lines > most:
        what = f"the word lists give up to {most} lines, got {lines}"
        raise UserError(f"{what}; ask for fewer, or --spelled")
    record: dict[str, int] = {}
    while len(record) < lines:
        record[draw_key(rng, spelled)] = rng.randint(1, LARGEST)
    return record


def format_record(record: dict[str, int]) -> str:
    return "".join(LINE.format(key=key, number=number) for key, number in record.items())


def longeval_case(rng: random.Random, lines: int, spelled: bool = False) -> RetrievalCase:
    """A record of `lines` lines and LongEval's question for one of them."""
    record = draw_record(rng, lines, spelled)
    key = rng.choice(list(record))
    return RetrievalCase(PREAMBLE + format_record(record), QUESTION.format(key=key), record[key])


def passkey_case(rng: random.Random, fillers: int) -> RetrievalCase:
    """One number somewhere between `fillers` repetitions of the filler text."""
    if fillers < 0:
        raise UserError(f"the filler text cannot be repeated {fillers} times")
    number = rng.randint(1, LARGEST)
    before = rng.randint(0, fillers)
    context = (
        PASSKEY_PREAMBLE
        + PASSKEY_FILLER * before
        + PASSKEY_LINE.format(number=number)
        + PASSKEY_FILLER * (fillers - before)
    )
    return RetrievalCase(context, PASSKEY_QUESTION, number)


def make_cases(
    task: str, lines: int, cases: int, seed: int, spelled: bool = False
) -> Iterator[RetrievalCase]:
    """`cases` cases of "longeval" or "passkey". RetrievalCase i is the same whatever `cases` is."""
    if task not in ("longeval", "passkey"):
        raise UserError(f"no task {task!r}; choose longeval or passkey")
    rng = random.Random(f"{task} {lines} {spelled} {seed}")
    for _ in range(cases):
        yield longeval_case(rng, lines, spelled) if task == "longeval" else passkey_case(rng, lines)


def read_cases(folder: Path, lines: int) -> list[RetrievalCase]:
    """LongEval's own cases [1], from its `testcases` folder with `200_lines.jsonl` and so on."""
    path, mark = folder / f"{lines}_lines.jsonl", "\nNow the record is over"
    if not path.is_file():
        own = ", ".join(map(str, PUBLISHED))
        raise UserError(f"no file {path}; LongEval's testcases have {own} lines")
    cases = []
    for i, line in enumerate(path.read_bytes().splitlines() or [b""], 1):
        try:
            row = json.loads(line)
            end = row["prompt"].rindex(mark)
            context, question = row["prompt"][:end], row["prompt"][end:]
            cases.append(RetrievalCase(context, question, int(row["expected_number"])))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}, line {i}: no case of LongEval; fetch it again") from None
    return cases


def samples(
    tokenizer: Tokenizer,
    length: int,
    task: str,
    lines: list[int],
    count: int,
    seed: int,
    spelled: bool = False,
) -> list[Tensor]:
    """`count` cases as token ids [1, T], T up to `length`, to calibrate or to train on: never those
    that are measured with the same seed. One of each number of `lines` in turn, so that the first
    are like all."""
    share = -(-count // len(lines))
    of_each = [make_cases(task, n, share, seed + 10**9, spelled) for n in lines]
    cases = [case for group in zip(*of_each, strict=True) for case in group]
    ids = [tokenizer.encode_prompt(case.text, chat=False) for case in cases[:count]]
    return [torch.tensor([tokens[:length]]) for tokens in ids]
