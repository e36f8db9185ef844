"""Cuts any model into the chunks of a pipeline."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from shoal.errors import UserError
from shoal.parallel.partition.arguments import Example
from shoal.parallel.partition.balance import balance
from shoal.parallel.partition.check import check
from shoal.parallel.partition.chunks import Chunks
from shoal.parallel.partition.line import Line
from shoal.parallel.partition.measure import price
from shoal.parallel.partition.named_cuts import named
from shoal.parallel.partition.pieces import Piece, starts, weigh
from shoal.parallel.partition.recording import record
from shoal.parallel.partition.splitting import split


def cut(
    model: nn.Module,
    count: int,
    *,
    example: Example = None,
    cuts: Sequence[str] = (),
    at: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    speeds: Sequence[float] | None = None,
) -> Chunks:
    """``model`` in ``count`` chunks, which compute what it computes, bit for bit, with its own modules and parameters.

    ``example``: positional or named arguments of a forward pass, of a whole micro-batch; without it only a forward that
    does not branch on its input can be followed, and pieces weigh what their parameters weigh.
    ``cuts``: names of modules at which a new chunk begins, count - 1 in the order of the forward pass; or ``at``:
    numbers of the pieces at which one begins, from ``balance(pieces(...))``, for what was measured on one worker.
    Without either the slowest chunk is made as fast as it can be: ``weights`` are the seconds of each piece, by default
    its operations, counted on the example; ``speeds`` those of the chunks' devices.

    Raises UserError when a cut names no module or a place where none can be, when there are more chunks than pieces,
    when the model's forward cannot be followed, and when the chunks give another output for the example."""
    line = Line(record(model, example))
    begins = starts(line)
    if len(begins) < count and not cuts:
        kept = "; ".join(f"{kind}: {why}" for kind, why in line.recording.whole.items())
        raise UserError(
            f"a {type(model).__name__} has {len(begins)} pieces, too few for {count} chunks: take at most {len(begins)}"
            f" (pipeline workers x chunks of each){f'. Kept whole are parts ({kept})' if kept else ''}."
        )
    if cuts:
        places = named(line, count, cuts)
    else:
        table = at if at is not None else balance(_weighed(line, example, weights), count, speeds=speeds)
        if len(table) != count - 1 or list(table) != sorted(set(table) & set(range(1, len(begins)))):
            last = len(begins) - 1
            raise UserError(f"at = {list(table)}: {count} chunks need {count - 1} increasing numbers from 1 to {last}.")
        places = tuple(begins[number] for number in table)
    made = split(line, places)
    if example is not None:
        check(model, made, example)
    return made


def _weighed(line: Line, example: Example, weights: Sequence[float] | None) -> Sequence[Piece]:
    table = weigh(line) if example is None else price(line, example, runs=0)
    if weights is None:
        return table
    if len(weights) != len(table):
        raise UserError(f"{len(weights)} weights are given for the model's {len(table)} pieces: give one for each.")
    return [replace(piece, seconds=weight) for piece, weight in zip(table, weights, strict=True)]
