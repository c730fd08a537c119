"""Latents shared by layers: beyond/shared.py."""

import itertools
import json
import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import cskv
import quant
from beyond import shared
from beyond.budget import Fitted, cut, factors_of, layer_weights, sides_of
from beyond.probes import Probe
from beyond.segments import FastCache
from beyond.shared import calibrate_groups, shared_cache
from cskv import BiBranchCache, Factors, LayerFactors, Together, output_metric
from infer import held_bytes, nominal_ratio
from model import full_cache
from support.command import UserError
from support.factors_file import load_factors, save_factors
from tests import helpers
from tests.drawn import bits, kinds, quick, sinks, widths, windows
from tests.helpers import OneToken, decode_all, in_bits, make_factors, tiny_model, tiny_tokens

LAYERS = 4
splits = st.sampled_from([(4,), (2, 2), (1, 3), (3, 1)])  # of the layers into groups


def model_of(**shape):
    return tiny_model(num_hidden_layers=LAYERS, scale=0.3, **shape).double()


def groups_of(split, side):
    """Groups of so many layers, those of one layer left out."""
    groups = [Together(side, sum(split[:n]), count) for n, count in enumerate(split)]
    return [group for group in groups if group.count > 1]


def side_by_side(factors, groups):
    """The same factors with the latents of each group's layers in one: the channels of each layer
    beside those of the others."""
    sides = {side: [getattr(layer, side) for layer in factors.layers] for side in "kv"}
    for group in groups:
        pairs = [sides[group.side][i] for i in group.layers]
        A = torch.block_diag(*[pair.A for pair in pairs]).chunk(group.count, dim=0)
        B = torch.block_diag(*[pair.B for pair in pairs]).chunk(group.count, dim=1)
        for n, i in enumerate(group.layers):
            sides[group.side][i] = replace(pairs[n], A=A[n], B=B[n])
    layers = [LayerFactors(*pairs) for pairs in zip(sides["k"], sides["v"], strict=True)]
    return Factors(layers, together=tuple(groups))


def in_runs(factors, *runs):
    """Keys with so many channels in so many bits."""
    layers = [replace(layer, k=replace(layer.k, runs=runs)) for layer in factors.layers]
    return replace(factors, layers=layers)


@quick
@given(splits, splits, st.sampled_from([1, 7, 33, 70]), st.integers(0, 40), windows, sinks, widths,
       widths, kinds, st.booleans())  # fmt: skip
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
    joined = side_by_side(apart, groups)
    tokens = tiny_tokens(model, 2, prompt + n)
    caches = [shared_cache(model, f, window, 0, kind, first) for f in (joined, apart)]
    ours, theirs = [decode_all(model, tokens, prompt, cache) for cache in caches]
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)
    assert held_bytes(caches[0]) == held_bytes(caches[1])
    assert nominal_ratio(model, joined) == pytest.approx(nominal_ratio(model, apart))


runs = st.lists(st.tuples(st.sampled_from([8, 4, 3, 2]), st.integers(1, 5)), min_size=2, max_size=4)


