"""From a checkpoint and text to a factors file: calibrate, factorize, fine-tune layer by layer.

    python train.py --model FOLDER_OR_HUB_NAME --data TEXT --k-ratio 0.8 --v-ratio 0.8 --out FILE
    torchrun --nproc-per-node 2 -- train.py ...      the same on two GPUs (or processes of a CPU)

The lone -- keeps torchrun from reading --log as short for its own --log-dir.
The frozen model reads the text once; from what its layers saw, A and B of every layer follow in
closed form (cskv.py, `init_factors`). Then they are trained (section 2.2 and appendix B of [1]).
Every layer has a loss of its own, of how far rebuilt keys and values are off,

    L_K = MSE(K, K^)    K = x W_K    K^ = (x A_K) B_K                 (equation 1; L_V likewise)
    L   = sum over layers of L_K + L_V                                (equation 2)

where x is what the frozen model feeds the layer. So no gradient passes from layer to layer: while
the model runs, without gradients, each loss is formed and back-propagated at once, and memory holds
one layer's graph however deep the model is. W_K and W_V never change. With bits, the latents x A
are rounded on the way: quantization-aware training (appendix C.4, quant.py).

What training can reach is known: no A B of rank r, quantized or not, loses less on a text than the
dropped eigenvalues of its K^T K [2]. Losses are reported beside this floor.

Shapes as in model.py, and r the rank.

Sources:
    [1] Wang et al., "CSKV", 2024
    [2] Eckart and Young, "The approximation of one matrix by another of lower rank", 1936
    [3] Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019: AdamW
"""

import argparse
import hashlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import cskv
import quant
from cskv import Factors, LayerFactors, LowRank, Statistics
from model import (
    DTYPES,
    UNREADABLE,
    Arguments,
    Tokenizer,
    Transformer,
    UserError,
    check_device,
    check_folder,
    load_model,
    load_tokenizer,
    number,
    replacing,
    run_command,
)

# ---------------------------------------------------------------------------------------- text

KINDS = (".txt", ".jsonl", ".parquet")


def read_documents(path: Path) -> Iterator[str]:
    """Yields the documents of a .txt file (one), a .jsonl or .parquet file (`text` of each row), or
    a folder of these, in the order of the names. Raises `UserError` naming file and line."""
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in KINDS)
        if not files:
            raise UserError(f"{path} has no .txt or .jsonl files, nor .parquet; give text to read")
        for file in files:
            yield from read_documents(file)
        return
    if path.suffix not in KINDS:
        raise UserError(f"{path} is not a .txt or .jsonl file, nor .parquet, nor a folder of them")
    if not path.exists():
        raise UserError(f"no file {path}; give text to read")
    if path.suffix == ".parquet":
        yield from read_parquet(path)
        return
    try:
        with path.open(encoding="utf-8") as lines:
            if path.suffix == ".txt":
                yield lines.read()
                return
            for i, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)["text"]
                except (ValueError, KeyError, TypeError):
                    text = None
                if not isinstance(text, str):
                    raise UserError(f'{path}, line {i}: not a JSON object with a string "text"')
                yield text
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error})") from None


