"""The names that programs around this project load models by; see support/huggingface/."""

from pathlib import Path

import torch

from model import Config, Transformer
from support.huggingface import checkpoint


def load_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer:
    """A checkpoint folder or hub repository as a frozen model. Raises `UserError` for faults."""
    return checkpoint.load_model(path, device, dtype)


def read_config(folder: Path) -> Config:
    """The config.json of a checkpoint folder. Raises `UserError` for what is not supported."""
    return checkpoint.read_config(folder)
