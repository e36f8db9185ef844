"""How much may be open where answers have to come within a time, as a decision only.

What comes while a batch runs goes with the next one, together with all that comes until that begins: its answer takes
what is left of the one batch and the whole of the other. Who takes all comers until the time is full gets batches of
half of it, and small batches cost goodput. So the more is asked for each answer that there is, the later in a batch the
door opens, and the larger the next one may be: of ``load`` times as many requests as answers, those of the last
1 / (1 + load) of the time are enough to fill the rest of it.
"""

from dataclasses import dataclass

MARGIN = 0.85  # of the time that work may fill: the rest is for the way to it and back, and for slower batches
RESERVED = 0.125  # of that, for clients with less than their share while others have more
MOST_LOAD = 6.0  # beyond, the door would open for too short a time
CLOSING = 0.03  # of the time: who comes so shortly before a batch ends may miss the next one


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
        if requests:
            self.load += 0.25 * (max(1.0, min(MOST_LOAD, self._came / requests)) - self.load)
            self._came = 0

    def takes(self, left_s: float, waiting_s: float, full_s: float, several: bool, has_its_share: bool) -> bool:
        """One more, where ``left_s`` of the running batch is left (0.0: none runs) and ``waiting_s`` of work waits.

        ``full_s``: what the largest batch takes; 0.0 before one has been timed, and then nobody is refused.
        ``several``: clients; then some room is open at any time to those that have less than their share."""
        most_s = MARGIN * self.within_s * (1 - RESERVED if several and has_its_share else 1.0)
        load = 1.0 if several else self.load
        turn_s = min(full_s, most_s * load / (1 + load))  # of the batch that it goes with, when that leaves
        if not turn_s:
            return True
        misses_next = 0.0 < left_s < CLOSING * self.within_s
        ahead_s = waiting_s if misses_next else waiting_s // turn_s * turn_s
        return left_s + ahead_s + turn_s <= most_s
