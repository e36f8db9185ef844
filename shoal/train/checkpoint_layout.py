"""Which tensor goes where: shards of bounded size in the safetensors format, described before a byte is written.

The format (https://github.com/huggingface/safetensors): u64 little-endian length of a JSON header, the header, then
the tensors' bytes without gaps. Tensors stand in order of falling item size, so that each is aligned to its items.
"""

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.train.checkpoint_manifest import ITEM_BYTES, CheckpointError, StoredTensor

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Shard:
    name: str
    header: bytes  # the length and the padded JSON: all that stands before the first tensor
    order: tuple[str, ...]  # tensor names, as their bytes follow
    tensors: Mapping[str, StoredTensor]

    @property
    def bytes(self) -> int:
        return max((t.end for t in self.tensors.values()), default=len(self.header))


def lay_out(tensors: Mapping[str, Tensor], shard_bytes: int) -> tuple[Shard, ...]:
    """Shards of at most ``shard_bytes`` of tensor data, filled in name order; a larger tensor has a shard of its own.

    Raises CheckpointError for a dtype or a name that the format cannot hold."""
    groups: list[list[str]] = []
    room = -1
    for name in sorted(tensors):
        if tensors[name].dtype not in _NAMES:
            raise CheckpointError(
                f"checkpoint: {name!r} has dtype {tensors[name].dtype}, which safetensors cannot hold."
            )
        if tensors[name].layout != torch.strided or tensors[name].is_meta:
            raise CheckpointError(f"checkpoint: {name!r} has no plain bytes (sparse or meta): make it dense first.")
        if name == "__metadata__":
            raise CheckpointError("checkpoint: '__metadata__' is no tensor name in the safetensors format: rename it.")
        if not groups or tensors[name].nbytes > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(name)
        room -= tensors[name].nbytes
    return tuple(_shard(f"state-{number:05d}.safetensors", group, tensors) for number, group in enumerate(groups))


def _shard(file: str, names: Iterable[str], tensors: Mapping[str, Tensor]) -> Shard:
    order = tuple(sorted(names, key=lambda name: (-ITEM_BYTES[_NAMES[tensors[name].dtype]], name)))
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        dtype = _NAMES[tensors[name].dtype]
        fields[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    stored: dict[str, StoredTensor] = {}
    begin = len(header)
    for name in order:
        tensor = tensors[name]
        stored[name] = StoredTensor(file, _NAMES[tensor.dtype], tuple(tensor.shape), begin, begin + tensor.nbytes)
        begin += tensor.nbytes
    return Shard(file, header, order, stored)
