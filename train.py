"""From a checkpoint and text to a factors file: calibrate, factorize, fine-tune layer by layer.

    python train.py --model FOLDER_OR_HUB_NAME --data TEXT --k-ratio 0.8 --v-ratio 0.8 --out FILE
    torchrun --nproc-per-node 2 -- train.py ...      the same on two GPUs (or processes of a CPU)

The frozen model reads the text once. From what its layers saw, A and B of every layer follow in
closed form (cskv.py, section 2.2). Then they are trained (section 2.2 and appendix B of [1]): every
layer has a loss of its own, of how far rebuilt keys and values are off,

    L_K = MSE(K, K^)    K = x W_K    K^ = (x A_K) B_K               (equation 1; L_V likewise)
    L   = sum over layers of L_K + L_V                              (equation 2)

where x is what the frozen model feeds the layer. So no gradient passes from layer to layer: while
the model runs, without gradients, each loss is formed and back-propagated at once, and memory holds
one layer's graph however deep the model is. W_K and W_V never change. With bits, the latents x A
are rounded on the way: quantization-aware training (appendix C.4, quant.py).

What training can reach is known: no A B of rank r, quantized or not, loses less on a text than the
dropped eigenvalues of its K^T K [2]. Losses are reported beside this floor.

Sources:
    [1] Wang et al., "CSKV", 2024
    [2] Eckart and Young, "The approximation of one matrix by another of lower rank", 1936
    [3] Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019: AdamW
"""

import support.interrupt  # isort: skip # noqa: F401

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import quant
from cskv import CALIBRATED, INITIALIZATIONS, Factors, LowRank, Observer, init_factors, rank_for
from model import Transformer
from support.command import (
    DTYPES,
    Arguments,
    UserError,
    check_files,
    number,
    run_command,
    user_values,
)
from support.factors_file import load_factors, save_factors
from support.huggingface.checkpoint import load_model
from support.huggingface.tokenizer import load_tokenizer
from support.processes import calibrate_together, place, processes, say, summed
from support.resume import Journal, Losses, changed_flag, make_plan
from support.text import batch_of, sample_tokens

# ---------------------------------------------------------------------- layer-wise training


