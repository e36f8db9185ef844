"""Compile the C++ parts once, into a cache, and load them; None where there is no compiler.

Five libraries: `kernels` (plain C functions on memory), `ranks` (collectives over shared memory), `generation` (a step
of a language model), `allocator` (torch's memory) and `backend` (a torch extension). The first three know nothing of
torch, the last takes a minute to compile, the others seconds. A library's file name holds a hash of its sources,
flags, compiler and, where it needs it, torch, so that a stale one is never loaded. A wheel may carry libraries in
native/prebuilt, which need no compiler where they are used; else they are made on first use. SHOAL_NATIVE=0 goes
without. setup.py loads this file alone, before shoal is installed: it imports nothing of Shoal.
"""

import atexit
import ctypes
import errno
import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
PREBUILT = HERE / "prebuilt"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread", "-Wall")
# -ffp-contract=off: a fused multiply-add rounds once where torch rounds twice; the bits must not depend on the compiler
KEPT = 6  # libraries of one name in the cache: other versions and environments share it
REFUSAL_S = 300.0  # how long what the compiler refused is not tried again: the ranks of a job all come here


@dataclass(frozen=True)
class Library:
    name: str
    sources: tuple[Path, ...]
    flags: tuple[str, ...]  # beside FLAGS
    paths: tuple[str, ...]  # -I and the like: where things lie on this machine decides nothing
    libraries: tuple[str, ...]  # at the end of the command line
    key: str  # what beside sources and flags decides the result
    together: tuple[Path, ...] = ()  # sources whose common headers take longest: several of them are compiled as one

    def file_name(self, compiler: str = "") -> str:
        """The file's name in the cache; without ``compiler``, among the prebuilt ones, whoever compiled them."""
        digest = hashlib.sha256()
        for part in (*FLAGS, *self.flags, *self.libraries, self.key, _version(compiler) if compiler else ""):
            digest.update(part.encode() + b"\0")
        folders = sorted({source.parent for source in self.sources} | {HERE / "kernels"})
        headers = [file for folder in folders for file in folder.glob("*.hpp")]
        for file in sorted({*self.sources, *headers}):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
        return f"shoal_{self.name}-{digest.hexdigest()[:16]}.so"


def _sources(folder: str) -> tuple[Path, ...]:
    return tuple(sorted((HERE / folder).glob("*.cpp")))


def kernels_library() -> Library:
    sources = tuple(file for file in _sources("kernels") if not file.name.startswith("shm_"))
    return Library("kernels", sources, (), (), (), platform.machine())


def _transport_sources() -> tuple[Path, ...]:
    return tuple(file for file in _sources("kernels") if file.name.startswith("shm_"))


def ranks_library() -> Library:
    """The shared-memory transport by itself."""
    return Library("ranks", _transport_sources(), (), (), (), platform.machine())


def generation_library() -> Library:
    """A step of a GPT over a paged cache. GCC 12 warns of its own intrinsics."""
    flags = ("-Wno-uninitialized", "-Wno-maybe-uninitialized")
    return Library("generation", _sources("generation"), flags, (), (), platform.machine())


def allocator_library() -> Library:
    """Torch's allocator over shared memory: the one part of torch's headers that it needs compiles in seconds.

    Raises ImportError where torch is missing."""
    import torch

    root = Path(torch.__file__).parent
    return Library(
        "allocator",
        _sources("allocator"),
        (f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",),
        ("-isystem", str(root / "include"), f"-L{root / 'lib'}"),
        ("-lc10",),
        f"{platform.machine()} torch {torch.__version__}",
    )


def backend_library() -> Library:
    """The torch extension. Raises ImportError where torch is missing."""
    import torch

    root = Path(torch.__file__).parent
    include, own = root / "include", _sources("backend")
    return Library(
        "backend",
        (*own, *_transport_sources()),
        (
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            "-DTORCH_EXTENSION_NAME=shoal_backend",
            "-DUSE_C10D_GLOO",
        ),
        (
            f"-I{HERE / 'kernels'}",
            "-isystem", str(include),
            "-isystem", str(include / "torch" / "csrc" / "api" / "include"),
            "-isystem", sysconfig.get_path("include"),
            f"-L{root / 'lib'}",
        ),
        # No run path: torch is imported before, so its libraries are in the process already.
        ("-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"),
        f"{platform.machine()} torch {torch.__version__} python {sys.version}",
        own,
    )  # fmt: skip


MAKERS = (kernels_library, ranks_library, generation_library, allocator_library, backend_library)


def compiler() -> str | None:
    """The C++ compiler that would be used: $CXX, or the first of c++, g++, clang++ on the path."""
    named = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [named] if named else ("c++", "g++", "clang++"))), None)


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout.split("\n")[0]


