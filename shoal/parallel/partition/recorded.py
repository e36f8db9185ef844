"""Values that stand in for tensors and numbers while a forward pass is recorded."""

import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import fx

if TYPE_CHECKING:
    from shoal.parallel.partition.recorder import Recorder


class Unknown:
    """What a recorded value is without an example."""

    def __repr__(self) -> str:
        return "UNKNOWN"


UNKNOWN = Unknown()


class Untraceable(Exception):
    """A forward pass cannot be recorded here; the module that it belongs to is then kept whole."""


class Recorded(fx.Proxy):
    """An ``fx.Proxy`` that knows what value the example gives it, so that ordinary code runs on it: loops over tuples,
    ``isinstance(x, Tensor)``, branches on sizes."""

    tracer: "Recorder"

    def __init__(self, node: fx.Node, recorder: "Recorder", example: Any) -> None:
        super().__init__(node, recorder)
        self.example = example

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        example = self.__dict__.get("example", UNKNOWN)
        if example is not UNKNOWN:
            return type(example)
        if self.tracer.live:
            raise Untraceable("it asks for the type of a value, and there is no example batch to tell it")
        return Recorded

    def __getattr__(self, name: str) -> Any:
        example = self.__dict__["example"]
        if example is UNKNOWN:
            return UnknownAttribute(self, name)
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(example, name)
        if callable(value):
            return Method(self, name)
        return self.tracer.record("call_function", getattr, (self, name), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "example"):
            raise Untraceable(f"sets {name!r} of a value")
        super().__setattr__(name, value)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.record("call_function", operator.setitem, (self, key, value), {})

    def __bool__(self) -> bool:
        return self.tracer.decide(self)

    def __len__(self) -> int:
        return int(self.tracer.pin(self, len))

    def __index__(self) -> int:
        return int(self.tracer.pin(self, operator.index))

    def __int__(self) -> int:
        return int(self.tracer.pin(self, int))

    def __float__(self) -> float:
        return float(self.tracer.pin(self, float))

    def __iter__(self) -> Iterator[Any]:
        if self.example is UNKNOWN:
            return super().__iter__()
        return (self[i] for i in range(len(self)))  # type: ignore[index]


class Method:
    """A method of a recorded value; calling it is recorded."""

    def __init__(self, owner: Recorded, name: str) -> None:
        self.owner = owner
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.owner.tracer.record("call_method", self.name, (self.owner, *args), kwargs)


class UnknownAttribute(Recorded):
    """An attribute of a value without an example: a method if it is called, else an attribute."""

    def __init__(self, owner: Recorded, name: str) -> None:
        self.__dict__.update(tracer=owner.tracer, example=UNKNOWN, owner=owner, name=name, read=None)

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        if self.__dict__["read"] is None:
            made = self.tracer.record("call_function", getattr, (self.__dict__["owner"], self.__dict__["name"]), {})
            self.__dict__["read"] = made.node
        found: fx.Node = self.__dict__["read"]
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        here = self.__dict__
        return self.tracer.record("call_method", here["name"], (here["owner"], *args), kwargs)


class Shape(tuple[Any, ...]):
    """The recorded sizes of a tensor."""

    def numel(self) -> Any:
        total: Any = 1
        for size in self:
            total = total * size
        return total


def _in_place(operation: Callable[..., Any]) -> Callable[[Recorded, Any], Any]:
    def method(self: Recorded, other: Any) -> Any:
        return self.tracer.record("call_function", operation, (self, other), {})

    return method


# without these, x += y would become x = x + y, and other names of the same tensor would keep the old value
for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
    setattr(Recorded, f"__{_name}__", _in_place(getattr(operator, _name)))


def substitute(structure: Any, replace: Callable[[Any], Any]) -> Any:
    """Tuples, also what ``torch.max`` and the like return, lists, dicts and slices rebuilt, with ``replace`` applied
    to all else."""
    kind = type(structure)
    if kind.__module__ == "torch.return_types":
        return kind([substitute(item, replace) for item in structure])
    if issubclass(kind, Shape):
        return tuple(substitute(item, replace) for item in structure)
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return kind(*(substitute(item, replace) for item in structure))
    if kind in (tuple, list):
        return kind(substitute(item, replace) for item in structure)
    if kind is dict:
        return {key: substitute(value, replace) for key, value in structure.items()}
    if kind is slice:
        return slice(*(substitute(part, replace) for part in (structure.start, structure.stop, structure.step)))
    return replace(structure)


def leaves(structure: Any) -> list[Any]:
    """All that is not a tuple, list, dict or slice, in order."""
    found: list[Any] = []
    substitute(structure, found.append)
    return found
