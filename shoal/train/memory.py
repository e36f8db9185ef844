"""A worker's memory under a plan: chosen before the first step, measured in every one, explained when it runs out."""

import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from shoal.comm.exchange import HeapExchange
from shoal.comm.group import Group, HostGroup
from shoal.comm.pages import resident_bytes
from shoal.comm.status import Phase
from shoal.errors import RunFailed, UserError
from shoal.memory.apply import device_of, ignore_weights, meter_of, set_up
from shoal.memory.away import Away
from shoal.memory.blocks import find_blocks
from shoal.memory.budget import Chosen, Ways, keep_budget
from shoal.memory.explain import counted_change, explained
from shoal.memory.gauge import gauge_for, taken_bytes
from shoal.memory.meter import Meter
from shoal.memory.optimizer_need import state_bytes
from shoal.memory.places import Disk
from shoal.memory.recompute import Block
from shoal.memory.rehearsal import Passes, passes_of
from shoal.memory.shortage import is_shortage
from shoal.memory.store import Here, Store
from shoal.parallel.held import Held
from shoal.recipe.memory_plan import MemoryPlan, size_text
from shoal.train.choosing import Crew
from shoal.train.gradients import Gradients
from shoal.train.rehearsed_stages import passes_of_stages, there_and_back
from shoal.train.synchrony import Update
from shoal.train.work import Work


