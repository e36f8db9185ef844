"""Sharded states (ZeRO; Rajbhandari et al., 2020): each data replica updates, and holds the states of, its slices only.

docs/sharded_states.md says what each stage holds where. The bits are those of every worker updating everything: the
optimisers that are allowed here treat each element by itself.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from shoal.comm import sgd
from shoal.comm.exchange import Exchange, Terms
from shoal.comm.group import Group, HostGroup
from shoal.comm.server.optimizer import ELEMENTWISE, build
from shoal.comm.sliced_heap import SlicedHeapExchange
from shoal.comm.slices import Piece, Sharing
from shoal.comm.transport import check_wired, make_exchange
from shoal.data.ledger import Ledger
from shoal.errors import UserError
from shoal.memory.optimizer_need import state_bytes
from shoal.memory.streamed import Streamed
from shoal.recipe.memory_plan import MemoryPlan
from shoal.recipe.plan import Plan
from shoal.train.at_rest import StatesAtRest
from shoal.train.figures import StepFigures
from shoal.train.gradients import Gradients
from shoal.train.state_gathering import State, cut
from shoal.train.synchrony import Everywhere

if TYPE_CHECKING:
    from shoal.comm.lanes import LanedGroup


class Weights(Protocol):
    """Where parameters lie, and how the slices that one worker has updated come to the others."""

    parameters: Sequence[nn.Parameter]
    shared: bool  # they lie in memory that all workers read

    @property
    def readable(self) -> bool: ...

    def piece(self, piece: Piece) -> Tensor: ...
    def updated(self) -> None: ...
    def arrive(self) -> None: ...
    def settle(self) -> None: ...
    def leave(self) -> None: ...
    def held_bytes(self) -> dict[str, int]: ...
    def count_anew(self) -> None: ...
    def most_bytes(self) -> int: ...


class Slices(Protocol):
    """The exchange, as far as it is asked for slices of its result."""

    gauged: bool

    def piece(self, piece: Piece) -> Tensor: ...
    def held_bytes(self) -> dict[str, int]: ...
    def most_sums(self) -> int: ...


class States(Protocol):
    """How states of pieces are brought together for a checkpoint."""

    @property
    def on_heap(self) -> bool:
        """Whether they lie in memory that torch does not count."""

    def gather(self, pieces: Sequence[Piece], parts: Sequence[Tensor], states: Sequence[State]) -> dict[int, State]: ...


def check(
    plan: Plan, optimizer: torch.optim.Optimizer, module: nn.Module, narrow: Collection[nn.Parameter] = ()
) -> None:
    """Raises UserError when the plan shards states, and slices of tensors would not get the bits of whole ones.

    ``narrow``: parameters that become float32 to be updated, and are kept in fewer bits by ourselves."""
    if not plan.shards_states:
        return
    kind, states = type(optimizer), f"plan: states = {plan.states!r}"
    if kind.__name__ not in ELEMENTWISE or getattr(torch.optim, kind.__name__, None) is not kind:
        name = kind.__name__ if kind.__module__.startswith("torch.optim") else f"{kind.__module__}.{kind.__name__}"
        raise UserError(
            f"{states} cuts tensors into slices, and {name} is not known to treat each element by itself: use one of "
            f"{', '.join(sorted(ELEMENTWISE))}, or states = 'replicated'."
        )
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dtype.itemsize < 4 and parameter not in narrow:
            raise UserError(
                f"{states} cuts tensors, and parameter {name!r} is {parameter.dtype}, where torch rounds the last "
                f"elements of a tensor in another way: keep parameters in float32, or use states = 'replicated'."
            )
        if not parameter.is_contiguous():
            raise UserError(
                f"{states} cuts tensors in the order of their elements, and parameter {name!r} lies in memory in "
                f"another one: make it contiguous, or use states = 'replicated'."
            )


def check_compiled(compiled: bool, plan: Plan, group: Group) -> None:
    """Raises UserError when the model is compiled and cannot be trained with these states."""
    if compiled and plan.shards_states and not isinstance(group, HostGroup):
        raise UserError(
            f"plan: states = {plan.states!r} between hosts brings parameters in by hooks on blocks, which a compiled "
            f"model does not keep: leave model.compile out."
        )


def settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a group of an optimiser's parameters is updated with."""
    return {key: value for key, value in group.items() if key != "params"}


