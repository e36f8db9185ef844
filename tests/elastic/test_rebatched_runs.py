"""Real workers that come and go while the batch follows goodput: the weights are those of an undisturbed run that makes
the same decisions."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from train import goodput_hosts
from train.goodput_hosts import DATA, MADE, SGD, OnHost, rebatched

from shoal.data.ledger import Ledger
from shoal.elastic import roster
from shoal.elastic.faults import Fault
from shoal.recipe.recipe import Recipe
from shoal.run.batches import recorded
from shoal.train.noise import PassSquares

cloudpickle.register_pickle_by_value(goodput_hosts)
cloudpickle.register_pickle_by_value(sys.modules[__name__])

LONG = replace(MADE, steps=70)


def replayed(run) -> Recipe:
    return replace(run.run.recipe, batching=recorded(run.run))


def check(run, made: Recipe, undisturbed) -> None:
    """The three oracles: weights, the ledger, each step and each change told once."""
    assert run.result["weights_sha256"] == undisturbed(replayed(run), data=DATA)
    assert run.steps == list(range(1, made.steps + 1))
    changes = rebatched(run.events)
    assert changes == sorted(set(changes))
    account = Ledger(len(DATA.train), made.batch, made.shards, made.micro_batches, made.seed).verify(run.events)
    assert account.wrong == ()


def resizing(**after: int):
    """A listener that asks for other numbers of workers once steps are committed: step_30=3."""
    wanted = {int(step.removeprefix("step_")): workers for step, workers in after.items()}

    def listen(event):
        if event["event"] == "committed" and event["step"] in wanted:
            roster.wish(Path(event["run_dir"]), workers=wanted.pop(event["step"]))

    return listen


def test_one_then_three_then_two_workers_and_a_batch_that_follows(disturb, undisturbed):
    """With more workers, the rest of a step, which does not become less, is worth more samples."""
    run = disturb(
        LONG, 1, data=DATA, model=OnHost(fixed=0.1, a=0.02, rest=0.2), progress=resizing(step_20=3, step_50=2)
    )
    assert [(e["before"], e["workers"]) for e in run.of("resized")] == [(1, 3), (3, 2)]
    assert rebatched(run.events), "the batch has changed"
    check(run, LONG, undisturbed)


PLACES: list[Any] = [
    ("backward", 0),
    ("updated", 2),
    pytest.param("backward", 2, marks=pytest.mark.soak),
    pytest.param("updated", 0, marks=pytest.mark.soak),
]


@pytest.mark.parametrize(("phase", "rank"), PLACES)
def test_a_worker_that_dies_at_a_change_of_the_batch_changes_nothing(disturb, undisturbed, rank, phase):
    """The clock of that host is a formula, so that the change is known to come after step 22; whoever dies between his
    update and the commit has not told of it, and a survivor does."""
    run = disturb(MADE, 3, data=DATA, model=OnHost(), faults=[Fault("kill", rank, 22, phase)])
    assert run.of("lost")
    if phase == "updated":
        assert rebatched(run.events)[0] == (22, 16, 32)
    check(run, MADE, undisturbed)


@dataclass(frozen=True)
class Drops(OnHost):
    """Planted: of shards whose sums are kept, what they have shown of noise is not."""

    def __call__(self):
        PassSquares.starts = property(lambda squares: ())
        return super().__call__()


@pytest.mark.parametrize("host", [OnHost(), Drops()], ids=["as built", "planted: noise of kept shards is dropped"])
def test_noise_of_shards_that_survivors_had_finished_is_kept_with_their_sums(disturb, undisturbed, host):
    """With AdaScale it is in every learning rate, and so in the weights."""
    run = disturb(SGD, 3, data=DATA, model=host, faults=[Fault("stop", 2, 30, "forward")])
    (recovered,) = run.of("recovered")
    assert recovered["kept"] > 0
    if isinstance(host, Drops):
        assert run.result["weights_sha256"] != undisturbed(replayed(run), data=DATA), "or this test could not fail"
    else:
        check(run, SGD, undisturbed)


@pytest.mark.parametrize("states", [pytest.param("zero1", marks=pytest.mark.soak), "zero3"])
@pytest.mark.slow
def test_what_the_mirror_holds_has_the_batches_too(disturb, undisturbed, states):
    run = disturb(MADE, 3, data=DATA, model=OnHost(), how={"states": states}, faults=[Fault("kill", 1, 30, "forward")])
    assert rebatched(run.events)
    check(run, MADE, undisturbed)


@pytest.mark.slow
def test_all_workers_lost_at_once_repeat_what_the_log_says(disturb, undisturbed):
    faults = [Fault("kill", rank, 35, "forward") for rank in range(2)]
    run = disturb(MADE, 2, data=DATA, model=OnHost(), faults=faults)
    assert run.of("resumed")
    assert run.result["weights_sha256"] == undisturbed(replayed(run), data=DATA)
