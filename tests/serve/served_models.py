"""Modules that the servers of the tests are made of: ``shoal serve served_models:NAME``."""

import ctypes
import os
import signal
import time
from pathlib import Path

import torch
from torch import Tensor, nn

POISON, FAULT, SLOW, HANG = 666.0, 777.0, 555.0, 888.0


class Scripted(nn.Module):
    """[n, 2] -> [n, 2] times a weight of 3; first numbers that do harm: kill the process, raise, take a while."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([3.0]))

    def forward(self, x: Tensor) -> Tensor:
        marks = set(x[:, 0].tolist())
        if POISON in marks:
            ctypes.string_at(0)  # a segmentation fault
        if FAULT in marks:
            raise RuntimeError("a fault of the model")
        if SLOW in marks:
            time.sleep(0.3)
        if HANG in marks:
            time.sleep(3600)
        return x * self.weight


scripted = Scripted


class Same(nn.Module):
    """What comes in, times a weight of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def staged() -> nn.Module:
    """`Scripted` in the second of two stages."""
    return nn.Sequential(Same(), Scripted())


class Writes(nn.Module):
    """A model that changes its weights while it serves."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.weight.add_(1)
        return x


writes = Writes


def large() -> nn.Module:
    """64 MiB of weights, in layers that are small: matmul libraries keep one in another order while they work."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(16)))


def dies_in_a_replica() -> nn.Module:
    os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGKILL))
    return nn.Identity()


HERE = str(Path(__file__).parent)