class Sharded(Everywhere):
    """Of one set of gradients. The user's optimiser says what is done; one of the same kind, over pieces, does it and
    holds the states."""

    def __init__(
        self,
        gradients: Gradients,
        optimizer: torch.optim.Optimizer,
        weights: Weights,
        states: States,
        pieces: Sequence[Piece],
        slices: Slices,
    ) -> None:
        super().__init__(optimizer)
        self._slices = slices
        self.gradients, self.weights, self.states, self.pieces = gradients, weights, states, pieces
        self.equal = self.meets = weights.shared
        self.parts = [weights.piece(piece) for piece in pieces]
        slot_of = {id(parameter): slot for slot, parameter in enumerate(gradients.parameters)}
        groups = [{slot_of[id(p)] for p in g["params"] if id(p) in slot_of} for g in optimizer.param_groups]
        self._groups: list[int] = []  # which of the user's groups each of the inner one's is
        self._inner = self._make(groups)
        self._written: list[int] = []

    def _make(self, groups: Sequence[set[int]]) -> torch.optim.Optimizer | None:
        """The optimiser over the own pieces; None when there are none."""
        parts = list(zip(self.pieces, self.parts, strict=True))
        owns = [[part for piece, part in parts if piece.slot in slots] for slots in groups]
        self._groups = [index for index, own in enumerate(owns) if own]
        options = [settings(group) for group in self.optimizer.param_groups]
        kept = self.optimizer if isinstance(self.optimizer, Streamed) else None
        made = build(type(kept.inner if kept else self.optimizer).__name__, self.optimizer.defaults, options, owns)
        if made is None:
            return None
        made.state.clear()  # some begin with states; they are taken from the user's
        if kept is None:
            return made
        return kept.over(made, {part: (self.gradients.parameters[piece.slot], piece.start) for piece, part in parts})

    # --- states -----------------------------------------------------------------------------------------------

    def begin(self, ledger: Ledger) -> None:
        super().begin(ledger)
        self._take_over()
        self.note_versions()
        self._remember()

    @torch.no_grad()
    def _take_over(self) -> None:
        """Cut what the user's optimiser holds, from a checkpoint say, to the own pieces, and let it go."""
        for piece, part in zip(self.pieces, self.parts, strict=True):
            parameter = self.gradients.parameters[piece.slot]
            whole = self.optimizer.state.get(parameter)
            if not whole or self._inner is None:
                continue
            self._inner.state[part] = {key: cut(key, value, parameter, piece, part) for key, value in whole.items()}
        self._let_go()

    def _let_go(self) -> None:
        """Of the states that the user's optimiser holds of these parameters."""
        for parameter in self.gradients.parameters:
            self.optimizer.state.pop(parameter, None)

    def states_of(self, trained: Mapping[str, nn.Parameter]) -> Callable[[], StatesAtRest]:
        """Of the own pieces, by the names of their parameters."""
        return lambda: zip(self._names(), self.own_states(), strict=True)

    def _names(self) -> list[str]:
        return [self.gradients.names[piece.slot] for piece in self.pieces]

    def unwatched(self) -> list[tuple[str, Tensor]]:
        """The own pieces of parameters that `watch` does not look after."""
        return [] if self.watches else list(zip(self._names(), self.parts, strict=True))

    def own_states(self) -> list[State]:
        """Of the own pieces, in their order."""
        return [dict(self._inner.state.get(part, {})) if self._inner else {} for part in self.parts]

    def fetch(self) -> None:
        """Called by all workers: on rank 0 the user's optimiser then holds all states, until the next update."""
        self.weights.settle()
        held = self.own_states()
        whole = self.states.gather(self.pieces, self.parts, held)
        if self._inner is not None:
            for part, state in zip(self.parts, held, strict=True):
                if state:
                    self._inner.state[part] = state
        for slot, state in sorted(whole.items()):
            self.optimizer.state[self.gradients.parameters[slot]] = state
        self.rest.follow()

    # --- a step -----------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Find in each step whether the own slices, in memory that workers share, are still as their update left them.

        Of one copy there is nothing to compare with: this is what finds failing memory and strangers' writes."""
        self.watches = self.votes = self.weights.shared
        if self.watches:
            self.gradients.watched = self.parts

    def arrive(self) -> None:
        self._check_written()
        self.weights.arrive()

    def settle(self, number: int) -> None:
        self.weights.settle()

    def check_readable(self) -> None:
        if not self.weights.readable:
            raise UserError(
                "with states = 'zero1', 'zero2' or 'zero3' between hosts, no worker has all weights between two steps: "
                "call worker.settle() on every worker before they are read."
            )

    def leave(self) -> None:
        self.weights.leave()

    def step(self, number: int, figures: StepFigures) -> None:
        self.update()
        self._told.append((number, figures, {}))

    @torch.no_grad()
    def update(self) -> None:
        """Of the own pieces; what others have updated is there after `arrive`."""
        self._let_go()
        unused = set(self.gradients.unused())
        for piece, part in zip(self.pieces, self.parts, strict=True):
            part.grad = None if piece.slot in unused else self._gradient(piece, part)
        if self._inner is not None:
            for group, index in zip(self._inner.param_groups, self._groups, strict=True):
                group.update(settings(self.optimizer.param_groups[index]))
            sgd.update(self._inner)
        for holder in (*self.parts, *self.gradients.parameters):
            holder.grad = None  # the exchange writes the next one over it
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # what schedulers ask for before they step
        self._remember()  # before anybody goes on, and may write
        if not self.publishes_later:
            self.publish()

    def publish(self) -> None:
        self.weights.updated()

    def _gradient(self, piece: Piece, part: Tensor) -> Tensor:
        found = self._slices.piece(piece).view(part.shape)
        return found.to(part.grad_dtype or part.dtype)

    def _remember(self) -> None:
        if self.watches:
            self.gradients.remember()

    def note_versions(self) -> None:
        self._written = [parameter._version for parameter in self.gradients.parameters]

    def _check_written(self) -> None:
        for name, parameter, before in zip(self.gradients.names, self.gradients.parameters, self._written, strict=True):
            if parameter._version != before:
                raise UserError(
                    f"parameter {name!r} was written to between two updates, which workers that share states do "
                    f"together: leave such changes to the optimiser, or use states = 'replicated'."
                )

    def held_bytes(self) -> dict[str, int]:
        """What this worker holds between two steps, by kind, counted: pages that are there, tensors that are allocated.

        Of memory that workers share, its part."""
        return {**self.weights.held_bytes(), **self._slices.held_bytes(), "optimizer": self.state_bytes()}

    def state_bytes(self) -> int:
        return state_bytes(self._inner) if self._inner is not None else 0

    def count_anew(self) -> None:
        self._slices.gauged = True
        self.weights.count_anew()

    def beside_bytes(self) -> int:
        on_heap = self.state_bytes() if self.states.on_heap else 0
        return self.weights.most_bytes() + self._slices.most_sums() + on_heap


