"""The benchmarks' own prompts, word for word, and the word lists of our LongEval cases."""

from pathlib import Path


def read_prompt(name: str) -> str:
    return (Path(__file__).parent / f"{name}.txt").read_text(encoding="utf-8")
