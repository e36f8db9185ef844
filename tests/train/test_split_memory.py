"""Split models whose states and parameters are kept in fewer bits, or elsewhere: which bits they have."""

import re
from dataclasses import replace

import cloudpickle
import pytest
import torch
from train import test_memory
from train.test_exactness import trail
from train.test_kept_states import EXACT, LOSSY, large
from train.test_memory import Starved, events
from train.test_split_models import loaded, over
from train.tiny_runs import recipe, splits

from shoal.data.source import Splits
from shoal.errors import RunFailed, UserError
from shoal.memory.budget import Need
from shoal.memory.explain import counted_change
from shoal.memory.table import BlockCost, Moment, Table
from shoal.parallel.schedules import make_schedule
from shoal.recipe.memory_plan import MemoryPlan
from shoal.recipe.pipeline_plan import PipelinePlan
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import ModelSpec
from shoal.train.loop import Order, run_recipe
from shoal.train.rehearsed_stages import moments

MOE = ModelSpec(kind="moe", options={"layers": 2, "heads": 2, "width": 48, "experts": 4, "dropout": 0.1})
WAYS = {**EXACT, **LOSSY}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["both, recomputed", "compensated", "all"])
def test_stages_keep_states_and_parameters_to_the_bits_of_one_process(run, way):
    """Random rounding goes by the element's place in its parameter, 8-bit blocks by a parameter's own elements."""
    wanted, data = large("gpt", clip=0.05, micro_batches=2, steps=3), splits("gpt", 37)  # the third is a tail
    alone = run(wanted, plan=replace(over(data=1), memory=WAYS[way]), data=data)
    last = "1f1b" if way == "both, recomputed" else "zb-v"  # the latter's passes come in two halves
    for plan in (over(pipe=2), over(last, 2 if last == "zb-v" else 1, data=2, pipe=2)):
        found = run(wanted, plan=replace(plan, memory=WAYS[way]), data=data)
        assert found["weights_sha256"] == alone["weights_sha256"], plan
        assert trail(found) == trail(alone), plan
        ours, theirs = loaded(found), loaded(alone)
        assert ours.keys() == theirs.keys()
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("mesh", [{"tensor": 2}, {"context": 2}, {"expert": 2}, {"pipe": 2, "tensor": 2}], ids=str)
def test_what_a_split_worker_keeps_elsewhere_keeps_every_bit(run, mesh):
    kind = "moe" if "expert" in mesh else "gpt"
    wanted, data = large(kind, clip=0.05, steps=3) if kind == "gpt" else large_mixture(), splits(kind, 37)
    plain = run(wanted, plan=over(**mesh), data=data)
    found = run(wanted, plan=replace(over(**mesh), memory=EXACT["both, recomputed"]), data=data)
    assert found["weights_sha256"] == plain["weights_sha256"]
    assert trail(found) == trail(plain)


def large_mixture():
    return replace(large("gpt", clip=0.05, steps=3), model=MOE)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"tensor": 2}, {"context": 2}, {"expert": 2}], ids=str)
@pytest.mark.parametrize("way", ["all"])
def test_what_is_lossy_in_a_split_model_is_near_one_process_and_goes_on_to_the_same_bits(run, mesh, way):
    """Blocks of 8 bits and draws go by a worker's part of a tensor: replicas of the split have its bits, one process
    others. A checkpoint holds the scale of each element, so that the parts find their blocks in it again."""
    kind = "moe" if "expert" in mesh else "gpt"
    wanted, data = large("gpt", steps=3) if kind == "gpt" else large_mixture(), splits(kind, 37)
    alone = run(wanted, plan=replace(over(data=1), memory=WAYS[way]), data=data)
    whole = run(wanted, plan=replace(over(**mesh), memory=WAYS[way]), data=data)
    assert whole["loss"] == pytest.approx(alone["loss"], rel=0.01)
    part = run(replace(wanted, steps=2), plan=replace(over(**mesh), memory=WAYS[way]), data=data)
    rest = run(wanted, plan=replace(over(**mesh), memory=WAYS[way]), data=data, resume=part["run_dir"])
    assert rest["weights_sha256"] == whole["weights_sha256"]
    if mesh == {"tensor": 2}:
        twice = run(wanted, plan=replace(over(data=2, **mesh), memory=WAYS[way]), data=data)
        assert twice["weights_sha256"] == whole["weights_sha256"]
        begun = run(replace(wanted, steps=2), plan=replace(over(**mesh), memory=WAYS[way]), data=data)
        one = run(wanted, plan=replace(over(data=1), memory=WAYS[way]), data=data, resume=begun["run_dir"])
        assert one["loss"] == pytest.approx(alone["loss"], rel=0.01)


