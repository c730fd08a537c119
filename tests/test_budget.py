"""One byte budget: decode mode in one pass, probes, the spending, and the command."""

import itertools
import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import beyond.budget as algorithm
import cskv
import quant
from beyond.budget import Choice, convex_hull, free_choices, make_plan, sides_of, spend
from beyond.outputs import calibrate_outputs
from beyond.probes import SIDES, DecodeMode, Probe
from beyond.segments import SmallWindowCache
from beyond.shared import calibrate_groups, shared_cache
from cskv import BiBranchCache, Factors, Together, bi_branch_cache, calibrate, init_factors
from experiments import budget
from infer import full_bytes, held_bytes
from model import full_cache
from support import text
from support.factors_file import load_factors
from support.huggingface.checkpoint import load_model
from support.huggingface.tokenizer import load_tokenizer
from tests import helpers
from tests.drawn import bits, groups, quick, ranks, shapes, sinks, windows
from tests.evaluating import notes_beside, torchrun
from tests.helpers import call, decode_all, in_bits, make_factors, tiny_model, tiny_tokens

# --------------------------------------------------------------------------------- decode mode


def heads(model, y):
    return y.unflatten(-1, (-1, model.config.head_dim)).transpose(1, 2)


def decoded(model, tokens, P, sides, window, first):
    """Log-probabilities behind the tokens from P on [1, T], with some sides in decode mode, and
    latents of the exact inputs."""
    inputs = [x.float() for x, _, _ in helpers.layer_inputs(model, tokens)]
    hats = {}
    for side, pairs in sides.items():
        z = sum(inputs[i] @ pair.A for i, pair in zip(side.layers, pairs, strict=True))
        if pairs[0].bits < 16:
            grouping = pairs[0].grouping(SIDES[side.side])
            few = quant.quantize(z[:, first:], pairs[0].bits, grouping)
            z[:, first:] = quant.dequantize(few, grouping)
        for i, pair in zip(side.layers, pairs, strict=True):
            bias = getattr(model.model.layers[i].self_attn, f"{side.side}_proj").bias
            y = heads(model, z @ pair.B + (0 if bias is None else bias))
            hats[i, side.side] = model.rope.rotate(y, 0) if side.side == "k" else y
    x = model.model.embed_tokens(tokens)[:, P:]
    for i, layer in enumerate(model.model.layers):
        a = layer.self_attn
        k = model.rope.rotate(heads(model, a.k_proj(inputs[i][:, :P])), 0)
        v = heads(model, a.v_proj(inputs[i][:, :P]))
        own = hats.get((i, "k")), hats.get((i, "v"))
        x = layer(x, model.rope, DecodeMode(k, v, *own, window, first, model.config.sliding_window))
    return model.lm_head(model.model.norm(x))[0].double().log_softmax(-1)


@quick
@given(
    shapes, st.integers(2, 24), st.data(), windows, sinks, ranks, st.sampled_from(["k", "v", "kv"])
)
def test_decode_mode_is_the_window_mask_written_out(shape, T, data, window, first, rank, names):
    """A side without a pair is exact, as one of full rank."""
    model = tiny_model(**shape, num_hidden_layers=1)
    P = data.draw(st.integers(1, T - 1))
    whole = make_factors(model, model.config.d_kv, model.config.d_kv).layers[0]
    few = make_factors(model, rank, rank + 1).in_bits(32, 32).layers[0]
    pairs = {name: getattr(few, name) for name in names}
    tokens = tiny_tokens(model, 1, T)
    sides = {Together(name, 0, 1): [pair] for name, pair in pairs.items()}
    found = decoded(model, tokens, P, sides, window, first)
    factors = Factors([replace(whole, **pairs)])
    expected = helpers.naive_forward(model, tokens[0], factors, window, P, first)[P:]
    torch.testing.assert_close(found, expected.log_softmax(-1), atol=2e-4, rtol=2e-4)