def read_parquet(path: Path) -> Iterator[str]:
    """Yields the column `text` of a .parquet file, a block of rows in memory at a time."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"{path} needs pyarrow; pip install pyarrow, or give .jsonl") from None
    try:
        file = parquet.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            raise UserError(f"{path} has no column `text`; it has {file.schema_arrow.names}")
        for block in file.iter_batches(columns=["text"]):
            for text in block.column(0).to_pylist():
                if not isinstance(text, str):
                    raise UserError(f"{path}: column `text` holds {text!r}, which is not text")
                yield text
    except (OSError, ArrowException) as error:
        raise UserError(f"{path} is damaged ({error}); fetch it again") from None


def sample_tokens(
    path: Path, tokenizer: Tokenizer, samples: int, length: int, seed: int
) -> list[Tensor]:
    """Up to `samples` tensors [1, T] with 2 <= T <= `length`, drawn without repetition.

    A sample is a whole document, or a piece of one that is longer: never two documents in one.
    """
    pieces = []
    for text in read_documents(path):
        ids = torch.tensor([tokenizer.encode(text)])  # [1, tokens]
        pieces += [piece for piece in ids.split(length, dim=1) if piece.shape[1] > 1]
    if not pieces:
        raise UserError(f"{path} holds no text; give some to calibrate on")
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))
    return [pieces[i] for i in order[:samples].tolist()]


def batch_of(samples: list[Tensor], step: int, size: int, seed: int) -> list[Tensor]:
    """The samples of one step; every epoch has an order of its own, drawn from seed and epoch."""
    epoch, position = divmod(step, -(-len(samples) // size))
    generator = torch.Generator().manual_seed((seed << 32) + epoch)
    order = torch.randperm(len(samples), generator=generator).tolist()
    return [samples[i] for i in order[position * size : (position + 1) * size]]


# ----------------------------------------------------------------------------------- processes


def place() -> tuple[int, int]:
    """This process's number and how many there are: (0, 1) unless torchrun started it."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def processes(device: str) -> Iterator[str]:
    """Joins the other processes of torchrun, if there are any. Yields the device to compute on.

    A `UserError` or an interruption ends all of them, but only the first says so.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield device
        return
    try:
        if device == "cuda":
            if torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
                raise UserError(f"{torch.cuda.device_count()} GPUs here; start as many processes")
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        yield device
        dist.barrier()  # or one takes its connections down while another still uses them
    except (UserError, KeyboardInterrupt) as error:
        if os.environ["RANK"] == "0":
            raise
        time.sleep(1)  # for the first to speak: torchrun ends all processes when one has ended
        sys.exit(2 if isinstance(error, UserError) else 130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def summed(tensor: Tensor) -> Tensor:
    """`tensor`, now its sum over all processes. Raises `UserError` if one of them has ended."""
    if place()[1] > 1:
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            raise UserError(f"another process has stopped ({error}); see what it said") from None
    return tensor


def say(message: str) -> None:
    if place()[0] == 0:
        print(message, file=sys.stderr)


def calibrate(model: Transformer, samples: list[Tensor]) -> list[Statistics]:
    """`cskv.collect_statistics`, with the samples shared out among the processes."""
    rank, count = place()
    if len(samples) < count:
        raise UserError(f"{len(samples)} samples for {count} processes; start fewer of these")
    mine = samples[rank::count]
    bar = tqdm(mine, "calibrating", unit="sample", disable=rank > 0)
    statistics = cskv.collect_statistics(model, bar)
    if count > 1:  # means over the tokens of each process: to sums, and to a mean over all tokens
        here, all_tokens = (sum(s.numel() for s in part) for part in (mine, samples))
        for s in statistics:
            for mean in (s.x_abs, s.k_moment, s.v_moment):
                summed(mean.mul_(here)).div_(all_tokens)
    for i, s in enumerate(statistics):
        if not (s.k_moment.isfinite().all() and s.v_moment.isfinite().all()):
            raise UserError(f"keys or values of layer {i} overflow; try another --dtype")
    return statistics


# -------------------------------------------------------------------------- layer-wise training


class Tuner:
    """One set of factors in training: a float32 copy of them, AdamW [3], and its learning rate.

    No weight decay: the paper names none, and it would pull A B away even from the optimum.

    At the starts svd, asvd and optimal the gradient of A is zero up to rounding, since what is lost
    is orthogonal to the rows of B, and Adam makes steps of the whole learning rate of that noise.
    So only starts that are equal to the last bit train alike.

    Args:
        factors: where to start. With `v_bits` below 16, rotate them first (`cskv.rotate_values`).
        steps: planned; over them the learning rate falls from `lr` to 0, linearly.
        k_bits, v_bits: of the latents, 2, 3, 4 or 8; 16 leaves them as they are.
        clamped_zero_point: round as the paper's published code does (quant.py), to compare.
    """

    def __init__(
        self,
        factors: Factors,
        steps: int,
        lr: float = 5e-5,
        k_bits: int = 16,
        v_bits: int = 16,
        clamped_zero_point: bool = False,
    ):
        self.steps, self.lr, self.steps_done = steps, lr, 0
        self.k_bits, self.v_bits, self.clamped_zero_point = k_bits, v_bits, clamped_zero_point
        info = {**factors.info, "k_bits": str(k_bits), "v_bits": str(v_bits)}
        if clamped_zero_point and min(k_bits, v_bits) < 16:
            info["quantizer"] = "clamped zero-point"
        self.parameters = [M.detach().float().clone() for p in factors.pairs for M in (p.A, p.B)]
        self.factors = as_factors(self.parameters, info)
        for parameter in self.parameters:
            parameter.requires_grad_().grad = torch.zeros_like(parameter)
        self.optimizer = torch.optim.AdamW(self.parameters, weight_decay=0.0)

    def watch(
        self, i: int, x: Tensor, k: Tensor, v: Tensor, tokens: int, train: bool, exact: bool
    ) -> Tensor:
        """Layer i's L_K + L_V on part of a batch of `tokens`: its share of the batch's mean.

        With `train`, adds the gradients of A and B. With `exact`, evaluates the result in float64
        from the same float32 latents: rounding could take a nearly optimal loss below its floor.
        """
        layer, total = self.factors.layers[i], 0
        for pair, target, bits, dim in (
            (layer.k, k, self.k_bits, quant.TOKENS),
            (layer.v, v, self.v_bits, quant.CHANNELS),
        ):
            elements = tokens * target.shape[-1]
            with torch.set_grad_enabled(train):
                c = x @ pair.A  # [B, T, r]
                if bits < 16:
                    c = quant.fake_quantize(c, bits, dim, self.clamped_zero_point)
                loss = (target - c @ pair.B).square().sum() / elements  # equation 1
                if train:
                    loss.backward()  # at once: the graph ends here
            if exact:
                error = target.double() - c.detach().double() @ pair.B.detach().double()
                loss = error.square().sum() / elements
            total += loss.detach()
        return total

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


def as_factors(tensors: list[Tensor], info: dict[str, str]) -> Factors:
    """Factors of a flat list: A and B of keys, A and B of values, layer by layer."""
    pairs = [LowRank(A, B) for A, B in zip(tensors[::2], tensors[1::2], strict=True)]
    layers = [LayerFactors(k, v) for k, v in zip(pairs[::2], pairs[1::2], strict=True)]
    return Factors(layers, info)


@torch.no_grad()
def run_layers(
    model: Transformer,
    samples: list[Tensor],
    tuners: list[Tuner],
    train: bool = False,
    moments: Tensor | None = None,
) -> Tensor:
    """Runs the frozen model once over `samples` [1, T], shared out among the processes.

    Returns the loss of every tuner and layer, [tuners, layers], a mean over all tokens. `train`
    adds gradients. `moments` [layers, 2, d_kv, d_kv], float64, gets k^T k and v^T v added. Losses
    of `train` without `moments` are meant for no floor, and have the rounding of float32.
    """
    rank, count = place()
    device = model.lm_head.weight.device
    tokens = sum(sample.numel() for sample in samples)
    losses = torch.zeros(len(tuners), len(model.model.layers), dtype=torch.float64, device=device)
    exact = not train or moments is not None

    def see(i: int, x: Tensor, k: Tensor, v: Tensor) -> None:
        for n, tuner in enumerate(tuners):
            losses[n, i] += tuner.watch(i, x, k, v, tokens, train, exact)
        if moments is not None:
            for total, y in zip(moments[i], (k, v), strict=True):
                y = y.flatten(0, 1).double()  # [B * T, d_kv]
                total += y.T @ y

    with cskv.watching(model, see):
        for sample in samples[rank::count]:
            model(sample.to(device), logits_to_keep=1)
    return summed(losses)


def measure(
    model: Transformer, tuner: Tuner, samples: list[Tensor], bases: list[Tensor], train: bool
) -> Tensor:
    """Four losses of each layer on `samples`, [4, layers], in the units of equation 2:

    0. of the tuner's factors; `train` adds their gradients;
    1. the floor: the dropped eigenvalues of k^T k, below which no factors of these ranks come;
    2. of the closed form on the calibration text, what training can hope for: `bases` has its
       V_r [d_kv, r] for keys and values of every layer, in turn;
    3. of zeros in place of keys and values.

    Moments take memory while this runs: 0.5 GB for a Mistral-7B, 8.6 GB for a LongChat-7B.
    """
    d_kv, layers = model.config.d_kv, len(model.model.layers)
    moments = torch.zeros(layers, 2, d_kv, d_kv, dtype=torch.float64, device=bases[0].device)
    losses = run_layers(model, samples, [tuner], train, moments)
    if not losses.isfinite().all():
        return losses.expand(4, -1)  # for the caller to refuse
    rows = []
    for moment, V in zip(summed(moments).flatten(0, 1), bases, strict=True):
        dropped = torch.linalg.eigvalsh(moment)[: d_kv - V.shape[1]].clamp(min=0).sum()
        dropped *= dropped > 1e-12 * moment.trace()  # or it is rounding: fewer tokens than ranks
        R = torch.eye(d_kv).to(moment) - V.double() @ V.double().T  # k R: what V_r leaves out
        rows.append(torch.stack([dropped, ((moment @ R) * R).sum(), moment.trace()]))
    elements = sum(sample.numel() for sample in samples) * d_kv
    return torch.cat([losses, torch.stack(rows).view(layers, 2, 3).sum(1).T / elements])


# --------------------------------------------------------------------- checkpoints and the log


def save_checkpoint(path: Path, tuner: Tuner, state: dict) -> None:
    """All that training needs to go on exactly; whole or not at all."""
    state = {**state, "step": tuner.steps_done, "optimizer": tuner.optimizer.state_dict()}
    state["parameters"] = [parameter.detach() for parameter in tuner.parameters]
    torch.save(state, buffer := io.BytesIO())
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path: Path, plan: dict, device: str) -> dict:
    """What `save_checkpoint` wrote. Raises `UserError` if it is damaged, or if its plan is not
    `plan`, naming an argument that differs."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        other = [name for name in plan if state["plan"][name] != plan[name]]
        for name in ("bases", "parameters"):
            state[name] = [tensor.to(device) for tensor in state[name]]
        state["initial"] = state["initial"].to(device)
        state["seconds"], state["step"], state["optimizer"]  # are there
    except (*UNREADABLE, TypeError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is damaged ({reason}); delete it to start anew") from None
    if other:
        flag = "--" + other[0].replace("_", "-")
        raise UserError(f"{path} was made with another {flag}; give the same, or another --out")
    return state


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Yields a list that Ctrl-C and SIGTERM add to, so that a step can end; a second one kills."""
    got: list[int] = []

    def handler(number: int, frame: object) -> None:
        got.append(number)
        signal.signal(number, before[number])

    before = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield got
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def start_log(log: Path, lines: int) -> None:
    """Keeps the first lines of a log: those of steps that will not be done again."""
    with replacing(log) as temporary:
        old = log.read_text(encoding="utf-8", errors="replace") if lines and log.exists() else ""
        temporary.write_text("".join(old.splitlines(True)[:lines]), encoding="utf-8")


def write_line(log: Path, row: dict, names: tuple[str, ...], columns: Tensor) -> None:
    """Appends `row`, sums of `columns` [names, layers] by name, and these by layer."""
    sums = dict(zip(names, columns.sum(1).tolist(), strict=True))
    layers = [dict(zip(names, values, strict=True)) for values in columns.T.tolist()]
    try:
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, **sums, "layers": layers}) + "\n")
    except OSError as error:
        raise UserError(f"{log} cannot be written ({error}); choose another place") from None


# --------------------------------------------------------------------------------- the training


def check_losses(losses: Tensor, initial: Tensor, step: int, checkpoint: Path) -> None:
    """Raises `UserError` if a layer's loss diverges from the `initial` table of `measure`, and
    removes the checkpoint: to go on from that would end here again."""
    # Losses of single batches differ, but not by a factor of 1000: neither from where the layer
    # began, nor, where that was next to nothing, from what it would lose with zeros.
    bad = ~(losses.isfinite() & (losses <= 1000 * initial[0].maximum(initial[3])))
    if bad.any():
        if place()[0] == 0:
            checkpoint.unlink(missing_ok=True)
        i = int(bad.nonzero()[0])
        loss = f"step {step}, layer {i}: the loss diverges ({losses[i].item():.3g})"
        raise UserError(f"{loss}; start anew with a lower --lr, or another --dtype")


def fine_tune(
    model: Transformer, tuner: Tuner, samples: list[Tensor], state: dict, args: argparse.Namespace
) -> None:
    """Takes the steps that `tuner` has left, and measures before and after. `state` is what a
    checkpoint holds besides the tuner.

    Raises `UserError` when a loss diverges, and after a signal, with the checkpoint written,
    `KeyboardInterrupt`.
    """
    steps, (rank, count) = tuner.steps, place()
    if args.batch_size % count:
        say(f"{count} processes share batches of {args.batch_size}: some are idle at times")
    in_log = {*range(0, steps, args.log_every), *range(steps)[-1:]} if args.log else set()
    if args.log and rank == 0:
        start_log(args.log, sum(step < tuner.steps_done for step in in_log))
    measured, bases = samples[: args.measure_samples], state["bases"]
    if state["initial"] is None:
        state["initial"] = measure(model, tuner, measured, bases, train=False)
    initial = final = state["initial"]
    check_losses(initial[0], initial, 0, args.checkpoint)
    began = time.monotonic() - state["seconds"]
    bar = tqdm(total=steps, initial=tuner.steps_done, unit="step", disable=rank > 0 or not steps)
    with bar, interruptible() as signals:
        while (step := tuner.steps_done) < steps:
            batch = batch_of(samples, step, args.batch_size, args.seed)
            if step in in_log:
                table = measure(model, tuner, batch, bases, train=True)
            else:
                table = run_layers(model, batch, [tuner], train=True)
            check_losses(table[0], initial, step, args.checkpoint)
            row = {"step": step, "lr": tuner.rate}
            tuner.step()
            state["seconds"] = row["seconds"] = time.monotonic() - began
            if rank == 0 and step in in_log:
                write_line(args.log, row, ("loss", "floor", "optimal"), table[:3])
            loss, *floor = table[:2].sum(1).tolist()
            ratio = f", {loss / floor[0]:.2f} of its floor" if any(floor) else ""
            bar.set_postfix_str(f"loss {loss:.4g}{ratio}", refresh=False)
            bar.update()
            # A signal may reach one process a step before another, but they must stop together.
            stopped = summed(table.new_tensor(len(signals))).item() > 0
            due = step + 1 == steps or (step + 1) % args.checkpoint_every == 0
            if rank == 0 and (stopped or due):
                save_checkpoint(args.checkpoint, tuner, state)
            if stopped:
                say(f"\n{step + 1} of {steps} steps are in {args.checkpoint}")
                say("go on with the same command and --resume")
                raise KeyboardInterrupt
    if steps:
        final = measure(model, tuner, measured, bases, train=False)
        check_losses(final[0], initial, steps, args.checkpoint)
    columns = torch.stack([initial[0], *final[:3]])
    before, after, floor, _ = columns.sum(1).tolist()
    ratio = after / floor if floor else None
    losses = f"{before:.6g} before, {after:.6g} after, floor {floor:.6g}"
    losses += f", ratio {ratio:.4f}" if floor else ""
    say(f"loss on {len(measured)} training samples: {losses}")
    if args.log and rank == 0:
        row = {"summary": True, "steps": steps, "ratio": ratio, "seconds": state["seconds"]}
        write_line(args.log, row, ("initial", "final", "floor", "optimal"), columns)


# -------------------------------------------------------------------------------- command line


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed."""
    with processes(args.device) as device:
        args.device = device
        make_factors(args)


def make_factors(args: argparse.Namespace) -> None:
    """Calibrates, factorizes, fine-tunes and writes, as the arguments say."""
    check_device(args.device)
    check_files(args)
    if args.resume and args.out.exists() and not args.checkpoint.exists():
        say(f"{args.out} is finished; to make it again, leave out --resume")
        return
    training, calibrating = args.epochs > 0 and args.steps != 0, args.init in cskv.CALIBRATED
    measuring = training or args.log is not None
    needs_text = measuring or calibrating
    if needs_text and args.data is None:
        what = f"--init {args.init} calibrates on" if calibrating else "training and --log need"
        raise UserError(f"{what} text; give some with --data")
    model = load_model(args.model, args.device, DTYPES[args.dtype])
    ranks = choose_ranks(args, model)
    samples = read_samples(args, model) if needs_text else []
    steps = args.epochs * -(-len(samples) // args.batch_size)
    if args.steps is not None:
        if args.steps > steps:
            say(f"{steps} steps, not {args.steps}: the epochs have no more; raise --epochs")
        steps = min(steps, args.steps)

    state = begin(args, model, ranks, samples, training)
    info = {"init": args.init, "trained": "none"}
    if training:
        info["trained"] = f"{steps} steps, lr {args.lr:g}, batch {args.batch_size}"
    if training or calibrating:
        info["data"] = args.data.name
    factors, bits = as_factors(state.pop("parameters"), info), (args.k_bits, args.v_bits)
    tuner = Tuner(factors, steps, args.lr, *bits, args.clamped_zero_point)
    if "optimizer" in state:
        tuner.steps_done = state["step"]
        tuner.optimizer.load_state_dict(state.pop("optimizer"))
    if measuring:
        fine_tune(model, tuner, samples, state, args)
    if place()[0] == 0:
        cskv.save_factors(args.out, tuner.factors, model, DTYPES[args.save_dtype])
        if training:
            args.checkpoint.unlink(missing_ok=True)
        shape = "ranks {} (keys) and {} (values) of {}".format(*ranks, model.config.d_kv)
        size = f"{args.out.stat().st_size / 1e6:.2f} MB"
        say(f"{args.out}: {args.init}, trained: {info['trained']}, {shape}, {size}")


def check_files(args: argparse.Namespace) -> None:
    """Raises `UserError` if a file cannot be written, or is another one that is written or read."""
    files = {"--data": args.data, "--out": args.out, "--log": args.log}
    taken: dict[Path, str] = {}
    for name, path in {**files, "the checkpoint": args.checkpoint}.items():
        if name != "--data":
            check_folder(path)
        if path and (other := taken.setdefault(path.resolve(), name)) != name:
            raise UserError(f"{name} and {other} are both {path}; choose another name")


def choose_ranks(args: argparse.Namespace, model: Transformer) -> tuple[int, int]:
    """Of keys and of values, in all layers. Raises `UserError` if the model has fewer channels."""
    k_rank = args.k_rank or cskv.rank_for(args.k_ratio, model.config.d_kv)
    v_rank = args.v_rank or cskv.rank_for(args.v_ratio, model.config.d_kv)
    cskv.check_ranks(model, k_rank, v_rank)
    return k_rank, v_rank


def read_samples(args: argparse.Namespace, model: Transformer) -> list[Tensor]:
    length = min(args.seq_len, int(model.config.context_length))
    tokenizer = load_tokenizer(args.model)
    samples = sample_tokens(args.data, tokenizer, args.samples, length, args.seed)
    say(f"{len(samples)} samples, {sum(sample.numel() for sample in samples)} tokens")
    return samples


# Arguments that may change when a training is resumed; model and data are compared by content.
ELSEWHERE = ("out", "log", "checkpoint", "checkpoint_every", "resume", "device", "save_dtype")
ELSEWHERE += ("model", "data")


def begin(
    args: argparse.Namespace,
    model: Transformer,
    ranks: tuple,
    samples: list[Tensor],
    training: bool,
) -> dict:
    """The state to go on from: the checkpoint's, or that of a start, with no step or optimizer."""
    plan = {name: str(value) for name, value in vars(args).items() if name not in ELSEWHERE}
    text = str([sample.tolist() for sample in samples]).encode()
    plan |= {"model": cskv.fingerprint(model), "data": hashlib.sha256(text).hexdigest()}
    if training and args.resume and args.checkpoint.exists():
        state = load_checkpoint(args.checkpoint, plan, args.device)
        say(f"going on after step {state['step']}")
        return state
    if training and args.resume:
        say(f"no checkpoint {args.checkpoint}; starting from the beginning")
    ranks = [[rank] * model.config.num_hidden_layers for rank in ranks]
    statistics = calibrate(model, samples) if samples else None
    factors = best = cskv.init_factors(args.init, model, *ranks, statistics, args.seed)
    if (training or args.log) and args.init != "optimal":
        best = cskv.init_factors("optimal", model, *ranks, statistics)
    if args.v_bits < 16:
        factors = cskv.rotate_values(factors)
    parameters = [M for pair in factors.pairs for M in (pair.A, pair.B)]
    bases = [pair.B.T for pair in best.pairs]  # V_r [d_kv, r]
    return {"plan": plan, "parameters": parameters, "bases": bases, "initial": None, "seconds": 0}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__.splitlines()[0])
    add, count = parser.add_argument, number(int, 1)
    add("--model", required=True, help="checkpoint folder or hub name")
    add("--data", type=Path, help=".txt, .jsonl or .parquet (field `text`), or a folder of them")
    add("--out", type=Path, required=True, help="factors file to write")
    inits = "random: a control; svd: of the weights alone; asvd: the paper's; optimal (default): "
    inits += "the closed-form minimum of the paper's loss; attention: this, for the layer's output"
    add("--init", choices=cskv.INITIALIZATIONS, default="optimal", help=inits)
    bits = {"type": int, "choices": (2, 3, 4, 8, 16)}
    add("--bits", **bits, default=16, help="of the latents, rounded in training (default: 16, not)")
    for name, what in (("k", "key"), ("v", "value")):
        add(f"--{name}-ratio", type=float, default=0.8, help=f"of {what} channels removed (0.8)")
        add(f"--{name}-rank", type=count, help=f"{what} channels kept, instead of a ratio")
        add(f"--{name}-bits", **bits, help=f"of the latents of {what}s, if other than --bits")
    published = "round as the paper's published code does, to see what it costs (quant.py)"
    add("--clamped-zero-point", action="store_true", help=published)
    add("--samples", type=count, default=256, help="of text, to learn from (default: 256)")
    add("--seq-len", type=number(int, 2), default=1024, help="tokens a sample at most (1024)")
    add("--epochs", type=number(int, 0), default=1, help="over the samples (1); 0: no training")
    add("--steps", type=number(int, 0), help="stop after so many; 0: no training")
    add("--lr", type=number(float, 0), default=5e-5, help="at first; falls to 0 linearly (5e-5)")
    add("--batch-size", type=count, default=1, help="samples a step (1)")
    add("--seed", type=number(int, 0), default=0, help="of samples, their order, random factors")
    add("--log", type=Path, help="JSON lines: the loss of each step beside its floor, a summary")
    add("--log-every", type=count, default=1, help="steps a line (1): floors of a 7B take a while")
    add("--measure-samples", type=count, default=32, help="measured before and after (32)")
    add("--checkpoint-every", type=count, default=50, help="steps between OUT.checkpoint (50)")
    add("--resume", action="store_true", help="go on from OUT.checkpoint if there is one")
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    add("--dtype", choices=DTYPES, default="float32", help="of the frozen model (float32)")
    add("--save-dtype", choices=DTYPES, default="float16", help="of the file (float16)")
    args = parser.parse_args(argv)
    args.k_bits, args.v_bits = args.k_bits or args.bits, args.v_bits or args.bits
    args.checkpoint = Path(f"{args.out}.checkpoint")
    return args


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
