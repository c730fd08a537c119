"""A checkpoint in the Hugging Face layout, from a folder or the hub, to a `Transformer`.

What this code would compute differently from the reference library is refused.
"""

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model import Config, Transformer
from support.command import UserError


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
