"""All gradients of a worker: a set for each group of workers that sums them, one norm, one clipping over all."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from shoal.comm.accounting.split_account import SplitAccount
from shoal.comm.accounting.telling import Teller
from shoal.comm.layout import ALIGNMENT, blocks_held, flat_layout
from shoal.errors import UserError
from shoal.memory.quantised import BLOCK as QUANTISED_BLOCK
from shoal.parallel.held import Held, Share
from shoal.recipe.plan import Plan
from shoal.train.figures import StepFigures
from shoal.train.gradients import Gradients
from shoal.train.norm import CHANGE, STOP, WRONG, Norm, NormAlone, NormOverParts, NormOverStages
from shoal.train.synchrony import exchange_of, placement_of
from shoal.train.trained import Trained


class Reduction:
    """A pass goes through `enter_leaf`, a forward pass, `leave_leaf` after the leaf's last one, and `backward`."""

    def __init__(
        self,
        held: Held,
        ownership: Sequence[range],
        micro_batches: int,
        device: torch.device,
        *,
        measures: bool = False,
    ) -> None:
        """``ownership``: the shards of each replica. ``measures``: how noisy gradients are, of plans that keep models
        whole."""
        self.held, self._measures = held, measures
        self._buffers = {name: b for name, b in held.module.named_buffers() if b.numel()}
        shards = ownership[-1].stop
        self._row = _Row.of(held, ownership) if held.experts else None
        self.sets = [self._set(share, ownership, shards, micro_batches, device) for share in held.shares]
        self._experts = [g for g, o in zip(self.sets, held.shares, strict=True) if self._row and self._of_experts(o)]
        self._of_chunk = {s.chunk: [g for g, o in zip(self.sets, held.shares, strict=True) if o.chunk == s.chunk]
                          for s in held.shares}  # fmt: skip
        self._teller = Teller(self.first.exchange.account.form)
        self._split = self._account() if held.plan.splits_model else None
        self._norm = self._make_norm()
        self.wrong = False  # after `finish`, on all workers alike: see there

    @property
    def first(self) -> Gradients:
        """The set that every worker's losses and counts go with."""
        return self.sets[0]

    def _set(
        self, share: Share, ownership: Sequence[range], shards: int, micro_batches: int, device: torch.device
    ) -> Gradients:
        held, plan = self.held, self.held.plan
        ranks = held.ranks(share)
        copies = plan.axes.size("context")
        if self._row is not None and self._of_experts(share):  # to whom a row of replicas sends its tokens
            places = [plan.axes.coordinate(rank, "data") for rank in ranks]
            owned, leaves = [range(place, place + 1) for place in places], plan.axes.size("data")
            most = tuple(max(len(ownership[r]) for r in row) * micro_batches for row in self._row.replicas)
        else:
            owned, leaves = [ownership[held.plan.replica_of(rank)] for rank in ranks], shards
            most = (micro_batches,) * shards
        in_a_row = copies > 1 or held.experts is not None  # several have a part of each shard's gradient: no tree
        placement = placement_of(plan, owned, share.group.rank, in_a_row=in_a_row)
        trained = _trained(held, share, plan)
        shapes = [tuple(p.shape) for p in trained.parameters.values()]
        return Gradients(
            trained,
            placement,
            leaves,
            lambda *a: exchange_of(plan, share.group, placement, most, device, shapes, *a),
            copies=copies,
            measures=self._measures,
        )

    @staticmethod
    def _of_experts(share: Share) -> bool:
        """Of a model whose experts are spread over workers: what is not summed over these."""
        return "expert" not in share.axes

    def _make_norm(self) -> Norm:
        held = self.held
        if self._split is None:
            return NormAlone()
        group, ranks = held.group, [share.group.rank for share in held.shares]
        if held.plan.sums_in_order:
            alignment = _alignment(held.plan)
            blocks = [blocks_held(held.ready_sizes, held.places(each.names), alignment) for each in self.sets]
            return NormOverStages(group, self.sets, blocks, ranks, self._split)
        counted = [[held.counts(name, share) for name in each.names]
                   for each, share in zip(self.sets, held.shares, strict=True)]  # fmt: skip
        return NormOverParts(group, self.sets, counted, ranks, self._split)

    def _account(self) -> SplitAccount:
        axes, group = self.held.plan.axes, self.held.group

        def axes_of(ranks: Sequence[int]) -> list[str]:
            return [axis for axis, _ in axes.sizes if len({axes.coordinate(rank, axis) for rank in ranks}) > 1]

        summing = [gradients.exchange.account.counters for gradients in self.sets]
        return SplitAccount(group.counters, group.report, axes_of, summing)

    # --- one step ---------------------------------------------------------------------------------------------

    def begin(self, passes: tuple[int, ...], *, stop: bool, change: bool, votes: bool, careful: bool) -> None:
        """``votes``: compare the parameters of workers that hold the same ones, as they are after the last pass.
        ``careful``: find the shard of a gradient that is not finite."""
        self.wrong = False
        for gradients, share in zip(self.sets, self.held.shares, strict=True):
            own = self._row.passes(passes) if self._row is not None and self._of_experts(share) else passes
            gradients.begin(own, stop=stop, change=change, votes=votes and share.group.world > 1, careful=careful)
        if self._split is not None:
            self._split.begin()

    def enter_leaf(self, leaf: int, chunk: int = 0) -> None:
        """Before a forward pass of a leaf: buffers start from the step's first state."""
        self._of_chunk[chunk][0].enter_leaf(leaf)

    def leave_leaf(self, chunk: int = 0) -> None:
        """After its last forward pass."""
        self._of_chunk[chunk][0].leave_leaf()

    def backward(
        self, leaf: int, run: Callable[[], None], value: float, count: float, *, waited_s: float, chunk: int = 0
    ) -> None:
        """One backward pass, ``run``, of a loss of ``value``, a sum over ``count`` targets."""
        opened = self._of_chunk[chunk]
        opened[0].open(leaf, value, count, waited_s=waited_s)
        for others in opened[1:]:
            if others in self._experts:
                assert self._row is not None
                others.open(self._row.leaf, 0.0, self._row.count(count), waited_s=waited_s)
            else:
                others.open(leaf, 0.0, count, waited_s=waited_s)
        self._run(opened, run)

    def backward_of_others(self, run: Callable[[], None], chunk: int = 0) -> None:
        """A pass in which this worker has no samples, but experts that others send tokens to."""
        assert self._row is not None
        opened = [each for each in self._of_chunk[chunk] if each in self._experts]
        for experts in opened:
            experts.open(self._row.leaf, 0.0, self._row.count(0.0), waited_s=0.0)
        self._run(opened, run)

    def _run(self, opened: Sequence[Gradients], run: Callable[[], None]) -> None:
        with (opened or self.sets)[0].exchange.inside():
            run()
        for gradients in opened:
            gradients.close()

    def others_passes(self, passes: tuple[int, ...], own: int) -> int:
        """How many passes this worker makes without samples of its own."""
        if self._row is None:
            return 0
        return self._row.passes(passes)[self._row.leaf] - own

    # --- its end ----------------------------------------------------------------------------------------------

    def finish(self, differs: Callable[[], bool] = lambda: False) -> StepFigures:
        """Wait for the global mean gradient; `hang` is what comes next, or `undo`.

        ``differs``: whether parameters do not agree, as far as this worker knows from the rows of its shares. Then, or
        when a loss is not finite, all workers find `wrong`."""
        self._check_buffers()
        squares = [gradients.reduce() for gradients in self.sets]
        found = self.first.figures(0.0)
        wrong = differs() or not math.isfinite(found.loss)
        norm, asked = self._norm(squares, STOP * found.stop | CHANGE * found.change | WRONG * wrong)
        self.wrong = bool(asked & WRONG)
        return replace(found, norm=norm, stop=bool(asked & STOP), change=bool(asked & CHANGE))

    def hang(self, norm: float, clip: float = 0.0, *, keep_gradients: bool = True) -> None:
        """Hang the gradient, whose norm is ``norm``, on the parameters, clipped to the global norm ``clip``.

        ``keep_gradients``: the optimiser is known not to write to p.grad; else every worker gets a copy of its own."""
        factor = clip / norm if clip and norm > clip else 1.0
        for gradients in self.sets:
            gradients.hang(factor, keep_gradients=keep_gradients)

    def ended(self) -> None:
        """The step is committed: what is counted from now on belongs to no step."""
        if self._split is not None:
            self._split.end()

    def communication(self) -> dict[str, Any] | None:
        """See `Worker.communication`."""
        rows, offsets = self.first.exchange.rows, self.first.exchange.account.offsets
        if self._split is None:
            return self._teller(rows, offsets)
        if not self._split.told:
            return None
        ranks = self.held.ranks(self.held.shares[0])  # of those that sum the first set: its buckets are told
        return self._teller.since(self._split.told) | self._teller.sample(rows, offsets, ranks)

    def undo(self) -> None:
        """Instead of `hang`: the step can begin again."""
        for gradients in self.sets:
            gradients.undo()

    def _check_buffers(self) -> None:
        for name, buffer in self.held.module.named_buffers():
            if self._buffers.get(name, buffer) is not buffer:
                raise UserError(
                    f"the forward pass put a new tensor in the place of buffer {name!r}: write into the old one, "
                    f"{name.rpartition('.')[2]}.copy_(...), so that all workers can share it."
                )

    def release(self) -> None:
        """Let go of the module: no hook acts any more, and what a step in flight has done is undone."""
        for gradients in self.sets:
            gradients.release()

    @property
    def redoes(self) -> bool:
        """A step that was finished, and not hung, can be done again: weights are as they were, and all workers find out
        together. Compressors keep what they have not sent, and that is spoilt, too."""
        plan = self.held.plan
        return plan.sync != "local" and plan.staleness == 0 and plan.compression == "none"

    def checksums(self) -> list[tuple[tuple[int, ...], list[float], list[bool]]]:
        """Of each set, after `finish`: the ranks that hold the same parameters, what each has, whether it kept it."""
        return [
            (self.held.ranks(share), gradients.checksums, gradients.kept)
            for gradients, share in zip(self.sets, self.held.shares, strict=True)
        ]

    def shards_of(self, share: Share, leaf: int) -> tuple[int, ...]:
        """Those whose samples a leaf of a share's sums stands for: of experts, all that a row of replicas has."""
        if self._row is None or not self._of_experts(share):
            return (leaf,)
        return self._row.shards(leaf)

    def remember(self) -> None:
        """After an update: of two workers that differ, the one whose parameters have changed since is wrong."""
        for gradients, share in zip(self.sets, self.held.shares, strict=True):
            if share.group.world == 2 and gradients.remembers:
                gradients.remember()

    def first_not_finite(self) -> str:
        """The first parameter held here, in the model's order, whose gradient is not finite."""
        for gradients in self.sets:
            name = gradients.first_not_finite()
            if name:
                return f"that of parameter {name!r} is not"
        return "its norm overflows" if len(self.sets) == 1 and not self.held.plan.splits_model else ""


