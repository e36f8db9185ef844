"""A budget of bytes, kept: which ways of keeping activations fit beside all else, found out before the first step."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from torch import nn

from shoal.errors import UserError
from shoal.memory.choose import Candidate, candidates
from shoal.memory.gauge import Gauge
from shoal.memory.meter import sizes_of
from shoal.memory.recompute import Block
from shoal.memory.rehearsal import Passes, rehearse
from shoal.memory.shortage import is_shortage
from shoal.memory.store import Store
from shoal.memory.survey import survey
from shoal.memory.table import Table
from shoal.recipe.memory_plan import CHEAP, size_text

STREAMED_BYTES = 16 << 20  # what states that are elsewhere take of memory while they are updated, at most


@dataclass(frozen=True, kw_only=True)
class Need:
    """What fills a worker's memory at the peak of a step, in bytes."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    checkpoint: int = 0  # a copy that is written behind the training
    data: int = 0  # batches that are ready
    messages: int = 0  # to other stages, that they may not have taken yet
    update: int = 0  # what the update takes while it runs: activations are gone by then
    activations: int = 0

    @property
    def held(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.checkpoint + self.data + self.messages

    @property
    def peak(self) -> int:
        return self.held + max(self.activations, self.update)

    def told(self) -> str:
        """In one line, the largest first."""
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimiser states": self.optimizer,
            "activations": self.activations,
            "a checkpoint's copy": self.checkpoint,
            "batches": self.data,
            "messages to other stages": self.messages,
            "the update itself": self.update if self.update > self.activations else 0,
        }
        order = sorted(parts.items(), key=lambda part: -part[1])
        return ", ".join(f"{name} {mebibytes(count)}" for name, count in order if count)

    def fields(self) -> dict[str, int]:
        """For the event log."""
        return {**asdict(self), "peak": self.peak}


@dataclass(frozen=True)
class Chosen:
    need: Need
    ways: dict[str, int]  # way -> blocks
    smaller: tuple[Candidate, ...] = ()  # what might still be tried


class Alone:
    """What a worker must agree on with others, where there are none."""

    apart = True  # no other worker takes part in its passes

    def alike(self, number: int) -> int:
        """The largest of the numbers of the workers that choose the same ways as this one, this one among them."""
        return number

    def everywhere(self, number: int) -> int:
        """The largest of all workers' numbers."""
        return number

    def table(self, table: Table) -> Table:
        """The one that all who choose the same ways go by."""
        return table

    def message_bytes(self, table: Table) -> int:
        """Of what goes to other stages: what they may not have taken yet while this worker goes on."""
        return 0

    def refusal(self, peak: int, said: str) -> str:
        """What the worker with the largest peak says."""
        return said


class Ways:
    """The blocks of a model, to be set to what a candidate says."""

    def __init__(self, blocks: Sequence[Block], here: Store, away: Callable[[int], Store | None]) -> None:
        """``away`` makes the store of what is moved, so many bytes; None where there is no room for them."""
        self.blocks, self._here, self._make_away = blocks, here, away
        self._away: Store | None = None

    def take(self, candidate: Candidate, moved: int) -> bool:
        """Whether it can be: what moves away needs a place for ``moved`` bytes."""
        if "away" in candidate.ways and self._away is None:
            self._away = self._make_away(moved)
            if self._away is None:
                return False
        for block, way in zip(self.blocks, candidate.ways, strict=True):
            store = self._away if way == "away" else self._here
            assert store is not None
            block.store = store
            block.mode = "none" if way == "plain" else "selective" if way == "selective" else "full"
            block.dropped = frozenset(CHEAP) if way == "selective" else frozenset()
        return True


