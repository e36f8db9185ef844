"""What one worker holds of a model under a plan, and which workers it shares it with."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from shoal.comm.group import Group
from shoal.comm.shared_weights import SharedWeights
from shoal.comm.tensors import Collectives
from shoal.models.first_values import FirstValues
from shoal.models.task import Task
from shoal.parallel.layout.split import Split
from shoal.parallel.pipeline.engine import Pipeline
from shoal.parallel.schedules import Schedule, make_schedule
from shoal.recipe.plan import Plan


@dataclass(frozen=True)
class Share:
    """Tensors whose gradients and changes are summed over the same workers."""

    parameters: Mapping[str, Parameter]  # the trained ones, in the order of the model
    buffers: Mapping[str, Tensor]
    group: Group  # those that sum them
    axes: tuple[str, ...]  # along which these lie
    chunk: int = 0  # of the pipeline


@dataclass(frozen=True)
class Cut:
    """Tensors of which each worker along an axis has a part."""

    axis: str
    splits: Mapping[str, Split]
    collectives: Collectives


@dataclass
class Held:
    """``module`` keeps the names of the whole model; what other workers hold of it is None there."""

    module: nn.Module
    task: Task | None  # as it is called with this module; None when the caller has its own
    plan: Plan
    group: Group  # all workers
    shares: tuple[Share, ...]
    names: tuple[str, ...]  # of all tensors of the whole model, in its order
    sizes: Mapping[str, int]  # elements of each trained parameter of the whole, in its order
    sum_type: torch.dtype  # of sums of gradients: float64 when a trained parameter of the whole is
    cuts: tuple[Cut, ...] = ()  # in the order in which they were made
    stages: Group | None = None  # the workers along axis pipe
    pipeline: Pipeline | None = None
    experts: Collectives | None = None  # the workers that make their passes together
    elements: int = 0  # of all parameters of the whole
    first: FirstValues | None = None  # of parameters that have no memory yet, and come to lie where workers share them
    shared: SharedWeights | None = None  # those that have come to
    built: str = "whole"  # or "in parts": whether this worker had memory for more than it holds
    cut_at: tuple[str, ...] = ()  # names of the pieces at which chunks begin, from the second on
    _schedules: dict[int, Schedule] = field(default_factory=dict)

    @property
    def coordinates(self) -> Mapping[str, int]:
        return self.plan.axes.coordinates(self.group.rank)

    @property
    def replica(self) -> int:
        """Whose shards these are: the position along data and expert."""
        return self.plan.replica_of(self.group.rank)

    def ranks(self, share: Share) -> tuple[int, ...]:
        """The workers that sum a share, this one among them, as they are called in the run."""
        return self.plan.axes.along(self.group.rank, *share.axes)

    @cached_property
    def ready_sizes(self) -> list[int]:
        """Elements of each trained parameter of the whole, in the order in which gradients become ready."""
        return list(self.sizes.values())[::-1]

    def places(self, names: Iterable[str]) -> list[int]:
        """Where trained parameters stand in `ready_sizes`."""
        numbers = {name: number for number, name in enumerate(reversed(list(self.sizes)))}
        return [numbers[name] for name in names]

    @property
    def chunks(self) -> dict[str, nn.Module] | None:
        """Those of a pipeline that this worker holds."""
        if self.pipeline is None:
            return None
        return {f"chunk {number}": stage.chunk.module for number, stage in self.pipeline.stages.items()}

    @property
    def cut_names(self) -> set[str]:
        """The tensors of which workers have parts."""
        return {name for cut in self.cuts for name in cut.splits}

    def split_along(self, name: str) -> set[str]:
        """The axes over which a tensor is cut."""
        return {cut.axis for cut in self.cuts if name in cut.splits}

    def counts(self, name: str, share: Share) -> bool:
        """Whether those with this worker's place in a replica count a tensor, of those that hold the same part of it.

        Workers that sum it count their slices of it each."""
        apart = self.split_along(name) | set(share.axes)
        return all(axis in apart or self.coordinates.get(axis, 0) == 0 for axis in ("expert", "context", "tensor"))

    def split(self) -> dict[str, Any]:
        """How the model lies on the workers, for the log."""
        found: dict[str, Any] = {"mesh": dict(self.plan.axes.sizes), "exact": self.plan.exact, "built": self.built}
        if self.pipeline is not None:
            pipeline = self.plan.pipeline
            found |= {
                "schedule": pipeline.schedule,
                "placement": list(self.pipeline.placement),
                "cuts": list(self.cut_at),
            }
        return found

    def schedule(self, micro_batches: int) -> Schedule:
        """Of a step of so many micro-batches."""
        if micro_batches not in self._schedules:
            pipeline = self.plan.pipeline
            made = make_schedule(pipeline.schedule, self.plan.axes.size("pipe"), micro_batches, pipeline.chunks)
            self._schedules[micro_batches] = made
        return self._schedules[micro_batches]


@torch.no_grad()
def prune(module: nn.Module, kept: Iterable[Tensor]) -> None:
    """Leave None in the place of every parameter and buffer that is not among ``kept``."""
    here = set(map(id, kept))
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for key, tensor in list(tensors.items()):
                if tensor is not None and id(tensor) not in here:
                    tensors[key] = None
