"""The names that programs around this project load tokenizers by."""

from support.huggingface.tokenizer import Tokenizer, load_tokenizer  # noqa: F401
