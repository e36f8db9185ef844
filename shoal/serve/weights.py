"""One read-only copy of a model's weights for all processes that serve it: anonymous memory, mapped and sealed."""

import fcntl
import mmap
import os
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from shoal.train.weights import byte_pieces

ALIGN = 64  # bytes: matmul libraries may sum in another order when an operand is aligned otherwise


class Sealed:
    """Copies of tensors in memory that nobody can write any more. Whoever is forked later can map them; no path leads
    to the memory: it is gone with the last process that has it. None stays None."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self._forms: list[tuple[int, torch.dtype, torch.Size] | None] = []
        self.bytes = 0
        for tensor in tensors:
            self._forms.append(None if tensor is None else (self.bytes, tensor.dtype, tensor.shape))
            self.bytes += 0 if tensor is None else -(-tensor.nbytes // ALIGN) * ALIGN
        self._file = _anonymous_file() if self.bytes else -1
        if not self.bytes:
            return
        os.ftruncate(self._file, self.bytes)
        for tensor, form in zip(tensors, self._forms, strict=True):
            if tensor is not None and form is not None and tensor.numel():
                at = form[0]
                for piece in byte_pieces(tensor):
                    at += _write(self._file, piece, at)
        _seal(self._file)

    def mapped(self) -> list[Tensor | None]:
        """The tensors, in this process: who writes to one is killed by the kernel, it alone."""
        whole = torch.empty(0, dtype=torch.uint8)
        if self.bytes:
            shared = mmap.mmap(self._file, self.bytes, mmap.MAP_SHARED, mmap.PROT_READ)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):  # a kernel without huge pages for shared memory
                    shared.madvise(mmap.MADV_HUGEPAGE)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The given buffer is not writable")  # that is what it is for
                whole = torch.frombuffer(shared, dtype=torch.uint8)
        return [None if form is None else _view(whole, *form) for form in self._forms]

    def close(self) -> None:
        """It cannot be mapped any more in this process; what is mapped stays."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def share_weights(model: nn.Module) -> int:
    """Move every parameter and buffer into memory that forked processes share, and that nobody can write any more.

    Returns its bytes. Ties stay ties. A model that writes to its weights or buffers while it serves is killed by the
    kernel, it alone."""
    tensors = list({id(t): t for t in (*model.parameters(), *model.buffers()) if t.numel()}.values())
    sealed = Sealed(tensors)
    for tensor, shared in zip(tensors, sealed.mapped(), strict=True):
        assert shared is not None
        tensor.data = shared
    sealed.close()
    return sealed.bytes


def _view(whole: Tensor, start: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return whole[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)


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
