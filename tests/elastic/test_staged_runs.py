"""Stages of a pipeline are killed, added and taken away: the depth changes between steps, the bits do not."""

from typing import Any

import pytest
from elastic.test_elastic_runs import asks, on_commit
from train.tiny_runs import recipe, splits

from shoal.elastic.api import train_elastic
from shoal.elastic.faults import Fault
from shoal.errors import UserError
from shoal.recipe.pipeline_plan import PipelinePlan
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Reporting

STEPS = 12
REPORT = Reporting(evaluate_every=4, checkpoint_every=4, sample=False)
IMAGES, WORDS = splits("cnn", 101), splits("gpt", 101)
RESNET = recipe("resnet", steps=STEPS, clip=0.05, report=REPORT)  # buffers, a norm over all stages
GPT = recipe("gpt", steps=STEPS, report=REPORT)  # a tensor that two stages use, dropout
TWO = {"mesh": {"pipe": 2}}

PLACES: list[Any] = [
    ("forward", 0),
    ("backward", 1),
    ("exchanging", 0),
    ("updating", 1),
    *(pytest.param(*place, marks=pytest.mark.soak) for place in
      (("waiting", 1), ("updating", 0), ("evaluating", 1), ("saving", 0))),
]  # fmt: skip


@pytest.mark.parametrize(("phase", "rank"), PLACES)
def test_a_stage_that_is_killed_is_made_again_from_its_copy_without_a_changed_bit(disturb, undisturbed, phase, rank):
    step = 8 if phase in ("evaluating", "saving") else 6
    run = disturb(GPT, how=TWO, faults=[Fault("kill", rank, step, phase)], data=WORDS)
    assert run.result["weights_sha256"] == undisturbed(GPT, data=WORDS)
    assert run.steps == list(range(1, STEPS + 1)), "every step is told once, in order"
    (lost,), (recovered,) = run.of("lost"), run.of("recovered")
    assert lost["fault"] == f"kill rank {rank} at step {step}, {phase}"
    assert (recovered["before"], recovered["workers"]) == (2, 1), "who is left goes on at once, with both stages"
    assert recovered["redone"] <= 1


@pytest.mark.slow
def test_a_stage_of_one_of_two_replicas_is_replanned_over_the_other_three_workers(disturb, undisturbed):
    how = {"mesh": {"data": 2, "pipe": 2}}
    run = disturb(RESNET, how=how, faults=[Fault("kill", 2, 6, "backward")], data=IMAGES)
    assert run.result["weights_sha256"] == undisturbed(RESNET, data=IMAGES)
    assert run.steps == list(range(1, STEPS + 1))
    assert run.of("recovered")[0]["workers"] == 3


@pytest.mark.slow
def test_stages_that_die_in_a_row_and_during_recovery_cost_no_bit(disturb, undisturbed):
    faults = [
        Fault("kill", 0, 4, "forward"),
        Fault("kill", 0, 5, "updating"),
        Fault("kill", 1, 6, "backward"),
        Fault("kill", 0, 9, "exchanging"),
    ]
    run = disturb(GPT, how={"mesh": {"pipe": 3}}, faults=faults, data=WORDS)
    assert run.result["weights_sha256"] == undisturbed(GPT, data=WORDS)
    assert len(run.of("lost")) == len(faults)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.soak), pytest.param(3, marks=pytest.mark.slow)])
def test_the_depth_of_a_pipeline_changes_between_two_steps_and_none_is_lost(disturb, undisturbed, workers):
    long = recipe("gpt", steps=30)
    run = disturb(long, how=TWO, data=WORDS, progress=on_commit(3, asks(workers=workers)))
    assert run.result["weights_sha256"] == undisturbed(long, data=WORDS)
    (resized,) = run.of("resized")
    assert (resized["before"], resized["workers"]) == (2, workers)
    assert not run.of("lost")
    assert not run.of("recovered")
    assert run.steps == list(range(1, 31))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"pipeline": PipelinePlan(schedule="mine.csv")}, "is for one number of stages"),
        ({"pipeline": PipelinePlan(cuts=("blocks.1",))}, "pipeline.cuts is for one number of stages"),
        ({"states": "zero1"}, "in a pipeline is not elastic yet"),
        ({"mesh": {"pipe": 2, "tensor": 2}}, "a mesh with tensor = 2 is not elastic yet"),
    ],
)
def test_what_holds_for_one_number_of_stages_is_refused(tmp_path, how, said):
    with pytest.raises(UserError, match=said):
        train_elastic(GPT, Plan(**{**TWO, **how}), run_dir=tmp_path / "run", data=WORDS)
