"""The model: against the naive computation, and from our own files, whole and damaged."""

import io
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import infer
from model import full_cache
from support.huggingface.checkpoint import load_model
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
    with pytest.raises(ValueError, match="zip"):
        model(tiny_tokens(model, 1, 2), full_cache(model)[:1])
    assert helpers.tiny_config(rope_scaling=LINEAR).context_length == 600 * 8
    assert helpers.tiny_config(rope_scaling=LLAMA3).context_length == 600


# ----------------------------------------------------------------------------- our own checkpoints


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_checkpoint_is_read_back(tmp_path, tied, dtype):
    """In 16 bits the whole path, cache included; small weights do not amplify rounding."""
    model = tiny_model(scale=0.1, tie_word_embeddings=tied)
    loaded = load_model(save_checkpoint(model, tmp_path), dtype=dtype)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    tokens, cache = tiny_tokens(model, 1, 12), full_cache(loaded)
    exact = model(tokens)
    if dtype == torch.float32:
        assert torch.equal(loaded(tokens), exact)
    ours = decode_all(loaded, tokens, 6, cache).float()
    assert cache[0].k.dtype == dtype
    assert (ours - exact).abs().max() < 0.05 * exact.abs().max()


POINTER = b"version https://git-lfs.github.com/spec/v1"
CODE = io.BytesIO()
torch.save({"x": Path("no tensor")}, CODE)
DAMAGED = [  # a file, its bytes (None: it is missing; a number: so many are left), what is named
    ("config.json", None, "has no config.json"),
    ("tokenizer.json", 30, "tokenizer.json is damaged"),
    ("model.safetensors", None, "has no model.safetensors"),
    ("model.safetensors", POINTER, "model.safetensors is damaged"),
    ("pytorch_model.bin", CODE.getvalue(), "pytorch_model.bin is damaged"),
]


@pytest.mark.parametrize(("file", "left", "message"), DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_checkpoints_are_named(tmp_path, refused, file, left, message):
    """By the command line. Other mistakes are in tests/test_checkpoint.py."""
    folder = save_checkpoint(tiny_model(), tmp_path)
    if file.endswith(".bin"):
        (folder / "model.safetensors").unlink()
    if left is None:
        (folder / file).unlink()
    else:
        data = (folder / file).read_bytes()[:left] if isinstance(left, int) else left
        (folder / file).write_bytes(data)
    assert message in refused(infer, "--model", folder, "--cache", "full", "--prompt", "t1")
