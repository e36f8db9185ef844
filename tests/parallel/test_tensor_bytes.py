"""What each layer sends is what the layout says that it sends."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import cloudpickle
import pytest
import tiny_models
import torch
from parallel import split_cases, split_runs
from parallel.split_cases import CASES, SEVEN

from shoal.comm.tensors import make_collectives
from shoal.models.registry import build, task_for
from shoal.parallel.layout.decide import layout_of
from shoal.parallel.layout.explain import LOSS, explain
from shoal.parallel.tensor.apply import split_model
from shoal.parallel.tensor.vocabulary import VocabularyPart
from shoal.recipe.recipe import ModelSpec

for module in (split_cases, split_runs, tiny_models):
    cloudpickle.register_pickle_by_value(module)

MADE = VocabularyPart.__init__
Sent = Counter[tuple[str, str, str]]  # (layer, direction, operation) -> bytes


class Labelled:
    """Collectives that write down what a layer has sent."""

    def __init__(self, real: Any, layer: str, log: "Log") -> None:
        self._real, self._layer, self._log = real, layer, log
        self.rank, self.world = real.rank, real.world

    def __getattr__(self, operation: str) -> Any:
        def call(*arguments: Any) -> Any:
            before = split_runs.sent_bytes(self._log.group)
            out = getattr(self._real, operation)(*arguments)
            for name, sent in split_runs.sent_bytes(self._log.group).items():
                if sent != before.get(name, 0):
                    self._log.sent[self._layer, self._log.direction, name] += sent - before.get(name, 0)
            return out

        return call


class Log:
    def __init__(self, group: Any) -> None:
        self.group, self.sent, self.direction = group, Counter(), "forward"


def _count(group: Any, case: Any) -> Mapping[tuple[str, str, str], float]:
    torch.manual_seed(0)
    spec = ModelSpec(kind=case.kind, task=case.task, options=case.options)
    model, task = build(spec, case.facts), task_for(spec, case.facts)
    log, collectives = Log(group), make_collectives(group)
    split_model(model, layout_of(model, model.dimensions(), case.rules, group.world), collectives)
    for name, part in model.named_modules():
        for owner in (part, getattr(part, "doors", None), getattr(part, "edges", None)):
            if hasattr(owner, "collectives"):
                owner.collectives = Labelled(collectives, name, log)

    def label(self: Any, local: Any, split: Any, _: Any) -> None:
        MADE(self, local, split, Labelled(collectives, LOSS, log))

    VocabularyPart.__init__ = label
    total, _ = task.loss(model, case.batch)
    log.direction = "backward"
    total.backward()
    return log.sent


def _inputs(case: Any) -> list[torch.Tensor]:
    if "input" in case.batch:
        return [case.batch["input"]]
    tokens = case.batch["tokens"]
    return [tokens[:, :-1] if case.kind in ("gpt", "moe", "lstm") else tokens]


COUNTED = ["gpt", "gpt-sliced", "gpt-row-first", "gpt-column-only", "gpt-sliced-whole-vocabulary", "mlp", "cnn",
           "cnn-joined", "cnn-rows", "resnet-rows", "resnet-by-width", "resnet-padded", "bert-answers-sliced",
           "bert-classes-row-first", "lstm", "moe", "moe-sliced"]  # fmt: skip


def _count_all(group: Any, cases: list[Any]) -> list[Any]:
    return [_count(group, case) for case in cases]


@pytest.mark.parametrize(("ways", "names"), [(2, COUNTED), (3, ["gpt", "gpt-sliced"])], ids=["2", "3"])
def test_each_layer_sends_the_bytes_of_its_formula(on_workers, ways, names):
    by_rank = on_workers(ways, _count_all, [CASES[name] for name in names])
    for index, name in enumerate(names):
        case = CASES[name]
        model = build(ModelSpec(kind=case.kind, task=case.task, options=case.options), case.facts)
        layout = layout_of(model, model.dimensions(), case.rules, ways)
        expected: Sent = Counter()
        for row in explain(model, layout, _inputs(case)):
            expected[row.layer, row.direction, row.operation] += row.bytes * ways  # by all workers together
        counted: Sent = Counter()
        for rank in by_rank:
            counted.update(rank[index])
        assert set(counted) == set(expected), name
        for key, sent in counted.items():
            assert sent == pytest.approx(expected[key], abs=ways), (name, key)  # each worker counts whole bytes


def test_a_megatron_block_reduces_four_times_the_stream_and_slicing_the_sequence_costs_no_more():
    case = CASES["gpt"]
    model = build(ModelSpec(kind="gpt", options=SEVEN), case.facts)
    stream = 3 * 12 * 21 * 4  # samples x tokens x width x bytes

    def block(rules: Mapping[str, str]) -> float:
        layout = layout_of(model, model.dimensions(), rules, 2)
        rows = explain(model, layout, _inputs(case))
        layers = ("blocks.0.attention.qkv", "blocks.0.attention.out", "blocks.0.up", "blocks.0.down")
        return sum(row.bytes for row in rows if row.layer in layers and "bias" not in row.formula)

    assert block({}) == 4 * 2 * (2 - 1) / 2 * stream
    small = 2 * (2 - 1) / 2 * 2 * 21 * 4  # the gradients of two biases are summed
    assert block({"sequence": "tensor"}) == block({}) + small
