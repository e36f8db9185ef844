"""One chunk on the worker that holds it: its passes, and what it keeps of a micro-batch between them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn import Parameter

from shoal.parallel.partition.chunks import OUTPUT, Chunk
from shoal.parallel.pipeline.backward import Extra, SplitBackward, whole
from shoal.parallel.pipeline.boundary import Entered, edges, enter


@dataclass
class _Flight:
    """A micro-batch between its forward pass and its last backward pass."""

    entered: Entered
    roots: Sequence[GradientEdge | Tensor]
    split: SplitBackward | None = None


class Stage:
    def __init__(self, chunk: Chunk, copies: Mapping[str, Parameter]) -> None:
        """``copies``: the tied parameters that another chunk owns."""
        self.chunk, self.copies = chunk, dict(copies)
        self._parameters = [p for p in chunk.module.parameters() if p.requires_grad]
        self._flights: dict[int, _Flight] = {}

    def forward(self, micro_batch: int, values: dict[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What the next chunk takes."""
        entered, made = self._run(values, arguments)
        self._flights[micro_batch] = _Flight(entered, edges(made))
        return made

    def output(self, micro_batch: int, values: dict[str, Any], arguments: Mapping[str, Any]) -> Any:
        """What the model returns, from the last chunk; `ends` then says what the loss is."""
        entered, made = self._run(values, arguments)
        self._flights[micro_batch] = _Flight(entered, ())
        return made[OUTPUT]

    def ends(self, micro_batch: int, loss: Tensor) -> None:
        self._flights[micro_batch].roots = (loss,) if loss.requires_grad else ()

    def only_forward(self, values: dict[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
        """As `forward`, without a way back."""
        return self._run(values, arguments)[1]

    def only_output(self, values: dict[str, Any], arguments: Mapping[str, Any]) -> Any:
        return self._run(values, arguments)[1][OUTPUT]

    def _run(self, values: dict[str, Any], arguments: Mapping[str, Any]) -> tuple[Entered, dict[str, Any]]:
        given, entered = enter(values)
        given |= {name: arguments[name] for name in self.chunk.batch_inputs}
        made: dict[str, Any] = self.chunk.module(given)
        return entered, made

    def backward(self, micro_batch: int, gradients: Sequence[Tensor | None] | None, extra: Extra) -> None:
        """Both halves; ``gradients`` of what `forward` gave, None in the last chunk."""
        flight = self._flights[micro_batch]
        whole(flight.roots, gradients if gradients is not None else [None] * len(flight.roots), extra)

    def backward_input(self, micro_batch: int, gradients: Sequence[Tensor | None] | None, extra: Extra) -> None:
        flight = self._flights[micro_batch]
        anchor = flight.entered.anchor if flight.entered.gradients else None
        flight.split = SplitBackward(anchor, self._parameters, list(self.copies.values()))
        given = gradients if gradients is not None else [None] * len(flight.roots)
        made = flight.split.inputs(flight.roots, given, extra)
        flight.roots = ()
        for parameter, gradient in made.items():
            parameter.grad = gradient

    def backward_weight(self, micro_batch: int) -> None:
        split = self._flights[micro_batch].split
        assert split is not None, "verified: W comes after I"
        split.weights()

    def taken_copies(self) -> dict[str, Tensor | None]:
        """The gradients of the copies from the pass that has just been done."""
        found = {name: parameter.grad for name, parameter in self.copies.items()}
        for parameter in self.copies.values():
            parameter.grad = None
        return found

    def input_gradients(self, micro_batch: int) -> list[Tensor | None]:
        """The gradients of what came in, once."""
        entered = self._flights[micro_batch].entered
        found, entered.gradients = entered.gradients, []
        return found

    def forget(self, micro_batch: int) -> None:
        del self._flights[micro_batch]
