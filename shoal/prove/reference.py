"""The reference: the exactness contract as a plain loop of one process, with lists of tensors and nothing shared.

It takes no line from the machinery that it judges (shoal.comm, and gradients and worker of shoal.train).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from shoal.data.ledger import Ledger
from shoal.data.source import Source
from shoal.errors import RunFailed
from shoal.models.task import Task
from shoal.prove.fingerprint import along
from shoal.recipe.recipe import Recipe
from shoal.train.precision import autocast
from shoal.train.schedules import learning_rate
from shoal.train.streams import stream_seed

Sum = list[Tensor]
ALIGNMENT, BLOCK, LANES = 16, 32768, 2048  # elements; the contract's own numbers, written out again on purpose


@dataclass(frozen=True)
class PlainStep:
    number: int  # from 1
    losses: tuple[float, ...]  # summed over each shard; 0.0 for one without samples
    shares: tuple[tuple[float, ...], ...]  # of each trained parameter: what each shard adds to its gradient, `along`


@dataclass
class _Leaves:
    """What the shards of a step add up to beside their gradients."""

    losses: list[float]
    counts: list[float]
    used: list[bool]  # by trained parameter: some pass had a gradient for it
    shares: list[list[float]]  # by trained parameter, of each shard: of its sum
    factor: float = 1.0  # from sums to what the optimiser gets
    present: int = 0


class PlainLoop:
    """Trains ``module`` for ``recipe.steps`` steps on the CPU, as the contract says, one shard after the other.

    After each step the parameters hold the mean gradient, clipped. ``recipe.precision`` must be settled."""

    def __init__(
        self, recipe: Recipe, source: Source, module: nn.Module, task: Task, optimizer: torch.optim.Optimizer
    ) -> None:
        self._recipe, self._source, self._task, self._optimizer = recipe, source, task, optimizer
        self._model = cast(nn.Module, torch.compile(module)) if recipe.model.compile else module
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.names = list(named)  # of the trained parameters, in their order
        self._trained = list(named.values())
        self.uses: tuple[int, ...] = ()  # after a step: in how many places its last pass used each of them
        self._buffers = [b for b in module.buffers() if b.numel()]
        wide = any(p.dtype == torch.float64 for p in self._trained)
        self._dtype = torch.float64 if wide else torch.float32
        self._ledger = Ledger(len(source), recipe.batch, recipe.shards, recipe.micro_batches, recipe.seed)

    def steps(self) -> Iterator[PlainStep]:
        for step in range(self._recipe.steps):
            yield self._step(step)

    def _step(self, step: int) -> PlainStep:
        recipe = self._recipe
        shards = range(recipe.shards)
        leaves = _Leaves(
            [0.0 for _ in shards],
            [0.0 for _ in shards],
            [False for _ in self._trained],
            [[0.0 for _ in shards] for _ in self._trained],
        )
        begun = [b.clone() for b in self._buffers]

        def leaf(shard: int) -> Sum | None:
            self._restore(begun)
            return self._shard(step, shard, begun, leaves)

        total = tree_sum(shards, leaf)
        assert total is not None  # a step has samples
        self._restore(begun)
        with torch.no_grad():
            self._hang(total[: len(self._trained)], leaves, step)
            for buffer, change in zip(self._buffers, total[len(self._trained) :], strict=True):
                mean = change / leaves.present
                if buffer.dtype == torch.bool:
                    buffer.logical_xor_(mean > 0)
                else:
                    buffer.add_(mean.to(buffer.dtype))
        rate = learning_rate(recipe, step + 1, recipe.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        shares = tuple(tuple(share * leaves.factor for share in each) for each in leaves.shares)
        return PlainStep(step + 1, tuple(leaves.losses), shares)

    def _restore(self, begun: Sum) -> None:
        with torch.no_grad():
            for buffer, value in zip(self._buffers, begun, strict=True):
                buffer.copy_(value)

    def _shard(self, step: int, shard: int, begun: Sum, leaves: _Leaves) -> Sum | None:
        """The shard's gradients, its micro-batches added in order, then what it changed in the buffers."""
        recipe = self._recipe
        epoch, _ = self._ledger.position(step)
        total: Sum = []
        for micro, ids in enumerate(self._ledger.shard(step, shard)):
            batch = self._source.fetch(ids, epoch)
            torch.manual_seed(stream_seed(recipe.seed, step, shard, micro))
            for parameter in self._trained:
                parameter.grad = None
            with autocast(recipe.precision, torch.device("cpu")):
                loss, count = self._task.loss(self._model, batch)
            if not self.uses:
                self.uses = uses_of(self._trained, loss)
            loss.backward()  # type: ignore[no-untyped-call]
            leaves.losses[shard] += float(loss.detach())
            leaves.counts[shard] += float(count)
            gradients = [self._gradient(parameter) for parameter in self._trained]
            for index, parameter in enumerate(self._trained):
                leaves.used[index] |= parameter.grad is not None
            total = [a + b for a, b in zip(total, gradients, strict=True)] if micro else gradients
        if not total:
            return None
        leaves.present += 1
        for shares, gradient in zip(leaves.shares, total, strict=True):
            shares[shard] = along(gradient)
        return total + [
            (begun_value ^ b if b.dtype == torch.bool else b - begun_value).to(self._dtype)
            for b, begun_value in zip(self._buffers, begun, strict=True)
        ]

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        """Zero where the pass did not use the parameter."""
        if parameter.grad is None:
            return torch.zeros_like(parameter, dtype=self._dtype)
        return parameter.grad.to(self._dtype)

    def _hang(self, total: Sum, leaves: _Leaves, step: int) -> None:
        """Give every parameter its mean gradient over the step's targets, clipped to the global norm."""
        targets = max(math.fsum(leaves.counts), 1.0)
        leaves.factor = 1 / targets
        mean = [gradient / targets for gradient in total]
        norm = block_norm(mean[::-1])
        if not math.isfinite(norm):
            raise RunFailed(f"the reference's gradient is not finite at step {step + 1}")
        clip = self._recipe.clip
        if clip and norm > clip:
            mean = [gradient * (clip / norm) for gradient in mean]
            leaves.factor *= clip / norm
        for parameter, gradient, used in zip(self._trained, mean, leaves.used, strict=True):
            parameter.grad = gradient.to(parameter.dtype) if used else None


