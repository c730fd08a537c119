"""A checkpoint in the Hugging Face layout, from a folder or the hub, to a `Transformer`.

What this code would compute differently from the reference library is refused.
"""

import json
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from model import Config, Transformer
from support.command import UserError, first_line


def read_json(path: Path, needed: bool = True) -> dict:
    """A JSON object from a file, {} for one that is not there if it is not `needed`. Raises
    `UserError` if it is damaged."""
    if not needed and not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors write a mark first
        if not isinstance(data, dict):
            raise ValueError(f"a {type(data).__name__}, not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        problem = f"cannot be read as JSON ({first_line(error)})"
        raise UserError(f"{path} {problem}; correct it or fetch it again") from None
    return data


def find_checkpoint(path: str | Path) -> Path:
    """The folder of a checkpoint: `path` itself, or the hub repository of that name, fetched."""
    if os.path.isdir(path):  # unlike Path.is_dir, False for a name that is too long to be one
        return Path(path)
    first, *others = str(path).split("/")
    if first in ("", ".", "..") or len(others) != 1 or not others[0]:
        raise UserError(f"no folder {path}; give one, or a hub name such as org/name")
    # Where there is a folder `weights`, `weights/x` is no hub name but a missing path, or a
    # repository that the hub gave before.
    local = os.path.lexists(first)
    from huggingface_hub import snapshot_download  # slow to import, and not needed for a folder

    try:
        for weights in ("model*.safetensors", "pytorch_model*.bin"):
            patterns = ["*.json", "*.jinja", "tokenizer.model", weights]
            found = snapshot_download(str(path), allow_patterns=patterns, local_files_only=local)
            if any(Path(found).glob(weights)):
                break
    except Exception as error:  # the hub client raises many kinds, all of which mean the same here
        problem = f"the hub did not give that repository: {first_line(error)}"
        if local:
            problem = f"none that the hub gave before. It is not asked, for {first} is here; "
            problem += "correct the path, or start in another folder"
        raise UserError(f"no folder {path}, and {problem}") from None
    return Path(found)


# ------------------------------------------------------------------------------------- config.json

MOST = 2**24  # channels, heads or words; keeps the bytes of every matrix countable in 64 bits
NOTHING = (None, False, [], {})
PLAIN = {  # entries that change the computation, and the values that leave it as it is
    "model_type": ("llama", "mistral"),
    "hidden_act": ("silu", "swish"),  # two names of one function
    "is_causal": (True, None),
    "attention_chunk_size": (None,),
    "quantization_config": (None,),
    "per_layer_config": NOTHING,
    "transformers_weights": NOTHING,
    "configuration_files": NOTHING,
}


def check(fits: bool, problem: str) -> None:
    if not fits:
        raise ValueError(problem)


def whole(c: dict, name: str, default: int | None = None, most: int = MOST) -> int:
    """Strict, as in the reference library: "12", 12.0 and true are no whole numbers."""
    value = c.get(name)
    if value is None:
        value = default
    fits = type(value) is int and 0 < value <= most
    check(fits, f"{name} is {value!r:.80}, not a positive whole number up to {most}")
    return value


def flag(c: dict, name: str) -> bool:
    value = c.get(name, False)
    check(isinstance(value, bool), f"{name} is {value!r:.80}, neither true nor false")
    return value


def read_ends(c: dict) -> tuple[int, ...]:
    """The tokens that end a text. One beyond the vocabulary never comes, and does no harm."""
    value = c.get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    fits = {type(i) for i in ids} <= {int}
    check(fits, f"eos_token_id is {value!r:.80}, not a whole number or a list of them")
    return tuple(ids)


def read_window(c: dict, mistral: bool, layers: int) -> int | None:
    """The sliding window that all layers have, as the reference library's forward pass reads it:
    a Llama has none whatever its config says, a Mistral has one unless its config says null, and
    `use_sliding_window` is for other models."""
    window = c.get("sliding_window", 4096 if mistral else None)
    fits = window is None or (type(window) is int and window > 0)
    check(fits, f"sliding_window is {window!r:.80}, not a positive whole number or null")
    types = c.get("layer_types")
    if types is None:
        return window if mistral else None
    if types in (["full_attention"] * layers, ["attention"] * layers):
        return None
    sliding = types == ["sliding_attention"] * layers and mistral and window is not None
    check(sliding, f"attention by layer_types {types!r:.80} is not supported")
    return window


TRAINED = "original_max_position_embeddings"
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", TRAINED)
NEEDED = {"default": (), "linear": ("factor",), "llama3": LLAMA3}
# RoPE's frequencies are computed in 32 bits. They grow as theta falls, until their last bit
# decides what a position means.
LEAST, LARGEST = 0.1, 1e38


def read_rope(c: dict, positions: int) -> tuple[float, dict | None]:
    """RoPE's theta, and its scaling: the type and the numbers that this type needs. As in the
    reference library, `rope_scaling` goes before the newer `rope_parameters`, and what stands in
    there before what stands beside it, except the length that the model was trained for."""
    rope = c.get("rope_scaling") or c.get("rope_parameters") or {}
    check(isinstance(rope, dict), f"RoPE scaling {rope!r:.80} is not supported")
    by_layer = any(isinstance(value, dict) for value in rope.values())
    check(not by_layer, "RoPE that differs between layers is not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    fits = isinstance(kind, str) and kind in NEEDED
    check(fits, f"RoPE scaling {kind!r:.80} is not supported")

    given = {"rope_theta": 10000.0, TRAINED: positions, **c, **rope}
    if TRAINED in c:
        given[TRAINED] = c[TRAINED]
    rotated = given.get("partial_rotary_factor")
    check(rotated in (None, 1), f"a partial_rotary_factor of {rotated!r:.80} is not supported")
    for name in ("rope_theta", *NEEDED[kind]):
        value = given.get(name)
        fits = type(value) in (int, float) and LEAST <= value <= LARGEST
        check(fits, f"{name} is {value!r:.80}, not a number from {LEAST} to {LARGEST}")
    theta = float(given["rope_theta"])
    if kind == "default":
        return theta, None
    scaling = {"rope_type": kind} | {name: given[name] for name in NEEDED[kind]}
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        check(low < high, f"low_freq_factor is {low}, not below the high_freq_factor {high}")
    return theta, scaling


def read_config(folder: Path) -> Config:
    """`folder/config.json`. Raises `UserError` for what this code would compute wrongly. Entries
    that are absent have the reference library's defaults, but sizes have none."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json; give a folder in the Hugging Face layout")
    c = {"model_type": None, **read_json(path)}
    generation = folder / "generation_config.json"  # chat models list more ends of a turn here
    if generation.is_file():  # then config.json's do not count, nor in the reference library
        c["eos_token_id"] = read_json(generation).get("eos_token_id")
    try:
        return interpret(c)
    except ValueError as error:
        mend = "use a plain Llama or Mistral that is not quantized, or correct its config"
        raise UserError(f"{folder}: {error}; {mend}") from None


def interpret(c: dict) -> Config:
    for name, values in PLAIN.items():
        if name in c:
            check(c[name] in values, f"{name} {c[name]!r:.80} is not supported")
    mistral = c["model_type"] == "mistral"
    hidden = whole(c, "hidden_size")
    heads = whole(c, "num_attention_heads")
    layers = whole(c, "num_hidden_layers", most=1000)
    kv_heads = whole(c, "num_key_value_heads", 8 if mistral else heads)
    head_dim = whole(c, "head_dim", hidden // heads)
    even = heads % kv_heads == 0 and head_dim % 2 == 0 and (mistral or hidden % heads == 0)
    shapes = f"{heads} query heads on {kv_heads} key/value heads of dimension {head_dim}"
    check(even and heads * head_dim <= MOST, f"{shapes} for hidden_size {hidden} are not supported")
    eps = c.get("rms_norm_eps", 1e-6)
    fits = isinstance(eps, float) and 0 <= eps < math.inf
    check(fits, f"rms_norm_eps is {eps!r:.80}, not a finite decimal number such as 1e-05")
    positions = whole(c, "max_position_embeddings", 131072 if mistral else 2048, 2**31)
    theta, scaling = read_rope(c, positions)
    return Config(
        vocab_size=whole(c, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=whole(c, "intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=eps,
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=positions,
        tie_word_embeddings=flag(c, "tie_word_embeddings"),
        attention_bias=not mistral and flag(c, "attention_bias"),
        mlp_bias=not mistral and flag(c, "mlp_bias"),
        sliding_window=read_window(c, mistral, layers),
        eos_token_ids=read_ends(c),
    )


# Settings that change the reference library's greedy text, unless they are nothing, 0, false, or
# what stands in NEUTRAL.
NEUTRAL = dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "num_beams"), 1)
NEUTRAL |= {"num_beam_groups": 1, "guidance_scale": 1}
NOT_HONOURED = (*NEUTRAL, "no_repeat_ngram_size", "encoder_no_repeat_ngram_size")
NOT_HONOURED += ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias")
NOT_HONOURED += ("min_length", "min_new_tokens", "forced_bos_token_id", "forced_eos_token_id")
NOT_HONOURED += ("stop_strings", "max_time", "exponential_decay_length_penalty")
NOT_HONOURED += ("penalty_alpha", "watermarking_config")


def generation_settings(path: str | Path) -> list[str]:
    """Names of the settings of generation_config.json, or of config.json where there is none, that
    change what the reference library generates greedily, and that are not honoured here."""
    folder = find_checkpoint(path)
    file = folder / "generation_config.json"
    entries = read_json(file if file.is_file() else folder / "config.json")
    neutral = {name: (*NOTHING, 0, NEUTRAL.get(name)) for name in NOT_HONOURED}
    return [name for name in NOT_HONOURED if entries.get(name) not in neutral[name]]


# ----------------------------------------------------------------------------------------- weights

TIED = ("model.embed_tokens.weight", "lm_head.weight")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def weight_files(folder: Path) -> list[Path]:
    """Safetensors before .bin, one file before the shards that an index names, each once."""
    for kind in ("model.safetensors", "pytorch_model.bin"):
        file, index = folder / kind, folder / f"{kind}.index.json"
        if file.is_file():
            return [file]
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            names = list(weight_map.values()) if isinstance(weight_map, dict) else []
            beside = [isinstance(name, str) and Path(name).name == name for name in names]
            if not names or not all(beside):
                raise UserError(f"{index} has no weight_map of files beside it; fetch it again")
            return [folder / name for name in sorted(set(names))]
    raise UserError(f"{folder} has no model.safetensors or pytorch_model.bin; fetch it again")


def read_file(file: Path) -> Iterator[tuple[str, object]]:
    """Yields (name, tensor) of every weight in a file. Raises `UserError` if it is damaged."""
    try:
        if file.suffix != ".bin":
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (not a dict)
                    yield name, shard.get_tensor(name)
            return
        with file.open("rb") as opened:
            # Since PyTorch 1.6 it is a zip archive, read as it is used; older ones are read whole.
            mapped = opened.read(4) == b"PK\x03\x04"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles in other protocols; an error follows
            shard = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        yield from shard.items()
    except FileNotFoundError:
        raise UserError(f"{file} is missing; fetch the checkpoint again") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        problem = f"{file} is damaged, or holds more than weights ({type(error).__name__})"
        raise UserError(f"{problem}; fetch it again, or save its weights as safetensors") from None


def converted(place: str, tensor: object, wanted: Tensor | None, device, dtype) -> Tensor:
    """The weight on `device` in `dtype`. Raises `UserError`, which begins with `place`, unless
    one is `wanted`, of that shape, and all its numbers are finite."""
    if wanted is None or not isinstance(tensor, Tensor):
        mend = "use the weights and the config.json of one plain Llama or Mistral"
        raise UserError(f"{place} is no weight of this model; {mend}")
    if tensor.dtype not in FLOATS or tensor.layout != torch.strided or tensor.is_meta:
        problem = f"holds {tensor.dtype}, {tensor.layout}, on {tensor.device}"
        raise UserError(f"{place} {problem}; use a checkpoint that is not quantized")
    if tensor.shape != wanted.shape:
        problem = f"has shape {tuple(tensor.shape)}, config.json asks for {tuple(wanted.shape)}"
        raise UserError(f"{place} {problem}; fetch both again")
    weight = tensor.to(device, dtype)
    if not weight.isfinite().all():
        if not tensor.isfinite().all():
            raise UserError(f"{place} has numbers that are not finite; fetch it again")
        problem = f"has numbers that {dtype} cannot hold".replace("torch.", "")
        raise UserError(f"{place} {problem}; try --dtype bfloat16")
    return weight


def load_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer:
    """The model of a checkpoint folder (Hugging Face layout) or hub repository.

    Strict: no weight may be missing or left over. The model is laid out without memory (meta
    device), then filled one tensor at a time, so the weights are never held twice. Raises
    `UserError` for whatever is wrong with the files.
    """
    folder = find_checkpoint(path)
    if (folder / "adapter_config.json").is_file():
        mend = "merge it into the weights, or move it away from them"
        raise UserError(f"{folder} has an adapter (adapter_config.json); {mend}")
    config = read_config(folder)
    with torch.device("meta"):
        model = Transformer(config)
    wanted = model.state_dict()
    weights = {}
    for file in weight_files(folder):
        for name, tensor in read_file(file):
            if not str(name).endswith(("rotary_emb.inv_freq", "_metadata")):  # not of the model
                place = f"{file}: {name!r:.80}"
                weights[name] = converted(place, tensor, wanted.get(name), device, dtype)
    given = [weights[name] for name in TIED if name in weights]
    if config.tie_word_embeddings and given:
        if torch.equal(given[0], given[-1]):  # one of them in the file is enough
            weights.update(dict.fromkeys(TIED, given[0]))
        else:  # the reference library then goes by the file, not by the config
            with torch.device("meta"):
                model = Transformer(replace(config, tie_word_embeddings=False))
    missing = sorted(set(wanted) - set(weights))
    if missing:
        problem = f"weight {missing[0]} is missing ({len(missing)} in all)"
        raise UserError(f"{folder}: {problem}; fetch it again")
    model.load_state_dict(weights, strict=True, assign=True)
    if model.config.tie_word_embeddings:  # assign made two parameters of one tensor
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(False).eval()
