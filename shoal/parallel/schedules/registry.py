"""Schedules by name."""

from collections.abc import Callable
from dataclasses import dataclass

from shoal.errors import UserError, unknown_name
from shoal.parallel.schedules import many_chunks, one_chunk, v_shape
from shoal.parallel.schedules.csv_file import read_csv
from shoal.parallel.schedules.schedule import Schedule


@dataclass(frozen=True)
class Maker:
    about: str
    make: Callable[[int, int, int], Schedule]  # workers, micro-batches, chunks of each worker
    chunks: int | None = None  # the number it always has; None takes any


def _alone(make: Callable[[int, int], Schedule]) -> Callable[[int, int, int], Schedule]:
    return lambda workers, micro_batches, _: make(workers, micro_batches)


MAKERS = {
    "off": Maker("a plain split into layers: to see the idle time", _alone(one_chunk.off), 1),
    "gpipe": Maker("all forward passes, then all backward ones", _alone(one_chunk.gpipe), 1),
    "1f1b": Maker("GPipe's bubble, memory for p micro-batches", _alone(one_chunk.one_forward_one_backward), 1),
    "interleaved": Maker("1F1B over several chunks a worker: a smaller bubble, more sends", many_chunks.interleaved),
    "breadth-first": Maker("chunk after chunk: sends spread out, most memory", many_chunks.breadth_first),
    "zb-h1": Maker("weight gradients fill gaps: a third of 1F1B's bubble", _alone(one_chunk.zero_bubble_h1), 1),
    "zb-h2": Maker("no gaps inside of a worker's step, twice the memory", _alone(one_chunk.zero_bubble_h2), 1),
    "zb-v": Maker("no gaps inside of a worker's step, 1F1B's memory", _alone(v_shape.zero_bubble_v), 2),
    "dualpipe-v": Maker("forward beside backward passes, over a V", _alone(v_shape.dual_pipe_v), 2),
}


def make_schedule(name: str, workers: int, micro_batches: int, chunks: int = 1) -> Schedule:
    """The schedule ``name``, or the CSV file of that name, for a pipe of ``workers``.

    ``chunks`` is of each worker; 1 also means: as many as the schedule has. Raises UserError for an unknown name, for
    numbers that do not fit, and for a file that cannot be read."""
    if workers < 1 or micro_batches < 1 or chunks < 1:
        raise UserError(
            f"schedule {name!r}: workers, micro-batches and chunks must be at least 1, "
            f"got {workers}, {micro_batches} and {chunks}."
        )
    if name.endswith(".csv"):
        return _from_file(name, workers, micro_batches, chunks)
    if name not in MAKERS:
        raise unknown_name("schedule", name, MAKERS, "plan.pipeline.schedule")
    maker = MAKERS[name]
    if maker.chunks and chunks not in (1, maker.chunks):
        has = "1 chunk" if maker.chunks == 1 else f"{maker.chunks} chunks"
        raise UserError(
            f"schedule {name!r} has {has} a worker, not {chunks}: leave pipeline.chunks out, "
            f"or use 'interleaved' or 'breadth-first'."
        )
    return maker.make(workers, micro_batches, maker.chunks or chunks)


def _from_file(name: str, workers: int, micro_batches: int, chunks: int) -> Schedule:
    found = read_csv(name)
    if found.workers != workers:
        raise UserError(
            f"schedule {name!r} has a row for each of {found.workers} workers, and the pipe has {workers}: "
            f"use mesh axis pipe = {found.workers}, or write {workers} rows."
        )
    if found.micro_batches != micro_batches:
        raise UserError(
            f"schedule {name!r} is for {found.micro_batches} micro-batches, and a replica's step has {micro_batches}: "
            f"write passes for all of them and for no more."
        )
    if chunks != 1 and found.chunks != chunks * workers:
        raise UserError(
            f"schedule {name!r} has {found.chunks} chunks, and pipeline.chunks = {chunks} makes {chunks * workers}: "
            f"leave pipeline.chunks out."
        )
    return found


def any_micro_batches(name: str) -> int:
    """A number of micro-batches that there is a schedule of this name for: that of a file."""
    return read_csv(name).micro_batches if name.endswith(".csv") else 1
