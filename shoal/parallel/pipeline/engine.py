"""One worker's part of a pipeline: it carries out its lowered actions, in order, one step after the other."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from shoal.comm.group import Group, HostGroup
from shoal.comm.stages import Key, make_messages
from shoal.comm.status import Phase
from shoal.data.source import Batch
from shoal.models.task import Task
from shoal.parallel.partition.chunks import Chunks
from shoal.parallel.pipeline.boundary import without_history
from shoal.parallel.pipeline.flights import Flights
from shoal.parallel.pipeline.head_and_tail import StandIn, arguments_of
from shoal.parallel.pipeline.random_state import drawn, random_state, set_random_state
from shoal.parallel.pipeline.stage import Stage
from shoal.parallel.pipeline.tied import Ties, with_own_copies
from shoal.parallel.schedules import Action, Kind, Schedule, verify
from shoal.parallel.schedules.activations import Peak, peak_activations
from shoal.parallel.schedules.simulation import Times, simulate

_ACTIVATION, _GRADIENT, _TIED_GRADIENT, _TIED_WEIGHT, _MEASURED = range(5)  # what a message is: the first of its key


class Work(Protocol):
    """What the engine asks of the step that it is a part of; micro-batches are counted as in the schedule."""

    def batch(self, micro_batch: int) -> Batch: ...
    def enter_stream(self, micro_batch: int) -> None:
        """Make torch's default generators start at the stream of this micro-batch."""

    def enter(self, chunk: int, micro_batch: int) -> None:
        """Before a forward pass."""

    def left(self, chunk: int, micro_batch: int, made: Any) -> None:
        """After it. ``made``: what it hands on to the next chunk, or the loss of the last one."""

    def counted(self, micro_batch: int, value: float, count: float) -> None:
        """The last chunk has a loss: the SUM over ``count`` targets."""

    def backward(self, chunk: int, micro_batch: int, run: Callable[[], None], value: float, count: float) -> None:
        """``run`` accumulates one micro-batch's gradients into the parameters that the chunk owns: in order."""


@dataclass(frozen=True)
class Figures:
    """What a step was for this worker."""

    forward_s: float
    backward_s: float
    waiting_s: float  # for messages
    seconds: float  # from the step's start to the worker's last action
    peak: Peak  # activations, in (chunk, micro-batch) pairs

    @property
    def waiting_share(self) -> float:
        """Of the time from the step's start to the worker's last action; after that it has nothing left to do."""
        return self.waiting_s / self.seconds if self.seconds else 0.0


@dataclass
class _Step:
    work: Work
    task: Task
    arrived: dict[Key, Any] = field(default_factory=dict)  # received, or made for a chunk that this worker holds too
    made: dict[Key, Any] = field(default_factory=dict)  # to be sent
    counts: dict[int, tuple[float, float]] = field(default_factory=dict)  # micro-batch -> loss, targets
    seconds: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "backward": 0.0})
    flights: Flights = field(default_factory=Flights)


