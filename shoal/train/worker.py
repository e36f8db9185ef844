"""The Worker: the whole machinery for somebody's own training loop, and for ours.

def main(worker):
    model = worker.model(Net())
    optimizer = worker.optimizer(torch.optim.AdamW(model.parameters(), lr=1e-3))
    for step in worker.steps(dataset, batch=64, epochs=3):
        for batch in step:
            loss = F.cross_entropy(model(batch["input"]), batch["target"], reduction="sum")
            step.backward(loss, count=len(batch["target"]))
        step.commit()

shoal.launch(main, workers=2)
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from shoal.comm.exchange import Placement
from shoal.comm.group import Group
from shoal.comm.status import Phase
from shoal.comm.transport import make_exchange
from shoal.data.dataset import DatasetSource
from shoal.data.ledger import Ledger
from shoal.data.loading import Prefetcher
from shoal.data.source import Batch, Source
from shoal.errors import RunFailed, UserError
from shoal.recipe.plan import Plan
from shoal.train import checkpoint
from shoal.train.gradients import Gradients, StepFigures, writes_gradients
from shoal.train.snapshot import BackgroundWriter, Written
from shoal.train.state import load_model, load_optimizer, model_tensors, optimizer_facts, optimizer_tensors
from shoal.train.streams import enter_stream
from shoal.train.weights import weights_sha256

COMPARE_EVERY = 50  # steps between two comparisons of all workers' parameters
Place = tuple[int, int, int]  # step, shard, micro-batch


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
    ) -> None:
        self.group, self.plan = group, plan
        self.rank, self.world = group.rank, group.world
        self.micro_batches, self.seed, self.clip = micro_batches, seed, clip
        self._ownership = plan.owned(shards)
        self._shard_count = shards
        self.device = _device(plan.device, group.rank)
        self.step = 0  # committed so far
        self.stopping = False  # the run was asked to stop; no further step is yielded
        self.ledger: Ledger | None = None
        self._fingerprint = ""
        self._module: nn.Module | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._kept: dict[str, Any] = {}
        self._gradients: Gradients | None = None
        self._writers: dict[Path, BackgroundWriter] = {}
        self._resumed: checkpoint.Checkpoint | None = None
        torch.manual_seed(seed)

    @property
    def shards(self) -> range:
        """The shards that this worker owns."""
        return self._ownership[self.rank]

    # --- what is trained --------------------------------------------------------------------------------------

    def model(self, module: nn.Module, *, compile: bool = False) -> nn.Module:
        """Move the module to this worker's device, give every worker rank 0's weights, and hook its gradients.

        With ``compile`` the returned module runs through torch.compile; its parameters are the same."""
        self.group.report(Phase.building)
        if self._module is not None:
            raise UserError("worker.model was called twice: wrap several modules in one nn.ModuleDict.")
        self._module = module.to(self.device)
        self._share_weights(module)
        placement = Placement(self._ownership, self.rank, fast=self.plan.sync == "fast")
        most = tuple(self.micro_batches for _ in range(self._shard_count))
        self._gradients = Gradients(
            module,
            placement,
            self._shard_count,
            self.plan.bucket_bytes,
            lambda *a: make_exchange(self.group, placement, most, self.device, *a),
            self.group.report,
        )
        called: Any = torch.compile(module) if compile else module
        return cast(nn.Module, called)

    def _share_weights(self, module: nn.Module) -> None:
        """Rank 0's weights for all: a factory that draws from elsewhere than the seed would differ by worker."""
        tensors = model_tensors(module)
        digest = weights_sha256(tensors).encode()
        digests = self.group.gather(digest)
        if all(other == digests[0] for other in digests):
            return
        with torch.no_grad():
            for _, tensor in sorted(tensors.items()):
                raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8) if tensor.numel() else None
                sent = bytes(raw.numpy()) if self.rank == 0 and raw is not None else b""
                first = self.group.gather(sent)[0]
                if first:
                    flat = torch.frombuffer(bytearray(first), dtype=tensor.dtype)
                    tensor.copy_(flat.view(tensor.shape))

    def optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimiser that ``step.commit`` runs. LBFGS is refused: its step would need the loss again."""
        if isinstance(optimizer, torch.optim.LBFGS):
            raise UserError("LBFGS evaluates the loss again inside its step, which a distributed step cannot do.")
        self._optimizer = optimizer
        return optimizer

    def keep(self, **objects: Any) -> None:
        """Objects with state_dict and load_state_dict (a scheduler, say) that checkpoints hold too: plain values."""
        self._kept.update(objects)

    # --- steps ------------------------------------------------------------------------------------------------

    def steps(self, data: Any, *, batch: int = 0, epochs: int = 0, steps: int = 0) -> Iterator["Step"]:
        """Every step that is still to be done, as this worker sees it: epochs or steps in all, from where it stands.

        ``data`` is a Source or any map-style data set; ``batch`` the samples of a step over all workers."""
        source: Source = data if hasattr(data, "fetch") else DatasetSource(data)
        if not batch:
            raise UserError("worker.steps needs batch: the samples of one step, over all workers.")
        if bool(epochs) == bool(steps):
            raise UserError("worker.steps needs either epochs or steps.")
        if batch % (self._shard_count * self.micro_batches):
            raise UserError(
                f"batch {batch} is not divisible by {self._shard_count} shards x {self.micro_batches} micro-batches."
            )
        if len(source) == 0:
            raise UserError("the training data holds no sample.")
        self.ledger = ledger = Ledger(len(source), batch, self._shard_count, self.micro_batches, self.seed)
        self._fingerprint = source.fingerprint
        self._check_resumed()
        last = steps or epochs * ledger.steps_per_epoch
        ahead, threads = self.plan.prefetch, self.plan.loaders
        with Prefetcher(source, self._work(ledger, self.step, last), ahead, threads) as batches:
            while self.step < last and not self.stopping:
                step = Step(self, ledger, self.step, batches)
                yield step
                if not step.committed:
                    raise UserError(f"step {self.step + 1} was left without commit(): call step.commit() at its end.")

    def _work(self, ledger: Ledger, first: int, last: int) -> Iterator[tuple[Place, Any, int]]:
        for step in range(first, last):
            epoch, _ = ledger.position(step)
            for shard in self.shards:
                for micro, ids in enumerate(ledger.shard(step, shard)):
                    yield (step, shard, micro), ids, epoch

    def _check_resumed(self) -> None:
        if self._resumed is None:
            return
        facts = self._resumed.facts
        assert self.ledger is not None
        for name, now in self._arithmetic().items():
            if facts["arithmetic"].get(name) != now:
                raise UserError(
                    f"the checkpoint was made with {name} = {facts['arithmetic'].get(name)!r}, this run has {now!r}: "
                    f"going on would not give the same bits."
                )
        self._resumed = None

    def _arithmetic(self) -> dict[str, Any]:
        assert self.ledger is not None
        return {
            "shards": self._shard_count,
            "micro_batches": self.micro_batches,
            "seed": self.seed,
            "clip": self.clip,
            "batch": self.ledger.batch,
            "samples": self.ledger.samples,
            "data": self._fingerprint,
        }

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Add up figures over all workers, in rank order, in float64."""
        rows = [json.loads(row) for row in self.group.gather(json.dumps(dict(values)).encode())]
        names = sorted({name for row in rows for name in row})
        return {name: math.fsum(row.get(name, 0.0) for row in rows) for name in names}

    # --- checkpoints ------------------------------------------------------------------------------------------

    @property
    def weights_sha256(self) -> str:
        return weights_sha256(model_tensors(self._trained()))

    def _trained(self) -> nn.Module:
        if self._module is None:
            raise UserError("call worker.model(module) first.")
        return self._module

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, by name."""
        model = self._trained()
        state = {f"model/{name}": tensor for name, tensor in model_tensors(model).items()}
        if self._optimizer:
            state |= {f"optimizer/{n}": t for n, t in optimizer_tensors(model, self._optimizer).items()}
        return state

    def facts(self) -> dict[str, Any]:
        epoch, index = self.ledger.position(self.step) if self.ledger else (0, 0)
        return {
            "step": self.step,
            "epoch": epoch,
            "index": index,
            "arithmetic": self._arithmetic() if self.ledger else {},
            "optimizer": optimizer_facts(self._trained(), self._optimizer) if self._optimizer else None,
            "kept": {name: thing.state_dict() for name, thing in self._kept.items()},
            "torch": torch.__version__,
            "workers": self.world,
        }

    def prepare_to_save(self, folder: str | Path, *, keep: int = 3) -> None:
        """Reserve the memory of checkpoints now, so that the first one holds training up no longer than the others.

        ``keep``: how many of the newest stay in ``folder``, beside the best; 0: all."""
        place = Path(folder).absolute()
        if self.rank == 0 and place not in self._writers:
            self._writers[place] = BackgroundWriter(place, self.tensors(), keep=keep)

    def save(self, folder: str | Path, *, best: bool = False, final: bool = False, **facts: Any) -> float:
        """Checkpoint the run as it stands into ``folder``, behind the training; the seconds that this worker waited.

        Called by every worker; rank 0 holds all and writes. ``written`` tells what became of it."""
        if self.rank:
            return 0.0
        self.group.report(Phase.saving, step=self.step)
        self.prepare_to_save(folder)
        return self._writers[Path(folder).absolute()].submit(self.tensors(), {**self.facts(), **facts}, best, final)

    def written(self) -> list[Written]:
        """What has come of checkpoints since the last call; empty on all workers but rank 0."""
        return [written for writer in self._writers.values() for written in writer.poll()]

    def resume(self, folder: str | Path) -> checkpoint.Checkpoint | None:
        """Go on from the newest whole checkpoint in ``folder``, if there is one; damaged ones are passed over.

        Called by every worker, after `model` and `optimizer`; raises RunFailed when workers see different ones."""
        found, path, skipped = checkpoint.newest(Path(folder))
        self.skipped = skipped
        seen = self.group.gather(json.dumps(found.facts if found else None, sort_keys=True, default=str).encode())
        if any(other != seen[0] for other in seen):
            steps = ", ".join(f"rank {r}: {(json.loads(s) or {}).get('step', 'none')}" for r, s in enumerate(seen))
            raise RunFailed(
                f"the workers see different checkpoints in {str(folder)!r} ({steps}): is it a shared folder?"
            )
        if found is None:
            return None
        self.restore(found)
        self.resumed_from = path
        return found

    def restore(self, state: checkpoint.Checkpoint) -> None:
        """Take over a checkpoint's weights, optimiser, kept objects and position."""
        model = self._trained()
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
        for name, tensor in state.tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = tensor
        load_model(model, parts["model"])
        if self._optimizer and state.facts.get("optimizer"):
            load_optimizer(model, self._optimizer, parts["optimizer"], state.facts["optimizer"])
        for name, thing in self._kept.items():
            if name in state.facts["kept"]:
                thing.load_state_dict(state.facts["kept"][name])
        self.step = state.step
        self._resumed = state

    def close(self) -> None:
        """Wait for checkpoints that are still being written."""
        for writer in self._writers.values():
            writer.close()

    # --- used by Step -----------------------------------------------------------------------------------------

    def _begin(self, passes: tuple[int, ...]) -> Gradients:
        if self._gradients is None:
            raise UserError("call worker.model(module) before the first step.")
        checksum = parameter_checksum(self._trained()) if self.step % COMPARE_EVERY == 0 else 0.0
        self._gradients.begin(passes, stop=self.group.stop_asked, checksum=checksum)
        return self._gradients

    def _update(self) -> None:
        if self._optimizer is None:
            raise UserError("call worker.optimizer(...) before the first step.")
        self._optimizer.step()


