"""One read-only copy of a model's weights for all processes that serve it: anonymous memory, mapped and sealed."""

import fcntl
import mmap
import os
import tempfile
import warnings

import torch
from torch import Tensor, nn

from shoal.train.weights import byte_pieces

ALIGN = 64  # bytes: matmul libraries may sum in another order when an operand is aligned otherwise


def share_weights(model: nn.Module) -> int:
    """Move every parameter and buffer into memory that forked processes share, and that nobody can write any more.

    Returns its bytes. Ties stay ties. No path leads to the memory: it is gone with the last process that maps it. A
    model that writes to its weights or buffers while it serves is killed by the kernel, it alone."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if t.numel()}
    places: dict[int, int] = {}
    end = 0
    for key, tensor in tensors.items():
        places[key] = end
        end += -(-tensor.nbytes // ALIGN) * ALIGN
    if not end:
        return 0
    file = _anonymous_file()
    try:
        os.ftruncate(file, end)
        for key, tensor in tensors.items():
            at = places[key]
            for piece in byte_pieces(tensor):
                at += _write(file, piece, at)
        _seal(file)
        shared = mmap.mmap(file, end, mmap.MAP_SHARED, mmap.PROT_READ)
    finally:
        os.close(file)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # that is what it is for
        whole = torch.frombuffer(shared, dtype=torch.uint8)
    for key, tensor in tensors.items():
        tensor.data = _view(whole, places[key], tensor)
    return end


def _view(whole: Tensor, start: int, like: Tensor) -> Tensor:
    return whole[start : start + like.nbytes].view(like.dtype).view(like.shape)


def _write(file: int, piece: memoryview, at: int) -> int:
    done = 0
    while done < len(piece):
        done += os.pwrite(file, piece[done : done + (1 << 30)], at + done)
    return done


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("shoal-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with tempfile.TemporaryFile() as file:  # has no name either
        return os.dup(file.fileno())


def _seal(file: int) -> None:
    if hasattr(fcntl, "F_ADD_SEALS"):
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
