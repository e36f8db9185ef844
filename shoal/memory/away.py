"""Tensors that wait elsewhere for the backward pass: moved there behind the computation, and back ahead of it.

What the forward pass leaves is queued for a background thread. The backward pass asks in about the reverse order: each
time it does, what comes next is already on its way back. What it asks for before the thread has come to it never
leaves. A tensor's whole memory moves, so that what comes back lies as it lay: same strides, same kernels, same bits.
(Host-memory offload behind streams: vDNN, Rhu et al., 2016; reverse prefetch over tiers: ZeRO-Infinity, 2021.)
"""

import threading
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from shoal.errors import RunFailed
from shoal.memory.meter import Hold, Meter, bytes_of, storage_of
from shoal.memory.places import Place

SMALLEST = 4096  # bytes: less is not worth moving
LEAVING_BYTES = 64 << 20  # that wait to be moved away; the forward pass then waits for the thread
RETURNING_BYTES = 64 << 20  # that are brought back ahead of the backward pass


class _At(Enum):
    LEAVING = 1  # queued, and still in memory
    MOVING = 2  # the thread is at it
    AWAY = 3
    RETURNING = 4  # its memory is there, the thread fills it
    HERE = 5


class _Record:
    """The memory that one or several kept tensors lie in."""

    def __init__(self, number: int, tensor: Tensor, hold: Hold) -> None:
        self.number, self.key = number, storage_of(tensor)
        self.at = _At.LEAVING
        self.counted = False  # among the bytes that have come back, or stayed, ahead of who asks for them
        self.tensor: Tensor | None = tensor
        self.hold: Hold | None = hold
        self.version = tensor._version
        self.size, self.device = bytes_of(tensor), tensor.device
        self.where: object = None  # in the place; None: never put there
        self.handles = 0  # kept tensors that are alive
        self.unseen = 0  # of these, those that nobody has asked for yet
        self.failed: OSError | None = None
        self.ready = _recorded(tensor.device)
        self.weak: Any = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]

    def holds(self, tensor: Tensor) -> bool:
        """It is of this tensor's memory, as that is now. The weak reference keeps the key from being another's."""
        return not self.weak.expired() and self.version == tensor._version

    def raw(self) -> Tensor:
        """All bytes of its memory: uint8 [size]."""
        assert self.tensor is not None
        return _bytes(self.tensor)


class Kept:
    """A tensor that may be elsewhere."""

    __slots__ = ("_away", "_form", "_record", "_seen")

    def __init__(self, away: "Away", record: _Record, tensor: Tensor) -> None:
        self._away, self._record, self._seen = away, record, False
        self._form = (tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())

    def get(self) -> Tensor:
        """The tensor, as it was. Raises RunFailed when it was written to meanwhile, or cannot be read back."""
        memory = self._away._fetch(self._record, first=not self._seen)
        self._seen = True
        dtype, offset, shape, stride = self._form
        return torch.empty(0, dtype=dtype, device=memory.device).set_(memory.untyped_storage(), offset, shape, stride)

    def __del__(self) -> None:
        self._away._dropped.append((self._record, self._seen))


