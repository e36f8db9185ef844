"""A model placed on the workers of a mesh: each keeps its stages, its slices, its experts."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from shoal.comm.group import Group
from shoal.comm.tensors import make_collectives
from shoal.data.source import Batch
from shoal.errors import UserError
from shoal.models.first_values import FirstValues, hollow, materialise, on_demand
from shoal.models.gpt import GPT
from shoal.models.initial_values import Kept, Run
from shoal.models.task import Task
from shoal.parallel.context.model import split_sequence, split_stage
from shoal.parallel.context.ring import Ring
from shoal.parallel.context.task import SplitTask
from shoal.parallel.experts.model import experts_split, split_experts
from shoal.parallel.held import Cut, Held, Share, prune
from shoal.parallel.layout.decide import BATCH_NORMS, layout_for
from shoal.parallel.layout.split import Split
from shoal.parallel.partition.balance import balance
from shoal.parallel.partition.cut import cut
from shoal.parallel.partition.measure import pieces
from shoal.parallel.pipeline.engine import Pipeline
from shoal.parallel.pipeline.head_and_tail import arguments_of
from shoal.parallel.schedules.registry import any_micro_batches
from shoal.parallel.tensor.apply import split_model
from shoal.recipe.plan import Plan


@dataclass(frozen=True)
class Subject:
    """What a split model is trained on: pipelines are cut along a forward pass, sequences by what the loss does."""

    task: Task
    batch: Batch  # a whole micro-batch
    first: FirstValues | None = None  # of a model on the meta device


def place(module: nn.Module, plan: Plan, group: Group, device: torch.device, subject: Subject | None) -> Held:
    """Leave of ``module`` what this worker holds, in place; called by all workers, which have the same weights.

    A module on the meta device, whose first values the subject knows, gets memory for what is held of it only; where
    the plan does not split it, its parameters have none until workers share them.
    Raises UserError for what cannot be split as the plan says."""
    axes = plan.axes
    names = tuple(name for name, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor))
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    check_trained(trained)
    held = Held(
        module,
        subject.task if subject else None,
        plan,
        group,
        (),
        names,
        {name: p.numel() for name, p in trained.items()},
        torch.float64 if any(p.dtype == torch.float64 for p in trained.values()) else torch.float32,
        elements=sum(p.numel() for p in module.parameters()),
    )
    if not plan.splits_model:
        if subject is not None and subject.first is not None:
            held.first, held.built = subject.first, "in parts"
            hollow(module)
            materialise([module], subject.first)
        held.shares = (Share(trained, _buffers(module), group, ("data",)),)
        return held
    if subject is None and (axes.size("pipe") > 1 or axes.size("context") > 1):
        raise UserError(
            "plan: mesh axes 'pipe' and 'context' need to know the task and an example: train from a recipe, with "
            "shoal.train(recipe, plan); a loop of your own takes axes 'data', 'tensor' and 'expert'."
        )
    layout = layout_for(module, plan)
    experts = experts_split(module, axes.size("expert")) if axes.size("expert") > 1 else {}
    if axes.size("pipe") > 1:
        assert subject is not None
        _into_stages(held, subject, device)
    parts = [stage.chunk.module for stage in held.pipeline.stages.values()] if held.pipeline else [module]
    if axes.size("tensor") > 1:
        along = make_collectives(group.split(axes.partition("tensor")))
        for part in parts:
            split_model(part, layout, along)
        held.cuts += (Cut("tensor", layout.splits, along),)
    if axes.size("context") > 1:
        assert subject is not None
        ring = Ring.of(group.split(axes.partition("context")), isinstance(module, GPT), device)
        if held.pipeline is None:
            split_sequence(module, ring)
        else:
            for stage in held.pipeline.stages.values():
                split_stage(stage.chunk, module, ring)
        held.task = SplitTask(subject.task, ring)
    if experts:
        held.experts = make_collectives(group.split(axes.partition("expert")))
        for part in parts:
            split_experts(part, experts, held.experts)
        held.cuts += (Cut("expert", experts, held.experts),)
    if subject is not None and subject.first is not None:
        materialise([*parts, module], subject.first, _kept_of(held.cuts, subject.first))
        held.built = "in parts"
    held.shares = _shares(held, experts)
    return held


def _kept_of(cuts: Sequence[Cut], first: FirstValues) -> Callable[[str], Kept]:
    """Of a tensor, by name, the places that this worker keeps of the whole one; the first cut of a dim counts."""
    found: dict[str, dict[int, Sequence[Run]]] = defaultdict(dict)
    for each in cuts:
        for name, split in each.splits.items():
            found[first.first_name(name)].setdefault(split.dim, split.kept[each.collectives.rank])
    return lambda name: found[first.first_name(name)]


def check_trained(trained: Mapping[str, Parameter]) -> None:
    """Raises UserError when there is nothing to train, or something that is no real floating-point number."""
    if not trained:
        raise UserError("the model has no parameter that requires a gradient: nothing would be trained.")
    for name, parameter in trained.items():
        if not parameter.dtype.is_floating_point:
            raise UserError(
                f"parameter {name!r} is {parameter.dtype}: only real floating-point parameters are trained."
            )


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in module.named_buffers() if buffer.numel()}


def _into_stages(held: Held, subject: Subject, device: torch.device) -> None:
    plan, module, group = held.plan, held.module, held.group
    example = arguments_of(subject.task.loss, module, subject.batch)
    made = held.schedule(any_micro_batches(plan.pipeline.schedule))
    at: list[int] | None = None
    if not plan.pipeline.cuts:
        said: list[list[object]] = [[], []]
        if group.rank == 0:
            # the clock never gives the same twice, and what is compressed together decides what is left unsent
            table = pieces(module, example, clock=not plan.compresses, first=subject.first)
            found = balance(table, made.chunks, workers=made.placement)
            said = [list(found), [table[number].name for number in found]]
        at, names = json.loads(group.gather(json.dumps(said).encode())[0])
        held.cut_at = tuple(names)
    else:
        held.cut_at = plan.pipeline.cuts
    with on_demand(module, subject.first):
        chunks = cut(module, made.chunks, example=example, cuts=plan.pipeline.cuts, at=at)
    held.stages = group.split(plan.axes.partition("pipe"))
    held.pipeline = pipeline = Pipeline(held.stages, chunks, made.placement, module, device)
    kept: list[Tensor] = []
    for stage in pipeline.stages.values():
        kept += [p for name, p in stage.chunk.module.named_parameters() if name not in stage.copies]
        kept += stage.chunk.module.buffers()
    prune(module, kept)


def _shares(held: Held, experts: Mapping[str, Split]) -> tuple[Share, ...]:
    """Of each chunk what every replica has, and then the experts that some of them have.

    What compression leaves of a sum depends on what lies beside it. So that all along axis tensor are left with the
    same of what each has whole, slices are summed apart from it."""
    axes, group = held.plan.axes, held.group
    slices = {name for cut in held.cuts for name in cut.splits if held.plan.compresses and cut.axis == "tensor"}
    split = [axis for axis in ("context", "expert") if axes.size(axis) > 1]
    everywhere = ("data", *split)
    apart = tuple(axis for axis in everywhere if axis != "expert")
    free = {each: group.split(axes.partition(*each)) for each in dict.fromkeys((everywhere, apart))}
    # All workers split together over torch.distributed: the plan says how often, whatever their stages have.
    of_slices = (False, True) if held.plan.compresses and axes.size("tensor") > 1 else (False,)
    of_experts = (False, True) if "expert" in split else (False,)
    shares: list[Share] = []
    taken: set[tuple[str, ...]] = set()
    for number, (trained, buffers) in _of_chunks(held).items():
        for expert, sliced in product(of_experts, of_slices):
            summed = apart if expert else everywhere
            channel = free[summed]
            if summed in taken:  # each set has messages of its own
                channel = channel.split([range(channel.world)])
            taken.add(summed)
            own = {n: p for n, p in trained.items() if ((n in experts), (n in slices)) == (expert, sliced)}
            if own or not (expert or sliced):
                shares.append(Share(own, {} if expert or sliced else buffers, channel, summed, number))
    return tuple(shares)


def _of_chunks(held: Held) -> dict[int, tuple[Mapping[str, Parameter], dict[str, Tensor]]]:
    """The trained parameters and the buffers of each; a model that is no pipeline is one chunk."""
    if held.pipeline is None:
        trained = {name: p for name, p in held.module.named_parameters() if p.requires_grad}
        return {0: (trained, _buffers(held.module))}
    found: dict[int, tuple[Mapping[str, Parameter], dict[str, Tensor]]] = {}
    for number, stage in held.pipeline.stages.items():
        part = stage.chunk.module
        buffers = _buffers(part)
        for prefix, module in part.named_modules():
            if isinstance(module, BATCH_NORMS):  # a training pass does not read them: they may be set back for the next
                buffers |= {f"{prefix}.{key}": b.data for key, b in module.named_buffers(recurse=False) if b.numel()}
        found[number] = held.pipeline.owned(number), buffers
    return found