@quick
@given(st.integers(40, 80), st.sampled_from([0, 4]), bits, groups)
def test_a_probe_rounds_as_the_cache_does(T, first, b, group):
    """Rebuilt keys and values are those of packed latents, in groups that begin after the sinks."""
    model = tiny_model()
    factors = in_bits(make_factors(model, 5, 5), b, b, group)
    tokens = tiny_tokens(model, 1, T)
    x = helpers.layer_inputs(model, tokens)[0][0].float()
    exact = Probe(model, [tokens], 1, first)
    for side, dim in SIDES.items():
        pair = getattr(factors.layers[0], side)
        c = x @ pair.A
        latents = quant.Packed(b, pair.grouping(dim))
        latents.append(c[:, first:])
        read = torch.cat([c[:, :first], latents.read(0, latents.packed)], 1)
        expected = heads(model, read @ pair.B)
        if side == "k":
            expected = model.rope.rotate(expected, 0)
        found = exact.changed({Together(side, 0, 1): [pair]}).texts[0].rebuilt[side, 0]
        found = found[:, :, : read.shape[1]]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------- probe


def whole_run(model, texts, steps, sides):
    """The cost of some sides, with a window of 5 and 2 sinks, by reading all texts anew."""
    divergences = []
    for tokens in texts:
        P = max(7, tokens.shape[1] - steps)
        exact = model(tokens)[0, P:].double().log_softmax(-1)
        other = decoded(model, tokens, P, sides, 5, 2)
        divergences.append(F.kl_div(other, exact, log_target=True, reduction="none").sum(-1))
    return torch.cat(divergences).mean().item()


def sides_in(factors, *groups):
    """All sides of factors, and their pairs; some in groups of layers, with one latent for all."""
    alone = set(sides_of(len(factors.layers)))
    for group in groups:
        alone -= {Together(group.side, i, 1) for i in group.layers}
    sides = sorted([*alone, *groups], key=lambda side: (side.side, side.first))
    return {s: [getattr(factors.layers[i], s.side) for i in s.layers] for s in sides}


@pytest.mark.parametrize(("planned", "steps"), [(False, 100), (True, 100), (True, 20)])
@pytest.mark.parametrize("side", [*sides_of(2), Together("v", 1, 2)])
def test_what_is_changed_costs_what_the_whole_run_does(side, planned, steps):
    """A side of a layer, or of two, all else exact; or as planned, and then it is exact."""
    model = tiny_model(num_hidden_layers=3)
    texts = [tiny_tokens(model, 1, T, seed=T) for T in (40, 29, 40)]
    factors = in_bits(make_factors(model, 5, 5, "svd"), 4, 4, 32)
    v = factors.layers[0].v  # of one rank
    factors = replace(factors, layers=[replace(layer, v=v) for layer in factors.layers])
    sides = sides_in(factors, *[side] * (side.count > 1))
    few = {side: [replace(pair, A=pair.A[:, :3], B=pair.B[:3], bits=2) for pair in sides[side]]}
    exact = probe = Probe(model, texts, 5, 2, predictions=1000, steps=steps)
    run = partial(whole_run, model, texts, steps)
    if planned:
        probe = exact.changed(sides)
        assert probe.cost == pytest.approx(run(sides), rel=1e-3)
        without = probe.changed({side: [None] * side.count}).cost
        others = {other: pairs for other, pairs in sides.items() if other != side}
        assert without == pytest.approx(run(others), rel=1e-3)
        few = others | few
        assert probe.cost != without
    expected = run(few)
    assert expected > 1e-3
    assert probe.changed({side: few[side]}).cost == pytest.approx(expected, rel=1e-3)
    assert exact.cost == 0


def test_predictions_are_spread_to_the_last_token():
    """Over all that are decoded, which are 20 of 40 tokens, or those that meet a rebuilt one."""
    all_that_meet = [7, 17, 28, 39]
    for spread, steps, at in (
        (None, None, all_that_meet),
        (99, 99, all_that_meet),
        (30, None, [10, 19, 29, 39]),
        (None, 20, [20, 26, 32, 39]),
        (30, 20, [20, 26, 32, 39]),
        (4, 20, [36, 37, 38, 39]),
    ):
        probe = Probe(tiny_model(), [tiny_tokens(tiny_model(), 1, 40)], 5, 2, 4, spread, steps)
        (text,) = probe.texts
        assert (40 - text.inputs[0].shape[1] + text.at).tolist() == at


# ---------------------------------------------------------------------------------------- bytes


@quick
@given(st.integers(1, 300), st.integers(1, 12), windows, sinks, bits, bits, groups)
def test_bytes_are_what_a_cache_holds(T, rank, window, first, k_bits, v_bits, group):
    model = tiny_model()
    factors = in_bits(init_factors("svd", model, [rank] * 2, [rank] * 2), k_bits, v_bits, group)
    model = model.to(torch.bfloat16)
    cache = bi_branch_cache(model, factors.to(model.lm_head.weight), window, T, sinks=first)
    model(tiny_tokens(model, 1, T), cache)
    latents = 0
    for b, side in ((k_bits, "k"), (v_bits, "v")):
        latents += algorithm.latent_bytes(rank, b, side, T - min(T, first), window, group)
    assert held_bytes(cache) == 2 * latents + full_bytes(model, min(T, window + first))


