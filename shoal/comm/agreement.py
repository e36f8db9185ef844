"""Whether all workers ask for the same: a signature says in words what each is about to do."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

from shoal.comm.mesh import OutOfStep


@lru_cache(maxsize=4096)
def digest(signature: str) -> int:
    """64 bits that stand for it: equal on all workers where they say the same."""
    return int.from_bytes(hashlib.blake2b(signature.encode(), digest_size=8).digest(), "little")


def compare(asked: Sequence[str], names: Sequence[int], sequence: int) -> None:
    """``asked[r]`` is what rank r wants to do now. Raises OutOfStep on all ranks unless all want the same."""
    if len(set(asked)) == 1:
        return
    wishes: dict[str, list[str]] = {}
    for name, wish in zip(names, asked, strict=True):
        wishes.setdefault(wish, []).append(f"rank {name}")
    said = "; ".join(f"{', '.join(ranks)}: {wish}" for wish, ranks in wishes.items())
    raise OutOfStep(f"collective mismatch at operation {sequence}, nothing was written: {said}")
