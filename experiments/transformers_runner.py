"""The same checkpoint in the transformers package, if it is there, to compare times with."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

# A runner makes an empty cache; `run(tokens, cache)` feeds it and returns the last logits.
Runner = tuple[Callable[[], object], Callable[[Tensor, object], Tensor]]


def transformers_runners(
    path: str, device: str, dtype: torch.dtype, lengths: list[int]
) -> dict[str, Runner]:
    """The same checkpoint in the transformers package with its full cache and, where the package
    hqq is installed, with its quantized one in 4 and in 2 bits; none without the package.

    hqq packs 4 groups of 64 numbers together and fails where keys do not come out even, so the
    quantized ones are there only if prompts of all `lengths` do.
    """
    if not find_spec("transformers"):
        return {}
    from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache

    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()

    def run(tokens: Tensor, cache: object) -> Tensor:
        return theirs(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    runners = {"transformers, DynamicCache": (DynamicCache, run)}
    d_kv = theirs.config.num_key_value_heads * theirs.config.head_dim
    even = all(length * d_kv % 256 == 0 for length in lengths)
    if find_spec("hqq") and even:
        for bits in (4, 2):
            axes = {"axis_key": 1, "axis_value": 1}  # the only ones that this backend has
            cache = partial(QuantizedCache, "hqq", theirs.config, nbits=bits, **axes)
            runners[f"transformers, QuantizedCache {bits} bits"] = (cache, run)
    return runners
