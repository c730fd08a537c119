"""Several processes that torchrun started: who am I, and what is the sum over all of us."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from cskv import Observer, Statistics, calibrate
from model import Transformer
from support.command import UserError, use_device, user_values


def place() -> tuple[int, int]:
    """This process's number and how many there are: (0, 1) unless torchrun started it."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def processes(device: str) -> Iterator[str]:
    """Joins the other processes of torchrun, if there are any. Yields the device to compute on,
    which is there. A `UserError` or an interruption ends all of them; only the first says so."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        use_device(device)
        yield device
        return
    try:
        if device == "cuda":
            if torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
                count = torch.cuda.device_count()
                raise UserError(f"{count} GPUs; start no more processes, or use --device cpu")
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        use_device(device)
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


def patient_group() -> object:
    """For `gathered`: a group of all processes, of which one may finish days before another."""
    if place()[1] == 1:
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))


def gathered(part: object, group: object) -> list:
    """`part` of every process, in the order of their numbers, once all have got here."""
    parts = [part] * place()[1]
    if group is not None:
        dist.all_gather_object(parts, part, group)
    return parts


def say(message: str) -> None:
    if place()[0] == 0:
        print(message, file=sys.stderr)


def calibrate_together(
    model: Transformer, samples: list[Tensor], sinks=0, kind=Observer
) -> list[Statistics]:
    """`cskv.calibrate` with the samples shared out among the processes.

    Raises `UserError` where that raises `ValueError`, and for fewer samples than processes.
    """
    rank, count = place()
    if len(samples) < count:
        raise UserError(
            f"{len(samples)} samples for {count} processes; give longer text or start fewer"
        )
    mine = tqdm(samples[rank::count], "calibrating", unit="sample", disable=rank > 0)
    with user_values():
        return calibrate(model, mine, sinks, summed, kind)
