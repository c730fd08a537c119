"""What it costs a model's predictions to read its older tokens through low rank and few bits.

Measured as decoding would show it, but in one pass over a text (`DecodeMode`), and for one layer,
or some neighbours, at a time (`Probe`): a text is read exactly once, and the input that it gives
each layer is kept.
"""

import math
from copy import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import quant
from beyond.segments import is_exact
from cskv import LowRank, Together
from model import Attention, LayerCache, Rope, Transformer, seen_by
from support.command import UserError

SIDES = {"k": quant.TOKENS, "v": quant.CHANNELS}  # of a layer, and how their latents are grouped
NAMES = {"k": "keys", "v": "values"}
AT_ONCE = 2**13  # tokens that a probe reads at once: many small texts together take less time

Reads = dict[str, tuple[LowRank | None, Tensor]]  # of a side its pair, and latents [B, T, r]


@dataclass(eq=False)
class DecodeMode(LayerCache):
    """Reads a text at once, and gives what decoding it token by token would: a token attends to the
    first `sinks` tokens and to the last `window` exactly, and to those between through the pairs of
    `reads`.

    A side without a pair is exact. Latents in few bits are all rounded, while a real cache has some
    behind its window that still wait for the rest of their group.
    """

    attention: Attention
    reads: Reads
    window: int
    sinks: int

    def prefill(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        k_hat = rope.rotate(self.rebuild("k", k), 0)
        v_hat = self.rebuild("v", v)
        i = torch.arange(x.shape[1], device=x.device)
        seen = seen_by(i, i, self.attention.config.sliding_window)
        exact = is_exact(i, i, self.window, self.sinks)
        # Every token is there twice, exact and rebuilt, and one softmax sees it once.
        mask = torch.cat([seen & exact, seen & ~exact], dim=1)  # [T, 2 T]
        k = torch.cat([rope.rotate(k, 0), k_hat], dim=2)  # [B, H_kv, 2 T, D]
        v = torch.cat([v, v_hat], dim=2)
        q = rope.rotate(q, 0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    def rebuild(self, side: str, y: Tensor) -> Tensor:
        """Keys or values y [B, H_kv, T, D], through the pair of their side."""
        pair, c = self.reads.get(side, (None, None))
        if pair is None:
            return y
        if pair.bits < 16:
            some = c[:, self.sinks :]
            some = quant.fake_quantize(some, pair.bits, pair.grouping(SIDES[side]))
            c = torch.cat([c[:, : self.sinks], some], dim=1)
        bias = getattr(self.attention, f"{side}_proj").bias
        rebuilt = F.linear(c, pair.B.T.to(c), bias)
        return rebuilt.unflatten(-1, (-1, y.shape[-1])).transpose(1, 2)


@dataclass(frozen=True)
class Texts:
    """Texts of one length, as a `Probe` has read them."""

    at: Tensor  # the positions that are predicted from
    exact: Tensor  # log-probabilities of the exact model there, [B, n, vocab]
    exact_inputs: list[Tensor]  # of all layers, [B, T, hidden]
    inputs: list[Tensor]  # where they read through pairs
    reads: list[Reads]  # of all layers


class Probe:
    """Texts that are read with some sides of layers in decode mode, and what that costs: the KL
    divergence of predictions from the exact model's, in nats. At first all are exact.

    Args:
        texts: token ids [1, T].
        predictions: of a text, how many next tokens are predicted, evenly spread.
        spread: over so many of its last tokens; None is over all that meet a rebuilt one.
    """

    cost = 0.0

    @torch.no_grad()
    def __init__(
        self,
        model: Transformer,
        texts: list[Tensor],
        window: int,
        sinks: int,
        predictions: int = 96,
        spread: int | None = None,
    ):
        self.model = model
        self.window = window
        self.sinks = sinks
        self.texts = []
        device = model.lm_head.weight.device
        exact: list[Reads] = [{} for _ in model.model.layers]
        for T in sorted({text.shape[1] for text in texts}):
            first = min(sinks + window, T - 1)  # the first token that meets a rebuilt one
            first = max(first, T - (spread or T))
            at = torch.linspace(first, T - 1, min(predictions, T - first)).long().to(device)
            tokens = torch.cat([text for text in texts if text.shape[1] == T]).to(device)
            for some in tokens.split(max(1, AT_ONCE // T)):
                inputs, y = self.read(model.model.embed_tokens(some), 0, exact, at)
                self.texts.append(Texts(at, y, inputs, inputs, exact))

    @torch.no_grad()
    def changed(self, sides: dict[Together, list[LowRank | None]]) -> "Probe":
        """The same texts, with the layers of each of these sides reading through pairs, one for
        each layer, and one latent for all; None makes a side exact.

        Raises `UserError` for a cost that is not finite: no comparison may take a NaN for the best.
        """
        other = copy(self)
        other.texts = []
        divergences = []
        start = min(sides, key=lambda side: side.first)
        n = start.first  # the inputs of layers below change in nothing
        for text in self.texts:
            reads = list(text.reads)
            for side, pairs in sides.items():
                z = 0  # of the exact inputs, as those of a prompt are
                for i, pair in zip(side.layers, pairs, strict=True):
                    if pair:
                        x = self.model.model.layers[i].input_layernorm(text.exact_inputs[i])
                        z = z + x @ pair.A.to(x)
                for i, pair in zip(side.layers, pairs, strict=True):
                    reads[i] = {**reads[i], side.side: (pair, z)}
            inputs, y = self.read(text.inputs[n], n, reads, text.at)
            other.texts.append(replace(text, inputs=text.inputs[:n] + inputs, reads=reads))
            divergence = (text.exact.exp() * (text.exact - y)).sum(-1)  # [B, n]
            divergences.append(divergence.flatten())
        cost = torch.cat(divergences).mean().item()
        if not math.isfinite(cost):
            name = f"layer {n}, {NAMES[start.side]}"
            raise UserError(f"{name}: the cost is not finite; try another --dtype")
        other.cost = max(0.0, cost)  # below 0 by rounding alone
        return other

    def read(
        self, x: Tensor, first: int, reads: list[Reads], at: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """The inputs of the layers from the `first` on, which gets x; and log-probabilities of the
        token after each of those `at`, [B, n, vocab]."""
        inputs = []
        for layer, own in zip(self.model.model.layers[first:], reads[first:], strict=True):
            inputs.append(x)
            cache = DecodeMode(layer.self_attn, own, self.window, self.sinks) if own else None
            x = layer(x, self.model.rope, cache)
        logits = self.model.lm_head(self.model.model.norm(x[:, at]))
        return inputs, logits.float().log_softmax(-1)
