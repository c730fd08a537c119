"""The names that programs around this project load models by."""

from support.huggingface.checkpoint import load_model, read_config  # noqa: F401
