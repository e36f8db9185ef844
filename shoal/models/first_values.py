"""Models without memory (on the meta device), and where the first values of what is held of them come from."""

import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import swap_tensors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from shoal.errors import UserError
from shoal.models.initial_values import Kept, draw, initial_values, watching
from shoal.models.initial_weights import GivenWeights
from shoal.models.on_meta import NoFirstValues


@dataclass(frozen=True)
class Blank:
    """``module`` lies on the meta device: shapes without memory. ``first`` makes what is held of it."""

    module: nn.Module
    first: "FirstValues"


class FirstValues:
    """Of each tensor of a model, or a part of it: from a file, or else drawn (see `shoal.models.initial_values`)."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self._seed = seed
        self._file: GivenWeights | None = None
        self.device = torch.device("cpu")
        self._said = initial_values(model)
        every = _tensors(model)
        names: dict[int, str] = {}
        self._name_of = {name: names.setdefault(id(tensor), name) for name, tensor in every}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in every}

    def over(self, file: GivenWeights | None) -> "FirstValues":
        """The same under those of a file."""
        found = copy(self)
        found._file = file
        return found

    def on(self, device: torch.device) -> "FirstValues":
        """The same, made on another device."""
        found = copy(self)
        found.device = device
        return found

    def first_name(self, name: str) -> str:
        """The name under which a tied tensor comes first in the model."""
        return self._name_of[name]

    def part(self, name: str, kept: Kept | None = None) -> Tensor:
        """The places that are kept of a tensor of the whole model."""
        first = self._name_of[name]
        if self._file is not None and first in self._file.names:
            return self._file.part(first, kept).to(self.device)
        return draw(self._said[first], self._seed, first, self._shapes[first], kept).to(self.device)

    def passing(self, name: str) -> Tensor:
        """A whole tensor that is soon let go: its memory then goes back to the system, where the C library would fill
        the gap with small things that stay, and take new memory for the next one."""
        first = self._name_of[name]
        if self._file is not None and first in self._file.names:
            return self._file.part(first, None).to(self.device)
        return draw(self._said[first], self._seed, first, self._shapes[first], empty=_apart).to(self.device)


def _apart(sizes: Sequence[int]) -> Tensor:
    """float32 on pages of its own."""
    elements = math.prod(sizes)
    if not elements:
        return torch.empty(sizes, device="cpu")
    memory = mmap.mmap(-1, 4 * elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.float32, count=elements).view(tuple(sizes))


@torch.no_grad()
def materialise(
    modules: Sequence[nn.Module],
    first: FirstValues,
    kept: Callable[[str], Kept] = lambda name: {},
) -> None:
    """Give the tensors of modules that lie on the meta device their first values, in place: they stay the objects that
    they are. ``kept``: the places of a whole tensor, by name, that are held."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(_without_references(module))
        for module in modules:
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                if tensor.is_meta:
                    _become(tensor, first.part(name, kept(name)))


@torch.no_grad()
def hollow(module: nn.Module) -> None:
    """Give the parameters of a module on the meta device shapes on the processor, of one number's memory each."""
    for parameter in module.parameters():
        _become(parameter, torch.zeros((), dtype=parameter.dtype, device="cpu").expand(parameter.shape))


def _become(tensor: Tensor, values: Tensor) -> None:
    if values.shape != tensor.shape:
        raise RuntimeError(f"a tensor of {list(tensor.shape)} was made as {list(values.shape)}")
    made = values.to(tensor.dtype)
    if isinstance(tensor, nn.Parameter):
        made = nn.Parameter(made, tensor.requires_grad)
    swap_tensors(tensor, made)  # type: ignore[no-untyped-call]


@contextmanager
def _without_references(module: nn.Module) -> Iterator[None]:
    """Recurrent layers keep weak references to their weights, with which those cannot become others."""
    stacks = [part for part in module.modules() if isinstance(part, nn.RNNBase)]
    for stack in stacks:
        stack._flat_weight_refs = []
    yield
    _refer_anew(module)


@contextmanager
def present(module: nn.Module, first: FirstValues | None) -> Iterator[None]:
    """Within the block, others with first values stand in for the module's tensors on the meta device."""
    if first is None:
        yield
        return
    names = {id(tensor): name for name, tensor in _tensors(module) if tensor.is_meta}
    tables = [table for part in module.modules() for table in (part._parameters, part._buffers)]
    before = [dict(table) for table in tables]
    made: dict[int, Tensor] = {}
    for table in tables:
        for key, tensor in table.items():
            if tensor is not None and id(tensor) in names:
                if id(tensor) not in made:
                    values = first.passing(names[id(tensor)]).to(tensor.dtype)
                    own = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(values, tensor.requires_grad) if own else values
                table[key] = made[id(tensor)]  # type: ignore[assignment]
    _refer_anew(module)
    try:
        yield
    finally:
        for table, tensors in zip(tables, before, strict=True):
            table.update(tensors)  # type: ignore[arg-type]
        _refer_anew(module)


