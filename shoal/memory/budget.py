"""A budget of bytes, kept: which ways of keeping activations fit beside all else, found out before the first step."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from torch import nn

from shoal.errors import UserError
from shoal.memory.choose import Candidate, candidates
from shoal.memory.gauge import Gauge
from shoal.memory.meter import sizes_of
from shoal.memory.recompute import Block
from shoal.memory.rehearsal import Loss, rehearse
from shoal.memory.shortage import is_shortage
from shoal.memory.store import Store
from shoal.memory.survey import survey
from shoal.memory.table import Table
from shoal.recipe.memory_plan import CHEAP, size_text

STREAMED_BYTES = 16 << 20  # what states that are elsewhere take of memory while they are updated, at most
Agree = Callable[[int], int]  # the largest of all workers' numbers


@dataclass(frozen=True, kw_only=True)
class Need:
    """What fills a worker's memory at the peak of a step, in bytes."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    checkpoint: int = 0  # a copy that is written behind the training
    data: int = 0  # batches that are ready
    update: int = 0  # what the update takes while it runs: activations are gone by then
    activations: int = 0

    @property
    def held(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.checkpoint + self.data

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
    loss: Loss,
    gauge: Gauge,
    need: Need,
    budget: int,
    *,
    one_pass: bool,
    agree: Agree,
    where: str,
    micro_batches: int,
    together: Callable[[Table], Table] | None = None,
) -> Chosen:
    """Set the blocks to the cheapest ways whose peak is below ``budget`` bytes, on this worker and on all others.

    ``loss``: the forward pass of one micro-batch of the usual size. ``need``: all but activations. ``one_pass``: a step
    has one micro-batch on this worker, so that gradients come while activations go. A table of what blocks keep says
    what cannot fit; the others are tried, the cheapest first, until one is measured to fit.
    ``together``: where several workers make a pass together, the one table that all of them go by.
    Called by all workers. Raises UserError when nothing fits: what fills the memory, and the smallest change."""

    shared = need.gradients if one_pass else 0  # of what a rehearsal takes

    def with_activations(taken: int) -> Need:
        return replace(need, activations=max(0, taken - shared))

    def fits(taken: Need | None) -> bool:
        return agree(int(taken is None or taken.peak > budget)) == 0

    if not ways.blocks:
        taken = with_activations(rehearse(module, loss, gauge, keep_gradients=one_pass))
        if fits(taken):
            return Chosen(taken, {})
        raise _too_small(budget, taken, where, micro_batches)
    table = survey(module, ways.blocks, loss, gauge)
    table = together(table) if together is not None else table
    moved, found, least = sum(block.inputs for block in table.blocks), candidates(table), need
    for candidate in found:
        if not fits(with_activations(candidate.least)) and candidate not in found[-2:]:
            continue
        if agree(int(not ways.take(candidate, moved))):
            continue
        alone = together is None
        most = tried(module, loss, gauge, one_pass) if alone else rehearse(module, loss, gauge, keep_gradients=one_pass)
        if fits(None if most is None else with_activations(most)):
            assert most is not None
            return Chosen(with_activations(most), candidate.told(), tuple(found[found.index(candidate) + 1 :]))
        now = with_activations(candidate.least if most is None else most)
        varies = "away" in candidate.ways  # by what is on its way to disk at the time: no advice can count on it
        if least is need or (now.peak < least.peak and not varies):
            least = now
    raise _too_small(budget, least, where, micro_batches)


def tried(module: nn.Module, loss: Loss, gauge: Gauge, keep_gradients: bool = False) -> int | None:
    """As `rehearse`; None where the memory does not suffice for it."""
    try:
        return rehearse(module, loss, gauge, keep_gradients=keep_gradients)
    except Exception as error:
        if not is_shortage(error):
            raise
        return None


def _too_small(budget: int, need: Need, where: str, micro_batches: int) -> UserError:
    changes = [f"memory.peak_bytes = {size_text(need.peak)!r}"]
    room = budget - need.held
    if need.optimizer and need.peak - need.optimizer + STREAMED_BYTES <= budget:
        changes.append("memory.offload_optimizer = 'disk'")
    if need.update <= room and 0 < room < need.activations:
        parts = -(-need.activations // room)
        more = micro_batches * (1 << (parts - 1).bit_length())  # a power of 2 divides most batches
        changes.append(f"micro_batches = {more} in the recipe (now {micro_batches})")
    return UserError(
        f"plan: memory.peak_bytes = {size_text(budget)!r} is too small on {where}, where at the least there are "
        f"{need.told()}: set {', or '.join(changes)}."
    )


def weight_bytes(module: nn.Module) -> int:
    """Of parameters and buffers; tied ones count once."""
    return sum(sizes_of((*module.parameters(), *module.buffers())).values())


def mebibytes(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB" if count < 10 << 20 else f"{count / (1 << 20):.0f} MiB"
