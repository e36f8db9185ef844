"""Stages of a pipeline, each split over the tensor axis, together compute what the whole model computes."""

from dataclasses import replace
from typing import Any

import cloudpickle
import pytest
import tiny_models
import torch
from parallel import split_cases, split_runs
from parallel.split_cases import CASES

from shoal.comm.tensors import make_collectives
from shoal.models.registry import build
from shoal.models.tasks.cross_entropy import PartOfLogits, cross_entropy
from shoal.parallel.layout.decide import layout_of
from shoal.parallel.partition.chunks import OUTPUT
from shoal.parallel.partition.cut import cut
from shoal.parallel.tensor.apply import split_model
from shoal.recipe.recipe import ModelSpec

for module in (split_cases, split_runs, tiny_models):
    cloudpickle.register_pickle_by_value(module)


def _losses(group: Any, case: Any) -> list[float]:
    """Of batches of two lengths; gradients flow through both stages."""
    torch.manual_seed(0)
    model = build(ModelSpec(kind="gpt", options=case.options), case.facts).double()
    tokens = case.batch["tokens"]
    parts = [lambda values: {OUTPUT: model(**values)}]
    if group is not None:
        layout = layout_of(model, model.dimensions(), case.rules, group.world)
        chunks = cut(model, 2, example=(tokens[:, :-1],), cuts=("blocks.1",)).chunks
        for chunk in chunks:
            split_model(chunk.module, layout, make_collectives(group))
        parts = [chunk.module for chunk in chunks]
    losses = []
    for length in (12, 9, 12):
        values: Any = {"tokens": tokens[:, :length]}
        torch.manual_seed(length)
        for part in parts:
            values = {"tokens": tokens[:, :length], **part(values)}
        logits = values[OUTPUT]
        assert isinstance(logits, PartOfLogits) == (group is not None)
        loss, _ = cross_entropy(logits, tokens[:, 1 : length + 1])
        loss.backward()
        losses.append(loss.item())
    norms = [p.grad for name, p in model.named_parameters() if name == "blocks.0.norm1.weight"]
    return losses + ([float(norms[0].norm())] if group is None or norms[0] is not None else [])


@pytest.mark.parametrize("name", ["gpt", "gpt-sliced"])
def test_stages_split_one_by_one_give_the_losses_of_the_whole(on_workers, name):
    case = replace(CASES[name], options={**CASES[name].options, "dropout": 0.1})
    whole = _losses(None, case)
    for found in on_workers(2, _losses, case):
        assert found == pytest.approx(whole, rel=1e-10)
