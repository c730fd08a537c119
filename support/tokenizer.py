"""The names that programs around this project load tokenizers by; see support/huggingface/."""

from pathlib import Path

from support.huggingface import tokenizer
from support.huggingface.tokenizer import Tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint folder or hub repository. Raises `UserError` for its faults."""
    return tokenizer.load_tokenizer(path, vocab_size)