# ------------------------------------------------------------------------------------- spending

costs = st.floats(0, 10, allow_nan=False, width=32)
one_choice = st.builds(Choice, st.integers(1, 99), st.just(4), st.integers(1, 40), costs)
some_choices = st.lists(one_choice, min_size=1, max_size=8)
some_sides = st.lists(some_choices, min_size=1, max_size=5)
some_falls = st.lists(st.integers(1, 50), min_size=1, max_size=5)
plans = settings(quick, max_examples=60)


def total(plan, name):
    return sum(getattr(choice, name) for choice in plan)


@plans
@given(some_sides, st.integers(0, 200), st.integers(0, 60))
def test_a_plan_fits_its_bytes_and_more_never_give_a_worse_one(sides, room, more):
    least = sum(min(choice.nbytes for choice in side) for side in sides)
    if room < least:
        with pytest.raises(ValueError, match="remove less"):
            spend(sides, room)
        return
    few, many = spend(sides, room), spend(sides, room + more)
    assert total(few, "nbytes") <= room
    assert all(choice in side for choice, side in zip(few, sides, strict=True))
    assert total(many, "cost") <= total(few, "cost") + 1e-9
    best = sum(min(choice.cost for choice in side) for side in sides)
    assert total(spend(sides, 10**6), "cost") == pytest.approx(best)


@plans
@given(st.lists(some_falls, min_size=1, max_size=4), st.data())
def test_greedy_is_the_best_plan_of_convex_sides(falls, data):
    """Each side's cost falls less and less with each further byte: against all plans there are."""
    sides = []
    for own in falls:
        left = [sum(sorted(own)[: len(own) - n]) for n in range(len(own) + 1)]
        sides.append([Choice(n, 4, 1 + n, float(cost)) for n, cost in enumerate(left)])
    room = data.draw(st.integers(len(sides), sum(map(len, sides))))
    allowed = (p for p in itertools.product(*sides) if total(p, "nbytes") <= room)
    assert total(spend(sides, room), "cost") == min(total(plan, "cost") for plan in allowed)


@plans
@given(some_choices)
def test_the_hull_has_no_choice_above_a_line_of_two_others(side):
    hull = convex_hull(side)
    assert hull[0].nbytes == min(choice.nbytes for choice in side)
    assert hull[-1].cost == min(choice.cost for choice in side)
    for a, b in itertools.pairwise(hull):
        assert a.nbytes < b.nbytes and a.cost > b.cost
        for c in side:  # none below the line from a to b
            line = a.cost - (c.nbytes - a.nbytes) * algorithm.fall(a, b)
            assert not a.nbytes <= c.nbytes <= b.nbytes or c.cost >= line - 1e-6


def test_what_is_left_goes_to_the_side_whose_step_is_too_large():
    side = [Choice(1, 4, 1, 9.0), Choice(2, 4, 3, 8.0), Choice(3, 4, 10, 0.0)]
    assert [spend([side], room)[0].rank for room in (1, 2, 3, 9, 10)] == [1, 1, 2, 2, 3]


def test_costs_between_the_probed_ranks_lie_on_a_line_of_their_logarithm():
    measured = {(2, 2): 1e-1, (6, 2): 1e-3, (2, 3): 1e-2, (6, 3): 1e-6}
    kinds = [(2, 2), (4, 2), (6, 3), (4, 3), (7, 3), (9, 16)]
    free = [Choice(rank, b, rank * b, 0.0) for rank, b in kinds]
    found = algorithm.with_costs(free, measured)
    assert [(c.rank, c.bits) for c in found] == [*kinds[:4], (9, 16)]  # 7 is no rank between
    assert all(c.nbytes == c.rank * c.bits for c in found)
    assert [c.cost for c in found] == pytest.approx([1e-1, 1e-2, 1e-6, 1e-4, 0])


