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


def train_all(model, samples, tuner):
    """Takes all steps of a tuner. Returns the losses before each."""
    losses = []
    while tuner.steps_done < tuner.steps:
        losses.append(train.run_layers(model, samples, [tuner], train=True)[0])
        tuner.step()
    return losses


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
    groups of 32 channels; or both in groups of tokens. Rounding is passed straight through to A. n
    counts the elements of the whole batch, so that its loss is a mean over all its tokens.
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
        if pair.bits < 16:
            dim = quant.TOKENS if group or j % 2 == 0 else quant.CHANNELS
            grouping = quant.Grouping(dim, group or 32, clamped)
            c = quant.dequantize(quant.quantize(c, pair.bits, grouping), grouping)
        E = y - c.double() @ B
        expected[j // 2] += E.square().sum() / n
        grads[j][0] += -2 / n * x.T @ E @ B.T
        grads[j][1] += -2 / n * c.double().T @ E
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-9)
    for pair, (dA, dB) in zip(tuner.factors.pairs, grads, strict=True):
        torch.testing.assert_close(pair.B.grad.double(), dB, rtol=1e-3, atol=1e-5)
        if not clamped:  # else some latents are beyond the levels, and have no gradient
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_in_16_bits_trains_factors_in_float32(dtype):
    model = tiny_model().to(DTYPES[dtype])
    samples = make_samples(model)
    tuner = train.Tuner(make_factors(model, samples), 20, 1e-2)
    assert {p.dtype for p in tuner.parameters} == {torch.float32}
    first, *_, last = (loss.sum().item() for loss in train_all(model, samples, tuner))
    exact = train.Tuner(make_factors(tiny_model(), samples), 20, 1e-2)
    reference = train.run_layers(tiny_model(), samples, [exact]).sum().item()
    assert first == pytest.approx(reference, rel=0.03) and last < 0.95 * first


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
@given(st.integers(1, 11), st.integers(1, 11))
def test_the_floor_equals_a_naive_one(model, samples, k_rank, v_rank):
    """It is what an SVD of K itself drops."""
    tuner = train.Tuner(make_factors(model, samples, "svd", k_rank, v_rank), 1)
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for j, pair in enumerate(tuner.factors.pairs):
        K = torch.cat([y for n, _, _, y in sides(model, samples, tuner.factors) if n == j])
        dropped = torch.linalg.svdvals(K)[pair.rank :].square().sum()
        expected[:, j // 2] += torch.stack([dropped, K.square().sum()]) / K.numel()
    _, floor, zeros = train.measure(model, tuner, samples)
    torch.testing.assert_close(torch.stack([floor, zeros]), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tokens", [4, 5, 6])
def test_no_floor_under_fewer_tokens_than_ranks(model, tokens):
    """Where nothing need be lost, the floor is 0, not rounding noise that a loss is 10^9 times."""
    samples = [tiny_tokens(model, 1, tokens)]
    tuner = train.Tuner(make_factors(model, samples, "svd", 5, 5), 1)
    floor = train.measure(model, tuner, samples)[1]
    assert len(samples[0].unique()) == tokens  # in layer 0 equal tokens are equal rows
    assert (floor > 1e-9).all() if tokens > 5 else (floor == 0).all()


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


@pytest.mark.parametrize("init", ["random", "svd"])
def test_training_approaches_the_floor(model, samples, init):
    tuner = train.Tuner(make_factors(model, samples, init), 120, 0.1)
    first, floor, _ = train.measure(model, tuner, samples)
    train_all(model, samples, tuner)
    last = train.measure(model, tuner, samples)[0]
    assert first.sum() > 1.3 * floor.sum()
    assert floor.sum() <= last.sum() < 1.02 * floor.sum()


@pytest.mark.parametrize(
    "init, bits, clamped", [("svd", 4, False), ("optimal", 2, False), ("optimal", 2, True)]
)
def test_training_with_rounding_lowers_the_loss(model, init, bits, clamped):
    """In 2 bits even from the optimum without bits, where rounding afterwards leaves one."""
    samples = make_samples(model, (64, 64))
    factors = make_factors(model, samples, init, 9, 9).in_bits(bits, bits, clamped)
    first, *_, last = train_all(model, samples, train.Tuner(factors, 30, 2e-2))
    assert last.sum() < 0.93 * first.sum()


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
    samples, steps, epochs = list(range(n)), -(-n // size), []
    for first in (0, steps):
        batches = [text.batch_of(samples, first + step, size, seed) for step in range(steps)]
        epochs.append([sample for batch in batches for sample in batch])
        assert sorted(epochs[-1]) == samples
        assert [len(batch) for batch in batches[:-1]] == [size] * (steps - 1)
    assert n < 8 or epochs[0] != epochs[1]


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
def test_divergence_stops_and_names_step_and_layer(
    everything, tmp_path, refused, monkeypatch, factor
):
    real = train.run_layers

    def run_layers(model, samples, tuners, *more, **options):
        losses = real(model, samples, tuners, *more, **options)
        if tuners[0].steps_done == 3:
            losses[0, 1] *= factor
        return losses

    monkeypatch.setattr(train, "run_layers", run_layers)
    args = arguments(everything, tmp_path / "f", "--checkpoint-every", 1)
    error = refused(train, *args, notes=True)  # nor a checkpoint, to go on from into the same
    assert error.startswith("error: step 3, layer 1: the loss diverges")
    assert "start anew with a lower --lr" in error


@pytest.mark.parametrize("steps", [1, 5])
def test_divergence_in_the_last_update_is_seen(everything, tmp_path, refused, monkeypatch, steps):
    monkeypatch.setattr(train.Tuner, "rate", lambda t, step: 1e6 * (step == steps - 1))
    args = arguments(everything, tmp_path / "f", "--samples", steps, "--log", tmp_path / "log")
    error = refused(train, *args, notes=True, left=["log"])
    assert error.startswith(f"error: step {steps}, layer 0: the loss diverges")
    assert [row["step"] for row in rows_of(tmp_path / "log")] == list(range(steps))


def test_starting_at_nothing_is_no_divergence(tmp_path, trained):
    """Full rank: the loss is rounding at first and grows a thousandfold with the first update."""
    trained("f", "--k-ratio", 0, "--v-ratio", 0, "--lr", 1e-3, "--log", tmp_path / "log")
    *rows, summary = rows_of(tmp_path / "log")
    assert rows[1]["loss"] > 1000 * rows[0]["loss"] and summary["final"] < 0.1
    assert all(row["loss"] >= row["floor"] for row in rows)


MISTAKES = [  # that the tests of text and of commands do not have
    ("--data", "none.txt", "no file none.txt"),
    ("--data", "kind.py", "not a .txt or .jsonl"),
    ("--data", "damaged.jsonl", "damaged.jsonl, line 2"),
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
    Path("kind.py").write_text("text")
    Path("damaged.jsonl").write_text('{"text": "t1 t2"}\n{"text": ')
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
