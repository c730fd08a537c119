"""What it costs a model's predictions to read its older tokens through low rank and few bits.

Measured as decoding would show it, but in one pass over a text (`DecodeMode`), and for one layer,
or some neighbours, at a time (`Probe`): a text is read exactly once, and the input that it gives
each layer is kept.
"""

from copy import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import quant
from beyond.segments import is_exact
from cskv import Factors, LowRank, Together
from model import Attention, LayerCache, Rope, Transformer, seen_by
from support.command import UserError

SIDES = {"k": quant.TOKENS, "v": quant.CHANNELS}  # of a layer, and how their latents are grouped
NAMES = {"k": "keys", "v": "values"}
AT_ONCE = 2**13  # tokens that a probe reads at once: many small texts together take less time


class DecodeMode(LayerCache):
    """Reads a text at once, and gives what decoding it token by token would: a token attends to the
    first `sinks` tokens and to the last `window` exactly, and to those between through `pairs`.

    A side without a pair is exact. Latents in few bits are all rounded, while a real cache has some
    behind its window that still wait for the rest of their group. `latents` are those [B, T, r] of
    sides that share them with other layers; the others are this layer's x A.
    """

    def __init__(
        self,
        attention: Attention,
        pairs: dict[str, LowRank],
        window: int,
        sinks: int,
        latents: dict[str, Tensor] | None = None,
    ):
        self.attention = attention
        self.latents = latents or {}
        self.sliding_window = attention.config.sliding_window
        self.pairs = pairs
        self.window = window
        self.sinks = sinks

    def prefill(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        T = x.shape[1]
        k_hat = rope.rotate(self.rebuild("k", x, k), 0)
        v_hat = self.rebuild("v", x, v)
        i = torch.arange(T, device=x.device)
        seen = seen_by(i, i, self.sliding_window)
        exact = is_exact(i, i, self.window, self.sinks)
        # Every token is there twice, exact and rebuilt, and one softmax sees it once.
        mask = torch.cat([seen & exact, seen & ~exact], dim=1)  # [T, 2 T]
        k = torch.cat([rope.rotate(k, 0), k_hat], dim=2)  # [B, H_kv, 2 T, D]
        v = torch.cat([v, v_hat], dim=2)
        q = rope.rotate(q, 0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    def rebuild(self, side: str, x: Tensor, y: Tensor) -> Tensor:
        """Keys or values y [B, H_kv, T, D] of x [B, T, hidden], through the pair of their side."""
        pair = self.pairs.get(side)
        if pair is None:
            return y
        bias = getattr(self.attention, f"{side}_proj").bias
        c = self.latents[side].clone() if side in self.latents else x @ pair.A  # [B, T, r]
        if pair.bits < 16:
            grouping = pair.grouping(SIDES[side])
            c[:, self.sinks :] = quant.fake_quantize(c[:, self.sinks :], pair.bits, grouping)
        rebuilt = F.linear(c, pair.B.T, bias)
        return rebuilt.unflatten(-1, (-1, y.shape[-1])).transpose(1, 2)


class Probe:
    """Texts, and what it costs to read them with some layers in decode mode.

    All other layers are exact, or read through the factors of `around`.

    Args:
        texts: token ids [1, T].
        predictions: of a text, how many next tokens are predicted, evenly spread.
        spread: over so many of its last tokens; None is over all that meet a rebuilt one.
    """

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
        self.pairs: list[dict[str, LowRank]] = [{} for _ in model.model.layers]
        self.texts = []
        device = model.lm_head.weight.device
        lengths = sorted({text.shape[1] for text in texts})
        for T in lengths:
            first = min(sinks + window, T - 1)  # the first token that meets a rebuilt one
            first = max(first, T - (spread or T))
            at = torch.linspace(first, T - 1, min(predictions, T - first)).long().to(device)
            tokens = torch.cat([text for text in texts if text.shape[1] == T]).to(device)
            for some in tokens.split(max(1, AT_ONCE // T)):
                x = model.model.embed_tokens(some)
                inputs, x = self.read(x, self.pairs, self.pairs)
                exact = self.log_probabilities(x, at)
                self.texts.append(Texts(at, exact, inputs, inputs, self.pairs))

    def read(
        self, x: Tensor, pairs: list[dict], latents: list[dict]
    ) -> tuple[list[Tensor], Tensor]:
        """The last layers of the model, as many as `pairs`: the input of each, and the output of
        the last, [B, T, hidden]."""
        inputs = []
        layers = self.model.model.layers[-len(pairs) :]
        for layer, own, shared in zip(layers, pairs, latents, strict=True):
            inputs.append(x)
            cache = None
            if own:
                cache = DecodeMode(layer.self_attn, own, self.window, self.sinks, shared)
            x = layer(x, self.model.rope, cache)
        return inputs, x

    def log_probabilities(self, x: Tensor, at: Tensor) -> Tensor:
        """Of the token after each of those `at`, from the last layer's output: [B, n, vocab]."""
        logits = self.model.lm_head(self.model.model.norm(x[:, at]))
        return logits.float().log_softmax(-1)

    @torch.no_grad()
    def around(self, factors: Factors, sides: list[Together]) -> "Probe":
        """The same texts, with all layers reading through `factors`, which have these sides."""
        other = copy(self)
        other.pairs = [dict(vars(layer)) for layer in factors.layers]
        other.texts = []
        for text in self.texts:
            latents = self.shared_latents(text, 0, other.pairs, sides)
            inputs, _ = self.read(text.exact_inputs[0], other.pairs, latents)
            other.texts.append(replace(text, inputs=inputs, latents=latents))
        return other

    @torch.no_grad()
    def cost(self, i: int, *pairs: dict[str, LowRank | None], together: tuple = ()) -> float:
        """KL divergence in nats, a mean over all predictions, with `pairs` in layer i, and in the
        next ones if there are more; None makes a side exact. `together` are the groups of these
        that share latents.

        Raises `UserError` if it is not finite: no comparison may take a NaN for the best cost.
        """
        divergences = []
        for text in self.texts:
            read = [dict(own) for own in self.pairs[i:]]
            latents = [dict(own) for own in text.latents[i:]]
            shared = self.shared_latents(text, i, pairs, together)
            for n, own in enumerate(pairs):
                read[n].update(own)
                latents[n].update(shared[n])
            _, x = self.read(text.inputs[i], read, latents)
            rebuilt = self.log_probabilities(x, text.at)
            divergence = (text.exact.exp() * (text.exact - rebuilt)).sum(-1)  # [B, n]
            divergences.append(divergence.flatten())
        divergences = torch.cat(divergences)
        if not divergences.isfinite().all():
            names = " and ".join(NAMES[side] for side in pairs[0])
            raise UserError(f"layer {i}, {names}: the cost is not finite; try another --dtype")
        return max(0.0, divergences.mean().item())  # below 0 by rounding alone

    def shared_latents(self, text: "Texts", i: int, pairs, together) -> list[dict]:
        """For each of `pairs`, from layer i on, the latents that it shares, by their side: of the
        exact inputs, as those of a prompt are."""
        latents: list[dict] = [{} for _ in pairs]
        for group in together:
            z = 0
            for n in group.layers:
                x = self.model.model.layers[n].input_layernorm(text.exact_inputs[n])
                z = z + x @ pairs[n - i][group.side].A
            for n in group.layers:
                latents[n - i][group.side] = z
        return latents


@dataclass(frozen=True)
class Texts:
    """Texts of one length, as a `Probe` keeps them, with inputs of all layers, [B, T, hidden]."""

    at: Tensor  # the positions that are predicted from
    exact: Tensor  # log-probabilities of the exact model there, [B, n, vocab]
    exact_inputs: list[Tensor]
    inputs: list[Tensor]  # where layers read through factors
    latents: list[dict[str, Tensor]]  # that a layer then shares, by their side
