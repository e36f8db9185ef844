"""Follows a model's forward pass and keeps a graph of its calls of layers, functions and methods.

As in ``torch.fx``, with two additions. Values carry what an example gives, so that shapes, ``None`` and branches are
known; what a branch or a loop count rests on is checked again whenever the graph runs (``expect``). And a module whose
inside cannot be followed, or that branches, is one node, whatever the rest of the model does."""

import dataclasses
import inspect
import operator
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef

from shoal.errors import ShoalError, UserError
from shoal.parallel.partition.patches import factories, homes, patched
from shoal.parallel.partition.recorded import (
    UNKNOWN,
    Method,
    Recorded,
    Shape,
    UnknownAttribute,
    Untraceable,
    leaves,
    substitute,
)
from shoal.parallel.partition.recurrent import is_stack, layer_by_layer

_PLAIN = (int, float, complex, str, type(None), type(...), torch.dtype, torch.device, torch.layout, torch.memory_format)
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_FREE = (getattr, operator.getitem, torch.cat)  # without effect: not kept when nobody uses what they give


def expect(actual: Any, expected: Any, where: str) -> None:
    """Runs in the cut model: what decided a branch, or a count, while recording must still hold.

    Raises UserError when it does not, since the graph holds one way only."""
    if actual is not expected and (type(actual) is not type(expected) or actual != expected):
        raise UserError(
            f"the model was cut for batches with which {where} gives {expected}, and this one gives "
            f"{'another value' if isinstance(actual, Tensor) else actual}: put what depends on it into a submodule of "
            f"its own, which is then kept whole."
        )


def is_part(tensor: Tensor) -> bool:
    """Whether a copy could not lie in memory as the tensor does: it starts inside a storage, or leaves gaps.

    Matrix products may round differently then, since libraries choose by alignment and strides."""
    full = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride != full:
            return tensor.numel() > 0
        full *= size
    return tensor.storage_offset() != 0


