"""One layer of a model's shape with random weights: what the attention of a decode step costs.

`decode` of every cache is timed, after a prompt of random numbers; projections and MLP, which are
the same for all, are left out.
"""

from functools import partial

import torch
from torch import Tensor

from experiments.caches import Row, make_cache
from model import Config, LayerCache, Transformer

SHAPES = {  # query heads, key heads, D, theta of RoPE, its linear scaling
    "longchat": (32, 32, 128, 1e4, 8.0),  # LongChat-7B-v1.5-32k
    "mistral": (32, 8, 128, 1e6, 1.0),  # Mistral-7B-Instruct-v0.2
    "smollm2": (9, 3, 64, 1e5, 1.0),  # SmolLM2-135M
    "teacher": (2, 2, 32, 1e6, 1.0),  # the embedded model
}


def shape_config(name: str, tokens: int) -> Config:
    """One layer of that shape, for so many tokens, and next to nothing beside its attention."""
    H, H_kv, D, theta, factor = SHAPES[name]
    return Config(
        vocab_size=1,
        hidden_size=H * D,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=H,
        num_key_value_heads=H_kv,
        head_dim=D,
        rms_norm_eps=1e-5,
        rope_theta=theta,
        rope_scaling={"rope_type": "linear", "factor": factor},
        max_position_embeddings=tokens,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        sliding_window=None,
        eos_token_ids=(),
    )


def shape_runners(model: Transformer, rows: list[Row], length: int, expected: int) -> dict:
    """What `speed.compare` times: for each cache of the only layer `length` tokens at once, then
    one by one."""
    config, weight = model.config, model.lm_head.weight
    H, H_kv, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    generator = torch.Generator(weight.device).manual_seed(0)
    like = {"generator": generator, "device": weight.device, "dtype": weight.dtype}
    model.rope.reach(expected, weight.device)

    def inputs(n: int) -> list[Tensor]:
        """x, q, k and v of n tokens."""
        shapes = [(1, n, H * D), (1, H, n, D), (1, H_kv, n, D), (1, H_kv, n, D)]
        return [torch.randn(shape, **like) for shape in shapes]

    prompt = inputs(length)
    token = inputs(1)

    def fill(cache: list[LayerCache]) -> None:
        cache[0].remember(*prompt, model.rope)

    def step(cache: list[LayerCache]) -> Tensor:
        return cache[0].decode(*token, model.rope)

    return {row.label: (partial(make_cache, model, row, expected), fill, step) for row in rows}


def factor_bytes(row: Row) -> int:
    """Of A and B, which a step reads beside the cache."""
    if row.factors is None:
        return 0
    return sum(pair.A.nbytes + pair.B.nbytes for pair in row.factors.pairs)