def _refer_anew(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.RNNBase):
            part._init_flat_weights()


def on_demand(model: nn.Module, first: FirstValues | None) -> AbstractContextManager[object]:
    """Within it, an operation that reads a tensor of a model on the meta device gets its first values, which are let go
    with what it gives. Without gradients only."""
    if first is None:
        return nullcontext()
    made = _Made(model, first)
    both = ExitStack()
    both.enter_context(_OnDemand(made))
    both.enter_context(_OfRecurrent(made))
    return both


class _Made:
    """What stands in for a tensor of a model on the meta device, or a view of it; other values are left as they are."""

    def __init__(self, model: nn.Module, first: FirstValues) -> None:
        self._first = first
        every = (*model.named_parameters(), *model.named_buffers())
        self._places = {_memory(tensor): (name, tensor.dtype) for name, tensor in every if tensor.is_meta}

    def __call__(self, a: Any) -> Any:
        if not isinstance(a, Tensor) or not a.is_meta or _memory(a) not in self._places:
            return a
        name, dtype = self._places[_memory(a)]
        whole = self._first.passing(name).to(dtype)
        return whole.as_strided(a.size(), a.stride(), a.storage_offset())


class _Light(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Nothing is compiled within it: torch need not import its compiler to see to that."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class _OnDemand(_Light):  # type: ignore[no-untyped-call]
    def __init__(self, made: _Made) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made = made

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map(self._made, (args, kwargs or {}))
        return func(*args, **kwargs)


class _OfRecurrent(TorchFunctionMode):
    """Recurrent layers compare the devices of their weights before any operation is dispatched."""

    def __init__(self, made: _Made) -> None:
        super().__init__()
        self._made = made

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for kind in types:
            if not issubclass(kind, Tensor):  # what stands for a value while a model is recorded
                with self:
                    return kind.__torch_function__(func, types, args, kwargs)
        if getattr(func, "__name__", "") in _RECURRENT:
            args, kwargs = tree_map(self._made, (args, kwargs))
        return func(*args, **kwargs)


_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Changes(_Light):  # type: ignore[no-untyped-call]
    """Sees what is written to tensors on the meta device after a model has said its first values."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written = False
        self.model: nn.Module | None = None
        self.seed = 0
        self._objects: Sequence[tuple[str, int]] = ()
        self._known: dict[int, int] = {}  # memory -> of which tensor it has the values

    def said(self, model: nn.Module) -> None:
        self.model, self.seed, self.written = model, torch.initial_seed(), False
        self._objects = [(name, id(tensor)) for name, tensor in _tensors(model)]
        self._known = {_memory(tensor): id(tensor) for _, tensor in _tensors(model)}

    def left(self, model: nn.Module) -> bool:
        """Whether this is the model that has said its first values, and has them still."""
        tensors = _tensors(model)
        return (
            self.model is model
            and not self.written
            and self._objects == [(name, id(tensor)) for name, tensor in tensors]
            and all(t.is_meta and self._known.get(_memory(t)) == id(t) for _, t in tensors)
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable and any(isinstance(a, Tensor) and a.is_meta for a in tree_leaves((args, kwargs))):
            self.written = True
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and _memory(args[0]) in self._known and _wider(made, args[0]):
            self._known[_memory(made)] = self._known[_memory(args[0])]
        return made


class _Fillers(NoFirstValues):
    """Passes over `torch.nn.init`, and tells of it."""

    def __init__(self, changes: _Changes) -> None:
        super().__init__()
        self._changes = changes

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            self._changes.written = True
        return super().__torch_function__(func, types, args, kwargs)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _wider(made: Tensor, given: Tensor) -> bool:
    """Whether a type holds every value of the one before."""
    return made.is_meta and made.dtype.is_floating_point and made.itemsize >= given.itemsize


def blank(make: Callable[[], nn.Module]) -> Blank | None:
    """The model that ``make`` gives, without memory, where that is the truth: its constructor ends in `initialise`, and
    nobody has changed, tied or added a tensor since. None otherwise: it has to be made whole."""
    changes = _Changes()
    try:
        with torch.device("meta"), _Fillers(changes), changes, watching(changes.said):
            model = make()
    except UserError:
        raise
    except Exception:  # of a factory that computes with values; what is really wrong shows when it is called again
        return None
    return Blank(model, FirstValues(model, changes.seed)) if changes.left(model) else None
