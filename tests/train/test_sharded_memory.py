"""Sharded states with all that a plan says of memory: the bits are those of replicated states under the same plan."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train.test_exactness import plan, trail
from train.test_kept_states import EXACT, LOSSY, keys_of
from train.test_memory import events
from train.test_sharded_between_hosts import joined  # noqa: F401 (a fixture)
from train.test_split_models import loaded, over
from train.tiny_runs import recipe, splits

from shoal.comm.staged_lane import STAGE_BYTES, StagedLane
from shoal.errors import UserError
from shoal.memory.away import Away
from shoal.memory.narrow import REST
from shoal.memory.quantised import BLOCK
from shoal.memory.shelves import OnDisk
from shoal.memory.streamed import CODES, SCALES
from shoal.recipe.memory_plan import MemoryPlan
from shoal.recipe.recipe import ModelSpec
from shoal.train.api import train
from shoal.train.gather_order import order_of
from shoal.train.sliced_need import most_foreign
from shoal.train.worker import Worker

# Slices cut matrices, and some matrices end in the middle of a block of 8 bits: 72 x 216 is no multiple of 256
GPT = ModelSpec(kind="gpt", options={"layers": 2, "heads": 2, "width": 72, "dropout": 0.1})
WAYS = {
    **{way: LOSSY[way] for way in ("8 bits", "stochastic")},
    "compensated": MemoryPlan(parameters="bfloat16-compensated"),
    "states on disk": EXACT["states on disk"],
    "8 bits, compensated, on disk": MemoryPlan(
        optimizer_bits=8, parameters="bfloat16-compensated", offload_optimizer="disk", recompute="full"
    ),
    "activations on disk": MemoryPlan(offload_activations="disk"),
    "recomputed": MemoryPlan(recompute="selective"),
}


def wanted_of(**changes):
    often = replace(recipe("gpt").report, checkpoint_every=2)
    return recipe("gpt", **{"model": GPT, "clip": 0.05, "report": often, "steps": 3, **changes})


WORDS = splits("gpt", 35)  # three steps an epoch, the last one of 3 samples


def same(found: dict, whole: dict) -> bool:
    ours, theirs = loaded(found), loaded(whole)
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


PLACED = [("zero3", (8,)), ("zero1", (3, 5)), ("zero2", (3, 3, 2))]
PLACED_APART = [("zero2", (3, 5)), ("zero3", (3, 3, 2))]


@pytest.mark.parametrize(
    ("way", "here", "apart"),
    [
        pytest.param(way, here, apart, marks=pytest.mark.slow if here == number % 3 and apart == number % 2 else
                     pytest.mark.soak)  # in all runs of the tests each way and each place, not each of the one in each
        for number, way in enumerate(WAYS) for here in range(3) for apart in range(2)
    ],
)  # fmt: skip
def test_the_bits_and_the_checkpoint_are_those_of_replicated_states(run, joined, way, here, apart):  # noqa: F811
    """On one worker, two or three of one host, and on two or three between hosts, with checkpoints on the way."""
    wanted, kept = wanted_of(), {"memory": WAYS[way], "bucket_bytes": 1}
    whole = run(wanted, plan=plan(8, states="replicated", **kept), data=WORDS)
    states, owned = PLACED[here]
    found = run(wanted, plan=plan(*owned, states=states, **kept), data=WORDS)
    states, owned = PLACED_APART[apart]
    for each in (found, joined(wanted, plan(*owned, states=states, **kept), WORDS)[0]):
        assert trail(each) == trail(whole)
        assert same(each, whole)


def test_slices_of_8_bits_and_bfloat16_on_disk_leave_the_bits_of_the_whole(run):
    """The quick one of the above."""
    wanted, kept = wanted_of(steps=2), {"memory": WAYS["8 bits, compensated, on disk"], "bucket_bytes": 1}
    whole = run(wanted, plan=plan(8, states="replicated", **kept), data=WORDS)
    found = run(wanted, plan=plan(3, 5, states="zero2", **kept), data=WORDS)
    assert {"exp_avg" + CODES, "exp_avg_sq" + SCALES, REST} <= keys_of(found)
    assert trail(found) == trail(whole)
    assert same(found, whole)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("8 bits", "zero2", (3, 5)), ("8 bits", "replicated", (2, 6))),
        (("8 bits, compensated, on disk", "replicated", (3, 5)), ("8 bits, compensated, on disk", "zero1", (2, 2, 4))),
    ],
)
def test_a_checkpoint_goes_on_with_other_states_on_another_number_of_workers(run, before, after):
    wanted, (way, states, owned) = wanted_of(steps=4), before
    whole = run(wanted, plan=plan(8, memory=WAYS[way]), data=WORDS)
    part = run(replace(wanted, steps=2), plan=plan(*owned, states=states, memory=WAYS[way], bucket_bytes=1), data=WORDS)
    way, states, owned = after
    rest = run(wanted, plan=plan(*owned, states=states, memory=WAYS[way]), data=WORDS, resume=part["run_dir"])
    assert trail(rest) == trail(whole)
    assert same(rest, whole)


def test_moments_of_slices_in_8_bits_go_on_in_32_bits(run, agents_here, capfd):
    wanted = wanted_of(steps=1)
    first = run(wanted, plan=plan(3, 5, states="zero2", memory=LOSSY["8 bits"]), data=WORDS)
    capfd.readouterr()
    second = train(replace(wanted, steps=2), plan(4, 4, states="zero1"), data=WORDS, resume=first["run_dir"])
    assert capfd.readouterr().err.splitlines() == ["shoal: the checkpoint's 8-bit optimiser states go on in 32 bits."]
    assert keys_of(second) == {"exp_avg", "exp_avg_sq", "step"}


MESHES = [{"data": 2, "pipe": 2}, {"data": 2, "tensor": 2}, {"data": 2, "expert": 2}]
WITH_AXES = ["8 bits, compensated, on disk", "8 bits", "activations on disk"]


@pytest.mark.parametrize(
    ("mesh", "way"),
    [
        pytest.param(mesh, way, marks=pytest.mark.slow if a == b else pytest.mark.soak)  # each once, not each in each
        for a, mesh in enumerate(MESHES)
        for b, way in enumerate(WITH_AXES)
    ],
    ids=str,
)
def test_with_other_axes_the_bits_are_those_of_the_same_mesh_with_replicated_states(run, mesh, way):
    kind = "moe" if "expert" in mesh else "gpt"
    options = {"layers": 2, "heads": 2, "width": 64, "experts": 4, "dropout": 0.1}
    model = ModelSpec(kind="moe", options=options) if kind == "moe" else GPT
    wanted, data = wanted_of(model=model, micro_batches=2, steps=2), WORDS
    kept = replace(over(**mesh), memory=WAYS[way], bucket_bytes=1)
    whole = run(wanted, plan=kept, data=data)
    found = run(wanted, plan=replace(kept, states="zero2"), data=data)
    assert trail(found) == trail(whole)
    assert same(found, whole)


# --- a budget -----------------------------------------------------------------------------------------------------

ROOMY = MemoryPlan(peak_bytes="1GiB")


def wide(**changes):
    """Activations of more than all that is not counted."""
    spec = ModelSpec(kind="gpt", options={"layers": 4, "heads": 2, "width": 96, "dropout": 0.1})
    often = replace(recipe("gpt").report, checkpoint_every=2)
    return recipe("gpt", model=spec, batch=512, steps=2, report=often, **changes)


def predicted_and_observed(result: dict) -> tuple[list[dict], list[int]]:
    """Of each worker."""
    predicted = events(result, "started")[0]["memory"]["predicted"]
    peaks = [event["memory"]["peaks"] for event in events(result, "committed")]
    return predicted, [max(each) for each in zip(*peaks, strict=True)]


BUDGETED = [(states, apart) for states in ("zero1", "zero2", "zero3") for apart in (False, True)]


@pytest.mark.parametrize(
    ("states", "between_hosts"),
    [
        # In all runs of the tests zero1 of one host below, and these: each of the states, each kind of host
        pytest.param(*each, marks=pytest.mark.slow if each in (("zero3", False), ("zero2", True)) else pytest.mark.soak)
        for each in BUDGETED
    ],
    ids=lambda each: each if isinstance(each, str) else ("one host", "between hosts")[each],
)
def test_a_budget_is_kept_and_its_parts_are_those_of_slices(run, joined, states, between_hosts):  # noqa: F811
    """Twice: with room for everything, and with half of what activations took."""
    data, wanted = splits("gpt", 1024), wide()
    how = plan(4, 4, states=states, bucket_bytes=1, memory=ROOMY)

    def trained(budget):
        under = replace(how, memory=budget)
        return joined(wanted, under, data)[0] if between_hosts else run(wanted, plan=under, data=data)

    whole = run(wanted, plan=plan(4, 4, states="replicated", memory=ROOMY), data=data)
    free = trained(ROOMY)
    most = max((need["peak"], need["activations"]) for need in predicted_and_observed(free)[0])
    saving = trained(MemoryPlan(peak_bytes=most[0] - most[1] // 2))
    assert events(saving, "started")[0]["memory"]["ways"][0].get("plain", 0) < 4
    for result in (free, saving):
        assert result["weights_sha256"] == whole["weights_sha256"]
        predicted, observed = predicted_and_observed(result)
        for rank, (need, peak) in enumerate(zip(predicted, observed, strict=True)):
            assert 0.8 * need["peak"] <= peak <= need["peak"], (rank, need, peak)
    theirs, ours = events(whole, "started")[0]["memory"]["predicted"], predicted_and_observed(free)[0]
    assert ours[1]["optimizer"] == pytest.approx(theirs[1]["optimizer"] / 2, rel=0.1)
    if not between_hosts:  # there, two blocks and the ends of so small a model are all of it
        assert ours[1]["weights"] < theirs[1]["weights"]


def test_a_budget_leaves_the_bits_of_slices_and_one_too_small_is_refused_with_what_is_there(run):
    data, wanted = splits("gpt", 1024), wide()
    free = run(wanted, plan=plan(4, 4, states="zero1", memory=ROOMY), data=data)
    budget = MemoryPlan(
        peak_bytes=max(need["peak"] - need["activations"] // 2 for need in predicted_and_observed(free)[0])
    )
    kept = run(wanted, plan=plan(4, 4, states="zero1", memory=budget), data=data)
    assert kept["weights_sha256"] == free["weights_sha256"]
    small = MemoryPlan(peak_bytes="4MiB")
    with pytest.raises(
        UserError, match=r"is too small on rank 0 \(cpu\), where at the least there are .*: set"
    ) as told:
        run(wanted, plan=plan(4, 4, states="zero1", memory=small), data=data)
    assert "\n" not in str(told.value)


def test_of_what_others_own_two_blocks_and_the_ends_are_here_at_once():
    order = order_of([0, 5], [{4}, {3, 4}, {2}, {1}])
    assert most_foreign(order, [1, 10, 100, 1000, 10000, 100000]) == 100001 + 11100
    assert most_foreign(order_of([0], []), [7]) == 7


# --- pieces -------------------------------------------------------------------------------------------------------


def _moved(group, plan_of):
    """What an offloading store has put away in a step of a worker."""
    torch.set_num_threads(1)
    moved, put = [], Away._send
    Away._send = lambda store, record: (moved.append(record.tensor.untyped_storage().nbytes()), put(store, record))[1]
    try:
        worker = Worker(group, plan_of, shards=4)
        model = worker.model(
            torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh()) for _ in range(3)))
        )
        worker.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        points = [(torch.full((64,), i / 64), 0) for i in range(256)]
        for step in worker.steps(points, batch=256, steps=1):
            for part in step:
                step.backward(model(part["input"]).square().sum(), count=len(part["input"]))
            step.commit()
    finally:
        Away._send = put
    return max(moved), sum(moved)


def test_parameters_that_workers_share_are_not_put_away_with_activations(on_workers):
    """They lie in other memory than when blocks were wrapped: on slices as many bytes move as on whole states."""
    from shoal.recipe.plan import Plan

    memory = MemoryPlan(offload_activations="disk", blocks=("?",))
    plans = [Plan(mesh={"data": 2}, states=states, device="cpu", memory=memory) for states in ("replicated", "zero1")]
    whole, slices = (on_workers(2, _moved, each) for each in plans)
    assert slices == whole


def _staged(group):
    lane = StagedLane(group)
    data = torch.arange(2 * STAGE_BYTES // 2 + 77, dtype=torch.int16)
    if group.rank:
        lane.send(data + group.rank, 0)
        return True
    out = [torch.empty_like(data) for _ in range(group.world - 1)]
    for rank, into in enumerate(out, start=1):
        lane.receive(into, rank)
    return all(torch.equal(into, data + rank) for rank, into in enumerate(out, start=1))


def test_what_goes_through_a_stage_of_shared_memory_arrives(on_workers):
    assert on_workers(3, _staged) == [True] * 3


def _full(group, plan_of, where):
    """A run in which the file takes nothing more, from the first checkpoint on."""
    torch.set_num_threads(1)
    worker = Worker(group, plan_of, shards=4)
    model = worker.model(torch.nn.Linear(300, 300))
    optimizer = worker.optimizer(torch.optim.AdamW(model.parameters(), lr=0.1))
    points = [(torch.full((300,), i / 64), 0) for i in range(64)]
    for step in worker.steps(points, batch=64, steps=3):
        for part in step:
            step.backward(model(part["input"]).square().sum(), count=len(part["input"]))
        step.commit()
        if step.number == 1:
            OnDisk.write = OnDisk.make = _no_room
        worker.save(where)
    worker.close()
    return worker.weights_sha256, sorted(optimizer.state[model.weight]) if group.rank == 0 else []


def _no_room(*_):
    raise OSError(28, "No space left on device")


def test_a_disk_that_is_full_when_states_are_brought_together_costs_memory_alone(on_workers, tmp_path):
    from shoal.recipe.plan import Plan

    memory = MemoryPlan(offload_optimizer="disk")
    plans = [Plan(mesh={"data": 2}, states="zero1", device="cpu", memory=each) for each in (MemoryPlan(), memory)]
    plain, full = (on_workers(2, _full, each, tmp_path / str(n)) for n, each in enumerate(plans))
    assert full == plain
    assert full[0][1] == ["exp_avg", "exp_avg_sq", "step"]


def test_parameters_on_disk_with_slices_are_refused_in_one_line_with_the_repair(run, tmp_path):
    memory = MemoryPlan(offload_parameters="disk")
    with pytest.raises(
        UserError, match=r"does not go with states = 'zero1' so far: use .*states = 'replicated'"
    ) as told:
        run(wanted_of(), plan=plan(4, 4, states="zero1", memory=memory), data=WORDS, run_dir=tmp_path / "no")
    assert "\n" not in str(told.value)
    assert not Path(tmp_path / "no").exists()


def test_slices_begin_where_blocks_of_8_bits_do():
    from shoal.comm.layout import flat_layout
    from shoal.comm.slices import Sharing, pieces_of

    layout = flat_layout([80 * 31, 90_000, 77, 70_001], [5], 3, 1, alignment=BLOCK)
    pieces = [piece for rank in range(3) for piece in pieces_of(layout, Sharing(3, 3).slices(rank))]
    assert any(piece.start for piece in pieces)
    assert all(piece.start % BLOCK == piece.place % BLOCK == 0 for piece in pieces)
