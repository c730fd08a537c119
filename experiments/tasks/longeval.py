"""LongEval's "lines" task [1] and passkey retrieval [2]: cases from a seed, and LongEval's own.

A case of LongEval is a record of lines, each with a key and a number, and a question for one of the
numbers, in LongEval's words; our cases have keys from a list of our own.

Sources:
    [1] Li et al., "How long can open-source LLMs truly promise on context length?", 2023;
        github.com/DachengLi1/LongChat, longeval/
    [2] Mohtashami and Jaggi, "Landmark Attention", 2023
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiments.tasks.prompts import read_prompt
from experiments.tasks.records import read_rows
from support.command import UserError
from support.huggingface.tokenizer import Tokenizer

PREAMBLE = read_prompt("longeval_preamble")
LINE = "line {key}: REGISTER_CONTENT is <{number}>\n"
QUESTION = read_prompt("longeval_question")
LARGEST = 50_000  # numbers are uniform in 1 .. LARGEST
PUBLISHED = [200, 300, 400, 500]  # lines of LongEval's own cases: the paper's Table 1

PASSKEY_PREAMBLE = read_prompt("passkey_preamble")
PASSKEY_FILLER = read_prompt("passkey_filler")
PASSKEY_LINE = "The pass key is {number}. Remember it. {number} is the pass key. "
PASSKEY_QUESTION = "\n\nWhat is the pass key? The pass key is"

ADJECTIVES = read_prompt("longeval_adjectives").split()
NOUNS = read_prompt("longeval_nouns").split()
MOST = len(ADJECTIVES) * len(NOUNS) // 2  # half of all keys: drawing new ones stays quick
CONSONANTS = "bcdfghjklmnpqrstvwxyz"
VOWELS = "aeiou"


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
        return "".join([rng.choice(CONSONANTS + VOWELS) for _ in range(length)])
    start = rng.randrange(2)
    return "".join([rng.choice((CONSONANTS, VOWELS)[(start + i) % 2]) for i in range(length)])


def draw_record(rng: random.Random, lines: int, spelled: bool = False) -> dict[str, int]:
    """`lines` distinct keys, `adjective-noun` or two made-up words, and their numbers, in order."""
    if lines > MOST and not spelled:
        raise UserError(f"{lines} lines are more than {MOST}; choose fewer, or --spelled")
    record: dict[str, int] = {}
    while len(record) < lines:
        number = rng.randint(1, LARGEST)
        if spelled:
            record[f"{spell(rng)}-{spell(rng)}"] = number
        else:
            record[f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"] = number
    return record


def format_record(record: dict[str, int]) -> str:
    return "".join([LINE.format(key=key, number=number) for key, number in record.items()])


def longeval_case(rng: random.Random, lines: int, spelled: bool = False) -> RetrievalCase:
    record = draw_record(rng, lines, spelled)
    key = rng.choice(list(record))
    return RetrievalCase(PREAMBLE + format_record(record), QUESTION.format(key=key), record[key])


def passkey_case(rng: random.Random, fillers: int) -> RetrievalCase:
    """One number somewhere between `fillers` repetitions of the filler text."""
    number = rng.randint(1, LARGEST)
    before = rng.randint(0, fillers)
    context = PASSKEY_PREAMBLE + PASSKEY_FILLER * before
    context += PASSKEY_LINE.format(number=number) + PASSKEY_FILLER * (fillers - before)
    return RetrievalCase(context, PASSKEY_QUESTION, number)


def make_cases(
    task: str, lines: int, cases: int, seed: int, spelled: bool = False
) -> Iterator[RetrievalCase]:
    """`cases` cases of "longeval" or "passkey". Case i is the same whatever `cases` is."""
    rng = random.Random(f"{task} {lines} {spelled} {seed}")
    for _ in range(cases):
        if task == "passkey":
            yield passkey_case(rng, lines)
        else:
            yield longeval_case(rng, lines, spelled)


def read_cases(folder: Path, lines: int) -> list[RetrievalCase]:
    """LongEval's own cases [1], from its `testcases` folder with `200_lines.jsonl` and so on."""
    path = folder / f"{lines}_lines.jsonl"
    if not path.is_file():
        raise UserError(f"no file {path}; LongEval's testcases have 200, 300, 400, 500 lines")
    cases = []
    for row in read_rows(path, {"prompt": str, "expected_number": int}):
        prompt = row["prompt"]
        end = prompt.rfind("\nNow the record is over")
        if end < 0:
            raise UserError(f"{path}: a prompt that is none of LongEval's; fetch it again")
        cases.append(RetrievalCase(prompt[:end], prompt[end:], row["expected_number"]))
    return cases


def samples(
    tokenizer: Tokenizer, length: int, task: str, lines: list[int], count: int, seed: int
) -> list[Tensor]:
    """`count` cases as token ids [1, T], T up to `length`, to calibrate or to train on: never those
    that are measured with the same seed. One of each number of `lines` in turn, so that the first
    are like all."""
    draws = [make_cases(task, n, count, seed + 10**9) for n in lines]
    cases = [next(draws[i % len(draws)]) for i in range(count)]
    ids = [tokenizer.encode_prompt(case.text, chat=False)[:length] for case in cases]
    return [torch.tensor([tokens]) for tokens in ids]