class Pipeline:
    """The chunks that one worker holds. Every worker of the group makes one, with the same chunks and placement."""

    def __init__(
        self,
        group: Group,
        chunks: Chunks,
        placement: Sequence[int],
        model: nn.Module,
        device: torch.device,
    ) -> None:
        """``placement``: chunk -> rank in the group. ``model`` is the whole one, for its signature and settings."""
        self.group, self.placement, self.model, self.device = group, tuple(placement), model, device
        self.ties = Ties.of(chunks)
        self.stages: dict[int, Stage] = {}
        self.last = len(chunks) - 1
        for number, chunk in enumerate(chunks.chunks):
            if placement[number] == group.rank:
                own, copies = with_own_copies(chunk, self.ties.copied(number))
                self.stages[number] = Stage(own, copies)
        self._messages = make_messages(group, device, ahead=4)
        self._tied = make_messages(group, device)  # a lane of its own: its messages are taken when they are needed
        self._verified: dict[Schedule, tuple[Action, ...]] = {}
        self._clock = group.counters.clock
        self._inside: Callable[[], AbstractContextManager[None]] = (
            group.arenas.inside if isinstance(group, HostGroup) and group.world > 1 else nullcontext
        )

    @property
    def readers(self) -> int:
        """How many of its chunks read batches: each asks for each micro-batch once."""
        return sum(number == self.last or bool(s.chunk.batch_inputs) for number, s in self.stages.items())

    def owned(self, chunk: int) -> dict[str, Parameter]:
        """The trained parameters of a chunk, but for copies of another one's: in the model's order."""
        stage = self.stages[chunk]
        named = stage.chunk.module.named_parameters()
        return {name: p for name, p in named if p.requires_grad and name not in stage.copies}

    # --- a step -----------------------------------------------------------------------------------------------

    def step(self, schedule: Schedule, task: Task, work: Work) -> Figures:
        """All micro-batches of a step, there and back."""
        if schedule not in self._verified:
            self._verified[schedule] = verify(schedule).program[self.group.rank]
        begun, waited = self._clock(), self._messages.waited_s + self._tied.waited_s
        step = _Step(work, task)
        for action in self._verified[schedule]:
            self._do(step, action)
            step.flights.did(action)
        self.settle()
        waiting = self._messages.waited_s + self._tied.waited_s - waited
        took = self._clock() - begun
        return Figures(step.seconds["forward"], step.seconds["backward"], waiting, took, step.flights.peak)

    def settle(self) -> None:
        """Wait until what was sent has been taken; after the last `measure` and before leaving the group."""
        self._messages.settle()
        self._tied.settle()

    def predicted_peak(self, schedule: Schedule) -> Peak:
        return peak_activations(schedule)[self.group.rank]

    def predicted_waiting_share(self, schedule: Schedule, times: Times | None = None) -> float:
        """What `Figures.waiting_share` would be if passes took these times, by default all equally long.

        A worker waits from the step's start on: what comes before its first pass counts."""
        timeline, rank = simulate(schedule, times), self.group.rank
        last = timeline.ends[rank][-1] if timeline.ends[rank] else 0.0
        return 1 - timeline.busy(rank) / last if last else 0.0

    def _do(self, step: _Step, action: Action) -> None:
        kind, chunk, micro_batch, peer = action
        if kind is Kind.SEND_ACTIVATION or kind is Kind.SEND_GRADIENT:
            key = (_ACTIVATION if kind is Kind.SEND_ACTIVATION else _GRADIENT, chunk, micro_batch)
            self._messages.send(peer, key, step.made.pop(key))
        elif kind is Kind.RECEIVE_ACTIVATION:
            key = (_ACTIVATION, chunk - 1, micro_batch)
            step.arrived[key] = self._messages.receive(peer, key)
        elif kind is Kind.RECEIVE_GRADIENT:
            key = (_GRADIENT, chunk + 1, micro_batch)
            step.arrived[key] = self._messages.receive(peer, key)
        else:
            begun = self._clock()
            self.group.report(Phase.forward if kind is Kind.FORWARD else Phase.backward)
            with self._inside():
                self._compute(step, kind, chunk, micro_batch)
            part = "forward" if kind is Kind.FORWARD else "backward"
            step.seconds[part] += self._clock() - begun

    def _compute(self, step: _Step, kind: Kind, chunk: int, micro_batch: int) -> None:
        if kind is Kind.FORWARD:
            self._forward(step, chunk, micro_batch)
            return
        with torch.autocast(self.device.type, enabled=False):  # the caller's, if any, is for forward passes
            if kind is Kind.BACKWARD_WEIGHT:
                self._backward_weight(step, chunk, micro_batch)
            else:
                self._backward(step, kind, chunk, micro_batch)

    def _hand_on(self, step: _Step, to: int, key: Key, content: dict[str, Any]) -> None:
        """To a chunk of another worker, whose message follows as an action of its own, or to one held here."""
        if self.placement[to] == self.group.rank:
            step.arrived[key] = without_history(content)
        else:
            step.made[key] = content

    # --- forward passes ---------------------------------------------------------------------------------------

    def _forward(self, step: _Step, chunk: int, micro_batch: int) -> None:
        stage, work = self.stages[chunk], step.work
        work.enter(chunk, micro_batch)
        work.enter_stream(micro_batch)
        fresh = random_state(self.device)
        came = step.arrived.pop((_ACTIVATION, chunk - 1, micro_batch), None) or {"values": {}, "random": None}

        def go_on() -> None:
            """Draw on from where the chunk before stopped."""
            if chunk:
                set_random_state(came["random"] or fresh, self.device)

        if chunk == self.last:

            def tail(arguments: dict[str, Any]) -> Any:
                go_on()
                return stage.output(micro_batch, came.pop("values"), arguments)

            loss, count = step.task.loss(StandIn(self.model, tail), work.batch(micro_batch))  # type: ignore[arg-type]
            stage.ends(micro_batch, loss)
            step.counts[micro_batch] = float(loss.detach()), float(count)
            work.left(chunk, micro_batch, loss)
            work.counted(micro_batch, *step.counts[micro_batch])
            return
        arguments: Mapping[str, Any] = {}
        if stage.chunk.batch_inputs:
            arguments = arguments_of(step.task.loss, self.model, work.batch(micro_batch))
        go_on()
        made = stage.forward(micro_batch, came.pop("values"), arguments)
        work.left(chunk, micro_batch, made)
        state = random_state(self.device)
        content = {"values": made, "random": state if drawn(fresh, state) else None}
        self._hand_on(step, chunk + 1, (_ACTIVATION, chunk, micro_batch), content)

    @torch.no_grad()
    def measure(self, number: int, task: Task, batch: Callable[[], Batch]) -> Mapping[str, float] | None:
        """The task's measure of a batch, on the worker that holds the last chunk; None on the others.

        All workers of the group call it, in one order of ``number``, with the model in evaluation mode."""
        made: dict[str, Any] = {}
        for chunk in sorted(self.stages):
            stage = self.stages[chunk]
            origin = self.placement[chunk - 1] if chunk else self.group.rank
            values = made if origin == self.group.rank else self._messages.receive(origin, (_MEASURED, chunk, number))
            if chunk == self.last:
                with self._inside():
                    tail = StandIn(self.model, partial(stage.only_output, values))
                    return task.measure(tail, batch())  # type: ignore[arg-type]
            with self._inside():
                reads = stage.chunk.batch_inputs
                made = stage.only_forward(values, arguments_of(task.measure, self.model, batch()) if reads else {})
            to = self.placement[chunk + 1]
            if to != self.group.rank:
                self._messages.send(to, (_MEASURED, chunk + 1, number), made)
        return None

    # --- backward passes --------------------------------------------------------------------------------------

    def _backward(self, step: _Step, kind: Kind, chunk: int, micro_batch: int) -> None:
        stage = self.stages[chunk]
        gradients = None
        if chunk != self.last:
            came = step.arrived.pop((_GRADIENT, chunk + 1, micro_batch))
            gradients = came["gradients"]
            step.counts[micro_batch] = came["loss"], came["count"]
        extra = self._take_tied(step, chunk, micro_batch)
        if kind is Kind.BACKWARD:
            run = partial(stage.backward, micro_batch, gradients, extra)
            step.work.backward(chunk, micro_batch, run, *step.counts[micro_batch])
            self._hand_back(step, chunk, micro_batch)
            stage.forget(micro_batch)
        else:
            stage.backward_input(micro_batch, gradients, extra)
            self._hand_back(step, chunk, micro_batch)

    def _backward_weight(self, step: _Step, chunk: int, micro_batch: int) -> None:
        stage = self.stages[chunk]
        run = partial(stage.backward_weight, micro_batch)
        step.work.backward(chunk, micro_batch, run, *step.counts[micro_batch])
        stage.forget(micro_batch)

    def _hand_back(self, step: _Step, chunk: int, micro_batch: int) -> None:
        """Gradients of what came in go to the chunk before; those of copies of tied parameters to their next user."""
        stage = self.stages[chunk]
        copies = stage.taken_copies()
        for to, names in self.ties.given(chunk).items():
            key = (_TIED_GRADIENT, chunk, to, micro_batch)
            sums = {name: copies[name] for name in names}
            if self.placement[to] == self.group.rank:
                step.arrived[key] = sums
            else:
                self._tied.send(self.placement[to], key, sums)
        if chunk:
            loss, count = step.counts[micro_batch]
            content = {"gradients": stage.input_gradients(micro_batch), "loss": loss, "count": count}
            self._hand_on(step, chunk - 1, (_GRADIENT, chunk, micro_batch), content)

    def _take_tied(self, step: _Step, chunk: int, micro_batch: int) -> dict[Parameter, Tensor]:
        """What later users of this chunk's tied parameters gave for a micro-batch."""
        found: dict[Parameter, Tensor] = {}
        for origin, names in self.ties.taken(chunk).items():
            key = (_TIED_GRADIENT, origin, chunk, micro_batch)
            here = self.placement[origin] == self.group.rank
            came = step.arrived.pop(key) if here else self._tied.receive(self.placement[origin], key)
            parameters = dict(self.stages[chunk].chunk.module.named_parameters())
            found |= {parameters[name]: came[name] for name in names if came[name] is not None}
        return found

    # --- after the update -------------------------------------------------------------------------------------

    @torch.no_grad()
    def share_tied(self) -> None:
        """Owners of tied parameters hand their weights to those that hold copies; all workers of the group call it."""
        for number, (name, (owner, *others)) in enumerate(self.ties.users.items()):
            if owner not in self.stages:
                continue
            with self._inside():  # a copy: the next update may come before the others have read it
                weight = dict(self.stages[owner].chunk.module.named_parameters())[name].detach().clone()
            for chunk in others:
                if chunk in self.stages:
                    self.stages[chunk].copies[name].copy_(weight)
                else:
                    self._tied.send(self.placement[chunk], (_TIED_WEIGHT, number, chunk), {"weight": weight})
        for number, (name, (owner, *others)) in enumerate(self.ties.users.items()):
            for chunk in others:
                if chunk in self.stages and owner not in self.stages:
                    came = self._tied.receive(self.placement[owner], (_TIED_WEIGHT, number, chunk))
                    self.stages[chunk].copies[name].copy_(came["weight"])
        self.settle()
