"""Loading ahead: threads that fetch the batches to come while the current one is trained on."""

import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

from shoal.data.ledger import Ids
from shoal.data.source import Batch, Source
from shoal.errors import ShoalError, UserError

Key = TypeVar("Key")
CLOSE_S = 10.0  # how long close() waits for a fetch that is under way


class Prefetcher(Generic[Key]):
    """Fetches each (key, ids, epoch) of ``work`` from ``source`` and yields (key, batch), in the order of ``work``.

    ``threads`` threads keep up to ``ahead`` batches made or in the making, beside the one that the consumer holds.
    With ``ahead`` or ``threads`` 0, and for a source that draws from global random generators (``source.draws``),
    batches are fetched in line, in the consumer's own thread.

    A fetch that fails raises at its place in the order, naming the samples: UserError where the source raised one,
    else ShoalError. Leaving the block ends the threads, wherever the consumer stopped."""

    def __init__(self, source: Source, work: Iterable[tuple[Key, Ids, int]], ahead: int, threads: int) -> None:
        self.waited_s = 0.0  # how long the consumer has waited for batches, so far
        self._source = source
        self._work = iter(work)
        self._ahead = ahead
        self._changed = threading.Condition()  # guards all that follows
        self._ready: dict[int, tuple[Key, Batch] | BaseException] = {}  # by place in the order
        self._taken = 0  # places that a thread has taken on
        self._given = 0  # places that the consumer has been given
        self._ended = False  # the work has run out, or taking it has failed
        self._closed = False
        self._threads: list[threading.Thread] = []
        if ahead > 0 and not getattr(source, "draws", False):
            names = (f"shoal-loader-{number}" for number in range(threads))
            self._threads = [threading.Thread(target=self._load, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def again(self, work: Iterable[tuple[Key, Ids, int]]) -> "Prefetcher[Key]":
        """Other batches of the same source, fetched in line."""
        return Prefetcher(self._source, work, 0, 0)

    def close(self) -> None:
        """Ends the threads; a fetch under way is waited for. Batches not yet given are dropped."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(CLOSE_S)

    def __iter__(self) -> Iterator[tuple[Key, Batch]]:
        return self

    def __next__(self) -> tuple[Key, Batch]:
        start = time.perf_counter()
        try:
            result = self._wait() if self._threads or self._closed else self._fetch(next(self._work))
        finally:
            self.waited_s += time.perf_counter() - start
        if isinstance(result, BaseException):
            self.close()
            raise result
        return result

    def _wait(self) -> tuple[Key, Batch] | BaseException:
        with self._changed:
            self._changed.wait_for(
                lambda: self._given in self._ready or self._closed or (self._ended and self._given == self._taken)
            )
            if self._given not in self._ready:
                raise StopIteration
            result = self._ready.pop(self._given)
            self._given += 1
            self._changed.notify_all()
            return result

    def _load(self) -> None:
        while taken := self._take():
            place, item = taken
            result = self._fetch(item)
            with self._changed:
                if not self._closed:
                    self._ready[place] = result
                self._changed.notify_all()

    def _take(self) -> tuple[int, tuple[Key, Ids, int]] | None:
        """The next place in the order and its work, once there is room for its batch; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._ended or self._taken - self._given < self._ahead)
            if self._closed or self._ended:
                return None
            place = self._taken
            try:
                item = next(self._work)
            except BaseException as error:
                self._ended = True
                if not isinstance(error, StopIteration):
                    self._ready[place] = error
                    self._taken += 1
                self._changed.notify_all()
                return None
            self._taken += 1
            return place, item

    def _fetch(self, item: tuple[Key, Ids, int]) -> tuple[Key, Batch] | BaseException:
        key, ids, epoch = item
        try:
            return key, self._source.fetch(ids, epoch)
        except UserError as error:
            return _named(UserError, ids, epoch, str(error), error)
        except Exception as error:
            return _named(ShoalError, ids, epoch, f"{type(error).__name__}: {error}", error)


def _named(kind: type[ShoalError], ids: Ids, epoch: int, text: str, cause: Exception) -> ShoalError:
    some = ", ".join(str(i) for i in ids[:8].tolist()) + (f", ... ({len(ids)} in all)" if len(ids) > 8 else "")
    named = kind(f"cannot load samples {some} of epoch {epoch}: {text}")
    named.__cause__ = cause
    return named
