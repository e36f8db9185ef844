"""A pipeline schedule as a value: who holds which chunk of layers, and in which order everybody works."""

from dataclasses import dataclass

from shoal.parallel.schedules.actions import Action


def looped(workers: int, chunks: int) -> tuple[int, ...]:
    """Chunk -> worker, round and round: worker 0 holds chunks 0, p, 2p, ..."""
    return tuple(chunk % workers for chunk in range(workers * chunks))


def v_shaped(workers: int) -> tuple[int, ...]:
    """Chunk -> worker, there and back: worker 0 holds the first chunk and the last one."""
    return (*range(workers), *reversed(range(workers)))


@dataclass(frozen=True)
class Schedule:
    """``actions[w]`` is what worker w computes, in order; sends and receives are put in by `lower`."""

    name: str
    placement: tuple[int, ...]  # chunk -> worker
    micro_batches: int
    actions: tuple[tuple[Action, ...], ...]  # by worker

    @property
    def workers(self) -> int:
        return len(self.actions)

    @property
    def chunks(self) -> int:
        """Of the whole model."""
        return len(self.placement)

    def worker_of(self, chunk: int) -> int:
        return self.placement[chunk]

    def chunks_of(self, worker: int) -> tuple[int, ...]:
        return tuple(chunk for chunk, holder in enumerate(self.placement) if holder == worker)
