"""What it costs a model's predictions to read its older tokens through low rank and few bits.

Measured as decoding would show it, but in one pass (`DecodeMode`), and for one layer, or some
neighbours, at a time (`Probe`). The first tokens of a text are a prompt: it is read exactly and
once, as every cache's prompt is, and only the last tokens are read again.
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
from model import LayerCache, Rope, Transformer, seen_by
from support.command import UserError

SIDES = {"k": quant.TOKENS, "v": quant.CHANNELS}  # of a layer, and how their latents are grouped
NAMES = {"k": "keys", "v": "values"}
AT_ONCE = 2**13  # tokens that a probe reads at once: many small texts together take less time

Side = tuple[str, int]  # "k" or "v" of a layer


@dataclass(eq=False)
class DecodeMode(LayerCache):
    """Reads n tokens at once behind a prompt, and gives what decoding them one by one would: a
    token attends to the first `sinks` tokens and to the last `window` exactly, and to those between
    through `k_hat` and `v_hat`; where one of these is None, to exact keys or values.

        k, v           [B, H_kv, P, D]        of the prompt
        k_hat, v_hat   [B, H_kv, P + n, D]    of all; keys here are rotated
    """

    k: Tensor
    v: Tensor
    k_hat: Tensor | None
    v_hat: Tensor | None
    window: int
    sinks: int
    sliding_window: int | None

    def __post_init__(self):
        self.length = self.k.shape[2]

    def decode(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        k = torch.cat([self.k, rope.rotate(k, self.length)], dim=2)
        v = torch.cat([self.v, v], dim=2)
        j = torch.arange(k.shape[2], device=k.device)
        i = j[self.length :]
        seen = seen_by(i, j, self.sliding_window)  # [n, T]
        q = rope.rotate(q, self.length)
        if self.k_hat is not None or self.v_hat is not None:
            # A token may be there twice, exact and rebuilt, and one softmax sees it once.
            exact = is_exact(i, j, self.window, self.sinks)
            near = exact.any(0)
            seen = torch.cat([(seen & exact)[:, near], seen & ~exact], dim=1)
            k = torch.cat([k[:, :, near], k if self.k_hat is None else self.k_hat], dim=2)
            v = torch.cat([v[:, :, near], v if self.v_hat is None else self.v_hat], dim=2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


@dataclass(frozen=True)
class Texts:
    """Texts of one length T, as a `Probe` has read them; all but n tokens are the prompt."""

    at: Tensor  # which of the n tokens predictions are made from
    exact: Tensor  # log-probabilities of the exact model there, [B, predictions, vocab]
    exact_inputs: list[Tensor]  # of all layers, [B, T, hidden]
    prompt: list[tuple[Tensor, Tensor]]  # k, rotated, and v of all layers
    inputs: list[Tensor]  # of all layers, where they read through pairs: [B, n, hidden]
    rebuilt: dict[Side, Tensor]  # what is not exact


class Probe:
    """Texts that are read with some sides of layers in decode mode, and what that costs: the KL
    divergence of predictions from the exact model's, in nats. At first all are exact.

    Args:
        texts: token ids [1, T].
        steps: so many last tokens of a text are decoded; None is all that meet a rebuilt one.
        predictions: of a text, how many next tokens are predicted, evenly spread.
        spread: over so many of its last tokens; None is over all that are decoded.
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
        steps: int | None = None,
    ):
        self.model = model
        self.window = window
        self.sinks = sinks
        self.texts = []
        device = model.lm_head.weight.device
        for T in sorted({text.shape[1] for text in texts}):
            n = T - min(sinks + window, T - 1)  # from the first token that meets a rebuilt one
            n = min(n, steps or n)
            last = min(n, spread or n)
            at = torch.linspace(n - last, n - 1, min(predictions, last)).long().to(device)
            tokens = torch.cat([text for text in texts if text.shape[1] == T]).to(device)
            for some in tokens.split(max(1, AT_ONCE // T)):
                self.texts.append(self.read_exactly(some, n, at))

    def read_exactly(self, tokens: Tensor, n: int, at: Tensor) -> Texts:
        x = self.model.model.embed_tokens(tokens)
        inputs = []
        prompt = []
        for layer in self.model.model.layers:
            inputs.append(x)
            of_prompt = layer.input_layernorm(x[:, :-n])
            k, v = [self.heads(getattr(layer.self_attn, f"{s}_proj")(of_prompt)) for s in SIDES]
            prompt.append((self.model.rope.rotate(k, 0), v))
            x = layer(x, self.model.rope, None)
        ends = [x[:, -n:] for x in inputs]
        return Texts(at, self.predict(x[:, -n:], at), inputs, prompt, ends, {})

    def heads(self, y: Tensor) -> Tensor:
        """y [B, T, d_kv] as [B, H_kv, T, D]."""
        return y.unflatten(-1, (-1, self.model.config.head_dim)).transpose(1, 2)

    def predict(self, x: Tensor, at: Tensor) -> Tensor:
        """Log-probabilities of the token after each of those `at`, [B, predictions, vocab], from
        the last layer's output."""
        logits = self.model.lm_head(self.model.model.norm(x[:, at]))
        return logits.float().log_softmax(-1)

    @torch.no_grad()
    def changed(self, sides: dict[Together, list[LowRank | None]]) -> "Probe":
        """The same texts, with the layers of each of these sides reading through pairs, one for
        each layer, and one latent for all; None makes a side exact.

        Latents are those of exact inputs, as a prompt's are. In few bits all are rounded, while a
        real cache has some behind its window that still wait for the rest of their group. Raises
        `UserError` for a cost that is not finite: no comparison may take a NaN for the best.
        """
        other = copy(self)
        other.texts = []
        divergences = []
        start = min(sides, key=lambda side: side.first)
        n = start.first  # the inputs of layers below change in nothing
        for text in self.texts:
            rebuilt = dict(text.rebuilt)
            for side, pairs in sides.items():
                if pairs[0]:
                    rebuilt |= self.rebuild(text.exact_inputs, side, pairs)
                else:
                    for i in side.layers:
                        rebuilt.pop((side.side, i), None)
            inputs, y = self.read(text, rebuilt, n)
            inputs = text.inputs[:n] + inputs
            other.texts.append(replace(text, inputs=inputs, rebuilt=rebuilt))
            divergence = (text.exact.exp() * (text.exact - y)).sum(-1)  # [B, predictions]
            divergences.append(divergence.flatten())
        cost = torch.cat(divergences).mean().item()
        if not math.isfinite(cost):
            name = f"layer {n}, {NAMES[start.side]}"
            raise UserError(f"{name}: the cost is not finite; try another --dtype")
        other.cost = max(0.0, cost)  # below 0 by rounding alone
        return other

    def rebuild(
        self, inputs: list[Tensor], side: Together, pairs: list[LowRank]
    ) -> dict[Side, Tensor]:
        """Keys, rotated, or values of a side's layers, from one latent."""
        layers = [self.model.model.layers[i] for i in side.layers]
        c = 0
        for i, layer, pair in zip(side.layers, layers, pairs, strict=True):
            x = layer.input_layernorm(inputs[i])
            c = c + x @ pair.A.to(x)  # [B, T, r]
        pair = pairs[0]
        grouping = pair.grouping(SIDES[side.side])
        first = 0  # channel
        for bits, channels in pair.all_runs:
            some = c[:, self.sinks :, first : first + channels]
            if bits in quant.BITS:
                some.copy_(quant.fake_quantize(some, bits, grouping))
            first += channels
        result = {}
        for i, layer, pair in zip(side.layers, layers, pairs, strict=True):
            bias = getattr(layer.self_attn, f"{side.side}_proj").bias
            y = self.heads(F.linear(c, pair.B.T.to(c), bias))
            result[side.side, i] = self.model.rope.rotate(y, 0) if side.side == "k" else y
        return result

    def read(
        self, text: Texts, rebuilt: dict[Side, Tensor], first: int
    ) -> tuple[list[Tensor], Tensor]:
        """The inputs of the layers from the `first` on, and predictions."""
        inputs = []
        x = text.inputs[first]
        for i, layer in enumerate(self.model.model.layers[first:], first):
            inputs.append(x)
            hats = rebuilt.get(("k", i)), rebuilt.get(("v", i))
            settings = self.window, self.sinks, self.model.config.sliding_window
            x = layer(x, self.model.rope, DecodeMode(*text.prompt[i], *hats, *settings))
        return inputs, self.predict(x, text.at)
