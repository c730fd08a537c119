"""Layer-wise training: losses, gradients and floors against naive ones, and its command."""

import itertools
import json
import math
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import infer
import quant
import train
from cskv import INITIALIZATIONS, calibrate, init_factors
from support import text
from support.command import DTYPES
from support.factors_file import load_factors, save_factors
from support.huggingface.checkpoint import load_model
from support.huggingface.tokenizer import load_tokenizer
from tests import helpers
from tests.drawn import bits_or_16, groups, quick
from tests.helpers import arguments, assert_same_factors, call, rows_of, tiny_model, tiny_tokens

LENGTHS = (40, 9, 2, 33)  # tokens of the samples: whole groups of 32 and parts of them
texts = st.lists(st.integers(2, 40), min_size=1, max_size=3)
inits = st.sampled_from(INITIALIZATIONS)
ranks = st.integers(1, 12)
starts = st.sampled_from(["svd", "random"])


@pytest.fixture(scope="module")
def model():
    return tiny_model(attention_bias=True)  # of which the losses know nothing


def make_samples(model, lengths=LENGTHS):
    return [tiny_tokens(model, 1, n, seed) for seed, n in enumerate(lengths)]


@pytest.fixture(scope="module")
def samples(model):
    return make_samples(model)


def make_factors(model, samples, init="svd", k_rank=5, v_rank=4):
    n = len(model.model.layers)
    return init_factors(init, model, [k_rank] * n, [v_rank] * n, calibrate(model, samples))


def sides(model, samples, factors):
    """For each sample [1, T], keys and values of each layer in turn: their number j, their pair, x
    [T, hidden], and k or v [T, d_kv] in float64."""
    for sample in samples:
        for i, (x, *both) in enumerate(helpers.layer_inputs(model, sample)):
            for j, y in enumerate(both, 2 * i):
                yield j, factors.pairs[j], x[0], y[0]


@pytest.fixture(autouse=True, scope="module")
def gradients():
    """As it is where training is started: run_layers itself decides what has a gradient."""
    with torch.enable_grad():
        yield


