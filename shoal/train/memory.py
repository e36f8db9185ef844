"""A worker's memory under a plan: chosen before the first step, measured in every one, explained when it runs out."""

import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from shoal.comm.exchange import HeapExchange
from shoal.comm.group import Group
from shoal.comm.pages import resident_bytes
from shoal.errors import RunFailed, UserError
from shoal.memory.apply import device_of, meter_of, set_up
from shoal.memory.away import Away
from shoal.memory.blocks import find_blocks
from shoal.memory.budget import Chosen, Need, Ways, keep_budget, weight_bytes
from shoal.memory.explain import explained
from shoal.memory.gauge import gauge_for
from shoal.memory.optimizer_need import optimizer_need, state_bytes
from shoal.memory.places import Disk
from shoal.memory.recompute import Block
from shoal.memory.rehearsal import Loss
from shoal.memory.shortage import is_shortage
from shoal.memory.store import Here, Store
from shoal.memory.streamed import Streamed
from shoal.recipe.memory_plan import MemoryPlan, size_text
from shoal.train.gradients import Gradients

Batch = Mapping[str, Tensor]
SLACK_BYTES = 256 << 10  # counters, losses, rows of facts: what nobody counts one by one


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a worker does in a step, as far as memory is concerned."""

    module: nn.Module
    gradients: Gradients
    optimizer: torch.optim.Optimizer
    fetch: Callable[[], Batch]  # a micro-batch of the usual size
    loss: Callable[[Batch], Tensor]
    shards: int
    own_shards: int
    micro_batches: int
    steps_ahead: int  # whose batches may be ready
    saves: bool  # it writes checkpoints

    def batch(self, device: torch.device) -> Batch:
        return {name: tensor.to(device) for name, tensor in self.fetch().items()}

    def need(self, batch: Batch, device: torch.device) -> Need:
        """All but activations."""
        pieces = 0
        if isinstance(self.optimizer, Streamed):
            states, update, pieces = self.optimizer.resident_bytes(), 0, self.optimizer.scratch_bytes()
        else:
            states, update = optimizer_need(self.optimizer)
        weights = weight_bytes(self.module)
        ready = self.steps_ahead * self.own_shards * self.micro_batches + 2
        return Need(
            weights=weights + sum(buffer.nbytes for buffer in self.module.buffers()),  # and those of the step's begin
            gradients=self.gradients.sums_bytes((self.micro_batches,) * self.shards),
            optimizer=states + pieces,
            checkpoint=weights + states if self.saves and device.type == "cpu" else 0,
            data=sum(tensor.nbytes for tensor in batch.values()) * ready + SLACK_BYTES,
            update=update,
        )


class Memory:
    """Of one worker. Without a budget it sets blocks up and knows what to say when memory runs out."""

    def __init__(self, plan: MemoryPlan, group: Group, device: torch.device) -> None:
        self.plan, self.group, self.device = plan, group, device
        self.gauge = gauge_for(device) if plan.budget_bytes else None  # it counts what is made from now on
        self.chosen: Chosen | None = None
        self.predicted: list[dict[str, int]] = []  # of each rank
        self._blocks: list[Block] = []
        self._ways: Ways | None = None
        self._work: Work | None = None
        self._most = 0  # observed since it was told last
        self._told: dict[str, Any] = {}
        self._said = False

    def set_up(
        self, module: nn.Module, say_once: Callable[[str], None], blocks: Mapping[str, nn.Module] | None
    ) -> None:
        """Wrap the blocks of a model that the plan saves memory in; ``blocks`` are the chunks of a pipeline."""
        self._blocks = set_up(module, self.plan, self._say, say_once, blocks=blocks)

    def _say(self, line: str) -> None:
        print(f"shoal: rank {self.group.rank}: {line}", file=sys.stderr, flush=True)

    def join(self, group: Group, gradients: Gradients) -> None:
        """Other workers from now on; what was chosen stays."""
        self.group = group
        if self._work is not None:
            self._work = replace(self._work, gradients=gradients)

    # --- before the first step ------------------------------------------------------------------------------------

    def prepare(self, work: "Work") -> None:
        """Keep the budget, if there is one. Called by all workers. Raises UserError when nothing fits."""
        self._work = work
        if self.gauge is None:
            return
        batch = work.batch(self.device)
        self._ways = self._all_ways(work.module)
        self.chosen = keep_budget(
            work.module,
            self._ways,
            lambda: work.loss(batch),
            self.gauge,
            work.need(batch, self.device),
            self.plan.budget_bytes,
            one_pass=work.own_shards * work.micro_batches == 1,
            agree=lambda number: max(json.loads(row) for row in self.group.gather(json.dumps(number).encode())),
            where=f"rank {self.group.rank} ({self.device})",
            micro_batches=work.micro_batches,
        )
        mine = json.dumps(self.chosen.need.fields()).encode()
        self.predicted = [json.loads(row) for row in self.group.gather(mine)]

    def _all_ways(self, module: nn.Module) -> Ways:
        """All blocks of the model, whatever has been done with them."""
        for block in self._blocks:
            block.unwrap()
        here = Here(meter_of(module))
        self._blocks = [Block(name, child, here) for name, child in find_blocks(module, self.plan.blocks).items()]
        return Ways(self._blocks, here, lambda size: self._away(module, size))

    def _away(self, module: nn.Module, size: int) -> Store | None:
        try:
            disk = Disk(device_of(module), self.plan.offload_dir)
        except UserError:
            return None
        workers = self.group.world  # they may all share it
        return Away(meter_of(module), disk, self._say) if disk.file.free_bytes >= size * workers else None

    # --- in every step --------------------------------------------------------------------------------------------

    def begins(self) -> None:
        if self.gauge is not None:
            if self.chosen is None:
                raise UserError(
                    "plan: memory.peak_bytes needs a micro-batch and its loss before the first step: call "
                    "worker.prepare_memory(data, batch, loss), where loss(part) is the sum of a micro-batch's losses."
                )
            self.gauge.restart()

    def ended(self, step: int) -> None:
        """Called by all workers. Now and then they tell each other, and save more should the budget be broken."""
        if self.gauge is None:
            return
        self._most = max(self._most, self._observed())
        if not due(step):
            return
        peaks = [json.loads(row) for row in self.group.gather(json.dumps(self._most).encode())]
        self._told = {"peaks": peaks}
        if max(peaks) > self.plan.budget_bytes:
            self._save_more(max(peaks))
        self._most = 0

    def _observed(self) -> int:
        assert self.gauge is not None
        assert self._work is not None
        exchange = self._work.gradients.exchange
        shared = 0  # memory of the workers' heap, that torch did not allocate
        if isinstance(exchange, HeapExchange) and self.device.type == "cpu":
            shared = sum(resident_bytes(partial) for partial in exchange.partials)
        return self.gauge.peak() + shared

    def _save_more(self, most: int) -> None:
        """Micro-batches of changing sizes may take more than the one that was rehearsed."""
        assert self.chosen is not None
        assert self._ways is not None
        smaller = self.chosen.smaller
        line = f"a step took {size_text(most)}, more than memory.peak_bytes = {size_text(self.plan.budget_bytes)!r}"
        if smaller and self._ways.take(smaller[0], smaller[0].least):
            self.chosen = Chosen(self.chosen.need, smaller[0].told(), smaller[1:])
            self._told["ways"] = self.chosen.ways
            line += ": from now on more is computed again"
        if self.group.rank == 0 and not self._said:
            print(f"shoal: {line}.", file=sys.stderr, flush=True)
        self._said = True

    def take_told(self) -> dict[str, Any]:
        """What is new for the event `committed`."""
        told, self._told = self._told, {}
        return told

    @property
    def started(self) -> dict[str, Any]:
        """For the event `started`; empty without a budget."""
        if self.chosen is None or self.gauge is None:
            return {}
        return {
            "budget": self.plan.budget_bytes,
            "ways": self.chosen.ways,
            "predicted": self.predicted,
            "exact": self.gauge.exact,
        }

    # --- when it runs out -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """An error for memory that ran out inside becomes a RunFailed that says who, what filled it, and what fits."""
        try:
            yield
        except Exception as error:
            if not is_shortage(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold what the failed step had made
            raise self._explained(error) from None

    def _explained(self, error: BaseException) -> RunFailed:
        position = self.group.report.position
        where = f"rank {self.group.rank} ({self.device}) in step {max(position.step, 1)}, {position.phase.name},"
        work = self._work
        if work is None:
            return RunFailed(f"{where} ran out of memory: {' '.join(str(error).split())[:200]}")
        for parameter in work.module.parameters():
            parameter.grad = None
        batch = work.batch(self.device)
        need = work.need(batch, self.device)

        def part(number: int) -> Loss:
            return lambda: work.loss({k: t[: max(1, t.shape[0] // number)] if t.dim() else t for k, t in batch.items()})

        return RunFailed(
            explained(
                work.module,
                self._all_ways(work.module),
                part,
                self.gauge or gauge_for(self.device),
                need,
                max(0, need.optimizer - state_bytes(work.optimizer)) + (need.checkpoint if position.step <= 1 else 0),
                where=where,
                micro_batches=work.micro_batches,
            )
        )


def due(step: int) -> bool:
    """At which steps the workers tell each other what they took: 1 to 10, 20, 50, 100, 200, ..."""
    return step <= 10 or step in (lead * 10 ** (len(str(step)) - 1) for lead in (1, 2, 5))
