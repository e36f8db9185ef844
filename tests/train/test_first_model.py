"""With zero3, workers of one host make the first values of a model together, where they will share them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from resident import watch
from train.test_exactness import trail
from train.tiny_runs import recipe, splits

from shoal.models.registry import build, build_blank, outline, task_for
from shoal.parallel.building import building
from shoal.recipe.memory_plan import MemoryPlan
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import DataSpec, ModelSpec, Recipe
from shoal.train.first_batch import subject_of
from shoal.train.first_model import in_shared_memory, model_to_place, model_with
from shoal.train.loop import Order, worker_of
from shoal.train.weights import weights_sha256

SMALL, LARGE = ({"layers": 8, "heads": 8, "width": width} for width in (32, 512))
ZERO3 = Plan(mesh={"data": 4}, states="zero3", device="cpu")
ROOM = 12 << 20  # what hooks and tables take


def wanted(options: dict) -> Recipe:
    return recipe("gpt", model=ModelSpec(kind="gpt", options=options, freeze=("positions.*",)))


def placed(group, options: dict, parts: bool, plan: Plan = ZERO3):
    data = splits("gpt", 64)
    order = Order(wanted(options), plan, data=data)
    worker = worker_of(group, plan, order.recipe)
    assert in_shared_memory(plan, group, worker.device)
    made, first = model_to_place(order, data, parts=parts)
    task = task_for(order.recipe.model, data.train.facts)
    subject = subject_of(order.recipe, data, task, worker.device, first) if parts else None
    worker.model(made, subject=subject)
    return worker, made


def grown(group, parts: bool) -> tuple[int, int]:
    """(bytes by which the resident set grew at most, shared memory among it that this worker has written; bytes of the
    model)."""
    torch.set_num_threads(1)
    placed(group, SMALL, parts)  # what is imported and allocated once
    group.gather(b"")
    most = watch()
    _, made = placed(group, LARGE, parts)
    return most(), sum(p.nbytes for p in made.parameters())


def test_each_worker_has_memory_for_its_share_of_the_model_and_a_tensor_more(on_workers):
    outlined = outline(wanted(LARGE).model, splits("gpt", 64).train.facts)
    blank = build_blank(wanted(LARGE).model, splits("gpt", 64).train.facts)
    assert blank is not None
    foretold = building(outlined, ZERO3, blank.first, None)
    for (peak, whole), told in zip(on_workers(4, grown, True), foretold, strict=True):
        assert told.how == "in parts"
        assert 0.6 * told.held < peak < told.peak + ROOM < 0.5 * whole, (peak, told, whole)


def test_the_measure_finds_workers_that_build_the_whole(on_workers):
    for peak, whole in on_workers(4, grown, False):
        assert peak > 0.9 * whole  # it had some free memory already


def hashes(group, memory: MemoryPlan) -> tuple[str, list[bool]]:
    _, made = placed(group, SMALL, True, replace(ZERO3, memory=memory))
    return weights_sha256(dict(made.state_dict())), [p.requires_grad for p in made.parameters()]


@pytest.mark.parametrize("memory", [{}, {"optimizer_bits": 8, "offload_optimizer": "disk"}], ids=str)
def test_they_are_the_first_values_of_one_process_frozen_ones_among_them(on_workers, memory):
    torch.manual_seed(wanted(SMALL).seed)
    alone = build(wanted(SMALL).model, splits("gpt", 64).train.facts)
    found = on_workers(4, hashes, MemoryPlan(**memory))
    expected = weights_sha256(dict(alone.state_dict())), [p.requires_grad for p in alone.parameters()]
    assert found == [expected] * 4
    assert not all(expected[1])


def test_weights_that_workers_made_together_are_trained_with_states_in_8_bits_on_disk(run):
    spec = ModelSpec(kind="gpt", options={"layers": 2, "heads": 2, "width": 72, "dropout": 0.1})
    memory = MemoryPlan(optimizer_bits=8, offload_optimizer="disk")
    alone, two = (
        run(
            recipe("gpt", model=spec, steps=3),
            plan=Plan(mesh={"data": workers}, states="zero3", device="cpu", memory=memory),
            data=splits("gpt", 35),
        )
        for workers in (1, 2)
    )
    assert trail(two) == trail(alone)
    assert two["weights_sha256"] == alone["weights_sha256"]


@pytest.mark.parametrize(
    "plan",
    [
        replace(ZERO3, states="zero2"),
        replace(ZERO3, state_group=2),
        replace(ZERO3, memory=MemoryPlan(parameters="bfloat16-stochastic")),
        Plan(mesh={"data": 2, "tensor": 2}, states="zero3"),
    ],
)
def test_other_plans_place_their_model_in_other_ways(on_workers, plan):
    assert on_workers(4, shares, plan) == [False] * 4


def shares(group, plan) -> bool:
    return in_shared_memory(plan, group, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["gpt", "lstm", "resnet"])
def test_a_model_that_is_given_weights_has_them_and_no_copy(kind):
    data = splits(kind, 64)
    order = Order(recipe(kind), Plan(mesh={"pipe": 2}), data=data)
    torch.manual_seed(1)  # not the recipe's
    weights = {
        name: tensor.detach() for name, tensor in build(order.recipe.model, data.train.facts).state_dict().items()
    }
    model = model_with(weights, order, data)
    found = model.state_dict(keep_vars=True)
    assert {name: tensor.data_ptr() for name, tensor in found.items()} == {n: t.data_ptr() for n, t in weights.items()}
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("mesh", [{"pipe": 2}, {"tensor": 2}], ids=str)
def test_a_split_model_goes_on_to_write_what_the_whole_one_would(run, mesh, tmp_path):
    page = tmp_path / "page.txt"
    page.write_text("where the work runs may change the time and the memory, never the result. " * 20)
    wanted = recipe("gpt", data=DataSpec(source="text", path=str(page), options={"context": 8}), steps=2)
    texts = []
    for plan in (Plan(mesh={"data": 1}, device="cpu"), Plan(mesh=mesh, device="cpu")):
        result = run(replace(wanted, report=replace(wanted.report, sample=True)), plan=plan)
        log = (Path(result["run_dir"]) / "events.jsonl").read_text(encoding="utf-8").splitlines()
        texts += [event["text"] for event in map(json.loads, log) if event["event"] == "sampled"]
    assert len(texts) == 2
    assert texts[0] == texts[1] or "tensor" in mesh, "a split tensor's sums are in another order"
