"""What a checkpoint says of the arithmetic that made it: whoever goes on has to have the same."""

from collections.abc import Mapping
from typing import Any

from shoal.data.ledger import Ledger
from shoal.errors import UserError


def arithmetic_of(ledger: Ledger, clip: float, fingerprint: str) -> dict[str, Any]:
    """``fingerprint``: of the data. A batch that changes in the run is told by the changes, beside this."""
    return {
        "shards": ledger.shards,
        "micro_batches": ledger.micro_batches,
        "seed": ledger.seed,
        "clip": clip,
        "batch": ledger.batch,
        "samples": ledger.samples,
        "data": fingerprint,
    }


def check_same(told: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises UserError naming the first difference between a checkpoint's arithmetic and that of now."""
    for name, value in now.items():
        if told.get(name) != value:
            raise UserError(
                f"the checkpoint was made with {name} = {told.get(name)!r}, this run has {value!r}: "
                f"going on would not give the same bits."
            )
