"""Real flips and values that are no numbers, in workers that hold what no other one does: the bits stay."""

import pytest
from train.tiny_runs import recipe, splits

from shoal.elastic.faults import Fault

STEPS = 9
DATA = splits("cnn", 101)
RESNET = recipe("resnet", steps=STEPS, clip=0.05)
STAGES = {"mesh": {"pipe": 2}}
SERVED = {"sync": "parameter-server", "servers": 1}


@pytest.mark.parametrize(
    ("how", "who"),
    [
        (STAGES, "rank 1 (stage 1): the gradient is not finite at step 5 although the loss is ("),
        (SERVED, "rank 1: the gradient is not finite at step 5 although the loss is ("),
        pytest.param({"states": "zero1"}, "rank 1: the gradient is not finite at step 5", marks=pytest.mark.soak),
    ],
    ids=["a stage", "a worker of a server", "slices"],
)
def test_a_nan_that_comes_once_costs_a_step_and_no_worker(disturb, undisturbed, how, who):
    run = disturb(RESNET, workers=2, how=how, faults=[Fault("nan", 1, 5, "forward")], data=DATA)
    assert run.result["weights_sha256"] == undisturbed(RESNET, data=DATA)
    (replayed,) = run.of("replayed")
    assert replayed["step"] == 5
    assert replayed["why"].startswith(who)
    assert not run.of("lost")
    assert run.steps == list(range(1, STEPS + 1))


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_a_stage_whose_bits_have_flipped_leaves_before_they_are_used(disturb, undisturbed, rank):
    run = disturb(RESNET, workers=2, how=STAGES, faults=[Fault("flip", rank, 5, "forward")], data=DATA)
    assert run.result["weights_sha256"] == undisturbed(RESNET, data=DATA)
    assert len(run.of("lost")) == 1
    said = " ".join(event["why"] for event in run.of("suspected"))
    assert f"rank {rank}: bits of parameter " in said
    assert "have changed between the updates of steps 4 and 5" in said
    assert run.of("recovered")[0]["redone"] <= 1
    assert run.steps == list(range(1, STEPS + 1))