def layer_loss(
    pair: LowRank, x: Tensor, k: Tensor, dim: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """L_K = MSE(K, K^), K^ = (x A) B (equation 1), a scalar; for values it is L_V.

    x [B, T, hidden] and k [B, T, d_kv] as an `Observer` shows them. Latents of few bits are
    quantized as KIVI's of keys (`dim` TOKENS) or values (CHANNELS). K^ and the mean are `dtype`.
    """
    c = x @ pair.A  # [B, T, r]
    if pair.bits < 16:
        c = quant.fake_quantize(c, pair.bits, pair.grouping(dim))
    k_hat = c.to(dtype) @ pair.B.to(dtype)
    return F.mse_loss(k_hat, k.to(dtype))


class Tuner:
    """One set of factors in training: a float32 copy of them, AdamW [3], and its learning rate.

    No weight decay: the paper names none, and it would pull A B away even from the optimum.

    At the starts svd, asvd and optimal the gradient of A is zero up to rounding, since what is lost
    is orthogonal to the rows of B, and Adam makes steps of the whole learning rate of that noise.
    So only starts that are equal to the last bit train alike.

    Args:
        factors: where to start, in the bits to train for (`Factors.in_bits`).
        steps: planned; over them the learning rate falls from `lr` to 0, linearly.
    """

    def __init__(self, factors: Factors, steps: int, lr: float = 5e-5):
        self.steps = steps
        self.lr = lr
        self.steps_done = 0
        self.factors = factors.map(lambda p: replace(p, A=float_copy(p.A), B=float_copy(p.B)))
        self.parameters = []
        for pair in self.factors.pairs:
            self.parameters += [pair.A, pair.B]
        for parameter in self.parameters:
            parameter.requires_grad_()
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer = torch.optim.AdamW(self.parameters, weight_decay=0.0)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.lr * (1 - step / self.steps)

    def step(self) -> None:
        """One update with the gradients of all processes, which are then cleared."""
        for parameter in self.parameters:
            summed(parameter.grad)
        self.optimizer.param_groups[0]["lr"] = self.rate(self.steps_done)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.steps_done += 1

    def state(self) -> dict:
        """All that `restore` needs to go on exactly."""
        parameters = [parameter.detach() for parameter in self.parameters]
        optimizer = self.optimizer.state_dict()
        return {"step": self.steps_done, "parameters": parameters, "optimizer": optimizer}

    @torch.no_grad()
    def restore(self, state: dict) -> None:
        """Goes back to where it was when `state` was called."""
        self.steps_done = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, value in zip(self.parameters, state["parameters"], strict=True):
            parameter.copy_(value)


def float_copy(x: Tensor) -> Tensor:
    """A float32 copy. Contiguous: in another layout products round otherwise, and a restored
    training would differ."""
    return x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


@torch.no_grad()
def run_layers(
    model: Transformer,
    samples: list[Tensor],
    tuners: list[Tuner],
    train: bool = False,
    moments: Tensor | None = None,
    sinks: int = 0,
) -> Tensor:
    """Equation 2, layer by layer: the frozen model runs once over `samples` [1, T], shared out
    among the processes. Returns the loss of every tuner and layer, [tuners, layers], a mean over
    all tokens but the first `sinks`. Their sum is never formed: no two layers share a parameter, so
    one backward a layer gives its gradient.

    `train` adds gradients. `moments` [layers, 2, d_kv, d_kv], float64, gets k^T k and v^T v added.
    Losses of `train` without `moments` have the rounding of float32; others are in float64, for
    rounding could take a nearly optimal one below its floor.
    """
    process, all_processes = place()
    device = model.lm_head.weight.device
    all_tokens = count_tokens(samples, sinks)
    losses = torch.zeros(len(tuners), len(model.model.layers), dtype=torch.float64, device=device)

    def see(i: int, x: Tensor, k: Tensor, v: Tensor) -> None:
        share = x.shape[:2].numel() / all_tokens  # this sample's part of the mean
        for n, tuner in enumerate(tuners):
            layer = tuner.factors.layers[i]
            for pair, y, dim in ((layer.k, k, quant.TOKENS), (layer.v, v, quant.CHANNELS)):
                if train:
                    with torch.enable_grad():
                        loss = layer_loss(pair, x, y, dim) * share
                        loss.backward()  # at once: the graph ends here
                if not train or moments is not None:
                    loss = layer_loss(pair, x, y, dim, torch.float64) * share
                losses[n, i] += loss.detach()
        if moments is not None:
            for total, y in zip(moments[i], (k, v), strict=True):
                y = y.flatten(0, 1).double()  # [B * T, d_kv]
                total += y.T @ y

    # The model hands each layer's input to its `Observer`, which calls `see`.
    layers = enumerate(model.model.layers)
    cache = [Observer(layer.self_attn, partial(see, i), sinks) for i, layer in layers]
    for sample in samples[process::all_processes]:
        model(sample.to(device), cache, logits_to_keep=1)
    if moments is not None:
        summed(moments)
    return summed(losses)


def count_tokens(samples: list[Tensor], sinks: int) -> int:
    """Tokens of `samples` [B, T] without the first `sinks` of each."""
    return sum(sample[:, sinks:].numel() for sample in samples)


def train_layers(
    model: Transformer,
    tuners: list[Tuner],
    samples: list[Tensor],
    batch_size: int = 1,
    seed: int = 0,
    sinks: int = 0,
    moments: bool = False,
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """The training: takes the steps that all `tuners` have left, in one pass over the samples.

    Yields the number of each step, the losses [tuners, layers] from before its update and, if
    wanted, the moments of its batch. Every epoch has the samples in another order.
    """
    for step in range(tuners[0].steps_done, tuners[0].steps):
        batch = batch_of(samples, step, batch_size, seed)
        total = new_moments(model) if moments else None
        losses = run_layers(model, batch, tuners, True, total, sinks)
        for tuner in tuners:
            tuner.step()
        yield step, losses, total


# ---------------------------------------------------------------------------- what it reached


def new_moments(model: Transformer) -> Tensor:
    """Zeros for `run_layers`: 0.5 GB for a Mistral-7B, 8.6 GB for a LongChat-7B."""
    d_kv = model.config.d_kv
    shape = len(model.model.layers), 2, d_kv, d_kv
    return model.lm_head.weight.new_zeros(shape, dtype=torch.float64)


def loss_floor(moment: Tensor, rank: int) -> Tensor:
    """The least sum of squared errors that factors of this rank can have on a text [2]: the dropped
    eigenvalues of `moment` = K^T K [d_kv, d_kv]. A scalar; 0 where it would be mere rounding."""
    eigenvalues = torch.linalg.eigvalsh(moment)  # smallest first
    dropped = eigenvalues[: len(moment) - rank].clamp(min=0).sum()
    return dropped * (dropped > 1e-12 * moment.trace())  # else fewer tokens than ranks


def compare(loss: Tensor, moments: Tensor, bases: list[Tensor], tokens: int) -> Losses:
    """Losses [layers] beside the others of the same text, from its `moments`.

    `bases` has V_r [d_kv, r] of the closed form, for keys and values of every layer in turn.
    """
    columns = []
    for moment, V in zip(moments.flatten(0, 1), bases, strict=True):
        R = torch.eye(len(V)).to(moment) - V.double() @ V.double().T  # k R: what V_r leaves out
        floor = loss_floor(moment, V.shape[1])
        optimal = ((moment @ R) * R).sum()
        columns.append(torch.stack([floor, optimal, moment.trace()]))
    elements = tokens * len(moments[0, 0])
    sides = torch.stack(columns).view(len(moments), 2, 3)
    floor, optimal, zeros = sides.sum(1).T / elements  # [layers] each
    return Losses(loss, floor, optimal.maximum(floor), zeros)  # not below it by rounding


def measure(
    model: Transformer, tuner: Tuner, samples: list[Tensor], bases: list[Tensor], sinks: int = 0
) -> Losses:
    """The losses of a tuner's factors on `samples`, without gradients."""
    moments = new_moments(model)
    loss = run_layers(model, samples, [tuner], False, moments, sinks)[0]
    if not loss.isfinite().all():
        return Losses(loss, loss, loss, loss)  # for the caller to refuse
    return compare(loss, moments, bases, count_tokens(samples, sinks))


def fine_tune(
    model: Transformer,
    tuner: Tuner,
    samples: list[Tensor],
    bases: list[Tensor],
    initial: Losses,
    journal: Journal,
    batch_size: int = 1,
    seed: int = 0,
    sinks: int = 0,
) -> None:
    """Takes the steps that `tuner` has left. The journal's log gets the losses of each batch beside
    their floor, its checkpoint all that it takes to go on.

    Raises `UserError` when a loss diverges from the `initial` one.
    """
    begun = {"bases": bases, "initial": vars(initial)}
    steps = train_layers(model, [tuner], samples, batch_size, seed, sinks, bool(journal.log))
    with journal.open(tuner.steps_done, tuner.steps):
        for step, losses, moments in steps:
            journal.check(losses[0], initial, step)
            row = {"step": step, "lr": tuner.rate(step)}
            columns = {"loss": losses[0]}
            if moments is not None:
                tokens = count_tokens(batch_of(samples, step, batch_size, seed), sinks)
                now = compare(losses[0], moments, bases, tokens)
                columns |= {"floor": now.floor, "optimal": now.optimal}
            journal.record(row, columns, lambda: {**begun, **tuner.state()})


# ---------------------------------------------------------------------------- command line


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed."""
    checkpoint = Path(f"{args.out}.checkpoint")
    written = {"--out": args.out, "--log": args.log, "the checkpoint": checkpoint}
    measuring = args.epochs > 0 or args.log is not None
    reading = measuring or args.init in CALIBRATED
    with processes(args.device) as device:
        check_files(written, {"--data": args.data}, args.model)
        if reading and args.data is None:
            reader = "training and --log need"
            if args.init in CALIBRATED:
                reader = f"--init {args.init} calibrates on"
            raise UserError(f"{reader} text; give some with --data")
        model = load_model(args.model, device, DTYPES[args.dtype])
        d_kv = model.config.d_kv
        with user_values():
            k_ranks = [rank_for(args.k_ratio, d_kv)] * len(model.model.layers)
            v_ranks = [rank_for(args.v_ratio, d_kv)] * len(model.model.layers)
        samples = []
        if reading:
            tokenizer = load_tokenizer(args.model, model.config.vocab_size)
            length = min(args.seq_len, model.config.context_length)
            samples = sample_tokens(
                args.data, tokenizer, args.samples, length, args.seed, args.sinks
            )
            say(f"{len(samples)} samples, {sum(sample.numel() for sample in samples)} tokens")
        steps = args.epochs * -(-len(samples) // args.batch_size)
        if steps and args.batch_size % place()[1]:
            say(f"batches of {args.batch_size}: some of {place()[1]} processes are idle at times")
        plan = make_plan(vars(args), model, samples)
        if args.resume and args.out.exists() and not checkpoint.exists():
            check_finished(args.out, model, plan)
            say(f"{args.out} is finished; to make it again, leave out --resume")
            return
        journal = Journal(checkpoint, args.checkpoint_every, args.log, plan)

        state = statistics = None
        init = args.init
        if args.resume and steps:
            state = journal.load(device)
        if state:
            init = "random"  # what the checkpoint holds comes in its place
        elif reading:
            statistics = calibrate_together(model, samples, args.sinks)
        with user_values():
            factors = init_factors(init, model, k_ranks, v_ranks, statistics, args.seed)
        trained = f"{steps} steps, lr {args.lr:g}, batch {args.batch_size}" if steps else "none"
        factors.info.update(init=args.init, trained=trained, plan=json.dumps(plan))
        if steps or args.init in CALIBRATED:
            factors.info["data"] = args.data.name
        factors = factors.in_bits(args.k_bits, args.v_bits, args.clamped_zero_point)
        tuner = Tuner(factors, steps, args.lr)
        measured = samples[: args.measure_samples]
        if state:
            tuner.restore(state)
            bases, initial = state["bases"], state["initial"]
        elif measuring:
            best = init_factors("optimal", model, k_ranks, v_ranks, statistics)
            bases = [pair.B.T for pair in best.pairs]  # V_r [d_kv, r]
            initial = measure(model, tuner, measured, bases, args.sinks)
            journal.check(initial.loss, initial, 0)
        if measuring:
            order = args.batch_size, args.seed, args.sinks
            fine_tune(model, tuner, samples, bases, initial, journal, *order)
            final = initial
            if steps:
                final = measure(model, tuner, measured, bases, args.sinks)
                journal.check(final.loss, initial, steps)
            journal.summarize(steps, initial, final, len(measured))
        if place()[0] == 0:
            save_factors(args.out, tuner.factors, model)
            shape = f"ranks {k_ranks[0]} (keys) and {v_ranks[0]} (values) of {d_kv}"
            say(f"{args.out}: {args.init}, trained: {trained}, {shape}")
        if steps:
            journal.forget()


def check_finished(path: Path, model: Transformer, plan: dict) -> None:
    """Raises `UserError` if the factors at `path` were made for another model or with another plan,
    naming an argument that differs."""
    theirs = json.loads(load_factors(path, model).info.get("plan", "{}"))
    flag = changed_flag(plan, theirs)
    if flag:
        raise UserError(f"{path} was made with another {flag}; leave out --resume to make it again")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__)
    add = parser.add_argument
    count = number(int, 1)
    widths = (2, 3, 4, 8, 16)
    add("--model", required=True, help="checkpoint folder or hub name of the frozen model")
    add("--data", type=Path, help="a .txt file, a .jsonl file (field `text`), or a folder of them")
    add("--out", type=Path, required=True, help="factors file to write")
    add("--init", choices=INITIALIZATIONS, default="attention", help="where to start; see cskv.py")
    add("--k-ratio", type=float, default=0.8, help="share of key channels to remove (0.8)")
    add("--v-ratio", type=float, default=0.8, help="share of value channels to remove (0.8)")
    add("--bits", type=int, choices=widths, default=16, help="round latents to so many (16: not)")
    add("--k-bits", type=int, choices=widths, help="round key latents to others than --bits")
    add("--v-bits", type=int, choices=widths, help="round value latents to others than --bits")
    add("--clamped-zero-point", action="store_true", help="round as the paper's code; see quant.py")
    add("--samples", type=count, default=256, help="read so many pieces of the text (256)")
    add("--seq-len", type=number(int, 2), default=1024, help="cut pieces of so many tokens (1024)")
    add("--sinks", type=number(int, 0), default=0, help="skip a piece's first tokens (0)")
    add("--epochs", type=number(int, 0), default=1, help="train on each piece so often (1; 0: not)")
    add("--batch-size", type=count, default=1, help="train on so many pieces a step (1)")
    add("--lr", type=number(float, 0), default=5e-5, help="begin with this learning rate (5e-5)")
    add("--measure-samples", type=count, default=32, help="measure losses on so many pieces (32)")
    add("--seed", type=number(int, 0), default=0, help="draw other pieces in another order (0)")
    add("--log", type=Path, help="write losses beside their floor, a JSON line a step")
    add("--checkpoint-every", type=count, default=50, help="write OUT.checkpoint so often (50)")
    add("--resume", action="store_true", help="go on from OUT.checkpoint, if there is one")
    add("--device", default="cpu", help="compute on cpu (default), cuda, cuda:1, ...")
    add("--dtype", choices=DTYPES, default="float32", help="run the model in this type (float32)")
    args = parser.parse_args(argv)
    args.k_bits = args.k_bits or args.bits
    args.v_bits = args.v_bits or args.bits
    return args


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