@quick
@given(
    st.integers(1, 60),
    st.sampled_from([(2, 3, 4), (2, 3, 4, 8), (4,), (2, 8)]),
    st.sampled_from([0, 0.5, 6]),
    st.data(),
)
def test_bits_of_channels_lie_at_one_water_level(rank, bits_of, price, data):
    """Each channel has the width of least error and bits together, but for runs of 4 channels. At
    the level the last one's error falls by as much as its bits and its price weigh."""
    steps = data.draw(st.lists(st.floats(1, 3), min_size=64, max_size=64))
    energies = 1 / torch.tensor(steps).double().cumprod(0)
    runs = algorithm.water_runs(energies, rank, bits_of, 128, price)
    found = [bits for bits, channels in runs for _ in range(channels)]
    assert len(found) == rank and found == sorted(found, reverse=True)
    assert all(channels % 4 == 0 for _, channels in runs[:-1]) and {*found} <= {*bits_of}
    errors = {b: (5.3 / (2**b - 1)) ** 2 / 12 for b in bits_of}
    least = min(bits_of)
    level = energies[rank - 1].item() * (1 - errors[least]) / (least + 0.25 + price)
    best = []
    for energy in energies[:rank].tolist():
        best.append(min(bits_of, key=lambda b: energy * errors[b] + level * (b + 0.25)))
    for width in bits_of:
        assert abs(sum(b > width for b in found) - sum(b > width for b in best)) <= 2


@pytest.mark.parametrize("count", [1, 2])
def test_a_plan_around_a_plan(count):
    """It has ranks near the first one's, and its cost is that of all sides together."""
    model = tiny_model()
    texts = [tiny_tokens(model, 1, 60, seed=n) for n in range(3)]
    sides = sides_of(2, count)
    seen, moments = calibrate_groups(model, texts, [s for s in sides if count > 1], 4, 2)
    fitted = algorithm.Fitted(model, seen, 32, moments=moments)
    probe = Probe(model, texts, 4, 2)
    free = {}
    alone = {side: algorithm.probe_alone(probe, fitted, side) for side in sides}
    for side in sides:
        fitted.weights[side] = alone[side]["weights"]
        free[side] = free_choices(fitted, side, 200, 4)
    plan = make_plan(probe, fitted, free, alone, 2500)
    around = {side: algorithm.probe_around(plan, fitted, side) for side in sides}
    other = make_plan(probe, fitted, free, around, 2500)
    for made in (plan, other):
        assert total(made.choices.values(), "nbytes") <= 2500
        read = sides_in(made.factors, *made.factors.together)
        assert made.probe.cost == pytest.approx(probe.changed(read).cost)
        assert made.probe.cost > 0
        for pair, choice in zip(made.factors.stored, made.choices.values(), strict=True):
            assert (pair.runs or ((pair.bits, pair.rank),)) == choice.runs
            assert pair.rank == choice.rank and choice.bits in (pair.bits, algorithm.MIXED)
    for side, choice in plan.choices.items():
        near = sorted({rank for rank, _ in other.costs[side]})
        assert choice.rank in near and (choice.rank <= 4 or near[0] <= 0.8 * choice.rank)
        chosen = other.choices[side]
        assert near[0] <= chosen.rank <= near[-1] or chosen.bits == 16
        if choice.bits < 16:  # the plan's own choice costs what it does in the plan
            exact = plan.probe.changed({side: [None] * side.count}).cost
            own = other.costs[side][choice.rank, choice.bits]
            assert own == pytest.approx(plan.probe.cost - exact, abs=1e-5)
    # Of all bytes that it can use it makes a full cache.
    factors = make_plan(probe, fitted, free, alone, 10**6).factors
    assert {(pair.rank, pair.bits) for pair in factors.pairs} == {(12 * count, 16)}
    tokens = tiny_tokens(model, 2, 50)
    exact = decode_all(model, tokens, 10, full_cache(model))
    cache = shared_cache(model, factors.in_bits(32, 32), 4, sinks=2)
    torch.testing.assert_close(decode_all(model, tokens, 10, cache), exact, atol=2e-4, rtol=1e-3)


# -------------------------------------------------------------------------------------- command


@pytest.fixture
def planned(everything, capsys):
    """Runs the command line, which must go well. Returns what it said."""
    pytest.importorskip("matplotlib")

    def run(*arguments):
        code, out, err = call(budget, capsys, *arguments)
        assert (code, out) == (0, ""), err
        return err

    return run


