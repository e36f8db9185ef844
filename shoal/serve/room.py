"""How much may be open where answers have to come within a time, as a decision only.

What comes while a batch runs goes with the next one, together with all that comes until that begins: its answer takes
what is left of the one batch and the whole of the other. Who takes all comers until the time is full gets batches of
half of it, and small batches cost goodput. So the more is asked for each answer that there is, the later in a batch the
door opens, and the larger the next one may be: of ``load`` times as many requests as answers, those of the last
1 / (1 + load) of the time are enough to fill the rest of it.
"""

import math
from dataclasses import dataclass

MARGIN = 0.85  # of the time that work may fill: the rest is for the way to it and back, and for slower batches
PROMISED = 0.95  # of the time, after which whoever has been taken is refused after all: the rest is for the way back
RESERVED = 0.125  # of that, for clients with less than their share while others have more
MOST_LOAD = 6.0  # beyond, the door would open for too short a time
CLOSING = 0.03  # of the time: who comes so shortly before a batch ends may miss the next one
ROUNDING = 1e-9


@dataclass(frozen=True)
class Ahead:
    """What one who comes finds at a model process, in seconds as far as they can be foretold."""

    works: bool  # on something
    left_s: float  # of that
    waiting_s: float  # what waits behind it takes
    with_it_s: float  # and together with the one who comes
    own_s: float  # he alone
    full_s: float  # the largest batch


@dataclass
class Room:
    """Of all processes that serve one version of the weights."""

    within_s: float
    load: float = 1.0  # requests that come for each that is answered, of late
    _came: int = 0

    def came(self) -> None:
        self._came += 1

    def answered(self, requests: int) -> None:
        """A batch of so many."""
        self.load += 0.25 * (max(1.0, min(MOST_LOAD, self._came / requests)) - self.load)
        self._came = 0

    def most_s(self, several: bool, has_its_share: bool) -> float:
        """Until the answer of one who is taken. ``several``: clients; then some room is open at any time to those that
        have less than their share."""
        return MARGIN * self.within_s * (1 - RESERVED if several and has_its_share else 1.0)

    def ends_s(self, ahead: Ahead, most_s: float, several: bool) -> float:
        """Until the answer of one who comes now, if the batch that he goes with becomes as large as it may.

        0.0 where nothing is ahead of him: he is taken in any case, for a process that was slow once could not show
        otherwise that it is fast again."""
        if not ahead.works and not ahead.waiting_s:
            return 0.0
        load = 1.0 if several else self.load
        turn_s = min(ahead.full_s, most_s * load / (1 + load))  # of the batch that it goes with, when that leaves
        misses_next = ahead.works and ahead.left_s < CLOSING * self.within_s
        turns = max(0, math.ceil(ahead.with_it_s / turn_s - ROUNDING) - 1)  # before the one that it goes with
        before_s = ahead.waiting_s if misses_next else turns * turn_s
        return ahead.left_s + before_s + max(turn_s, ahead.own_s)
