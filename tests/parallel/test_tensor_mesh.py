"""The tensor axis beside another axis of the mesh: gradients added up over that one are those of the whole model."""

from dataclasses import replace
from typing import Any

import cloudpickle
import pytest
import tiny_models
import torch
from parallel import split_cases, split_runs
from parallel.split_cases import CASES
from parallel.split_runs import worst

from shoal.comm.tensors import make_collectives
from shoal.models.registry import build, task_for
from shoal.parallel.context.model import split_sequence
from shoal.parallel.context.ring import Ring
from shoal.parallel.context.task import SplitTask
from shoal.parallel.experts.model import experts_split, split_experts
from shoal.parallel.layout.decide import layout_for
from shoal.parallel.tensor.apply import split_model
from shoal.parallel.tensor.whole import join_tensors
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import ModelSpec

for module in (split_cases, split_runs, tiny_models):
    cloudpickle.register_pickle_by_value(module)


def _gradients(group: Any, case: Any, mesh: dict[str, int]) -> dict[str, torch.Tensor]:
    """Of one batch: samples are dealt out over the axes data and expert, places over the axis context."""
    torch.manual_seed(0)
    spec = ModelSpec(kind=case.kind, task=case.task, options=case.options)
    model, task = build(spec, case.facts).double(), task_for(spec, case.facts)
    if group is None:
        total, _ = task.loss(model, case.batch)
        total.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    plan = Plan(mesh=mesh, rules=case.rules)
    layout = layout_for(model, plan)
    along_tensor = make_collectives(group.split(plan.axes.partition("tensor")))
    (other,) = {axis for axis, _ in plan.axes.sizes} - {"tensor"}
    across = group.split(plan.axes.partition(other))
    split_model(model, layout, along_tensor)
    batch = case.batch
    if other == "expert":
        cut = experts_split(model, across.world)
        split_experts(model, cut, make_collectives(across))
    if other in ("data", "expert"):
        batch = {key: t[across.rank :: across.world] for key, t in batch.items()}
    else:
        ring = Ring.of(across, case.kind == "gpt")
        split_sequence(model, ring)
        task = SplitTask(task, ring)
    total, _ = task.loss(model, batch)
    total.backward()
    sums = make_collectives(across)
    cut = cut if other == "expert" else {}
    own = {
        n: p.grad if n in cut else sums.all_reduce(p.grad) for n, p in model.named_parameters() if p.grad is not None
    }
    return join_tensors(join_tensors(own, layout.splits, along_tensor), cut, sums)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("gpt", {"data": 2, "tensor": 2}),
        ("gpt-sliced", {"tensor": 2, "data": 2}),
        ("gpt", {"context": 2, "tensor": 2}),
        ("moe", {"expert": 2, "tensor": 2}),
        ("bert-classes-row-first", {"tensor": 2, "context": 2}),
    ],
)
def test_gradients_over_a_mesh_are_those_of_one_process(on_workers, name, mesh):
    options = {**CASES[name].options, "dropout": 0.0, "attention_dropout": 0.0}  # masks go by micro-batch
    case = replace(CASES[name], options=options)
    whole = _gradients(None, case, {})
    for found in on_workers(4, _gradients, case, mesh):
        assert worst(found, whole)[0] < 1e-10
