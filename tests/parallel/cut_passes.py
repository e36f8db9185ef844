"""A forward and a backward pass of a model, whole and in chunks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from shoal.parallel.partition.arguments import bind
from shoal.parallel.partition.chunks import OUTPUT, Chunks

Loss = Callable[[Any], Tensor]


@dataclass
class Pass:
    """All that a pass leaves behind."""

    loss: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    random: Tensor  # state of the default generator afterwards

    def differs(self, other: "Pass") -> list[str]:
        """What is not equal to the bit."""
        wrong = [] if torch.equal(self.loss, other.loss) else ["loss"]
        for mine, theirs in ((self.gradients, other.gradients), (self.buffers, other.buffers)):
            wrong += sorted(mine.keys() ^ theirs.keys())
            wrong += [name for name in mine.keys() & theirs.keys() if not torch.equal(mine[name], theirs[name])]
        return wrong if torch.equal(self.random, other.random) else [*wrong, "random stream"]


def any_loss(output: Any) -> Tensor:
    """A number that depends on all that a model gives, on each part in another way."""
    parts = [leaf if isinstance(leaf, Tensor) else torch.tensor(float(leaf)) for leaf in _numbers(output)]
    return torch.stack(
        [(part.float() * torch.linspace(1, 2, part.numel()).view(part.shape)).sum() for part in parts]
    ).sum()


def _numbers(output: Any) -> list[Any]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor | int | float)]


def whole(model: nn.Module, arguments: Mapping[str, Any], loss: Loss = any_loss) -> Pass:
    return _kept(model, lambda: _whole(model, arguments, loss))


def in_chunks(model: nn.Module, chunks: Chunks, arguments: Mapping[str, Any], loss: Loss = any_loss) -> Pass:
    return _kept(model, lambda: _in_chunks(model, chunks, arguments, loss))


def _whole(model: nn.Module, arguments: Mapping[str, Any], loss: Loss) -> Tensor:
    value = loss(model(**arguments))
    value.backward()
    return value


def _in_chunks(model: nn.Module, chunks: Chunks, arguments: Mapping[str, Any], loss: Loss) -> Tensor:
    """As a pipeline does it: what crosses a cut is copied, and its gradient sent back. The gradient that later chunks
    have of a tied parameter goes into the backward pass of an earlier one, which adds its own uses to it."""
    batch = bind(model, arguments).arguments
    values: dict[str, Any] = {}
    passes = []
    for chunk in chunks.chunks:
        given = {name: tree_map(_arrive, values[name]) for name in chunk.inputs}
        values = chunk.module({**given, **{name: batch[name] for name in chunk.batch_inputs}})
        assert tuple(values) == chunk.outputs
        passes.append((given, values))
    value = loss(values[OUTPUT])
    value.backward()
    for chunk, (_, left), (arrived, _) in zip(chunks.chunks[-2::-1], passes[-2::-1], passes[:0:-1], strict=True):
        pairs = zip(tree_leaves(left), tree_leaves(arrived), strict=True)
        ends = [(a, b.grad) for a, b in pairs if isinstance(a, Tensor) and a.requires_grad and b.grad is not None]
        for parameter in (model.get_parameter(name) for name in chunk.parameters if name in chunks.tied):
            if parameter.grad is not None:
                ends.append((parameter, parameter.grad))
                parameter.grad = None
        if ends:
            torch.autograd.backward([a for a, _ in ends], [gradient for _, gradient in ends])
    return value


def _arrive(value: Any) -> Any:
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _kept(model: nn.Module, work: Callable[[], Tensor]) -> Pass:
    """Runs ``work`` from a fixed seed, and puts the buffers back."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.zero_grad()
    torch.manual_seed(5)
    value = work().detach()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    after = Pass(value, gradients, {name: b.clone() for name, b in model.named_buffers()}, torch.get_rng_state())
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
    return after