def uses_of(parameters: Sequence[nn.Parameter], loss: Tensor) -> tuple[int, ...]:
    """In how many places of the graph behind ``loss`` each of the parameters stands."""
    counts = dict.fromkeys(map(id, parameters), 0)
    seen, open_nodes = {loss.grad_fn}, [loss.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        for behind, _ in node.next_functions if node is not None else ():
            variable = getattr(behind, "variable", None)
            if variable is not None and id(variable) in counts:
                counts[id(variable)] += 1
            if behind is not None and behind not in seen:
                seen.add(behind)
                open_nodes.append(behind)
    return tuple(counts.values())


def tree_sum(leaves: range, of: Callable[[int], Sum | None]) -> Sum | None:
    """Add up what the leaves give in the canonical tree; None where no leaf gives anything."""
    if len(leaves) == 1:
        return of(leaves[0])
    half = 1
    while half * 2 < len(leaves):
        half *= 2
    left = tree_sum(leaves[:half], of)
    right = tree_sum(leaves[half:], of)
    if left is None or right is None:
        return right if left is None else left
    return [a + b for a, b in zip(left, right, strict=True)]


def block_norm(gradients: Sum) -> float:
    """The global norm: sums of squares of fixed blocks of all gradients laid end to end, then rounded once."""
    flat = torch.cat([nn.functional.pad(g.reshape(-1), (0, -g.numel() % ALIGNMENT)) for g in gradients])
    blocks = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    squares = [_sum_of_squares(block) for block in blocks]
    return math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.nan


def _sum_of_squares(block: Tensor) -> float:
    """In float64, written from the contract: the rows one after the other, then halves of the lanes."""
    lanes = torch.zeros(LANES, dtype=torch.float64)
    for row in block.double().view(-1, LANES):
        lanes = lanes + row * row
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return float(lanes)
