"""A model's forward pass as a graph."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from shoal.errors import UserError
from shoal.parallel.partition.arguments import Example, bind
from shoal.parallel.partition.exported import exported
from shoal.parallel.partition.recorded import Untraceable
from shoal.parallel.partition.recorder import Recorder, place_of, reason
from shoal.parallel.partition.undisturbed import undisturbed


@dataclass(frozen=True)
class Recording:
    """``graph``: placeholders are the model's arguments, get_attr and call_module targets are full names.

    Meta of a node: ``module`` (name of the module whose forward made it) and, with an example, ``kind`` (type of its
    value), ``bytes`` of its tensors, ``memories`` (a number for each storage that they lie in), ``changed`` (those that
    it changed in place) and ``part`` (whether one of its tensors is a part of another)."""

    model: nn.Module  # whose graph it is: the model itself, or what ``torch.export`` made of it
    graph: fx.Graph
    constants: Mapping[str, Any]  # get_attr target -> an object that is no parameter, buffer or plain value
    whole: Mapping[str, str]  # class that was kept whole -> why
    mode: bool | None = None  # ``training``, where the graph holds for one value of it only


def record(model: nn.Module, example: Example) -> Recording:
    """The forward pass of ``model`` in its present mode. Leaves its state and torch's default generators as they were.

    ``example``: positional or named arguments; None: values stay unknown, and branches on them cannot be followed.
    Where the model's own forward cannot be followed and there is an example, ``torch.export`` gets a try, for the
    present mode only. Raises UserError when that fails too, and when the example does not fit the model."""
    bound = bind(model, example)
    with undisturbed(model), torch.no_grad():
        try:
            return _recorded(model, bound)
        except Untraceable as error:
            first = error
    kind = type(model).__name__
    try:
        if example is None:
            raise Untraceable("an example batch would tell sizes and types")
        with undisturbed(model), torch.no_grad():
            model(*bound.args, **bound.kwargs)
    except Untraceable as second:
        raise _refusal(kind, first, second) from first
    except Exception as error:
        raise UserError(f"a {kind} does not run on the example ({place_of(error)}): {reason(error)}.") from error
    try:
        with undisturbed(model), torch.no_grad():
            return _recorded(exported(model, bound), bound, mode=model.training)
    except Untraceable as second:
        raise _refusal(kind, first, second) from first


def _refusal(kind: str, first: Untraceable, second: Untraceable) -> UserError:
    return UserError(
        f"cannot cut a {kind}: its forward cannot be followed at {place_of(first)}, {first} ({second}). "
        f"Put that part into a submodule, which is then kept whole."
    )


def _recorded(model: nn.Module, bound: inspect.BoundArguments, mode: bool | None = None) -> Recording:
    recorder = Recorder(model)
    graph = recorder.run(bound)
    whole = {kind.__name__: why for kind, why in recorder.whole.items()}
    return Recording(model, graph, recorder.constants, whole, mode)
