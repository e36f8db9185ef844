"""One step of a model in one process and in a pipeline, with every micro-batch's gradients kept apart."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from parallel.cut_passes import any_loss
from torch import Tensor, nn

from shoal.data.source import Batch
from shoal.models.task import Task
from shoal.parallel.partition.chunks import Chunks
from shoal.parallel.partition.cut import cut
from shoal.parallel.pipeline.engine import Figures, Pipeline
from shoal.parallel.pipeline.head_and_tail import arguments_of
from shoal.parallel.schedules import Schedule, make_schedule

CPU = torch.device("cpu")


class AnyTask:
    """Of models that take a batch as their arguments."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return any_loss(model(**batch)), 3

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        return {"loss": any_loss(model(**batch)).item(), "count": 3.0}


@dataclass(frozen=True)
class Subject:
    model: nn.Module
    task: Task | AnyTask
    batches: Sequence[Batch]


@dataclass
class Kept:
    """All that a step leaves behind."""

    gradients: list[dict[str, Tensor]]  # by micro-batch; a parameter that it did not use is left out
    losses: list[float]
    buffers: dict[str, Tensor] = field(default_factory=dict)
    measured: Mapping[str, float] | None = None
    figures: Figures | None = None
    predicted: Any = None
    order: list[tuple[int, int]] = field(default_factory=list)  # (chunk, micro-batch) of the backward passes


def one_process(subject: Subject) -> Kept:
    kept = Kept([], [])
    parameters = dict(subject.model.named_parameters())
    for number, batch in enumerate(subject.batches):
        torch.manual_seed(100 + number)
        loss, _ = subject.task.loss(subject.model, batch)
        loss.backward()
        kept.losses.append(float(loss.detach()))
        kept.gradients.append({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})
        subject.model.zero_grad()
    kept.buffers = {name: buffer.clone() for name, buffer in subject.model.named_buffers()}
    subject.model.eval()
    kept.measured = subject.task.measure(subject.model, subject.batches[0])
    return kept


class Collecting:
    """A step that keeps what the engine hands it."""

    def __init__(self, pipeline: Pipeline, batches: Sequence[Batch]) -> None:
        self._pipeline, self._batches = pipeline, batches
        self.kept = Kept([{} for _ in batches], [0.0 for _ in batches])

    def batch(self, micro_batch: int) -> Batch:
        return self._batches[micro_batch]

    def enter_stream(self, micro_batch: int) -> None:
        torch.manual_seed(100 + micro_batch)

    def enter(self, chunk: int, micro_batch: int) -> None: ...
    def left(self, chunk: int, micro_batch: int, made: Any) -> None: ...
    def counted(self, micro_batch: int, value: float, count: float) -> None: ...

    def backward(self, chunk: int, micro_batch: int, run: Callable[[], None], value: float, count: float) -> None:
        self.kept.losses[micro_batch] = value
        self.kept.order.append((chunk, micro_batch))
        owned = self._pipeline.owned(chunk)
        assert all(p.grad is None for p in owned.values())
        run()
        for name, parameter in owned.items():
            if parameter.grad is not None:
                self.kept.gradients[micro_batch][name] = parameter.grad
                parameter.grad = None


def in_pipeline(
    group: Any,
    make: Callable[[], Subject],
    schedule: str,
    chunks: int = 1,
    plant: Callable[[Pipeline], None] | None = None,
) -> Kept:
    """What one worker sees of a step."""
    subject = make()
    made: Schedule = make_schedule(schedule, group.world, len(subject.batches), chunks)
    torch.manual_seed(99)
    example = arguments_of(subject.task.loss, subject.model, subject.batches[0])
    pieces: Chunks = cut(subject.model, made.chunks, example=example)
    pipeline = Pipeline(group, pieces, made.placement, subject.model, CPU)
    if plant:
        plant(pipeline)
    work = Collecting(pipeline, subject.batches)
    work.kept.figures = pipeline.step(made, subject.task, work)  # type: ignore[arg-type]
    work.kept.predicted = pipeline.predicted_peak(made)
    for stage in pipeline.stages.values():
        work.kept.buffers |= {name: buffer.clone() for name, buffer in stage.chunk.module.named_buffers()}
        stage.chunk.module.eval()
    work.kept.measured = pipeline.measure(0, subject.task, lambda: subject.batches[0])  # type: ignore[arg-type]
    pipeline.share_tied()
    return work.kept


def merged(workers: Sequence[Kept]) -> Kept:
    gradients: list[dict[str, Tensor]] = [{} for _ in workers[0].gradients]
    buffers: dict[str, Tensor] = {}
    for kept in workers:
        assert kept.losses == workers[0].losses, "every worker hears of every loss"
        buffers |= kept.buffers
        for mine, all_of_them in zip(kept.gradients, gradients, strict=True):
            assert not mine.keys() & all_of_them.keys(), "every parameter has one owner"
            all_of_them |= mine
    (measured,) = [kept.measured for kept in workers if kept.measured is not None]
    return Kept(gradients, workers[0].losses, buffers, measured)


def differences(mine: Kept, theirs: Kept) -> list[str]:
    """What is not equal to the bit."""
    wrong = [f"loss {i}" for i, (a, b) in enumerate(zip(mine.losses, theirs.losses, strict=True)) if a != b]
    for number, (a, b) in enumerate(zip(mine.gradients, theirs.gradients, strict=True)):
        wrong += [f"{name} of {number} missing" for name in sorted(a.keys() ^ b.keys())]
        wrong += [f"{name} of {number}" for name in sorted(a.keys() & b.keys()) if not torch.equal(a[name], b[name])]
    wrong += [name for name in mine.buffers if not torch.equal(mine.buffers[name], theirs.buffers[name])]
    return wrong if mine.measured == theirs.measured else [*wrong, "measure"]
