"""A worker of a split model has memory for what it holds of it, from the start."""

from dataclasses import replace

import pytest
import torch
from resident import watch
from train.tiny_runs import recipe, splits

from shoal.errors import UserError
from shoal.models.registry import build, build_blank, outline, task_for
from shoal.parallel.building import Building, building, check_room
from shoal.parallel.held import Held
from shoal.parallel.pipeline.head_and_tail import arguments_of
from shoal.parallel.place import Subject, place
from shoal.recipe.pipeline_plan import PipelinePlan
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import ModelSpec
from shoal.train.api import train

FACTS = {"vocab": 512, "context": 16}
BATCH = {"tokens": torch.zeros(1, 17, dtype=torch.int64)}
OPTIONS = {"layers": 4, "heads": 8, "width": 512}
SPECS = {
    "gpt": ModelSpec(kind="gpt", options=OPTIONS),
    "deep gpt": ModelSpec(kind="gpt", options={**OPTIONS, "layers": 8}),
    "moe": ModelSpec(kind="moe", options={**OPTIONS, "layers": 2, "experts": 4}),
}


def placed(group, kind: str, mesh: dict[str, int], faulty: bool) -> tuple[int, int, int, Building]:
    """(bytes by which the resident set grew at most, bytes that are held, bytes of the whole model, what was
    predicted)."""
    torch.set_num_threads(1)
    spec = SPECS[kind]
    hold(group, replace(spec, options={**spec.options, "width": 32}), mesh)  # what is imported and allocated once
    grown = watch()
    kept = build_whole(spec) if faulty else None
    held, whole = hold(group, spec, mesh)
    most = grown()
    del kept
    parts = (held.chunks or {"": held.module}).values()
    there = {id(p): p.nbytes for part in parts for p in part.parameters()}
    return most, sum(there.values()), whole, foretold(spec, mesh)[group.rank]


def foretold(spec: ModelSpec, mesh: dict[str, int]) -> tuple[Building, ...]:
    torch.manual_seed(0)
    found = build_blank(spec, FACTS)
    assert found is not None
    example = arguments_of(task_for(spec, FACTS).loss, found.module, BATCH)
    return building(found.module, Plan(mesh=mesh, device="cpu"), found.first, example)


def hold(group, spec: ModelSpec, mesh: dict[str, int]) -> tuple[Held, int]:
    torch.manual_seed(0)
    found = build_blank(spec, FACTS)
    assert found is not None
    whole = sum(t.nbytes for t in found.module.parameters())
    subject = Subject(task_for(spec, FACTS), BATCH, found.first)
    return place(found.module, Plan(mesh=mesh, device="cpu"), group, torch.device("cpu"), subject), whole


def build_whole(spec: ModelSpec) -> torch.nn.Module:
    torch.manual_seed(0)
    return build(spec, FACTS)


CASES = {
    "gpt over tensors": ("gpt", {"tensor": 4}),
    "gpt in stages": ("deep gpt", {"pipe": 4}),
    "gpt in stages over tensors": ("deep gpt", {"pipe": 2, "tensor": 2}),
    "moe over experts": ("moe", {"expert": 4}),
}
ROOM = 16 << 20  # activations, what stands for values while a model is recorded, and gaps between tensors


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if "pipe" in CASES[case][1] else ()) for case in CASES]
)
def test_building_takes_what_was_foretold_and_a_little_more(on_workers, case):
    kind, mesh = CASES[case]
    for grown, held, whole, foretold in on_workers(Plan(mesh=mesh).workers, placed, kind, mesh, False):
        assert foretold.how == "in parts"
        assert held < 0.6 * whole
        assert foretold.held == held or "pipe" in mesh, "these cuts were made by the clock"
        assert 0.5 * foretold.held < grown < foretold.peak + ROOM < whole, (grown, foretold, whole)


def test_the_measure_finds_a_worker_that_builds_the_whole(on_workers):
    kind, mesh = CASES["gpt over tensors"]
    for grown, _, whole, foretold in on_workers(4, placed, kind, mesh, True):
        assert grown > whole > foretold.peak + ROOM


def test_cuts_that_a_plan_names_are_foretold_to_the_byte():
    """Of tied tokens the first and the last stage hold a copy each."""
    spec, plan = SPECS["gpt"], Plan(mesh={"pipe": 2}, pipeline=PipelinePlan(cuts=("blocks.3.norm1",)))
    found = build_blank(spec, FACTS)
    assert found is not None
    example = arguments_of(task_for(spec, FACTS).loss, found.module, BATCH)
    sizes = {name: p.nbytes for name, p in found.module.named_parameters()}
    last = sum(n for name, n in sizes.items() if name.startswith(("blocks.3", "norm", "tokens")))
    first = sum(n for name, n in sizes.items() if not name.startswith(("blocks.3", "norm")))
    assert [each.held for each in building(found.module, plan, found.first, example)] == [first, last]


def test_a_model_that_does_not_say_its_first_values_is_built_whole_and_refused_where_that_does_not_fit():
    module = outline(SPECS["gpt"], FACTS)
    whole = sum(p.nbytes for p in module.parameters())
    plan = Plan(mesh={"tensor": 4})
    for each in building(module, plan, None, None):
        assert (each.how, each.peak) == ("whole", whole)
    check_room(module, plan, None, 4 * whole)
    with pytest.raises(UserError, match="4 workers build it whole: the model does not say its first values") as refused:
        check_room(module, plan, None, 4 * whole - 1)
    assert "\n" not in str(refused.value)
    found = build_blank(SPECS["gpt"], FACTS)
    assert found is not None
    check_room(found.module, plan, found.first, whole)
    with pytest.raises(UserError, match="one copy of it"):
        check_room(found.module, plan, found.first, whole - 1)


def test_a_run_that_its_host_cannot_build_is_refused_before_a_worker_starts(monkeypatch, tmp_path):
    monkeypatch.setattr("shoal.train.api.memory_bytes", lambda: 1 << 10)
    wanted, plan = recipe("gpt"), Plan(mesh={"tensor": 2}, device="cpu")
    with pytest.raises(UserError, match=r"building the model takes at least .* and this host has 1KiB of memory"):
        train(wanted, plan, data=splits("gpt", 64), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
