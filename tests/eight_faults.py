"""The faults that training in parallel can have, each planted once: at step 3, on rank 1 where one worker will do.

As in `planted_faults`, a model factory plants them in the process that calls it. The reference builds the same model:
what is changed here is only what the reference does not use."""

from dataclasses import dataclass

import torch
from planted_faults import RANK, STEP

import shoal.parallel.tensor.banded
import shoal.parallel.tensor.crossing
from shoal.parallel.pipeline.engine import Pipeline
from shoal.train.gradients import Gradients
from shoal.train.step import Step
from shoal.train.worker import Worker


def _now():
    """What this process is doing, once told: {"step", "rank"}."""
    now = {"step": 0, "rank": -1}
    begin = Step.__init__

    def begun(step, crew, *given):
        begin(step, crew, *given)
        now.update(step=step.number, rank=crew.group.rank)

    Step.__init__ = begun
    return now


def _here(now, rank=RANK):
    return now["step"] == STEP and rank in (None, now["rank"])


@dataclass(frozen=True)
class MissingAllReduce:
    """No worker gets the others' part of what an output is the sum of."""

    def plant(self):
        now, carry_out = _now(), shoal.parallel.tensor.crossing.carry_out

        def alone(operation, x, collectives, split):
            left_out = operation == "all-reduce" and _here(now, None)
            return x if left_out else carry_out(operation, x, collectives, split)

        shoal.parallel.tensor.crossing.carry_out = alone


@dataclass(frozen=True)
class DoubleCount:
    """Rank 1 adds the gradients of its first shard twice."""

    def plant(self):
        now, opened, arrived = _now(), Gradients.open, Gradients._arrived

        def opening(gradients, leaf, *given, **more):
            gradients.leaf_of_pass = leaf
            opened(gradients, leaf, *given, **more)

        def twice(gradients, index, parameter):
            if _here(now) and gradients.leaf_of_pass == gradients._placement.ownership[RANK][0]:
                parameter.grad.mul_(2)
            arrived(gradients, index, parameter)

        Gradients.open, Gradients._arrived = opening, twice


@dataclass(frozen=True)
class WrongScale:
    """The sum is divided by twice the number of targets."""

    def plant(self):
        now, denominators = _now(), Gradients._denominators

        def doubled(gradients, facts):
            targets, leaves = denominators(gradients, facts)
            return (2 * targets if _here(now, None) else targets), leaves

        Gradients._denominators = doubled


@dataclass(frozen=True)
class SwappedMicroBatch:
    """Rank 1, or every stage of a pipeline, takes the samples of its first and its last shard for one another's."""

    everywhere: bool = False

    def plant(self):
        work = Worker._work

        def swapped(worker, ledger, first, last, shards):
            found = list(work(worker, ledger, first, last, shards))
            at = [
                i
                for i, ((step, _, _), _, _) in enumerate(found)
                if step == STEP - 1 and (self.everywhere or worker.rank == RANK)
            ]
            ids = [ids for _, ids, _ in found]
            if at:
                ids[at[0]], ids[at[-1]] = ids[at[-1]], ids[at[0]]
            for (place, _, epoch), those in zip(found, ids, strict=True):
                yield place, those, epoch

        Worker._work = swapped


@dataclass(frozen=True)
class StaleParameter:
    """Rank 1 keeps the old value of one parameter."""

    name: str

    def plant(self):
        take = Worker.optimizer

        def taking(worker, optimizer):
            stale = dict(worker.held.module.named_parameters()).get(self.name)
            kept = {}

            def before(*_):
                kept["old"] = stale.detach().clone()
                kept["updates"] = kept.get("updates", 0) + 1

            def after(*_):
                if kept["updates"] == STEP:
                    stale.data.copy_(kept["old"])

            if worker.rank == RANK and stale is not None:
                optimizer.register_step_pre_hook(before)
                optimizer.register_step_post_hook(after)
            return take(worker, optimizer)

        Worker.optimizer = taking


@dataclass(frozen=True)
class LostTiedGradient:
    """The stage that owns a tied weight drops what the last stage has sent it."""

    def plant(self):
        now, take = _now(), Pipeline._take_tied

        def dropping(pipeline, *given):
            came = take(pipeline, *given)
            return {} if _here(now, None) else came

        Pipeline._take_tied = dropping


@dataclass(frozen=True)
class WrongDropoutStream:
    """Rank 1 enters the stream of the shard after its last one."""

    def plant(self):
        now, enter = _now(), Step.enter_stream

        def other(step, shard, micro):
            last = _here(now) and shard == step._crew.shards[-1]
            enter(step, shard + last, micro)

        Step.enter_stream = other


@dataclass(frozen=True)
class DroppedHaloRow:
    """Rank 1 has zeros in the place of the row above its own."""

    def plant(self):
        now, fetch = _now(), shoal.parallel.tensor.banded.fetch_rows

        def dropping(x, window, collectives):
            rows = fetch(x, window, collectives)
            if not _here(now):
                return rows
            return torch.cat([torch.zeros_like(rows[:, :, :1]), rows[:, :, 1:]], 2)

        shoal.parallel.tensor.banded.fetch_rows = dropping
