"""The smallest parts of a model between which a cut makes sense."""

from dataclasses import dataclass
from itertools import pairwise

from shoal.parallel.partition.line import Line


@dataclass(frozen=True)
class Piece:
    """What stands between two places for a cut."""

    name: str  # the layer or parameter that it begins with
    seconds: float  # of a forward and a backward pass with the example; where no clock ran, operations / 1e9
    parameter_bytes: int  # a parameter that several pieces use counts in each
    activation_bytes: int  # kept from the forward to the backward pass, parameters left out
    output_bytes: int  # what crosses a cut after it; of the last piece: 0


def starts(line: Line) -> tuple[int, ...]:
    """The place at which each piece begins; the first is 0.

    Every piece uses parameters. Between one node that does and the next, the place that the fewest bytes cross is taken
    (the last of equals), so that a cut does not tear a residual stream where one step on it is whole."""
    found = [0]
    using = [place for place, node in enumerate(line.nodes) if line.state(node)]
    for before, after in pairwise(using):
        places = [place for place in range(before + 1, after + 1) if place not in line.forbidden]
        if places:
            found.append(
                min(reversed(places), key=lambda place: (line.crossing_bytes(place), len(line.crossing(place))))
            )
    return tuple(found)


def names(line: Line, begins: tuple[int, ...]) -> tuple[str, ...]:
    """A name for each piece: of the first module that it calls whole, or else of the first parameter that it uses."""
    ends = (*begins[1:], len(line.nodes))
    return tuple(_name(line, first, last) for first, last in zip(begins, ends, strict=True))


def weigh(line: Line) -> tuple[Piece, ...]:
    """The pieces by what is known without an example: the parameters alone, one operation each."""
    begins = starts(line)
    parameters = dict(line.model.named_parameters())
    found = []
    for name, first, last in zip(names(line, begins), begins, (*begins[1:], len(line.nodes)), strict=True):
        used = {name: parameters[name] for node in line.nodes[first:last] for name in line.state(node)}.values()
        size = sum(p.numel() * p.element_size() for p in used)
        found.append(Piece(name, sum(p.numel() for p in used) / 1e9, size, 0, len(line.crossing(last))))
    return tuple(found)


def _name(line: Line, first: int, last: int) -> str:
    for node in line.nodes[first:last]:
        used = line.state(node)
        if used:
            return str(node.target) if node.op == "call_module" else used[0]
    return "all"
