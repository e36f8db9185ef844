"""What a worker counts in all groups that it is in becomes one row a step, and the rows of all workers one field."""

import gc

import pytest

from shoal.comm.accounting.counters import Counters, Kind
from shoal.comm.accounting.split_account import SplitAccount, of_passes
from shoal.comm.accounting.telling import Teller
from shoal.comm.status import Reporter

AXES = {(0, 1): ["tensor"], (2, 3): ["tensor"], (0, 2): ["pipe"], (1, 3): ["pipe"]}


class OneWorker:
    """Of four: two stages of two slices each."""

    def __init__(self, rank):
        self.report = Reporter(rank, 1, None, lambda: 0.0)
        self.whole = Counters.of_workers(rank, range(4))
        slices, stages = (next(names for names in AXES if rank in names and AXES[names] == [axis])
                          for axis in ("tensor", "pipe"))  # fmt: skip
        self.slices = Counters.of_workers(slices.index(rank), slices)
        self.stages = Counters.of_workers(stages.index(rank), stages)
        self.alone = Counters.of_workers(0, [rank])
        self.whole.adopt(self.slices)
        self.whole.adopt(self.stages)
        self.stages.adopt(self.alone)
        self.account = SplitAccount(self.whole, self.report, lambda ranks: AXES[tuple(ranks)], [self.alone])

    def step(self, number, messages=3):
        self.report.position = self.report.position.__class__(**{**vars(self.report.position), "step": number})
        self.account.begin()
        self.stages.tally("stage send", "shared memory").call(sent=100 * messages, calls=messages)
        self.stages.tally("stage receive", "shared memory").wait(1 - self.stages.rank, 0.25)
        self.slices.tally("all-reduce", "shared memory").call(sent=40, received=40)
        self.slices.tally("all-reduce", "shared memory").spend(Kind.transferring, 0.5, exposed=True)
        self.slices.tally("stage send", "tcp").call(sent=7)
        self.alone.tally("reduce-scatter", "tcp").call(sent=11)
        row = self.account.row()
        self.account.end()
        return row


@pytest.fixture
def workers():
    return [OneWorker(rank) for rank in range(4)]


def exchanged(workers, number, teller):
    rows = [worker.step(number) for worker in workers]
    workers[0].account.heard(rows)
    told = workers[0].account.told
    return teller.since(told) if told else None


def of(field, operation):
    return next(row for row in field["operations"] if row["operation"] == operation)


def test_every_group_of_every_worker_is_told_under_its_name_and_its_axes(workers):
    teller = Teller(None)
    assert exchanged(workers, 1, teller) is None, "nothing has been counted before the first step"
    field = exchanged(workers, 2, teller)
    assert (field["step"], field["steps"]) == (1, 1)
    assert of(field, "stage send") == {"operation": "stage send", "link": "shared memory", "calls": [3] * 4,
                                       "sent": [300] * 4, "received": [0] * 4, "hidden": {}, "exposed": {}}  # fmt: skip
    assert of(field, "all-reduce (tensor)")["exposed"] == {"transferring": [0.5] * 4}
    assert of(field, "send (tensor)")["sent"] == [7] * 4
    assert of(field, "reduce-scatter")["sent"] == [11] * 4
    assert field["waits"] == [[0, 0, 0.25, 0], [0, 0, 0, 0.25], [0.25, 0, 0, 0], [0, 0.25, 0, 0]]


def test_what_is_counted_between_steps_and_before_the_first_belongs_to_none(workers):
    teller = Teller(None)
    for worker in workers:
        worker.stages.tally("stage send", "shared memory").call(sent=10**6)
    for number in range(1, 5):
        field = exchanged(workers, number, teller)
        for worker in workers:  # an evaluation
            worker.stages.tally("stage send", "shared memory").call(sent=10**6)
            worker.slices.tally("broadcast", "shared memory").call(sent=10**6)
        if field:
            assert of(field, "stage send")["sent"] == [300] * 4
            assert "broadcast (tensor)" not in [row["operation"] for row in field["operations"]]


def test_a_step_that_is_begun_again_keeps_what_its_first_try_counted(workers):
    worker = workers[0]
    for number in (1, 2):
        worker.step(number)
    worker.report.position = worker.report.position.__class__(**{**vars(worker.report.position), "step": 3})
    worker.account.begin()
    worker.stages.tally("stage send", "shared memory").call(sent=1)
    worker.step(3)
    worker.account.heard([worker.step(4)])
    assert worker.account.told[0].totals["stage send", "shared memory"].sent_bytes == 3 * 300 + 1


def test_a_step_of_which_nothing_will_be_told_carries_nothing(workers):
    rows = {number: workers[0].step(number) for number in range(1, 40)}
    assert [number - 1 for number, row in rows.items() if row] == [*range(1, 11), 20, 30]


def test_operations_of_passes_are_known_by_their_names():
    assert all(map(of_passes, ["stage send", "stage receive", "all-reduce (tensor)", "send (context)"]))
    assert not any(map(of_passes, ["reduce-scatter", "all-gather", "gather", "facts"]))


def test_groups_that_come_and_go_between_steps_leave_nothing_behind_and_change_no_number(workers):
    worker = workers[0]
    worker.step(1)
    for _ in range(50):  # a group for each evaluation
        passing = Counters.of_workers(0, (0, 2))
        worker.stages.adopt(passing)
        passing.tally("gather", "sockets").call(sent=5)
    del passing
    gc.collect()
    worker.whole.adopt(Counters.of_workers(0, (0, 2)))
    assert len(worker.whole.with_parts()) == 4
    worker.step(2)
    worker.account.heard([worker.step(3)])
    assert worker.account.told[0].totals["stage send", "shared memory"].sent_bytes == 2 * 300
    assert not any(operation == "gather" for operation, _ in worker.account.told[0].totals)
