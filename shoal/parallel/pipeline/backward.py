"""A chunk's backward pass in one go, or in two: the gradients of its inputs first, those of its weights later.

Split in two, no work is done twice and every bit stays. A matrix multiplication or a convolution computes the
gradients of input and weight independently of each other, each only when autograd asks for it. So the first half asks
for the inputs and writes down what arrived at each such operation, and the second half starts from there (Qi et al.,
2024; in the manner of torch.distributed.pipelining). What another kind of operation gives for its weights (norms,
embeddings, recurrent layers) is made together with the rest: the first half asks for it too. The same goes for a weight
that is used more than once, whose uses autograd adds in an order of its own.

Where a chunk's activations are computed again, that happens in the half that asks for them first. What the second half
asks for once more (`asked_again`) is kept until then, and nothing else is.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

DEFERRED = frozenset(
    {"AddmmBackward0", "MmBackward0", "BmmBackward0", "BaddbmmBackward0", "LinearBackward0", "ConvolutionBackward0"}
)
_SHAPES_ONLY = frozenset(
    {"TBackward0", "ToCopyBackward0", "ViewBackward0", "TransposeBackward0", "AccumulateGrad", "_WidenedBackward"}
)  # the last is shoal.memory.narrow's: a bfloat16 parameter as float32

Roots = Sequence[GradientEdge | Tensor]
Extra = Mapping[Parameter, Tensor]  # what other chunks' uses of a tied parameter gave: it is added first


def whole(roots: Roots, gradients: Sequence[Tensor | None], extra: Extra) -> None:
    """Both halves in one go."""
    kept, given = _present(roots, gradients)
    kept, given = [*kept, *extra], [*given, *extra.values()]
    if kept:
        torch.autograd.backward(kept, given)


class SplitBackward:
    """One micro-batch's backward pass through a chunk, in two halves."""

    def __init__(self, anchor: Tensor | None, parameters: Sequence[Parameter], now: Sequence[Parameter]) -> None:
        """``anchor`` is that of the chunk's `Entered`, None when no input wants a gradient: then the first half has
        nothing to do but ``now``, the parameters whose gradients are wanted at once."""
        self._anchor, self._parameters, self._now = anchor, parameters, now
        self._made: list[tuple[Parameter, Tensor]] = []  # by the first half
        self._later: list[tuple[Node, list[Parameter], list[Tensor | None]]] = []
        self._rest: tuple[Roots, list[Tensor | None], Extra] | None = None

    def inputs(self, roots: Roots, gradients: Sequence[Tensor | None], extra: Extra) -> dict[Parameter, Tensor | None]:
        """The first half; the gradients of ``now``."""
        kept, given = _present(roots, gradients)
        if self._anchor is None and not self._now:
            self._rest = kept, given, extra
            return {}
        deferred = _deferrable(kept, self._anchor, self._parameters, {*self._now, *extra})
        later = {id(p) for group in deferred.values() for p in group}
        ask = [p for p in self._parameters if id(p) not in later]
        wanted = [*([] if self._anchor is None else [self._anchor]), *ask]
        if not kept:
            return dict.fromkeys(self._now)
        hooks: list[RemovableHandle] = []
        for node, parameters in deferred.items():
            arrived: list[Tensor | None] = []
            hooks.append(node.register_prehook(_writer(arrived)))
            self._later.append((node, parameters, arrived))
        try:
            _LATER.update(deferred)
            ends, given = [*kept, *extra], [*given, *extra.values()]
            found = torch.autograd.grad(ends, wanted, given, retain_graph=bool(deferred), allow_unused=True)
        finally:
            _LATER.clear()
            for hook in hooks:
                hook.remove()
        now = set(map(id, self._now))
        made = dict(zip(ask, found[len(wanted) - len(ask) :], strict=True))
        self._made = [(p, g) for p, g in made.items() if g is not None and id(p) not in now]
        return {p: made[p] for p in self._now}

    def weights(self) -> None:
        """The second half: accumulates into the parameters."""
        if self._rest is not None:
            whole(*self._rest)
        if self._made:
            parameters, gradients = zip(*self._made, strict=True)
            self._made = []
            torch.autograd.backward(parameters, gradients)
        while self._later:
            node, wanted, arrived = self._later.pop()
            pairs = [(GradientEdge(node, number), g) for number, g in enumerate(arrived) if g is not None]
            if pairs:
                into, gradients = zip(*pairs, strict=True)
                torch.autograd.backward(into, gradients, inputs=wanted)


_LATER: set[Node] = set()  # the operations that the first half under way leaves to the second


def asked_again() -> bool:
    """Whether the backward pass under way asks for a saved tensor that its second half will ask for too."""
    return bool(_LATER) and torch._C._current_autograd_node() in _LATER


def _writer(into: list[Tensor | None]) -> Callable[[tuple[Tensor | None, ...]], None]:
    def write(gradients: tuple[Tensor | None, ...]) -> None:
        into[:] = gradients

    return write


def _present(roots: Roots, gradients: Sequence[Tensor | None]) -> tuple[list[Any], list[Tensor | None]]:
    pairs = [(r, g) for r, g in zip(roots, gradients, strict=True) if g is not None or isinstance(r, Tensor)]
    return [root for root, _ in pairs], [gradient for _, gradient in pairs]


def _deferrable(
    roots: Roots, anchor: Tensor | None, parameters: Sequence[Parameter], not_these: set[Parameter]
) -> dict[Node, list[Parameter]]:
    """Operations that can make the gradients of some parameters later, each with these parameters.

    A parameter is one of them when a single operation uses it, directly or through a change of form alone, and the
    first half passes through that operation on its way to the inputs."""
    wanted = {id(p): p for p in parameters if p not in not_these}
    uses: dict[int, list[Node]] = defaultdict(list)  # parameter -> the operations that use it
    above: dict[Node, list[Node]] = defaultdict(list)
    to_inputs: set[Node] = set()
    seen: set[Node] = set()
    todo = [root.node if isinstance(root, GradientEdge) else root.grad_fn for root in roots]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for below, _ in node.next_functions:
            if below is None:
                continue
            leaf = _leaf_below(below)
            if leaf is None:
                above[below].append(node)
                todo.append(below)
            elif leaf is anchor:
                to_inputs.add(node)
            else:
                uses[id(leaf)].append(node)
    climb = list(to_inputs)
    while climb:
        for node in above[climb.pop()]:
            if node not in to_inputs:
                to_inputs.add(node)
                climb.append(node)
    found: dict[Node, list[Parameter]] = defaultdict(list)
    for key, nodes in uses.items():
        if key in wanted and len(nodes) == 1 and nodes[0] in to_inputs and nodes[0].name() in DEFERRED:
            found[nodes[0]].append(wanted[key])
    return found


def _leaf_below(node: Node) -> Any:
    """The leaf that an edge leads to when nothing but changes of form lies on the way."""
    while node.name().removeprefix("torch::autograd::") in _SHAPES_ONLY:
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            return leaf
        (below, *others) = node.next_functions
        if others or below[0] is None:
            return None
        node = below[0]
    return None
