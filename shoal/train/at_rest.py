"""Bits that flip in an optimiser's states, or in parameters that nobody else has, while nobody should write to them.

After an update a worker takes checksums of what it alone answers for, and before the next one compares. What torch
itself writes in between counts a tensor's version up, so that a loaded state is no fault; a flipped bit does not. Small
states are watched in every step; of larger ones a part in turn, each at least once in `EVERY` steps."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from shoal.errors import RunFailed
from shoal.train.checksum import parameter_checksum

StatesAtRest = Iterable[tuple[str, Mapping[str, Any]]]  # of parameters, by name
EVERY = 50  # steps in which everything has been watched once
WATCHED_BYTES, WATCHED_TENSORS = 1 << 20, 32  # of one step, where that is enough for everything in `EVERY` steps


class Corrupt(RunFailed):
    """Memory of this worker has changed by itself. Nothing has been updated with it; others know nothing of it."""

    def __init__(self, rank: int, step: int, what: str) -> None:
        self.ranks = (rank,)
        super().__init__(
            f"rank {rank}: bits of {what} have changed between the updates of steps {step - 1} and {step}, and nobody "
            f"has written to it: the memory of that worker cannot be trusted"
        )


class _Sight(NamedTuple):
    place: int  # among all that can be watched
    what: str
    tensor: Tensor
    version: int
    checksum: float


class AtRest:
    """Of one worker. ``states``: its parameters' names and states; ``parameters``, or parts of these: those that are
    watched too, by name."""

    def __init__(self, states: Callable[[], StatesAtRest], parameters: Iterable[tuple[str, Tensor]] = ()) -> None:
        self._states, self._parameters = states, list(parameters)
        self._seen: list[_Sight] = []

    def _all(self) -> Iterator[tuple[str, Tensor]]:
        for name, state in self._states():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    yield f"the optimiser's {key!r} of parameter {name!r}", value
        for name, parameter in self._parameters:
            yield f"parameter {name!r}", parameter.detach()

    def keep(self, step: int) -> None:
        """Right after the update of ``step``."""
        everything = list(self._all())
        size = sum(tensor.nbytes for _, tensor in everything)
        parts = max(1, min(EVERY, max(size // WATCHED_BYTES, len(everything) // WATCHED_TENSORS)))
        chosen = list(enumerate(everything))[step % parts :: parts]
        self._seen = [_Sight(place, what, t, t._version, parameter_checksum([t])) for place, (what, t) in chosen]

    def follow(self) -> None:
        """States have been moved, bit by bit, to other memory: from now on that is watched, and the old one let go."""
        if not self._seen:
            return
        now = [tensor for _, tensor in self._all()]
        for number, seen in enumerate(self._seen):
            tensor = now[seen.place]
            if tensor.data_ptr() != seen.tensor.data_ptr() and seen.tensor._version == seen.version:
                self._seen[number] = seen._replace(tensor=tensor, version=tensor._version)

    def check(self, rank: int, step: int) -> None:
        """Right before the update of ``step``. Raises Corrupt."""
        for _, what, tensor, version, checksum in self._seen:
            if tensor._version == version and parameter_checksum([tensor]) != checksum:
                raise Corrupt(rank, step, what)
        self._seen = []