class Memory:
    """Of one worker. Without a budget it sets blocks up and knows what to say when memory runs out."""

    def __init__(self, plan: MemoryPlan, group: Group, device: torch.device) -> None:
        self.plan, self.group, self.device = plan, group, device
        self.gauge = gauge_for(device) if plan.budget_bytes else None  # it counts what is made from now on
        self.chosen: Chosen | None = None
        self.predicted: list[dict[str, int]] = []  # of each rank
        self.ways: list[dict[str, int]] = []  # of each rank: way -> blocks
        self._crew: Crew | None = None
        self._blocks: list[Block] = []
        self._meters: list[tuple[Meter, nn.Module]] = []  # that do not count a module's weights
        self._ways: Ways | None = None
        self._work: Work | None = None
        self._update: Update | None = None
        self._most = 0  # observed since it was told last
        self._before = 0  # what the process took when the first step had not begun
        self._told: dict[str, Any] = {}
        self._said = False

    def set_up(
        self, module: nn.Module, say_once: Callable[[str], None], blocks: Mapping[str, nn.Module] | None
    ) -> None:
        """Wrap the blocks of a model that the plan saves memory in; ``blocks`` are the chunks of a pipeline."""
        self._blocks = set_up(module, self.plan, self._say, say_once, blocks=blocks)
        self._meters += [(block.store.meter, module) for block in self._blocks[:1]]

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
        batch, held = work.batch(self.device), work.held
        self._crew = crew = Crew(self.group, held, work.passes)
        self._ways = self._all_ways(work.module)
        once: Passes | None = None
        if held.pipeline is None:
            passes = passes_of(lambda: work.loss(batch))
        else:
            options = batch, work.begin_stream, work.within
            passes = passes_of_stages(held, held.schedule(max(1, work.passes)), *options)
            once = passes_of_stages(held, there_and_back(held.pipeline), *options)
        need = work.need(batch, self.device)
        self.chosen = keep_budget(
            work.module,
            self._ways,
            passes,
            self.gauge,
            need,
            self.plan.budget_bytes,
            once=once,
            shared=work.sums if work.own_shards * work.micro_batches == 1 else 0,
            crew=crew,
            where=where_of(held, self.device),
            micro_batches=work.counts,
        )
        mine = json.dumps(self.chosen.need.fields()).encode()
        self.predicted = [json.loads(row) for row in self.group.gather(mine)]
        self.ways = self._all_chosen()

    def _all_chosen(self) -> list[dict[str, int]]:
        assert self.chosen is not None
        return [json.loads(row) for row in self.group.gather(json.dumps(self.chosen.ways).encode())]

    def _all_ways(self, module: nn.Module) -> Ways:
        """All blocks of the model, whatever has been done with them."""
        for block in self._blocks:
            block.unwrap()
        assert self._work is not None
        held, meter = self._work.held, meter_of(module)
        if held.pipeline is not None:
            arenas = held.group.arenas if isinstance(held.group, HostGroup) else None
            meter.elsewhere = arenas.is_of_others if arenas is not None else meter.elsewhere
        found = held.chunks if held.chunks is not None else find_blocks(module, self.plan.blocks)
        self._meters.append((meter, module))
        here = Here(meter)
        self._blocks = [Block(name, child, here) for name, child in found.items()]
        return Ways(self._blocks, here, lambda size: self._away(module, size))

    def _away(self, module: nn.Module, size: int) -> Store | None:
        try:
            disk = Disk(device_of(module), self.plan.offload_dir)
        except UserError:
            return None
        workers = self.group.world  # they may all share it
        if disk.file.free_bytes < size * workers:
            return None
        self._meters.append((meter_of(module), module))
        return Away(self._meters[-1][0], disk, self._say)

    # --- in every step --------------------------------------------------------------------------------------------

    def begins(self, update: Update) -> None:
        """A step that ``update`` ends; it holds the states."""
        if self._update is not update:
            self._update = update
            for meter, module in self._meters:  # parameters may lie elsewhere since they were made
                ignore_weights(meter, module)
        if self.gauge is not None:
            if self.chosen is None:
                raise UserError(
                    "plan: memory.peak_bytes needs a micro-batch and its loss before the first step: call "
                    "worker.prepare_memory(data, batch, loss), where loss(part) is the sum of a micro-batch's losses."
                )
            self.gauge.restart()
            update.count_anew()

    def ended(self, step: int) -> None:
        """Called by all workers. Now and then they tell each other, and save more should the budget be broken."""
        if self.gauge is None:
            return
        self._most = max(self._most, self._observed())
        if not due(step):
            return
        peaks = [json.loads(row) for row in self.group.gather(json.dumps(self._most).encode())]
        self._told = {"peaks": peaks}
        assert self._crew is not None
        most = max(peaks[rank] for rank in self._crew.ranks)
        if most > self.plan.budget_bytes:
            self._save_more(most)
        if max(peaks) > self.plan.budget_bytes:
            self.ways = self._all_chosen()
            self._told["ways"] = self.ways
        self._most = 0

    def _observed(self) -> int:
        assert self.gauge is not None
        assert self._work is not None
        assert self._update is not None
        beside = self._update.beside_bytes()
        for exchange in (each.exchange for each in self._work.sets):
            plain = isinstance(exchange, HeapExchange) and not exchange.sliced_result
            if plain and self.device.type == "cpu":  # the workers' heap, that torch did not allocate
                beside += sum(resident_bytes(partial) for partial in exchange.partials)
        return self.gauge.peak() + beside

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
            line += ": from now on more is computed again"
        assert self._crew is not None
        if self.group.rank == self._crew.ranks[0] and not self._said:
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
            "ways": self.ways,
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
        if work.together:
            need = work.need(work.batch(self.device), self.device)
            copied = need.checkpoint if position.phase is Phase.saving else 0
            left = taken - self._before - need.gradients - need.optimizer - copied
            found = replace(need, activations=max(0, left), checkpoint=copied)
            changes = work.held.plan, work.counts, str(error)
            return RunFailed(f"{where} ran out of memory, which a step fills with {found.told()}. "
                             f"{counted_change(found, *changes)}")  # fmt: skip
        for parameter in work.module.parameters():
            parameter.grad = None
        batch = work.batch(self.device)
        need = work.need(batch, self.device)

        def part(number: int) -> Passes:
            some = {k: t[: max(1, t.shape[0] // number)] if t.dim() else t for k, t in batch.items()}
            return passes_of(lambda: work.loss(some))

        held = self._update.state_bytes() if self._update is not None else state_bytes(work.optimizer)
        return RunFailed(
            explained(
                work.module,
                self._all_ways(work.module),
                part,
                self.gauge or gauge_for(self.device),
                need,
                max(0, need.optimizer - held) + (need.checkpoint if position.step <= 1 else 0),
                where=where,
                micro_batches=work.counts,
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
