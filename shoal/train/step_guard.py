"""What is wrong with a step, found before anything is updated with it: by all workers, who say the same of it."""

import json
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from shoal.comm.group import Group
from shoal.data.ledger import Ledger
from shoal.train.checksum import Diverged, compare, compare_kept
from shoal.train.figures import StepFigures
from shoal.train.not_finite import NotFinite, Spoilt, all_told
from shoal.train.reduction import Reduction
from shoal.train.retry import Retry


class Crew(Protocol):
    """What the guard must know of the worker."""

    group: Group
    retry: Retry

    @property
    def shards(self) -> Sequence[int]: ...


class StepGuard:
    """Of one step of one worker. It is told of losses and of what stages hand on; sums it looks at itself."""

    def __init__(self, crew: Crew, reduction: Reduction, ledger: Ledger, number: int, *, watches: bool) -> None:
        """``number``: as committed, from 1. ``watches``: workers that share their parameters look after slices."""
        self._crew, self._reduction, self._ledger, self._number = crew, reduction, ledger, number
        self._watches = watches
        self._spoilt: list[Spoilt] = []
        self._diverged: Diverged | None = None
        self._careful = False

    def begin(self, *, careful: bool) -> None:
        """``careful``: the step is done again, and every pass looked at, to find where it goes wrong."""
        self._spoilt, self._diverged, self._careful = [], None, careful

    # --- in the passes ----------------------------------------------------------------------------------------

    def loss(self, value: float, shard: int, micro: int) -> None:
        """Raises NotFinite where the step cannot be done again; else `check` does, where all workers hear of it."""
        if math.isfinite(value):
            return
        held = self._reduction.held
        stage = held.pipeline.last if held.pipeline is not None else -1
        found = Spoilt(self._crew.group.rank, (shard,), self._of_pass(shard, micro), value, stage=stage)
        if not self._reduction.redoes:
            raise NotFinite(self._number, value, "", [found])
        self._spoilt.append(found)

    def handed_on(self, made: Any, stage: int, shard: int, micro: int) -> None:
        """What a stage's forward pass has made. An infinity may be meant (a mask), and is passed over."""
        if not self._careful:
            return
        tensors = [each for each in tree_leaves(made) if isinstance(each, Tensor) and each.is_floating_point()]
        if any(bool(each.isnan().any()) for each in tensors):
            ids = self._of_pass(shard, micro)
            self._spoilt.append(Spoilt(self._crew.group.rank, (shard,), ids, stage=stage, output=True))

    def _of_pass(self, shard: int, micro: int) -> tuple[int, ...]:
        return tuple(self._ledger.shard(self._number - 1, shard)[micro].tolist())

    # --- at its end -------------------------------------------------------------------------------------------

    def differs(self) -> bool:
        """Once gradients are reduced, before workers of other shares hear of this one's: whether those that hold the
        same parameters do not have the same ones."""
        try:
            for ranks, checksums, kept in self._reduction.checksums():
                if self._watches:
                    compare_kept(ranks, kept, f"before step {self._number} was committed")
                elif len(checksums) == len(ranks):  # workers that go their own ways know of themselves alone
                    compare(ranks, checksums, f"in step {self._number}", kept)
        except Diverged as found:
            self._diverged = found
        return self._diverged is not None

    def check(self, figures: StepFigures) -> None:
        """Raises Diverged, or NotFinite, with the same words on all workers, or the same ranks at least."""
        if not self._reduction.wrong and math.isfinite(figures.norm):
            return
        self._raise_diverged()
        parameter = self._reduction.first_not_finite()
        if not self._reduction.redoes:
            raise NotFinite(self._number, figures.loss, parameter, [])
        group = self._crew.group
        found, parameter = all_told(group, self._spoilt, parameter)
        if all(each.loss is None for each in found):
            found, parameter = all_told(group, self._gradients(), parameter)
        raise NotFinite(self._number, figures.loss, parameter, found)

    def _raise_diverged(self) -> None:
        found = self._diverged
        if self._reduction.held.plan.splits_model:  # a stage's replicas know of it, and the others do not
            mine = [str(found), list(found.ranks), found.sure] if found is not None else None
            rows = [json.loads(row) for row in self._crew.group.gather(json.dumps(mine).encode())]
            told = next((row for row in rows if row is not None), None)
            found = Diverged(*told) if told is not None else None
        if found is not None:
            raise found

    @torch.no_grad()
    def _gradients(self) -> list[Spoilt]:
        """Of this worker: exactly in a step that is done again, as far as partial sums tell in the first try."""
        found: list[Spoilt] = []
        held, crew = self._reduction.held, self._crew
        for gradients, share in zip(self._reduction.sets, held.shares, strict=True):
            stage = share.chunk if held.pipeline is not None else -1
            if self._careful:
                for leaf in sorted({leaf for leaf, _ in gradients.spoilt}):
                    shards = self._reduction.shards_of(share, leaf)
                    name = min((name for at, name in gradients.spoilt if at == leaf), key=list(held.sizes).index)
                    found.append(Spoilt(crew.group.rank, shards, self._ids(shards), stage=stage, parameter=name))
            elif share.group.rank in gradients.origins(share.group):
                passes = self._ledger.passes(self._number - 1)
                own = tuple(sorted(s for s in (*crew.shards, *crew.retry.kept_shards) if passes[s]))
                name = gradients.first_not_finite() if not gradients.exchange.sliced_result else ""
                found.append(Spoilt(crew.group.rank, own, self._ids(own), stage=stage, parameter=name))
        return found

    def _ids(self, shards: Sequence[int]) -> tuple[int, ...]:
        return tuple(
            int(each) for shard in shards for ids in self._ledger.shard(self._number - 1, shard) for each in ids
        )
