"""The carrier of workers of one host in C++: see native/kernels/shm_group.hpp. Small messages take microseconds.

Tensors that lie in the workers' arenas are read, and sums written, where they lie."""

import ctypes
import resource
import weakref
from collections.abc import Sequence
from ctypes import c_char_p, c_int, c_size_t, c_uint64, c_void_p
from typing import NoReturn

import torch
from torch import Tensor

from shoal.cluster.detect import usable_cores
from shoal.comm.agreement import compare, digest
from shoal.comm.group import HostGroup
from shoal.comm.heap import PAGE
from shoal.comm.mesh import OutOfStep, PeerLost
from shoal.comm.native import build
from shoal.comm.status import Phase, Position
from shoal.comm.tensors.carrier import DTYPES, Counts, Stood, compare_message, told
from shoal.errors import RunFailed

RING = 4 << 20  # bytes to one other rank that may be under way where address space is limited, and where it is not:
RINGS, LARGEST_RING = 256 << 30, 4 << 30  # of all pairs together, of one; what is not under way costs no memory
_HEAD_WORDS = 16  # Channels::kHead
_MISMATCH = 3  # 1 + Failure::Kind, like these; RunFailed for the others
_ERRORS = {2: PeerLost, _MISMATCH: OutOfStep}
_ANOTHER = -1  # another head came than was expected
_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
_Asleep = ctypes.CFUNCTYPE(c_int, c_int)
_TAKES = {
    "barrier": (c_void_p, c_uint64),
    "all_reduce": (c_void_p, c_uint64, c_void_p, c_void_p, c_size_t, c_int),
    "all_gather": (c_void_p, c_uint64, c_void_p, c_void_p, c_void_p, c_int),
    "reduce_scatter": (c_void_p, c_uint64, c_void_p, c_void_p, c_void_p, c_int),
    "all_to_all": (c_void_p, c_uint64, c_void_p, c_void_p, c_void_p, c_void_p, c_int),
    "broadcast": (c_void_p, c_uint64, c_void_p, c_size_t, c_int, c_int),
    "send": (c_void_p, c_void_p, c_void_p, c_size_t, c_int),
    "receive": (c_void_p, c_void_p, c_void_p, c_size_t, c_int, c_void_p),
}


