"""The standard list of `shoal prove --plans standard`: seven kinds of models, tiny, each under the plans that split it.

Exact plans are held to the reference's bits in float32, as people train; those that split tensors, sequences or experts
to a tolerance, in float32 and again in float64, where nothing but the order of sums is left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from shoal.data.source import Splits
from shoal.errors import unknown_name
from shoal.models.registry import build
from shoal.prove.samples import Pictures, Sentences
from shoal.recipe.memory_plan import MemoryPlan
from shoal.recipe.pipeline_plan import PipelinePlan
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import ModelSpec, OptimizerSpec, Recipe, ScheduleSpec

SAMPLES = 45  # the sixth step of an epoch has 5 of its 8 samples: some shards have none
ADAMW = OptimizerSpec(name="adamw", lr=0.01)
MOMENTUM = OptimizerSpec(name="sgd", lr=0.003, options={"momentum": 0.9})
ROWS = {"rows": "tensor"}  # images are split by their rows, with halos
SEQUENCE = {"sequence": "tensor"}  # between the layers the sequence is split


@dataclass(frozen=True)
class Case:
    """One recipe and the plans that it is proved under."""

    name: str
    recipe: Recipe
    data: Splits
    plans: tuple[Plan, ...]
    wide: bool = False  # in float64

    @property
    def model(self) -> "Wide | None":
        return Wide(self.recipe.model, dict(self.data.train.facts)) if self.wide else None


@dataclass(frozen=True)
class Wide:
    """Builds what the recipe would, in float64."""

    spec: ModelSpec
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self) -> nn.Module:
        return build(self.spec, self.facts).double()


def over(
    schedule: str = "1f1b",
    chunks: int = 1,
    states: Literal["auto", "zero1", "zero2", "zero3"] = "auto",
    **mesh: int,
) -> Plan:
    return Plan(mesh=mesh, states=states, device="cpu", pipeline=PipelinePlan(schedule=schedule, chunks=chunks))


def data(workers: int, **given: Any) -> Plan:
    return Plan(mesh={"data": workers}, device="cpu", **given)


def by_rules(rules: Mapping[str, str], **mesh: int) -> Plan:
    return Plan(mesh=mesh, rules=rules, device="cpu")


EXACT: dict[str, tuple[Plan, ...]] = {
    "mlp": (
        data(1),
        data(2),
        data(5),
        data(8),
        data(3, placement=(1, 6, 1)),
        data(2, states="zero1"),
        data(3, states="zero2"),
        data(4, states="zero3"),
        data(2, sync="parameter-server", servers=2),
        data(2, memory=MemoryPlan(offload_optimizer="disk")),
        data(3, states="zero2", memory=MemoryPlan(offload_optimizer="disk")),
        over(pipe=2),
    ),
    "resnet": (
        data(3),
        over("gpipe", pipe=2),
        over(pipe=3),
        over("interleaved", 2, pipe=2),
        over("off", data=2, pipe=2),
        data(2, states="zero3"),
    ),
    "lstm": (
        data(4),
        replace(over(pipe=2), memory=MemoryPlan(offload_optimizer="disk")),
        over("gpipe", data=2, pipe=2),
        data(2, states="zero2"),
    ),
    "elmo": (data(3), over(pipe=2), data(2, sync="parameter-server")),
    "bert": (
        data(2),
        over("breadth-first", 2, pipe=2),
        over(data=2, pipe=2),
        data(2, memory=MemoryPlan(recompute="full")),
        data(2, memory=MemoryPlan(offload_activations="disk")),
        data(2, states="zero1", memory=MemoryPlan(peak_bytes="1GiB")),
    ),
    "gpt": (
        data(3),
        over("zb-v", 2, pipe=2),
        over("zb-h1", data=2, pipe=2),
        over("zb-h2", pipe=3),
        over("dualpipe-v", 2, pipe=2),
        over(data=4, pipe=2),
        data(2, states="zero3"),
        over(data=2, pipe=2, states="zero2"),
        over("interleaved", 2, data=2, pipe=2, states="zero3"),
        data(2, memory=MemoryPlan(recompute="selective")),
        data(2, states="zero3", memory=MemoryPlan(recompute="full")),
        replace(over(data=2, pipe=2, states="zero1"), memory=MemoryPlan(offload_activations="disk")),
    ),
    "moe": (data(4), over(pipe=2), data(2, states="zero1")),
}
SPLIT: dict[str, tuple[Plan, ...]] = {
    "mlp": (data(4, sync="fast"), over(tensor=2), over(data=2, tensor=2, states="zero1")),
    "resnet": (over(tensor=2), by_rules(ROWS, tensor=2), by_rules(ROWS, data=2, tensor=2)),
    "lstm": (over(tensor=2), over(data=2, tensor=2)),
    "elmo": (data(2, sync="fast"), over(tensor=2)),
    "bert": (over(tensor=2), over(context=2), over(pipe=2, context=2), by_rules(SEQUENCE, tensor=2)),
    "gpt": (
        over(tensor=2),
        over(context=2),
        over(pipe=2, tensor=2),
        over(context=2, tensor=2),
        over(data=2, context=2, states="zero1"),
        over("zb-v", 2, pipe=2, context=2),
        over(data=2, pipe=2, tensor=2),
    ),
    "moe": (
        over(expert=2),
        over(data=2, expert=2, states="zero2"),
        over(expert=2, tensor=2),
        over("zb-h1", pipe=2, expert=2),
        over(expert=2, context=2),
        over(pipe=2, expert=2, context=2),
        over(expert=4),
        over(tensor=2),
    ),
}
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": (9, 7), "dropout": 0.2},
    "resnet": {"depth": 8, "width": 4},
    "lstm": {"width": 12, "layers": 3, "dropout": 0.1},
    "elmo": {"width": 10, "layers": 2, "dropout": 0.1},
    "bert": {"layers": 2, "heads": 2, "width": 16, "dropout": 0.1},
    "gpt": {"layers": 4, "heads": 2, "width": 16, "dropout": 0.1},
    "moe": {"layers": 2, "heads": 2, "width": 16, "experts": 4, "dropout": 0.1},
}
KINDS = tuple(MODELS)


def every_plan() -> list[Plan]:
    """All plans of the list, each once: what a recipe of somebody's own may be proved under."""
    found: list[Plan] = []
    for plan in (plan for table in (EXACT, SPLIT) for plans in table.values() for plan in plans):
        if plan not in found:
            found.append(plan)
    return found


def standard(kinds: Sequence[str] = KINDS) -> list[Case]:
    """The cases of these kinds of models: exact plans and split ones in float32, then the split ones in float64.

    Raises UserError for a kind that the list does not have."""
    for kind in kinds:
        if kind not in MODELS:
            raise unknown_name("model of the standard list", kind, MODELS)
    return [case for kind in kinds for case in (_case(kind, wide=False), _case(kind, wide=True))]


def _case(kind: str, *, wide: bool) -> Case:
    images = kind in ("mlp", "resnet")
    recipe = Recipe(
        model=ModelSpec(kind=kind, options=MODELS[kind]),
        optimizer=MOMENTUM if images else ADAMW,
        schedule=ScheduleSpec(kind="constant"),
        batch=16 if images else 8,
        shards=8 if kind == "mlp" else 4,
        micro_batches=1 if kind == "mlp" else 2,
        precision="float32",
        steps=20,
    )
    source = Pictures(SAMPLES, wide=wide) if images else Sentences(SAMPLES)
    plans = SPLIT[kind] if wide else EXACT[kind] + SPLIT[kind]
    return Case(f"{kind} float64" if wide else kind, recipe, Splits(source), plans, wide)
