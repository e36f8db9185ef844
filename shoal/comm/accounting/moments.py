"""When every worker did what, over torch.distributed: a few numbers at the end of the facts that travel anyway."""

from collections.abc import Sequence

import numpy as np

from shoal.comm.accounting.account import Account
from shoal.comm.accounting.clocks import Offset


class Moments:
    """What follows the facts in a worker's last row of a step: when it posted each bucket, when it saw the last step's
    rows complete, and its account up to the last step.

    ``clocks`` names each worker's clock. Times of other clocks are estimated from those very rows; until that works,
    their workers count as early."""

    def __init__(self, account: Account, clocks: Sequence[str]) -> None:
        self._account, self._me, self._buckets = account, account.counters.rank, account.form.buckets
        self.width = self._buckets + 1 + account.form.width
        account.offsets = {rank: Offset() for rank, clock in enumerate(clocks) if clock != clocks[self._me]}
        self._told: Sequence[float] = ()
        self._sent = self._seen = 0.0

    def tell(self, account: Sequence[float]) -> None:
        """A step begins; ``account`` is what `Account.begin` has said."""
        self._told = account

    def write(self, row: np.ndarray) -> None:
        """Fill the own row [width]; the last bucket has just been posted."""
        posted = self._account.times.posted
        row[: self._buckets] = posted
        row[self._buckets] = self._seen
        row[self._buckets + 1 : self._buckets + 1 + len(self._told)] = self._told
        row[self._buckets + 1 + len(self._told) :] = 0.0

    def read(self, rows: np.ndarray, seen: float) -> None:
        """Take the times of all workers, [workers, width], which were here by ``seen``; they are of this step."""
        times = self._account.times
        posts = rows[:, : self._buckets].copy()
        for rank, offset in self._account.offsets.items():
            offset.received(posts[rank, -1], seen)
            if self._seen and rows[rank, self._buckets]:
                offset.delivered(self._sent, rows[rank, self._buckets])
            known = offset.seconds
            posts[rank] = -np.inf if known is None else posts[rank] + known
        late = posts.argmax(axis=0)
        ready = posts[late, np.arange(self._buckets)]
        times.late = late.tolist()
        times.ready = np.minimum(ready, times.begun).tolist()  # an estimate may be late; the operands were not
        self._sent, self._seen = times.posted[-1], seen

    def accounts(self, rows: np.ndarray) -> np.ndarray:
        return rows[:, self._buckets + 1 :]
