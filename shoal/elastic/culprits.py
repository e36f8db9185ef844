"""Which workers a run goes on without, when what they compute or hold is wrong: a verdict that all come to alike."""

from shoal.train.at_rest import Corrupt
from shoal.train.checksum import Diverged
from shoal.train.not_finite import NotFinite

Wrong = (Diverged, NotFinite, Corrupt)


def culprits(found: Exception, world: int, tried: int) -> tuple[int, ...]:
    """Ranks, () when the run must end: others would come to the same.

    One whose parameters are not those of the most goes; all do, and new ones begin with a checkpoint from before, where
    it cannot be told which are wrong. So does one that alone has found no finite value, twice: its
    shards are tried by others. ``tried``: the step that has been tried so, 0 for none; then it is the recipe's."""
    if isinstance(found, Diverged | Corrupt):
        return found.ranks
    if isinstance(found, NotFinite):
        return found.ranks if len(found.ranks) == 1 < world and found.step != tried else ()
    return ()
