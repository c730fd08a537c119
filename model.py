"""The frozen model: Llama and Mistral in plain PyTorch, and the cache they are usually run with.

Nothing in here knows of compression. Every module has its Hugging Face name, so that a
checkpoint loads strictly. The one unusual thing is where attention lives: the `Attention`
module only projects; a `LayerCache` remembers and attends. Caches that compress are further
subclasses of it, in other files.

Shapes, everywhere in this project:
    B batch   T tokens   H query heads   H_kv key/value heads   G = H / H_kv   D head dim
    d_kv = H_kv * D, the key (or value) channels of a layer

Sources:
    [1] Touvron et al., "Llama 2", 2023; Jiang et al., "Mistral 7B", 2023 (sliding window)
    [2] Su et al., "RoFormer", 2021: rotary position embedding (RoPE)
    [3] Ainslie et al., "GQA", 2023: grouped-query attention
    [4] Chen et al., "Position Interpolation", 2023: linear RoPE scaling; Llama 3.1's is [5]
    [5] Grattafiori et al., "The Llama 3 Herd of Models", 2024
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """The part of a Hugging Face `config.json` that changes the computation."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # H_kv; fewer than H means grouped-query attention [3]
    head_dim: int  # D; usually hidden_size / H, but a config may say otherwise
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None  # {"rope_type": "linear" | "llama3", "factor": ..., ...}
    max_position_embeddings: int
    tie_word_embeddings: bool  # the output matrix is the embedding matrix
    attention_bias: bool  # q_proj, k_proj, v_proj and o_proj have a bias
    mlp_bias: bool
    sliding_window: int | None  # Mistral-7B-v0.1: a token sees the last 4096 only, itself included
    eos_token_ids: tuple[int, ...]

    @property
    def d_kv(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def context_length(self) -> int:
        """Longest sequence the model was made for. A linear factor stretches the trained length;
        Llama 3.1's `max_position_embeddings` has the factor in it already."""
        if self.rope_scaling and self.rope_scaling["rope_type"] == "linear":
            return int(self.max_position_embeddings * self.rope_scaling["factor"])
        return self.max_position_embeddings


class Rope:
    """Rotary position embedding [2]: at position t, the plane f is turned by t * w_f. A head's D
    channels are D/2 planes, in Hugging Face checkpoints half-split: f and f + D/2."""

    def __init__(self, config: Config):
        D = config.head_dim
        # Operation by operation as in the reference library, so that no last bit differs.
        exponent = torch.arange(0, D, 2, device="cpu", dtype=torch.float32) / D
        w = 1 / config.rope_theta**exponent
        scaling = config.rope_scaling or {"rope_type": "default"}
        if scaling["rope_type"] == "linear":  # [4]: positions shrink by the factor
            w = w / scaling["factor"]
        elif scaling["rope_type"] == "llama3":
            w = llama3_frequencies(w, scaling)
        self.frequencies = w  # [D/2]
        self.cos = self.sin = torch.empty(0, D // 2)  # [positions, D/2]

    def reach(self, length: int, device: torch.device) -> None:
        """Extends the tables to `length` positions on `device`."""
        if length > len(self.cos) or self.cos.device != device:
            with torch.inference_mode(False):  # tensors made in it are of no use in training
                t = torch.arange(-(-length // 1024) * 1024, dtype=torch.float32)
                angle = torch.outer(t, self.frequencies)  # [positions, D/2]
                self.cos = angle.cos().to(device)
                self.sin = angle.sin().to(device)

    def rotate(self, x: Tensor, start: int) -> Tensor:
        """Turns x [..., T, D], half-split, standing at positions start .. start + T - 1."""
        stop = start + x.shape[-2]
        self.reach(stop, x.device)
        cos = self.cos[start:stop].to(x.dtype)  # [T, D/2]
        sin = self.sin[start:stop].to(x.dtype)
        x1, x2 = x.chunk(2, dim=-1)  # [..., T, D/2] each
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def llama3_frequencies(w: Tensor, scaling: dict) -> Tensor:
    """The frequencies [D/2] of Llama 3.1 [5]: fast rotations stay, slow ones are divided by the
    factor, those between are mixed."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / w
    turns = scaling["original_max_position_embeddings"] / wavelength
    ramp = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - ramp) * (w / scaling["factor"]) + ramp * w


def causal_attention(q: Tensor, k: Tensor, v: Tensor, sliding_window: int | None = None) -> Tensor:
    """Token i attends to the tokens j <= i, with i - j < sliding_window if that is set.
    q [B, H, T, D] and k, v [B, H_kv, T, D], q and k rotated -> [B, H, T, D]."""
    T = q.shape[-2]
    if sliding_window is None or sliding_window >= T:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    i = torch.arange(T, device=q.device)
    mask = seen_by(i, i, sliding_window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def seen_by(i: Tensor, j: Tensor, sliding_window: int | None = None) -> Tensor:
    """Whether the tokens at positions i [n] attend to those at positions j [m]: [n, m]."""
    i = i[:, None]
    seen = j <= i
    if sliding_window is not None:
        seen &= j > i - sliding_window
    return seen


PIECE = 128  # new tokens that caches take at once, if they take several: it bounds their memory


class LayerCache:
    """One layer's memory of a batch of sequences of equal length, and the attention over it. Keys
    arrive before RoPE, since that is where caches differ: some store rotated keys, some rebuild
    keys and rotate those, some renumber the positions.

        x    [B, T, hidden]     the layer's normed input, which keys and values are projected from
        q    [B, H, T, D]       queries, before RoPE
        k, v [B, H_kv, T, D]    keys and values, k before RoPE
        out  [B, H, T, D]       what attention gives

    A subclass counts `length` up in `remember` and in `decode`, takes `sliding_window` from the
    config and respects it in `decode`, and keeps tensors of its own, no slices of longer ones.
    """

    length = 0  # tokens seen
    sliding_window: int | None = None  # the model's

    def prefill(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        """The whole prompt at once, on an empty cache: it is remembered, and attended exactly."""
        self.check_prefill()
        self.remember(x, q, k, v, rope)
        return causal_attention(rope.rotate(q, 0), rope.rotate(k, 0), v, self.sliding_window)

    def remember(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> None:
        """What stays of a prompt. The attention is apart: caches of one prompt can share it."""
        raise NotImplementedError

    def decode(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        """One new token, after a prefill."""
        raise NotImplementedError

    def extend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        """T new tokens, at most `at_once()`, after a prefill: the same as T times `decode`."""
        return self.decode(x, q, k, v, rope)

    def at_once(self) -> int:
        """How many of the next tokens `extend` takes."""
        return 1

    def tensors(self) -> list[Tensor]:
        """All that this layer keeps for the sequence."""
        raise NotImplementedError

    def nbytes(self) -> int:
        """Bytes of the memory behind `tensors()`, room for tokens to come included."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors())

    def check_prefill(self) -> None:
        if self.length:
            raise ValueError(f"prefill on a cache that holds {self.length} tokens; make a new one")

    def check_extend(self) -> None:
        if not self.length:
            raise ValueError("decode on an empty cache; prefill the prompt first")

    def check_decode(self, q: Tensor) -> None:
        self.check_extend()
        if q.shape[-2] != 1:
            raise ValueError(f"decode takes one token a step, got {q.shape[-2]}")


GROW = 256  # tokens that a full buffer grows by: a copy every 256 steps, never one a step


def reserve(buffer: Tensor, length: int, most: int | None = None) -> Tensor:
    """`buffer` [..., capacity, C], or a larger copy for `length` tokens (`most` is the limit)."""
    capacity = buffer.shape[-2]
    if length <= capacity or capacity == most:
        return buffer
    room = capacity + -(-(length - capacity) // GROW) * GROW
    if most is not None:
        room = min(room, most)
    larger = buffer.new_empty(*buffer.shape[:-2], room, buffer.shape[-1])
    larger[..., :capacity, :] = buffer
    return larger


class FullCache(LayerCache):
    """The usual cache: every token's rotated key and its value, in the model's precision. Under
    a sliding window old tokens are kept, but not attended. `expected` is the final length, if
    it is known: memory is then taken once."""

    def __init__(self, config: Config, expected: int = 0):
        self.expected = expected
        self.sliding_window = config.sliding_window

    def remember(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> None:
        B, H_kv, T, D = k.shape
        self.k = k.new_empty(B, H_kv, max(T, self.expected), D)
        self.v = torch.empty_like(self.k)
        self.k[:, :, :T] = rope.rotate(k, 0)
        self.v[:, :, :T] = v
        self.length = T

    def at_once(self) -> int:
        return PIECE

    def decode(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        self.check_decode(q)
        return self.extend(x, q, k, v, rope)

    def extend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        self.check_extend()
        t = self.length
        self.length = t + k.shape[2]
        self.k = reserve(self.k, self.length)
        self.v = reserve(self.v, self.length)
        self.k[:, :, t : self.length] = rope.rotate(k, t)
        self.v[:, :, t : self.length] = v
        first = max(0, t + 1 - (self.sliding_window or t + 1))  # that the first new token sees
        mask = None  # one new token sees all from there on
        if self.length > t + 1:
            j = torch.arange(first, self.length, device=k.device)
            mask = seen_by(j[t - first :], j, self.sliding_window)
        k, v = self.k[:, :, first : self.length], self.v[:, :, first : self.length]
        q = rope.rotate(q, t)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    def tensors(self) -> list[Tensor]:
        return [self.k, self.v] if self.length else []


class Attention(nn.Module):
    """Projects; `cache` remembers and attends. Without one, plain causal attention."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        q_out = config.num_attention_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, q_out, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, config.d_kv, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, config.d_kv, bias=bias)
        self.o_proj = nn.Linear(q_out, config.hidden_size, bias=bias)

    def forward(self, x: Tensor, rope: Rope, cache: LayerCache | None) -> Tensor:
        B, T, _ = x.shape
        # [B, T, heads * D] -> [B, heads, T, D]
        q = self.q_proj(x).view(B, T, -1, self.config.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(B, T, -1, self.config.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, -1, self.config.head_dim).transpose(1, 2)
        if cache is None:
            window = self.config.sliding_window
            out = causal_attention(rope.rotate(q, 0), rope.rotate(k, 0), v, window)
        elif cache.length == 0:
            out = cache.prefill(x, q, k, v, rope)
        elif T == 1:
            out = cache.decode(x, q, k, v, rope)
        else:
            out = cache.extend(x, q, k, v, rope)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))  # [B, T, hidden]


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        h, m, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(h, m, bias=bias)
        self.up_proj = nn.Linear(h, m, bias=bias)
        self.down_proj = nn.Linear(m, h, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.silu(self.gate_proj(x))  # [B, T, intermediate]
        up = self.up_proj(x)
        if gate.requires_grad:
            return self.down_proj(gate * up)
        return self.down_proj(gate.mul_(up))  # in place: fresh memory of this size is slow


class Layer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: Rope, cache: LayerCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """`model.` in a checkpoint's names."""

    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """A Llama or Mistral. `cache`, a list of one `LayerCache` a layer, holds a sequence's state."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.rope = Rope(config)

    def forward(self, tokens: Tensor, cache: list | None = None, logits_to_keep=0) -> Tensor:
        """tokens [B, T] -> logits [B, T, vocab], or of the last `logits_to_keep` tokens only. An
        empty cache prefills, one that holds tokens is extended. Sequences of a batch have equal
        length: there is no padding. Raises `ValueError` past the context length."""
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens must be [B, T] with T > 0, got {tuple(tokens.shape)}")
        length = tokens.shape[1] + (cache[0].length if cache else 0)
        if length > self.config.context_length:
            raise ValueError(f"{length} tokens, but the context is {self.config.context_length}")
        caches = cache or [None] * len(self.model.layers)
        outs = []
        while tokens.shape[1]:
            n = tokens.shape[1]
            if n > 1 and cache and cache[0].length:
                n = min(n, *(layer.at_once() for layer in cache))
            x = self.model.embed_tokens(tokens[:, :n])  # [B, n, hidden]
            for layer, own in zip(self.model.layers, caches, strict=True):
                x = layer(x, self.rope, own)
            outs.append(x)
            tokens = tokens[:, n:]
        x = torch.cat(outs, dim=1)
        return self.lm_head(self.model.norm(x[:, -logits_to_keep:]))


def full_cache(model: Transformer, expected: int = 0) -> list[LayerCache]:
    """A full cache for a batch of sequences that are `expected` tokens long in the end."""
    return [FullCache(model.config, expected) for _ in model.model.layers]
