"""A worker's whole state to another one, from memory to memory: weights, optimiser, and where the run stands."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from shoal.comm.mesh import Mesh
from shoal.train.checkpoint import Checkpoint

_STATE = 9  # message kind; gathers and exchanges use those below
PIECE = 8 << 20  # bytes of one message


def send(mesh: Mesh, to: int, state: Checkpoint) -> None:
    """Raises PeerLost."""
    table = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in state.tensors.items()]
    sequence = _send_all(mesh, to, 0, [json.dumps({"facts": state.facts, "tensors": table}).encode()])
    _send_all(mesh, to, sequence, (_bytes(tensor) for tensor in state.tensors.values()))


def receive(mesh: Mesh, origin: int) -> Checkpoint:
    """Raises PeerLost; what has come by then is dropped."""
    header, sequence = _receive_one(mesh, origin, 0)
    told = json.loads(bytes(header))
    tensors: dict[str, Tensor] = {}
    for name, dtype, shape in told["tensors"]:
        raw, sequence = _receive_one(mesh, origin, sequence)
        kind = getattr(torch, dtype)
        tensors[name] = (torch.frombuffer(raw, dtype=kind) if raw else torch.empty(0, dtype=kind)).view(shape)
    facts: Mapping[str, Any] = told["facts"]
    return Checkpoint(tensors, facts)


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def _send_all(mesh: Mesh, to: int, sequence: int, parts: Iterable[bytes]) -> int:
    for part in parts:
        mesh.send(to, _STATE, sequence, len(part).to_bytes(8, "little"))
        sequence += 1
        for start in range(0, len(part), PIECE):
            mesh.send(to, _STATE, sequence, part[start : start + PIECE])
            sequence += 1
    return sequence


def _receive_one(mesh: Mesh, origin: int, sequence: int) -> tuple[bytearray, int]:
    size = int.from_bytes(mesh.receive(origin, _STATE, sequence), "little")
    data = bytearray()
    sequence += 1
    while len(data) < size:
        data += mesh.receive(origin, _STATE, sequence)
        sequence += 1
    return data, sequence