def flags(everything, *outs, **more):
    options = {"model": everything / "model", "data": everything / "text.txt", "samples": 6}
    options |= {"seq_len": 50, "window": 4, "sinks": 2, "length": 200, "probe_len": 40, **more}
    shown = []
    for name, value in options.items():
        if value is not None:
            shown += [f"--{name.replace('_', '-')}", value]
    return [*shown, "--remove", *(0.4, 0.6)[: len(outs)], "--out", *outs]


def test_the_command_spends_on_fewer_channels_that_have_a_price(everything, tmp_path, planned):
    channels = []
    for price in (0, 50):
        out = tmp_path / f"{price}.safetensors"
        planned(*flags(everything, out, widths="2,8", layers_together=2, channel_price=price))
        factors = load_factors(out, load_model(everything / "model"))
        channels.append(sum(pair.rank for pair in factors.stored))
    assert channels[1] < channels[0]


KEPT = {"group": 0}, {"group": 64}, {}, {"layers_together": 2}, {"window_bits": 8}


@pytest.mark.parametrize("more", KEPT)
def test_the_command_writes_what_the_cache_will_hold(everything, tmp_path, planned, more):
    outs = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    said = planned(*flags(everything, *outs, widths="2,3,8", **more))
    model = load_model(everything / "model", dtype=torch.bfloat16)
    count = more.get("layers_together", 1)
    for file, remove in zip(outs, (0.4, 0.6), strict=True):
        plan = json.loads(file.with_suffix(".json").read_text())
        factors = load_factors(file, model)
        for pair, row in zip(factors.stored, plan, strict=True):
            assert pair.rank == row["rank"]
            assert pair.bits_a_token == pytest.approx(pair.rank * row["bits"])
            assert (pair.runs or ((pair.bits, pair.rank),)) == tuple(map(tuple, row["runs"]))
        assert {pair.group for pair in factors.pairs} == {more.get("group", 128) or None}
        sides = [(i, count, of) for i in range(0, 2, count) for of in ("keys", "values")]
        assert [(r["layer"], r["layers"], r["of"]) for r in plan] == sides
        assert factors.together == tuple(side for side in sides_of(2, count) if count > 1)
        exact = full_bytes(model, 6)
        kind = BiBranchCache
        if "window_bits" in more:
            exact = exact // 2 + 2 * 2 * 2 * 6 * 4  # a scale and a minimum for each head
            kind = SmallWindowCache
        cache = shared_cache(model, factors, 4, 200, kind, sinks=2)
        model(tiny_tokens(model, 1, 200), cache)
        assert held_bytes(cache) == sum(r["nbytes"] for r in plan) + exact
        assert factors.info.get("window_bits", "16") == str(more.get("window_bits", 16))
        left = held_bytes(cache) / full_bytes(model, 200)
        assert left <= 1 - remove and f"{file}: {1 - left:.1%} of the bytes removed" in said
        assert file.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert sum(r["cost"] for r in plan) >= 0


@pytest.mark.parametrize("together", [1, 2])
def test_an_interrupted_probing_goes_on(
    everything, tmp_path, planned, refused, capsys, monkeypatch, together
):
    """Of each side alone and around a plan, and gives what it gives at once."""
    wholes = tmp_path / "whole.safetensors", tmp_path / "other.safetensors"
    outs = tmp_path / "out.safetensors", tmp_path / "out2.safetensors"
    planned(*flags(everything, *wholes, layers_together=together))
    sides = sides_of(2, together)
    calls = []

    def interrupted(real, probed, fitted, side):
        calls.append(side)
        if len(calls) in (2, len(sides) + 3):  # each time at the second side
            raise KeyboardInterrupt
        return real(probed, fitted, side)

    for name in ("probe_alone", "probe_around"):
        monkeypatch.setattr(budget, name, partial(interrupted, getattr(budget, name)))
    arguments = flags(everything, *outs, layers_together=together)
    for _ in range(2):
        assert call(budget, capsys, *arguments)[0] == 130
        assert len(notes_beside(outs[0])) == 1 and not outs[0].exists()
    refused(budget, *arguments, "--window", 5, notes=True)
    planned(*arguments)
    assert calls == 2 * (sides[:2] + sides[1:]) + sides
    assert not notes_beside(outs[0])
    for out, whole in zip(outs, wholes, strict=True):
        assert out.read_bytes() == whole.read_bytes()
        assert out.with_suffix(".json").read_bytes() == whole.with_suffix(".json").read_bytes()


