"""What building a model takes of each worker's memory under a plan, from its shapes: before any worker has any.

Counted are parameters and buffers, what is made of them on the way, and pieces that are measured. Code, activations of
the micro-batch on which a pipeline is cut, and what training adds (gradients, states) are not."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from shoal.errors import UserError
from shoal.models.first_values import FirstValues, on_demand
from shoal.parallel.experts.model import experts_split
from shoal.parallel.layout.decide import layout_for
from shoal.parallel.layout.split import Split
from shoal.parallel.partition.arguments import Example
from shoal.parallel.partition.balance import balance
from shoal.parallel.partition.cut import cut
from shoal.parallel.partition.measure import pieces
from shoal.parallel.schedules import make_schedule
from shoal.parallel.schedules.registry import any_micro_batches
from shoal.recipe.memory_plan import size_text
from shoal.recipe.plan import Plan

MEASURED = 2  # a piece that is measured, and its gradients
Splits = Mapping[str, Sequence[tuple[str, Split]]]  # of each tensor that is cut: along which axes, and how


@dataclass(frozen=True)
class Building:
    """Of one worker, in bytes."""

    rank: int
    how: Literal["in parts", "whole"]
    held: int  # parameters and buffers that stay
    beside: int  # the most that is needed beside them on the way

    @property
    def peak(self) -> int:
        return self.held + self.beside


def shared_from_the_start(plan: Plan) -> bool:
    """Whether workers of one host make the parameters of a model that is not split where they will share them."""
    alone = plan.splits_model or plan.state_group or plan.memory.changes_weights
    return plan.states == "zero3" and not alone and plan.workers > 1


def why_whole(plan: Plan, first: FirstValues | None) -> str:
    """Why each worker of a host builds the whole model; "" where it builds its part alone."""
    if not plan.splits_model and not shared_from_the_start(plan):
        return "the mesh does not split the model"
    if first is None:
        return "the model does not say its first values (docs/adding.md): each worker has to call its factory"
    return ""


def building(model: nn.Module, plan: Plan, first: FirstValues | None, example: Example) -> tuple[Building, ...]:
    """By rank. ``model`` lies on the meta device; ``first``: its first values, None where it does not say them.

    ``example``: arguments of a forward pass of one micro-batch, along which a pipeline is cut. Cuts that the plan does
    not name are made as if pieces took as long as their operations count; with other ones, stages differ.
    Raises UserError for layouts and cuts that cannot be."""
    every = {name for name, _ in _tensors(model)}
    whole = _bytes(model, every, {}, {})
    recorded = _largest(model) if plan.axes.size("pipe") > 1 else 0
    built_whole = bool(why_whole(plan, first))
    splits = _splits(model, plan)
    stages, measured = _stages(model, plan, first, example) if plan.axes.size("pipe") > 1 else ([every], 0)
    if shared_from_the_start(plan) and not built_whole:  # a tensor is one worker's
        return tuple(Building(rank, "in parts", whole // plan.workers, _largest(model)) for rank in range(plan.workers))
    found = []
    for rank in range(plan.workers):
        place = plan.axes.coordinates(rank)
        held = _bytes(model, stages[place.get("pipe", 0)], splits, place)
        if built_whole:
            found.append(Building(rank, "whole", held, whole - held))
            continue
        found.append(Building(rank, "in parts", held, max(recorded, 0 if rank else measured)))
    return tuple(found)


def least_bytes(model: nn.Module, plan: Plan, first: FirstValues | None) -> int:
    """What all workers together need at the least to build a model: known without cutting it."""
    whole = sum(tensor.nbytes for _, tensor in _tensors(model))
    return whole * (plan.workers if why_whole(plan, first) else _copies(plan))


def check_room(model: nn.Module, plan: Plan, first: FirstValues | None, room: int) -> None:
    """Raises UserError when all workers on a host of ``room`` bytes of memory cannot even build the model."""
    need = least_bytes(model, plan, first)
    if need <= room:
        return
    why = why_whole(plan, first)
    copies = "one copy of it" if _copies(plan) == 1 else f"{_copies(plan)} copies of it"
    each = f"{plan.workers} workers build it whole: {why}" if why else copies
    raise UserError(
        f"plan: building the model takes at least {size_text(need)} ({each}), and this host has {size_text(room)} of "
        f"memory: use fewer workers along axis {'pipe or tensor' if why else 'data'}, more hosts (torchrun), or a "
        f"smaller model."
    )


def _copies(plan: Plan) -> int:
    """Of the model without its experts, over all workers, at the least."""
    return 1 if shared_from_the_start(plan) else plan.axes.size("data") * plan.axes.size("context")


def _splits(model: nn.Module, plan: Plan) -> Splits:
    found: dict[str, list[tuple[str, Split]]] = defaultdict(list)
    if plan.axes.size("tensor") > 1:
        for name, split in layout_for(model, plan).splits.items():
            found[name].append(("tensor", split))
    if plan.axes.size("expert") > 1:
        for name, split in experts_split(model, plan.axes.size("expert")).items():
            found[name].append(("expert", split))
    return found


def _stages(model: nn.Module, plan: Plan, first: FirstValues | None, example: Example) -> tuple[list[set[str]], int]:
    """The tensors that each stage holds, and the bytes that measuring its pieces takes."""
    pipeline, size = plan.pipeline, plan.axes.size("pipe")
    made = make_schedule(pipeline.schedule, size, any_micro_batches(pipeline.schedule), pipeline.chunks)
    measured, at = 0, None
    if not pipeline.cuts:
        table = pieces(model, example, clock=False, first=first)
        at = balance(table, made.chunks, workers=made.placement)
        measured = MEASURED * max(piece.parameter_bytes for piece in table)
    with on_demand(model, first):
        chunks = cut(model, made.chunks, example=example, cuts=pipeline.cuts, at=at).chunks
    stages: list[set[str]] = [set() for _ in range(size)]
    for worker, chunk in zip(made.placement, chunks, strict=True):
        stages[worker] |= {name for name, _ in _tensors(chunk.module)}
    return stages, measured


def _largest(model: nn.Module) -> int:
    """What one operation of a forward pass reads at the most; recurrent layers are one each."""
    stacks = [sum(t.nbytes for _, t in _tensors(part)) for part in model.modules() if isinstance(part, nn.RNNBase)]
    return max([*stacks, *(tensor.nbytes for _, tensor in _tensors(model))], default=0)


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Tied ones once, under their first name."""
    return [*module.named_parameters(), *module.named_buffers()]


def _bytes(model: nn.Module, names: Collection[str], splits: Splits, place: Mapping[str, int]) -> int:
    """Of these tensors, what a worker at this place of the mesh keeps."""
    return sum(
        tensor.nbytes // max(1, tensor.numel()) * _elements(tensor, splits.get(name, ()), place)
        for name, tensor in _tensors(model)
        if name in names
    )


def _elements(tensor: Tensor, cuts: Iterable[tuple[str, Split]], place: Mapping[str, int]) -> int:
    """The first cut of a dim counts."""
    shape = list(tensor.shape)
    done: set[int] = set()
    for axis, split in cuts:
        if split.dim not in done:
            done.add(split.dim)
            shape[split.dim] = split.sizes[place[axis]]
    return math.prod(shape)