@quick
@given(runs, st.integers(1, 90), st.integers(0, 40), st.sampled_from([32, 64]))
def test_channels_that_differ_in_bits(some, n, more, group):
    """Each run is packed as if it were alone, in its own bits, and as many bytes."""
    grouping = quant.Grouping(quant.TOKENS, group)
    sizes = [channels for _, channels in some]
    generator = torch.Generator().manual_seed(n)
    c = torch.randn(2, n + more, sum(sizes), generator=generator)
    latents = shared.PackedRuns(sizes, [quant.Packed(bits, grouping) for bits, _ in some])
    latents.append(c[:, :n])
    for t in range(n, n + more):
        latents.append(c[:, t : t + 1])
    packed = (n + more) // group * group
    assert (latents.length, latents.parts[0].packed) == (n + more, packed)
    expected = [c[:, packed:]]
    if packed:
        few = [
            quant.dequantize(quant.quantize(part, bits, grouping), grouping)
            for (bits, _), part in zip(some, c[:, :packed].split(sizes, 2), strict=True)
        ]
        expected.insert(0, torch.cat(few, 2))
        codes = sum(part.buffers[0][:, : packed // group].numel() for part in latents.parts)
        assert codes == 2 * packed * sum(bits * channels for bits, channels in some) / 8
    torch.testing.assert_close(latents.read(0, n + more), torch.cat(expected, 1))
    assert len(latents.tensors()) == len(some) * (4 if packed else 1)


@quick
@given(st.integers(1, 3), bits, st.integers(1, 70), kinds)
def test_runs_of_equal_bits_are_one(channels, bits, n, kind):
    model = model_of()
    one = side_by_side(in_bits(make_factors(model, 4, 5), bits, bits, 32), groups_of((4,), "k"))
    one = one.to(model.lm_head.weight)
    two = in_runs(one, (bits, channels), (bits, one.layers[0].k.rank - channels))
    tokens = tiny_tokens(model, 2, n + 20)
    ours, theirs = [
        decode_all(model, tokens, 20, shared_cache(model, factors, 4, 0, kind, 1))
        for factors in (two, one)
    ]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def full_rank(model, split):
    """One latent of all channels of a group, mixed by a random orthogonal matrix."""
    factors = in_bits(make_factors(model, 12, 15), 32, 32, 32).to(model.lm_head.weight)
    factors = side_by_side(factors, [group for side in "kv" for group in groups_of(split, side)])

    def mixed(pair):
        generator = torch.Generator().manual_seed(0)
        Q = torch.linalg.qr(torch.randn(len(pair.B), len(pair.B), generator=generator).double()).Q
        return replace(pair, A=pair.A @ Q, B=Q.T @ pair.B)

    return factors.map(mixed)


@quick
@example((2, 2), [17, 17, 70, 2], 8, 1, (8, 2), None, OneToken)
@given(splits, st.lists(st.sampled_from([1, 2, 17, 40, 70]), min_size=2, max_size=4), windows,
       sinks, st.sampled_from([(3, 16), (8, 2), (4, 32), None]), st.sampled_from([None, 50, 9]),
       st.sampled_from([OneToken, FastCache, BiBranchCache]))  # fmt: skip
def test_pieces_equal_token_by_token(split, lengths, window, first, bits, sliding, kind):
    """Numbers and bytes, for a text in pieces of any lengths; the first one is the prompt. With
    full rank and all bits they are the full cache's, through whatever branch a token is seen, also
    while it passes the group: one seen twice or not at all would change the softmax.

    A code, or a scale in 16 bits, may round the other way, and then a few logits differ. If a token
    is read in bits that should be read as it is, half of them do, by a tenth of their size.
    """
    model = model_of(sliding_window=sliding)
    factors = full_rank(model, split)
    if bits:
        factors = factors.in_bits(*bits)
    caches = [shared_cache(model, factors, window, 0, kind, first) for _ in range(2)]
    tokens = tiny_tokens(model, 2, sum(lengths))
    ours = torch.cat([model(piece, caches[0]) for piece in tokens.split(lengths, dim=1)], 1)
    theirs = decode_all(model, tokens, lengths[0], caches[1])
    assert (ours - theirs).norm() < (3e-3 if bits else 1e-5) * theirs.norm()
    assert held_bytes(caches[0]) == held_bytes(caches[1])
    if not bits and kind is not FastCache:
        full = decode_all(model, tokens, lengths[0], full_cache(model))
        torch.testing.assert_close(theirs, full, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [OneToken, FastCache])
def test_a_cache_can_be_copied(kind):
    """After a prompt, to go on in two ways; layers share latents in the copy, too."""
    model = model_of()
    factors = in_bits(full_rank(model, (4,)), 3, 8, 32)
    factors = in_runs(factors, (8, 5), (3, factors.layers[0].k.rank - 5))
    cache, other = [shared_cache(model, factors, 4, 0, kind, 1) for _ in range(2)]
    tokens = tiny_tokens(model, 2, 150)
    model(tokens[:, :70], cache)
    copy = deepcopy(cache)
    model(tokens[:, 70:].flip(1), cache)
    expected = decode_all(model, tokens, 70, other)[:, 70:]
    assert torch.equal(decode_all(model, tokens[:, 70:], 0, copy), expected)


@pytest.mark.parametrize("kind, last", [(OneToken, 17), (FastCache, 17), (FastCache, 40)])
def test_latents_are_dequantized_once_a_step(monkeypatch, kind, last):
    """Not once a layer, however many chunks they are read in, and nothing of them is left; or only
    of one step, where the last layer has chunks of its own."""
    model = model_of()
    factors = in_bits(make_factors(model, 4, 5), 4, 3, 32).to(model.lm_head.weight)
    groups = [group for side in "kv" for group in groups_of((LAYERS,), side)]
    cache = shared_cache(model, side_by_side(factors, groups), 4, 0, kind, 1)
    for layer in cache:
        layer.chunk = 17
    cache[-1].chunk = last
    tokens = tiny_tokens(model, 1, 105)
    model(tokens[:, :100], cache)
    ranges = []
    read = quant.Packed.read

    def noted(latents, start, stop):
        ranges.append((id(latents), start, stop))
        return read(latents, start, stop)

    monkeypatch.setattr(quant.Packed, "read", noted)
    for t in range(100, 105):
        ranges.clear()
        model(tokens[:, t : t + 1], cache)
        assert len(ranges) == len(set(ranges)) >= 2 * 6
        for total in (cache[0].c_k.total, cache[0].c_v.total):
            left = {(id(total.latents), *some) for some in total.values}
            assert left <= set(ranges)
            assert not left or last != 17


def test_wrong_uses_are_refused():
    """A layer alone, whose latents would be those of some layers; and the paper's caches."""
    model = tiny_model(num_hidden_layers=LAYERS)
    shared = side_by_side(make_factors(model, 4, 5), groups_of((4,), "k"))
    cache = shared_cache(model, shared)
    model(tiny_tokens(model, 1, 5), cache)
    x, q, kv = torch.zeros(1, 1, 24), torch.zeros(1, 4, 1, 6), torch.zeros(1, 2, 1, 6)
    with pytest.raises(ValueError, match="in order"):
        cache[1].decode(x, q, kv, kv, model.rope)
    with pytest.raises(ValueError, match="shared_cache"):
        cskv.bi_branch_cache(model, shared)
    with pytest.raises(ValueError, match="not KIVI's"):
        shared.in_bits(4, 4)


# ------------------------------------------------------------------------------- closed form


def fitted_on(model, samples, count):
    """Statistics of groups of `count` layers, as for the budget's command."""
    groups = sides_of(LAYERS, count)
    seen, moments = calibrate_groups(model, samples, groups, 4, 2)
    weights = {group: [1.0, 1e-6, 20.0, 3.0][: group.count] for group in groups}
    return Fitted(model, seen, 32, moments=moments, weights=weights), groups


@pytest.mark.parametrize("count, passes", [(2, 1), (4, 2)])
def test_sums_have_no_more_bytes_at_a_time_than_the_weights(monkeypatch, count, passes):
    """A group's are the same in whatever pass they are made."""
    model = tiny_model(num_hidden_layers=LAYERS)
    samples = [tiny_tokens(model, 1, 40, seed=n) for n in range(2)]
    sums = 16 * (12 * count) ** 2  # bytes of a group
    weights = sum(weight.nbytes for weight in model.parameters())
    assert (8 // count * sums < weights) == (passes == 1)
    real, calls = shared.calibrate_outputs, []

    def noted(*args):
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(shared, "calibrate_outputs", noted)
    fitted, groups = fitted_on(model, samples, count)
    assert len(calls) == passes
    for group in groups:
        alone = calibrate_groups(model, samples, [group], 4, 2)[1][group]
        assert torch.equal(fitted.moments[group], alone)


def weighed(C, B, moment, M):
    """The error of k C B for keys or values k of that moment, in a metric M."""
    error = torch.eye(len(C)).double() - C @ B
    return (error.T @ moment.double() @ error * M).sum().item()


def own_channels(model, fitted, i, side, pair):
    """C for A = W C of a layer's pair, and the layer's metric."""
    attention = model.model.layers[i].self_attn
    W = getattr(attention, f"{side}_proj").weight.T.double()
    metric = output_metric(attention) if side == "v" else fitted.seen[i].k_metric
    return torch.linalg.lstsq(W, pair.A.double()).solution, metric


@pytest.mark.parametrize("side", ["k", "v"])
def test_no_shared_latent_of_that_rank_loses_less(side):
    """The weighed error of the closed form is the sum of the dropped eigenvalues, and disturbed
    factors have a larger one."""
    model = model_of()
    fitted, groups = fitted_on(model, [tiny_tokens(model, 2, 60)], 4)
    (group,) = [group for group in groups if group.side == side]
    moment = fitted.moments[group]
    columns, rows, metrics = [], [], []
    for i, pair in enumerate(fitted.pairs(group, 7)):
        C, metric = own_channels(model, fitted, i, side, pair)
        columns.append(C)
        rows.append(pair.B.double())
        metrics.append(fitted.weights[group][i] * metric)
    C, B, M = torch.cat(columns), torch.cat(rows, 1), torch.block_diag(*metrics)
    least = weighed(C, B, moment, M)
    eigenvalues = torch.linalg.eigvals(moment.double() @ M).real.sort().values
    assert least == pytest.approx(eigenvalues[:-7].sum().item(), rel=1e-4)
    noise = torch.randn(C.shape, generator=torch.Generator().manual_seed(0)).double()
    for size in (1e-2, 1e-1):
        assert weighed(C + size * C.std() * noise, B, moment, M) > least


@pytest.mark.parametrize("side", ["k", "v"])
def test_weights_are_what_a_layer_costs_over_what_it_loses(side):
    """With a sixth of its channels, the other layers exact."""
    model = tiny_model(num_hidden_layers=LAYERS)
    samples = [tiny_tokens(model, 1, 60, seed=n) for n in range(2)]
    fitted, groups = fitted_on(model, samples, 2)
    group = [group for group in groups if group.side == side][1]
    probe = Probe(model, samples, 4, 2)
    for n, weight in enumerate(layer_weights(probe, fitted, group)):
        i, own = group.first + n, slice(12 * n, 12 * (n + 1))
        moment = fitted.moments[group][own, own]
        W = getattr(model.model.layers[i].self_attn, f"{side}_proj").weight.T
        metric = cskv.attention_metric(model.model.layers[i].self_attn, side, fitted.seen[i])
        pair = cskv.optimal_factors(W, 2, moment, metric)
        C, metric = own_channels(model, fitted, i, side, pair)
        cost = probe.changed({Together(side, i, 1): [pair]}).cost
        assert weight == pytest.approx(cost / weighed(C, pair.B.double(), moment, metric), rel=1e-3)


# ------------------------------------------------------------------------------------- files


def saved(tmp_path, count=2, bits=3):
    model = tiny_model(num_hidden_layers=LAYERS)
    fitted, groups = fitted_on(model, [tiny_tokens(model, 2, 60)], count)
    sides = {group: cut(fitted.pairs(group, 5), group, ((bits, 5),)) for group in groups}
    factors = factors_of(sides, LAYERS)
    save_factors(tmp_path / "f", factors, model)
    return model, factors


@pytest.mark.parametrize("bits", [3, 16])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_shared_factors_survive_a_file(tmp_path, count, bits):
    """B, and what tells A: that is not in the file. B is in 8 bits where latents are in fewer."""
    model, factors = saved(tmp_path, count, bits)
    again = load_factors(tmp_path / "f", model)
    assert again.together == factors.together and len(again.together) == (4 if count == 2 else 2)
    for ours, theirs in zip(again.pairs, factors.pairs, strict=True):
        assert (ours.bits, ours.group, ours.rank) == (bits, 32, 5)
        for a, b in ((ours.A, theirs.A), (ours.B, theirs.B)):
            assert (a - b).norm() < (1.5e-2 if bits == 3 else 3e-3) * b.norm()
    with safe_open(tmp_path / "f", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    shared = {(i, group.side) for group in factors.together for i in group.layers}
    for i, side in itertools.product(range(LAYERS), "kv"):
        prefix = f"model.layers.{i}.self_attn.{side}_proj"
        assert (f"{prefix}.A" in tensors) == ((i, side) not in shared)
        assert (f"{prefix}.metric" in tensors) == ((i, side) in shared)
        assert (f"{prefix}.rows" in tensors) == ((i, side) in shared and bits == 3)
        if f"{prefix}.rows" in tensors:
            step = tensors[f"{prefix}.rows"] * tensors[f"{prefix}.columns"]
            B = getattr(factors.layers[i], side).B
            error = (step * tensors[f"{prefix}.B"] - B).abs() / step
            assert error.max() < 0.501 and tensors[f"{prefix}.B"].abs().amax(1).eq(127).all()


def test_runs_survive_a_file(tmp_path):
    model, factors = saved(tmp_path, 4)
    runs = (8, 1), (3, 4)
    save_factors(tmp_path / "f", in_runs(factors, *runs), model)
    again = load_factors(tmp_path / "f", model)
    assert {layer.k.runs for layer in again.layers} == {runs}
    assert {(layer.k.bits, layer.v.bits, layer.v.runs) for layer in again.layers} == {(3, 3, ())}
    assert [pair.bits_a_token for pair in again.stored] == [20, 15]


def test_other_shared_factors_keep_their_a(tmp_path):
    model = tiny_model(num_hidden_layers=LAYERS)
    factors = in_bits(make_factors(model, 4, 5, "svd"), 16, 16, 32)
    factors = side_by_side(factors, groups_of((4,), "k"))
    save_factors(tmp_path / "f", factors, model, torch.float32)
    helpers.assert_same_factors(load_factors(tmp_path / "f", model), factors)


def rewritten(path, drop=None, replaced=None, **metadata):
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name != drop]  # noqa: SIM118
        tensors = {name: file.get_tensor(name) for name in names}
        save_file({**tensors, **(replaced or {})}, path, {**file.metadata(), **metadata})


K = "model.layers.1.self_attn.k_proj"
NO_GROUPS = ("q", 0, 2), ("k", 3, 2), ("k", 0, 0), ("k", 0), ("k", -1, 2), ("k", 0, 10**6)
NO_BITS = (  # of channels 0 to 4
    *([[16, 1], [3, 4]], [[3, 4], [16, 1]], [[32, 1], [16, 4]], [[16, 5]], [[8, -1], [3, 6]]),
    *([[8, 1.0], [3, 4.0]], [[8, True], [3, 4]], [[8, 0], [3, 5]], [[3, 5, 1]], [3, 5], [[]], []),
    *(3.0, True, 5, "3", None, {}),
)
DAMAGE = [
    *[({"together": json.dumps([group])}, "is damaged") for group in NO_GROUPS],
    ({"together": '[["k", 0, 2], ["k", 1, 2]]'}, "is damaged"),
    ({"together": "3"}, "is damaged"),
    *[({"k_bits": json.dumps([given] * 4)}, "is damaged") for given in NO_BITS],
    ({"k_bits": "[" * 10**5}, "is damaged"),
    ({"together": "[]"}, "is in no group"),
    ({"together": '[["k", 0, 2], ["v", 0, 2], ["k", 2, 2]]'}, "v_proj of layer 2 is in no"),
    *[
        ({"replaced": {f"{K}.{name}": torch.full(size, value)}}, f"{name} has numbers")
        for name, size in (("rows", (5, 1)), ("columns", (12,)), ("metric", (12,)))
        for value in (math.nan, math.inf)
    ],
    ({"k_bits": json.dumps([[[8, 1], [3, 3]]] * 4)}, "is damaged"),
    ({"k_bits": json.dumps([[[8, 1], [5, 4]]] * 4)}, "is damaged"),
    ({"k_bits": json.dumps([[[8, 1], [3, 4]]] + [3] * 3)}, "is damaged"),
    ({"k_bits": json.dumps([[[8, 1], [3, 4]]] * 4), "together": "[]"}, "is damaged"),
    *[({"group": n}, "is damaged") for n in ("0", "-32", "33", "many", "64.0", "")],
    ({"replaced": {f"{K}.rows": torch.ones(2)}}, "has the size"),
    ({"replaced": {f"{K}.columns": torch.ones(2)}}, "has the size"),
    (
        {"replaced": {f"{K}.B": torch.ones(4, 12), f"{K}.rows": torch.ones(4, 1)}},
        "together of ranks",
    ),
    ({"drop": f"{K}.rows"}, f"lacks '{K}.rows'"),
    ({"drop": f"{K}.columns"}, f"lacks '{K}.columns'"),
    ({"drop": f"{K}.metric"}, f"lacks '{K}.A'"),
]


@pytest.mark.parametrize("damage, message", DAMAGE)
def test_a_damaged_file_is_refused(tmp_path, damage, message):
    """Groups of layers and of tokens that are none, scales of another size, tensors that lack."""
    model, _ = saved(tmp_path)
    rewritten(tmp_path / "f", **damage)
    with pytest.raises(UserError, match=f"{message}.*make it again"):
        load_factors(tmp_path / "f", model)
