"""Models without memory (on the meta device), and where the first values of what is held of them come from."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import swap_tensors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from shoal.errors import UserError
from shoal.models.initial_values import Kept, draw, initial_values, watching
from shoal.models.initial_weights import GivenWeights


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
        self._said = initial_values(model)
        every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        names: dict[int, str] = {}
        self._name_of = {name: names.setdefault(id(tensor), name) for name, tensor in every}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in every}

    def over(self, file: GivenWeights | None) -> "FirstValues":
        """The same under those of a file."""
        found = copy(self)
        found._file = file
        return found

    def part(self, name: str, kept: Kept | None = None) -> Tensor:
        """The places that are kept of a tensor of the whole model, on the processor, in the type that it is kept in."""
        first = self._name_of[name]
        if self._file is not None and first in self._file.names:
            return self._file.part(first, kept)
        return draw(self._said[first], self._seed, first, self._shapes[first], kept)


@torch.no_grad()
def materialise(
    modules: Iterable[nn.Module],
    first: FirstValues,
    device: torch.device,
    kept: Callable[[str], Kept] = lambda name: {},
) -> None:
    """Give the tensors of modules that lie on the meta device their first values, in place: they stay the objects that
    they are. ``kept``: the places of a whole tensor, by name, that are held."""
    for module in modules:
        with _without_references(module):
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                if tensor.is_meta:
                    _become(tensor, first.part(name, kept(name)), device)


def _become(tensor: Tensor, values: Tensor, device: torch.device) -> None:
    if values.shape != tensor.shape:
        raise RuntimeError(f"a tensor of {list(tensor.shape)} was made as {list(values.shape)}")
    made = values.to(device, tensor.dtype)
    if isinstance(tensor, nn.Parameter):
        swap_tensors(tensor, nn.Parameter(made, tensor.requires_grad))
    else:
        swap_tensors(tensor, made)


@contextmanager
def _without_references(module: nn.Module) -> Iterator[None]:
    """Recurrent layers keep weak references to their weights, with which those cannot become others."""
    stacks = [part for part in module.modules() if isinstance(part, nn.RNNBase)]
    for stack in stacks:
        stack._flat_weight_refs = []
    yield
    for stack in stacks:
        stack._init_flat_weights()


@contextmanager
def present(module: nn.Module, first: FirstValues | None, device: torch.device) -> Iterator[None]:
    """Within the block the module's tensors have memory and their first values; nothing where it has them anyway."""
    absent = [t for t in (*module.parameters(), *module.buffers()) if t.is_meta]
    if first is None or not absent:
        yield
        return
    materialise([module], first, device)
    try:
        yield
    finally:
        with torch.no_grad(), _without_references(module):
            for tensor in absent:
                tensor.grad = None
                _become(tensor, torch.empty_like(tensor, device="meta"), torch.device("meta"))


class OnDemand(TorchDispatchMode):
    """Within it, an operation that reads a tensor of a model on the meta device gets its first values, which are let go
    with what it gives. Without gradients only."""

    def __init__(self, model: nn.Module, first: FirstValues, device: torch.device) -> None:
        super().__init__()
        self._first, self._device = first, device
        every = (*model.named_parameters(), *model.named_buffers())
        self._places = {_memory(tensor): (name, tensor.dtype) for name, tensor in every if tensor.is_meta}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map(self._made, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _made(self, a: Any) -> Any:
        if not isinstance(a, Tensor) or not a.is_meta or _memory(a) not in self._places:
            return a
        name, dtype = self._places[_memory(a)]
        whole = self._first.part(name).to(self._device, dtype)
        return whole.as_strided(a.size(), a.stride(), a.storage_offset())


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Changes(TorchDispatchMode):
    """Sees what is written to tensors on the meta device after a model has said its first values."""

    def __init__(self) -> None:
        super().__init__()
        self.written = False
        self.model: nn.Module | None = None
        self.seed = 0
        self.tensors: Sequence[tuple[str, int, int]] = ()

    def said(self, model: nn.Module) -> None:
        self.model, self.seed, self.written, self.tensors = model, torch.initial_seed(), False, _tensors(model)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable and any(isinstance(a, Tensor) and a.is_meta for a in tree_leaves((args, kwargs))):
            self.written = True
        return func(*args, **(kwargs or {}))


def _tensors(model: nn.Module) -> list[tuple[str, int, int]]:
    every = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return [(name, id(tensor), _memory(tensor)) for name, tensor in every]


def blank(make: Callable[[], nn.Module]) -> Blank | None:
    """The model that ``make`` gives, without memory, where that is the truth: its constructor ends in `initialise`, and
    nobody has changed, tied or added a tensor since. None otherwise: it has to be made whole."""
    changes = _Changes()
    try:
        with torch.device("meta"), changes, watching(changes.said):
            model = make()
    except UserError:
        raise
    except Exception:  # of a factory that computes with values; what is really wrong shows when it is called again
        return None
    as_said = changes.model is model and not changes.written and list(changes.tensors) == _tensors(model)
    if not as_said or not all(t.is_meta for t in (*model.parameters(), *model.buffers())):
        return None
    return Blank(model, FirstValues(model, changes.seed))
