"""The Worker: the whole machinery for somebody's own training loop, and for ours.

docs/your_own_loop.md shows one; `shoal.train` runs `shoal.train.loop` on it.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from shoal.comm.accounting.telling import transport
from shoal.comm.group import Group
from shoal.comm.server.optimizer import check as check_optimizer
from shoal.comm.status import Phase
from shoal.data.dataset import DatasetSource
from shoal.data.ledger import Changes, Ledger
from shoal.data.loading import Prefetcher
from shoal.data.source import Batch, Source
from shoal.errors import UserError
from shoal.memory.keeping import KeptParameters, keep_parameters, keep_states
from shoal.parallel.held import Held
from shoal.parallel.place import Subject, place
from shoal.recipe.plan import Plan
from shoal.train import checkpoint, sharded_states
from shoal.train.agreement import agreed_newest, share_weights
from shoal.train.arithmetic import arithmetic_of, check_same
from shoal.train.checksum import compare_held
from shoal.train.contents import Contents
from shoal.train.device import device_for
from shoal.train.figures import StepFigures
from shoal.train.first_model import share_first_values
from shoal.train.memory import Memory
from shoal.train.reduction import Reduction
from shoal.train.rehearsed_stages import Within
from shoal.train.retry import Retry
from shoal.train.snapshot import BackgroundWriter, Written
from shoal.train.step import Place, Step
from shoal.train.synchrony import Told, Update, update_of
from shoal.train.unsent import Unsent
from shoal.train.work import BatchLoss, Work


class Worker:
    """One process of a run. Every worker runs the same program; each sees its own shards of every step."""

    def __init__(
        self,
        group: Group,
        plan: Plan,
        *,
        shards: int = 8,
        micro_batches: int = 1,
        seed: int = 0,
        clip: float = 0.0,
        measures: bool = False,
    ) -> None:
        """``measures``: each step finds out how noisy its gradient is; see `shoal.train.noise`."""
        self.group, self.plan, self._measures = group, plan, measures
        self.rank, self.world = group.rank, group.world
        self.micro_batches, self.seed, self.clip = micro_batches, seed, clip
        self._shard_count, self._ownership = shards, plan.owned(shards)
        self.device = device_for(plan.device, group.rank)
        self.step = 0  # committed so far
        self.stopping = False  # the run was asked to stop; no further step is yielded
        self.publishes_later = False  # see `Update`: what this worker has done of a step is copied first
        self.ledger: Ledger | None = None
        self.batches: Changes = ()  # that are not the first one
        self._fingerprint = ""
        self.nothing: Batch = {}  # a batch of no samples
        self._held: Held | None = None
        self._made_contents: Contents | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._parameters = KeptParameters()
        self.memory = Memory(plan.memory, group, self.device)
        self._kept: dict[str, Any] = {}
        self._reduction: Reduction | None = None
        self._update: Update | None = None
        self.unsent, self.retry = Unsent(), Retry()
        self._writers: dict[Path, BackgroundWriter] = {}
        self._prepared: set[Path] = set()
        self._resumed: checkpoint.Checkpoint | None = None
        torch.manual_seed(seed)

    @property
    def shards(self) -> Sequence[int]:
        """The shards that this worker works on, alone or with others of its replica."""
        dealt = self.retry.shards
        return self._usual_shards if dealt is None else dealt

    @property
    def _usual_shards(self) -> range:
        return self._ownership[self.plan.replica_of(self.rank)]

    # --- what is trained --------------------------------------------------------------------------------------

    def model(self, module: nn.Module, *, compile: bool = False, subject: Subject | None = None) -> nn.Module:
        """Move the module to this worker's device, give every worker rank 0's weights, and hook its gradients.

        A plan that splits the model leaves in ``module`` what this worker holds; ``subject`` is what it is trained on.
        With ``compile`` the returned module runs through torch.compile; its parameters are the same."""
        self.group.report(Phase.building)
        if self._held is not None:
            raise UserError("worker.model was called twice: wrap several modules in one nn.ModuleDict.")
        blank = subject is not None and subject.first is not None
        if not blank:
            module.to(self.device)
            share_weights(module, self.group)
        if compile and (key := self.plan.memory.changes_weights):
            raise UserError(f"plan: {key} is for models that are not compiled: leave compile out.")
        if compile and self.plan.memory.works_on_blocks:
            raise UserError("plan: memory is saved in models that are not compiled: leave model.compile out.")
        if compile and self.plan.splits_model:
            raise UserError("plan: a model that is split over workers is not compiled: leave model.compile out.")
        sharded_states.check_compiled(compile, self.plan, self.group)
        self._held = held = place(module, self.plan, self.group, self.device, subject)
        if blank and held.first is None:  # else there is one copy of them
            compare_held(self.group, held, "before the first step")
        self._made_contents = None
        if self.plan.memory.changes_updates:
            parts = [*(held.chunks or {}).values()]
            units = sharded_states.units(self.plan)
            self._parameters = keep_parameters(module, units, **self._keeping(), parts=parts)
        self.memory.set_up(module, self._say_once, held.chunks)
        self._reduction = self._hooked()
        if held.first is not None:
            share_first_values(held, self._reduction.first)
        called: Any = torch.compile(module) if compile else module
        return cast(nn.Module, called)

    def _hooked(self) -> Reduction:
        return Reduction(self.held, self._ownership, self.micro_batches, self.device, measures=self._measures)

    def leave(self, *, keeps: bool = False) -> None:
        """Let go of the group. What a step in flight has done is dropped, and its memory is free; with ``keeps`` it
        stays for `take_up`, where that can be."""
        if self._reduction is not None:
            self.retry.leave(self._reduction.first if keeps and self.plan.alike else None, self.step + 1)
            self._reduction.release()
        if self._update is not None:
            self._update.leave()
        self._reduction = self._update = None

    def take_up(self, *, quiet: bool) -> dict[str, int]:
        """After `join`, before `steps`, called by all: see `Retry.take_up`."""
        assert self._reduction is not None
        return self.retry.take_up(self._reduction.first, self.group, self.step + 1, quiet=quiet)

    def join(self, group: Group, plan: Plan) -> None:
        """Go on with others from the last committed step, after `leave`; slices of states come back by `restore`."""
        self.group, self.plan = group, plan
        self.rank, self.world = group.rank, group.world
        self._ownership = plan.owned(self._shard_count)
        self.stopping = False
        self._prepared = set()
        self._held = place(self.held.module, plan, group, self.device, None)
        self._made_contents = None
        self._reduction = self._hooked()
        self.memory.join(group, self._reduction.sets)

    def _keeping(self) -> dict[str, Any]:
        """What shoal.memory.keeping asks of a worker. Called by all."""
        host = self.group.host.encode()
        sharing = self.group.gather(host).count(host)
        return {"device": self.device, "sharing": sharing, "say": self._say_once, "tell": self._say}

    def _say_once(self, line: str) -> None:
        """What is true of all workers."""
        if self.rank == 0:
            print(f"shoal: {line}", file=sys.stderr, flush=True)

    def _say(self, line: str) -> None:
        print(f"shoal: rank {self.rank}: {line}", file=sys.stderr, flush=True)

    def optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimiser that ``step.commit`` runs, kept as the plan's memory says: go on with the one returned.

        LBFGS is refused: its step would need the loss again."""
        if isinstance(optimizer, torch.optim.LBFGS):
            raise UserError("LBFGS evaluates the loss again inside its step, which a distributed step cannot do.")
        if self.plan.sync == "parameter-server":
            check_optimizer(optimizer)
        sharded_states.check(self.plan, optimizer, self.held.module, self._parameters.rests)
        if self.plan.memory.changes_updates:
            optimizer = keep_states(
                optimizer,
                self.held.module,
                self.plan.memory,
                self._parameters,
                seed=self.seed,
                step=lambda: self.step,
                sizes=self.held.sizes,
                holders=sharded_states.holders(self.plan),
                **self._keeping(),
            )
        self._optimizer = optimizer
        return optimizer

    def prepare_memory(
        self, data: Any, batch: int, loss: BatchLoss, *, saves: bool = False, within: Within = nullcontext
    ) -> None:
        """Choose how activations are kept, so that steps stay below the plan's memory.peak_bytes, before the first one.

        Called by every worker, after `model` and `optimizer`, and needed under a budget only; otherwise what an error
        for memory that ran out will say is better for it. ``data`` and ``batch`` are those of `steps`; ``loss`` gives
        the sum of a micro-batch's losses, as in a step. ``saves``: rank 0 will write checkpoints. Weights, buffers and
        random streams are left as they are. The passes of a pipeline are made of the recipe's task, ``within`` what the
        caller has around them (autocast). Raises UserError when the budget cannot be kept."""
        source: Source = data if hasattr(data, "fetch") else DatasetSource(data)
        assert self._reduction is not None
        assert self._optimizer is not None
        ledger = Ledger(len(source), batch, self._shard_count, self.micro_batches, self.seed)
        make = partial(Work.of, steps_ahead=self.plan.prefetch, saves=saves and self.rank == 0, within=within)
        self.memory.prepare(make(self._reduction, self._optimizer, source, ledger, self.shards, loss))

    def keep(self, **objects: Any) -> None:
        """Objects with state_dict and load_state_dict (a scheduler, say) that checkpoints hold too: plain values."""
        self._kept.update(objects)

    # --- steps ------------------------------------------------------------------------------------------------

    def open_ledger(self, source: Source, batch: int) -> Ledger:
        """Which samples each step has. Raises UserError when the checkpoint that was loaded has other arithmetic."""
        ledger = Ledger(len(source), batch, self._shard_count, self.micro_batches, self.seed, self.batches)
        if self._resumed is not None:
            check_same(self._resumed.facts["arithmetic"], arithmetic_of(ledger, self.clip, source.fingerprint))
            self._resumed = None
        self._fingerprint = source.fingerprint
        return ledger

    def steps(self, data: Any, *, batch: int = 0, epochs: int = 0, steps: int = 0) -> Iterator["Step"]:
        """Every step that is still to be done, as this worker sees it: epochs or steps in all, from where it stands.

        ``data`` is a Source or any map-style data set; ``batch`` the samples of a step over all workers."""
        source: Source = data if hasattr(data, "fetch") else DatasetSource(data)
        if not batch:
            raise UserError("worker.steps needs batch: the samples of one step, over all workers.")
        if bool(epochs) == bool(steps):
            raise UserError("worker.steps needs either epochs or steps.")
        reduction = self._reduction
        if reduction is None or self._optimizer is None:
            raise UserError("call worker.model(module) and worker.optimizer(...) before the first step.")
        self.ledger = ledger = self.open_ledger(source, batch)
        if self._update is None:
            self._update = update_of(self.held, reduction.sets, self._optimizer)
            self._update.publishes_later = self.publishes_later
        if self.held.experts is not None:
            fetched = source.fetch(ledger.ids(0)[:1], 0)
            self.nothing = {name: tensor[:0].to(self.device) for name, tensor in fetched.items()}
        update = self._update
        update.begin(ledger)
        while (last := steps or self.ledger.steps_in(epochs)) > self.step and not self.stopping:
            yield from self._stretch(source, reduction, update, last)
        if self.plan.shards_states:
            update.settle(self.step)  # whoever reads the weights now finds them whole

    def _stretch(self, source: Source, reduction: Reduction, update: Update, last: int) -> Iterator["Step"]:
        """Steps of one batch, to ``last`` at most: when it changes, what has been loaded ahead is no good."""
        ledger = self.ledger
        assert ledger is not None
        ahead, threads = self.plan.prefetch * len(self._usual_shards) * self.micro_batches, self.plan.loaders
        with Prefetcher(source, self._work(ledger, self.step, last, self.shards), ahead, threads) as batches:
            while self.step < last and not self.stopping and self.ledger is ledger:
                self.memory.begins(update)
                step = Step(self, reduction, update, ledger, self.step, batches, self._committed)
                yield step
                if not step.committed:
                    raise UserError(f"step {step.number} was left without commit(): call step.commit() at its end.")

    def rebatch(self, batch: int) -> None:
        """From the next step on, steps have ``batch`` samples over all workers. Called by each, between two `steps`.

        The order of samples stays; learning rates are the caller's. Raises UserError for one that cannot be dealt."""
        if self.ledger is None or self.plan.sync not in ("exact", "fast") or self.plan.splits_model:
            raise UserError("worker.rebatch is for between two steps of plans with whole models, sync exact or fast.")
        if batch != self.ledger.batch_of(self.step):
            self.ledger = self.ledger.changed(self.step, batch)
            self.batches = self.ledger.changes

    def _committed(self, figures: StepFigures) -> None:
        self.step += 1
        self.retry.end()
        assert self._update is not None
        self.stopping |= self._update.stops(self.step, figures)
        self.memory.ended(self.step)

    def settle(self) -> None:
        """Make weights and buffers equal on all workers, in schemes where they may differ between steps.

        Called by every worker, after the same step; saving and comparing do it themselves."""
        if self._update is not None:
            self._update.settle(self.step)

    def told(self) -> list[Told]:
        """On rank 0: the steps that all workers have done since the last call, with their figures over all of them."""
        return self._update.told() if self._update is not None else []

    def _work(self, ledger: Ledger, first: int, last: int, shards: Sequence[int]) -> Iterator[tuple[Place, Any, int]]:
        """``shards``: of the first step."""
        pipeline = self.held.pipeline
        if pipeline is not None and not pipeline.readers:
            return  # other stages read the batches
        for step in range(first, last):
            epoch, _ = ledger.position(step)
            for shard in shards if step == first else self._usual_shards:
                for micro, ids in enumerate(ledger.shard(step, shard)):
                    yield (step, shard, micro), ids, epoch

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Add up figures over all workers, in rank order, in float64."""
        rows = [json.loads(row) for row in self.group.gather(json.dumps(dict(values)).encode())]
        names = sorted({name for row in rows for name in row})
        return {name: math.fsum(row.get(name, 0.0) for row in rows) for name in names}

    def compare_parameters(self) -> None:
        """Called by every worker. Raises RunFailed naming the ranks whose parameters are not those of the most."""
        self.settle()
        compare_held(self.group, self.held, f"after step {self.step}")

    @property
    def transport(self) -> dict[str, Any]:
        """What carries the gradients: see the event `started`."""
        if self._reduction is None:
            return {}
        servers = {"servers": self.plan.servers} if self.plan.sync == "parameter-server" else {}
        return {**transport(self._reduction.first.exchange.account), **servers}

    def communication(self) -> dict[str, Any] | None:
        """On rank 0, after a step: now and then, what all workers' transports have counted since the last answer."""
        return self._reduction.communication() if self._reduction is not None else None

    # --- checkpoints ------------------------------------------------------------------------------------------

    @property
    def held(self) -> Held:
        """What this worker holds of the model."""
        if self._held is None:
            raise UserError("call worker.model(module) first.")
        return self._held

    @property
    def _contents(self) -> Contents:
        if self._update is not None:
            self._update.check_readable()
        if self._made_contents is None:
            self._made_contents = Contents(self.held, self.device)
        return self._made_contents

    @property
    def weights_sha256(self) -> str:
        """Of the whole model. Where a plan splits it, all workers ask for it together."""
        return self._contents.sha256()

    def weights(self) -> dict[str, Tensor]:
        """The whole model's parameters and persistent buffers, by name, on every worker.

        Where a plan splits the model: on rank 0, {} elsewhere, and all workers call it together."""
        return self._contents.weights()

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, by name; where from, see `weights`."""
        return self._contents.tensors(self._optimizer)

    def facts(self) -> dict[str, Any]:
        """Beside the tensors; where a plan splits the model, all workers ask for it together."""
        epoch, index = self.ledger.position(self.step) if self.ledger else (0, 0)
        return {
            "step": self.step,
            "epoch": epoch,
            "index": index,
            "arithmetic": arithmetic_of(self.ledger, self.clip, self._fingerprint) if self.ledger else {},
            **({"batches": [list(change) for change in self.batches]} if self.batches else {}),
            "optimizer": self._contents.facts(self._optimizer),
            "kept": {name: thing.state_dict() for name, thing in self._kept.items()},
            "torch": torch.__version__,
            "workers": self.world,
        }

    def prepare_to_save(self, folder: str | Path, *, keep: int = 3) -> None:
        """Reserve the memory of checkpoints now, so that the first one holds training up no longer than the others.

        Called by every worker. ``keep``: how many of the newest stay in ``folder``, beside the best; 0: all."""
        place = Path(folder).absolute()
        if place in self._prepared:
            return
        self._prepared.add(place)
        self._fetch()
        if self.rank == 0 and place not in self._writers:
            self._writers[place] = BackgroundWriter(place, {} if self.plan.splits_model else self.tensors(), keep=keep)

    def _fetch(self) -> None:
        if self._update is not None:
            self._update.fetch()

    def save(self, folder: str | Path, *, best: bool = False, final: bool = False, **facts: Any) -> float:
        """Checkpoint the run as it stands into ``folder``, behind the training; the seconds that this worker waited.

        Called by every worker; rank 0 holds all and writes. ``written`` tells what became of it."""
        self.settle()
        waited = 0.0
        self.group.report(Phase.saving, step=self.step)
        self.prepare_to_save(folder)
        self._fetch()
        unsent = self.unsent.gather(self.group, self.plan, self._reduction)
        if self.rank == 0 or self.plan.splits_model:
            state, told = self.tensors(), {**self.facts(), **facts}
        if self.rank == 0:
            waited = self._writers[Path(folder).absolute()].submit(state | unsent, told, best, final)
        if self._update is not None and not self._update.equal:
            self.group.gather(b"")  # the servers' state is that of this step until it has been fetched
        return waited

    def written(self) -> list[Written]:
        """What has come of checkpoints since the last call; empty on all workers but rank 0."""
        return [written for writer in self._writers.values() for written in writer.poll()]

    def resume(self, folder: str | Path) -> checkpoint.Checkpoint | None:
        """Go on from the newest whole checkpoint in ``folder``, if there is one; damaged ones are passed over.

        Called by every worker, after `model` and `optimizer`; raises RunFailed when workers see different ones."""
        found, self.resumed_from, self.skipped = agreed_newest(Path(folder), self.group)
        if found is not None:
            self.restore(found)
        return found

    def restore(self, state: checkpoint.Checkpoint) -> None:
        """Take over a checkpoint's weights, optimiser, kept objects and position."""
        for line in self._contents.load(state.tensors, state.facts.get("optimizer"), self._optimizer):
            self._say_once(line)
        self.unsent.restore(self.group, self.plan, self._reduction, state.tensors)
        for name, thing in self._kept.items():
            if name in state.facts["kept"]:
                thing.load_state_dict(state.facts["kept"][name])
        self.step = state.step
        self.batches = tuple((done, batch) for done, batch in state.facts.get("batches", ()))
        self._resumed = state

    def close(self) -> None:
        """Wait for checkpoints that are still being written, and leave the servers."""
        for writer in self._writers.values():
            writer.close()
        if self._update is not None:
            self._update.close()