def _addresses(tensors: Sequence[Tensor]) -> "ctypes.Array[c_void_p]":
    return (c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def _elements(counts: Sequence[int]) -> "ctypes.Array[c_size_t]":
    return (c_size_t * len(counts))(*counts)


class Native:
    """Only where `build.ranks` is there. A worker that sleeps says for whom, and looks whether it is still there."""

    link = "shared memory"

    def __init__(self, own: HostGroup) -> None:
        """Called by all workers of the group, of which this is the only use."""
        library = build.ranks()
        assert library is not None
        self._group = own
        self._operation = 0
        self._mesh, self._names, self._report = own.mesh, own.names, own.report
        self._clock = own.counters.clock
        self.stood: Stood = []
        self._before: Position | None = None  # where this worker stood when it went to sleep
        self._slept_for, self._slept_at = -1, 0.0
        self._call = {name: getattr(library, f"shoal_ranks_{name}") for name in _TAKES}
        for name, takes in _TAKES.items():
            self._call[name].argtypes = takes
        self._error = library.shoal_ranks_error
        self._error.restype = c_char_p
        self._in_place = library.shoal_ranks_in_place
        self._in_place.argtypes, self._in_place.restype = (c_void_p,), c_uint64
        library.shoal_ranks_bytes.argtypes, library.shoal_ranks_bytes.restype = (c_int, c_size_t), c_size_t
        unlimited = resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
        ring = min(LARGEST_RING, RINGS // own.world**2 // PAGE * PAGE) if unlimited else RING
        self._memory = own.heap.tensor(library.shoal_ranks_bytes(own.world, ring), torch.uint8)
        me = weakref.ref(self)  # the library holds on to the function, and that must not hold on to this
        self._asleep = _Asleep(lambda whom: carrier._sleeps(whom) if (carrier := me()) else 1)
        bases = own.arenas.bases
        arenas = (c_void_p * own.world)(*bases) if own.arenas.bytes else None
        opened = library.shoal_ranks_open
        opened.restype = c_void_p
        opened.argtypes = (c_void_p, c_int, c_int, c_char_p, c_void_p, c_int, c_size_t, c_void_p, c_size_t, _Asleep)
        label = f"of ranks {', '.join(map(str, own.names))}".encode()
        self._ranks = opened(
            self._memory.data_ptr(), own.rank, own.world, label, (c_int * own.world)(*own.names),
            _cores(own), ring, arenas, own.arenas.bytes, self._asleep,
        )  # fmt: skip
        if not self._ranks:
            raise RunFailed(self._error().decode())
        library.shoal_ranks_close.argtypes = (c_void_p,)
        weakref.finalize(self, _close, library, self._ranks, self._memory, self._asleep).atexit = False

    def _sleeps(self, whom: int) -> int:
        """Called before this worker sleeps for ``whom``, and with -1 when it goes on. 0: that one has gone."""
        now = self._clock()
        if self._before is not None and whom != self._slept_for:
            self.stood.append((self._slept_for, now - self._slept_at))
        if whom < 0:
            if self._before is not None:
                self._report(self._before.phase, shard=self._before.shard)
                self._before = None
            return 1
        if self._before is None or whom != self._slept_for:
            self._before = self._before or self._report.position
            self._slept_for, self._slept_at = whom, now
            self._report(Phase.waiting, peer=self._names[whom])
        return int(not self._mesh.gone(whom))

    def _agreed(self, name: str, signature: str, *arguments: object) -> None:
        """A collective. What all say is compared in C++; where it differs all ranks hear of it, and then say it."""
        self._operation += 1
        code = self._call[name](self._ranks, digest(signature), *arguments)
        if code == _MISMATCH:
            said = [row.decode() for row in self._group.gather(signature.encode())]
            compare(said, self._names, self._operation)
        if code:
            self._fail(code)

    def _fail(self, code: int) -> NoReturn:
        raise _ERRORS.get(code, RunFailed)(self._error().decode())

    @property
    def in_place(self) -> int:
        """How many operations have read and written tensors in the arenas, where they lay."""
        return int(self._in_place(self._ranks))

    def all_reduce(self, source: Tensor, out: Tensor, signature: str) -> None:
        self._agreed("all_reduce", signature, source.data_ptr(), out.data_ptr(), source.numel(), _CODES[source.dtype])

    def all_gather(self, source: Tensor, outs: Sequence[Tensor], signature: str) -> None:
        counts = _elements([out.numel() for out in outs])
        self._agreed("all_gather", signature, source.data_ptr(), _addresses(outs), counts, _CODES[source.dtype])

    def reduce_scatter(self, sources: Sequence[Tensor], out: Tensor, signature: str) -> None:
        counts = _elements([source.numel() for source in sources])
        self._agreed("reduce_scatter", signature, _addresses(sources), out.data_ptr(), counts, _CODES[out.dtype])

    def all_to_all(self, sources: Sequence[Tensor], outs: Sequence[Tensor], counts: Counts, signature: str) -> None:
        sends, receives = (_elements([t.numel() for t in tensors]) for tensors in (sources, outs))
        self._agreed(
            "all_to_all", signature, _addresses(sources), sends, _addresses(outs), receives, _CODES[outs[0].dtype]
        )

    def broadcast(self, data: Tensor, root: int, signature: str) -> None:
        self._agreed("broadcast", signature, data.data_ptr(), data.numel(), _CODES[data.dtype], root)

    def barrier(self) -> None:
        self._agreed("barrier", "barrier")

    def send(self, data: Tensor, to: int) -> None:
        code = self._call["send"](self._ranks, _head(data), data.data_ptr(), data.nbytes, to)
        if code:
            self._fail(code)

    def receive(self, out: Tensor, origin: int) -> None:
        came = (c_uint64 * _HEAD_WORDS)()
        code = self._call["receive"](self._ranks, _head(out), out.data_ptr(), out.nbytes, origin, came)
        if code == _ANOTHER:
            _, kind, dims, *sizes = came
            sent = told(torch.empty(sizes[:dims], dtype=DTYPES[kind], device="meta"))
            compare_message(sent, out, self._names[origin], self._names[self._mesh.rank])
        if code:
            self._fail(code)


def _close(library: ctypes.CDLL, ranks: int, *used: object) -> None:
    """Closes it before what it uses goes."""
    library.shoal_ranks_close(ranks)


def _head(tensor: Tensor) -> "ctypes.Array[c_uint64]":
    """What goes before a message: bytes, type, dims, sizes."""
    return (c_uint64 * _HEAD_WORDS)(tensor.nbytes, _CODES[tensor.dtype], tensor.dim(), *tensor.shape)


def _cores(group: HostGroup) -> int:
    """Cores that this group may spin on: none where the host's processes outnumber them."""
    board = group.report.board
    processes = board.workers if board else group.world
    return usable_cores() if processes <= usable_cores() else 0