@quick
@given(ranks, ranks, bits_or_16, bits_or_16, st.booleans(), groups, starts)
def test_losses_and_gradients_equal_the_formula_in_float64(
    model, samples, k_rank, v_rank, k_bits, v_bits, clamped, group, init
):
    """For L = |E|^2 / n with E = K - c B: dL/dB = -2/n c^T E and dL/dA = -2/n x^T E B^T.

    The latents c = x A are rounded in few bits: those of keys in groups of 32 tokens, of values in
    groups of 32 channels; or both in groups of tokens. Rounding is passed straight through to A,
    but for latents beyond the levels of a group, as some are with a clamped zero-point. n counts
    the elements of the whole batch, so that its loss is a mean over all its tokens.
    """
    factors = make_factors(model, samples, init, k_rank, v_rank)
    tuner = train.Tuner(helpers.in_bits(factors, k_bits, v_bits, group, clamped), steps=1)
    loss = train.run_layers(model, samples, [tuner], train=True)[0]
    n = sum(LENGTHS) * model.config.d_kv
    expected = torch.zeros(2, dtype=torch.float64)
    grads = [[0, 0] for _ in factors.pairs]
    for j, pair, x, y in sides(model, samples, tuner.factors):
        A, B = pair.A.detach(), pair.B.detach().double()
        c = x.float() @ A
        within = torch.ones_like(c)
        if pair.bits < 16:
            dim = quant.TOKENS if group or j % 2 == 0 else quant.CHANNELS
            grouping = quant.Grouping(dim, group or 32, clamped)
            q = quant.quantize(c, pair.bits, grouping)
            group_of = torch.arange(c.shape[dim]) // grouping.size
            low, scale = [s.float().index_select(dim, group_of) for s in (q.minimum, q.scale)]
            within = (c >= low) & (c <= low + scale * (2**pair.bits - 1))
            c = quant.dequantize(q, grouping)
        E = y - c.double() @ B
        expected[j // 2] += E.square().sum() / n
        grads[j][0] += -2 / n * x.T @ (within * (E @ B.T))
        grads[j][1] += -2 / n * c.double().T @ E
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-9)
    for pair, (dA, dB) in zip(tuner.factors.pairs, grads, strict=True):
        torch.testing.assert_close(pair.B.grad.double(), dB, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(pair.A.grad.double(), dA, rtol=1e-3, atol=1e-5)


def test_only_the_factors_change(model, samples):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    factors = make_factors(model, samples)
    tuners = [train.Tuner(factors, 3, lr) for lr in (1e-3, 1e-2)]  # two sets in one pass
    (*_, (last, losses, _)) = train.train_layers(model, tuners, samples, len(samples))
    assert last == 2 and losses.shape == (2, 2) and (losses[0] != losses[1]).all()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name
        assert not weight.requires_grad and weight.grad is None
    for tuner in tuners:
        alone = train.Tuner(factors, 3, tuner.lr)
        list(train.train_layers(model, [alone], samples, len(samples)))
        assert_same_factors(tuner.factors, alone.factors)
        for a, c in zip(tuner.factors.pairs, factors.pairs, strict=True):
            assert not torch.equal(a.A, c.A) and not torch.equal(a.B, c.B)  # a copy was trained


class Box:
    """Holds a tensor for a graph, and dies with it."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize("bits", [16, 4])
def test_no_graph_survives_its_layer(bits):
    model = tiny_model(num_hidden_layers=5)
    samples = make_samples(model)
    tuner = train.Tuner(make_factors(model, samples).in_bits(bits, bits), 1, 1e-3)
    boxes, counts = weakref.WeakSet(), []

    def pack(tensor):
        box = Box(tensor)
        boxes.add(box)
        counts[-1] += 1
        return box

    def entered(module, args):
        assert not boxes, "a graph of the layer before is alive"
        counts.append(0)

    for layer in model.model.layers:
        layer.register_forward_pre_hook(entered)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        train.run_layers(model, samples[:1], [tuner], train=True)
    assert not boxes and len(counts) == 5 and min(counts) > 0


def test_only_what_is_measured_is_evaluated_in_float64(model, samples):
    """Training steps report the float32 loss that they differentiate: no second, slower product."""
    tuner = train.Tuner(make_factors(model, samples, "optimal", 12, 12), 1)
    exact = train.run_layers(model, samples, [tuner])
    assert torch.equal(train.measure(model, tuner, samples)[0], exact[0])
    moments = train.new_moments(model)  # with which a training step has a floor to report
    assert torch.equal(train.run_layers(model, samples, [tuner], True, moments), exact)
    rounded = train.run_layers(model, samples, [tuner], train=True)
    assert (rounded > 1.1 * exact).all()  # at full rank all of it is rounding, here of one more sum


@quick
@given(inits, ranks, bits_or_16, bits_or_16, texts)
def test_no_loss_is_below_its_floor(model, init, rank, k_bits, v_bits, lengths):
    """Strictly, at every step, for batches of few tokens and full ranks, too."""
    samples = make_samples(model, lengths)
    factors = make_factors(model, samples, init, rank, rank).in_bits(k_bits, v_bits)
    tuner = train.Tuner(factors, 3, 1e-2)
    steps = train.train_layers(model, [tuner], samples, len(samples), moments=True)
    for _, losses, moments in steps:
        assert (losses[0] >= train.layer_floors(moments, factors, sum(lengths))).all()


@quick
@given(ranks, ranks, st.lists(st.integers(2, 12), min_size=1, max_size=3))
def test_the_floor_equals_a_naive_one(model, samples, k_rank, v_rank, lengths):
    """It is what an SVD of K itself drops. Where nothing need be lost, since there are fewer tokens
    than ranks, it is 0, not rounding noise that a loss is 10^9 times."""
    tuner = train.Tuner(make_factors(model, samples, "svd", k_rank, v_rank), 1)
    samples = make_samples(model, lengths)
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for j, pair in enumerate(tuner.factors.pairs):
        K = torch.cat([y for n, _, _, y in sides(model, samples, tuner.factors) if n == j])
        dropped = torch.linalg.svdvals(K)[pair.rank :].square().sum()
        expected[:, j // 2] += torch.stack([dropped, K.square().sum()]) / K.numel()
    _, floor, zeros = train.measure(model, tuner, samples)
    torch.testing.assert_close(torch.stack([floor, zeros]), expected, rtol=1e-5, atol=1e-9)
    assert sum(lengths) > min(k_rank, v_rank) or (floor == 0).all()


def test_optimal_starts_at_the_floor_of_its_own_text(model, samples):
    tuner = train.Tuner(make_factors(model, samples, "optimal"), 1)
    loss, floor, zeros = train.measure(model, tuner, samples)
    torch.testing.assert_close(loss, floor, rtol=1e-5, atol=0)
    train.run_layers(model, samples, [tuner], train=True)
    assert all(p.grad.abs().max() < 1e-5 * zeros.sum() for p in tuner.parameters)  # nothing to gain
    for seed in range(20):  # and strictly not below it, though float32 rounds either way
        text = [tiny_tokens(model, 1, 50, seed)]
        best = train.Tuner(make_factors(model, text, "optimal"), 1)
        loss, floor, _ = train.measure(model, best, text)
        assert (loss >= floor).all()


LOWERED = [  # init, bits, clamped, the model's type, steps, rate; what is left of the loss at most
    ("random", 16, False, "float32", 120, 0.1, 0.5),
    ("svd", 16, False, "float32", 120, 0.1, 0.8),
    ("svd", 16, False, "bfloat16", 20, 1e-2, 0.95),
    ("svd", 16, False, "float16", 20, 1e-2, 0.95),
    ("svd", 4, False, "float32", 30, 2e-2, 0.93),
    ("optimal", 2, False, "float32", 30, 2e-2, 0.93),  # optimal without bits, where rounding
    ("optimal", 2, True, "float32", 30, 2e-2, 0.93),  # afterwards leaves it
]


@pytest.mark.parametrize("init, bits, clamped, dtype, steps, lr, left", LOWERED)
def test_training_lowers_the_loss(init, bits, clamped, dtype, steps, lr, left):
    """Without bits to the floor; in a model of 16 bits from nearly the same loss, in float32."""
    exact, model = tiny_model(), tiny_model().to(DTYPES[dtype])
    samples = make_samples(model, (64, 64))
    factors = make_factors(model, samples, init, 9, 9).in_bits(bits, bits, clamped)
    tuner = train.Tuner(factors, steps, lr)
    assert {p.dtype for p in tuner.parameters} == {torch.float32}
    begun = train.Tuner(make_factors(exact, samples, init, 9, 9).in_bits(bits, bits, clamped), 1)
    reference = train.run_layers(exact, samples, [begun]).sum().item()
    first = train.run_layers(model, samples, [tuner]).sum().item()
    list(train.train_layers(model, [tuner], samples, 2))
    last, floor, _ = (y.sum().item() for y in train.measure(model, tuner, samples))
    assert first == pytest.approx(reference, rel=0.03 if dtype != "float32" else 1e-5)
    assert floor <= last < left * first and (steps < 120 or last < 1.03 * floor)


def test_the_rate_falls_linearly_and_nothing_decays(model, samples):
    """Without gradients a step changes nothing: weight decay would pull A B from the optimum."""
    factors = make_factors(model, samples)
    tuner = train.Tuner(factors, 4, 0.8)
    for expected in (0.8, 0.6, 0.4, 0.2):
        assert tuner.rate(tuner.steps_done) == pytest.approx(expected)
        tuner.step()
        assert tuner.optimizer.param_groups[0]["lr"] == pytest.approx(expected)
    assert_same_factors(tuner.factors, factors)


@quick
@given(st.integers(1, 20), st.integers(1, 7), st.integers(0, 2**31))
def test_an_epoch_has_every_sample_once(n, size, seed):
    samples, steps = list(range(n)), -(-n // size)
    batches = [text.batch_of(samples, step, size, seed) for step in range(2 * steps)]
    first, second = (list(itertools.chain(*b)) for b in (batches[:steps], batches[steps:]))
    assert sorted(first) == sorted(second) == samples and (n < 8 or first != second)
    assert all(len(batch) == size for batch in batches[: steps - 1])


# ----------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("init, epochs", [("svd", 3), *((init, 0) for init in INITIALIZATIONS)])
def test_the_log_and_the_factors_say_it_all(
    everything, tmp_path, trained, capsys, monkeypatch, init, epochs
):
    """Against factors begun with, and those written, which infer.py reads."""
    monkeypatch.setattr(train, "save_factors", partial(save_factors, dtype=torch.float32))
    (tmp_path / "log").write_text("of an earlier training\n")
    flags = ["--init", init, "--epochs", epochs, "--bits", 4, "--log", tmp_path / "log"]
    err = trained("f", *flags)
    *rows, summary = rows_of(tmp_path / "log")
    assert [row["step"] for row in rows] == list(range(24 * epochs))
    for step, row in enumerate(rows):
        assert row["lr"] == pytest.approx(1e-2 * (1 - step / 72)) and len(row["layers"]) == 2
        assert row["loss"] >= row["floor"]
        for name in ("loss", "floor"):
            assert sum(x[name] for x in row["layers"]) == pytest.approx(row[name])
    assert all(a["seconds"] <= b["seconds"] for a, b in itertools.pairwise([*rows, summary]))

    model = load_model(everything / "model")
    tokenizer = load_tokenizer(everything / "model", model.config.vocab_size)
    samples = text.sample_tokens(everything / "text.jsonl", tokenizer, 256, 600, 0)
    final = load_factors(tmp_path / "f", model)
    begun = make_factors(model, samples, init, 6, 4).in_bits(4, 4)
    for name, factors in (("initial", begun), ("final", final)):
        loss, floor, _ = train.measure(model, train.Tuner(factors, 1), samples)
        assert summary[name] == pytest.approx(loss.sum().item(), rel=1e-6)
        assert summary["floor"] == pytest.approx(floor.sum().item(), rel=1e-6)
    assert summary["summary"] is True and summary["steps"] == len(rows)
    assert summary["floor"] < summary["final"] and "floor" in summary["layers"][1]
    if epochs:
        assert summary["final"] < 0.95 * summary["initial"]
    else:
        assert_same_factors(final, begun)
    assert final.info["trained"] == ("72 steps, lr 0.01, batch 1" if epochs else "none")
    assert (final.info["init"], final.info["data"]) == (init, "text.jsonl")
    assert {pair.bits for pair in final.pairs} == {4} and "final" in err
    assert sorted(f.name for f in tmp_path.iterdir()) == ["f", "log"]  # no checkpoint left
    args = ["--model", everything / "model", "--factors", tmp_path / "f", "--prompt", "t1 t2"]
    assert call(infer, capsys, *args, "--max-new-tokens", 2)[0] == 0


def test_no_floor_without_a_log(trained, monkeypatch):
    """An eigendecomposition a layer and step takes long: only the two measurements may do it."""
    calls, real = [], torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda m: calls.append(1) or real(m))
    trained("f", "--samples", 5)
    assert len(calls) == 2 * 2 * 2  # before and after, layers, keys and values


@pytest.mark.parametrize("factor", [math.nan, 1e5])
@pytest.mark.parametrize("step", [3, 24])
def test_divergence_stops_and_names_step_and_layer(
    everything, tmp_path, refused, monkeypatch, factor, step
):
    """In a step, and in what is measured after the last one."""
    real = train.run_layers

    def run_layers(model, samples, tuners, *more, **options):
        losses = real(model, samples, tuners, *more, **options)
        if tuners[0].steps_done == step:
            losses[0, 1] *= factor
        return losses

    monkeypatch.setattr(train, "run_layers", run_layers)
    args = arguments(everything, tmp_path / "f", "--checkpoint-every", 1, "--log", tmp_path / "log")
    error = refused(train, *args, notes=True, left=["log"])  # and no checkpoint, to go on from
    assert error.startswith(f"error: step {step}, layer 1: the loss diverges")
    assert "start anew with a lower --lr" in error
    assert [row["step"] for row in rows_of(tmp_path / "log")] == list(range(step))


def test_starting_at_nothing_is_no_divergence(tmp_path, trained):
    """Full rank: the loss is rounding at first and grows a thousandfold with the first update."""
    trained("f", "--k-ratio", 0, "--v-ratio", 0, "--lr", 1e-3, "--log", tmp_path / "log")
    *rows, summary = rows_of(tmp_path / "log")
    assert rows[1]["loss"] > 1000 * rows[0]["loss"] and summary["final"] < 0.1
    assert all(row["loss"] >= row["floor"] for row in rows)


MISTAKES = [  # that the tests of text and of commands do not have
    ("--data", "none.txt", "no file none.txt"),
    ("--data", "folder", "no .txt or .jsonl"),
    ("--out", "no/such/f", "no folder no/such"),
    ("--log", ".", ". is not a regular file"),
    ("--init", "best", "--init"),
    ("--samples", 0, "--samples"),
    ("--bits", 5, "--bits"),
    ("--lr", -1, "--lr"),
    ("--batch-size", 0, "--batch-size"),
    ("--k-ratio", "1", "compression ratio 1.0 is not in [0, 1)"),
    ("--v-ratio", "nan", "compression ratio nan is not in [0, 1)"),
]


@pytest.mark.parametrize("flag, value, message", MISTAKES)
def test_a_mistake_is_one_line(everything, tmp_path, refused, monkeypatch, flag, value, message):
    """Before anything is calibrated."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "calibrate_together", None)
    Path("folder").mkdir()
    Path("folder", "notes.md").write_text("not read")
    args = arguments(everything, tmp_path / "f", "--init", "optimal", flag, value)
    assert message in refused(train, *args)


def test_samples_are_whole_documents_or_their_pieces(everything, tmp_path):
    tokenizer = load_tokenizer(everything / "model")
    documents = ["t1 t1 t1", " ".join(f"t{i}" for i in range(10)), "t4"]
    lines = [json.dumps({"text": document}) for document in documents]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    samples = text.sample_tokens(tmp_path, tokenizer, 10, 4, seed=0)
    found = sorted(sample[0].tolist() for sample in samples)
    assert found == [[0, 1, 2, 3], [1, 1, 1], [4, 5, 6, 7], [8, 9]]  # one token teaches nothing
    assert len(text.sample_tokens(tmp_path, tokenizer, 2, 4, seed=0)) == 2
