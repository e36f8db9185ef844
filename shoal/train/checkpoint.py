"""Checkpoints on disk: written atomically, verified byte by byte when loaded, walked back to the newest whole one.

    checkpoints/step-00000120/manifest.json             what the other files hold, with a hash for each chunk
                              state-00000.safetensors   tensors, readable by any safetensors reader

A folder gets its name only once all of its files are on disk, so there is no pointer that could mislead: the newest
checkpoint is the whole one with the highest step, the best is the newest one whose manifest carries the mark.
"""

import errno
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.errors import ShoalError
from shoal.train import checkpoint_manifest
from shoal.train.checkpoint_files import (
    broken_chunks,
    clear_leftovers,
    remove_folder,
    sync_folder,
    temporary,
    write_hashed,
)
from shoal.train.checkpoint_layout import DTYPES, Shard, lay_out
from shoal.train.checkpoint_manifest import CheckpointError, Manifest, StoredFile, plain_facts
from shoal.train.weights import byte_pieces

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Listed",
    "best",
    "damage",
    "is_folder_name",
    "listing",
    "load",
    "newest",
    "plain_facts",
    "prune",
    "read_manifest",
    "save",
]

MANIFEST = "manifest.json"
SHARD_BYTES = 512 << 20
CHUNK_BYTES = 4 << 20
_FOLDER = re.compile(r"step-(\d{8,})(?:\.(\d+))?")  # .1, .2: the same step, written again


@dataclass(frozen=True)
class Checkpoint:
    tensors: Mapping[str, Tensor]  # "model/<name>", "optimizer/<parameter name>/<key>"
    facts: Mapping[str, Any]  # plain JSON values; "step" must be there

    @property
    def step(self) -> int:
        return int(self.facts["step"])


@dataclass(frozen=True)
class Listed:
    path: Path
    step: int
    bytes: int  # of the tensor files; 0 when the manifest cannot be read
    saved_at: float  # seconds since 1970
    best: bool  # marked as the best so far when it was written
    problem: str  # "" when it is whole, as far as was looked


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


def save(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    best: bool = False,
    shard_bytes: int = SHARD_BYTES,
    chunk_bytes: int = CHUNK_BYTES,
    warn: Callable[[str], None] = _warn,
) -> Path:
    """Write folder/step-<step> and return its path; it exists whole or not at all, whenever the process is killed.

    When the step is there already, the new one is written beside it as step-<step>.1 and then replaces it. Leftovers
    of killed writers are cleared first. ``warn`` gets one line when the disk looks too full.
    Raises CheckpointError when it cannot be written; its own partial files are gone then, all others untouched."""
    step = checkpoint.facts.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise CheckpointError(f"checkpoint: facts['step'] must be a whole number from 0 on, got {step!r}.")
    facts = plain_facts(checkpoint.facts)
    shards = lay_out(checkpoint.tensors, shard_bytes)
    hidden: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clear_leftovers(folder)
        _check_space(folder, sum(shard.bytes for shard in shards), warn)
        hidden = temporary(folder, "writing", f"step-{step:08d}")
        hidden.mkdir()
        files = tuple(write_hashed(hidden / s.name, _shard_pieces(s, checkpoint), chunk_bytes) for s in shards)
        tensors = {name: stored for shard in shards for name, stored in shard.tensors.items()}
        manifest = Manifest(facts, best, time.time(), chunk_bytes, files, tensors)
        write_hashed(hidden / MANIFEST, [checkpoint_manifest.encode(manifest)], chunk_bytes)
        sync_folder(hidden)
        path = _rename_to_free_name(hidden, folder, step)
        sync_folder(folder)
    except BaseException as error:
        if hidden is not None:
            with suppress(OSError):
                remove_folder(hidden)
        if isinstance(error, OSError):
            raise CheckpointError(f"cannot write a checkpoint of step {step} in {folder}: {error.strerror}.") from error
        raise
    for older in _folders(folder):
        if older != path and _number(older)[0] == step and (best or not _marked_best(older)):
            try:
                remove_folder(older)
            except OSError as error:
                warn(f"{older} has been replaced but cannot be removed: {error.strerror}.")
    return path


def _shard_pieces(shard: Shard, checkpoint: Checkpoint) -> Iterator[memoryview | bytes]:
    return chain([shard.header], chain.from_iterable(byte_pieces(checkpoint.tensors[name]) for name in shard.order))


def _check_space(folder: Path, needed: int, warn: Callable[[str], None]) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        warn(f"a checkpoint needs {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free in {folder}: make room there.")


def _rename_to_free_name(hidden: Path, folder: Path, step: int) -> Path:
    versions = [version for found, version in map(_number, _folders(folder)) if found == step]
    version = max(versions, default=-1) + 1
    while True:
        path = folder / f"step-{step:08d}{f'.{version}' if version else ''}"
        try:
            os.rename(hidden, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            version += 1  # another writer took the name meanwhile
        else:
            return path


def is_folder_name(name: str) -> bool:
    """Whether ``save`` gives such a name to a checkpoint's folder."""
    return _FOLDER.fullmatch(name) is not None


def _number(path: Path) -> tuple[int, int]:
    """(step, version): the order of age of checkpoint folders."""
    match = _FOLDER.fullmatch(path.name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, -1)


def _folders(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first, whole or not."""
    try:
        names = [entry for entry in folder.iterdir() if is_folder_name(entry.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror}).") from None
    return sorted(names, key=_number, reverse=True)


def _marked_best(path: Path) -> bool:
    with suppress(CheckpointError):
        return read_manifest(path).best
    return False


def read_manifest(path: Path) -> Manifest:
    """The checkpoint's manifest, checked against its own hash. Raises CheckpointError naming the file."""
    file = path / MANIFEST
    try:
        if file.exists() and not file.is_file():  # opening a pipe would wait for ever
            raise CheckpointError(f"{file}: is not a file.")
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            raw = stream.read(min(size, checkpoint_manifest.LIMIT_BYTES) + 1)  # a buffer for what is there, no more
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}).") from None
    if len(raw) > checkpoint_manifest.LIMIT_BYTES:
        raise CheckpointError(f"{file}: is larger than {checkpoint_manifest.LIMIT_BYTES} bytes.")
    try:
        manifest = checkpoint_manifest.decode(raw)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}.") from None
    if is_folder_name(path.name) and manifest.facts["step"] != _number(path)[0]:  # order goes by the folders' names
        raise CheckpointError(f"{file}: is of step {manifest.facts['step']}, its folder was renamed.")
    return manifest


