"""A socket between every two of some processes, made before they are told of each other."""

import socket
from collections.abc import Sequence
from types import TracebackType
from typing import Self


class SocketPairs:
    """Between the ranks given. At the end of the block, what was not handed on is closed here."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self._pairs = {(a, b): socket.socketpair() for a in ranks for b in ranks if a < b}

    def __enter__(self) -> Self:
        return self

    def end(self, rank: int, other: int) -> socket.socket:
        """What ``rank`` has of its socket to ``other``."""
        return self._pairs[min(rank, other), max(rank, other)][0 if rank < other else 1]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for left, right in self._pairs.values():
            left.close()
            right.close()
