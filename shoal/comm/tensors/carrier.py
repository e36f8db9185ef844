"""What carries tensors between the workers of a group: flat contiguous tensors in, flat contiguous tensors out.

Held to by three: C++ over shared memory, messages and shared memory in Python, and torch.distributed. All of them
compare what the workers ask for before a byte of an output is written, and add up in the order of the ranks."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from shoal.comm.mesh import OutOfStep

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
    torch.complex64,
    torch.complex128,
)  # in the order of DType in native/kernels/shm_types.hpp

Counts = Sequence[Sequence[int]]  # [from][to]: elements
Stood = list[tuple[int, float]]  # a worker stood still for this rank, so many seconds


class Carrier(Protocol):
    """All tensors are contiguous. ``signature`` says in words what is asked for; it must be equal on all workers."""

    link: str  # what the bytes go over, as counters call it
    stood: Stood  # what came to it since the caller emptied it, where that can be told

    def all_reduce(self, source: Tensor, out: Tensor, signature: str) -> None: ...

    def all_gather(self, source: Tensor, outs: Sequence[Tensor], signature: str) -> None:
        """``outs[r]`` takes rank r's source, which has its size."""

    def reduce_scatter(self, sources: Sequence[Tensor], out: Tensor, signature: str) -> None:
        """``sources[r]`` goes to rank r; all workers' have equal sizes."""

    def all_to_all(self, sources: Sequence[Tensor], outs: Sequence[Tensor], counts: Counts, signature: str) -> None:
        """``sources[r]`` goes to rank r, ``outs[r]`` comes from there."""

    def broadcast(self, data: Tensor, root: int, signature: str) -> None:
        """In place."""

    def send(self, data: Tensor, to: int) -> None: ...

    def receive(self, out: Tensor, origin: int) -> None:
        """Raises OutOfStep when what comes has another type or shape."""

    def barrier(self) -> None: ...


def told(tensor: Tensor) -> str:
    """ "float32 [2, 3]" """
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def bytes_of(tensor: Tensor) -> Tensor:
    """The same memory as bytes: [nbytes]. The tensor is contiguous."""
    return tensor.reshape(-1).view(torch.uint8)


def compare_message(sent: str, expected: Tensor, origin: int, rank: int) -> None:
    """Raises OutOfStep when rank ``origin`` sends something else than ``rank`` expects."""
    if sent != told(expected):
        raise OutOfStep(f"rank {origin} sends {sent}, rank {rank} expects {told(expected)}")


@torch.no_grad()
def add_up(parts: Sequence[Tensor], out: Tensor) -> None:
    """The sum in the order of ``parts``: ((0 + 1) + 2) + ...; 16-bit floats are added in float32 and rounded once."""
    half = out.dtype in (torch.float16, torch.bfloat16)
    total = parts[0].to(torch.float32, copy=True) if half else parts[0].clone()
    for part in parts[1:]:
        total += part
    out.copy_(total)
