"""The attention of well-known models: its shape and its RoPE."""

from model import Config

SHAPES = {  # query heads, key heads, D, theta of RoPE, its linear scaling
    "longchat": (32, 32, 128, 1e4, 8.0),  # LongChat-7B-v1.5-32k
    "mistral": (32, 8, 128, 1e6, 1.0),  # Mistral-7B-Instruct-v0.2
    "smollm2": (9, 3, 64, 1e5, 1.0),  # SmolLM2-135M
    "teacher": (2, 2, 32, 1e6, 1.0),  # the embedded model
}


def shape_config(name: str, tokens: int) -> Config:
    """One layer of that shape, for so many tokens, and next to nothing beside its attention."""
    H, H_kv, D, theta, factor = SHAPES[name]
    scaling = {"rope_type": "linear", "factor": factor}
    sizes = 1, H * D, 1, 1, H, H_kv, D  # vocabulary, hidden, intermediate, layers, heads
    return Config(*sizes, 1e-5, theta, scaling, tokens, False, False, False, None, ())
