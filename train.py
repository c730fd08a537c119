"""From a checkpoint and text to a factors file: calibrate, factorize, fine-tune layer by layer.

    python train.py --model FOLDER_OR_HUB_NAME --data TEXT --k-ratio 0.8 --v-ratio 0.8 --out FILE
    torchrun --nproc-per-node 2 -- train.py ...      the same on two GPUs (or processes of a CPU)

The frozen model reads the text once; from what its layers saw, A and B of every layer follow in
closed form (cskv.py, section 2.2). Then they are trained (section 2.2 and appendix B of [1]): every
layer has a loss of its own, of how far rebuilt keys and values are off,

    L_K = MSE(K, K^)    K = x W_K    K^ = (x A_K) B_K                 (equation 1; L_V likewise)
    L   = sum over layers of L_K + L_V                                (equation 2)

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

import argparse
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import quant
from cskv import Factors, LowRank
from model import Transformer
from support.calibration import (
    CALIBRATED,
    INITIALIZATIONS,
    calibrate,
    count_tokens,
    equal_ranks,
    init_factors,
    layer_hooks,
)
from support.command import (
    DTYPES,
    Arguments,
    UserError,
    check_files,
    number,
    run_command,
    user_values,
)
from support.factors_file import save_factors
from support.huggingface.checkpoint import load_model
from support.huggingface.tokenizer import load_tokenizer
from support.options import add_options
from support.processes import place, processes, say, summed
from support.resume import Journal, make_plan, restore
from support.text import batch_of, sample_tokens

# -------------------------------------------------------------------------- layer-wise training


def layer_loss(pair: LowRank, x: Tensor, k: Tensor, dim: int, dtype=torch.float32) -> Tensor:
    """L_K = MSE(K, K^), K^ = (x A) B (equation 1), a scalar; for values it is L_V.

    x [B, T, hidden] and k [B, T, d_kv] as `layer_hooks` gives them. Latents of few bits are
    quantized along `dim`. They are float32; product and mean are `dtype`.
    """
    c = x @ pair.A  # [B, T, r]
    if pair.bits < 16:
        c = quant.fake_quantize(c, pair.bits, **pair.quantizer(dim))
    return F.mse_loss(c.to(dtype) @ pair.B.to(dtype), k.to(dtype))


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
        self.steps, self.lr, self.steps_done = steps, lr, 0
        # Contiguous: products round otherwise in another layout, and a restored one would differ.
        own = {"dtype": torch.float32, "copy": True, "memory_format": torch.contiguous_format}
        self.factors = factors.map(lambda p: replace(p, A=p.A.to(**own), B=p.B.to(**own)))
        self.parameters = [M for pair in self.factors.pairs for M in (pair.A, pair.B)]
        for parameter in self.parameters:
            parameter.requires_grad_().grad = torch.zeros_like(parameter)
        self.optimizer = torch.optim.AdamW(self.parameters, weight_decay=0.0)

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return self.lr * (1 - self.steps_done / self.steps)

    def step(self) -> None:
        """One update with the gradients of all processes, which are then cleared."""
        for parameter in self.parameters:
            summed(parameter.grad)
        self.optimizer.param_groups[0]["lr"] = self.rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.steps_done += 1


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
    all tokens but the first `sinks`. `train` adds gradients. `moments` [layers, 2, d_kv, d_kv],
    float64, gets k^T k and v^T v added. Losses of `train` without `moments` have the rounding of
    float32; others are in float64, for rounding could take a nearly optimal one below its floor.
    """
    (rank, count), device = place(), model.lm_head.weight.device
    losses = torch.zeros(len(tuners), len(model.model.layers), dtype=torch.float64, device=device)
    exact = not train or moments is not None
    all_tokens = count_tokens(samples, sinks)

    def add(i: int, x: Tensor, k: Tensor, v: Tensor) -> None:
        share = x.shape[:2].numel() / all_tokens  # this sample's part of the mean
        for n, tuner in enumerate(tuners):
            layer = tuner.factors.layers[i]
            for pair, y, dim in ((layer.k, k, quant.TOKENS), (layer.v, v, quant.CHANNELS)):
                if train:
                    with torch.enable_grad():
                        loss = layer_loss(pair, x, y, dim) * share
                        loss.backward()  # at once: the graph ends here
                if exact:
                    loss = layer_loss(pair, x, y, dim, torch.float64) * share
                losses[n, i] += loss.detach()
        if moments is not None:
            for total, y in zip(moments[i], (k, v), strict=True):
                y = y.flatten(0, 1).double()  # [B * T, d_kv]
                total += y.T @ y

    with layer_hooks(model, add, sinks):
        for sample in samples[rank::count]:
            model(sample.to(device), logits_to_keep=1)
    if moments is not None:
        summed(moments)
    return summed(losses)


