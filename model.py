"""The frozen model: Llama and Mistral in plain PyTorch, and the cache they are usually run with.

Nothing in here knows of compression. A checkpoint in the Hugging Face layout loads strictly,
because every module has its Hugging Face name. The one unusual thing is where attention lives:
the `Attention` module only projects; a `LayerCache` remembers and attends. Caches that compress
are further subclasses of `LayerCache`, in other files.

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

import argparse
import json
import math
import os
import pickle
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn


class UserError(ValueError):
    """A mistake that the user can mend. Command lines print it as one line and exit with 2."""


# ------------------------------------------------------------------------------------- config


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
        linear = self.rope_scaling is not None and self.rope_scaling["rope_type"] == "linear"
        return int(self.max_position_embeddings * (self.rope_scaling["factor"] if linear else 1))


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises `UserError` if it is damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); fetch it again") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}, not a JSON object; fetch it again")
    return data


def read_config(folder: Path) -> Config:
    """`folder/config.json`. Raises `UserError` for what this code would compute wrongly."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json; give a folder in the Hugging Face layout")
    c = read_json(path)

    def refuse(what: str) -> None:
        raise UserError(f"{path}: {what} is not supported; use a plain Llama or Mistral checkpoint")

    if c.get("model_type") not in ("llama", "mistral"):
        refuse(f"model_type {c.get('model_type')!r}")
    if c.get("hidden_act", "silu") != "silu":
        refuse(f"hidden_act {c['hidden_act']!r}")
    if c.get("quantization_config"):
        refuse("a quantized checkpoint (quantization_config)")

    # Since version 5, transformers writes theta and scaling into one dict, `rope_parameters`.
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        refuse(f"RoPE scaling {rope!r}")
    rope = dict(rope)
    theta = rope.pop("rope_theta", c.get("rope_theta", 10000.0))
    rope["rope_type"] = rope.pop("type", rope.get("rope_type", "default"))
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        refuse(f"RoPE scaling {rope['rope_type']!r}")
    wanted = {"default": [], "linear": ["factor"]}.get(
        rope["rope_type"],
        ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
    )
    missing = [key for key in wanted if not isinstance(rope.get(key), int | float)]
    if missing:
        raise UserError(f"{path}: RoPE scaling {rope['rope_type']!r} needs {missing[0]!r}")

    eos = c.get("eos_token_id")
    generation = folder / "generation_config.json"  # chat models list further ends of a turn here
    if generation.is_file():
        eos = read_json(generation).get("eos_token_id", eos)
    try:
        heads = int(c["num_attention_heads"])
        config = Config(
            vocab_size=int(c["vocab_size"]),
            hidden_size=int(c["hidden_size"]),
            intermediate_size=int(c["intermediate_size"]),
            num_hidden_layers=int(c["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(c.get("num_key_value_heads") or heads),
            head_dim=int(c.get("head_dim") or c["hidden_size"] // heads),
            rms_norm_eps=float(c["rms_norm_eps"]),
            rope_theta=float(theta),
            rope_scaling=None if rope["rope_type"] == "default" else rope,
            max_position_embeddings=int(c["max_position_embeddings"]),
            tie_word_embeddings=bool(c.get("tie_word_embeddings", False)),
            attention_bias=bool(c.get("attention_bias", False)),
            mlp_bias=bool(c.get("mlp_bias", False)),
            sliding_window=None if c.get("sliding_window") is None else int(c["sliding_window"]),
            eos_token_ids=tuple(eos if isinstance(eos, list) else [] if eos is None else [eos]),
        )
    except KeyError as error:
        raise UserError(f"{path} lacks {error}; fetch it again") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{path} has a bad value ({error}); fetch it again") from None
    for name, value in vars(config).items():
        if type(value) is int and value < 1:
            raise UserError(f"{path}: {name} is {value}, not positive; fetch it again")
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        refuse(
            f"{heads} query heads on {config.num_key_value_heads} key/value heads of dimension "
            f"{config.head_dim}"
        )
    return config


# --------------------------------------------------------------------------------------- RoPE


class Rope:
    """Rotary position embedding [2]: at position t, the channel pair f is turned by t * w_f.

    A head's D channels form D/2 pairs; Hugging Face checkpoints pair them half-split, (f, f + D/2).
    `cis[t, f]` = exp(i t w_f), so turning a pair is one complex multiplication.
    """

    def __init__(self, config: Config):
        D = config.head_dim
        w = config.rope_theta ** (-torch.arange(0, D, 2, device="cpu", dtype=torch.float32) / D)
        scaling = config.rope_scaling or {"rope_type": "default"}
        if scaling["rope_type"] == "linear":  # [4]: positions shrink by the factor
            w = w / scaling["factor"]
        elif scaling["rope_type"] == "llama3":  # [5]: only slow rotations shrink, with a ramp
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            turns = scaling["original_max_position_embeddings"] * w / (2 * math.pi)
            ramp = ((turns - low) / (high - low)).clamp(0, 1)
            w = ramp * w + (1 - ramp) * w / scaling["factor"]
        self.frequencies = w  # [D/2]
        self.cos = self.sin = torch.empty(0, D // 2)  # [positions, D/2]
        self.cis = torch.empty(0, D // 2, dtype=torch.complex64)

    def reach(self, length: int, device: torch.device) -> None:
        """Extends the tables to `length` positions on `device`."""
        if length > len(self.cos) or self.cos.device != device:
            t = torch.arange(-(-length // 1024) * 1024, dtype=torch.float32)
            angle = torch.outer(t, self.frequencies)  # [positions, D/2]
            self.cos, self.sin = angle.cos().to(device), angle.sin().to(device)
            self.cis = torch.complex(self.cos, self.sin)

    def rotate(self, x: Tensor, start: int) -> Tensor:
        """Turns x [..., T, D], half-split, standing at positions start .. start + T - 1."""
        stop = start + x.shape[-2]
        cos, sin = self.cos[start:stop].to(x.dtype), self.sin[start:stop].to(x.dtype)  # [T, D/2]
        x1, x2 = x.chunk(2, dim=-1)  # [..., T, D/2] each
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


# -------------------------------------------------------------------------------------- caches


def causal_attention(q: Tensor, k: Tensor, v: Tensor, sliding_window: int | None = None) -> Tensor:
    """Token i attends to the tokens j <= i, with i - j < sliding_window if that is set.

    q [B, H, T, D] and k, v [B, H_kv, T, D], q and k rotated -> [B, H, T, D].
    """
    T = q.shape[-2]
    mask = None
    if sliding_window is not None and sliding_window < T:
        j = torch.arange(T, device=q.device)
        i = j[:, None]
        mask = (j <= i) & (j > i - sliding_window)  # [T, T]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )


class LayerCache:
    """One layer's memory of one batch of sequences of equal length, and the attention over it.

    Subclasses say what is remembered. Keys arrive before RoPE, since that is where caches differ:
    some store rotated keys, some rebuild keys and rotate those, some renumber the positions.

        x    [B, T, hidden]     the layer's normed input, which keys and values are projected from
        q    [B, H, T, D]       queries, before RoPE
        k, v [B, H_kv, T, D]    keys and values, k before RoPE
        out  [B, H, T, D]
    """

    length = 0  # tokens seen
    exact_prefill = True  # its output is that of plain attention, so that several caches can share

    def prefill(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        """The whole prompt at once, on an empty cache."""
        raise NotImplementedError

    def decode(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        """One new token (T = 1), after a prefill."""
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        """Every tensor that this layer keeps for the sequence."""
        raise NotImplementedError

    def nbytes(self) -> int:
        """Bytes of the memory behind `tensors()`, room for tokens to come included."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors())

    def check_prefill(self) -> None:
        if self.length:
            raise ValueError(f"prefill on a cache that holds {self.length} tokens; make a new one")

    def check_decode(self, q: Tensor) -> None:
        if not self.length:
            raise ValueError("decode on an empty cache; prefill the prompt first")
        if q.shape[-2] != 1:
            raise ValueError(f"decode takes one token a step, got {q.shape[-2]}")


GROW = 256  # tokens that a full buffer grows by: a copy every 256 steps, never one a step


def reserve(buffer: Tensor, length: int, most: int | None = None) -> Tensor:
    """`buffer` [..., capacity, C], or a larger copy for `length` tokens (`most` is the limit)."""
    capacity = buffer.shape[-2]
    if length <= capacity or capacity == most:
        return buffer
    room = length - 1 + GROW if most is None else min(length - 1 + GROW, most)
    larger = buffer.new_empty(*buffer.shape[:-2], room, buffer.shape[-1])
    larger[..., :capacity, :] = buffer
    return larger


class FullCache(LayerCache):
    """The usual cache: every token's rotated key and its value, in the model's precision.

    `expected` is the final length, if the caller knows it: memory is then taken once. Under a
    sliding window old tokens are kept, but not attended.
    """

    def __init__(self, config: Config, expected: int = 0):
        self.expected, self.sliding_window = expected, config.sliding_window

    def prefill(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        self.check_prefill()
        B, H_kv, T, D = k.shape
        q, k = rope.rotate(q, 0), rope.rotate(k, 0)
        self.k = k.new_empty(B, H_kv, max(T, self.expected), D)
        self.v = torch.empty_like(self.k)
        self.k[:, :, :T], self.v[:, :, :T] = k, v
        self.length = T
        return causal_attention(q, k, v, self.sliding_window)

    def decode(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        self.check_decode(q)
        t = self.length
        self.k, self.v = reserve(self.k, t + 1), reserve(self.v, t + 1)
        self.k[:, :, t], self.v[:, :, t] = rope.rotate(k, t)[:, :, 0], v[:, :, 0]
        self.length = t + 1
        start = max(0, self.length - (self.sliding_window or self.length))
        k, v = self.k[:, :, start : t + 1], self.v[:, :, start : t + 1]
        return F.scaled_dot_product_attention(rope.rotate(q, t), k, v, enable_gqa=True)

    def tensors(self) -> list[Tensor]:
        return [self.k, self.v] if self.length else []


# --------------------------------------------------------------------------------------- model


class RMSNorm(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)  # 16-bit x: in float32 inside


class Attention(nn.Module):
    """Projects; `cache` remembers and attends. Without one, plain causal attention."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        q_out, bias = config.num_attention_heads * config.head_dim, config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, q_out, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, config.d_kv, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, config.d_kv, bias=bias)
        self.o_proj = nn.Linear(q_out, config.hidden_size, bias=bias)

    def forward(self, x: Tensor, rope: Rope, cache: LayerCache | None) -> Tensor:
        B, T, _ = x.shape
        # [B, T, heads * D] -> [B, heads, T, D]
        q, k, v = (
            proj(x).view(B, T, -1, self.config.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is None:
            q, k = rope.rotate(q, 0), rope.rotate(k, 0)
            out = causal_attention(q, k, v, self.config.sliding_window)
        elif T > 1 or cache.length == 0:
            out = cache.prefill(x, q, k, v, rope)
        else:
            out = cache.decode(x, q, k, v, rope)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))  # [B, T, hidden]


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        h, m, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(h, m, bias=bias)
        self.up_proj = nn.Linear(h, m, bias=bias)
        self.down_proj = nn.Linear(m, h, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.silu(self.gate_proj(x)), self.up_proj(x)  # [B, T, intermediate] each
        # In place where no gradient needs `gate`: fresh memory of this size is slow on a CPU.
        return self.down_proj(gate * up if gate.requires_grad else gate.mul_(up))


class Layer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: Rope, cache: LayerCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Everything below the output matrix; `model.` in a checkpoint's names."""

    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)


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

    def forward(
        self, tokens: Tensor, cache: list[LayerCache] | None = None, logits_to_keep: int = 0
    ) -> Tensor:
        """tokens [B, T] -> logits [B, T, vocab], or of the last `logits_to_keep` tokens only.

        An empty cache takes the whole prompt, later calls one token each. Sequences of a batch
        have equal length: there is no padding. Raises `ValueError` past the context length.
        """
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens must be [B, T] with T > 0, got {tuple(tokens.shape)}")
        if cache is not None and len(cache) != len(self.model.layers):
            raise ValueError(f"{len(cache)} caches for {len(self.model.layers)} layers")
        length = tokens.shape[1] + (cache[0].length if cache else 0)
        if length > self.config.context_length:
            raise ValueError(f"{length} tokens, but the context is {self.config.context_length}")
        self.rope.reach(length, tokens.device)
        x = self.model.embed_tokens(tokens)  # [B, T, hidden]
        for i, layer in enumerate(self.model.layers):
            x = layer(x, self.rope, cache[i] if cache else None)
        return self.lm_head(self.model.norm(x[:, -logits_to_keep:]))


def full_cache(model: Transformer, expected: int = 0) -> list[LayerCache]:
    """A full cache for one batch of sequences of `model`, `expected` tokens long in the end."""
    return [FullCache(model.config, expected) for _ in model.model.layers]


# ------------------------------------------------------------------------------------- loading


def find_checkpoint(path: str | Path) -> Path:
    """The folder of a checkpoint: `path` itself, or the hub repository of that name, fetched."""
    folder = Path(path)
    if os.path.isdir(path):  # unlike Path.is_dir, False for a name that is too long to be one
        return folder
    parts = str(path).split("/")
    # `weights/x` looks like a hub name: a first part that is a folder here means a missing path.
    if len(parts) != 2 or not all(parts) or os.path.exists(parts[0]):
        raise UserError(
            f"no folder {path}; give a checkpoint folder or a hub name such as org/name"
        )
    from huggingface_hub import snapshot_download  # slow to import, and not needed for a folder

    small = ["*.json", "*.jinja", "tokenizer.model"]
    try:
        folder = Path(snapshot_download(str(path), allow_patterns=[*small, "model*.safetensors"]))
        if not list(folder.glob("model*.safetensors")):
            folder = Path(
                snapshot_download(str(path), allow_patterns=[*small, "pytorch_model*.bin"])
            )
    except Exception as error:  # the hub client raises many kinds, all of which mean the same here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"no folder {path}, and the hub did not give that repository: {reason}"
        ) from None
    return folder


# What the two file formats raise for a damaged file, or for a pickle that is more than tensors.
UNREADABLE = (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError)
UNREADABLE += (pickle.UnpicklingError,)


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) of every weight, one at a time, from whichever files `folder` has."""
    for kind in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{kind}.index.json"
        if (folder / kind).is_file():
            files = [folder / kind]
        elif index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise UserError(f"{index} has no weight_map; fetch it again")
            files = [folder / name for name in sorted(set(weight_map.values()))]
        else:
            continue
        for file in files:
            try:
                if kind.endswith(".bin"):
                    shard = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                    if not isinstance(shard, dict):
                        raise ValueError(f"a {type(shard).__name__}, not a dict of weights")
                    yield from shard.items()
                    continue
                with safe_open(file, framework="pt") as shard:
                    for name in shard.keys():  # noqa: SIM118 (not a dict)
                        yield name, shard.get_tensor(name)
            except FileNotFoundError:
                raise UserError(f"{file} is missing; fetch the checkpoint again") from None
            except UserError:
                raise
            except UNREADABLE as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise UserError(f"{file} is damaged ({reason}); fetch it again") from None
        return
    raise UserError(
        f"{folder} has neither model.safetensors nor pytorch_model.bin, nor their index"
    )


def load_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer:
    """Loads a checkpoint folder (Hugging Face layout) or fetches a hub repository.

    Strict: every weight must be there, none may be left over, every shape must fit. The model is
    laid out without memory (meta device), then filled one tensor at a time, so the weights are
    never held twice. Raises `UserError` for whatever is wrong with the files.
    """
    folder = find_checkpoint(path)
    config = read_config(folder)
    with torch.device("meta"):
        model = Transformer(config)
    wanted = model.state_dict()
    tied = config.tie_word_embeddings
    weights = {}
    for name, tensor in read_weights(folder):
        if str(name).endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
            continue  # derived from the config, or a second copy of the embedding
        if name not in wanted or not isinstance(tensor, Tensor):
            raise UserError(
                f"{folder}: unexpected weight {name}; config.json belongs to another model"
            )
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"{folder}: {name} has shape {tuple(tensor.shape)}, but config.json asks for "
                f"{tuple(wanted[name].shape)}; fetch both again"
            )
        weights[name] = tensor.to(device, dtype)
    if tied and "model.embed_tokens.weight" in weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    missing = sorted(set(wanted) - set(weights))
    if missing:
        raise UserError(
            f"{folder}: weight {missing[0]} is missing ({len(missing)} in all); fetch it again"
        )
    model.load_state_dict(weights, strict=True, assign=True)
    if tied:  # assign made two parameters of one tensor
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(False).eval()


# ----------------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """Text to token ids and back, and an instruct model's chat template."""

    def __init__(self, backend, settings: dict, template: str | None):
        backend.no_truncation()  # settings that some files carry over from training
        backend.no_padding()
        self.backend = backend  # a tokenizers.Tokenizer
        self.settings = settings  # tokenizer_config.json
        self.template = template  # jinja source, None for a model that does not chat

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; `special` adds what the model wants around a text, such as <s>.

        Raises `UserError` for text that is not valid Unicode.
        """
        if any("\ud800" <= c <= "\udfff" for c in text):  # how Python spells what is no UTF-8
            raise UserError("the text is not valid UTF-8; check where it was cut")
        return self.backend.encode(text, add_special_tokens=special).ids

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=True)

    def chat(self, messages: list[dict[str, str]]) -> str:
        """Messages {"role", "content"} as one prompt that ends where the answer begins.

        It holds its special tokens already: encode it with special=False. Raises `UserError` for a
        model without a template and for messages that the template refuses.
        """
        if self.template is None:
            raise UserError("this model has no chat template; give the prompt as it is (--no-chat)")
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # templates come with downloads

        def fail(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = json.dumps  # jinja's own escapes HTML
        environment.globals |= {"raise_exception": fail, "strftime_now": time.strftime}
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        special = {name: token_text(self.settings.get(name)) for name in names}
        try:
            template = environment.from_string(self.template)
            return template.render(messages=messages, add_generation_prompt=True, **special)
        except TemplateError as error:
            raise UserError(f"the chat template fails: {error}; try --no-chat") from None


def token_text(token: str | dict | None) -> str:
    """A special token's text; configs write it plain or as {"content": ...}."""
    return token["content"] if isinstance(token, dict) else token or ""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A checkpoint's tokenizer: `tokenizer.json`, or else the SentencePiece `tokenizer.model`."""
    import tokenizers

    folder = find_checkpoint(path)
    settings = {}
    if (folder / "tokenizer_config.json").is_file():
        settings = read_json(folder / "tokenizer_config.json")
    if (file := folder / "tokenizer.json").is_file():
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{file} is damaged ({error}); fetch it again") from None
    elif (file := folder / "tokenizer.model").is_file():
        backend = read_sentencepiece(file, settings)
    else:
        raise UserError(f"{folder} has neither tokenizer.json nor tokenizer.model; fetch it again")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {t["name"]: t["template"] for t in template}.get("default")
    if (file := folder / "chat_template.jinja").is_file():
        template = file.read_text(encoding="utf-8")
    return Tokenizer(backend, settings, template)


def protobuf_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields (field number, value) of one protobuf message; nested messages stay bytes."""
    i = 0

    def varint() -> int:  # 7 bits a byte, least significant first; the top bit says "more"
        nonlocal i
        value = shift = 0
        while True:
            byte = data[i]
            i += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while i < len(data):
        key = varint()
        wire = key & 7
        if wire == 0:
            yield key >> 3, varint()
            continue
        size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        if i + size > len(data):
            raise ValueError("it ends in the middle of a field")
        yield key >> 3, data[i : i + size]
        i += size


def read_sentencepiece(file: Path, settings: dict):
    """A SentencePiece BPE model as a `tokenizers.Tokenizer`.

    SentencePiece merges the neighbours whose union is the piece of the best score, which for BPE is
    the piece learned first; the tokenizers library wants those merges spelled out, in that order.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, processors

    NORMAL, UNKNOWN, USER_DEFINED, BYTE = 1, 2, 4, 6  # sentencepiece_model.proto, Type
    pieces, trainer, normalizer = [], {}, {}
    try:
        for number, value in protobuf_fields(file.read_bytes()):
            if number == 1:  # text, score, type
                piece = {3: NORMAL, **dict(protobuf_fields(value))}
                pieces.append((piece[1].decode(), struct.unpack("<f", piece[2])[0], piece[3]))
            elif number == 2:
                trainer = dict(protobuf_fields(value))
            elif number == 3:
                normalizer = dict(protobuf_fields(value))
    except (OSError, ValueError, KeyError, IndexError, TypeError, struct.error) as error:
        raise UserError(f"{file} is damaged ({error!r}); fetch it again") from None
    if not pieces or trainer.get(3) != 2:  # 2: BPE
        raise UserError(f"{file} is not a SentencePiece BPE model; convert it to tokenizer.json")
    if normalizer.get(2) or normalizer.get(4, 1):  # a character map; spaces squeezed (the default)
        raise UserError(
            f"{file} normalizes text, which is not supported; convert it to tokenizer.json"
        )

    vocab = {text: i for i, (text, _, _) in enumerate(pieces)}
    mergeable = {text for text, _, kind in pieces if kind == NORMAL}
    merges = []
    for text, score, kind in pieces:
        if kind == NORMAL:
            for cut in range(1, len(text)):
                left, right = text[:cut], text[cut:]
                if left in mergeable and right in mergeable:
                    merges.append((-score, vocab[left], vocab[right], left, right))
    unknown = next((text for text, _, kind in pieces if kind == UNKNOWN), None)
    byte_fallback = any(kind == BYTE for _, _, kind in pieces)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab,
            [(left, right) for *_, left, right in sorted(merges)],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    )
    for text, _, kind in pieces:
        if kind not in (NORMAL, BYTE):
            token = tokenizers.AddedToken(text, normalized=False, special=kind != USER_DEFINED)
            backend.add_tokens([token])
    # A space is the letter "▁", and one stands before the text (add_dummy_prefix, on by default),
    # before the text behind a special token too: chat models were trained that way.
    prefix = [normalizers.Prepend("▁")] if normalizer.get(3, 1) else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    if settings.get("add_bos_token", True):
        bos = token_text(settings.get("bos_token")) or "<s>"
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocab[bos])]
        )
    return backend


# ------------------------------------------------------------------------------ command lines


class Arguments(argparse.ArgumentParser):
    """argparse, with a wrong argument as one line instead of the whole usage text."""

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see --help)")


LARGEST = 2**31  # no count of tokens, no seed needs more


def number(kind: type, low: float, high: float = LARGEST):
    """For argparse's `type`: an int or a float in [low, high]."""

    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            word = "a whole number" if kind is int else "a number"
            limits = f"of at least {low}" if high == LARGEST else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {word} {limits}")
        return value

    return read


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_device(name: str) -> None:
    """Raises `UserError` unless tensors can live on the device called `name`."""
    try:
        torch.empty(1, device=name).item()
    except (RuntimeError, AssertionError):
        raise UserError(f"no device {name!r} here; use --device cpu") from None


def numbers(kind: type, low: float, high: float = LARGEST):
    """For argparse's `type`: numbers with commas between them, each as `number` reads it."""

    def read(text: str) -> list[int | float]:
        values = [number(kind, low, high)(word) for word in text.split(",")]
        if len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"{text!r} has a number twice")
        return values

    return read


def check_folder(path: Path | None) -> None:
    """Raises `UserError` if `path` cannot be written or replaced: before the work, not after."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise UserError(f"no folder {path.parent} to write {path.name} in; make it first")
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file to replace; choose another place")
        with NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".tmp"):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}); choose another place") from None


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name to write a file under; it takes the name `path` only when it is complete."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written ({error}); choose another place") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def run_command(command: Callable[[], None]) -> None:
    """Runs a command line and exits: 0, or 2 with one line on standard error for a `UserError`."""
    try:
        command()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        print("error: out of GPU memory; try --dtype bfloat16 or a shorter text", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
