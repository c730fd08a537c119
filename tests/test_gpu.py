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
from model import full_cache
from support.processes import place
from tests.helpers import OneToken, decode_all, make_factors, tiny_model, tiny_tokens

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DTYPES = [torch.float32, torch.bfloat16]
T, STEPS = 100, 12


def on_gpu(dtype=torch.float32, **shape):
    """A tiny model, tokens [2, T + STEPS], and factors of full rank, on the GPU."""
    model = tiny_model(**shape)
    factors = make_factors(model, 12, 13)
    tokens = tiny_tokens(model, 2, T + STEPS).cuda()
    model = model.to("cuda", dtype)
    return model, tokens, factors.to(model.lm_head.weight)


def decoded(model, tokens, cache):
    """Logits [B, STEPS, vocab] of the tokens after a prompt of T."""
    return decode_all(model, tokens, T, cache)[:, T:]


@gpu
@pytest.mark.parametrize("shape", [{}, {"attention_bias": True}, {"sliding_window": 40}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fast_equals_plain_equals_full(dtype, shape):
    """With factors of full rank. In 16 bits keys are rounded three times on the way through A, the
    latents and B, so they may be three times as far from a model in float32 as a full cache's.
    Of a prompt all logits are bit-equal."""
    model, tokens, factors = on_gpu(**shape)
    exact = decoded(model, tokens, full_cache(model))
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
@pytest.mark.parametrize("kind", [BiBranchCache, FastCache])
def test_the_gpu_computes_what_the_cpu_does(kind):
    model, tokens, factors = on_gpu()
    factors = factors.in_bits(4, 4)
    ours = decoded(model, tokens, bi_branch_cache(model, factors, 8, kind=kind)).cpu()
    model, tokens = model.cpu(), tokens.cpu()
    factors = factors.to(model.lm_head.weight)
    theirs = decoded(model, tokens, bi_branch_cache(model, factors, 8, kind=kind))
    # A latent that lies between two levels may be rounded to either.
    assert (ours - theirs).abs().median() < 1e-3


@gpu
@pytest.mark.parametrize("bits", quant.BITS)
def test_packed_bytes_are_those_of_the_cpu(bits):
    x = torch.randn(2, 70, 12, generator=torch.Generator().manual_seed(0))
    grouping, sizes, numbers = quant.Grouping(quant.TOKENS), [], []
    for device in ("cpu", "cuda"):
        packed = quant.Packed(bits, grouping, residual=4, expected=100)
        packed.append(x.to(device))
        sizes.append([t.untyped_storage().nbytes() for t in packed.tensors()])
        numbers.append(packed.read(0, 70).cpu())
    assert sizes[0] == sizes[1]
    torch.testing.assert_close(*numbers)


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


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("name", CACHES)
def test_a_decode_step_makes_no_tensor_on_the_cpu(name, bits):
    """On the meta device, where nothing is computed but everything is laid out. A group that gets
    complete is packed in one of the steps."""
    model = tiny_model()
    factors = None
    if CACHES[name].shrinks == "channels":
        factors = make_factors(model, 5, 5).in_bits(bits, bits)
    model, tokens = model.to("meta"), torch.zeros(1, 64, dtype=torch.long, device="meta")
    cache = make_cache(model, make_row(model, name, 0.5, factors, window=8), 64)
    model(tokens[:, :38], cache)
    with MadeOnCPU() as made:
        for t in range(38, 42):
            model(tokens[:, t : t + 1], cache)
    assert not made.operations
