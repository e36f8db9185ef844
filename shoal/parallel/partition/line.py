"""A recorded forward pass as a line of nodes: what crosses it at each place, and where it may be cut."""

import operator
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from shoal.parallel.partition.recording import Recording

# of the batch alone these cost next to nothing, so every chunk that needs them works them out
_CHEAP_METHODS = {
    "size",
    "dim",
    "numel",
    "bool",
    "long",
    "int",
    "float",
    "to",
    "view",
    "reshape",
    "unsqueeze",
    "squeeze",
}
_CHEAP_METHODS |= {"flatten", "expand", "eq", "ne", "lt", "le", "gt", "ge"}
_CHEAP_FUNCTIONS: set[Callable[..., Any]] = {getattr, len, operator.getitem, operator.eq, operator.ne, operator.lt}
_CHEAP_FUNCTIONS |= {operator.le, operator.gt, operator.ge, operator.invert, operator.neg, operator.add, operator.sub}
_CHEAP_FUNCTIONS |= {operator.mul, operator.floordiv, torch.arange, torch.zeros, torch.ones, torch.full}


class Line:
    """Place p lies before node p: a cut there gives nodes ..p-1 to one chunk and p.. to the next.

    Not in the line are reads of the batch and of the model's state, and what is cheap to work out from the batch alone:
    every chunk does these by itself."""

    def __init__(self, recording: Recording) -> None:
        self.model = recording.model
        self.recording = recording
        graph = recording.graph
        self.result: fx.Node = next(iter(reversed(graph.nodes)))
        self.batch: set[fx.Node] = set()
        changed = {memory for node in graph.nodes for memory in node.meta.get("changed", ())}
        for node in graph.nodes:
            repeatable = _is_cheap(node) and not changed & node.meta.get("memories", set())
            if node.op == "placeholder" or (repeatable and all(a in self.batch for a in node.all_input_nodes)):
                self.batch.add(node)
        free = self.batch | {node for node in graph.nodes if node.op == "get_attr"} | {self.result}
        self.nodes: tuple[fx.Node, ...] = tuple(node for node in graph.nodes if node not in free)
        self.place = {node: place for place, node in enumerate(self.nodes)}
        self.place[self.result] = len(self.nodes)

    @cached_property
    def last_use(self) -> dict[fx.Node, int]:
        """Place of the last node that needs each node of the line; of unused ones their own."""
        return {node: max((self.place[user] for user in node.users), default=self.place[node]) for node in self.nodes}

    @cached_property
    def _crossing(self) -> list[list[fx.Node]]:
        crossing: list[list[fx.Node]] = [[] for _ in range(len(self.nodes) + 1)]
        for place, node in enumerate(self.nodes):
            if node.meta.get("kind") is torch.device:
                continue  # every worker has its own
            for later in range(place + 1, self.last_use[node] + 1):
                crossing[later].append(node)
        return crossing

    def crossing(self, place: int) -> list[fx.Node]:
        """The nodes before a place whose values are needed at or after it, in order."""
        return self._crossing[place]

    def crossing_bytes(self, place: int) -> int:
        """Bytes of the tensors that cross; without an example, the number of values."""
        return sum(node.meta.get("bytes", 1) for node in self.crossing(place))

    def state(self, node: fx.Node) -> list[str]:
        """Full names of the parameters that a node uses, in the model's order, tied ones by their first name."""
        used: set[int] = set()
        for one in (node, *node.all_input_nodes):
            if one.op == "call_module" and one is node:
                used.update(map(id, self.model.get_submodule(str(one.target)).parameters()))
            elif one.op == "get_attr" and one.target in self._parameters:
                used.add(id(self._parameters[str(one.target)]))
        return [name for name, parameter in self._parameters.items() if id(parameter) in used]

    @cached_property
    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    @cached_property
    def forbidden(self) -> dict[int, str]:
        """Places where no cut may be -> why."""
        why: dict[int, str] = {}
        changes: dict[int, int] = {}  # memory -> place of the last node that changes it
        for place, node in enumerate(self.nodes):
            for memory in node.meta.get("changed", ()):
                changes[memory] = place
        for place in range(1, len(self.nodes)):
            for node in self.crossing(place):
                if node.meta.get("part"):
                    why[place] = f"{node.name!r} is a part of another tensor, which a copy would lay out differently"
            for memory in {m for node in self.crossing(place) for m in node.meta.get("memories", ())}:
                names = [node for node in self.crossing(place) if memory in node.meta.get("memories", ())]
                if changes.get(memory, -1) >= place and (len(names) > 1 or not is_tensor(names[0])):
                    why[place] = f"{names[0].name!r} is changed in place after it, and has another name"
        for what, places in self._together(changes):
            for place in range(min(places) + 1, max(places) + 1):
                why.setdefault(place, f"{what} is changed before it and used after it")
        return why

    def _together(self, changes: Iterable[int]) -> list[tuple[str, list[int]]]:
        """What changes on the way and does not travel, with the places of all nodes that use it."""
        found: dict[str, list[int]] = {}
        changing = set(changes)
        for place, node in enumerate(self.nodes):
            if node.op == "call_module":
                for name, _ in self.model.get_submodule(str(node.target)).named_buffers():
                    found.setdefault(f"the buffer {node.target}.{name}", []).append(place)
            for given in node.all_input_nodes:
                if (given in self.batch or given.op == "get_attr") and changing & given.meta.get("memories", set()):
                    found.setdefault(f"{given.target!r}", []).append(place)
        return list(found.items())


def is_tensor(node: fx.Node) -> bool:
    return issubclass(node.meta.get("kind", Tensor), Tensor)


def _is_cheap(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _CHEAP_METHODS
    return node.op == "call_function" and node.target in _CHEAP_FUNCTIONS
