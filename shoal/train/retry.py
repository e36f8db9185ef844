"""A step that is done again as a worker was lost: what the others had finished is kept, the rest is dealt out."""

import json
from collections.abc import Sequence

from shoal.comm.dealt import DealtPlacement
from shoal.comm.exchange import HeapExchange
from shoal.comm.group import Group
from shoal.train.gradients import Gradients
from shoal.train.kept import CutShort, Row, dealt, row_of


class Retry:
    """One worker's part in it, of plans in which all workers are alike, on one host; else nothing is kept."""

    def __init__(self) -> None:
        self._cut: CutShort | None = None  # what this worker has done of a step that nobody has ended
        self._dealt: DealtPlacement | None = None  # of the step to come
        self._gradients: Gradients | None = None
        self._had: tuple[int, list[int]] = (0, [])  # the step that was to come, and this worker's shards of it

    def leave(self, gradients: Gradients | None, step: int) -> None:
        """The others have gone. With ``gradients`` what they hold of ``step`` is kept; of one that has not begun, what
        an earlier try of it has left."""
        self._dealt = self._gradients = None
        if gradients is None:
            self._drop()
        else:
            self._cut = gradients.cut_short(step) or self._cut
            self._had = step, list(gradients.leaves_of_step)

    def _drop(self) -> None:
        self._cut, self._had = None, (0, [])

    def take_up(self, gradients: Gradients, group: Group, step: int, *, quiet: bool) -> dict[str, int]:
        """Before ``step``, called by all: how many shards are ``kept``, and how many done ``again``; {} for none.

        ``quiet``: see `HeapExchange.untouched`."""
        cut, (had, left) = self._cut, self._had
        if type(gradients.exchange) is not HeapExchange:
            return {}
        kept = cut.kept(quiet=quiet) if cut is not None and cut.step == step else None
        row = Row([], left, ()) if had == step else None
        if cut is not None and kept is not None:
            row = cut.row(kept)
        rows = [row_of(told) for told in group.gather(json.dumps(row).encode())]
        agreed = dealt(rows, group.rank)
        if agreed is None:
            self._drop()
            return {}
        self._gradients, self._dealt = gradients, agreed.placement
        mine = kept.some(self._dealt.kept) if kept is not None else None
        gradients.deal(self._dealt, agreed.passes, mine)
        return agreed.counts

    def end(self) -> None:
        """No sums are kept any more: after the step, or because they are no good. Called by all alike."""
        if self._dealt is not None and self._gradients is not None:
            self._gradients.deal(None)
        self._dealt = self._gradients = None
        self._drop()

    @property
    def shards(self) -> Sequence[int] | None:
        """Those that this worker computes in the step; None: the usual ones."""
        return self._dealt.leaves if self._dealt is not None else None

    @property
    def kept_shards(self) -> Sequence[int]:
        """Those whose sums it brings."""
        return [shard for node in self._dealt.kept for shard in range(*node)] if self._dealt is not None else ()