class Recorder(fx.proxy.TracerBase):
    """One recording. ``live`` while the model's own code runs, not while the value of a node is computed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.graph = fx.Graph()
        self.constants: dict[str, Any] = {}
        self.whole: dict[type, str] = {}
        self.live = False
        self._names = {id(module): name for name, module in model.named_modules()}
        self._state = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
        self._reads: dict[str, fx.Node] = {}  # get_attr target -> its node
        self._hidden: dict[int, dict[str, Any]] = {}  # attributes of the modules that are being looked into
        self._stack: list[nn.Module] = []
        self._memories: dict[StorageWeakRef, int] = {}
        self._call: Callable[..., Any] = nn.Module.__call__
        self._getattr: Callable[[nn.Module, str], Any] = nn.Module.__getattr__
        self._setattr: Callable[[nn.Module, str, Any], None] = nn.Module.__setattr__
        self._apply: Callable[..., Any] = vars(torch.autograd.Function)["apply"]

    def run(self, bound: inspect.BoundArguments) -> fx.Graph:
        """The graph of ``model.forward`` with these arguments. Raises Untraceable where it cannot be followed."""
        given = inspect.BoundArguments(bound.signature, OrderedDict(bound.arguments))
        try:
            with patched(self._changes()), self._looking_into(self.model):
                for name, value in bound.arguments.items():
                    given.arguments[name] = self._argument(name, value)
                with self._while_live(True):
                    result = self.model.forward(*given.args, **given.kwargs)
                self.graph.output(self.create_arg(result))
        except (ShoalError, Untraceable):
            raise
        except Exception as error:
            raise Untraceable(reason(error)) from error
        self._prune()
        return self.graph

    # ---- what the model's code does

    def record(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Add a node, and return what stands for its value."""
        return self.create_proxy(kind, target, args, dict(kwargs))

    def create_proxy(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str | None = None, *_: Any
    ) -> Any:
        with self._while_live(False):
            node = self.graph.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs), name)
            node.meta["module"] = self._names[id(self._stack[-1])]
            example = self._compute(node, args, kwargs)
        return self._wrap(node, example)

    def create_arg(self, a: Any) -> Any:
        return substitute(a, self._argument_of_node)

    def decide(self, value: Recorded) -> bool:
        """The truth of a recorded value."""
        return bool(self.pin(value, bool))

    def pin(self, value: Recorded, read: Callable[[Any], Any]) -> Any:
        """``read`` of the example's value, which the code will rely on: the graph checks it whenever it runs."""
        if value.example is UNKNOWN:
            raise Untraceable("it depends on a value, and there is no example batch to tell it")
        module = self._stack[-1]
        if self._depends_on_mode(value.node):
            raise Untraceable("it does something else in evaluation than in training")
        if module is not self.model and isinstance(value.example, Tensor):
            raise Untraceable("it branches on the values of its input")
        if module is not self.model and not _holds_layers(module):
            raise Untraceable("it branches on the sizes of its input")
        with self._while_live(False):
            found = read(value.example)
        where = f"{type(module).__name__}.forward ({place_of()})"
        seen = (
            value if read is bool and type(value.example) is bool else self.record("call_function", read, (value,), {})
        )
        self.record("call_function", expect, (seen, found, where), {})
        return found

    # ---- nodes and values

    def _argument(self, name: str, value: Any) -> Any:
        node = self.graph.placeholder(name)
        node.meta["module"] = ""
        self._note(node, value)
        if isinstance(value, bool | str | type(None)):
            told = Recorded(node, self, value)
            self.record("call_function", expect, (told, value, f"the argument {name!r}"), {})
            return value
        return self._wrap(node, value)

    def _argument_of_node(self, a: Any) -> Any:
        if type(a) in (Recorded, UnknownAttribute):
            return a.node
        if isinstance(a, Method | nn.Module):
            raise Untraceable(f"it hands a {type(a).__name__} to a function")
        if isinstance(a, _PLAIN):
            return a
        if id(a) in self._state:
            return self._read(self._state[id(a)], a)
        if dataclasses.is_dataclass(a) and not isinstance(a, type):
            fields = {f.name: getattr(a, f.name) for f in dataclasses.fields(a) if f.init}
            if any(type(part) in (Recorded, UnknownAttribute) for part in leaves(fields)):
                return self.record("call_function", type(a), (), fields).node
        if inspect.isfunction(a) and a.__closure__:
            raise Untraceable("it hands a function to a function")
        if any(type(part) is Recorded for part in getattr(a, "__dict__", {}).values()):
            raise Untraceable(f"it hands values over inside a {type(a).__name__}")
        return self._read(self._constant(a), a)

    def _constant(self, a: Any) -> str:
        for name, known in self.constants.items():
            if known is a:
                return name
        name = f"_constant{len(self.constants)}"
        self.constants[name] = a
        return name

    def _read(self, name: str, value: Any) -> fx.Node:
        """The node that reads a parameter, a buffer, a constant, or the mode of a module."""
        if name not in self._reads:
            self._reads[name] = self.graph.create_node("get_attr", name)
            self._note(self._reads[name], value)
        return self._reads[name]

    def _compute(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        values = [value.example for value in leaves((args, kwargs)) if type(value) in (Recorded, UnknownAttribute)]
        if any(value is UNKNOWN for value in values):
            return UNKNOWN
        given, named = substitute((args, kwargs), lambda a: a.example if type(a) is Recorded else a)
        tensors = [a for a in leaves((given, named)) if isinstance(a, Tensor)]
        versions = [t._version for t in tensors]
        try:
            if node.op == "call_module":
                result = self._call(self.model.get_submodule(str(node.target)), *given, **named)
            elif node.op == "call_method":
                result = getattr(given[0], str(node.target))(*given[1:], **named)
            else:
                result = node.target(*given, **named)  # type: ignore[operator]
        except NotImplementedError:
            if any(t.is_meta for t in tensors):
                return UNKNOWN  # what depends on data has no shape there
            raise
        changed = [t for t, version in zip(tensors, versions, strict=True) if t._version != version]
        node.meta["changed"] = {self._memory(t) for t in changed}
        self._note(node, result)
        return result

    def _note(self, node: fx.Node, value: Any) -> None:
        tensors = [a for a in leaves(value) if isinstance(a, Tensor)]
        node.meta["bytes"] = sum(t.numel() * t.element_size() for t in tensors)
        node.meta["memories"] = {self._memory(t) for t in tensors}
        node.meta["kind"] = type(value)
        node.meta["part"] = any(is_part(t) for t in tensors)

    def _memory(self, tensor: Tensor) -> int:
        reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        return self._memories.setdefault(reference, len(self._memories))

    def _wrap(self, node: fx.Node, example: Any) -> Any:
        kind = type(example)
        if example is None:
            return None
        if kind in (tuple, list, torch.Size):
            made = (self._item(node, place, item) for place, item in enumerate(example))
            return Shape(made) if kind is torch.Size else kind(made)
        if kind is dict:
            return {key: self._item(node, key, item) for key, item in example.items()}
        return Recorded(node, self, example)

    def _item(self, node: fx.Node, key: Any, example: Any) -> Any:
        item = self.graph.call_function(operator.getitem, (node, key))
        item.meta.update(module=node.meta["module"], changed=set())
        self._note(item, example)
        return self._wrap(item, example)

    # ---- modules

    def _changes(self) -> list[tuple[Any, str, Any]]:
        recorder = self

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return recorder._module(module, args, kwargs) if recorder.live else recorder._call(module, *args, **kwargs)

        def read(module: nn.Module, name: str) -> Any:
            return recorder._attribute(module, name)

        def write(module: nn.Module, name: str, value: Any) -> None:
            if recorder.live:
                raise Untraceable(f"it sets its attribute {name!r}")
            recorder._setattr(module, name, value)

        def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
            function = recorder._apply.__get__(None, cls)
            if not recorder.live:
                return function(*args, **kwargs)

            def applied(*args: Any, **kwargs: Any) -> Any:
                return function(*args, **kwargs)

            return recorder.record("call_function", applied, args, kwargs)

        def length(a: Any) -> Any:
            return self.record("call_function", len, (a,), {}) if self.live and type(a) is Recorded else len(a)

        return [
            (nn.Module, "__call__", call),
            (nn.Module, "__getattr__", read),
            (nn.Module, "__setattr__", write),
            (torch.autograd.Function, "apply", classmethod(apply)),
            *factories(self.record, lambda: self.live),
            *((home, "len", length) for home in homes(self.model)),
        ]

    def _attribute(self, module: nn.Module, name: str) -> Any:
        hidden = self._hidden.get(id(module), {})
        if name in hidden:
            value = hidden[name]
            own = ".".join(filter(None, (self._names[id(module)], "training")))
            name = own if name == "training" else self._constant(value)
        else:
            value = self._getattr(module, name)
            name = self._state.get(id(value), "")
        return Recorded(self._read(name, value), self, value) if self.live and name else value

    def _module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if id(module) not in self._names:
            return self._call(module, *args, **kwargs)  # made on the way: a function like any other
        has_parts = is_stack(module, args) or next(module.children(), None) is not None
        if has_parts and type(module) not in self.whole and module not in self._stack:
            last = next(iter(reversed(self.graph.nodes)))
            try:
                with self._looking_into(module):
                    if is_stack(module, args):
                        return layer_by_layer(module, *args, **kwargs)
                    return self._call(module, *args, **kwargs)
            except ShoalError:
                raise
            except Exception as error:
                self.whole[type(module)] = reason(error)
                self._forget_after(last)
        return self.record("call_module", self._names[id(module)], args, kwargs)

    @contextmanager
    def _looking_into(self, module: nn.Module) -> Iterator[None]:
        """Within the block, the module's forward is on record, and so is its reading of what is not its state.

        Python looks in an object's dict first, and asks ``__getattr__`` for what is not there."""
        own = vars(module)
        names = [name for name, value in own.items() if name == "training" or isinstance(value, Tensor)]
        self._hidden[id(module)] = {name: own.pop(name) for name in names}
        self._stack.append(module)
        try:
            yield
        finally:
            self._stack.pop()
            own.update(self._hidden.pop(id(module)))

    @contextmanager
    def _while_live(self, live: bool) -> Iterator[None]:
        before, self.live = self.live, live
        try:
            yield
        finally:
            self.live = before

    def _forget_after(self, last: fx.Node) -> None:
        for node in reversed(list(self.graph.nodes)):
            if node is last:
                return
            self._reads = {name: read for name, read in self._reads.items() if read is not node}
            self.graph.erase_node(node)

    def _prune(self) -> None:
        for node in reversed(list(self.graph.nodes)):
            if not node.users and (node.op == "get_attr" or (node.op == "call_function" and node.target in _FREE)):
                self.graph.erase_node(node)

    def _depends_on_mode(self, node: fx.Node) -> bool:
        above = [node]
        for one in above:
            if one.op == "get_attr" and str(one.target).rpartition(".")[2] == "training":
                return True
            if one.op == "call_function":
                above.extend(a for a in one.all_input_nodes if a not in above and not a.meta.get("bytes"))
        return False


def _holds_layers(module: nn.Module) -> bool:
    """Whether it has a list of parts, or one further inside of parts that have parts."""
    if any(isinstance(part, _LISTS) for part in module.children()):
        return True
    lists = (part for part in module.modules() if isinstance(part, _LISTS))
    return any(sum(1 for part in found.children() if next(part.children(), None)) > 1 for found in lists)


def reason(error: Exception) -> str:
    """One line."""
    text = str(error) if isinstance(error, Untraceable) else f"{type(error).__name__}: {error}"
    return (text.splitlines() or [""])[0]


def place_of(error: Exception | None = None) -> str:
    """file:line of the model's own code, the innermost outside torch and this package."""
    stack = traceback.extract_tb((error.__cause__ or error).__traceback__) if error else traceback.extract_stack()
    own = [f for f in stack if "/torch/" not in f.filename and "/parallel/partition/" not in f.filename]
    last = (own or list(stack))[-1]
    return f"{last.filename.rpartition('/')[2]}:{last.lineno}"
