"""States of pieces, told of and put together for a checkpoint; where workers share memory, nothing moves."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shoal.comm.group import Group, HostGroup
from shoal.comm.layout import Layout
from shoal.comm.slices import Piece
from shoal.memory.quantised import BLOCK, blocks_of
from shoal.memory.streamed import SCALES

State = dict[str, Any]  # what an optimiser holds of one parameter, or of a piece of it
Told = list[Any]  # of one entry: [kind, dtype] of VECTORS, ["tensor", value, dtype] or ["plain", value]
VECTORS = ("vector", "blocks")  # with a value for each element; for each block of elements: scales of 8-bit states


def is_vector(value: Any, part: Tensor) -> bool:
    """Whether an entry of a piece's state has a value for each element, and not one for all."""
    return isinstance(value, Tensor) and value.shape == part.shape and value.dim() > 0


def kind_of(key: str, value: Tensor, part: Tensor) -> str:
    """One of VECTORS, or "tensor": the same for all elements."""
    return "vector" if is_vector(value, part) else "blocks" if key.endswith(SCALES) else "tensor"


def span(kind: str, start: int, stop: int) -> slice:
    """Where the values of these elements lie. Where there is one for each block, they begin with one."""
    return slice(start, stop) if kind == "vector" else slice(start // BLOCK, blocks_of(stop))


def cut(key: str, value: Any, parameter: Tensor, piece: Piece, part: Tensor) -> Any:
    """A copy of what belongs to a piece in one entry of a parameter's state."""
    if not isinstance(value, Tensor):
        return value
    kind = kind_of(key, value, parameter)
    if kind == "tensor" or part.shape == parameter.shape:
        return value.clone()
    return value.reshape(-1)[span(kind, piece.start, piece.stop)].clone()


def _told(key: str, value: Any, part: Tensor) -> Told:
    if not isinstance(value, Tensor):
        return ["plain", value]
    dtype, kind = str(value.dtype).removeprefix("torch."), kind_of(key, value, part)
    return [kind, dtype] if kind in VECTORS else ["tensor", value.tolist(), dtype]


def dtype_of(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


class HostStates:
    """Workers of one host: vectors lie on the heap from the first checkpoint on, where rank 0 reads them."""

    def __init__(self, group: HostGroup, layout: Layout, parameters: Sequence[nn.Parameter]) -> None:
        self._group, self._layout, self._parameters = group, layout, parameters
        self._flats: dict[tuple[str, str], Tensor] = {}

    @property
    def on_heap(self) -> bool:
        return bool(self._flats)

    def gather(self, pieces: Sequence[Piece], parts: Sequence[Tensor], states: Sequence[State]) -> dict[int, State]:
        """The states of whole parameters, by slot, on rank 0; {} on the others. Called by all workers.

        ``states`` of the pieces are changed: their vectors move into memory that rank 0 can read."""
        found = tell(self._group, pieces, parts, states)
        elements = self._layout.state_start
        entries = ((key, *told) for state in found.values() for key, told in state.items() if told[0] in VECTORS)
        for key, kind, dtype in sorted(set(entries)):
            if (key, dtype) not in self._flats:
                size = span(kind, 0, elements).stop
                self._flats[key, dtype] = self._group.heap.tensor(size, dtype_of(dtype))
        for piece, part, state in zip(pieces, parts, states, strict=True):
            for key, value in state.items():
                if not isinstance(value, Tensor) or kind_of(key, value, part) not in VECTORS:
                    continue
                flat = self._flats[key, str(value.dtype).removeprefix("torch.")]
                here = span(kind_of(key, value, part), piece.place, piece.place + piece.length)
                place = flat[here].view(value.shape)
                if place.data_ptr() != value.data_ptr():
                    state[key] = place.copy_(value)
        self._group.gather(b"")  # all of it is there
        return {} if self._group.rank else assembled(found, self._whole)

    def _whole(self, slot: int, key: str, kind: str, dtype: str) -> Tensor:
        place = self._layout.slots[slot]
        found = self._flats[key, dtype][span(kind, place.offset, place.offset + place.size)]
        return found.view(self._parameters[slot].shape) if kind == "vector" else found


def tell(
    group: Group, pieces: Sequence[Piece], parts: Sequence[Tensor], states: Sequence[State]
) -> dict[int, dict[str, Told]]:
    """What there is of each slot, over all workers: values that are one for all are the same in all of its pieces."""
    mine = [
        [piece.slot, {key: _told(key, value, part) for key, value in state.items()}]
        for piece, part, state in zip(pieces, parts, states, strict=True)
        if state
    ]
    rows = [json.loads(row) for row in group.gather(json.dumps(mine).encode())]
    return {slot: told for row in reversed(rows) for slot, told in reversed(row)}


def assembled(found: Mapping[int, Mapping[str, Told]], whole: Any) -> dict[int, State]:
    states: dict[int, State] = {}
    for slot, told in found.items():
        states[slot] = {}
        for key, (kind, value, *dtype) in told.items():
            if kind in VECTORS:
                states[slot][key] = whole(slot, key, kind, value)
            else:
                states[slot][key] = torch.tensor(value, dtype=dtype_of(dtype[0])) if kind == "tensor" else value
    return states
