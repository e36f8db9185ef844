"""Training over every axis of the mesh: pipelines to the bit, split tensors within the tolerance."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train.test_exactness import trail
from train.tiny_runs import recipe, splits

from shoal.data.source import Splits
from shoal.errors import UserError
from shoal.models.registry import build
from shoal.observe.pipeline_section import facts, of_run
from shoal.parallel.schedules import formulas, make_schedule
from shoal.parallel.schedules.csv_file import to_csv
from shoal.recipe.memory_plan import MemoryPlan
from shoal.recipe.pipeline_plan import PipelinePlan
from shoal.recipe.plan import Plan
from shoal.run.run import Run
from shoal.train import checkpoint
from shoal.train.api import train


def over(schedule: str = "1f1b", chunks: int = 1, **mesh: int) -> Plan:
    return Plan(mesh=mesh, device="cpu", pipeline=PipelinePlan(schedule=schedule, chunks=chunks))


PIPELINES = {
    "gpt": [over(pipe=2), over("zb-v", 2, pipe=2), over("zb-h1", data=2, pipe=2), over(pipe=2, data=3)],
    "cnn": [over("gpipe", pipe=2), over("off", data=2, pipe=2)],
    "resnet": [over("interleaved", 2, pipe=2), over(pipe=3)],
    "lstm": [over(pipe=2), over(data=2, pipe=2)],
    "elmo": [over("zb-h1", pipe=2)],
}


@pytest.mark.parametrize("kind", list(PIPELINES))
def test_a_pipeline_gives_the_bits_of_one_process(run, kind):
    wanted, data = recipe(kind, clip=0.05, micro_batches=2, steps=5), splits(kind, 53)  # the fourth is a tail
    alone = run(wanted, 1, data=data)
    norms = [step[4] for step in trail(alone)]
    assert sum(norm > wanted.clip for norm in norms) >= 3, "the recipe must clip, or this proves nothing"
    for plan in PIPELINES[kind]:
        found = run(wanted, plan=plan, data=data)
        assert trail(found) == trail(alone), plan
        assert found["weights_sha256"] == alone["weights_sha256"], plan
        assert found["figures"] == alone["figures"], plan


SPLITS = {
    "gpt": [
        *(over(tensor=2), over(context=2), over(data=2, context=2), over(pipe=2, tensor=2)),
        over("zb-v", 2, pipe=2, context=2),
    ],
    "cnn": [over(tensor=2), over(tensor=2, data=2), over(pipe=2, tensor=2)],
    "resnet": [over(tensor=2)],
    "lstm": [over(tensor=2)],
    "moe": [
        *(over(expert=2), over(data=2, expert=2), over(expert=2, tensor=2), over(tensor=2)),
        over(pipe=2, expert=2, context=2),
    ],
}
MIXED = {  # pairs of axes that are among the above, too, or in a test of their own
    "gpt": [over(data=2, tensor=2)],
    "moe": [over("zb-h1", pipe=2, expert=2), over(data=2, expert=2, context=2)],
}


@pytest.mark.parametrize(
    ("kind", "plans"),
    [
        *(pytest.param(kind, plans, id=kind) for kind, plans in SPLITS.items()),
        *(pytest.param(kind, plans, id=f"{kind}, more", marks=pytest.mark.soak) for kind, plans in MIXED.items()),
    ],
)
def test_split_tensors_train_within_the_tolerance_and_to_their_own_bits(run, kind, plans):
    """In float64, where what is left is the order of sums alone."""
    wanted, data = recipe(kind, clip=0.05, micro_batches=2, steps=3), wide(splits(kind, 37))  # the third is a tail

    def make():
        return build(wanted.model, data.train.facts).double()

    alone = run(wanted, 1, data=data, model=make)
    weights = loaded(alone)
    for plan in plans:
        found = run(wanted, plan=plan, data=data, model=make)
        assert loaded(found).keys() == weights.keys()
        assert max(error(t, weights[name]) for name, t in loaded(found).items()) < 1e-10, plan
    assert run(wanted, plan=plan, data=data, model=make)["weights_sha256"] == found["weights_sha256"], plan


def test_replicas_of_split_tensors_give_the_bits_of_one(run):
    wanted, data = recipe("gpt", clip=0.05, micro_batches=2, steps=4), splits("gpt", 37)
    alone = run(wanted, plan=over(tensor=2), data=data)
    assert run(wanted, plan=over(data=2, tensor=2), data=data)["weights_sha256"] == alone["weights_sha256"]


class Wide:
    """A source whose numbers are float64."""

    def __init__(self, source):
        self.source, self.facts, self.fingerprint = source, source.facts, source.fingerprint

    def __len__(self):
        return len(self.source)

    def fetch(self, ids, epoch):
        return {k: t.double() if t.is_floating_point() else t for k, t in self.source.fetch(ids, epoch).items()}


def wide(data: Splits) -> Splits:
    return Splits(Wide(data.train), validation=Wide(data.validation))


def loaded(result: dict) -> dict[str, torch.Tensor]:
    return dict(checkpoint.load(Path(result["checkpoint"])).tensors)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    if not wanted.is_floating_point():
        return float(not torch.equal(found, wanted))
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3))


def test_a_checkpoint_loads_into_any_other_layout_and_the_bits_go_on(run):
    """Two steps in one layout, then up to four in another: as four in one process."""
    wanted, data = recipe("gpt", clip=0.05, micro_batches=2, steps=4), splits("gpt", 37)  # the third is a tail
    alone = run(wanted, 1, data=data)
    layouts = [over(pipe=2), over(data=3), over("zb-v", 2, data=2, pipe=2), over(data=1)]
    for before, after in zip(layouts, (*layouts[1:], layouts[0]), strict=True):
        begun = run(replace(wanted, steps=2), plan=before, data=data)
        ended = run(wanted, plan=after, data=data, resume=begun["run_dir"])
        assert ended["weights_sha256"] == alone["weights_sha256"], (before, after)


@pytest.mark.parametrize("mesh", [{"data": 2, "pipe": 2}, {"data": 2, "tensor": 2}], ids=str)
def test_sharded_states_go_with_pipelines_and_split_tensors(run, mesh):
    wanted, data = recipe("gpt", clip=0.05, micro_batches=2, steps=4), splits("gpt", 37)
    whole = run(wanted, plan=over(**mesh), data=data)
    for states in ("zero1", "zero2", "zero3"):
        found = run(wanted, plan=replace(over(**mesh), states=states), data=data)
        assert found["weights_sha256"] == whole["weights_sha256"], states
        ours, theirs = loaded(found), loaded(whole)
        assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("mesh", [{"pipe": 2}, {"tensor": 2}, {"context": 2}, {"expert": 2}], ids=str)
def test_activations_of_split_models_are_computed_again_or_fetched_from_disk_to_the_same_bits(run, mesh):
    kind = "moe" if "expert" in mesh else "gpt"
    wanted, data = recipe(kind, micro_batches=2, steps=2), splits(kind, 64)
    whole = run(wanted, plan=over(**mesh), data=data)
    for memory in (MemoryPlan(recompute="full"), MemoryPlan(offload_activations="disk")):
        found = run(wanted, plan=replace(over(**mesh), memory=memory), data=data)
        assert found["weights_sha256"] == whole["weights_sha256"], memory


AGAIN = (MemoryPlan(recompute="full"), MemoryPlan(recompute="full", offload_activations="disk"))


@pytest.mark.parametrize(("kind", "memories"), [("gpt", AGAIN), ("resnet", AGAIN[::-1])], ids=["gpt", "resnet"])
def test_chunks_are_computed_again_for_backward_passes_in_two_halves_to_the_same_bits(run, kind, memories):
    wanted, data = recipe(kind, micro_batches=2, steps=2), splits(kind, 64)
    alone = run(wanted, 1, data=data)
    for plan, memory in zip((over("zb-h1", pipe=2), over("zb-v", 2, pipe=2)), memories, strict=True):
        found = run(wanted, plan=replace(plan, memory=memory), data=data)
        assert found["weights_sha256"] == alone["weights_sha256"], (plan, memory)


def test_the_log_says_what_each_step_was_for_every_stage(run):
    wanted, data = recipe("gpt", micro_batches=2, steps=4), splits("gpt", 64)
    found = Run(Path(run(wanted, plan=over("1f1b", data=2, pipe=2), data=data)["run_dir"]))
    told = [event["stages"] for event in found.events() if event["event"] == "committed"]
    assert len(told) == 4
    for ranks in told:  # of four shards with two micro-batches each
        assert [peak for *_, peak in ranks] == [formulas.peak("1f1b", place, 2, 8) for place in (0, 1, 0, 1)]
        assert all(0 < busy <= seconds and 0 <= waiting < seconds for busy, waiting, seconds, _ in ranks)
    staged = of_run(found)
    assert facts(staged)["still_by_formula"] == pytest.approx(1 / 9)


def test_a_checkpoint_of_any_mix_of_axes_goes_on_in_any_other(run, tmp_path):
    """Two steps under one mesh, then up to three under another: as three in one process, in float64."""
    wanted, data = recipe("moe", micro_batches=2, steps=3), wide(splits("moe", 64))

    def make():
        return build(wanted.model, data.train.facts).double()

    weights = loaded(run(wanted, 1, data=data, model=make))
    meshes = [
        over(pipe=2, expert=2),
        over(expert=2, context=2),
        over("interleaved", 2, pipe=2, context=2),
        over(data=2),
    ]
    for before, after in zip(meshes, (*meshes[1:], meshes[0]), strict=True):
        begun = run(replace(wanted, steps=2), plan=before, data=data, model=make)
        ended = loaded(run(wanted, plan=after, data=data, model=make, resume=begun["run_dir"]))
        assert ended.keys() == weights.keys()
        assert max(error(t, weights[name]) for name, t in ended.items()) < 1e-10, (before, after)


def test_a_checkpoint_of_split_tensors_is_that_of_the_whole_model(run, tmp_path):
    wanted, data = replace(recipe("gpt"), steps=3), splits("gpt", 64)
    begun = run(wanted, plan=over(tensor=2), data=data)
    there = loaded(begun)
    whole = loaded(run(wanted, 1, data=data))
    assert {n: t.shape for n, t in there.items()} == {n: t.shape for n, t in whole.items()}
    other = shutil.copytree(begun["run_dir"], tmp_path / "other")
    ended = run(replace(wanted, steps=5), plan=over(pipe=2), data=data, resume=begun["run_dir"])
    again = run(replace(wanted, steps=5), 1, data=data, resume=other)
    assert ended["weights_sha256"] == again["weights_sha256"]


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (over(expert=2), "has no experts"),
        (over(tensor=5), "heads"),
        (replace(over(pipe=2), pipeline=PipelinePlan(cuts=("blocks.9",))), "blocks.1"),
        (over("1f2b", pipe=2), "1f1b"),
        (over("interleaved", 9, pipe=2), "chunks"),
    ],
)
def test_what_cannot_be_split_is_refused_in_one_line(run, plan, says):
    with pytest.raises(UserError) as found:
        run(recipe("gpt"), plan=plan, data=splits("gpt", 64))
    assert says in str(found.value)
    assert "\n" not in str(found.value)


def test_a_schedule_from_a_file_that_deadlocks_is_refused_before_any_worker_starts(tmp_path, monkeypatch):
    rows = to_csv(make_schedule("gpipe", 2, 16)).splitlines()
    rows[0] = ",".join(rows[0].split(",")[::-1])  # all backward passes first
    file = tmp_path / "mine.csv"
    file.write_text("\n".join(rows))
    monkeypatch.setattr("shoal.train.api.Agent", lambda *a: pytest.fail("a process was started"))
    with pytest.raises(UserError, match=r"mine\.csv"):
        train(recipe("gpt", micro_batches=2), over(str(file), pipe=2), data=splits("gpt", 64), run_dir=tmp_path / "run")
