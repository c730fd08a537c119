"""From a checkpoint and text to factors: calibrate, factorize, fine-tune layer by layer.

    python train.py --model FOLDER_OR_HUB_NAME --data TEXT --k-ratio 0.8 --out FILE
    torchrun --nproc-per-node 2 -- train.py ...    the same on two GPUs, or processes

From what the layers of the frozen model see on the text, A and B of each follow in closed
form (cskv.py). Then they are trained (section 2.2 and appendix B of [1]). Every layer has a
loss of its own, of how far rebuilt keys and values are off,

    L_K = MSE(K, K^)    K = x W_K    K^ = (x A_K) B_K        (equation 1; L_V likewise)
    L   = sum over layers of L_K + L_V                       (equation 2)

where x is what the frozen model feeds the layer. So no gradient passes from layer to layer:
while the model runs, each loss is formed and back-propagated at once, and memory holds one
layer's graph. With bits, the latents x A are rounded on the way: quantization-aware training
(appendix C.4, quant.py). Losses are reported beside their floor: no A B of rank r, quantized
or not, loses less on a text than the dropped eigenvalues of its K^T K [2].

Sources:
    [1] Wang et al., "CSKV", 2024
    [2] Eckart and Young, "The approximation of one matrix by one of lower rank", 1936
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
from support import command
from support.command import UserError, number
from support.factors_file import load_factors, save_factors
from support.huggingface.checkpoint import load_model
from support.huggingface.tokenizer import load_tokenizer
from support.processes import calibrate_together, place, processes, say, summed
from support.resume import Journal, changed_flag, make_plan
from support.text import batch_of, sample_tokens

MEASURED = 32  # samples that losses before and after training are measured on


def layer_loss(
    pair: LowRank, x: Tensor, k: Tensor, dim: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """L_K = MSE(K, K^), K^ = (x A) B (equation 1), a scalar; for values it is L_V.

    x [B, T, hidden] and k [B, T, d_kv] are what an `Observer` shows. Latents of few bits
    are quantized as KIVI's of keys (`dim` TOKENS) or values (CHANNELS); K^ is in `dtype`.
    """
    c = x @ pair.A  # [B, T, r]
    if pair.bits < 16:
        c = quant.fake_quantize(c, pair.bits, pair.grouping(dim))
    k_hat = c.to(dtype) @ pair.B.to(dtype)
    return F.mse_loss(k_hat, k.to(dtype))


class Tuner:
    """Factors in training: a float32 copy, AdamW [3], and a learning rate that falls to 0
    linearly. Weight decay would pull A B away even from the optimum.

    At the starts svd, asvd and optimal the gradient of A is mere rounding, since what is lost
    is orthogonal to the rows of B, and Adam makes steps of the whole learning rate of it. So
    only starts that are equal to the last bit train alike.
    """

    def __init__(self, factors: Factors, steps: int, lr: float = 5e-5):
        self.steps = steps
        self.lr = lr
        self.steps_done = 0
        self.factors = factors.map(lambda p: replace(p, A=trainable(p.A), B=trainable(p.B)))
        self.parameters = [M for pair in self.factors.pairs for M in (pair.A, pair.B)]
        self.optimizer = torch.optim.AdamW(self.parameters, weight_decay=0.0)

    def rate(self, step: int) -> float:
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
        parameters = [parameter.detach() for parameter in self.parameters]
        optimizer = self.optimizer.state_dict()
        return {"step": self.steps_done, "parameters": parameters, "optimizer": optimizer}

    @torch.no_grad()
    def restore(self, state: dict) -> None:
        self.steps_done = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, value in zip(self.parameters, state["parameters"], strict=True):
            parameter.copy_(value)


def trainable(x: Tensor) -> Tensor:
    """A contiguous float32 copy with a gradient: in another layout products would round
    otherwise, and a restored training would differ."""
    x = x.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    x.requires_grad_().grad = torch.zeros_like(x)
    return x


@torch.no_grad()
def run_layers(
    model: Transformer, samples: list[Tensor], tuners: list[Tuner], train=False, moments=None
) -> Tensor:
    """Equation 2, layer by layer: the frozen model runs once over `samples` [1, T], which the
    processes share. Returns the loss of every tuner and layer, [tuners, layers], a mean over
    all tokens. Their sum is never formed: no two layers share a parameter.

    `train` adds gradients. `moments` [layers, 2, d_kv, d_kv] gets k^T k and v^T v added. In
    `train` without `moments` losses are float32; else float64, for rounding could take a
    nearly optimal one below its floor.
    """
    process, all_processes = place()
    weight = model.lm_head.weight
    all_tokens = count_tokens(samples)
    losses = weight.new_zeros(len(tuners), len(model.model.layers), dtype=torch.float64)

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
    cache = [Observer(layer.self_attn, partial(see, i)) for i, layer in layers]
    for sample in samples[process::all_processes]:
        model(sample.to(weight.device), cache, logits_to_keep=1)
    if moments is not None:
        summed(moments)
    return summed(losses)


def count_tokens(samples: list[Tensor]) -> int:
    return sum(sample.numel() for sample in samples)


def train_layers(
    model: Transformer, tuners: list[Tuner], samples: list, batch_size=1, seed=0, moments=False
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """The training: takes the steps that all `tuners` have left. Yields the number of each,
    the losses [tuners, layers] from before its update and, if wanted, the moments of its
    batch. Every epoch has the samples in another order."""
    for step in range(tuners[0].steps_done, tuners[0].steps):
        batch = batch_of(samples, step, batch_size, seed)
        total = new_moments(model) if moments else None
        losses = run_layers(model, batch, tuners, True, total)
        for tuner in tuners:
            tuner.step()
        yield step, losses, total


def new_moments(model: Transformer) -> Tensor:
    """Zeros for `run_layers`: 0.5 GB for a Mistral-7B, 8.6 GB for a LongChat-7B."""
    d_kv = model.config.d_kv
    shape = len(model.model.layers), 2, d_kv, d_kv
    return model.lm_head.weight.new_zeros(shape, dtype=torch.float64)


def loss_floor(moment: Tensor, rank: int) -> Tensor:
    """The least sum of squared errors that factors of this rank can have on a text [2]: the
    dropped eigenvalues of `moment` = K^T K [d_kv, d_kv]; 0 where these are mere rounding."""
    eigenvalues = torch.linalg.eigvalsh(moment)  # smallest first
    dropped = eigenvalues[: len(moment) - rank].clamp(min=0).sum()
    return dropped * (dropped > 1e-12 * moment.trace())  # else fewer tokens than ranks


def layer_floors(moments: Tensor, factors: Factors, tokens: int) -> Tensor:
    """The least losses [layers], in the units of equation 2, on a text of that length."""
    floors = []
    for (k, v), layer in zip(moments, factors.layers, strict=True):
        floors.append(loss_floor(k, layer.k.rank) + loss_floor(v, layer.v.rank))
    return torch.stack(floors) / (tokens * moments.shape[-1])


def measure(model: Transformer, tuner: Tuner, samples: list) -> tuple[Tensor, ...]:
    """Losses [layers], in the units of equation 2: of a tuner's factors on `samples`, the
    least of any factors of these ranks, and that of zeros in place of keys and values."""
    moments = new_moments(model)
    loss = run_layers(model, samples, [tuner], moments=moments)[0]
    if not loss.isfinite().all():
        return loss, loss, loss  # for the caller to refuse
    tokens = count_tokens(samples)
    zeros = moments.diagonal(dim1=2, dim2=3).sum((1, 2)) / (tokens * moments.shape[-1])
    return loss, layer_floors(moments, tuner.factors, tokens), zeros


def check_loss(loss: Tensor, limit: Tensor, step: int, journal: Journal) -> None:
    """Raises `UserError` if a layer's loss diverges, and removes the checkpoint, which would
    end here again."""
    bad = ~(loss.isfinite() & (loss <= limit))
    if bad.any():
        journal.forget()
        i = int(bad.nonzero()[0])
        message = f"step {step}, layer {i}: the loss diverges ({loss[i].item():.3g})"
        raise UserError(f"{message}; start anew with a lower --lr, or another --dtype")


def fine_tune(
    model: Transformer, tuner: Tuner, samples: list, journal: Journal, state, batch_size=1, seed=0
) -> None:
    """Takes the steps of `tuner`, or those behind a checkpoint's `state`. The journal's log
    gets each batch's losses and floor, its checkpoint all that it takes to go on."""
    device = model.lm_head.weight.device
    some = samples[:MEASURED]
    if state:
        tuner.restore(state)
        initial, limit = state["initial"].to(device), state["limit"].to(device)
    else:
        initial, _, zeros = measure(model, tuner, some)
        # Losses of single batches differ, but not by 1000 times: neither from where the layer
        # began, nor, where that was next to nothing, from what it loses with zeros.
        limit = 1000 * initial.maximum(zeros)
        check_loss(initial, limit, 0, journal)
    begun = {"initial": initial, "limit": limit}
    steps = train_layers(model, [tuner], samples, batch_size, seed, bool(journal.log))
    with journal.open(tuner.steps_done, tuner.steps):
        for step, losses, moments in steps:
            check_loss(losses[0], limit, step, journal)
            columns = {"loss": losses[0]}
            if moments is not None:
                tokens = count_tokens(batch_of(samples, step, batch_size, seed))
                columns["floor"] = layer_floors(moments, tuner.factors, tokens)
            row = {"step": step, "lr": tuner.rate(step)}
            journal.record(row, columns, lambda: begun | tuner.state())
    final, floor, _ = measure(model, tuner, some)
    check_loss(final, limit, tuner.steps, journal)
    columns = {"initial": initial, "final": final, "floor": floor}
    totals = [f"{name} {losses.sum():.6g}" for name, losses in columns.items()]
    say(f"loss on {len(some)} training samples: {', '.join(totals)}")
    journal.write({"summary": True, "steps": tuner.steps}, columns)


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed."""
    checkpoint = Path(f"{args.out}.checkpoint")
    written = {"--out": args.out, "--log": args.log, "the checkpoint": checkpoint}
    with processes(args.device) as device:
        command.check_files(written, {"--data": args.data}, args.model)
        model = load_model(args.model, device, command.DTYPES[args.dtype])
        d_kv, layers = model.config.d_kv, len(model.model.layers)
        with command.user_values():
            k_ranks = [rank_for(args.k_ratio, d_kv)] * layers
            v_ranks = [rank_for(args.v_ratio, d_kv)] * layers
        tokenizer = load_tokenizer(args.model, model.config.vocab_size)
        length = min(args.seq_len, model.config.context_length)
        samples = sample_tokens(args.data, tokenizer, args.samples, length, args.seed)
        say(f"{len(samples)} samples, {count_tokens(samples)} tokens")
        steps = args.epochs * -(-len(samples) // args.batch_size)
        plan = make_plan(vars(args), model, samples)
        if args.resume and args.out.exists() and not checkpoint.exists():
            theirs = json.loads(load_factors(args.out, model).info.get("plan", "{}"))
            flag = changed_flag(plan, theirs)
            if flag:
                message = f"{args.out} was made with another {flag}"
                raise UserError(f"{message}; leave out --resume to make it again")
            say(f"{args.out} is finished; to make it again, leave out --resume")
            return
        journal = Journal(checkpoint, args.checkpoint_every, args.log, plan)
        state = journal.load() if args.resume and steps else None
        init = "random" if state else args.init  # the checkpoint's factors replace them
        statistics = calibrate_together(model, samples) if init in CALIBRATED else None
        with command.user_values():
            factors = init_factors(init, model, k_ranks, v_ranks, statistics, args.seed)
        trained = f"{steps} steps, lr {args.lr:g}, batch {args.batch_size}" if steps else "none"
        made = {"init": args.init, "data": args.data.name, "trained": trained}
        factors.info.update(made, plan=json.dumps(plan))
        tuner = Tuner(factors.in_bits(args.bits, args.bits), steps, args.lr)
        if steps or args.log:
            fine_tune(model, tuner, samples, journal, state, args.batch_size, args.seed)
        if place()[0] == 0:
            save_factors(args.out, tuner.factors, model)
            ranks = f"ranks {k_ranks[0]} and {v_ranks[0]} of {d_kv}"
            say(f"{args.out}: {args.init}, {ranks}, trained: {trained}")
        if steps:
            journal.forget()


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command.Arguments(description=__doc__)
    add = parser.add_argument
    count = number(int, 1)
    add("--model", required=True, help="checkpoint folder or hub name of the frozen model")
    texts = "a .txt file, a .jsonl file (field `text`), or a folder of them"
    add("--data", type=Path, required=True, help=texts)
    add("--out", type=Path, required=True, help="factors file to write")
    add("--init", choices=INITIALIZATIONS, default="attention", help="where to start; see cskv.py")
    add("--k-ratio", type=float, default=0.8, help="remove so many key channels (0.8)")
    add("--v-ratio", type=float, default=0.8, help="remove so many value channels (0.8)")
    widths = (*quant.BITS, 16)
    add("--bits", type=int, choices=widths, default=16, help="round latents in training (16)")
    add("--samples", type=count, default=256, help="read so many pieces of text (256)")
    add("--seq-len", type=number(int, 2), default=1024, help="cut pieces of so many tokens (1024)")
    add("--epochs", type=number(int, 0), default=1, help="train on each piece so often (1)")
    add("--batch-size", type=count, default=1, help="train on so many pieces a step (1)")
    add("--lr", type=number(float, 0), default=5e-5, help="begin with this learning rate (5e-5)")
    add("--seed", type=number(int, 0), default=0, help="draw other pieces in another order (0)")
    add("--log", type=Path, help="write losses beside their floor, a JSON line a step")
    add("--checkpoint-every", type=count, default=50, help="write OUT.checkpoint so often (50)")
    add("--resume", action="store_true", help="go on from OUT.checkpoint, if there is one")
    add("--device", default="cpu", help="compute on cpu (default), cuda, cuda:1, ...")
    types = "run the model in this type (float32)"
    add("--dtype", choices=command.DTYPES, default="float32", help=types)
    return parser.parse_args(argv)


if __name__ == "__main__":
    command.run_command(lambda: run(parse_arguments()))