def keep_budget(
    module: nn.Module,
    ways: Ways,
    passes: Passes,
    gauge: Gauge,
    need: Need,
    budget: int,
    *,
    once: Passes | None = None,
    shared: int = 0,
    crew: Alone | None = None,
    where: str,
    micro_batches: tuple[int, ...],
) -> Chosen:
    """Set the blocks to the cheapest ways whose peak is below ``budget`` bytes, on this worker and on all others.

    ``passes``: those of a step between two of which memory is given back: one micro-batch of the usual size, or all of
    a pipeline; ``once``: of one micro-batch, where they are more. ``need``: all but activations; ``shared``: bytes of
    it that the passes take, gradients that come while activations go. A table of what blocks keep says what cannot
    fit; the others are tried, the cheapest first, until one is measured to fit. Stages of a pipeline choose each for
    itself, and try at the same time. ``micro_batches`` of a shard: how many now, and
    which larger numbers can be and would be a help.
    Called by all workers. Raises UserError when nothing fits: what fills the memory, and the smallest change."""
    crew = crew or Alone()

    def with_activations(taken: int) -> Need:
        return replace(need, activations=max(0, taken - shared))

    def rehearsed() -> Need | None:
        measure = tried if crew.apart else rehearse
        most = measure(module, passes, gauge, keep_gradients=shared > 0)
        return None if most is None else with_activations(most)

    def fits(taken: Need | None) -> bool:
        return crew.alike(int(taken is None or taken.peak > budget)) == 0

    table = crew.table(survey(module, ways.blocks, once or passes, gauge)) if ways.blocks else None
    need = replace(need, messages=crew.message_bytes(table)) if table else need
    found = candidates(table) if table else [Candidate(ways=(), least=0, work=0.0)]
    moved = sum(block.inputs * table.most_flights(block.chunk) for block in table.blocks) if table else 0
    may = [fits(with_activations(each.least)) or each in found[-2:] for each in found]
    least, taken = need, need
    place, settled = -1, False
    while True:
        while not settled and place < len(found):
            place += 1
            if place < len(found) and may[place] and crew.alike(int(not ways.take(found[place], moved))) == 0:
                break
        tries = place < len(found)
        if crew.everywhere(int(tries and not settled)) == 0:
            break  # all have settled, or have nothing left to try
        most = rehearsed()
        if tries:
            settled = fits(most)
            taken = most or with_activations(found[place].least)
            varies = "away" in found[place].ways  # by what is on its way to disk at the time: no advice counts on it
            if least is need or (taken.peak < least.peak and not varies):
                least = taken
    if crew.everywhere(int(not settled)):
        raise UserError(crew.refusal(least.peak, _too_small(budget, least, where, micro_batches)))
    return Chosen(taken, found[place].told(), tuple(found[place + 1 :]))


def tried(module: nn.Module, passes: Passes, gauge: Gauge, keep_gradients: bool = False) -> int | None:
    """As `rehearse`; None where the memory does not suffice for it."""
    try:
        return rehearse(module, passes, gauge, keep_gradients=keep_gradients)
    except Exception as error:
        if not is_shortage(error):
            raise
        return None


def _too_small(budget: int, need: Need, where: str, micro_batches: tuple[int, ...]) -> str:
    changes = [f"memory.peak_bytes = {size_text(need.peak + need.messages)!r}"]  # messages come when they come
    room = budget - need.held
    if need.optimizer and need.peak - need.optimizer + STREAMED_BYTES <= budget:
        changes.append("memory.offload_optimizer = 'disk'")
    if need.update <= room and 0 < room < need.activations:
        now = micro_batches[0]
        enough = [more for more in micro_batches if room * more >= need.activations * now]
        changes += [f"micro_batches = {more} in the recipe (now {now})" for more in enough[:1]]
    return (
        f"plan: memory.peak_bytes = {size_text(budget)!r} is too small on {where}, where at the least there are "
        f"{need.told()}: set {', or '.join(changes)}."
    )


def weight_bytes(module: nn.Module) -> int:
    """Of parameters and buffers; tied ones count once."""
    return sum(sizes_of((*module.parameters(), *module.buffers())).values())


def mebibytes(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB" if count < 10 << 20 else f"{count / (1 << 20):.0f} MiB"
