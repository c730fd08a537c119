"""What must hold on a GPU as well. Without one, only what can be said of any device is tested."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import infer
import quant
import train
from beyond.segments import FastCache
from cskv import BiBranchCache, bi_branch_cache, init_factors
from experiments.caches import CACHES, make_cache, make_row
from infer import held_bytes
from model import full_cache
from support.processes import place
from tests.helpers import OneToken, decode_all, make_factors, tiny_model, tiny_tokens

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
T, STEPS = 100, 12


def on_gpu(**shape):
    """A tiny model, tokens [2, T + STEPS], and factors of full rank, on the GPU."""
    model = tiny_model(**shape)
    factors = make_factors(model, 12, 13)
    tokens = tiny_tokens(model, 2, T + STEPS).cuda()
    return model.cuda(), tokens, factors.to(tokens.new_empty(0, dtype=torch.float32))


@gpu
@pytest.mark.parametrize("shape", [{}, {"attention_bias": True}, {"sliding_window": 40}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_equals_plain_equals_full(dtype, shape):
    """With factors of full rank. In 16 bits keys are rounded three times on the way through A, the
    latents and B, so they may be three times as far from a model in float32 as a full cache's.
    Of a prompt all logits are bit-equal."""
    model, tokens, factors = on_gpu(**shape)
    exact = decode_all(model, tokens, T, full_cache(model))[:, T:]
    model, factors = model.to(dtype), factors.in_bits(32, 32)
    if dtype == torch.bfloat16:
        factors = factors.in_bits(16, 16).to(model.lm_head.weight)
    full = decode_all(model, tokens, T, full_cache(model))
    for kind in (BiBranchCache, OneToken):
        ours = decode_all(model, tokens, T, bi_branch_cache(model, factors, 8, kind=kind))
        assert torch.equal(ours[:, :T], model(tokens[:, :T]))
        if dtype == torch.float32:
            torch.testing.assert_close(ours, full, atol=2e-4, rtol=2e-4)
        else:
            assert (ours[:, T:] - exact).norm() < 3 * (full[:, T:] - exact).norm()


@gpu
@pytest.mark.parametrize("bits", quant.BITS)
@pytest.mark.parametrize("kind", [BiBranchCache, FastCache])
def test_the_gpu_computes_and_holds_what_the_cpu_does(kind, bits):
    model, tokens, factors = on_gpu()
    runs, held = [], []
    for device in ("cuda", "cpu"):
        model, tokens = model.to(device), tokens.to(device)
        few = factors.in_bits(bits, bits).to(model.lm_head.weight)
        cache = bi_branch_cache(model, few, 8, T + STEPS, kind)
        runs.append(decode_all(model, tokens, T, cache)[:, T:].cpu())
        held.append(held_bytes(cache))
    # A latent that lies between two levels may be rounded to either.
    assert (runs[0] - runs[1]).abs().median() < 1e-3 and held[0] == held[1]


@gpu
def test_a_training_step():
    model, tokens, _ = on_gpu()
    tuner = train.Tuner(init_factors("svd", model, [4, 4], [4, 4]), 8, 1e-2)
    assert place() == (0, 1)
    before = train.run_layers(model, [tokens[:1]], [tuner]).sum()
    for _ in range(8):
        train.run_layers(model, [tokens[:1]], [tuner], train=True)
        tuner.step()
    assert train.run_layers(model, [tokens[:1]], [tuner]).sum() < before


@gpu
@pytest.mark.parametrize("name", ["full", "cskv", "cskv-plain", "kivi-4"])
def test_a_token_waits_for_the_gpu_once(name):
    """PyTorch says each time that the processor has to wait."""
    model, tokens, factors = on_gpu()
    factors = factors if CACHES[name].shrinks else None
    cache = make_cache(model, make_row(model, name, factors=factors, window=8), T + STEPS)
    prompt, greedy = tokens[0, :T].tolist(), infer.make_sampler(0.0, 1.0, 0)
    stream = infer.generate(model, prompt, cache, STEPS, greedy)
    next(stream)  # the prompt
    next(stream)  # the first step makes what the next ones share
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            count = len(list(stream))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert count == STEPS - 2 and len(waits) <= count


# ----------------------------------------------------------------------------- on any device


class MadeOnCPU(TorchDispatchMode):
    """Notes every operation that has a tensor of the CPU among its results."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.operations.append(str(function))
        return result


@pytest.mark.parametrize("name", CACHES)
def test_a_decode_step_makes_no_tensor_on_the_cpu(name):
    """On the meta device, where nothing is computed but everything is laid out. A group that gets
    complete is packed in one of the steps."""
    model = tiny_model()
    kinds = [None]
    if CACHES[name].shrinks == "channels":
        kinds = [make_factors(model, 5, 5).in_bits(bits, bits) for bits in (16, 4)]
    model, tokens = model.to("meta"), torch.zeros(1, 64, dtype=torch.long, device="meta")
    for factors in kinds:
        cache = make_cache(model, make_row(model, name, 0.5, factors, window=8), 64)
        model(tokens[:, :38], cache)
        with MadeOnCPU() as made:
            for t in range(38, 42):
                model(tokens[:, t : t + 1], cache)
        assert not made.operations
