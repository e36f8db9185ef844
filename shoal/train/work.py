"""What a worker does in a step, as far as memory is concerned, and what of it needs how many bytes."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from shoal.comm.exchange import HeapExchange
from shoal.comm.group import HostGroup
from shoal.data.ledger import Ledger
from shoal.data.source import Batch, Source
from shoal.memory.budget import Need, weight_bytes
from shoal.memory.optimizer_need import optimizer_need
from shoal.memory.streamed import Streamed
from shoal.parallel.held import Held
from shoal.train.gradients import Gradients
from shoal.train.reduction import Reduction
from shoal.train.rehearsed_stages import Within, smaller_help
from shoal.train.sliced_need import sliced
from shoal.train.streams import enter_stream

BatchLoss = Callable[[Batch], Tensor]  # the sum of a micro-batch's losses
SLACK_BYTES = 256 << 10  # counters, losses, rows of facts: what nobody counts one by one


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a worker does in a step, as far as memory is concerned."""

    held: Held
    sets: Sequence[Gradients]  # of `held.shares`
    optimizer: torch.optim.Optimizer
    fetch: Callable[[], Batch]  # a micro-batch of the usual size
    loss: BatchLoss
    own_shards: int
    micro_batches: int
    samples: int  # of a shard in a step
    steps_ahead: int  # whose batches may be ready
    saves: bool  # it writes checkpoints
    passes: int = 1  # of a step, through a pipeline: this replica's
    begin_stream: Callable[[], None] = lambda: None  # of a pipeline's rehearsed micro-batches
    within: Within = nullcontext  # what a pipeline's passes run in

    @classmethod
    def of(
        cls,
        reduction: Reduction,
        optimizer: torch.optim.Optimizer,
        source: Source,
        ledger: Ledger,
        shards: Sequence[int],
        loss: BatchLoss,
        *,
        steps_ahead: int,
        saves: bool,
        within: Within,
    ) -> Self:
        """Of the worker whose ``shards`` these are."""
        passes = ledger.passes(0)
        own = sum(passes[shard] for shard in shards)
        return cls(
            held=reduction.held,
            sets=reduction.sets,
            optimizer=optimizer,
            fetch=lambda: source.fetch(ledger.shard(0, 0)[0], 0),
            loss=loss,
            own_shards=len(shards),
            micro_batches=ledger.micro_batches,
            samples=ledger.batch // ledger.shards,
            steps_ahead=steps_ahead,
            saves=saves,
            passes=own + reduction.others_passes(passes, own),
            begin_stream=lambda: enter_stream(ledger.seed, 0, shards[0], 0),
            within=within,
        )

    @property
    def module(self) -> nn.Module:
        return self.held.module

    @property
    def split(self) -> bool:
        """Several workers make a pass together: none can make one alone."""
        return self.held.plan.splits_model

    @property
    def together(self) -> bool:
        """As `split`, or parameters come from other workers in the middle of a pass."""
        return self.split or (self.held.plan.shards_states and not isinstance(self.held.group, HostGroup))

    @property
    def counts(self) -> tuple[int, ...]:
        """Of micro-batches of a shard: how many there are, and what larger numbers there could be to use less."""
        help_ = smaller_help(self.held, self.passes)
        return tuple(number for number in range(self.micro_batches, self.samples + 1)
                     if number % self.micro_batches == 0 and self.samples % number == 0
                     and (help_ or number == self.micro_batches))  # fmt: skip

    def batch(self, device: torch.device) -> Batch:
        return {name: tensor.to(device) for name, tensor in self.fetch().items()}

    def need(self, batch: Batch, device: torch.device) -> Need:
        """All but activations."""
        pieces = 0
        if isinstance(self.optimizer, Streamed):
            states, update, pieces = self.optimizer.resident_bytes(), 0, self.optimizer.scratch_bytes()
        else:
            states, update = optimizer_need(self.optimizer)
        weights, ready = weight_bytes(self.module), self.steps_ahead * self.own_shards * self.micro_batches + 2
        whole = self._whole(weights + states)
        if self.held.plan.shards_states:
            own = sliced(self.held, self.sets)
            weights += own.weights - sum(parameter.nbytes for parameter in self.module.parameters())
            if not isinstance(self.held.group, HostGroup):
                whole += self._whole(states)  # brought together, until the next update
            states, update = round(states * own.part), round(update * own.part)
        pipeline = self.held.pipeline
        if pipeline is not None:
            stages = pipeline.stages.values()
            weights += sum(copy.nbytes for stage in stages for copy in stage.copies.values())
            shared = [dict(stage.chunk.module.named_parameters())[name]
                      for number, stage in pipeline.stages.items()
                      for name, users in pipeline.ties.users.items() if users[0] == number]  # fmt: skip
            update = max(update, sum(each.nbytes for each in shared))  # handed on after the update, as copies
            ready = ready + self.passes if pipeline.readers else 1  # several chunks may read one: it waits for them
        return Need(
            weights=weights + sum(buffer.nbytes for buffer in self.module.buffers()),  # and those of the step's begin
            gradients=self.sums + sum(map(_beside, self.sets)),
            optimizer=states + pieces,
            checkpoint=whole if self.saves and device.type == "cpu" else 0,
            data=sum(tensor.nbytes for tensor in batch.values()) * ready + SLACK_BYTES,
            update=update,
        )

    @property
    def sums(self) -> int:
        """Bytes of partial sums of gradients."""
        return sum(each.sums_bytes((self.micro_batches,) * each.leaves) for each in self.sets)

    def _whole(self, own: int) -> int:
        """Of bytes that go with this worker's parameters, those of the whole model, of which a checkpoint is a copy."""
        here = sum(parameter.numel() for parameter in self.module.parameters())
        return own * self.held.elements // max(1, here) if self.split else own


def _beside(gradients: Gradients) -> int:
    """Bytes that an exchange holds beside sums where workers share no memory."""
    if isinstance(gradients.exchange, HeapExchange):
        return 0
    from shoal.comm.distributed import DistributedExchange

    return gradients.exchange.beside_bytes if isinstance(gradients.exchange, DistributedExchange) else 0