class Away:
    """A store of tensors in a place outside of memory. One thread keeps and gets, one that is its own moves."""

    moves = True

    def __init__(
        self,
        meter: Meter,
        place: Place,
        tell: Callable[[str], None],
        *,
        leaving: int = LEAVING_BYTES,
        returning: int = RETURNING_BYTES,
    ) -> None:
        """``tell`` is called once when the place takes no more: tensors then stay in memory, and training goes on."""
        self.meter, self._place, self._tell = meter, place, tell
        self._most_leaving, self._most_returning = leaving, returning
        self._records: dict[int, _Record] = {}  # by number, in the order in which they were kept
        self._known: dict[int, _Record] = {}  # storage -> record, while the storage lives
        self._dropped: deque[tuple[_Record, bool]] = deque()  # appended to wherever a kept tensor happens to end
        self._next = 0
        self._change = threading.Condition()
        self._outward: deque[_Record] = deque()
        self._inward: deque[_Record] = deque()
        self._leaving = 0  # bytes queued or in the thread's hands
        self._returning = 0  # bytes that have come back, or are about to, and were not asked for yet
        self._problem = ""
        self._broken: BaseException | None = None
        self._closed = False
        self._thread: threading.Thread | None = None
        self.moved = 0  # bytes put away so far

    # --- the thread that computes ---------------------------------------------------------------------------------

    def keep(self, tensor: Tensor) -> "Kept | Hold":
        """Have a tensor wait for the backward pass. Waits itself while too much is on its way out."""
        tensor = tensor.detach()
        self._tidy()
        if not _movable(tensor) or self.meter.ignores(tensor) or bytes_of(tensor) < SMALLEST:
            return self.meter.hold(tensor)
        record = self._known.get(storage_of(tensor))
        if record is None or not record.holds(tensor):
            if self._problem:
                return self.meter.hold(tensor)
            record = _Record(self._next, tensor, self.meter.hold(tensor))
            self._next += 1
            self._records[record.number] = self._known[record.key] = record
            self._send(record)
        with self._change:
            record.handles += 1
            record.unseen += 1
        return Kept(self, record, tensor)

    def _send(self, record: _Record) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="offload", daemon=True)
            self._thread.start()
        with self._change:
            while self._leaving and self._leaving + record.size > self._most_leaving and not self._broken:
                self._change.wait()
            self._leaving += record.size
            self._outward.append(record)
            self._change.notify_all()

    def _fetch(self, record: _Record, *, first: bool) -> Tensor:
        self._tidy()
        with self._change:
            while record.failed is None and not self._broken:
                self._call_back(record)
                if record.at is _At.HERE:
                    break
                self._change.wait()
            if self._broken:
                raise RunFailed(f"what moves activations to {self._place.name} broke: {self._broken!r}")
            if record.failed is not None:
                raise RunFailed(
                    f"what was offloaded to {self._place.name} cannot be read back "
                    f"({record.failed.strerror or record.failed}): go on from the last checkpoint, without "
                    f"memory.offload_activations."
                )
            memory = record.tensor
            assert memory is not None
            if record.where is None and memory._version != record.version:
                raise RunFailed(
                    "a tensor that a block keeps for its backward pass was written to after the forward pass: "
                    "leave the block out by naming the others in plan.memory.blocks."
                )
            if first:
                record.unseen -= 1
                if record.unseen == 0:
                    self._let_go(record)
            self._ahead(record.number)
        return memory

    def _call_back(self, record: _Record) -> None:
        """See to it that a record comes back, or stays."""
        if record.at is _At.LEAVING:
            self._outward.remove(record)
            self._leaving -= record.size
            record.at = _At.HERE
            self._count(record)
            self._change.notify_all()
        elif record.at is _At.AWAY:
            memory = torch.empty(record.size, dtype=torch.uint8, device=record.device)
            record.tensor, record.hold = memory, self.meter.hold(memory)
            record.at, record.ready = _At.RETURNING, _recorded(record.device)
            self._count(record)
            self._inward.append(record)
            self._change.notify_all()

    def _count(self, record: _Record, yes: bool = True) -> None:
        if record.counted != yes:
            record.counted = yes
            self._returning += record.size if yes else -record.size

    def _ahead(self, number: int) -> None:
        """Call back what was kept before ``number``, as far as there is room for it."""
        for earlier in range(number - 1, -1, -1):
            if self._returning >= self._most_returning:
                return
            record = self._records.get(earlier)
            if record is None:
                if not self._records or earlier < next(iter(self._records)):
                    return
            elif record.unseen:
                self._call_back(record)

    def _let_go(self, record: _Record) -> None:
        """All who keep it have it now: it stays where it is put, in case they ask again, but not in memory."""
        self._count(record, False)
        if record.at is _At.HERE and record.where is not None:
            record.tensor = record.hold = None
            record.at = _At.AWAY

    def _tidy(self) -> None:
        """Forget the records that nobody keeps any more."""
        while self._dropped:
            record, seen = self._dropped.popleft()
            with self._change:
                record.handles -= 1
                record.unseen -= not seen
                if record.handles:
                    continue
                self._records.pop(record.number, None)
                if record.at is _At.LEAVING:
                    self._outward.remove(record)
                    self._leaving -= record.size
                while record.at in (_At.MOVING, _At.RETURNING) and not self._broken:
                    self._change.wait()
                self._count(record, False)
                if record.where is not None:
                    self._place.drop(record.where)
                record.tensor = record.hold = None
                record.at = _At.HERE
                if self._known.get(record.key) is record:
                    del self._known[record.key]

    def close(self) -> None:
        with self._change:
            self._closed = True
            self._change.notify_all()
        if self._thread is not None:
            self._thread.join()

    # --- the thread that moves ------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._move_one():
                pass
        except BaseException as error:  # whatever it is: who waits must hear of it
            with self._change:
                self._broken = error
                self._change.notify_all()

    def _move_one(self) -> bool:
        with self._change:
            while not (self._inward or self._outward or self._closed):
                self._change.wait()
            if self._inward:
                record = self._inward.popleft()
            elif self._outward:
                record = self._outward.popleft()
                record.at = _At.MOVING
            else:
                return False
        if record.ready is not None:
            record.ready.synchronize()
        if record.at is _At.RETURNING:
            self._bring(record)
        else:
            self._take_away(record)
        return True

    def _bring(self, record: _Record) -> None:
        failed = None
        try:
            self._place.take(record.where, record.raw())
        except OSError as error:
            failed = error
        with self._change:
            record.failed = failed
            record.at = _At.HERE
            self._change.notify_all()

    def _take_away(self, record: _Record) -> None:
        where, problem = None, ""
        try:
            where = self._place.put(record.raw())
        except OSError as error:
            problem = error.strerror or str(error)
        with self._change:
            self._leaving -= record.size
            assert record.tensor is not None
            if where is not None and record.tensor._version == record.version:
                record.where = where
                record.tensor = record.hold = None
                record.at = _At.AWAY
                self.moved += record.size
            else:
                record.at = _At.HERE
                self._count(record)
                if where is not None:
                    self._place.drop(where)
            first, self._problem = bool(problem and not self._problem), self._problem or problem
            self._change.notify_all()
        if first:
            self._tell(
                f"offload to {self._place.name} takes no more ({problem}): what is left of the activations stays in "
                f"memory, and training goes on."
            )


def _movable(tensor: Tensor) -> bool:
    plain = type(tensor) is Tensor or type(tensor) is torch.nn.Parameter
    return plain and tensor.layout is torch.strided and not tensor.is_conj() and not tensor.is_neg()


def _bytes(tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),), (1,))


def _recorded(device: torch.device) -> Any:
    """A mark in an accelerator's stream: when it has been reached, memory is as the computation left it."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
