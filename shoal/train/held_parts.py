"""What one worker holds of a run between two steps, as parts of the whole tensors that a checkpoint names.

Put together over all workers, the parts are a checkpoint's tensors. Unlike one, they are had without a word between
workers: that is what lets each step be mirrored (`shoal.elastic.mirror`)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import is_not
from typing import Any

import torch
from torch import Tensor, nn

from shoal.parallel.held import Held
from shoal.train.sharded_states import Sharded
from shoal.train.state import optimizer_groups, optimizer_values
from shoal.train.state_gathering import is_vector
from shoal.train.synchrony import Served, Update


@dataclass(frozen=True)
class HeldPart:
    name: str  # as a checkpoint has it
    shape: tuple[int, ...]  # of the whole
    start: int  # its first element in the whole, flat
    tensor: Tensor  # of the whole's dtype, its elements one after the other


# of what a state belongs to: name and shape of the parameter, the first element, the part; and the state
_Stated = tuple[str, tuple[int, ...], int, Tensor, Mapping[str, Any]]


class HeldParts:
    """Of one worker in one epoch. ``aliases``: other names of tensors that are held once."""

    def __init__(self, held: Held, update: Update, optimizer: torch.optim.Optimizer) -> None:
        self._held, self._optimizer = held, optimizer
        self._sharded = update if isinstance(update, Sharded) else None
        elsewhere = update.gradients.parameters if isinstance(update, Sharded | Served) else []
        self._elsewhere = set(map(id, elsewhere))  # not whole here: this worker's pieces, or what servers hold
        self.aliases: dict[str, str] = {}
        self._weights: list[HeldPart] = []
        self._named: list[tuple[str, tuple[int, ...], nn.Parameter]] = []
        self._values: list[Tensor] = []  # that were found in states, and
        self._found: list[HeldPart] = []  # the parts that they are of
        if held.coordinates.get("data", 0) == 0:  # other replicas hold the same
            self._name_whole()
        if self._sharded is not None:
            names, parameters = self._sharded.gradients.names, self._sharded.gradients.parameters
            for piece, part in zip(self._sharded.pieces, self._sharded.parts, strict=True):
                shape = tuple(parameters[piece.slot].shape)
                self._weights.append(HeldPart(f"model/{names[piece.slot]}", shape, piece.start, part))

    def _name_whole(self) -> None:
        first: dict[int, str] = {}
        for name, tensor in self._held.module.state_dict(keep_vars=True).items():
            if not isinstance(tensor, Tensor):
                continue
            if id(tensor) in first:
                self.aliases[f"model/{name}"] = f"model/{first[id(tensor)]}"
                continue
            first[id(tensor)] = name
            if id(tensor) not in self._elsewhere:
                self._weights.append(HeldPart(f"model/{name}", tuple(tensor.shape), 0, tensor.detach()))
        if not self._elsewhere:
            self._named = [(name, tuple(p.shape), p) for name, p in self._held.module.named_parameters()]

    def tensors(self) -> list[HeldPart]:
        """After a step: valid until the next update. The list of the last time as long as it is of the same tensors."""
        stated = self._stated()
        values = [value for *_, state in stated for value in state.values() if isinstance(value, Tensor)]
        if not self._found or len(values) != len(self._values) or any(map(is_not, values, self._values)):
            self._values, self._found = values, list(self._weights)
            for name, shape, start, part, state in stated:
                self._found += state_parts(name, state, shape, start, part)
        return self._found

    def _stated(self) -> list[_Stated]:
        state = self._optimizer.state
        found: list[_Stated] = [(name, shape, 0, each, state.get(each, {})) for name, shape, each in self._named]
        return found if self._sharded is None else [*found, *self._pieces(self._sharded)]

    @staticmethod
    def _pieces(sharded: Sharded) -> Iterable[_Stated]:
        names, parameters = sharded.gradients.names, sharded.gradients.parameters
        for piece, part, state in zip(sharded.pieces, sharded.parts, sharded.own_states(), strict=True):
            yield names[piece.slot], tuple(parameters[piece.slot].shape), piece.start, part, state

    def facts(self, *, groups: bool) -> dict[str, Any]:
        """Beside the tensors, of the optimiser: as a checkpoint has it, with the values of this worker's parameters.

        ``groups``: with the settings of its groups, which all workers have alike."""
        found: dict[str, Any] = {"groups": optimizer_groups(self._optimizer) if groups else []}
        found["values"] = optimizer_values(self._held.module, self._optimizer)
        if self._sharded is not None:
            for name, _, _, _, state in self._pieces(self._sharded):
                plain = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
                if plain:
                    found["values"][name] = plain
        return found


def state_parts(
    name: str, state: Mapping[str, Any], shape: tuple[int, ...], start: int, part: Tensor
) -> Iterable[HeldPart]:
    """Of what an optimiser holds of ``part`` of a parameter of this shape, from element ``start`` on."""
    for key, value in state.items():
        if is_vector(value, part):
            yield HeldPart(f"optimizer/{name}/{key}", shape, start, value)
        elif isinstance(value, Tensor):  # one for all elements
            yield HeldPart(f"optimizer/{name}/{key}", tuple(value.shape), 0, value)
