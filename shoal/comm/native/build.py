"""Compile the C++ parts once, into a cache, and load them; None where there is no compiler.

Two libraries: `kernels` (plain C functions on memory, no torch, seconds to compile) and `backend` (a torch extension,
about a minute). A library's file name holds a hash of its sources, flags, compiler and (for the extension) torch, so
that a stale one is never loaded. An installation may carry libraries in native/prebuilt; else they are made on first
use. SHOAL_NATIVE=0 goes without.
"""

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
PREBUILT = HERE / "prebuilt"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-pthread", "-Wall")
# -ffp-contract=off: a fused multiply-add rounds once where torch rounds twice; the bits must not depend on the compiler


@dataclass(frozen=True)
class Library:
    name: str
    sources: tuple[Path, ...]
    flags: tuple[str, ...]  # beside FLAGS
    libraries: tuple[str, ...]  # at the end of the command line
    key: str  # what beside sources and flags decides the result

    def file_name(self, compiler: str) -> str:
        digest = hashlib.sha256()
        for part in (*FLAGS, *self.flags, *self.libraries, self.key, _version(compiler)):
            digest.update(part.encode() + b"\0")
        folders = sorted({source.parent for source in self.sources} | {HERE / "kernels"})
        for file in sorted(f for folder in folders for f in folder.iterdir() if f.suffix in (".cpp", ".hpp")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
        return f"shoal_{self.name}-{digest.hexdigest()[:16]}.so"


def _sources(folder: str) -> tuple[Path, ...]:
    return tuple(sorted((HERE / folder).glob("*.cpp")))


def kernels_library() -> Library:
    return Library("kernels", _sources("kernels"), (), (), platform.machine())


def backend_library() -> Library:
    """The torch extension. Raises ImportError where torch is missing."""
    import torch

    root = Path(torch.__file__).parent
    include, lib = root / "include", root / "lib"
    python = sysconfig.get_path("include")
    return Library(
        "backend",
        _sources("backend"),
        (
            f"-I{HERE / 'kernels'}",
            "-isystem", str(include),
            "-isystem", str(include / "torch" / "csrc" / "api" / "include"),
            "-isystem", python,
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            "-DTORCH_EXTENSION_NAME=shoal_backend",
            "-DUSE_C10D_GLOO",
        ),
        (f"-L{lib}", f"-Wl,-rpath,{lib}", "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"),
        f"{platform.machine()} torch {torch.__version__} python {sys.version}",
    )  # fmt: skip


def compiler() -> str | None:
    """The C++ compiler that would be used: $CXX, or the first of c++, g++, clang++ on the path."""
    named = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [named] if named else ("c++", "g++", "clang++"))), None)


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout.split("\n")[0]


def cache_folder() -> Path:
    base = os.environ.get("SHOAL_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "shoal"
    )
    return Path(base) / "native"


class Failed(Exception):
    """A library could not be compiled; ``log`` is what the compiler said."""

    def __init__(self, why: str, log: str = "") -> None:
        super().__init__(why)
        self.log = log


def compiled(library: Library, folder: Path | None = None) -> Path:
    """The library's file, compiled now if need be. Processes that ask at the same time compile once. Raises Failed."""
    found = compiler()
    if found is None:
        raise Failed("there is no C++ compiler (c++, g++ or clang++)")
    if not library.sources:
        raise Failed(f"the sources of {library.name} are missing")
    name = library.file_name(found)
    prebuilt = PREBUILT / name
    if prebuilt.exists():
        return prebuilt
    place = folder or cache_folder()
    file = place / name
    if file.exists():
        return file
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (place / f"{library.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel, however the holder ends
            if not file.exists():
                _compile(found, library, file)
    except OSError as error:
        raise Failed(f"{str(place)!r} cannot be written: {error.strerror}") from None
    return file


def _compile(compiler: str, library: Library, file: Path) -> None:
    if library.name == "backend":
        print("shoal: compiling the shared-memory backend, once: about a minute", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        made = Path(scratch) / file.name
        command = [compiler, *FLAGS, *library.flags, *map(str, library.sources), "-o", str(made), *library.libraries]
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise Failed(f"{compiler} could not compile {library.name} (exit code {done.returncode})", done.stderr)
        made.rename(file)


def wanted() -> bool:
    return os.environ.get("SHOAL_NATIVE", "1") != "0"


@cache
def _kernels() -> ctypes.CDLL | Failed:
    try:
        return ctypes.CDLL(str(compiled(kernels_library())))
    except (Failed, OSError) as error:
        return error if isinstance(error, Failed) else Failed(str(error))


@cache
def _backend() -> ModuleType | Failed:
    try:
        file = compiled(backend_library())
        spec = importlib.util.spec_from_file_location("shoal_backend", file)
        if spec is None or spec.loader is None:
            return Failed(f"{file} is no extension module")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except (Failed, ImportError, OSError) as error:
        return error if isinstance(error, Failed) else Failed(str(error))


def kernels() -> ctypes.CDLL | None:
    """The plain C functions, or None. `why_not` says why."""
    found = _kernels() if wanted() else None
    return found if isinstance(found, ctypes.CDLL) else None


def backend() -> ModuleType | None:
    """The torch extension module, or None. `why_not` says why."""
    found = _backend() if wanted() else None
    return found if isinstance(found, ModuleType) else None


def why_not(names: Sequence[str] = ("kernels", "backend")) -> str:
    """Why a library is not there, in one line; "" when all are."""
    if not wanted():
        return "SHOAL_NATIVE=0 is set"
    tried = {"kernels": _kernels, "backend": _backend}
    return "; ".join(str(r) for r in (tried[name]() for name in names) if isinstance(r, Failed))