class Step:
    """One step of the run: iterate its micro-batches, call backward once for each, then commit."""

    def __init__(self, worker: Worker, ledger: Ledger, number: int, batches: Prefetcher[Place]) -> None:
        self.number = number + 1  # as committed: the first step is 1
        self.epoch, self.index = ledger.position(number)
        self.committed = False
        self.samples = int(sum(ledger.counts(number)))
        self.last_of_epoch = self.index == ledger.steps_per_epoch - 1
        self.parts = dict.fromkeys(("data", "forward", "backward", "exchange", "update"), 0.0)
        self.figures: StepFigures | None = None
        self._worker, self._ledger, self._zero_based, self._batches = worker, ledger, number, batches
        self._report = worker.group.report
        self._report(Phase.loading, step=self.number)
        self._passes = passes_of(ledger, number)
        self._gradients = worker._begin(self._passes)
        self._place: Place | None = None
        self._mark = time.perf_counter()

    def __iter__(self) -> Iterator[Batch]:
        mine = sum(self._passes[shard] for shard in self._worker.shards)
        for _ in range(mine):
            self._report(Phase.loading)
            self._lap("data")
            self._place, batch = next(self._batches)
            if self._worker.device.type != "cpu":
                batch = {k: v.to(self._worker.device, non_blocking=True) for k, v in batch.items()}
            self._lap("data")
            _, shard, micro = self._place
            enter_stream(self._worker.seed, self._zero_based, shard, micro)
            self._gradients.enter_leaf(shard)
            self._report(Phase.forward, shard=shard)
            yield batch
            if self._place is not None:
                raise UserError(
                    f"step {self.number}: a micro-batch of shard {shard} went by without step.backward(loss)."
                )
        self._lap("backward")

    @property
    def shard(self) -> int:
        """The shard of the current micro-batch."""
        if self._place is None:
            raise UserError("there is no current micro-batch: iterate the step first.")
        return self._place[1]

    def backward(self, loss: Tensor, count: float) -> None:
        """Back-propagate a micro-batch's ``loss``, the SUM over its ``count`` samples or target tokens.

        The mean is taken over the whole step: that is what makes the result independent of the split.
        Raises RunFailed naming shard and sample ids when the loss is not finite."""
        if self._place is None:
            raise UserError("step.backward was called twice for one micro-batch, or outside of the step's iteration.")
        _, shard, micro = self._place
        value = float(loss.detach())
        if not math.isfinite(value):
            ids = self._ledger.shard(self._zero_based, shard)[micro].tolist()
            shown = ", ".join(map(str, ids[:32])) + (f", ... ({len(ids)} in all)" if len(ids) > 32 else "")
            raise RunFailed(f"loss is {value} at step {self.number}, shard {shard}, sample ids {shown}")
        self._lap("forward")
        self._report(Phase.backward, shard=shard)
        self._place = None
        ends = micro == self._passes[shard] - 1
        self._gradients.backward(shard, loss, value, float(count), leaf_ends=ends, waited_s=self.parts["data"])
        self._lap("backward")

    def commit(self) -> StepFigures:
        """Wait for the global mean gradient, clip it, update the weights: the step has then happened on all workers."""
        worker = self._worker
        self._report(Phase.exchanging)
        self._lap("backward")
        optimizer = worker._optimizer
        trusted = optimizer is not None and not writes_gradients(optimizer)
        self.figures = figures = self._gradients.finish(worker.clip, keep_gradients=trusted)
        self._lap("exchange")
        self._check(figures)
        self._report(Phase.updating)
        worker._update()
        worker.step = self.number
        worker.stopping |= figures.stop
        self.committed = True
        self._lap("update")
        return figures

    def _check(self, figures: StepFigures) -> None:
        if not math.isfinite(figures.norm):
            raise RunFailed(
                f"the gradient is not finite at step {self.number} although the loss is ({figures.loss:.6g}): "
                f"{self._gradients.first_not_finite()}"
            )
        sums = figures.checksums
        if len(set(sums)) > 1:
            usual = max(set(sums), key=sums.count)
            odd = [rank for rank, value in enumerate(sums) if value != usual]
            raise RunFailed(
                f"the workers' parameters differ before step {self.number}: rank {', '.join(map(str, odd))} "
                f"disagree{'s' if len(odd) == 1 else ''} with the others "
                f"(checksums {', '.join(f'{s:.0f}' for s in sums)})"
            )

    def _lap(self, part: str) -> None:
        now = time.perf_counter()
        self.parts[part] += now - self._mark
        self._mark = now


def passes_of(ledger: Ledger, step: int) -> tuple[int, ...]:
    """How many backward passes each shard has at a step."""
    return tuple(len(ledger.shard(step, shard)) for shard in range(ledger.shards))


@torch.no_grad()
def parameter_checksum(module: nn.Module) -> float:
    """A sum of the parameters' bits, exact in float64: equal on workers whose parameters are equal."""
    total = 0
    for parameter in module.parameters():
        flat = parameter.detach().reshape(-1).contiguous()
        words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
        total += int(flat.view(words).sum(dtype=torch.int64))
    return float(total % (1 << 52))


def _device(name: str, rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if name != "cuda":
        raise UserError(f"plan: device {name!r} is not known: use auto, cpu or cuda.")
    if not torch.cuda.is_available():
        raise UserError("plan: device 'cuda' is asked for, but this torch finds no CUDA device.")
    local = rank
    with suppress(KeyError):
        local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
