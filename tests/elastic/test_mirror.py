"""The memory that mirrors what workers hold alone: a step is there as a whole or not at all."""

import os
from collections.abc import Iterator

import pytest
import torch

from shoal.comm.heap import heap_file
from shoal.elastic.mirror import Mirror
from shoal.errors import ShoalError
from shoal.train.held_parts import HeldPart

SHAPE = (3, 4)


@pytest.fixture
def file() -> Iterator[int]:
    made = heap_file()
    yield made
    os.close(made)


def halves(step: int) -> list[list[HeldPart]]:
    """What two workers hold after a step: each half of one tensor, the first one a counter too."""
    whole = torch.arange(12, dtype=torch.float32) + 100 * step
    parts = [[HeldPart("model/w", SHAPE, 6 * rank, whole[6 * rank : 6 * rank + 6])] for rank in range(2)]
    parts[0].append(HeldPart("optimizer/w/step", (), 0, torch.tensor(float(step))))
    return parts


def facts(rank: int, step: int) -> dict[str, object]:
    values = {f"w{rank}": {"plain": rank}}
    return {"step": step, "aliases": {}, "optimizer": {"groups": [], "values": values}, "loop": {"rank": rank}}


def written(mirrors: list[Mirror], step: int, ranks: tuple[int, ...] = (0, 1)) -> None:
    for rank in ranks:
        mirrors[rank].write(step, halves(step)[rank], facts(rank, step))


def entered(file: int, step: int, world: int = 2) -> list[Mirror]:
    mirrors = [Mirror(file) for _ in range(world)]
    for rank, mirror in enumerate(mirrors):
        mirror.enter(rank, world, step, step)
    return mirrors


def check(file: int, step: int) -> None:
    found = Mirror(file).read(step)
    assert torch.equal(found.tensors["model/w"].view(-1), torch.arange(12.0) + 100 * step)
    assert found.tensors["optimizer/w/step"] == step
    assert found.step == step
    assert found.facts["loop"] == {"rank": 0}
    assert found.facts["optimizer"]["values"] == {"w0": {"plain": 0}, "w1": {"plain": 1}}


def test_a_step_is_there_when_all_have_written_it(file):
    mirrors = entered(file, -1)
    assert Mirror(file).newest == -1
    written(mirrors, 1, (0,))
    assert Mirror(file).newest == -1
    written(mirrors, 1, (1,))
    assert Mirror(file).newest == 1
    check(file, 1)


def test_the_step_before_stays_whole_while_the_next_one_is_written(file):
    mirrors = entered(file, -1)
    written(mirrors, 1)
    written(mirrors, 2)
    written(mirrors, 3, (0,))  # over step 1; the other worker dies
    assert Mirror(file).newest == 2
    check(file, 2)
    with pytest.raises(ShoalError, match="does not have step 3"):
        Mirror(file).read(3)


def test_a_worker_that_dies_in_the_middle_of_writing_has_written_nothing(file):
    mirrors = entered(file, -1)
    written(mirrors, 1)
    written(mirrors, 2)
    written(mirrors, 3, (0,))
    mirrors[1]._pens[1, 1].write(halves(3)[1], facts(1, 3))  # the numbers, not yet the mark
    assert Mirror(file).newest == 2
    check(file, 2)


def test_an_epoch_that_is_lost_before_its_first_step_leaves_what_it_began_from(file):
    written(entered(file, -1), 1)
    for _ in range(3):  # recoveries that are disturbed, with other numbers of workers
        entered(file, 1, world=3)
        check(file, 1)
    alone = entered(file, 1, world=2)
    written(alone, 2, (0,))
    assert Mirror(file).newest == 1
    check(file, 1)


def test_the_memory_of_an_older_epoch_is_given_back_once_a_newer_one_has_a_whole_step(file):
    def used() -> int:
        return os.fstat(file).st_blocks * 512

    big = torch.zeros(1 << 20)
    first = Mirror(file)
    first.enter(0, 1, -1, 0)
    for step in (1, 2):
        first.write(step, [HeldPart("model/w", (1 << 20,), 0, big)], facts(0, step))
    whole = used()
    second = Mirror(file)
    second.enter(0, 1, 2, 2)
    second.write(3, [HeldPart("model/w", (1 << 20,), 0, big)], facts(0, 3))
    assert used() > whole
    second.write(4, [HeldPart("model/w", (1 << 20,), 0, big)], facts(0, 4))
    assert used() <= whole + 4096
    assert Mirror(file).read(4).tensors["model/w"].numel() == 1 << 20


def test_a_run_that_starts_over_forgets_later_steps(file):
    written(entered(file, -1), 7)
    Mirror(file).clear()
    assert Mirror(file).newest == -1
    written(entered(file, -1), 1)
    check(file, 1)
