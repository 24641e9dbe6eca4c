"""Which device a process trains on."""

from __future__ import annotations

import os

import torch

from gapkernels.errors import UserError


def choose_device(name: str, processes: int = 1) -> torch.device:
    """Return the device called `name`; `auto` is CUDA, then MPS, then the CPU.

    Args:
        name: `auto`, or anything `torch.device` takes.
        processes: how many train together. Each takes the GPU of its number on this machine (LOCAL_RANK).

    Raises:
        UserError: if there is no such device here, or several processes cannot share it.
    """
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() and processes == 1 else "cpu"
    try:
        device = torch.device(name)
        if processes > 1:
            device = _own_device(device)
        torch.ones(2, device=device).sum().item()  # `meta` makes tensors that hold nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"device {name!r} cannot be used: {reason}") from error
    return device


def _own_device(device: torch.device) -> torch.device:
    if device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None:
        raise UserError(f"several processes train on 'cpu' or 'cuda', each on a GPU of its own; got {str(device)!r}")
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if number >= torch.cuda.device_count():
        raise UserError(
            f"process {number} of this machine has no GPU of its own, there are {torch.cuda.device_count()}; start as "
            "many processes as there are GPUs (torchrun --nproc-per-node)"
        )
    return torch.device("cuda", number)
