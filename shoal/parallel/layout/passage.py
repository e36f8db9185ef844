"""What a layer with a cut weight does with what comes in and what goes out, forward and backward. Plain tables.

Activations lie *whole* on every worker of the axis, or cut by *features* (channels, heads, ...), or cut by *positions*
of the sequence. A weight is *whole*, or cut by its outputs ("out": Megatron's column split) or by its inputs ("in": its
row split; Shoeybi et al., 2019). A layer whose weight is whole does the same work on all workers."""

from dataclasses import dataclass
from typing import Literal

Lie = Literal["whole", "features", "positions"]
Cut = Literal["whole", "out", "in"]
Operation = Literal["", "take", "all-gather", "reduce-scatter", "all-reduce"]
# "": nothing. "take": each keeps its part, nothing is sent. The others as everybody calls them.


@dataclass(frozen=True)
class Passage:
    forward: Operation = ""  # on values
    backward: Operation = ""  # on their gradients
    along: Lie = "whole"  # what is cut or joined: "features" or "positions"


NOTHING = Passage()
ARRIVALS: dict[tuple[Lie, Cut], Passage] = {  # how the input lies, how the weight is cut
    ("whole", "whole"): NOTHING,
    ("whole", "out"): Passage("", "all-reduce"),  # each worker has the gradient of its outputs only
    ("whole", "in"): Passage("take", "all-gather", "features"),
    ("features", "in"): NOTHING,
    ("features", "whole"): Passage("all-gather", "take", "features"),
    ("features", "out"): Passage("all-gather", "reduce-scatter", "features"),
    ("positions", "whole"): NOTHING,  # the gradient of the weight is summed over the workers instead
    ("positions", "out"): Passage("all-gather", "reduce-scatter", "positions"),
}
DEPARTURES: dict[tuple[Cut, Lie], Passage] = {  # how the weight is cut, how the output shall lie
    ("whole", "whole"): NOTHING,
    ("whole", "features"): Passage("take", "all-gather", "features"),
    ("whole", "positions"): Passage("take", "all-gather", "positions"),
    ("out", "features"): NOTHING,
    ("out", "whole"): Passage("all-gather", "take", "features"),
    ("in", "whole"): Passage("all-reduce", ""),
    ("in", "features"): Passage("reduce-scatter", "all-gather", "features"),
    ("in", "positions"): Passage("reduce-scatter", "all-gather", "positions"),
}


@dataclass(frozen=True)
class Flow:
    """How one layer's weight is cut, how its input arrives and how its output leaves."""

    cut: Cut
    arrives: Lie
    leaves: Lie

    @property
    def possible(self) -> bool:
        return (self.arrives, self.cut) in ARRIVALS and (self.cut, self.leaves) in DEPARTURES

    @property
    def partial(self) -> bool:
        """Each worker sees other positions, so that its gradient of a whole weight is a part of the sum."""
        return self.cut == "whole" and self.arrives == self.leaves == "positions"

    @property
    def arrival(self) -> Passage:
        if self.cut == "whole" and self.arrives == "positions" and self.leaves != "positions":
            return Passage("all-gather", "take", "positions")
        return ARRIVALS[self.arrives, self.cut]

    @property
    def departure(self) -> Passage:
        return NOTHING if self.partial else DEPARTURES[self.cut, self.leaves]