def cache_folder() -> Path:
    """$SHOAL_NATIVE_CACHE, or native/ in Shoal's cache."""
    base = os.environ.get("SHOAL_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "shoal"
    )
    return Path(os.environ.get("SHOAL_NATIVE_CACHE") or os.path.join(base, "native"))


def _shared_temporary() -> Path:
    return Path(tempfile.gettempdir()) / f"shoal-native-{os.getuid()}"


def _temporary_folder() -> Path:
    """A folder of this user's own among the temporary files, the same one for all processes where that can be."""
    shared = _shared_temporary()
    with suppress(OSError):
        shared.mkdir(mode=0o700, exist_ok=True)
        state = shared.lstat()  # somebody else may have made it first: code from there is not loaded
        if stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid() and not state.st_mode & 0o077:
            return shared
    own = tempfile.mkdtemp(prefix="shoal-native-")
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return Path(own)


def _places() -> Iterator[Path]:
    yield cache_folder()
    yield _temporary_folder()


class Failed(Exception):
    """A library could not be compiled; ``log`` is what the compiler said."""

    def __init__(self, why: str, log: str = "") -> None:
        first = next((line.strip() for line in log.splitlines() if "error" in line), "")
        super().__init__(f"{why}: {first}" if first else why)
        self.why, self.log = why, log


def compiled(library: Library, folder: Path | None = None) -> Path:
    """The library's file, compiled now if need be. Processes that ask at the same time compile once. Raises Failed."""
    if not library.sources:
        raise Failed(f"the sources of {library.name} are missing")
    prebuilt = PREBUILT / library.file_name()
    if prebuilt.exists():
        return prebuilt
    found = compiler()
    if found is None:
        raise Failed(_no_compiler())
    name = library.file_name(found)
    why = ""
    for place in [folder] if folder else _places():
        try:
            return _in_cache(found, library, place, name)
        except OSError as error:
            why = f"{str(place)!r} cannot be written: {error.strerror}"
    raise Failed(why)


def outlook() -> dict[str, str]:
    """What would become of each library, without compiling it: "ready", "on first use", or what stands in the way."""
    out = {}
    for make in MAKERS:
        name = make.__name__.removesuffix("_library")
        try:
            out[name] = _outlook(make())
        except ImportError as error:
            out[name] = str(error)
    return out


def _outlook(library: Library) -> str:
    if not wanted():
        return "SHOAL_NATIVE=0 is set"
    if (PREBUILT / library.file_name()).exists():
        return "ready"
    found = compiler()
    if found is None:
        return _no_compiler()
    name = library.file_name(found)
    if any((place / name).exists() for place in (cache_folder(), _shared_temporary())):
        return "ready"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if library.name == "backend" and not header.exists():
        return f"{header} is missing: install the headers of Python (python3-dev or python3-devel)"
    with suppress(OSError):
        return " ".join((cache_folder() / f"{name}.refused").read_text(encoding="utf-8").split("\n")[0].split())
    return "on first use"


def _no_compiler() -> str:
    named = os.environ.get("CXX")
    return f"CXX names {named!r}, which is not there" if named else "there is no C++ compiler (c++, g++ or clang++)"


