"""Latents shared by layers: more channels to shrink.

The paper shrinks the channels of one layer. Neighbouring layers read nearly the same residual
stream, so their keys are far from independent, and so are their values. Put the channels of g
layers side by side, and shrink them together:

    [ s_1 k_1 L_1 | ... | s_g k_g L_g ]      [T, g d_kv]    V_r: the top-r eigenvectors of its moment
    z = sum_l s_l k_l L_l V_r^(l) = sum_l x_l A_l   [T, r]  one latent of a token for all g layers
    k_l ~ z B_l                                             B_l [r, d_kv] is the layer's own

V_r^(l) are the rows of V_r for layer l, L_l L_l^T its metric (beyond/outputs.py for keys,
`cskv.output_metric` for values), and s_l^2 what an error of that layer costs the model's answer.
Without s_l layers of large numbers would take all channels. g = 1 is the paper.

z is a sum over layers. A token's latent is needed only when the token has left the window, long
after the last layer of the group has added its part:

    layers 0, 1, 2 share        layer 0    layer 1    layer 2
    token t passes              z = x A    z += x A   z += x A, closed: stored, and packed
    each attends                through latents of tokens that left the window, closed before

The reading side does not change: a layer multiplies with all r channels of the group's latents, be
they rebuilt or not. That is what is paid for the bytes: time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cskv import BiBranchCache, Latents
from quant import Packed


class Sum:
    """The latents of a group of layers, and those of the tokens that pass it at the moment."""

    def __init__(self, latents: Latents | Packed, count: int):
        self.latents = latents
        self.count = count  # layers
        self.added = 0  # of them, to `open`
        self.open: Tensor | None = None  # [B, n, r], the newest tokens' sum so far

    def add(self, layer: int, c: Tensor) -> None:
        """c [B, n, r], what a layer adds to the latents of the next n tokens."""
        if layer != self.added:
            raise ValueError("layers that share latents take every token together, in order")
        wide = torch.promote_types(c.dtype, torch.float32)
        self.open = c.to(wide) if self.open is None else self.open + c
        self.added += 1
        if self.added == self.count:
            self.latents.append(self.open)
            self.open = None
            self.added = 0


class Part:
    """A layer's way to the latents that it shares: `Latents` for its cache."""

    def __init__(self, total: Sum, layer: int, window: int):
        self.total = total
        self.layer = layer  # its number in the group
        self.window = window

    def append(self, c: Tensor) -> None:
        self.total.add(self.layer, c)

    def at_once(self) -> int:
        """No new token may see another one's latent, which is not closed; and all layers must read
        the same packed groups as if the tokens came one by one."""
        latents = self.total.latents
        if isinstance(latents, Packed) and latents.until_packed() == 1:
            return 1
        return min(self.window, latents.at_once())

    def tensors(self) -> list[Tensor]:
        """All of the group's for the last layer, so that they are counted once."""
        if self.layer + 1 < self.total.count:
            return []
        return self.total.latents.tensors()

    def __getattr__(self, name: str):
        """`read`, `length` and all else is that of the group's latents."""
        return getattr(self.total.latents, name)


@dataclass(frozen=True)
class Together:
    """Neighbouring layers that share the latents of their keys ("k") or values ("v")."""

    side: str
    first: int  # layer
    count: int  # layers

    @property
    def layers(self) -> range:
        return range(self.first, self.first + self.count)

    def connect(self, caches: list[BiBranchCache]) -> None:
        """Gives the layers' empty caches one place for their latents."""
        name = f"c_{self.side}"
        total = Sum(getattr(caches[self.first], name), self.count)
        for n, i in enumerate(self.layers):
            setattr(caches[i], name, Part(total, n, caches[i].window))
