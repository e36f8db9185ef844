"""Whether workers that should have equal parameters have them."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from shoal.comm.group import Group
from shoal.errors import RunFailed
from shoal.parallel.held import Held

_PRIME = (1 << 52) - 47  # a sum of 64-bit words modulo a prime: a flip of any one bit changes it; exact in float64
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Diverged(RunFailed):
    """Workers that should have equal parameters have not. The same on all of them."""

    def __init__(self, line: str, ranks: Sequence[int], sure: bool) -> None:
        """``ranks``: those that disagree; ``sure``: it is known that they are the ones who are wrong."""
        super().__init__(line)
        self.ranks, self.sure = tuple(ranks), sure


@torch.no_grad()
def parameter_checksum(parameters: Iterable[Tensor]) -> float:
    """A sum of the parameters' bits, exact in float64: equal on workers whose parameters are equal."""
    sums = [total for parameter in parameters for total in _sums(parameter.detach())]
    return float(sum(int(total) for total in sums) % _PRIME) if len(sums) < 2 else _added(sums)


def _added(sums: Sequence[Tensor]) -> float:
    """One wait for the device, however many parameters there are."""
    return float(int(torch.stack(list(sums)).sum()) % _PRIME)


def _sums(parameter: Tensor) -> list[Tensor]:
    """Eight bytes at a time, as far as they go: four times as fast as words of four that are made longer."""
    flat = parameter.reshape(-1).contiguous()
    size = flat.element_size()
    each = 8 // size if size in _WORDS else 1
    whole = flat.numel() // each * each
    if (flat.storage_offset() * size) % 8:
        whole = 0
    found = [flat[:whole].view(torch.int64).sum()] if whole else []
    if whole < flat.numel():
        found.append(flat[whole:].view(_WORDS[size]).sum(dtype=torch.int64))
    return found


def compare_held(group: Group, held: Held, when: str) -> None:
    """Of all workers, each those that it holds; all along axis tensor have the same of what is not cut over it. Called
    by all; raises Diverged."""
    mine = []
    for number, share in enumerate(held.shares):
        alike: dict[tuple[str, ...], list[Tensor]] = defaultdict(list)
        for name, parameter in share.parameters.items():
            alike[share.axes if "tensor" in held.split_along(name) else (*share.axes, "tensor")].append(parameter)
        for axes, parameters in alike.items():
            first = held.plan.axes.along(group.rank, *axes)[0]
            mine.append([first, 2 * number + ("tensor" in axes), parameter_checksum(parameters)])
    equal: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)  # those that should have the same
    for rank, row in enumerate(group.gather(json.dumps(mine).encode())):
        for first, number, checksum in json.loads(row):
            equal[first, number][rank] = checksum
    for found in equal.values():
        compare(list(found), list(found.values()), when)


def compare_kept(ranks: Sequence[int], kept: Sequence[bool], when: str) -> None:
    """Of workers that share one copy of the parameters. ``kept``: whether each found its slices as it had left them.

    Raises Diverged naming all ranks, as what one finds is everybody's, when one has not."""
    odd = [rank for rank, value in zip(ranks, kept, strict=True) if not value]
    if odd:
        who = f"rank{'s' if len(odd) > 1 else ''} {', '.join(map(str, odd))}"
        raise Diverged(
            f"shared parameters were written to {when}, between two updates: the slices of {who} are not as it left "
            f"them (memory that fails, or a write that torch does not count, through .data say).",
            ranks,
            False,
        )


def compare(ranks: Sequence[int], checksums: Sequence[float], when: str, kept: Sequence[bool] = ()) -> None:
    """Raises Diverged naming the ranks whose parameters are not those of the most.

    ``kept``: whether each knows that its parameters are those that its own last update left: among as many others, who
    does not is the one that is wrong."""
    if len(set(checksums)) == 1:
        return
    counts = sorted((checksums.count(value) for value in set(checksums)), reverse=True)
    usual = max(checksums, key=checksums.count)
    odd = [rank for rank, value in zip(ranks, checksums, strict=True) if value != usual]
    sure = len(counts) == 1 or counts[0] > counts[1]
    if not sure and kept and any(kept) and not all(kept):
        odd, sure = [rank for rank, value in zip(ranks, kept, strict=True) if not value], True
    shown = ", ".join(f"{s:.0f}" for s in checksums)
    if sure:
        who = f"rank {', '.join(map(str, odd))} disagree{'s' if len(odd) == 1 else ''} with the others"
    else:
        odd, who = list(ranks), f"no majority of ranks {', '.join(map(str, ranks))} agrees"
    raise Diverged(f"the workers' parameters differ {when}: {who} (checksums {shown})", odd, sure)
