"""A corpus: the text files of a file, a folder or the Python standard library, read in one fixed order."""

import fnmatch
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from shoal.errors import UserError

STDLIB = "@stdlib"
STDLIB_MAX_BYTES = 16 << 20
# Tests and tables are left out: they are long, and a model learns little Python from them.
STDLIB_WITHOUT = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)
CHUNK_BYTES = 1 << 18


@dataclass(frozen=True)
class Corpus:
    """Files in order, cut at a line's end after at most ``max_bytes`` bytes (0: no cut)."""

    name: str
    files: tuple[Path, ...]
    max_bytes: int = 0

    def raw(self) -> Iterator[bytes]:
        """The text in chunks of whole lines. A file that does not end its last line has it ended here."""
        left = self.max_bytes or float("inf")
        for path in self.files:
            try:
                with path.open("rb") as file:
                    end = b"\n"
                    while lines := file.readlines(CHUNK_BYTES):
                        chunk = b"".join(lines)
                        if len(chunk) > left:
                            chunk = chunk[: chunk.rfind(b"\n", 0, int(left)) + 1]
                            if chunk:
                                yield chunk
                            return
                        left -= len(chunk)
                        end = chunk[-1:]
                        yield chunk
            except OSError as error:
                raise UserError(f"cannot read {str(path)!r}: {error.strerror}.") from None
            if end != b"\n" and len(self.files) > 1:
                left -= 1
                yield b"\n"

    def text(self) -> Iterator[str]:
        """The same chunks as text: UTF-8, with U+FFFD for bytes that are not."""
        return (chunk.decode("utf-8", errors="replace") for chunk in self.raw())

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for chunk in self.raw():
            digest.update(chunk)
        return digest.hexdigest()


def open_corpus(path: str, pattern: str = "*", max_bytes: int = 0) -> Corpus:
    """The corpus at ``path``: a file; a folder (its files matching ``pattern``, at any depth, sorted by their path,
    hidden ones left out); or "@stdlib", the sources of the running Python's own standard library.

    Raises UserError when there is nothing to read."""
    if path == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        return Corpus(path, _sorted_files(root, "*.py", STDLIB_WITHOUT), max_bytes or STDLIB_MAX_BYTES)
    root = Path(path).expanduser()
    if root.is_dir():
        files = _sorted_files(root, pattern, frozenset())
        if not files:
            raise UserError(f"data: no file in folder {path!r} matches pattern {pattern!r}: check path and pattern.")
        return Corpus(path, files, max_bytes)
    if not root.is_file():
        raise UserError(f"data: no file or folder {path!r}: check data.path.")
    return Corpus(path, (root,), max_bytes)


def _sorted_files(root: Path, pattern: str, without: frozenset[str]) -> tuple[Path, ...]:
    found: list[Path] = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in without and name[0] != "."]  # not even looked into
        found += [Path(folder, name) for name in fnmatch.filter(names, pattern) if name[0] != "."]
    return tuple(sorted((path for path in found if path.is_file()), key=lambda path: path.parts))
