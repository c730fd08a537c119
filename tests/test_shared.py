"""Latents shared by layers: beyond/shared.py."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from beyond.segments import FastCache
from beyond.shared import shared_cache
from cskv import BiBranchCache, Factors, LayerFactors, LowRank, Together, bi_branch_cache
from infer import held_bytes, nominal_ratio
from model import full_cache
from tests.drawn import kinds, quick, sinks, widths, windows
from tests.evaluating import storages
from tests.helpers import decode_all, in_bits, make_factors, tiny_model, tiny_tokens

LAYERS = 4
SPLITS = [(4,), (2, 2), (1, 3), (3, 1)]
splits = st.sampled_from(SPLITS)
prompts = st.sampled_from([1, 7, 33, 70])
steps = st.integers(0, 40)


def model_of(**shape):
    return tiny_model(num_hidden_layers=LAYERS, scale=0.3, **shape).double()


def groups_of(split, side):
    """Groups of so many layers, those of one layer left out."""
    starts = [sum(split[:n]) for n in range(len(split))]
    pairs = zip(starts, split, strict=True)
    return [Together(side, first, count) for first, count in pairs if count > 1]


def side_by_side(factors, groups):
    """The same factors with the latents of each group's layers in one: the channels of each layer
    beside those of the others."""
    sides = {side: [getattr(layer, side) for layer in factors.layers] for side in "kv"}
    for group in groups:
        pairs = [sides[group.side][i] for i in group.layers]
        A = [pair.A for pair in pairs]
        rows = torch.block_diag(*[pair.B for pair in pairs]).chunk(group.count, dim=1)
        for n, i in enumerate(group.layers):
            wide = [a if m == n else torch.zeros_like(a) for m, a in enumerate(A)]
            sides[group.side][i] = replace(pairs[n], A=torch.cat(wide, 1), B=rows[n])
    layers = [LayerFactors(*pairs) for pairs in zip(sides["k"], sides["v"], strict=True)]
    return Factors(layers, together=tuple(groups))


@quick
@given(splits, splits, prompts, steps, windows, sinks, widths, widths, kinds, st.booleans())
def test_layers_side_by_side_are_layers_apart(
    k_split, v_split, prompt, n, window, first, k_bits, v_bits, kind, bias
):
    """Token by token, for keys and values in groups of their own. Bytes are the same, too. No block
    is packed in between: the last layer of a group would see that one token before the others."""
    n = min(n, 32 - max(0, prompt - first) % 32 - 1)
    model = model_of(attention_bias=bias)
    apart = make_factors(model, 4, 5).to(model.lm_head.weight)
    apart = in_bits(apart, k_bits, v_bits, 32)
    groups = [*groups_of(k_split, "k"), *groups_of(v_split, "v")]
    shared = side_by_side(apart, groups)
    tokens = tiny_tokens(model, 2, prompt + n)
    caches = [shared_cache(model, f, window, 0, kind, first) for f in (shared, apart)]
    ours, theirs = [decode_all(model, tokens, prompt, cache) for cache in caches]
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)
    assert held_bytes(caches[0]) == held_bytes(caches[1])
    assert nominal_ratio(model, shared) == pytest.approx(nominal_ratio(model, apart))


def full_rank(model, split):
    """One latent of all channels of a group, mixed by a random orthogonal matrix."""
    generator = torch.Generator().manual_seed(0)
    d_kv = model.config.d_kv
    layers = [{} for _ in range(LAYERS)]
    for side in "kv":
        for group in [Together(side, sum(split[:n]), count) for n, count in enumerate(split)]:
            r = group.count * d_kv
            noise = torch.randn(r, r, generator=generator, dtype=torch.float64)
            M = torch.linalg.qr(noise).Q
            columns = M.T.chunk(group.count, dim=1)
            for n, i in enumerate(group.layers):
                W = getattr(model.model.layers[i].self_attn, f"{side}_proj").weight.T
                A = W @ M[n * d_kv : (n + 1) * d_kv]
                layers[i][side] = LowRank(A, columns[n], 32)
    together = [group for side in "kv" for group in groups_of(split, side)]
    return Factors([LayerFactors(**layer) for layer in layers], together=tuple(together))


@quick
@given(splits, prompts, steps, windows, sinks, st.sampled_from([None, 9]))
def test_full_rank_is_the_full_cache(split, prompt, n, window, first, sliding):
    """Through whatever branch a token is seen, also while it passes the group: k and k^ are equal,
    and a token that was seen twice or not at all would change the softmax."""
    model = model_of(sliding_window=sliding)
    tokens = tiny_tokens(model, 2, prompt + n)
    cache = shared_cache(model, full_rank(model, split), window, sinks=first)
    ours = decode_all(model, tokens, prompt, cache)
    full = decode_all(model, tokens, prompt, full_cache(model))
    torch.testing.assert_close(ours, full, atol=1e-4, rtol=1e-4)


@quick
@given(splits, st.lists(st.sampled_from([1, 2, 17, 40, 70]), min_size=2, max_size=4), windows,
       sinks, widths, widths, st.sampled_from([BiBranchCache, FastCache]))  # fmt: skip
def test_pieces_equal_token_by_token(split, lengths, window, first, k_bits, v_bits, kind):
    """Numbers and bytes, for a text in pieces of any lengths. The first piece is the prompt."""
    model = model_of()
    factors = full_rank(model, split).map(lambda pair: replace(pair, group=32))
    factors = factors.in_bits(k_bits, v_bits)
    caches = [shared_cache(model, factors, window, 0, kind, first) for _ in range(2)]
    tokens = tiny_tokens(model, 2, sum(lengths))
    ours = torch.cat([model(piece, caches[0]) for piece in tokens.split(lengths, dim=1)], 1)
    theirs = decode_all(model, tokens, lengths[0], caches[1])
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    assert held_bytes(caches[0]) == held_bytes(caches[1])


@pytest.mark.parametrize("kind", [BiBranchCache, FastCache])
def test_nothing_is_kept_that_is_not_counted_once(kind):
    model = tiny_model(num_hidden_layers=LAYERS)
    shared = side_by_side(in_bits(make_factors(model, 4, 5), 3, 2, 64), groups_of((4,), "k"))
    cache = shared_cache(model, shared, 8, kind=kind, sinks=2)
    decode_all(model, tiny_tokens(model, 2, 150), 90, cache)
    weights = storages(model, shared)
    own = {at: size for at, size in storages(cache).items() if at not in weights}
    assert sum(own.values()) == held_bytes(cache)


def test_a_layer_alone_is_refused():
    """The latents would be those of some layers, in silence."""
    model = tiny_model(num_hidden_layers=LAYERS)
    shared = side_by_side(make_factors(model, 4, 5), groups_of((4,), "k"))
    cache = shared_cache(model, shared)
    model(tiny_tokens(model, 1, 5), cache)
    x, q, kv = torch.zeros(1, 1, 24), torch.zeros(1, 4, 1, 6), torch.zeros(1, 2, 1, 6)
    with pytest.raises(ValueError, match="in order"):
        cache[1].decode(x, q, kv, kv, model.rope)


def test_the_paper_s_caches_refuse_shared_latents():
    model = tiny_model(num_hidden_layers=LAYERS)
    shared = side_by_side(make_factors(model, 4, 5), groups_of((4,), "v"))
    with pytest.raises(ValueError, match="shared_cache"):
        bi_branch_cache(model, shared)
    with pytest.raises(ValueError, match="not KIVI's"):
        shared.in_bits(4, 4)
