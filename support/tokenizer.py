"""The names that programs around this project load tokenizers by; see support/huggingface/."""

from support.huggingface.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