def holders(plan: Plan) -> int:
    """How many workers hold all states together once."""
    return (plan.state_group or plan.axes.size("data")) if plan.shards_states else 1


def units(plan: Plan) -> MemoryPlan:
    """The plan's memory, for parameters in fewer bits: with ZeRO-3, they become float32 block by block as they come in,
    whatever blocks are computed again."""
    return replace(plan.memory, blocks=()) if plan.states == "zero3" else plan.memory


def sharing_of(plan: Plan, group: Group) -> Sharing:
    return Sharing(group.world, plan.state_group or group.world)


def sliced_exchange(plan: Plan, group: Group, terms: Terms) -> Exchange:
    """The exchange under which no worker needs the whole gradient."""
    if isinstance(group, HostGroup):
        if terms.device.type != "cpu" and group.world > 1:
            return make_exchange(group, terms)  # which refuses
        return SlicedHeapExchange(group, terms, releases=plan.states != "zero1")
    from shoal.comm.sliced import SlicedExchange
    from shoal.comm.wired import WiredGroup

    if isinstance(group, WiredGroup):
        check_wired(terms)
    if plan.states == "zero3" and terms.device.type != "cpu":
        raise UserError(
            "plan: states = 'zero3' between hosts gives back memory of the processor only so far: use states = 'zero2'."
        )
    return SlicedExchange(cast("LanedGroup", group), terms, sharing_of(plan, group))
