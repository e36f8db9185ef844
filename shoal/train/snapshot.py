"""Checkpoints written behind the training loop: it pays for a copy in memory, a thread does the rest."""

import shutil
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from shoal.errors import ShoalError
from shoal.memory.shelves import file_of
from shoal.train import checkpoint


@dataclass(frozen=True)
class Written:
    """What became of one submitted checkpoint."""

    step: int
    path: Path | None  # None: it was not written, and error says why
    bytes: int  # of tensor data
    stall_s: float  # seconds that the training loop stood still: waiting for the previous write, and the copy
    write_s: float  # seconds of the thread: hashing, writing, pruning
    best: bool
    error: str  # "" when it was written
    warnings: tuple[str, ...] = ()


class BackgroundWriter:
    """Writes checkpoints of changing tensors into one folder. One thread submits, polls and closes.

    A submitted state is copied into memory that was allocated and touched before, then hashed and written by a
    thread while training goes on. One copy is held at a time. A write that fails is reported and nothing else is
    lost: training goes on, and `poll` tries it again once there is room for it, until a newer state takes its place.

        with BackgroundWriter(run.checkpoints, like=state, keep=3) as writer:
            ...
            stall_s = writer.submit(state, {"step": step}, best=False)
            for written in writer.poll(): ...
    """

    def __init__(
        self,
        folder: Path,
        like: Mapping[str, Tensor] | None = None,
        *,
        keep: int = 0,
        busy: Literal["wait", "skip"] = "wait",
        shard_bytes: int = checkpoint.SHARD_BYTES,
        chunk_bytes: int = checkpoint.CHUNK_BYTES,
        again_after_s: float = 1.0,
    ) -> None:
        """``like`` has the names, shapes and dtypes to come, so that the first submit finds its memory ready; what it
        does not name is allocated when it is first submitted. ``keep``: prune to so many after each write, 0 never.
        ``busy``: what a submit does while the previous write still runs; "skip" spares ordinary ones only.
        ``again_after_s``: from a failed write to the next try, twice as long after each."""
        self._folder, self._keep, self._busy = folder, keep, busy
        self._sizes = {"shard_bytes": shard_bytes, "chunk_bytes": chunk_bytes}
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._done: list[Written] = []
        self._lock = threading.Lock()
        self._closed = False
        self._failed: tuple[checkpoint.Checkpoint, bool] | None = None  # and whether it was the best
        self._patience_s = self._wait_s = again_after_s
        self._again_at = 0.0
        for name, tensor in (like or {}).items():
            self._copies[name] = _touched(tensor)

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def submit(
        self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], best: bool = False, final: bool = False
    ) -> float:
        """Copy the state and start to write it; returns the seconds that the caller was held up.

        Waits first while the previous write runs; with ``busy="skip"`` it gives up at once instead, and says so in
        ``poll``, unless the checkpoint is the ``best`` or the ``final`` one: those always wait and are never skipped.
        ``facts`` must hold "step"; they are copied too. What JSON cannot hold among them is told by ``poll``."""
        if self._closed:
            raise ShoalError("this checkpoint writer is closed: make a new one.")
        began = time.perf_counter()
        step = int(facts["step"])
        if self._running() and self._busy == "skip" and not (best or final):
            self._report(Written(step, None, 0, 0.0, 0.0, best, "skipped: the previous checkpoint is still written"))
            return time.perf_counter() - began
        self._join()
        try:
            plain = checkpoint.plain_facts(facts)
        except checkpoint.CheckpointError as error:
            self._report(Written(step, None, 0, 0.0, 0.0, best, str(error)))
            return time.perf_counter() - began
        self._failed, self._wait_s = None, self._patience_s
        state = checkpoint.Checkpoint(self._copy(tensors), plain)
        stall_s = time.perf_counter() - began
        self._start(state, best, stall_s)
        return stall_s

    def _start(self, state: checkpoint.Checkpoint, best: bool, stall_s: float, tries: int = 1) -> None:
        self._thread = threading.Thread(
            target=self._write, args=(state, best, stall_s, tries), name=f"checkpoint of step {state.step}"
        )
        self._thread.start()

    def _try_again(self) -> None:
        """What the disk had no room for, or did not take for another reason that may pass."""
        if self._failed is None or self._running() or time.monotonic() < self._again_at:
            return
        state, best = self._failed
        self._wait_s *= 2
        self._again_at = time.monotonic() + self._wait_s
        if _room(self._folder) >= sum(tensor.nbytes for tensor in state.tensors.values()):
            self._join()
            self._failed = None
            self._start(state, best, 0.0, tries=2)

    def poll(self) -> list[Written]:
        """What has been written, or has failed, since the last call; oldest first. Does not wait."""
        self._try_again()
        with self._lock:
            done, self._done = self._done, []
        return done

    def close(self) -> None:
        """Wait until everything is on disk. What came of it is left for ``poll``."""
        self._join()
        self._again_at = 0.0
        self._try_again()
        self._join()
        self._failed = None
        self._copies.clear()
        self._closed = True

    def _running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _report(self, written: Written) -> None:
        with self._lock:
            self._done.append(written)

    def _copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        copies: dict[str, Tensor] = {}
        devices: set[torch.device] = set()
        for name, tensor in tensors.items():
            copy = self._copies.get(name)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = self._copies[name] = _touched(tensor)
            copy = self._copies[name] = _filled(copy, tensor.detach())
            if tensor.device.type == "cuda":
                devices.add(tensor.device)
            copies[name] = copy
        for device in devices:  # copies from the accelerator run beside each other; all must have arrived
            torch.cuda.synchronize(device)
        return copies

    def _write(self, state: checkpoint.Checkpoint, best: bool, stall_s: float, tries: int) -> None:
        began, step = time.perf_counter(), state.step
        warnings: list[str] = []
        path: Path | None = None
        error = ""
        try:
            path = checkpoint.save(state, self._folder, best=best, warn=warnings.append, **self._sizes)
        except Exception as problem:  # whatever it is, training goes on and hears of it
            error = str(problem) if isinstance(problem, ShoalError) else f"{type(problem).__name__}: {problem}"
            if isinstance(problem.__cause__, OSError):
                self._failed, self._again_at = (state, best), time.monotonic() + self._wait_s
            if tries > 1:
                return  # it has been told, and so it will be when it has come through
        for copy in state.tensors.values():  # read through, and so in memory
            file = file_of(copy)
            if file is not None:
                file.done([copy])
        if self._keep and path is not None:
            try:
                checkpoint.prune(self._folder, self._keep)
            except OSError as problem:
                warnings.append(f"old checkpoints in {self._folder} could not be removed: {problem.strerror}.")
        size = sum(tensor.nbytes for tensor in state.tensors.values())
        took = time.perf_counter() - began
        self._report(Written(step, path, size, stall_s, took, best, error, tuple(warnings)))


def _room(folder: Path) -> float:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _filled(copy: Tensor, tensor: Tensor) -> Tensor:
    """``copy``, or memory in its place where the disk that it lies on is full."""
    file = file_of(copy)
    if file is not None:
        try:
            file.copied(tensor, copy)
            return copy
        except OSError:
            copy = torch.empty_like(copy)
    return copy.copy_(tensor, non_blocking=True)


def _touched(tensor: Tensor) -> Tensor:
    """Contiguous CPU memory of the tensor's shape with every page mapped; page-locked for an accelerator's tensor.

    For what lies in a file so as not to lie in memory: more of that file, as far as there is room."""
    file = file_of(tensor)
    if file is not None:
        with suppress(OSError):
            return file.make(tensor.shape, tensor.dtype)
    return torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda").fill_(0)
