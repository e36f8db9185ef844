"""Sharded states of all sets of gradients that a worker has: of a model, of each chunk of a pipeline, of experts."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from shoal.comm.group import HostGroup
from shoal.comm.shared_weights import SharedWeights
from shoal.comm.sliced_heap import SlicedHeapExchange
from shoal.comm.slices import pieces_of
from shoal.comm.staged_lane import StagedLane
from shoal.data.ledger import Ledger
from shoal.memory.streamed import Streamed
from shoal.parallel.held import Held, Share
from shoal.train.at_rest import StatesAtRest
from shoal.train.figures import StepFigures
from shoal.train.gradients import Gradients
from shoal.train.sent_states import SentStates
from shoal.train.sharded_states import Sharded, sharing_of
from shoal.train.state_gathering import HostStates
from shoal.train.synchrony import Everywhere

if TYPE_CHECKING:
    from shoal.comm.lanes import LanedGroup
    from shoal.comm.sliced import SlicedExchange


class ShardedSets(Everywhere):
    """One update made of those of each set, for which every worker calls them in one order."""

    def __init__(self, held: Held, optimizer: torch.optim.Optimizer, sets: Sequence[Sharded]) -> None:
        super().__init__(optimizer, held.pipeline)
        self.sets = sets
        self.equal = all(each.equal for each in sets)

    def check_readable(self) -> None:
        for each in self.sets:
            each.check_readable()

    def begin(self, ledger: Ledger) -> None:
        super().begin(ledger)
        for each in self.sets:
            each.begin(ledger)

    def arrive(self) -> None:
        for each in self.sets:
            each.arrive()

    def settle(self, number: int) -> None:
        for each in self.sets:
            each.settle(number)

    def fetch(self) -> None:
        for each in self.sets:
            each.fetch()
        self.rest.follow()

    def leave(self) -> None:
        for each in self.sets:
            each.leave()

    def step(self, number: int, figures: StepFigures) -> None:
        for each in self.sets:
            each.update()
        if self._pipeline is not None:
            if self._pipeline.ties.users:
                self.arrive()
            self._pipeline.share_tied()
            for each in self.sets:
                each.note_versions()
        self._told.append((number, figures, {}))

    def states_of(self, trained: Mapping[str, nn.Parameter]) -> Callable[[], StatesAtRest]:
        found = [each.states_of(trained) for each in self.sets]
        return lambda: chain.from_iterable(states() for states in found)

    def unwatched(self) -> list[tuple[str, Tensor]]:
        return [part for each in self.sets for part in each.unwatched()]

    def state_bytes(self) -> int:
        return sum(each.state_bytes() for each in self.sets)

    def count_anew(self) -> None:
        for each in self.sets:
            each.count_anew()

    def beside_bytes(self) -> int:
        return sum(each.beside_bytes() for each in self.sets)

    def held_bytes(self) -> dict[str, int]:
        """See `Sharded`: of all sets together."""
        found: dict[str, int] = {}
        for each in self.sets:
            for kind, count in each.held_bytes().items():
                found[kind] = found.get(kind, 0) + count
        return found


def sharded(held: Held, sets: Sequence[Gradients], optimizer: torch.optim.Optimizer) -> Sharded | ShardedSets:
    """The update for ``plan.states``. Called by all workers, once the weights are those that training starts from.

    ``sets``: those of ``held.shares``."""
    made = [_of_set(held, share, each, sets, optimizer) for share, each in zip(held.shares, sets, strict=True)]
    if len(made) == 1 and held.pipeline is None:
        if held.group.world > 1:
            made[0].watch()
        return made[0]
    return ShardedSets(held, optimizer, made)


def _of_set(
    held: Held, share: Share, gradients: Gradients, sets: Sequence[Gradients], optimizer: torch.optim.Optimizer
) -> Sharded:
    plan, group = held.plan, share.group
    layout, parameters, exchange = gradients.layout, gradients.parameters, gradients.exchange
    sharing = sharing_of(plan, group)
    pieces = pieces_of(layout, sharing.slices(group.rank))
    among = group if sharing.members == group.world else group.split(sharing.groups())
    shelf = optimizer.elsewhere if isinstance(optimizer, Streamed) else None
    if isinstance(among, HostGroup):
        fewest = min(held.shares, key=lambda each: len(each.axes))  # its workers have the same of every tensor
        takes = plan.states == "zero3" and share is fewest
        frozen = [p for p in held.module.parameters() if not p.requires_grad] if takes else []
        shared = held.shared or SharedWeights(among, layout, parameters, frozen)
        assert isinstance(exchange, SlicedHeapExchange)
        exchange.on_release = gradients.let_go
        states = (
            HostStates(among, layout, parameters)
            if shelf is None
            else SentStates(among, StagedLane(among), layout, parameters, sharing, shelf)
        )
        return Sharded(gradients, optimizer, shared, states, pieces, exchange)
    from shoal.comm.gathered_weights import GatheredWeights
    from shoal.comm.sliced import SlicedExchange
    from shoal.train.gathering import BlockWeights
    from shoal.train.stage_gathering import StageWeights

    assert isinstance(exchange, SlicedExchange)
    laned = cast("LanedGroup", among)
    gathered = GatheredWeights(laned, group.rank, sharing, layout, parameters, exchange.count_gather)
    releases = plan.states == "zero3"
    weights: StageWeights | BlockWeights
    if held.pipeline is not None:
        weights = StageWeights(gathered, len(layout.buckets), releases=releases)
    else:
        ranks = sharing.groups()[group.rank // sharing.members]
        passes = _passes(held, share, exchange, sets, ranks)
        weights = BlockWeights(gathered, held.module, layout, passes, releases=releases)
    exchange.before_finish = weights.complete
    sent = SentStates(laned, laned.lane(shared=True), layout, parameters, sharing, shelf)
    return Sharded(gradients, optimizer, weights, sent, pieces, exchange)


def _passes(
    held: Held, share: Share, exchange: "SlicedExchange", sets: Sequence[Gradients], ranks: Sequence[int]
) -> Callable[[], tuple[int, int]]:
    """Of the model in a step: how many this worker makes, and the most that one of those that share parameters does.

    With experts, workers pass together, and some without samples of their own: the experts' own exchange counts."""
    from shoal.comm.sliced import SlicedExchange

    if held.experts is not None:
        own = next((g.exchange for s, g in zip(held.shares, sets, strict=True) if "expert" not in s.axes), None)
        if isinstance(own, SlicedExchange):
            row, counted = held.coordinates.get("data", 0), own
            return lambda: (counted.passes[row], max(counted.passes))
    return lambda: (exchange.most_passes([share.group.rank]), exchange.most_passes(ranks))
