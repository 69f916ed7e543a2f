"""Several processes, one for each GPU, as torchrun starts them.

Each has the whole model and draws the whole batch, but computes on its share of it. Losses are
divided by counts of the whole batch, never of a share, so the sum of the processes' gradients is
the gradient; only what is trained has any, so it is small.
"""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Meet the other processes of torchrun; one that is silent for a minute ends the run."""
    if WORLD_SIZE == 1:
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    patience = datetime.timedelta(seconds=60)
    torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=patience)
    try:
        yield
    except RuntimeError as error:  # what the backends raise
        raise ValueError(f"process {RANK} of {WORLD_SIZE} stopped: {error}") from None
    finally:
        torch.distributed.destroy_process_group()


def sum_over_processes(parameters: Sequence[nn.Parameter], loss: float) -> float:
    """Sum the gradients over all processes; returns the sum of the losses."""
    if WORLD_SIZE == 1:
        return loss
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    total = torch.tensor([loss], device=parameters[0].device)
    joined = torch.cat([*(grad.flatten() for grad in grads), total])
    torch.distributed.all_reduce(joined)
    sizes = [p.numel() for p in parameters]
    for p, grad in zip(parameters, joined[:-1].split(sizes), strict=True):
        p.grad = grad.view_as(p)
    return joined[-1].item()


def on_main(work: Callable[[], object]) -> None:
    """Do on process 0 what is done once; the others wait for it."""
    if RANK == 0:
        work()
    if WORLD_SIZE > 1:
        torch.distributed.barrier()


def log(text: str) -> None:
    """Print on process 0."""
    if RANK == 0:
        print(text, flush=True)
