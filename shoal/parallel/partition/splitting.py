"""From a line of nodes and the places of the cuts to chunks that run."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Self

import torch
from torch import fx, nn

from shoal.errors import UserError
from shoal.parallel.partition.chunks import OUTPUT, Chunk, Chunks
from shoal.parallel.partition.line import Line
from shoal.parallel.partition.recorded import leaves


class Part(nn.Module):
    """The nodes of one chunk as a module: see ``Chunk.module``."""

    def __init__(self, run: Callable[["Part", Mapping[str, Any]], dict[str, Any]], mode: bool | None) -> None:
        super().__init__()
        self._run = run
        self._mode = mode  # the only value of ``training`` that it can compute with; None: both

    def train(self, mode: bool = True) -> Self:
        """As of any module. Raises UserError for a mode that the chunk was not made for."""
        if self._mode is not None and mode != self._mode:
            words = ("evaluation", "training") if self._mode else ("training", "evaluation")
            raise UserError(
                f"this model cannot change to {words[0]}: it was cut through torch.export, for {words[1]} only. "
                f"Make its forward one that can be followed: move branches and state into submodules."
            )
        return super().train(mode)

    def forward(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return self._run(self, values)


def split(line: Line, places: Sequence[int]) -> Chunks:
    """One chunk more than there are places, which are increasing and lie strictly inside the line."""
    bounds = (0, *places, len(line.nodes))
    chunks = tuple(_chunk(line, first, last) for first, last in pairwise(bounds))
    users = {
        name: tuple(number for number, chunk in enumerate(chunks) if name in chunk.parameters)
        for name, _ in line.model.named_parameters()
    }
    return Chunks(chunks, {name: used for name, used in users.items() if len(used) > 1})


def _chunk(line: Line, first: int, last: int) -> Chunk:
    ends = last == len(line.nodes)
    received = line.crossing(first)
    handed_on = [] if ends else line.crossing(last)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    values = graph.placeholder("values")
    read: list[str] = []

    def copy(node: fx.Node) -> fx.Node:
        """The node in this chunk's graph; what is not in the line is added where it is first needed."""
        if node not in copies:
            if node.op == "placeholder":
                read.append(str(node.target))
                copies[node] = graph.call_function(_item, (values, str(node.target)))
            elif node.meta.get("kind") is torch.device and node in line.place:
                copies[node] = graph.call_function(_device, (values, tuple(given.name for given in received)))
            else:
                copies[node] = graph.node_copy(node, copy)
        return copies[node]

    changed = {memory for node in line.nodes[first:last] for memory in node.meta.get("changed", ())}
    for node in received:
        copies[node] = graph.call_function(_item, (values, node.name))
        if changed & node.meta.get("memories", set()):  # what arrived is a leaf of autograd: it cannot be written to
            copies[node] = graph.call_function(torch.clone, (copies[node],))
    for node in line.nodes[first:last]:
        copies[node] = graph.node_copy(node, copy)
    if ends:
        (result,) = line.result.args
        graph.output({OUTPUT: fx.map_arg(result, copy)})
    else:
        graph.output({node.name: copies[node] for node in handed_on})
    module = Part(_compiled(graph), line.recording.mode)
    names = _install(module, line, graph)
    return Chunk(
        module,
        tuple(node.name for node in received),
        (OUTPUT,) if ends else tuple(node.name for node in handed_on),
        tuple(dict.fromkeys(read)),
        names,
    )


def _item(values: Mapping[str, Any], name: str) -> Any:
    return values[name]


def _device(values: Mapping[str, Any], names: tuple[str, ...]) -> torch.device:
    """Where the chunk computes: where what it was given lies."""
    tensors = (a for name in names for a in leaves(values[name]) if isinstance(a, torch.Tensor))
    return next(tensors).device


def _compiled(graph: fx.Graph) -> Callable[..., dict[str, Any]]:
    code = graph.python_code("self")
    space = dict(code.globals)
    exec(compile(code.src, "<a chunk of a cut model>", "exec"), space)
    run: Callable[..., dict[str, Any]] = space["forward"]
    return run


def _install(part: Part, line: Line, graph: fx.Graph) -> tuple[str, ...]:
    """Put into the part what its nodes use of the model's state; returns the names of its parameters."""
    model, constants = line.model, line.recording.constants
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    used = {id(parameter) for name in called for parameter in model.get_submodule(name).parameters()}
    parameters = dict(model.named_parameters())
    names = tuple(name for name, parameter in parameters.items() if name in read or id(parameter) in used)
    order = {name: place for place, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    part.training = model.training
    numbers = {name: number for number, name in enumerate(parameters)}
    wanted = [(order[name], -1, name) for name in called]
    for name in (read | set(names)) - set(constants):
        wanted.append((order[name.rpartition(".")[0]], numbers.get(name, len(numbers)), name))
    for _, number, name in sorted(wanted):  # as in the model, so that named_parameters() keeps its order
        holder, last = _holder(part, model, name)
        if number < 0:
            holder.add_module(last, model.get_submodule(name))
        elif not hasattr(holder, last):
            _install_state(holder, last, model.get_submodule(name.rpartition(".")[0]))
    for name in sorted(read & set(constants)):
        setattr(part, name, constants[name])
    return names


def _holder(part: Part, model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds what has this full name, made where it is missing, and the last part of the name."""
    holder: nn.Module = part
    *path, last = name.split(".")
    for depth, piece in enumerate(path, start=1):
        if piece not in holder._modules:
            stand_in = nn.Module()
            stand_in.training = model.get_submodule(".".join(path[:depth])).training
            holder.add_module(piece, stand_in)
        holder = holder.get_submodule(piece)
    return holder, last


def _install_state(holder: nn.Module, name: str, original: nn.Module) -> None:
    if name in original._buffers:
        holder.register_buffer(name, original._buffers[name], name not in original._non_persistent_buffers_set)
    else:
        holder.register_parameter(name, original._parameters[name])