class _Row:
    """Replicas whose samples' tokens go to the same experts: they make their passes together."""

    def __init__(self, held: Held, replicas: list[list[int]], leaf: int, ownership: Sequence[range]) -> None:
        self.replicas, self.leaf = replicas, leaf
        self._experts, self._ownership = held.experts, ownership

    @staticmethod
    def of(held: Held, ownership: Sequence[range]) -> "_Row":
        axes = held.plan.axes
        columns = axes.along(held.group.rank, "data")
        rows = [[held.plan.replica_of(rank) for rank in axes.along(column, "expert")] for column in columns]
        return _Row(held, rows, columns.index(held.group.rank), ownership)

    def passes(self, passes: tuple[int, ...]) -> tuple[int, ...]:
        """Of each row, from those of each shard."""
        return tuple(
            max(sum(passes[shard] for shard in self._ownership[replica]) for replica in row) for row in self.replicas
        )

    def shards(self, row: int) -> tuple[int, ...]:
        return tuple(shard for replica in self.replicas[row] for shard in self._ownership[replica])

    def count(self, count: float) -> float:
        """The targets of the row's pass."""
        assert self._experts is not None
        return float(self._experts.all_reduce(torch.tensor([count], dtype=torch.float64)))


def _trained(held: Held, share: Share, plan: Plan) -> Trained:
    parameters = dict(reversed(list(share.parameters.items())))
    dtype = held.sum_type
    state = [Trained.real(buffer).numel() for buffer in share.buffers.values()]
    whole = plan.splits_model and plan.sums_in_order  # each gradient lies in its blocks as it does in the whole model
    sizes = held.ready_sizes if whole else [p.numel() for p in parameters.values()]
    layout = flat_layout(
        sizes,
        state,
        share.group.world,
        plan.bucket_bytes // dtype.itemsize,
        held.places(parameters) if whole else None,
        alignment=_alignment(plan),
    )
    return Trained(parameters, share.buffers, layout, dtype)


def _alignment(plan: Plan) -> int:
    """Of parameters in the flat buffer: slices, which are cut at its blocks, must not cut what is quantised as one."""
    return QUANTISED_BLOCK if plan.memory.optimizer_bits == 8 else ALIGNMENT