def _size_problem(file: Path, stored: StoredFile) -> str:
    try:
        if not file.is_file():
            return f"{file}: is missing." if not file.exists() else f"{file}: is not a file."
        size = file.stat().st_size
    except OSError as error:
        return f"{file}: cannot be read ({error.strerror})."
    return "" if size == stored.bytes else f"{file}: has {size} bytes, {stored.bytes} were written."


def _chunk_problem(file: Path, number: int, manifest: Manifest, stored: StoredFile) -> str:
    start = number * manifest.chunk_bytes
    end = min(start + manifest.chunk_bytes, stored.bytes)
    names = manifest.hit(stored.name, start, end)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    where = f" (holds {', '.join(names[:3])}{more})" if names else " (holds the file's header)"
    return f"{file}: bytes {start} to {end - 1}{where} are not those that were written."


def load(path: Path) -> Checkpoint:
    """Read a checkpoint; all of its bytes are checked against the manifest before any is used.

    The tensors are views of the files, mapped: what nobody reads takes no memory. They may be written to, which stays
    in this process. Raises CheckpointError naming the first file that is wrong."""
    manifest = read_manifest(path)
    for stored in manifest.files:
        if problem := _size_problem(path / stored.name, stored):
            raise CheckpointError(problem)
    buffers: dict[str, Tensor] = {}
    for stored in manifest.files:
        file = path / stored.name
        try:
            for number in broken_chunks(file, stored, manifest.chunk_bytes):
                raise CheckpointError(_chunk_problem(file, number, manifest, stored))
            buffers[stored.name] = torch.from_file(str(file), shared=False, size=stored.bytes, dtype=torch.uint8)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror}).") from None
    tensors = {
        name: buffers[t.file][t.start : t.end].view(DTYPES[t.dtype]).reshape(t.shape)
        for name, t in manifest.tensors.items()
    }
    return Checkpoint(tensors, manifest.facts)


def damage(path: Path) -> list[str]:
    """Everything that is wrong with a checkpoint, one line each, after reading all of it; [] when it is whole."""
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [str(error)]
    lines: list[str] = []
    for stored in manifest.files:
        file = path / stored.name
        if problem := _size_problem(file, stored):
            lines.append(problem)
            continue
        try:
            for number in broken_chunks(file, stored, manifest.chunk_bytes):
                lines.append(_chunk_problem(file, number, manifest, stored))
        except OSError as error:
            lines.append(f"{file}: cannot be read ({error.strerror}).")
    return lines


def newest(folder: Path) -> tuple[Checkpoint | None, Path | None, list[tuple[Path, str]]]:
    """The newest whole checkpoint and its path (None, None when there is none), and the newer ones that were skipped,
    each with why, newest first. A broken checkpoint never raises; CheckpointError when the folder cannot be listed."""
    return _first_whole(_folders(folder))


def best(folder: Path) -> tuple[Checkpoint | None, Path | None, list[tuple[Path, str]]]:
    """As ``newest``, among those that were the best so far when they were written."""
    return _first_whole([listed.path for listed in listing(folder) if listed.best])


def _first_whole(paths: list[Path]) -> tuple[Checkpoint | None, Path | None, list[tuple[Path, str]]]:
    skipped: list[tuple[Path, str]] = []
    for path in paths:
        try:
            return load(path), path, skipped
        except ShoalError as error:
            skipped.append((path, str(error)))
    return None, None, skipped


def listing(folder: Path, verify: bool = False) -> list[Listed]:
    """The checkpoints in a folder, newest first. Looks at manifests and file sizes; with ``verify``, at every byte."""
    return [_listed(path, verify) for path in _folders(folder)]


def _listed(path: Path, verify: bool) -> Listed:
    step = _number(path)[0]
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return Listed(path, step, 0, 0.0, False, str(error))
    problems = damage(path) if verify else [_size_problem(path / stored.name, stored) for stored in manifest.files]
    return Listed(path, step, manifest.bytes, manifest.saved_at, manifest.best, next(filter(None, problems), ""))


def prune(folder: Path, keep: int) -> list[Path]:
    """Remove old checkpoints beyond the newest ``keep`` whole ones; returns what was removed.

    The best one stays, and so does the newest that is whole to the last byte: before anything goes, the newest is read
    back in full, and the next one when it is not whole. Those newer than it stay, for a look at what broke them."""
    found = listing(folder)
    kept = [listed for listed in found if not listed.problem][: max(keep, 1)]
    marked = [listed for listed in found if listed.best and not listed.problem][:1]
    stay = {listed.path for listed in (*kept, *marked)}
    if all(listed.path in stay for listed in found):
        return []
    whole = next((listed for listed in found if not listed.problem and not damage(listed.path)), None)
    if whole is None:
        return []
    old = found[found.index(whole) + 1 :]
    gone = [listed.path for listed in old if listed.path not in stay]
    for path in gone:
        remove_folder(path)
    return gone
