"""A few optimiser steps of a tiny model, whole in one process or split over the workers of the tensor axis."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from shoal.comm.tensors import make_collectives
from shoal.models.registry import build, task_for
from shoal.parallel.layout.decide import layout_of
from shoal.parallel.layout.treatment import Layout
from shoal.parallel.tensor.apply import split_model
from shoal.parallel.tensor.whole import join_tensors
from shoal.recipe.recipe import ModelSpec


@dataclass(frozen=True)
class Case:
    kind: str
    options: Mapping[str, Any]
    facts: Mapping[str, Any]
    batch: Mapping[str, Tensor] = field(repr=False)
    rules: Mapping[str, str] = field(default_factory=dict)
    task: str = ""
    dtype: torch.dtype = torch.float64
    steps: int = 3

    def under(self, **rules: str) -> "Case":
        return replace(self, rules=rules)

    def named(self, rules: Mapping[str, str]) -> "Case":
        return replace(self, rules=rules)


@dataclass(frozen=True)
class Outcome:
    losses: list[float]
    tensors: dict[str, Tensor]  # parameters and buffers, whole
    gradients: dict[str, Tensor]  # of the last step, whole
    sent: dict[str, float]  # operation -> bytes that this worker has sent
    figures: dict[str, float]  # of an evaluation at the end
    replicated: dict[str, Tensor]  # what every worker holds whole


def run_case(group: Any, case: Case) -> Outcome:
    spec = ModelSpec(kind=case.kind, task=case.task, options=case.options)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = build(spec, case.facts).to(case.dtype)
    task = task_for(spec, case.facts)
    batch = {key: t.to(case.dtype) if t.is_floating_point() else t for key, t in case.batch.items()}
    layout = Layout(1, {}, {})
    collectives = None
    if group is not None:
        layout = layout_of(model, model.dimensions(), case.rules, group.world)
        collectives = make_collectives(group)
        split_model(model, layout, collectives)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    losses = []
    before = sent_bytes(group)
    gradients: dict[str, Tensor] = {}
    for step in range(case.steps):
        torch.manual_seed(step)
        total, count = task.loss(model, batch)
        optimizer.zero_grad()
        (total / count).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        losses.append(total.item())
    after = sent_bytes(group)
    model.eval()
    figures = task.measure(model, batch)

    state = {name: t.clone() for name, t in model.state_dict().items()}

    def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors if collectives is None else join_tensors(tensors, layout.splits, collectives)

    return Outcome(
        losses,
        whole(state),
        whole(gradients),
        {operation: after[operation] - before.get(operation, 0) for operation in after},
        figures,
        {name: t for name, t in state.items() if name not in layout.splits},
    )


def sent_bytes(group: Any) -> dict[str, float]:
    return {} if group is None else {op: t.sent_bytes for (op, _), t in group.counters.totals().items()}


def worst(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest difference relative to the largest of all gradients or of the tensor itself, and whose it is."""
    assert set(found) == set(expected)
    top = max(float(t.abs().max()) for t in expected.values())
    sizes = {
        name: float((found[name].double() - t.double()).abs().max()) / max(float(t.abs().max()), 1e-3 * top)
        for name, t in expected.items()
    }
    name = max(sizes, key=lambda n: sizes[n])
    return sizes[name], name
