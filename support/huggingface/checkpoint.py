"""A checkpoint in the Hugging Face layout, from a folder or the hub, to a `Transformer`.

What this code would compute differently from the reference library is refused.
"""

import json
import math
import os
import pickle
import reprlib
import tarfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model import Config, Rope, Transformer
from support.command import UserError, first_line

SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 80
shown = SHORT.repr  # a value from a file, as a part of one line


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises `UserError` if it is damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors write a mark first
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be read; fetch it again") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); fetch it again") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}, not a JSON object; fetch it again")
    return data


# ------------------------------------------------------------------------------------- config.json

MOST_LAYERS = 1000
MOST = 2**24  # channels, heads or words; keeps the bytes of every matrix countable in 64 bits


class Settings:
    """The entries of a JSON file, each of the kind and size that it is asked for.

    Kinds are strict, as in the reference library: 12 is a whole number; "12", 12.0 and true are
    not. An entry that is absent has its default, one that is null does not.
    """

    def __init__(self, path: Path):
        self.path, self.entries = path, read_json(path)

    def refuse(self, what: str) -> NoReturn:
        raise UserError(
            f"{self.path}: {what} is not supported; use a plain Llama or Mistral checkpoint"
        )

    def disagree(self, what: str) -> NoReturn:
        raise UserError(f"{self.path}: {what} disagree; remove the one that is not meant")

    def check(self, fits: bool, name: str, value: object, wanted: str) -> None:
        """Raises `UserError` unless `value`, that of the entry `name`, `fits` what is `wanted`."""
        if not fits:
            raise UserError(
                f"{self.path} has a bad value: {name} is {shown(value)}, not {wanted}; "
                "correct it or fetch the file again"
            )

    def whole(self, name: str, default: int | None = None, most: int = MOST) -> int:
        if default is None and name not in self.entries:
            raise UserError(f"{self.path} lacks {name!r}; write it in or fetch the file again")
        value = self.entries.get(name, default)
        fits = type(value) is int and 0 < value <= most
        self.check(fits, name, value, f"a positive whole number up to {most}")
        return value

    def flag(self, name: str) -> bool:
        value = self.entries.get(name, False)
        self.check(isinstance(value, bool), name, value, "true or false")
        return value

    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text. One beyond the vocabulary never comes, and does no harm."""
        value = self.entries.get("eos_token_id")
        ids = [] if value is None else value if isinstance(value, list) else [value]
        fits = all(type(i) is int for i in ids)
        self.check(fits, "eos_token_id", value, "a whole number or a list of them")
        return tuple(ids)


def read_window(c: Settings, mistral: bool, layers: int) -> int | None:
    """The sliding window that all layers have. Raises `UserError` if they differ, or for others.

    As the reference library reads it, not by the names alone: a Llama has no window whatever its
    config says, a Mistral has one unless its config says null, and `use_sliding_window` is for
    other models. (Its forward pass, that is. Its generation forgets a Llama's old tokens if the
    config has a left-over window, so that the two disagree.)
    """
    window = c.entries.get("sliding_window", 4096 if mistral else None)
    fits = window is None or (type(window) is int and window > 0)
    c.check(fits, "sliding_window", window, "a positive whole number or null")
    if c.entries.get("attention_chunk_size") is not None:
        c.refuse("attention in chunks (attention_chunk_size)")
    if c.entries.get("is_causal") not in (None, True):
        c.refuse("attention to later tokens (is_causal)")

    kinds = c.entries.get("layer_types")
    if kinds is None:
        return window if mistral else None
    if not isinstance(kinds, list) or len(kinds) != layers:
        c.check(False, "layer_types", kinds, f"a list of {layers}, one for each layer")
    if all(kind in ("full_attention", "attention") for kind in kinds):
        return None
    if not mistral or window is None or any(kind != "sliding_attention" for kind in kinds):
        c.refuse(f"attention by layer_types {shown(kinds)}")
    return window


LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
NEEDED = {"default": (), "linear": ("factor",), "llama3": LLAMA3}
FLOAT32_MAX = torch.finfo(torch.float32).max  # RoPE's frequencies are computed in 32 bits


def read_rope(c: Settings, rope: dict, max_position_embeddings: int) -> dict:
    """{"rope_theta": ..., "rope_type": ..., what the type needs} from one dict of a config.

    Older configs keep some of it beside the dict. Raises `UserError` for another kind of RoPE, for
    numbers that cannot be meant, and where both places say something and not the same.
    """
    defaults = {
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": max_position_embeddings,
    }
    values = {**defaults, **{k: v for k, v in c.entries.items() if k in defaults}, **rope}
    for name in defaults:
        beside = c.entries.get(name)
        if name in rope and beside is not None and rope[name] != beside:
            c.disagree(f"{name} {shown(beside)} and, in RoPE, {shown(values[name])}")

    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("type") not in (None, kind):
        c.disagree(f"RoPE's rope_type {shown(kind)} and type {shown(rope['type'])}")
    if not isinstance(kind, str) or kind not in NEEDED:
        c.refuse(f"RoPE scaling {shown(kind)}")
    if any(isinstance(value, dict) for value in rope.values()):
        c.refuse("RoPE that differs between layers")
    if values["partial_rotary_factor"] not in (None, 1):
        c.refuse(f"a partial_rotary_factor of {shown(values['partial_rotary_factor'])}")

    result = {"rope_type": kind}
    for name in ("rope_theta", *NEEDED[kind]):
        if name not in values:
            raise UserError(
                f"{c.path}: RoPE scaling {kind!r} needs {name!r}; write it in or fetch it again"
            )
        value = result[name] = values[name]
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if name == "factor":  # one below 1 would shorten the context
            c.check(fits and 1 <= value <= MOST, name, value, f"a number from 1 to {MOST}")
        else:
            # Frequencies grow as theta falls, until their last bit decides what a position means.
            low = 0.1 if name == "rope_theta" else 0
            c.check(
                fits and low < value <= FLOAT32_MAX, name, value, f"a finite number above {low}"
            )
    if kind == "llama3" and result["low_freq_factor"] >= result["high_freq_factor"]:
        low, high = result["low_freq_factor"], result["high_freq_factor"]
        c.check(False, "low_freq_factor", low, f"below the high_freq_factor {high}")
    return result


def read_config(folder: Path) -> Config:
    """`folder/config.json`. Raises `UserError` for what this code would compute wrongly.

    Entries that are absent have the defaults of the reference library, which are not the same for
    a Llama and a Mistral. Sizes have none here: they tell one checkpoint from another.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json; give a folder in the Hugging Face layout")
    c = Settings(path)
    if c.entries.get("model_type") not in ("llama", "mistral"):
        c.refuse(f"model_type {shown(c.entries.get('model_type'))}")
    mistral = c.entries["model_type"] == "mistral"
    if c.entries.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
        c.refuse(f"hidden_act {shown(c.entries['hidden_act'])}")
    if c.entries.get("quantization_config") is not None:
        c.refuse("a quantized checkpoint (quantization_config)")
    for name in ("per_layer_config", "transformers_weights", "configuration_files"):
        if c.entries.get(name):
            c.refuse(f"what {name} says")

    hidden, heads = c.whole("hidden_size"), c.whole("num_attention_heads")
    layers = c.whole("num_hidden_layers", most=MOST_LAYERS)
    for name in ("head_dim", "num_key_value_heads"):
        if c.entries.get(name, 0) is None and (name == "head_dim" or not mistral):
            del c.entries[name]
    kv_heads = c.whole("num_key_value_heads", 8 if mistral else heads)
    head_dim = c.whole("head_dim", hidden // heads)
    if heads % kv_heads or head_dim % 2:
        c.refuse(f"{heads} query heads on {kv_heads} key/value heads of dimension {head_dim}")
    if heads * head_dim > MOST or (hidden % heads and not mistral):
        c.refuse(f"{heads} query heads of dimension {head_dim} for a hidden_size of {hidden}")
    eps = c.entries.get("rms_norm_eps", 1e-6)
    fits = isinstance(eps, float) and 0 <= eps < math.inf
    c.check(fits, "rms_norm_eps", eps, "a finite decimal number from 0, such as 1e-05")

    positions = c.whole("max_position_embeddings", 131072 if mistral else 2048, most=2**31)
    # Since version 5, transformers writes theta and scaling into one dict, `rope_parameters`.
    old, new = c.entries.get("rope_scaling") or None, c.entries.get("rope_parameters")
    for rope in (old, new):
        if rope is not None and not isinstance(rope, dict):
            c.refuse(f"RoPE scaling {shown(rope)}")
    readings = [read_rope(c, rope, positions) for rope in (old, new) if rope]
    rope, *other = readings or [read_rope(c, {}, positions)]
    # The reference library takes rope_scaling then, and forgets the rest: right for a scaling that
    # was added by hand, where the new dict has none.
    plain = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    if other and other[0] not in (rope, plain):
        c.disagree("rope_scaling and rope_parameters")
    theta = rope.pop("rope_theta")

    ends = c.ends()
    generation = folder / "generation_config.json"  # chat models list further ends of a turn here
    if generation.is_file():  # then config.json's do not count, nor in the reference library
        ends = Settings(generation).ends()
    config = Config(
        vocab_size=c.whole("vocab_size"),
        hidden_size=hidden,
        intermediate_size=c.whole("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=eps,
        rope_theta=float(theta),
        rope_scaling=None if rope["rope_type"] == "default" else rope,
        max_position_embeddings=positions,
        tie_word_embeddings=c.flag("tie_word_embeddings"),
        attention_bias=not mistral and c.flag("attention_bias"),
        mlp_bias=not mistral and c.flag("mlp_bias"),
        sliding_window=read_window(c, mistral, layers),
        eos_token_ids=ends,
    )
    if not Rope(config).frequencies.isfinite().all():
        c.check(False, "rope_theta", theta, "one that gives finite frequencies")
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
        raise UserError(
            f"no folder {path}, and the hub did not give that repository: {first_line(error)}"
        ) from None
    return folder


# ----------------------------------------------------------------------------------------- weights

# What a damaged safetensors file raises. A damaged pickle raises nearly anything.
UNREADABLE = (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError)


def damaged(file: Path, error: Exception) -> UserError:
    return UserError(f"{file} is damaged ({first_line(error)}); fetch it again")


def shards_of(index: Path) -> list[Path]:
    """The files that an index names, each once. Raises `UserError` for any outside its folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map; fetch it again")
    names = list(weight_map.values())
    for name in names:
        plain = isinstance(name, str) and Path(name).name == name and "\\" not in name
        if not plain or name in ("", ".."):
            raise UserError(
                f"{index} names a shard {shown(name)}, not a file beside it; fetch it again"
            )
    return [index.parent / name for name in sorted(set(names))]


def read_bin(file: Path) -> dict:
    """What PyTorch saved in `file`, names to weights. Raises `UserError` for anything else."""
    try:
        with open(file, "rb") as opened:
            # Since PyTorch 1.6 it is a zip archive, read as it is used; older ones are read whole.
            mapped = opened.read(4) == b"PK\x03\x04"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles in other protocols; an error follows
            shard = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        if not isinstance(shard, dict):
            raise ValueError(f"a {type(shard).__name__}, not a dict of weights")
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError:
        raise UserError(
            f"{file} is damaged, or more than a dict of tensors; fetch it again, or save its "
            "weights as safetensors"
        ) from None
    except Exception as error:
        if "tar" in str(error) and tarfile.is_tarfile(file):
            raise UserError(
                f"{file} has the format of PyTorch 0.1, which is not read safely; save it again "
                "with a newer PyTorch"
            ) from None
        raise damaged(file, error) from None
    shard = {name: value for name, value in shard.items() if name != "_metadata"}
    nested = [name for name, value in shard.items() if isinstance(value, dict)]
    if nested:
        raise UserError(
            f"{file} keeps weights under {shown(nested[0])}, as a training state does; save "
            "that part alone with torch.save"
        )
    return shard


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) of every weight, one at a time, from whichever files `folder` has."""
    for kind in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{kind}.index.json"
        if (folder / kind).is_file():
            files = [folder / kind]
        elif index.is_file():
            files = shards_of(index)
        else:
            continue
        for file in files:
            try:
                if kind.endswith(".bin"):
                    yield from read_bin(file).items()
                    continue
                with safe_open(file, framework="pt") as shard:
                    for name in shard.keys():  # noqa: SIM118 (not a dict)
                        yield name, shard.get_tensor(name)
            except FileNotFoundError:
                raise UserError(f"{file} is missing; fetch the checkpoint again") from None
            except UserError:
                raise
            except UNREADABLE as error:
                raise damaged(file, error) from None
        return
    raise UserError(
        f"{folder} has neither model.safetensors nor pytorch_model.bin, nor their index"
    )


def check_weight(folder: Path, name: str, tensor: Tensor, wanted: dict[str, Tensor]) -> None:
    """Raises `UserError` unless the model has such a weight, of this shape and of real numbers."""
    if name not in wanted or not isinstance(tensor, Tensor):
        raise UserError(
            f"{folder}: unexpected weight {shown(name)}; no plain Llama or Mistral has it, "
            "or config.json belongs to another model"
        )
    if tensor.shape != wanted[name].shape:
        raise UserError(
            f"{folder}: {name} has shape {tuple(tensor.shape)}, but config.json asks for "
            f"{tuple(wanted[name].shape)}; fetch both again"
        )
    if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
        kind = "no values" if tensor.is_meta else f"{tensor.dtype}, {tensor.layout}"
        raise UserError(
            f"{folder}: {name} holds {kind}, not plain decimal numbers; use a checkpoint that is "
            "not quantized"
        )


def converted(
    folder: Path, name: str, tensor: Tensor, device: str | torch.device, dtype: torch.dtype
) -> Tensor:
    """The weight on `device` in `dtype`. Raises `UserError` if that, or the file, has numbers that
    are not finite."""
    weight = tensor.to(device, dtype)
    if not weight.isfinite().all():
        if tensor.isfinite().all():
            kind = str(dtype).removeprefix("torch.")
            what = f"{name} has numbers that {kind} cannot hold"
            raise UserError(f"{folder}: {what}; try --dtype bfloat16")
        raise UserError(f"{folder}: {name} has numbers that are not finite; fetch it again")
    return weight


def tie(weights: dict[str, Tensor]) -> bool:
    """Makes embedding and output matrix one tensor, whichever of them the file has.

    Returns False and leaves them where it has both and they differ. The reference library then
    goes by the file, not by the config.
    """
    names = ("model.embed_tokens.weight", "lm_head.weight")
    present = [weights[name] for name in names if name in weights]
    if len(present) == 2 and not torch.equal(*present):
        return False
    if present:
        weights.update(dict.fromkeys(names, present[0]))
    return True


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
    weights = {}
    for name, tensor in read_weights(folder):
        if str(name).endswith("rotary_emb.inv_freq"):
            continue  # derived from the config
        check_weight(folder, name, tensor, wanted)
        weights[name] = converted(folder, name, tensor, device, dtype)
    if config.tie_word_embeddings and not tie(weights):
        with torch.device("meta"):
            model = Transformer(replace(config, tie_word_embeddings=False))
    missing = sorted(set(wanted) - set(weights))
    if missing:
        raise UserError(
            f"{folder}: weight {missing[0]} is missing ({len(missing)} in all); fetch it again"
        )
    model.load_state_dict(weights, strict=True, assign=True)
    if model.config.tie_word_embeddings:  # assign made two parameters of one tensor
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(False).eval()
