"""The device, and several processes, one for each GPU, started by torchrun.

Each process has the whole model and draws the whole batch, but computes on its share of it. Losses
are divided by counts of the whole batch, never of a share, so the gradient is the sum of the
processes' gradients. It is small, because only trained parameters have one.
"""

import contextlib
import datetime
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def default_device() -> str:
    """cuda (the GPU of this process, if there are several), else mps (never tried), else cpu."""
    if torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def processor(device: str | torch.device) -> str:
    """The name of the GPU, or else of the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    linux = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", linux.read_text()) if linux.exists() else []
    return (names or [platform.processor() or platform.machine()])[0]


def has_bfloat16(device: str | torch.device) -> bool:
    """Whether the hardware multiplies bfloat16; if not, float32 is faster.

    NVIDIA's GPUs do since Ampere (for T4 and V100, standard error says that they don't); CPUs do
    with AVX512-BF16 or AMX. Apple's GPUs were never tried; the answer for them is False.
    """
    device = torch.device(device)
    if device.type == "cpu":
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # in torch 2.6 and later
        return any(getattr(torch.cpu, name, bool)() for name in names)
    if device.type != "cuda":
        return False
    able = torch.cuda.is_bf16_supported(including_emulation=False)
    if not able:
        print(f"{device} has no bfloat16: computing in float32", file=sys.stderr)
    return able


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Connect to the other processes of torchrun; stop if one does not answer for a minute."""
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
    except RuntimeError as error:  # raised by the backends
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
    """Do work on process 0 alone; the other processes wait for it."""
    if RANK == 0:
        work()
    if WORLD_SIZE > 1:
        torch.distributed.barrier()


def of_main(value: float) -> float:
    """The value of process 0. Others may round it otherwise, but all must decide the same."""
    if WORLD_SIZE == 1:
        return value
    shared = [value]
    torch.distributed.broadcast_object_list(shared)
    return shared[0]


def log(text: str) -> None:
    """Print on process 0."""
    if RANK == 0:
        print(text, flush=True)
