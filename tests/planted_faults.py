"""Faults, planted by a model factory in the process that calls it: a worker of one run. They die with it."""

from dataclasses import dataclass

from torch import nn

import shoal.comm.exchange
from shoal.comm.exchange import HeapExchange
from shoal.models.registry import build
from shoal.recipe.recipe import ModelSpec
from shoal.train.worker import Worker

STEP, RANK = 3, 1  # where most faults strike


@dataclass(frozen=True)
class Doubled:
    """Worker 1 hands over one gradient of step 3 twice as large: the first in the flat buffer."""

    def plant(self):
        begin, post = HeapExchange.begin, HeapExchange.post

        def counted(exchange, passes):
            exchange.steps_begun = getattr(exchange, "steps_begun", 0) + 1
            exchange.untouched = True
            begin(exchange, passes)

        def doubled(exchange):
            if exchange._group.rank == RANK and exchange.steps_begun == STEP and exchange.untouched:
                exchange.untouched = False
                slot = exchange.layout.slots[0]
                exchange.partials[0][slot.offset : slot.offset + slot.size].mul_(2)
            post(exchange)

        HeapExchange.begin, HeapExchange.post = counted, doubled


@dataclass(frozen=True)
class Forgotten:
    """The last addition between workers is left out, on every worker and at every step."""

    def plant(self):
        whole = shoal.comm.exchange.completion
        shoal.comm.exchange.completion = lambda *given: whole(*given)[:-1]


@dataclass(frozen=True)
class Skipped:
    """Worker 1 leaves the last sample of its last shard out at step 3, or takes another one for it."""

    instead: int | None = None

    def plant(self):
        work = Worker._work

        def skipping(worker, ledger, first, last, shards):
            for (step, shard, micro), ids, epoch in work(worker, ledger, first, last, shards):
                if (worker.rank, step, shard) == (RANK, STEP - 1, worker.shards[-1]):
                    ids = ids.copy()
                    if self.instead is None:
                        ids = ids[:-1]
                    else:
                        ids[-1] = self.instead
                yield (step, shard, micro), ids, epoch

        Worker._work = skipping


def after_step(strike):
    """``strike(optimizer)`` when worker 1 has made its update of step 3, before the step counts as committed."""
    take = Worker.optimizer

    def taking(worker, optimizer):
        updates = []

        def updated(*_):
            updates.append(None)
            if worker.rank == RANK and len(updates) == STEP:
                strike(optimizer)

        optimizer.register_step_post_hook(updated)
        return take(worker, optimizer)

    Worker.optimizer = taking


@dataclass(frozen=True)
class Twice:
    """Worker 1 updates its own weights twice at step 3: the workers part."""

    def plant(self):
        after_step(lambda optimizer: optimizer.step())


@dataclass(frozen=True)
class Crash:
    """Worker 1 raises at step 3."""

    def plant(self):
        def strike(_):
            raise ArithmeticError("planted")

        after_step(strike)


@dataclass(frozen=True)
class Touched:
    """A weight of worker 1 is changed behind the last step's back, when its run is over."""

    def plant(self):
        close = Worker.close

        def closing(worker):
            close(worker)
            if worker.rank == RANK:
                worker.held.module.get_parameter("layers.0.bias").data.add_(1.0)

        Worker.close = closing


@dataclass(frozen=True)
class Factory:
    """Plants the fault, then builds what the recipe would."""

    fault: object
    spec: ModelSpec
    facts: dict

    def __call__(self) -> nn.Module:
        self.fault.plant()
        return build(self.spec, self.facts)


def doubled_mlp(facts, hidden):
    """For recipes: model.factory = "planted_faults:doubled_mlp"."""
    return Factory(Doubled(), ModelSpec(kind="mlp", options={"hidden": (hidden,)}), facts)()
