"""The teaching model's own case: numbers of a LongEval text are found, the way infer.py goes."""

import random

import torch

from course.problems import ROOT
from course.sandbox import Draw, Failed, Sandbox, look
from experiments.tasks.longeval import longeval_case
from support.huggingface.tokenizer import load_tokenizer

VOCABULARY = 1073
TEXTS, LINES = 3, 8  # some 300 tokens each


def finds_numbers(student: Sandbox, draw: Draw, **numbers) -> dict:
    """The answer of `scenarios.tell`. Raises `Failed` unless half of all digits or more stand at
    their place: right caches have nearly all of them, and the others one in ten."""
    tokenizer = load_tokenizer(ROOT / "weights" / "teacher", VOCABULARY)
    rng = random.Random(draw.integer(0, 2**31))
    cases = [longeval_case(rng, LINES) for _ in range(TEXTS)]
    prompts = {}
    for i, case in enumerate(cases):
        prompts[f"prompt{i}"] = torch.tensor([tokenizer.encode_prompt(case.prompt, None)])
    answer = student.ask("scenarios.tell", prompts, **numbers)
    told = []
    same = []
    for name, case in zip(prompts, cases, strict=True):
        tokens = look(answer, name, (8,), torch.int64).clamp(0, VOCABULARY - 1)
        text = tokenizer.decode(tokens.tolist()).strip().ljust(8)
        told.append(f"{text.strip()!r} for {case.answer}")
        same += [a == b for a, b in zip(str(case.answer), text, strict=False)]
    if 2 * sum(same) < len(same):
        raise Failed(f"the teaching model does not find the numbers: {', '.join(told)}")
    return answer