def _in_cache(compiler: str, library: Library, place: Path, name: str) -> Path:
    file, refused = place / name, place / f"{name}.refused"
    if not file.exists():
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (place / f"{library.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel, however the holder ends
            if not file.exists():
                _raise_again(library, refused)
                try:
                    _compile(compiler, library, file)
                except Failed as failed:
                    refused.write_text(f"{failed.why}\n{failed.log}", encoding="utf-8", errors="replace")
                    raise
                _prune(place, library)
    with suppress(OSError):
        os.utime(file)  # says that it is in use
    return file


def _raise_again(library: Library, refused: Path) -> None:
    with suppress(FileNotFoundError):
        if time.time() - refused.stat().st_mtime < REFUSAL_S:
            why, _, log = refused.read_text(encoding="utf-8").partition("\n")
            raise Failed(why, log)
        refused.unlink()


def _prune(place: Path, library: Library) -> None:
    """Remove the libraries of this name that were not used for longest. One that is loaded stays in its process."""
    for pattern in (f"shoal_{library.name}-*.so", f"shoal_{library.name}-*.refused"):
        for old in sorted(place.glob(pattern), key=lambda file: -file.stat().st_mtime)[KEPT:]:
            old.unlink(missing_ok=True)


def _compile(compiler: str, library: Library, file: Path) -> None:
    """Raises Failed, and OSError where the disk is full."""
    if library.name == "backend":
        print("shoal: compiling the shared-memory backend, once: about a minute", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        units = _units(library, Path(scratch))
        objects = [Path(scratch) / f"{number}.o" for number in range(len(units))]
        base = [compiler, *FLAGS, *library.flags, *library.paths]
        with ThreadPoolExecutor(_cores()) as pool:
            works = [
                pool.submit(_told, [*base, "-c", str(source), "-o", str(made)], library)
                for source, made in zip(units, objects, strict=True)
            ]
        for work in works:
            work.result()
        made = Path(scratch) / file.name
        _told([*base, "-shared", *map(str, objects), "-o", str(made), *library.libraries], library)
        made.rename(file)


def _units(library: Library, scratch: Path) -> list[Path]:
    """What is compiled by itself: sources, and files that include those which are compiled together, one a core."""
    units = []
    for number in range(min(_cores(), len(library.together))):
        units.append(scratch / f"unit{number}.cpp")
        included = library.together[number :: _cores()]
        units[-1].write_text("".join(f'#include "{source}"\n' for source in included), encoding="utf-8")
    return [*units, *(source for source in library.sources if source not in library.together)]


def _told(command: list[str], library: Library) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False, stdin=subprocess.DEVNULL
    )
    if done.returncode and "No space left on device" in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if done.returncode:
        raise Failed(f"{command[0]} could not compile {library.name} (exit code {done.returncode})", done.stderr)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prebuild(folder: Path) -> list[str]:
    """Compile what can be into ``folder``, under the names of prebuilt libraries; what could not be, a line each."""
    if not wanted():
        return ["SHOAL_NATIVE=0 is set"]
    without = []
    for make in MAKERS:
        try:
            library, found = make(), compiler()
            if found is None:
                raise Failed(_no_compiler())
            if library.sources:
                folder.mkdir(parents=True, exist_ok=True)
                _compile(found, library, folder / library.file_name())
        except (Failed, ImportError, OSError) as error:
            without.append(f"{make.__name__.removesuffix('_library')}: {error}")
    return without


def wanted() -> bool:
    return os.environ.get("SHOAL_NATIVE", "1") != "0"


def _loaded(make: Callable[[], Library]) -> ctypes.CDLL | Failed:
    try:
        return ctypes.CDLL(str(compiled(make())))
    except (Failed, ImportError, OSError) as error:
        return error if isinstance(error, Failed) else Failed(str(error))


@cache
def _kernels() -> ctypes.CDLL | Failed:
    return _loaded(kernels_library)


@cache
def _ranks() -> ctypes.CDLL | Failed:
    return _loaded(ranks_library)


@cache
def _generation() -> ctypes.CDLL | Failed:
    return _loaded(generation_library)


@cache
def _allocator() -> ctypes.CDLL | Failed:
    return _loaded(allocator_library)


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


def ranks() -> ctypes.CDLL | None:
    """The collectives of native/kernels/shm_calls.cpp, or None."""
    found = _ranks() if wanted() else None
    return found if isinstance(found, ctypes.CDLL) else None


def generation() -> ctypes.CDLL | None:
    """The functions of native/generation/calls.cpp, or None."""
    found = _generation() if wanted() else None
    return found if isinstance(found, ctypes.CDLL) else None


def allocator() -> ctypes.CDLL | None:
    """Torch's allocator over shared memory, or None."""
    found = _allocator() if wanted() else None
    return found if isinstance(found, ctypes.CDLL) else None


def backend() -> ModuleType | None:
    """The torch extension module, or None. `why_not` says why."""
    found = _backend() if wanted() else None
    return found if isinstance(found, ModuleType) else None


def why_not(names: Sequence[str] = ("kernels", "backend")) -> str:
    """Why a library is not there, in one line; "" when all are."""
    if not wanted():
        return "SHOAL_NATIVE=0 is set"
    tried = {
        "kernels": _kernels,
        "ranks": _ranks,
        "generation": _generation,
        "allocator": _allocator,
        "backend": _backend,
    }
    found = [str(result) for result in (tried[name]() for name in names) if isinstance(result, Failed)]
    return "; ".join(dict.fromkeys(found))  # one reason for both is told once