def loss_floor(moment: Tensor, rank: int) -> Tensor:
    """The least sum of squared errors that factors of this rank can have on a text [2]: the dropped
    eigenvalues of `moment` = K^T K [d_kv, d_kv]. A scalar; 0 where it would be mere rounding."""
    dropped = torch.linalg.eigvalsh(moment)[: len(moment) - rank].clamp(min=0).sum()
    return dropped * (dropped > 1e-12 * moment.trace())  # else fewer tokens than ranks


def measure(
    model: Transformer,
    tuner: Tuner,
    samples: list[Tensor],
    bases: list[Tensor],
    train: bool,
    sinks: int = 0,
) -> Tensor:
    """Four losses of each layer on `samples`, [4, layers], in the units of equation 2:

    0. of the tuner's factors; `train` adds their gradients;
    1. the floor: no factors of these ranks come below it;
    2. of the closed form on the calibration text, what training can hope for: `bases` has its
       V_r [d_kv, r] for keys and values of every layer, in turn;
    3. of zeros in place of keys and values.

    Moments take memory while this runs: 0.5 GB for a Mistral-7B, 8.6 GB for a LongChat-7B.
    """
    d_kv, layers = model.config.d_kv, len(model.model.layers)
    moments = torch.zeros(layers, 2, d_kv, d_kv, dtype=torch.float64, device=bases[0].device)
    losses = run_layers(model, samples, [tuner], train, moments, sinks)
    if not losses.isfinite().all():
        return losses.expand(4, -1)  # for the caller to refuse
    rows = []
    for moment, V in zip(moments.flatten(0, 1), bases, strict=True):
        R = torch.eye(d_kv).to(moment) - V.double() @ V.double().T  # k R: what V_r leaves out
        floor = loss_floor(moment, V.shape[1])
        rows.append(torch.stack([floor, ((moment @ R) * R).sum(), moment.trace()]))
    elements = count_tokens(samples, sinks) * d_kv
    return torch.cat([losses, torch.stack(rows).view(layers, 2, 3).sum(1).T / elements])


def fine_tune(
    model: Transformer,
    tuner: Tuner,
    samples: list[Tensor],
    journal: Journal,
    measure_samples: int = 32,
    batch_size: int = 1,
    seed: int = 0,
    sinks: int = 0,
) -> None:
    """Takes the steps that `tuner` has left; measures the first samples before and after.

    `journal.state` has the "bases" that `measure` wants. Raises `UserError` when a loss diverges,
    and after a signal, with the checkpoint written, `KeyboardInterrupt`.
    """
    steps, state, bases = tuner.steps, journal.state, journal.state["bases"]
    measured = samples[:measure_samples]
    if "initial" not in state:
        state["initial"] = measure(model, tuner, measured, bases, False, sinks)
    final = state["initial"]
    with journal.open(tuner.steps_done, steps):
        while (step := tuner.steps_done) < steps:
            batch, rate = batch_of(samples, step, batch_size, seed), tuner.rate
            if step in journal.logged:
                losses = measure(model, tuner, batch, bases, True, sinks)
            else:
                losses = run_layers(model, batch, [tuner], train=True, sinks=sinks)
            journal.check(losses[0], step)
            tuner.step()
            journal.record(step, rate, losses, tuner)
    if steps:
        final = measure(model, tuner, measured, bases, False, sinks)
        journal.check(final[0], steps)
    journal.summarize(steps, final, len(measured))


