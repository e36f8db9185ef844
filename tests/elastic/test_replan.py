"""Which replicas and stages so many workers form."""

import pytest

from shoal.elastic.replan import Formation, depth_for, plan_of
from shoal.recipe.pipeline_plan import PipelinePlan
from shoal.recipe.plan import Plan


@pytest.mark.parametrize(
    ("workers", "wanted", "deepest", "depth"),
    [
        (4, 2, 9, 2),
        (8, 4, 9, 4),
        (3, 2, 9, 3),  # deeper: no worker holds more than it was meant to
        (7, 4, 9, 7),
        (6, 4, 9, 6),
        (3, 2, 2, 1),  # the model has no three parts
        (7, 4, 5, 1),
        (3, 4, 9, 3),  # fewer workers than stages
        (2, 4, 9, 2),
        (1, 4, 9, 1),
        (5, 1, 9, 1),
    ],
)
def test_workers_are_cut_as_deep_as_the_plan_or_deeper_where_they_can_be(workers, wanted, deepest, depth):
    assert depth_for(workers, wanted, 8, deepest) == depth


@pytest.mark.parametrize("workers", range(1, 25))
@pytest.mark.parametrize("wanted", range(1, 7))
def test_every_worker_is_used_and_no_replica_is_without_a_shard(workers, wanted):
    depth = depth_for(workers, wanted, 4, 6)
    assert workers % depth == 0
    assert workers // depth <= 4


def test_stages_of_one_replica_work_on_the_same_shards():
    formation = Formation((3, 2), depth=2)
    assert formation.owned == [range(3), range(3), range(3, 5), range(3, 5)]
    plan = plan_of(Plan(mesh={"pipe": 2, "data": 2}), formation)
    assert [plan.owned(5)[plan.replica_of(rank)] for rank in range(4)] == formation.owned


def test_a_plan_without_stages_keeps_nothing_that_is_said_of_stages():
    plan = Plan(mesh={"pipe": 2}, pipeline=PipelinePlan(schedule="interleaved", chunks=2))
    assert plan_of(plan, Formation((8,))).pipeline == PipelinePlan()
    assert plan_of(plan, Formation((8,), depth=3)).pipeline == plan.pipeline
