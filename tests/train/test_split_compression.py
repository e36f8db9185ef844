"""Compressed gradients of models that a mesh splits: the same every time, to the bit also when a run goes on."""

import sys
from dataclasses import replace

import cloudpickle
import pytest
import torchrun_workers
from torchrun_workers import as_torchrun
from train.test_split_models import over
from train.tiny_runs import recipe, splits

from shoal.errors import RunFailed, UserError
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Reporting
from shoal.train.loop import Order, run_recipe

REPORT = Reporting(evaluate_every=10**9, checkpoint_every=10**9, sample=False)


def wanted(kind: str, steps: int):
    return replace(recipe(kind, clip=1.0, micro_batches=2, steps=steps), report=REPORT)


def compressed(name: str, plan: Plan) -> Plan:
    return replace(plan, compression=name, compression_force=True, bucket_bytes=1 << 17)


CASES = {
    "slices, topk": ("gpt", compressed("topk", over(data=2, tensor=2))),
    "stages, powersgd": ("gpt", compressed("powersgd", over("zb-v", 2, data=2, pipe=2))),
    "stages, 1bit": ("gpt", compressed("1bit", over(data=2, pipe=2))),
    "slices of stages, int8": ("gpt", compressed("int8", over(data=2, pipe=2, tensor=2))),
    "sequences, topk": ("gpt", compressed("topk", over(data=2, context=2))),
    "experts, topk": ("moe", compressed("topk", over(data=2, expert=2))),
    "slices of experts, 1bit": ("moe", compressed("1bit", over(data=2, expert=2, tensor=2))),
    "channels and their statistics, topk": ("resnet", compressed("topk", over(data=2, tensor=2))),
}
QUICK = ("slices, topk", "stages, powersgd")


@pytest.mark.parametrize(
    "case", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in CASES]
)
def test_a_run_that_goes_on_has_the_bits_of_one_that_never_stopped(run, case):
    """Which a run that is not the same twice could not have. Where a pipeline is cut, what is compressed together is
    cut too: its pieces are then weighed by counting, not by the clock."""
    kind, plan = CASES[case]
    data, events = splits(kind, 100), []
    straight = run(wanted(kind, 4), plan=plan, data=data)
    first = run(wanted(kind, 2), plan=plan, data=data)
    rest = run(
        wanted(kind, 4), plan=plan, data=data, resume=first["run_dir"], progress=lambda e: events.append(dict(e))
    )
    assert rest["weights_sha256"] == straight["weights_sha256"] != first["weights_sha256"]
    [resumed] = [event for event in events if event["event"] == "resumed"]
    assert "lossy" not in resumed
    [started] = [event for event in events if event["event"] == "started"]
    assert plan.compression in started["lossy"]


@pytest.mark.parametrize(
    "case", [each if each in QUICK else pytest.param(each, marks=pytest.mark.soak) for each in CASES]
)
def test_over_torch_distributed_it_is_the_same_every_time_and_no_thread_of_it_is_left(agent, tmp_path, case):
    cloudpickle.register_pickle_by_value(torchrun_workers)
    kind, plan = CASES[case]
    found = set()
    for attempt in ("first", "second"):
        order = Order(wanted(kind, 2), plan, data=splits(kind, 100), run_dir=tmp_path / attempt)
        found |= {told["weights_sha256"] for told in agent.run(as_torchrun, (run_recipe, order), workers=plan.workers)}
    assert len(found) == 1


def test_what_was_left_of_other_slices_is_lost_and_that_is_said(run):
    """Of two replicas of halves, and four of the whole: as many workers, and flat buffers of one size."""
    data, events = splits("gpt", 100), []
    first = run(wanted("gpt", 2), plan=compressed("topk", over(data=2, tensor=2)), data=data)
    run(wanted("gpt", 3), plan=compressed("topk", over(data=4)), data=data, resume=first["run_dir"],
        progress=lambda event: events.append(dict(event)))  # fmt: skip
    [resumed] = [event for event in events if event["event"] == "resumed"]
    assert "left unsent" in resumed["lossy"]


def _writes_to_one_copy(worker, step):
    if worker.rank == 1:
        dict(worker.held.module.named_parameters())["norm.weight"].data.add_(0.25)


def test_workers_along_the_tensor_axis_that_differ_in_what_both_have_whole_are_found(agent, tmp_path):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    order = Order(
        wanted("gpt", 1),
        over(tensor=2),
        data=splits("gpt", 100),
        run_dir=tmp_path / "run",
        observe=_writes_to_one_copy,
    )
    with pytest.raises(RunFailed, match="parameters differ"):
        agent.run(run_recipe, (order,), workers=2)


def test_a_mesh_without_replicas_has_nothing_to_compress():
    for plan in (over(tensor=2), over(pipe=2), over(pipe=2, tensor=2)):
        with pytest.raises(UserError, match="this mesh has one replica: add an axis 'data'") as refused:
            replace(plan, compression="int8")
        assert "\n" not in str(refused.value)


def test_slices_of_states_are_not_compressed():
    with pytest.raises(UserError, match="does not go with states = 'zero2'"):
        Plan(mesh={"data": 2}, states="zero2", compression="int8")
