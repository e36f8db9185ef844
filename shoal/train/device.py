"""Which device a worker computes on."""

import os
from contextlib import suppress

import torch

from shoal.errors import UserError


def device_for(name: str, rank: int) -> torch.device:
    """ "auto" takes a GPU where there is one; each worker of a host has its own, by LOCAL_RANK.

    Raises UserError for an unknown name, and for "cuda" where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if name != "cuda":
        raise UserError(f"plan: device {name!r} is not known: use auto, cpu or cuda.")
    if not torch.cuda.is_available():
        raise UserError("plan: device 'cuda' is asked for, but this torch finds no CUDA device.")
    local = rank
    with suppress(KeyError):
        local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