@pytest.mark.parametrize("init, copies", [("outputs", True), ("attention", False)])
def test_what_is_fitted_and_probed_is_what_is_asked_for(
    everything, tmp_path, planned, init, copies
):
    out = tmp_path / "a.safetensors"
    group = 128 if copies else 0
    more = {"init": init, "group": group, "again": 0, "probe_len": 30, "samples": 4}
    more |= {"passages": 4, "steps": 15, "spread": 8}
    planned(*flags(everything, out, **more), *["--no-copies"] * (not copies))
    model = load_model(everything / "model")
    tokenizer = load_tokenizer(everything / "model")
    drawn = text.sample_tokens(everything / "text.txt", tokenizer, 4 + 4, 50, 0, 2)
    drawn = sorted(drawn, key=torch.Tensor.numel)
    samples = drawn[:4]
    texts = [piece[:, -30:] for piece in drawn[4:]]
    if copies:
        samples, texts = text.with_copies(samples, 2), text.with_copies(texts, 4)
    seen = calibrate(model, samples, 2)
    if init == "outputs":
        seen = calibrate_outputs(model, samples, 4, 2)
    probe = Probe(model, texts, 4, 2, spread=8, steps=15)
    ranks = algorithm.probed_ranks(model)
    plan = json.loads(out.with_suffix(".json").read_text())
    for side, row in zip(sides_of(2), plan, strict=True):
        assert row["probed_ranks"] == ranks
        for n, rank in enumerate(ranks):
            pair = cskv.init_pair("attention", model, side.first, side.side, rank, seen[side.first])
            pair = replace(pair, group=group or None)
            for b in (2, 3, 4):
                generator = torch.Generator().manual_seed(0)
                few = cskv.in_bits(pair, b, SIDES[side.side], False, generator)
                cost = probe.changed({side: [few]}).cost
                assert row[f"costs_{b}_bits"][n] == pytest.approx(cost, rel=1e-2, abs=1e-6)
    factors = load_factors(out, model)
    assert factors.info["init"] == init
    ranks = [[pair.rank for pair in factors.pairs[side::2]] for side in (0, 1)]
    expected = init_factors("attention", model, *ranks, seen)
    for ours, theirs in zip(factors.pairs, expected.pairs, strict=True):  # values may be rotated
        torch.testing.assert_close(ours.A @ ours.B, theirs.A @ theirs.B, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_two_processes_make_the_same_plan(everything, tmp_path, planned, count):
    planned(*flags(everything, tmp_path / "one.safetensors", layers_together=count))
    arguments = map(str, flags(everything, tmp_path / "two.safetensors", layers_together=count))
    done = torchrun(sys.executable, "-m", "experiments.budget", *arguments)
    assert done.returncode == 0, done.stderr
    plans = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two")]
    for a, b in zip(*plans, strict=True):
        assert (a["rank"], a["runs"]) == (b["rank"], b["runs"])
        assert (a["layer"], a["layers"], a["of"]) == (b["layer"], b["layers"], b["of"])
        assert a["cost"] == pytest.approx(b["cost"], rel=1e-2, abs=1e-6)


MISTAKES = {
    "more --remove than --out": ({}, ["--remove", 0.7], "3 --remove, but 2 --out"),
    "nothing left": ({}, ["--remove", 0.99, "--out", "c"], "remove less"),
    "a length past the context": ({"length": 601}, [], "--length 601 exceeds the context of 600"),
    "a short text": ({"samples": 1, "passages": 9}, [], "text.txt is too short"),
    "a large window": ({"window": 39, "sinks": 4}, [], "--probe-len 40 is not above --window"),
    "one file twice": ({}, ["--remove", 0.7, "--out", "a.safetensors"], "are both"),
    "a group of no whole blocks": ({"group": 33}, [], "--group 33 is no multiple of 32"),
    "alone with a price": ({"channel_price": 2}, [], "--channel-price is for layers that share"),
    "together in KIVI's groups": ({"layers_together": 2, "group": 0}, [], "needs groups of tokens"),
    "no text": ({"data": None}, [], "required: --data"),
    "no such text": ({"data": "nowhere.txt"}, [], "nowhere.txt"),
    "a share above 1": ({}, ["--remove", 1.5, "--out", "c"], "'1.5' is not a number"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_take_one_line(everything, tmp_path, refused, monkeypatch, name):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    options, more, message = MISTAKES[name]
    arguments = flags(everything, "a.safetensors", "b.safetensors", **options)
    assert message in refused(budget, *arguments, *more, notes=True)