# -------------------------------------------------------------------------------- command line


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed."""
    training, calibrating = args.epochs > 0 and args.steps != 0, args.init in CALIBRATED
    measuring, checkpoint = training or args.log is not None, Path(f"{args.out}.checkpoint")
    bits = args.k_bits, args.v_bits, args.clamped_zero_point
    files = {"--out": args.out, "--log": args.log, "the checkpoint": checkpoint}
    with processes(args.device) as device:
        check_files(files, {"--data": args.data})
        if args.resume and args.out.exists() and not checkpoint.exists():
            say(f"{args.out} is finished; to make it again, leave out --resume")
            return
        if (measuring or calibrating) and args.data is None:
            what = f"--init {args.init} calibrates on" if calibrating else "training and --log need"
            raise UserError(f"{what} text; give some with --data")
        model = load_model(args.model, device, DTYPES[args.dtype])
        with user_values():
            k_ranks = equal_ranks(model, args.k_rank, args.k_ratio)
            v_ranks = equal_ranks(model, args.v_rank, args.v_ratio)
        samples = []
        if measuring or calibrating:
            tokenizer = load_tokenizer(args.model, model.config.vocab_size)
            length = min(args.seq_len, model.config.context_length)
            drawn = args.samples, length, args.seed, args.sinks
            samples = sample_tokens(args.data, tokenizer, *drawn)
            say(f"{len(samples)} samples, {sum(sample.numel() for sample in samples)} tokens")
        steps = args.epochs * -(-len(samples) // args.batch_size)
        if args.steps is not None and args.steps > steps:
            say(f"{steps} steps, not {args.steps}: the epochs have no more; raise --epochs")
        steps = steps if args.steps is None else min(steps, args.steps)

        if training and args.batch_size % place()[1]:
            say(f"batches of {args.batch_size}: some of {place()[1]} processes are idle at times")
        plan = make_plan(vars(args), model, samples)
        every = args.checkpoint_every, args.log_every
        journal = Journal(checkpoint, args.log, *every, plan, training and args.resume, device)
        goes_on = "step" in journal.state
        with user_values():
            statistics = calibrate(model, samples, args.sinks) if samples and not goes_on else None
            init = "random" if goes_on else args.init  # what a checkpoint holds comes in its place
            factors = init_factors(init, model, k_ranks, v_ranks, statistics, args.seed)
            if measuring and not goes_on:
                best = init_factors("optimal", model, k_ranks, v_ranks, statistics)
                journal.state["bases"] = [pair.B.T for pair in best.pairs]  # V_r [d_kv, r]
        trained = f"{steps} steps, lr {args.lr:g}, batch {args.batch_size}" if training else "none"
        data = {"data": args.data.name} if training or calibrating else {}
        factors.info.update(init=args.init, trained=trained, **data)
        tuner = Tuner(factors.in_bits(*bits), steps, args.lr)
        if goes_on:
            restore(tuner, journal.state)
        if measuring:
            sizes = args.measure_samples, args.batch_size, args.seed, args.sinks
            fine_tune(model, tuner, samples, journal, *sizes)
        if place()[0] == 0:
            save_factors(args.out, tuner.factors, model, DTYPES[args.save_dtype])
            shape = f"ranks {k_ranks[0]} (keys) and {v_ranks[0]} (values) of {model.config.d_kv}"
            say(f"{args.out}: {args.init}, trained: {trained}, {shape}")
        if training:
            journal.forget()


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__.splitlines()[0])
    add, count = parser.add_argument, number(int, 1)
    shared = "model samples seq-len sinks seed measure-samples clamped-zero-point device dtype"
    add_options(parser, shared, {"sinks": "first tokens of a sample that are not learned from"})
    add("--data", type=Path, help=".txt, .jsonl or .parquet (field `text`), or a folder of them")
    add("--out", type=Path, required=True, help="factors file to write")
    add("--init", choices=INITIALIZATIONS, default="optimal", help="where to start; see cskv.py")
    bits = {"type": int, "choices": (2, 3, 4, 8, 16)}
    add("--bits", **bits, default=16, help="of the latents, rounded in training (default: 16, not)")
    for name, what in (("k", "key"), ("v", "value")):
        add(f"--{name}-ratio", type=float, default=0.8, help=f"of {what} channels removed (0.8)")
        add(f"--{name}-rank", type=count, help=f"{what} channels kept, instead of a ratio")
        add(f"--{name}-bits", **bits, help=f"of the latents of {what}s, if other than --bits")
    add("--epochs", type=number(int, 0), default=1, help="over the samples (1); 0: no training")
    add("--steps", type=number(int, 0), help="stop after so many; 0: no training")
    add("--lr", type=number(float, 0), default=5e-5, help="at first; falls to 0 linearly (5e-5)")
    add("--batch-size", type=count, default=1, help="samples a step (1)")
    add("--log", type=Path, help="JSON lines: the loss of each step beside its floor, a summary")
    add("--log-every", type=count, default=1, help="steps a line (1): floors of a 7B take a while")
    add("--checkpoint-every", type=count, default=50, help="steps between OUT.checkpoint (50)")
    add("--resume", action="store_true", help="go on from OUT.checkpoint if there is one")
    add("--save-dtype", choices=DTYPES, default="float16", help="of the file (float16)")
    args = parser.parse_args(argv)
    args.k_bits, args.v_bits = args.k_bits or args.bits, args.v_bits or args.bits
    return args


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
