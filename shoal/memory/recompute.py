"""A block whose forward pass keeps its inputs (and some results), and is done again for the backward pass.

The scheme is Chen et al.'s (2016), on saved-tensor hooks as torch.utils.checkpoint's: the graph holds an empty slot for
each tensor that it would have saved; the first one that is asked for has the forward pass done again, which fills
all and stops at the last. Beyond that one, buffers that the block writes (BatchNorm's running statistics) are set
back for the second pass and written once, and each value is let go once it has been used for the last time.
"""

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from shoal.errors import RunFailed, UserError
from shoal.memory.meter import Hold, storage_of
from shoal.memory.operations import Keep, Results, Reuse
from shoal.memory.store import Kept, Store, saving_into
from shoal.parallel.pipeline.backward import asked_again

Mode = Literal["none", "selective", "full"]


class _Enough(Exception):
    """All that is needed has been computed again."""


class _Slot:
    """What the graph holds in the place of a saved tensor."""

    __slots__ = ("__weakref__", "owner", "shape", "value")

    def __init__(self, owner: "Pass", tensor: Tensor) -> None:
        self.owner, self.shape = owner, (tensor.shape, tensor.dtype)
        self.value: Hold | None = None


class _Generators:
    """The states of torch's default generators: of the CPU, and of the device if that is another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = torch.get_rng_state()
        self._other = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def put_back(self) -> None:
        torch.set_rng_state(self._host)
        if self._other is not None:
            torch.cuda.set_rng_state(self._other, self._device)


class _Casting:
    """The autocast state, to be entered again."""

    def __init__(self, devices: set[str]) -> None:
        self._states = [
            (d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d), torch.is_autocast_cache_enabled())
            for d in sorted(devices)
        ]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for device, enabled, dtype, cache in self._states:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache))
            yield


class Block:
    """A module whose ``forward`` is wrapped in place: its parameters, hooks and names stay what they are."""

    def __init__(self, name: str, module: nn.Module, store: Store) -> None:
        self.name, self.module, self.store = name, module, store
        self.mode: Mode = "none"
        self.dropped: frozenset[str] = frozenset()  # selective: kinds of operations that are computed again
        self.observer: Callable[[Block, Callable[[], Pass]], Any] | None = None  # has a pass done, to see what is in it
        self.inner = module.forward
        self._wrapped = module.__dict__.get("forward")  # by something else, before this
        self.written: list[tuple[nn.Module, str]] | None = None  # buffers that a pass writes; None: not known yet
        module.forward = MethodType(_forward, module)
        module.__dict__["_recomputed"] = self

    def unwrap(self) -> None:
        del self.module.__dict__["forward"], self.module.__dict__["_recomputed"]
        if self._wrapped is not None:
            self.module.__dict__["forward"] = self._wrapped

    def __deepcopy__(self, memo: dict[int, Any]) -> "Block":
        """A copy of the model is a model of its own, with blocks that keep what they keep in the same place."""
        copied = object.__new__(Block)
        memo[id(self)] = copied
        copied.__dict__.update(self.__dict__)
        copied.module = memo.get(id(self.module), self.module)
        copied.inner = copy.deepcopy(self.inner, memo)
        copied.written = copied.observer = None
        return copied

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled():
            return self.inner(*args, **kwargs)
        if self.observer is not None:
            return self.observer(self, lambda: Pass(self, args, kwargs))
        if self.mode == "none":
            with saving_into(self.store, self.name) if self.store.moves else contextlib.nullcontext():
                return self.inner(*args, **kwargs)
        return Pass(self, args, kwargs).first()

    def buffers(self) -> list[tuple[nn.Module, str]]:
        return [(m, n) for m in self.module.modules() for n, b in m._buffers.items() if b is not None and b.numel()]


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    block: Block = module.__dict__["_recomputed"]
    return block.forward(args, kwargs)


class Pass:
    """One forward pass of a block, and what it takes to do it again."""

    def __init__(self, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.block = block
        self._arguments = (args, kwargs)
        leaves, self._form = tree_flatten((args, kwargs))
        self._tensors = [isinstance(leaf, Tensor) for leaf in leaves]
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._needs_grad = [leaf.requires_grad for leaf in given]
        self._seen = [(leaf, leaf._version) for leaf in (tensor.detach() for tensor in given)]
        self._kept: list[Kept] = [block.store.keep(leaf) for leaf, _ in self._seen]
        self._plain = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        devices = {leaf.device for leaf in given} or {torch.device("cpu")}
        self._device = next((d for d in devices if d.type == "cuda"), torch.device("cpu"))
        self._generators = _Generators(self._device)
        self._casting = _Casting({d.type for d in devices} | {"cpu"})
        self._slots: list[weakref.ref[_Slot]] = []
        self._results: Results | None = None
        self._needed = 0  # results that came before the last tensor was saved
        self._state: dict[tuple[int, str], tuple[nn.Module, Tensor]] = {}

    @property
    def given(self) -> list[Tensor]:
        """The tensors among its arguments, before it is done."""
        return [tensor for tensor, _ in self._seen]

    # --- the first time ---------------------------------------------------------------------------------------

    def first(self, seen: Callable[[Tensor], None] | None = None) -> Any:
        """Do it; ``seen`` is called with each tensor that would have been saved."""
        block = self.block
        self._seer = seen
        args, kwargs = self._arguments
        del self._arguments
        watched = block.written if block.written is not None else block.buffers()
        before = [(module, name, _buffer(module, name).detach().clone()) for module, name in watched]
        keep = Keep(block.dropped, block.store) if block.mode == "selective" else None
        self._results = keep.results if keep else None
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack), keep or contextlib.nullcontext():
            output = block.inner(*args, **kwargs)
        if block.written is None:
            changed = [not torch.equal(_buffer(module, name), old) for module, name, old in before]
            before = [each for each, differs in zip(before, changed, strict=True) if differs]
            block.written = [(module, name) for module, name, _ in before]
        self._state = {(id(module), name): (module, old) for module, name, old in before}
        if self._results is not None:
            self._results.cut(self._needed)
            self._results.forget({storage_of(leaf) for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)})
        for leaf, version in self._seen:
            if leaf._version != version:
                raise UserError(
                    f"block {block.name!r} writes into its own input, so it cannot be computed again: "
                    f"leave it out by naming the others in plan.memory.blocks."
                )
        self._versions = [version for _, version in self._seen]
        self._seer = None
        del self._seen
        return output

    def _pack(self, tensor: Tensor) -> _Slot:
        slot = _Slot(self, tensor)
        if self._seer is not None:
            self._seer(tensor)
        self._slots.append(weakref.ref(slot))
        if self._results is not None:
            self._needed = len(self._results)
        return slot

    # --- again ------------------------------------------------------------------------------------------------

    @staticmethod
    def _unpack(slot: _Slot) -> Tensor:
        if slot.value is None:
            slot.owner.again()
        value = slot.value
        if value is None:
            raise slot.owner.differs("it saved fewer tensors than the first time")
        if not asked_again():
            slot.value = None
        return value.tensor

    def again(self) -> None:
        """Do the forward pass again, up to the last tensor that the graph still waits for, and fill the slots."""
        last = max(place for place, slot in enumerate(self._slots) if slot() is not None)
        place = 0
        enough = _Enough()

        def fill(tensor: Tensor) -> None:
            nonlocal place
            slot = self._slots[place]() if place < len(self._slots) else None
            if slot is not None:
                if slot.shape != (tensor.shape, tensor.dtype):
                    raise self.differs(
                        f"tensor {place} was {_told(*slot.shape)}, now {_told(tensor.shape, tensor.dtype)}"
                    )
                slot.value = self.block.store.meter.hold(tensor.detach())
            if place == last:
                raise enough
            place += 1

        args, kwargs = self._inputs()
        now = _Generators(self._device)
        self._generators.put_back()
        reuse = Reuse(self.block.dropped, self._results) if self._results is not None else contextlib.nullcontext()
        try:
            with (
                torch.enable_grad(),
                self._casting.again(),
                self._old_buffers(),
                torch.autograd.graph.saved_tensors_hooks(fill, _never),
                reuse,
            ):
                self.block.inner(*args, **kwargs)
        except _Enough as stop:
            if stop is not enough:
                raise
        finally:
            enough.__traceback__ = None  # it holds the frames, and so all that was computed in them
            now.put_back()

    def _inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        found = []
        for kept, version, needs in zip(self._kept, self._versions, self._needs_grad, strict=True):
            tensor = kept.get()
            if isinstance(kept, Hold) and tensor._version != version:  # what comes from elsewhere is a copy
                raise self.differs("its input was written to after the forward pass")
            found.append(tensor.detach().requires_grad_(needs))
        given = iter(found)
        leaves = [
            next(given) if is_tensor else plain for is_tensor, plain in zip(self._tensors, self._plain, strict=True)
        ]
        args, kwargs = tree_unflatten(leaves, self._form)
        return args, kwargs

    @contextlib.contextmanager
    def _old_buffers(self) -> Iterator[None]:
        """Copies of the buffers as the first pass found them, while the block is computed again."""
        real = [(module, name, _buffer(module, name)) for (_, name), (module, _) in self._state.items()]
        for (_, name), (module, old) in self._state.items():
            module._buffers[name] = old.clone()
        try:
            yield
        finally:
            for module, name, buffer in real:
                module._buffers[name] = buffer

    def differs(self, how: str) -> RunFailed:
        return RunFailed(
            f"block {self.block.name!r} did not compute the same again ({how}): a module that is recomputed must "
            f"depend on its inputs, parameters and torch's generator only. Leave it out by naming the others in "
            f"plan.memory.blocks."
        )


def _never(_: Any) -> Tensor:
    raise RunFailed("the graph of a recomputed block was asked for a gradient.")


def _buffer(module: nn.Module, name: str) -> Tensor:
    buffer = module._buffers[name]
    assert buffer is not None
    return buffer


def _told(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
