"""A cache in another precision than its model's."""

import torch
from torch import Tensor

from model import LayerCache, Rope


class Rounded(LayerCache):
    """`cache`, given numbers of `dtype` and so holding such, in a model that computes in others.

    A CPU without instructions for 16-bit floats multiplies them several times slower than 32-bit
    ones; so only what the cache does, attention above all, works in `dtype`. A prefill is exact
    then as one of the other caches is, with the same output for all of them, but rounded.
    """

    def __init__(self, cache: LayerCache, dtype: torch.dtype):
        self.cache, self.dtype = cache, dtype

    @property
    def length(self) -> int:
        return self.cache.length

    def prefill(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        return self.cache.prefill(*(y.to(self.dtype) for y in (x, q, k, v)), rope).to(x.dtype)

    def remember(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> None:
        self.cache.remember(*(y.to(self.dtype) for y in (x, q, k, v)), rope)

    def decode(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        return self.cache.decode(*(y.to(self.dtype) for y in (x, q, k, v)), rope).to(x.dtype)

    def extend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        return self.cache.extend(*(y.to(self.dtype) for y in (x, q, k, v)), rope).to(x.dtype)

    def at_once(self) -> int:
        return self.cache.at_once()

    def tensors(self) -> list[Tensor]:
        return self.cache.tensors()