def test_a_part_below_4096_elements_is_kept_as_the_whole_is(run):
    """Seven heads on two workers: of 4,116 elements one worker has 1,764, and both keep them in 8 bits."""
    options = {"layers": 1, "heads": 7, "width": 42, "ffn": 98}
    wanted = replace(large("gpt", steps=3), model=ModelSpec(kind="gpt", options=options))
    found = run(wanted, plan=replace(over(tensor=2), memory=MemoryPlan(optimizer_bits=8)), data=splits("gpt", 64))
    states = loaded(found)
    narrow = [name for name in states if name.endswith("exp_avg.codes")]
    assert narrow
    for name in narrow:
        parameter = name.removeprefix("optimizer/").rpartition("/")[0]
        assert states[name].shape == states[f"model/{parameter}"].shape
        assert states[name].numel() >= 4096


# --- budgets ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"tensor": 2}, {"context": 2}, {"expert": 2}], ids=str)
def test_a_budget_is_kept_by_workers_that_split_a_model_to_the_bits_of_the_split(run, mesh):
    """All compute the same blocks again, because they meet inside of them."""
    kind = "moe" if "expert" in mesh else "gpt"
    options = {"layers": 4, "heads": 2, "width": 64, "dropout": 0.1, **({"experts": 4} if kind == "moe" else {})}
    wanted, data = recipe("gpt", model=ModelSpec(kind=kind, options=options), batch=256, steps=1), splits("gpt", 256)
    plain = run(wanted, plan=replace(over(**mesh), memory=MemoryPlan(peak_bytes="1GiB")), data=data)
    started = events(plain, "started")[0]["memory"]
    assert started["ways"][0] == {"plain": 4}
    budget = max(each["peak"] - each["activations"] // 2 for each in started["predicted"])
    saved = run(wanted, plan=replace(over(**mesh), memory=MemoryPlan(peak_bytes=budget)), data=data)
    assert saved["weights_sha256"] == plain["weights_sha256"]
    chosen = events(saved, "started")[0]["memory"]
    assert chosen["ways"][0].get("plain", 0) < 4
    for rank, predicted in enumerate(chosen["predicted"]):
        observed = max(event["memory"]["peaks"][rank] for event in events(saved, "committed"))
        assert observed <= budget
        assert predicted["peak"] <= budget


def staged(schedule: str, cuts: tuple[str, ...], **mesh: int) -> Plan:
    pipeline = PipelinePlan(schedule=schedule, chunks=(len(cuts) + 1) // mesh["pipe"], cuts=cuts)
    return Plan(mesh=mesh, device="cpu", pipeline=pipeline)


STAGED = {
    "1f1b": staged("1f1b", ("blocks.3",), pipe=2),
    "zb-v": staged("zb-v", ("blocks.1", "blocks.2", "blocks.3"), pipe=2),
    "mixed": staged("1f1b", ("blocks.3",), pipe=2, tensor=2),
    "replicas of their own lengths": replace(staged("gpipe", ("blocks.2",), pipe=2, data=2), placement=(3, 5)),
}
THROUGH_STAGES = replace(
    recipe("gpt", batch=512, steps=2, micro_batches=2),
    model=ModelSpec(kind="gpt", options={"layers": 4, "heads": 2, "width": 64, "dropout": 0.1}),
)


@pytest.mark.parametrize(
    "name", [key if key == "1f1b" else pytest.param(key, marks=pytest.mark.slow) for key in STAGED]
)
def test_each_stage_of_a_pipeline_keeps_a_budget_by_what_it_has_in_flight(run, name):
    """To the bits of the run without one; what is predicted of each rank is what it then takes, or a little more."""
    data, peaks = splits("gpt", 512), []
    plain = run(THROUGH_STAGES, plan=replace(STAGED[name], memory=MemoryPlan(peak_bytes="1GiB")), data=data)
    free = events(plain, "started")[0]["memory"]
    assert all(set(ways) == {"plain"} for ways in free["ways"])
    most = max(free["predicted"], key=lambda each: each["peak"])
    budget = most["peak"] - most["activations"] // 3
    saved = run(THROUGH_STAGES, plan=replace(STAGED[name], memory=MemoryPlan(peak_bytes=budget)), data=data)
    assert saved["weights_sha256"] == plain["weights_sha256"]
    assert trail(saved) == trail(plain)
    chosen = events(saved, "started")[0]["memory"]
    assert any("plain" not in ways for ways in chosen["ways"])
    for rank, predicted in enumerate(chosen["predicted"]):
        observed = max(event["memory"]["peaks"][rank] for event in events(saved, "committed"))
        assert observed <= predicted["peak"] <= budget
        peaks.append((observed, predicted["peak"] - predicted["checkpoint"] - predicted["messages"]))
    assert all(observed >= 0.65 * predicted for observed, predicted in peaks), peaks


def test_a_stage_that_fits_in_no_way_is_named_with_a_budget_that_does(run):
    def asking(size) -> dict:
        return {"plan": replace(STAGED["1f1b"], memory=MemoryPlan(peak_bytes=size)), "data": splits("gpt", 512)}

    with pytest.raises(UserError, match=r"too small on rank \d \(cpu; pipe \d of 2\), where at the least") as refused:
        run(THROUGH_STAGES, **asking("2MiB"))
    enough = re.search(r"set memory.peak_bytes = '([^']+)'", str(refused.value))
    assert "\n" not in str(refused.value)
    assert enough
    assert events(run(replace(THROUGH_STAGES, steps=1), **asking(enough[1])), "started")


def test_what_is_in_flight_when_backward_passes_begin_is_read_off_the_schedule():
    assert moments(make_schedule("gpipe", 2, 6, 1), 0) == (Moment(0, (6,)),)
    assert moments(make_schedule("1f1b", 4, 6, 1), 1) == (Moment(0, (3,)),)
    assert moments(make_schedule("1f1b", 4, 6, 1), 3) == (Moment(0, (1,)),)
    first = moments(make_schedule("interleaved", 2, 4, 2), 0)
    assert {moment.chunk for moment in first} == {0, 1}
    block = BlockCost(name="", outside=0, inputs=1, plain=10, selective=5, filled=11, selective_filled=12,
                      full_work=3, selective_work=1)  # fmt: skip
    table = Table(blocks=(block,), outside=(2,), moments=(Moment(0, (3,)),))
    assert [table.peak([way]) for way in ("plain", "selective", "full")] == [3 * 12, 3 * 7 + 5, 3 * 3 + 8]


def test_a_budget_that_no_slice_fits_is_refused_naming_the_slice(run):
    plan = replace(over(tensor=2), memory=MemoryPlan(peak_bytes="1MiB"))
    with pytest.raises(UserError, match=r"too small on rank \d \(cpu; tensor \d of 2\), where at the least there are"):
        run(recipe("gpt", batch=512, steps=2), plan=plan, data=splits("gpt", 1024))


# --- when memory runs out -----------------------------------------------------------------------------------------


def test_the_slice_whose_memory_ran_out_is_named_with_what_would_fit(run):
    cloudpickle.register_pickle_by_value(test_memory)
    spec = ModelSpec(kind="gpt", options={"layers": 6, "heads": 2, "width": 64})
    wanted = recipe("gpt", model=spec, batch=1024, shards=1, steps=2)
    with pytest.raises(RunFailed) as failed:
        run(wanted, plan=over(tensor=2), data=Splits(Starved(splits("gpt", 1024).train, 100 << 20)))
    said = str(failed.value)
    assert "\n" not in said
    assert re.search(r"rank \d \(cpu; tensor \d of 2\) in step 1, \w+, ran out of memory", said), said
    assert re.search(r"fills with activations \d+ MiB, .*optimiser states .* MiB, .*weights .* MiB", said), said
    assert re.search(r"What would fit, by count of the .* MiB that it asked for: micro_batches = \d+", said), said


def _starves(worker, step):
    if worker.rank == 1:
        raise RuntimeError(f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {1 << 40} bytes.")


def test_the_stage_whose_memory_ran_out_is_named_and_what_no_change_frees_is_said(agent, run, tmp_path):
    order = Order(
        large("gpt", steps=1), over(pipe=2), data=splits("gpt", 64), run_dir=tmp_path / "run", observe=_starves
    )
    with pytest.raises(RunFailed) as failed:
        agent.run(run_recipe, (order,), workers=2)
    said = str(failed.value)
    assert re.search(r"rank 1 \(cpu; pipe 1 of 2\) in step 1, updating, ran out of memory", said), said
    assert re.search(r"optimiser states 0\.\d MiB", said), said
    assert "frees the 1048576 MiB that it asked for: use more workers along an axis that splits the model" in said


def test_the_smallest_change_that_frees_what_was_asked_for_is_told():
    need = Need(optimizer=80 << 20, activations=100 << 20)
    for asked, change in (
        (30, "zero1"),
        (50, "micro_batches = 2 "),
        (70, "offload_optimizer"),
        (90, "micro_batches = 16 "),
    ):
        error = f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {asked << 20} bytes."
        assert change in counted_change(need, Plan(mesh={"data": 2, "tensor": 2}), (1, 2, 4, 8, 16), error), asked
    slices = Plan(mesh={"data": 2, "tensor": 2}, states="zero1")
    assert "memory.offload_optimizer = 'disk'" in counted_change(need, slices, (1,), "allocate 1048576 bytes")
    told = counted_change(need, Plan(mesh={"tensor": 2}), (1, 2), "CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert "frees the 2048 MiB that it asked for: use more workers" in told
