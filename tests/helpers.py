"""What tests share: tiny random models, on disk and in memory, and a naive forward pass."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from beyond.segments import FastCache
from cskv import Factors, calibrate, init_factors
from model import Config, Transformer
from support.command import run_command

LINEAR = {"rope_type": "linear", "factor": 8.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 40}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def tiny_config(**changes) -> Config:
    values = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 20, "head_dim": 6}
    values |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    values |= {"rope_theta": 100.0, "rope_scaling": None, "max_position_embeddings": 600}
    values |= {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False}
    values |= {"rms_norm_eps": 1e-5, "sliding_window": None, "eos_token_ids": ()}
    return Config(**values | changes)


def tiny_model(seed: int = 0, scale: float = 0.4, **changes) -> Transformer:
    """Weights from N(0, scale^2): large enough that attention is far from uniform."""
    model = Transformer(tiny_config(**changes))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * scale
        parameter.data = 1 + noise if "norm" in name else noise
    return model.requires_grad_(False).eval()


def tiny_tokens(model: Transformer, batch: int, length: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator)


def save_checkpoint(model: Transformer, folder: Path, **config_changes) -> Path:
    """Writes `model` as a Hugging Face folder with a tokenizer of the words `t0 t1 ...`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    c = model.config
    folder.mkdir(parents=True, exist_ok=True)
    config = {**vars(c), "model_type": "llama", "eos_token_id": list(c.eos_token_ids) or None}
    del config["eos_token_ids"]
    (folder / "config.json").write_text(json.dumps(config | config_changes))
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    if c.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors")
    vocab = {f"t{i}": i for i in range(c.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


# ------------------------------------------------------------- the same computations, naively


def naive_rotate(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """x [T, D], half-split pairs, multiplied by rotation matrices written out entry by entry."""
    half = x.shape[1] // 2
    turns = torch.zeros(len(x), *2 * x.shape[1:], dtype=x.dtype)  # a D x D matrix for each token
    for f in range(half):
        angle = positions * frequencies[f]
        turns[:, f, f] = turns[:, f + half, f + half] = angle.cos()
        turns[:, f, f + half], turns[:, f + half, f] = -angle.sin(), angle.sin()
    return torch.einsum("tij,tj->ti", turns, x)


def naive_frequencies(config: Config) -> Tensor:
    """RoPE frequencies written out channel by channel, scaling included."""
    result, s = [], config.rope_scaling
    for f in range(config.head_dim // 2):
        w = config.rope_theta ** (-2 * f / config.head_dim)
        if s and s["rope_type"] == "linear":
            w /= s["factor"]
        elif s:
            low, high = s["low_freq_factor"], s["high_freq_factor"]
            turns = s["original_max_position_embeddings"] * w / (2 * math.pi)
            if turns < low:
                w /= s["factor"]
            elif turns < high:
                smooth = (turns - low) / (high - low)
                w = (1 - smooth) * w / s["factor"] + smooth * w
        result.append(w)
    return torch.tensor(result, dtype=torch.float64)


def naive_forward(
    model: Transformer, tokens: Tensor, factors: Factors | None = None, window=1, prompt=0, sinks=0
) -> Tensor:
    """Logits [T, vocab] of one sequence [T], all positions in one go, in float64.

    With factors: a token i >= `prompt` (a decode step) sees the keys and values of tokens
    j <= i - window, but for the first `sinks`, through A B, everything else exactly: CSKV with the
    window mask written out.
    """
    c, T = model.config, len(tokens)
    w = {name: p.double() for name, p in model.state_dict().items()}
    frequencies, positions = naive_frequencies(c), torch.arange(T)
    i, j = positions[:, None], positions[None]
    visible = (j <= i) & (i - j < (c.sliding_window or T))
    compressed = (i >= prompt) & (i - j >= window) & (j >= sinks) & (factors is not None)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * weight

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    x = w["model.embed_tokens.weight"][tokens]
    for n in range(c.num_hidden_layers):
        at = f"model.layers.{n}.self_attn"
        h = norm(x, w[f"model.layers.{n}.input_layernorm.weight"])
        q, k, v = (linear(h, f"{at}.{name}_proj") for name in "qkv")
        k_hat, v_hat = k, v
        if factors:
            pair = factors.layers[n]
            k_hat = h @ pair.k.A.double() @ pair.k.B.double() + w.get(f"{at}.k_proj.bias", 0)
            v_hat = h @ pair.v.A.double() @ pair.v.B.double() + w.get(f"{at}.v_proj.bias", 0)
        out = []
        for head in range(c.num_attention_heads):
            group = head // (c.num_attention_heads // c.num_key_value_heads)
            own = slice(head * c.head_dim, (head + 1) * c.head_dim)
            shared = slice(group * c.head_dim, (group + 1) * c.head_dim)
            turned = (q[:, own], k[:, shared], k_hat[:, shared])
            q_h, k_h, k_hat_h = (naive_rotate(y, positions, frequencies) for y in turned)
            scores = torch.where(compressed, q_h @ k_hat_h.T, q_h @ k_h.T) / math.sqrt(c.head_dim)
            p = scores.masked_fill(~visible, -math.inf).softmax(-1)
            out.append((p * ~compressed) @ v[:, shared] + (p * compressed) @ v_hat[:, shared])
        x = x + linear(torch.cat(out, 1), f"{at}.o_proj")
        h = norm(x, w[f"model.layers.{n}.post_attention_layernorm.weight"])
        mlp = f"model.layers.{n}.mlp"
        gate = linear(h, f"{mlp}.gate_proj")
        x = x + linear(gate * gate.sigmoid() * linear(h, f"{mlp}.up_proj"), f"{mlp}.down_proj")
    return linear(norm(x, w["model.norm.weight"]), "lm_head")


# --------------------------------------------------------------------------- caches and commands


class OneToken(FastCache):
    """Segments of one token: the fast cache with the positions of the plain one."""

    segments = ((1, 0),)


def make_factors(model, k_rank, v_rank, init="optimal"):
    """Factors from statistics of random tokens, with the ranks varied from layer to layer."""
    statistics = calibrate(model, [tiny_tokens(model, 2, 40, 0)])
    layers, most = range(len(model.model.layers)), model.config.d_kv
    k_ranks = [min(most, k_rank + i) for i in layers]
    v_ranks = [max(1, min(most, v_rank - i)) for i in layers]
    return init_factors(init, model, k_ranks, v_ranks, statistics)


def in_bits(factors, k_bits, v_bits, group=None, clamped=False):
    """Factors for latents of so many bits, in groups as in KIVI or of so many tokens."""
    factors = factors.in_bits(k_bits, v_bits, clamped)
    return factors.map(lambda pair: replace(pair, group=group))


def assert_same_factors(ours, theirs):
    for a, b in zip(ours.pairs, theirs.pairs, strict=True):
        assert torch.equal(a.A, b.A) and torch.equal(a.B, b.B)


def decode_all(model, tokens, prompt, cache):
    """Logits [B, T, vocab]: the first `prompt` tokens as a prompt, the others one by one."""
    steps = [tokens[:, :prompt], *tokens[:, prompt:].split(1, dim=1)]
    return torch.cat([model(step, cache) for step in steps if step.shape[1]], dim=1)


def feed(cache, prompt, x, q, k, v, rope):
    """Gives a layer a prompt, then token by token the rest of x [B, T, hidden], q, k and v. Yields
    the position of each of these, and the output for it [B, H, D]."""
    cache.prefill(x[:, :prompt], q[:, :, :prompt], k[:, :, :prompt], v[:, :, :prompt], rope)
    for t in range(prompt, x.shape[1]):
        new = slice(t, t + 1)
        out = cache.decode(x[:, new], q[:, :, new], k[:, :, new], v[:, :, new], rope)
        assert out.shape[2] == 1 and cache.length == t + 1
        yield t, out[:, :, 0]


def layer_inputs(model, tokens):
    """(x, k, v) [B, T, ...] of every layer, before RoPE and without biases, in float64, from the
    model's own modules."""
    found, x = [], model.model.embed_tokens(tokens)
    for layer in model.model.layers:
        h, a = layer.input_layernorm(x).double(), layer.self_attn
        found.append((h, h @ a.k_proj.weight.T.double(), h @ a.v_proj.weight.T.double()))
        x = layer(x, model.rope, None)
    return found


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest memory that any operation takes, `known` tensors aside."""

    def __init__(self, known):
        super().__init__()
        self.known, self.largest = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            storage = out.untyped_storage()
            if storage.data_ptr() not in self.known:
                self.largest = max(self.largest, storage.nbytes())
        return out


def call(module, capsys, *arguments):
    """Runs a command line in this process: (exit code, standard output, standard error)."""
    code = 0
    try:
        run_command(lambda: module.run(module.parse_arguments([str(a) for a in arguments])))
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def written(*folders):
    """All that is below some folders, and when each file was written."""
    paths = [path for folder in folders for path in folder.rglob("*")]
    return {path: path.is_dir() or path.stat().st_mtime_ns for path in paths}


def arguments(everything, out, *more):
    """A whole command line of train.py."""
    base = ["--model", everything / "model", "--data", everything / "text.jsonl", "--out", out]
    base += ["--init", "svd", "--k-ratio", 0.5, "--v-ratio", 0.67, "--lr", 1e-2]  # ranks 6 and 4
    return [str(a) for a in (*base, *more)]


def wait_for_lines(log, lines, process):
    """Until a process that writes a log has written so many lines."""
    deadline = time.monotonic() + 60
    while not log.exists() or log.read_text().count("\n") < lines:
        assert process.poll() is None and time.monotonic() < deadline, "it never came that far"
        time.sleep(0.001)


def rows_of(log):
    return [json.loads(line) for line in log.read_text().splitlines()]
