"""A worker's memory under a plan: chosen before the first step, measured in every one, explained when it runs out."""

import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from shoal.comm.exchange import HeapExchange
from shoal.comm.group import Group
from shoal.comm.pages import resident_bytes
from shoal.comm.status import Phase
from shoal.errors import RunFailed, UserError
from shoal.memory.apply import device_of, meter_of, set_up
from shoal.memory.away import Away
from shoal.memory.blocks import find_blocks
from shoal.memory.budget import Chosen, Need, Ways, keep_budget, weight_bytes
from shoal.memory.explain import counted_change, explained
from shoal.memory.gauge import gauge_for, taken_bytes
from shoal.memory.optimizer_need import optimizer_need, state_bytes
from shoal.memory.places import Disk
from shoal.memory.recompute import Block
from shoal.memory.rehearsal import Loss
from shoal.memory.shortage import is_shortage
from shoal.memory.store import Here, Store
from shoal.memory.streamed import Streamed
from shoal.memory.table import BlockCost, Table
from shoal.parallel.held import Held
from shoal.recipe.memory_plan import MemoryPlan, size_text
from shoal.train.gradients import Gradients

Batch = Mapping[str, Tensor]
SLACK_BYTES = 256 << 10  # counters, losses, rows of facts: what nobody counts one by one


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a worker does in a step, as far as memory is concerned."""

    held: Held
    sets: Sequence[Gradients]  # of `held.shares`
    optimizer: torch.optim.Optimizer
    fetch: Callable[[], Batch]  # a micro-batch of the usual size
    loss: Callable[[Batch], Tensor]
    shards: int
    own_shards: int
    micro_batches: int
    steps_ahead: int  # whose batches may be ready
    saves: bool  # it writes checkpoints

    @property
    def module(self) -> nn.Module:
        return self.held.module

    @property
    def split(self) -> bool:
        """Several workers make a pass together: none can make one alone."""
        return self.held.plan.splits_model

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
            gradients=sum(each.sums_bytes((self.micro_batches,) * each.leaves) for each in self.sets),
            optimizer=states + pieces,
            checkpoint=self._whole(weights + states) if self.saves and device.type == "cpu" else 0,
            data=sum(tensor.nbytes for tensor in batch.values()) * ready + SLACK_BYTES,
            update=update,
        )

    def _whole(self, own: int) -> int:
        """Of bytes that go with this worker's parameters, those of the whole model, of which a checkpoint is a copy."""
        here = sum(parameter.numel() for parameter in self.module.parameters())
        return own * self.held.elements // max(1, here) if self.split else own


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
        self._before = 0  # what the process took when the first step had not begun
        self._told: dict[str, Any] = {}
        self._said = False

    def set_up(
        self, module: nn.Module, say_once: Callable[[str], None], blocks: Mapping[str, nn.Module] | None
    ) -> None:
        """Wrap the blocks of a model that the plan saves memory in; ``blocks`` are the chunks of a pipeline."""
        self._blocks = set_up(module, self.plan, self._say, say_once, blocks=blocks)

    def _say(self, line: str) -> None:
        print(f"shoal: rank {self.group.rank}: {line}", file=sys.stderr, flush=True)

    def join(self, group: Group, sets: Sequence[Gradients]) -> None:
        """Other workers from now on; what was chosen stays."""
        self.group = group
        if self._work is not None:
            self._work = replace(self._work, sets=sets)

    # --- before the first step ------------------------------------------------------------------------------------

    def prepare(self, work: "Work") -> None:
        """Keep the budget, if there is one. Called by all workers. Raises UserError when nothing fits."""
        self._work, self._before = work, taken_bytes(self.device)
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
            where=where_of(work.held, self.device),
            micro_batches=work.micro_batches,
            together=self._of_all if work.split else None,
        )
        mine = json.dumps(self.chosen.need.fields()).encode()
        self.predicted = [json.loads(row) for row in self.group.gather(mine)]

    def _of_all(self, table: Table) -> Table:
        """One for all workers, which must compute the same blocks again: of each number the largest."""
        rows = [json.loads(row) for row in self.group.gather(json.dumps(asdict(table)).encode())]
        blocks = [{key: row[0][key] if key == "name" else max(each[key] for each in row) for key in row[0]}
                  for row in zip(*(row["blocks"] for row in rows), strict=True)]  # fmt: skip
        return Table(blocks=tuple(BlockCost(**row) for row in blocks), outside=max(row["outside"] for row in rows))

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
        shared = 0  # memory of the workers' heap, that torch did not allocate
        for exchange in (each.exchange for each in self._work.sets):
            if isinstance(exchange, HeapExchange) and self.device.type == "cpu":
                shared += sum(resident_bytes(partial) for partial in exchange.partials)
        return self.gauge.peak() + shared

    def _save_more(self, most: int) -> None:
        """Micro-batches of changing sizes may take more than the one that was rehearsed."""
        assert self.chosen is not None
        assert self._ways is not None
        smaller = self.chosen.smaller
        if self._work is not None and self._work.split:  # all have to take the same, and one may find no room on disk
            smaller = tuple(each for each in smaller if "away" not in each.ways)
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
            taken = taken_bytes(self.device)
            traceback.clear_frames(error.__traceback__)  # they hold what the failed step had made
            raise self._explained(error, taken) from None

    def _explained(self, error: BaseException, taken: int) -> RunFailed:
        position, work = self.group.report.position, self._work
        when = f"in step {max(position.step, 1)}, {position.phase.name},"
        if work is None:
            what = " ".join(str(error).split())[:200]
            return RunFailed(f"rank {self.group.rank} ({self.device}) {when} ran out of memory: {what}")
        where = f"{where_of(work.held, self.device)} {when}"
        if work.split:
            need = work.need(work.batch(self.device), self.device)
            copied = need.checkpoint if position.phase is Phase.saving else 0
            left = taken - self._before - need.gradients - need.optimizer - copied
            found = replace(need, activations=max(0, left), checkpoint=copied)
            changes = work.held.plan, work.micro_batches, str(error)
            return RunFailed(f"{where} ran out of memory, which a step fills with {found.told()}. "
                             f"{counted_change(found, *changes)}")  # fmt: skip
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


def where_of(held: Held, device: torch.device) -> str:
    """The worker, its device, and which part of a split model it has: "rank 3 (cpu; pipe 1 of 2)", counted from 0."""
    sizes = {axis: size for axis, size in held.plan.axes.sizes if size > 1 and held.plan.splits_model}
    part = ", ".join(f"{axis} {held.coordinates[axis]} of {size}" for axis, size in sizes.items())
    return f"rank {held.group.rank} ({device}{'; ' * bool(part)}{part})"


def due(step: int) -> bool:
    """At which steps the workers tell each other what they took: 1 to 10, 20, 50, 100, 200, ..."""
    return step <= 10 or step in (lead * 10 ** (len(str(step)) - 1) for lead in (1, 2, 5))
