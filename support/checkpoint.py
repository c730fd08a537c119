"""The names that programs around this project load models by; see support/huggingface/."""

from support.huggingface.checkpoint import load_model, read_config

__all__ = ["load_model", "read_config"]
