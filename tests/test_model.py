"""The model: against the naive computation, against transformers, and from damaged files."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import infer
from model import full_cache
from support.command import UserError
from support.huggingface.checkpoint import load_model, read_config
from tests import helpers
from tests.drawn import quick, steps
from tests.helpers import LINEAR, LLAMA3, decode_all, save_checkpoint, tiny_model, tiny_tokens

VARIANTS = {
    "multi-head": {"num_key_value_heads": 4},
    "grouped-query": {"num_key_value_heads": 2},
    "multi-query": {"num_key_value_heads": 1},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "linear RoPE": {"rope_scaling": LINEAR},
    "llama3 RoPE": {"rope_scaling": LLAMA3, "head_dim": 12},
    "sliding window": {"sliding_window": 5},
    "head_dim of its own": {"head_dim": 10},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_a_naive_computation(variant):
    model = tiny_model(**VARIANTS[variant])
    tokens = tiny_tokens(model, 2, 23)
    for sequence, logits in zip(tokens, model(tokens), strict=True):
        expected = helpers.naive_forward(model, sequence)
        torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=1e-4)


@quick
@given(st.sampled_from(list(VARIANTS)), st.integers(1, 20), steps, st.integers(0, 40))
def test_full_cache_step_by_step_equals_all_at_once(variant, prompt, steps, expected):
    model = tiny_model(**VARIANTS[variant])
    tokens = tiny_tokens(model, 2, prompt + steps)
    logits = decode_all(model, tokens, prompt, full_cache(model, expected))
    torch.testing.assert_close(logits, model(tokens), atol=5e-5, rtol=5e-5)
    torch.testing.assert_close(model(tokens, logits_to_keep=2), model(tokens)[:, -2:])


def test_context_length_and_shapes_are_checked():
    model = tiny_model(max_position_embeddings=10)
    cache = full_cache(model)
    model(tiny_tokens(model, 1, 10), cache)
    for tokens, held in ((11, None), (1, cache)):
        with pytest.raises(ValueError, match="11 tokens, but the context is 10"):
            model(tiny_tokens(model, 1, tokens), held)
    for wrong in (torch.zeros(3, dtype=torch.long), torch.zeros(1, 0, dtype=torch.long)):
        with pytest.raises(ValueError, match="tokens must be"):
            model(wrong)
    with pytest.raises(ValueError, match="1 caches for 2 layers"):
        model(tiny_tokens(model, 1, 2), full_cache(model)[:1])
    assert helpers.tiny_config(rope_scaling=LINEAR).context_length == 600 * 8
    assert helpers.tiny_config(rope_scaling=LLAMA3).context_length == 600


# ----------------------------------------------------------------------------- our own checkpoints


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_is_read_back(tmp_path, tied):
    model = tiny_model(tie_word_embeddings=tied)
    loaded = load_model(save_checkpoint(model, tmp_path))
    tokens = tiny_tokens(model, 1, 8)
    assert torch.equal(loaded(tokens), model(tokens))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_close(tmp_path, dtype):
    """The whole path in 16 bits, cache included; small weights do not amplify rounding."""
    model = tiny_model(scale=0.1)
    loaded = load_model(save_checkpoint(model, tmp_path), dtype=dtype)
    tokens, cache = tiny_tokens(model, 1, 12), full_cache(loaded)
    ours, exact = decode_all(loaded, tokens, 6, cache).float(), model(tokens)
    assert cache[0].k.dtype == dtype
    assert (ours - exact).abs().max() < 0.05 * exact.abs().max()


POINTER = b"version https://git-lfs.github.com/spec/v1"
SHARD = "model-00001-of-00002.safetensors"
INDEX = json.dumps({"weight_map": {"model.norm.weight": SHARD}}).encode()
DAMAGED = {  # a file, what is made of its bytes (None: no file), what the line must name
    "no config": ("config.json", None, "config.json"),
    "broken config": ("config.json", lambda data: data[:20], "config.json cannot be read as JSON"),
    "missing key": ("config.json", lambda data: data.replace(b"hidden_", b"hid_"), "hidden_size"),
    "config is a list": ("config.json", b"[1]", "not a JSON object"),
    "broken tokenizer": ("tokenizer.json", lambda data: data[:30], "tokenizer.json is damaged"),
    "no weights": ("model.safetensors", None, "model.safetensors"),
    "truncated weights": ("model.safetensors", lambda data: data[:-100], "safetensors is damaged"),
    "empty weights": ("model.safetensors", b"", "model.safetensors is damaged"),
    "weights are text": ("model.safetensors", POINTER, "damaged"),
    "missing shard": ("model.safetensors.index.json", INDEX, f"{SHARD} is missing"),
    "bin with code": ("pytorch_model.bin", {"x": Path("no tensor")}, "damaged"),
    "bin is a list": ("pytorch_model.bin", [1, 2], "damaged"),
    "bin is text": ("pytorch_model.bin", POINTER, "damaged"),
    "truncated bin": ("pytorch_model.bin", {"x": torch.zeros(1000)}, "damaged"),
}
UNSUPPORTED = {  # changes of the config, and what the line must name
    "another model type": ({"model_type": "mamba"}, "'mamba' is not supported"),
    "no model type": ({"model_type": None}, "model_type"),
    "another activation": ({"hidden_act": "gelu"}, "gelu"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantized"),
    "unknown RoPE": ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "yarn"),
    "RoPE without factor": ({"rope_scaling": {"type": "linear"}}, "factor"),
    "bad value": ({"num_hidden_layers": "two"}, "bad value"),
    "odd heads": ({"num_attention_heads": 3}, "3 query heads"),
    "no heads": ({"num_attention_heads": 0}, "positive"),
    "no heads, no head_dim": ({"num_attention_heads": 0, "head_dim": None}, "bad value"),
    "negative": ({"hidden_size": -4}, "hidden_size is -4"),
    "window 0": ({"sliding_window": 0}, "sliding_window is 0"),
    "RoPE as a word": ({"rope_scaling": "linear"}, "'linear' is not supported"),
    "wrong shape": ({"vocab_size": 62}, "(61, 24)"),
    "missing weight": ({"num_hidden_layers": 3}, "model.layers.2"),
    "unexpected weight": ({"num_hidden_layers": 1}, "model.layers.1"),
    "untied": ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
}


def refuse_checkpoint(refused, folder, message):
    """By the command line, where the mistake of a checkpoint is one line."""
    assert message in refused(infer, "--model", folder, "--cache", "full", "--prompt", "t1")


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_checkpoints_are_named(tmp_path, refused, name):
    folder = save_checkpoint(tiny_model(), tmp_path)
    file, change, message = DAMAGED[name]
    path = folder / file
    if not path.exists():  # in place of the usual file
        (folder / "model.safetensors").unlink()
        path.write_bytes(b"")
    if change is None:
        path.unlink()
    elif callable(change):
        path.write_bytes(change(path.read_bytes()))
    elif isinstance(change, bytes):
        path.write_bytes(change)
    else:
        torch.save(change, path)
    if name == "truncated bin":
        path.write_bytes(path.read_bytes()[:2000])
    refuse_checkpoint(refused, folder, message)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_checkpoints_that_are_not_supported_are_named(tmp_path, refused, name):
    changes, message = UNSUPPORTED[name]
    model = tiny_model(tie_word_embeddings=name == "untied")
    refuse_checkpoint(refused, save_checkpoint(model, tmp_path, **changes), message)


def test_what_is_not_there_is_named(monkeypatch):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise OSError("cannot reach it\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    for path in ("weights/no-such-model", "no/such/folder", "nothing"):
        with pytest.raises(UserError, match="no folder"):
            load_model(path)
    with pytest.raises(UserError, match=r"the hub did not give that repository: cannot reach it$"):
        load_model("org/name")


def test_a_hub_name_is_fetched(monkeypatch, tmp_path):
    """Safetensors first; the .bin files only where there are no others."""
    import huggingface_hub

    model, asked = tiny_model(), []
    torch.save(model.state_dict(), save_checkpoint(model, tmp_path) / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()

    def fetch(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    tokens = tiny_tokens(model, 1, 5)
    assert torch.equal(load_model("org/name")(tokens), model(tokens))
    assert [name for name, _ in asked] == ["org/name"] * 2
    assert "model*.safetensors" in asked[0][1] and "pytorch_model*.bin" in asked[1][1]


# ------------------------------------------------------------------------- against transformers


HF = {
    "multi-head": {"num_key_value_heads": 4},
    "grouped-query": {},
    "linear RoPE": {"rope_parameters": {**LINEAR, "rope_theta": 10000.0}},
    "llama3 RoPE": {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
    "attention bias": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "head_dim of its own": {"head_dim": 12},
    "mistral": {"kind": "Mistral", "sliding_window": None},
    "mistral, sliding window": {"kind": "Mistral", "sliding_window": 7},
}


def hf_model(kind="Llama", **changes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = {"hidden_size": 32, "vocab_size": 97, "num_hidden_layers": 3, "intermediate_size": 48}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = getattr(transformers, f"{kind}Config")(**{**config, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model


def assert_same_logits(theirs, folder):
    ours = load_model(folder)
    tokens = tiny_tokens(ours, 2, 40)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", HF)
def test_logits_equal_transformers(tmp_path, variant):
    """From checkpoints in shards."""
    theirs = hf_model(**HF[variant])
    theirs.save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same_logits(theirs, tmp_path)


@pytest.mark.parametrize("shards", [1, 2])
def test_bin_checkpoint(tmp_path, shards):
    """As LongChat's: .bin shards that also hold RoPE's frequencies, which the config gives."""
    theirs = hf_model()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    weights = {**theirs.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    names = ["pytorch_model.bin"]
    if shards > 1:
        names = [f"pytorch_model-{i}.bin" for i in range(shards)]
    weight_map = {}
    for i, name in enumerate(names):
        part = dict(list(weights.items())[i::shards])
        torch.save(part, tmp_path / name)
        weight_map |= dict.fromkeys(part, name)
    if shards > 1:
        index = json.dumps({"weight_map": weight_map})
        (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    assert_same_logits(theirs, tmp_path)


def test_old_config_spelling(tmp_path):
    """Until transformers 5, theta and scaling were two entries, the scaling's kind was `type`."""
    theirs = hf_model(rope_parameters={**LINEAR, "rope_theta": 5000.0})
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("rope_parameters")
    config |= {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 8.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path).rope_scaling == LINEAR
    assert_same_logits(theirs, tmp_path)
