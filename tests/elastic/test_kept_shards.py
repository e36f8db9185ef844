"""A lost worker costs its own shards: what the others had finished of the step is kept, and the bits are the same."""

import pytest
from train.tiny_runs import recipe, splits

from shoal.elastic.faults import Fault
from shoal.recipe.recipe import Reporting

DATA = splits("cnn", 101)
MADE = recipe("resnet", steps=9, clip=0.05, report=Reporting(sample=False))  # 8 shards, buffers
OWN = 2  # shards of each of four workers


def lost(disturb, undisturbed, *faults: str, **how):
    run = disturb(MADE, 4, data=DATA, faults=[Fault.parse(text) for text in faults], how=how)
    assert run.result["weights_sha256"] == undisturbed(MADE, data=DATA)
    assert run.steps == list(range(1, 10))
    return run


@pytest.mark.parametrize(
    "phase", [*(pytest.param(phase, marks=pytest.mark.soak) for phase in ("loading", "forward")), "backward"]
)
def test_only_the_shards_of_the_lost_worker_are_computed_again(disturb, undisturbed, phase):
    (recovered,) = lost(disturb, undisturbed, f"kill:rank=1,step=5,phase={phase}").of("recovered")
    assert recovered["redone"] <= 1
    assert recovered.get("again", OWN) == OWN  # absent: nobody had begun the step
    assert recovered.get("kept", 0) <= 3 * OWN


def test_what_survivors_had_finished_is_kept(disturb, undisturbed):
    """Rank 3 stands still before its first shard for as long as it takes to be suspected: all others are done by
    then."""
    run = lost(disturb, undisturbed, "stop:rank=3,step=5,phase=forward")
    assert [(e["kept"], e["again"]) for e in run.of("recovered")] == [(3 * OWN, OWN)]


@pytest.mark.parametrize(
    "phase", ["exchanging", *(pytest.param(phase, marks=pytest.mark.soak) for phase in ("bucket", "waiting"))]
)
def test_sums_that_others_may_have_added_to_are_not_used(disturb, undisturbed, phase):
    """Whose sums come into whose: with four workers, those of ranks 0 and 2 are added to."""
    run = lost(disturb, undisturbed, f"kill:rank=1,step=5,phase={phase}")
    (recovered,) = run.of("recovered")
    assert recovered.get("again", OWN) in (OWN, 3 * OWN)


def test_a_step_that_survivors_have_committed_is_not_done_again(disturb, undisturbed):
    (recovered,) = lost(disturb, undisturbed, "kill:rank=1,step=5,phase=updated").of("recovered")
    assert recovered.get("again", 0) <= 3 * OWN


def test_what_is_kept_outlives_a_second_loss_while_it_is_put_together(disturb, undisturbed):
    run = lost(
        disturb,
        undisturbed,
        "stop:rank=3,step=5,phase=forward",
        "kill:rank=2,step=4,phase=recovering",
    )
    assert [(e["kept"], e["again"]) for e in run.of("recovered")] == [(2 * OWN, 2 * OWN)]


def test_kept_sums_are_no_good_when_they_are_not_finite(disturb, undisturbed):
    run = lost(disturb, undisturbed, "nan:rank=0,step=5,phase=forward", "stop:rank=3,step=5,phase=forward")
    assert run.of("recovered")
    assert [e["step"] for e in run.of("replayed")] == [5]
