"""The same checkpoint in the transformers package, if it is there, to compare times with."""

from collections.abc import Callable

import torch
from torch import Tensor

# A runner makes an empty cache; `run(tokens, cache)` feeds it and returns the last logits.
Runner = tuple[Callable[[], object], Callable[[Tensor, object], Tensor]]


def transformers_runner(path: str, device: str, dtype: torch.dtype) -> Runner | None:
    """The same checkpoint in the transformers package, or None without it."""
    try:
        from transformers import AutoModelForCausalLM, DynamicCache
    except ImportError:
        return None
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()

    def run(tokens: Tensor, cache: object) -> Tensor:
        return theirs(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    return DynamicCache, run
