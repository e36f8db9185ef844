"""Whether workers that should have equal parameters have them."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from shoal.errors import RunFailed


@torch.no_grad()
def parameter_checksum(parameters: Iterable[Tensor]) -> float:
    """A sum of the parameters' bits, exact in float64: equal on workers whose parameters are equal."""
    total = 0
    for parameter in parameters:
        flat = parameter.detach().reshape(-1).contiguous()
        words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
        total += int(flat.view(words).sum(dtype=torch.int64))
    return float(total % (1 << 52))


def compare(ranks: Sequence[int], checksums: Sequence[float], when: str) -> None:
    """Raises RunFailed naming the ranks whose parameters are not those of the most."""
    if len(set(checksums)) > 1:
        usual = max(checksums, key=checksums.count)
        odd = [rank for rank, value in zip(ranks, checksums, strict=True) if value != usual]
        raise RunFailed(
            f"the workers' parameters differ {when}: rank {', '.join(map(str, odd))} "
            f"disagree{'s' if len(odd) == 1 else ''} with the others "
            f"(checksums {', '.join(f'{s:.0f}' for s in checksums)})"
        )
