"""The real model: SmolLM2-135M-Instruct, made by `python weights/get_smollm2.py`. Slow."""

import argparse
import json
import pydoc
import re
from pathlib import Path

import pytest
import torch

import cskv
from beyond.shared import shared_cache
from cskv import rank_for
from infer import full_bytes, generate, make_sampler
from model import full_cache
from support.factors_file import load_factors
from support.huggingface.checkpoint import load_model
from support.huggingface.tokenizer import load_tokenizer

WEIGHTS = Path(__file__).parent.parent / "weights"
FOLDER = WEIGHTS / "SmolLM2-135M-Instruct"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="run: python weights/get_smollm2.py"),
]
torch.set_grad_enabled(False)


@pytest.fixture(scope="module")
def model():
    return load_model(FOLDER)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FOLDER)


@pytest.fixture(scope="module")
def prose(tokenizer):
    """[1, 1000] tokens: the documentation of the standard library's argparse."""
    text = pydoc.render_doc(argparse, renderer=pydoc.plaintext)
    return torch.tensor([tokenizer.encode(text)[:1000]])


def test_model_tokenizer_and_chat_template_equal_transformers(model, tokenizer, prose):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    tokens = prose[:, :300]
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
    theirs = transformers.AutoTokenizer.from_pretrained(FOLDER)
    for text in ("The year 1984, in 3 words.", "naïve café 🙂\n\n\tx = 10**6", ""):
        assert tokenizer.encode(text) == theirs.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    messages = [{"role": "user", "content": "Who are you?"}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.chat(messages) == rendered


def test_cache_right_after_prefill(model, prose):
    """The prefill is the model's own, and what remains after it is the compressed cache alone.

    Keeps out what the published code does: hold the full keys and values beside the latents.
    """
    factors = load_factors(WEIGHTS / "smollm2-135m-instruct.cskv-80.safetensors", model)
    cache = cskv.bi_branch_cache(model, factors)
    assert torch.equal(model(prose, cache), model(prose, full_cache(model)))
    rank = rank_for(0.8, 192)
    expected = 30 * (1000 * 2 * rank * 2 + 2 * 32 * 192 * 4)  # 16-bit latents, float32 ring
    assert sum(layer.nbytes() for layer in cache) == expected


@pytest.mark.parametrize("percent", [90, 95, 97.5])
def test_a_plan_is_what_the_cache_holds(model, percent):
    """Ranks and bits of a plan of experiments.budget, and the bytes of 4,064 tokens."""
    file = WEIGHTS / f"smollm2-135m-instruct.cskv-{percent}.safetensors"
    factors, plan = load_factors(file, model), json.loads(file.with_suffix(".json").read_text())
    assert [p.rank for p in factors.stored] == [row["rank"] for row in plan]
    bits = [p.bits_a_token / p.rank for p in factors.stored]
    assert bits == pytest.approx([row["bits"] for row in plan])
    cache = shared_cache(model, factors, expected=4064, sinks=4)
    for layer, pairs in zip(cache, factors.layers, strict=True):
        for latents, pair in ((layer.c_k, pairs.k), (layer.c_v, pairs.v)):
            latents.append(torch.zeros(1, 4060, pair.rank))
    held = []
    for row in plan:
        last = cache[row["layer"] + row.get("layers", 1) - 1]
        latents = last.c_k if row["of"] == "keys" else last.c_v
        held.append(sum(tensor.untyped_storage().nbytes() for tensor in latents.tensors()))
    assert held == [row["nbytes"] for row in plan]
    full = full_bytes(model, 4064)
    exact = full_bytes(model, 36)
    if "window_bits" in factors.info:
        exact *= (8 + 32 / 64) / 16
    assert 0 <= (1 - percent / 100) * full - sum(held) - exact < 0.002 * full


def test_greedy_answer_at_90_percent(model, tokenizer):
    """Most of the chat is read through the compressed branch, and the answer is still a sentence.

    (With the full cache it ends in Paris. So small a model may lose the fact, not the grammar.)
    """
    factors = load_factors(WEIGHTS / "smollm2-135m-instruct.cskv-90.safetensors", model)
    chat = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    prompt, greedy = tokenizer.encode(chat, special=False), make_sampler(0, 1, 0)
    compressed = shared_cache(model, factors, window=4, sinks=4)
    for cache, said in ((full_cache(model), "Paris"), (compressed, r"\w+")):
        answer = tokenizer.decode(list(generate(model, prompt, cache, 20, greedy)))
        assert re.fullmatch(rf"The capital of France is {said}\.", answer)
