"""One layer of a model's shape with random weights: what the attention of a decode step costs.

    python -m experiments.speed --shape longchat --lengths 2048,8192

`decode` of every cache is timed, after a prompt of random numbers; projections and MLP, which are
the same for all, are left out. Beside the time stands what bounds it:

    mflop      multiplications and additions of its matrix products
    read_mb    bytes that it has to read: the cache, and the factors A and B
"""

import random
from collections.abc import Iterator
from statistics import median

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from cskv import init_factors
from experiments.caches import make_cache, make_rows
from experiments.measuring import clock
from model import LayerCache, Transformer
from support.shapes import shape_config


def bytes_read(cache: LayerCache) -> int:
    """Of the cache and its factors."""
    factors = [getattr(cache, name, None) for name in ("A_k", "A_v", "B_k", "B_v")]
    tensors = [*cache.tensors(), *(t for t in factors if t is not None)]
    return sum(t.numel() * t.element_size() for t in tensors)


@torch.no_grad()
def measure_shape(
    name: str, length: int, rounds: int, steps: int, device: str, dtype: torch.dtype, **settings
) -> list[dict]:
    """A row for each cache: medians over rounds of `steps` steps. `settings`: of `make_rows`."""
    tokens = length + (rounds + 1) * steps + 1
    model = Transformer(shape_config(name, tokens)).to(device, dtype)
    config, generator = model.config, torch.Generator(device).manual_seed(0)
    model.rope.reach(tokens, model.lm_head.weight.device)

    def inputs(n: int) -> Iterator[Tensor]:
        """x, q, k and v of n tokens."""
        for heads in (1, config.num_attention_heads, *2 * [config.num_key_value_heads]):
            shape = (n, config.hidden_size) if heads == 1 else (heads, n, config.head_dim)
            yield torch.randn(1, *shape, generator=generator, device=device, dtype=dtype)

    def random_factors(_: str, rank: int):
        return init_factors("random", model, [rank], [rank])

    rows = make_rows(model, make_factors=random_factors, inits=[""], dtype=dtype, **settings)
    caches = {" ".join(row.label.split()): make_cache(model, row, tokens)[0] for row in rows}
    prompt, times = list(inputs(length)), {label: [] for label in caches}
    for cache in caches.values():
        cache.remember(*prompt, model.rope)
    order = random.Random(0)  # no one always runs behind the same one
    for _ in tqdm(range(rounds + 1), desc=f"{length} tokens", leave=False):
        news = [list(inputs(1)) for _ in range(steps)]
        for label in order.sample(list(caches), len(caches)):
            start = clock(device)
            for new in news:
                caches[label].decode(*new, model.rope)
            times[label].append((clock(device) - start) / steps)
    result = []
    for label, cache in caches.items():
        ms, full = (1e3 * median(times[key][1:]) for key in (label, "full"))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            cache.decode(*news[0], model.rope)
        row = {"cache": label, "tokens": length, "decode_ms": ms, "decode_ratio": ms / full}
        row |= {"mflop": counter.get_total_flops() / 1e6, "read_mb": bytes_read(cache) / 1e6}
        result.append(row)
    return result
