"""One hash that names a set of weights, and the bytes of a tensor as a stream without a full copy."""

import hashlib
import struct
import sys
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from shoal.errors import ShoalError

PIECE_BYTES = 4 << 20


def byte_pieces(tensor: Tensor, piece_bytes: int = PIECE_BYTES) -> Iterator[memoryview]:
    """The tensor's bytes in C order, little-endian. A contiguous CPU tensor is one view of its own memory; any other
    is copied piece by piece (at most about ``piece_bytes`` at a time; one element at least).

    Raises ShoalError for a tensor without plain bytes (sparse, meta) and on a big-endian machine."""
    if tensor.layout != torch.strided or tensor.is_meta:
        raise ShoalError(f"a {tensor.layout} tensor on device {tensor.device} has no plain bytes: make it dense first.")
    if sys.byteorder != "little":
        raise ShoalError("weights are written little-endian, and this machine is big-endian: use another machine.")
    yield from _pieces(tensor.detach().resolve_conj().resolve_neg(), piece_bytes)


def flat_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor as uint8 [n], sharing its memory."""
    flat = tensor.as_strided((tensor.numel(),), (1,))  # of size 1, a contiguous tensor may have any stride
    return flat.view(torch.uint8)


def _pieces(tensor: Tensor, piece_bytes: int) -> Iterator[memoryview]:
    if tensor.numel() == 0:
        return
    if tensor.is_contiguous() and tensor.device.type == "cpu":
        yield flat_bytes(tensor).numpy().data
    elif tensor.nbytes <= piece_bytes or tensor.dim() == 0:
        yield from _pieces(tensor.cpu().contiguous(), piece_bytes)
    else:
        rows = piece_bytes * tensor.shape[0] // tensor.nbytes
        for part in torch.split(tensor, rows) if rows else tensor.unbind(0):
            yield from _pieces(part, piece_bytes)


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over name, dtype, shape and bytes of every tensor, in order of the names' UTF-8 bytes.

    What is hashed, for each tensor in turn; u64 is an unsigned 64-bit little-endian number:

    - u64 length of the name in UTF-8, then the name
    - u64 length of the dtype, then the dtype as torch prints it without "torch." ("float32", "bfloat16", "int64")
    - u64 number of dimensions, then each dimension as u64
    - u64 number of data bytes, then the data: the elements in C order, little-endian (bool: one byte, 0 or 1)

    A tied parameter is hashed under each of its names. The caller leaves out non-persistent buffers, as
    ``Module.state_dict()`` does. Nothing is copied for contiguous CPU tensors. Raises what ``byte_pieces`` raises."""
    digest = hashlib.sha256()
    for name in sorted(tensors):  # the order of code points is the order of UTF-8 bytes
        tensor = tensors[name]
        for text in (name.encode(), str(tensor.dtype).removeprefix("torch.").encode()):
            digest.update(struct.pack("<Q", len(text)) + text)
        digest.update(
            struct.pack(f"<{2 + tensor.dim()}Q", tensor.dim(), *tensor.shape, tensor.numel() * tensor.element_size())
        )
        for piece in byte_pieces(tensor):
            digest.update(piece)
    return digest.hexdigest()
