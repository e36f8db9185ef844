"""C++ parts are compiled once, never used when stale, and gone without where they cannot be had."""

import ctypes
import fcntl
import os
import shutil
import stat
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.comm.native import build
from shoal.comm.native.build import Failed, Library

ROOT = Path(__file__).parents[3]
needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Library:
    """A library of one function, with caches of its own."""
    monkeypatch.setenv("SHOAL_NATIVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "tiny.hpp").write_text("#define ANSWER 42\n")
    (tmp_path / "tiny.cpp").write_text('#include "tiny.hpp"\nextern "C" __attribute__((visibility("default"))) '
                                       "int answer() { return ANSWER; }\n")  # fmt: skip
    return Library("tiny", (tmp_path / "tiny.cpp",), (), (), (), "key")


@pytest.fixture
def fake_compiler(tmp_path, monkeypatch):
    """``fake_compiler(shell lines)`` becomes $CXX; each call but for the version adds a line to the returned file."""
    monkeypatch.setattr(build, "_version", lambda compiler: "fake 1.0")
    calls = tmp_path / "calls"
    calls.touch()

    def make(script: str) -> Path:
        file = tmp_path / "fake-c++"
        file.write_text(f'#!/bin/sh\ntest "$1" = --version && exit\necho "$@" >> {calls}\n{script}\n')
        file.chmod(0o755)
        monkeypatch.setenv("CXX", str(file))
        return calls

    return make


def answer(file: Path) -> int:
    return ctypes.CDLL(str(file)).answer()


@needs_compiler
def test_a_changed_source_header_flag_key_or_compiler_is_never_answered_by_an_old_library(tiny, tmp_path, monkeypatch):
    first = build.compiled(tiny)
    assert answer(first) == 42
    assert build.compiled(tiny) == first
    (tmp_path / "tiny.hpp").write_text("#define ANSWER 43\n")
    second = build.compiled(tiny)
    assert answer(second) == 43
    (tmp_path / "tiny.cpp").write_text(tiny.sources[0].read_text() + "\n")
    others = [tiny, replace(tiny, flags=("-DX",)), replace(tiny, key="another"), replace(tiny, libraries=("-lm",))]
    names = {first.name, second.name, *(library.file_name("c++") for library in others)}
    monkeypatch.setattr(build, "_version", lambda compiler: "another one")
    names |= {library.file_name("c++") for library in others}
    assert len(names) == 10
    assert tiny.file_name("c++") == replace(tiny, paths=("-I/elsewhere",)).file_name("c++")


@needs_compiler
def test_sources_whose_headers_take_longest_are_compiled_as_one_for_each_core(
    tiny, fake_compiler, tmp_path, monkeypatch
):
    calls = fake_compiler(f'exec {build.compiler()} "$@"')
    monkeypatch.setattr(build, "_cores", lambda: 2)
    parts = tuple(tmp_path / f"part{number}.cpp" for number in range(3))
    for number, part in enumerate(parts):
        part.write_text(f"int part{number}() {{ return {10**number}; }}\n")
    whole = tiny.sources[0].read_text().replace("ANSWER", "part0() + part1() + part2()")
    tiny.sources[0].write_text("int part0(); int part1(); int part2();\n" + whole)
    assert answer(build.compiled(replace(tiny, sources=(*parts, *tiny.sources), together=parts))) == 111
    assert len([line for line in calls.read_text().splitlines() if " -c " in line]) == 3


@needs_compiler
def test_a_prebuilt_library_needs_no_compiler(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    made = build.compiled(tiny)
    (tmp_path / "prebuilt").mkdir()
    shutil.copy(made, tmp_path / "prebuilt" / tiny.file_name())
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.compiled(tiny).parent == tmp_path / "prebuilt"
    (tmp_path / "tiny.hpp").write_text("#define ANSWER 43\n")
    with pytest.raises(Failed, match="no-such-compiler"):
        build.compiled(tiny)


def test_without_a_compiler_the_reason_is_one_line(tiny, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(Failed, match=r"^there is no C\+\+ compiler"):
        build.compiled(tiny)
    assert not Path(os.environ["SHOAL_NATIVE_CACHE"]).exists()


def test_missing_sources_are_told():
    with pytest.raises(Failed, match="sources of x are missing"):
        build.compiled(Library("x", (), (), (), (), ""))


def test_what_the_compiler_refused_is_told_and_not_tried_again_by_the_other_ranks(tiny, fake_compiler):
    calls = fake_compiler("echo 'note: hm' >&2; echo 'x.cpp:1: fatal error: Python.h: No such file' >&2; exit 3")
    for _ in range(2):
        with pytest.raises(Failed, match=r"exit code 3\): x.cpp:1: fatal error: Python.h") as failed:
            build.compiled(tiny)
        assert "note: hm" in failed.value.log
    assert len(calls.read_text().splitlines()) == 1
    (refused,) = build.cache_folder().glob("*.refused")
    os.utime(refused, (0, 0))  # long ago: a header may have been installed since
    with pytest.raises(Failed):
        build.compiled(tiny)
    assert len(calls.read_text().splitlines()) == 2
    assert not [file for file in build.cache_folder().iterdir() if file.suffix == ".so" or file.is_dir()]


def test_a_full_disk_sends_us_to_the_temporary_files(tiny, fake_compiler, tmp_path):
    calls = fake_compiler("echo 'fatal error: x: No space left on device' >&2; exit 1")
    with pytest.raises(Failed, match="cannot be written: No space left"):
        build.compiled(tiny)
    places = [line.split("-o ")[1] for line in calls.read_text().splitlines()]
    assert [str(tmp_path / "cache") in places[0], str(tmp_path / "temporary") in places[1]] == [True, True]


@needs_compiler
def test_a_cache_that_cannot_be_written_is_replaced_by_a_folder_of_ones_own_among_the_temporary_files(
    tiny, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SHOAL_NATIVE_CACHE", str(tmp_path / "file" / "cache"))
    made = build.compiled(tiny)
    assert made.parent == tmp_path / "temporary" / f"shoal-native-{os.getuid()}"
    assert stat.S_IMODE(made.parent.stat().st_mode) == 0o700
    assert answer(made) == 42
    assert build.compiled(tiny) == made


@needs_compiler
def test_code_is_not_loaded_from_a_folder_that_others_can_write(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SHOAL_NATIVE_CACHE", str(tmp_path / "file" / "cache"))
    planted = tmp_path / "temporary" / f"shoal-native-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    (planted / tiny.file_name(build.compiler())).write_text("planted")
    assert build.compiled(tiny).parent != planted


ASK = """
import sys
from pathlib import Path
from shoal.comm.native.build import Library, compiled
print(compiled(Library("tiny", (Path(sys.argv[1]),), (), (), (), "key")))
"""


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to see that both processes have come")
def test_processes_that_ask_at_the_same_time_compile_once(tiny, fake_compiler, monkeypatch):
    real = build.compiler()
    calls = fake_compiler(f'exec {real} "$@"')
    lock = build.cache_folder() / "tiny.lock"
    lock.parent.mkdir()
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        command = [sys.executable, "-c", ASK, str(tiny.sources[0])]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        asking = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(3)]
        deadline = time.monotonic() + 60
        while not all(_has_open(process.pid, lock) for process in asking):
            assert time.monotonic() < deadline
            os.sched_yield()
    files = {process.communicate()[0].strip() for process in asking}
    assert [process.returncode for process in asking] == [0, 0, 0]
    assert len(files) == 1
    assert answer(Path(files.pop())) == 42
    assert len([line for line in calls.read_text().splitlines() if " -c " in line]) == 1


def _has_open(pid: int, file: Path) -> bool:
    try:
        return any(os.path.realpath(fd) == str(file) for fd in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


def test_the_cache_keeps_the_libraries_that_were_used_last(tiny, fake_compiler):
    fake_compiler('while test "$1" != -o; do shift; done; touch "$2"')
    made = []
    for number in range(build.KEPT + 2):
        made.append(build.compiled(replace(tiny, key=str(number))))
        os.utime(made[-1], (number, number))
        build.compiled(replace(tiny, key="0"))  # used again and again
    left = set(build.cache_folder().glob("*.so"))
    assert left == {made[0], *made[-build.KEPT + 1 :]}


def test_shoal_native_0_goes_without(monkeypatch):
    monkeypatch.setenv("SHOAL_NATIVE", "0")
    assert (build.kernels(), build.backend(), build.why_not()) == (None, None, "SHOAL_NATIVE=0 is set")
    assert build.prebuild(Path("/nonexistent")) == ["SHOAL_NATIVE=0 is set"]


@pytest.fixture
def fresh_tries():
    for tried in (build._kernels, build._backend):
        tried.cache_clear()
    yield
    for tried in (build._kernels, build._backend):
        tried.cache_clear()


def test_a_file_that_is_no_library_is_gone_without(fresh_tries, fake_compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("SHOAL_NATIVE_CACHE", str(tmp_path / "cache"))
    fake_compiler('while test "$1" != -o; do shift; done; echo nonsense > "$2"')
    assert build.kernels() is None
    assert "invalid ELF header" in build.why_not(("kernels",)) or "too short" in build.why_not(("kernels",))


def _wheel(tmp_path: Path, **environment: str) -> tuple[str, list[str], str]:
    """The name of a wheel of this checkout, its files in native/, and what the build said.

    Without the transport's and the generation's sources: two libraries that would take a minute to compile, and are
    made as the kernels are."""
    copy = tmp_path / "checkout"
    if not copy.exists():
        copy.mkdir()
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, copy)
        leave = shutil.ignore_patterns("__pycache__", "prebuilt", "*.so", "shm_*.cpp")
        shutil.copytree(ROOT / "shoal", copy / "shoal", ignore=leave)
        shutil.rmtree(copy / "shoal" / "comm" / "native" / "generation")
    program = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=copy, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": "", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(file) as wheel:
        names = [name.partition("native/")[2] for name in wheel.namelist() if name.startswith("shoal/comm/native/")]
        wheel.extractall(tmp_path / "installed")
    file.unlink()
    return file.name, names, done.stderr


@pytest.fixture
def no_torch(tmp_path) -> str:
    """A path where torch cannot be imported, as in pip's isolated builds."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "torch.py").write_text("raise ImportError('No module named torch')")
    return str(tmp_path / "hidden")


LOAD = """
import shoal.comm.native.build as build
print(build.__file__)
assert build.kernels(), build.why_not()
"""


@needs_compiler
@pytest.mark.slow
def test_an_installed_wheel_has_its_kernels_compiled_and_its_sources_with_it(tmp_path, no_torch):
    name, files, said = _wheel(tmp_path, PYTHONPATH=no_torch)
    assert name.startswith("shoal-0.1.0-py3-none-linux_") or "-py3-none-" in name
    assert "any" not in name
    assert [file for file in files if file.startswith("prebuilt/shoal_kernels-")]
    assert {"kernels/reduce.cpp", "kernels/vector.hpp", "build.py"} <= set(files)
    assert "backend: No module named torch" in said
    done = subprocess.run(
        [sys.executable, "-c", LOAD], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "PATH": "/nonexistent", "CXX": "",
             "SHOAL_NATIVE_CACHE": str(tmp_path / "unused")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "installed"))
    assert not (tmp_path / "unused").exists()


@pytest.mark.slow
def test_a_wheel_is_made_without_a_compiler_too_and_fits_every_machine(tmp_path, no_torch):
    name, files, said = _wheel(tmp_path, PYTHONPATH=no_torch, CXX="no-such-compiler")
    assert name.endswith("-py3-none-any.whl")
    assert not [file for file in files if "prebuilt" in file]
    assert "kernels/reduce.cpp" in files
    assert "shoal: not compiled now" in said


@pytest.mark.slow
def test_a_wheel_that_carries_the_torch_extension_is_for_one_python(tmp_path, fake_compiler):
    if not build.backend_library().sources:
        pytest.fail("the extension's sources are missing")
    fake_compiler('while test "$1" != -o; do shift; done; touch "$2"')
    name, files, _ = _wheel(tmp_path)
    assert f"-cp{sys.version_info.major}{sys.version_info.minor}-" in name
    assert [file for file in files if file.startswith("prebuilt/shoal_backend-")]


@needs_compiler
def test_the_outlook_is_told_without_compiling(tiny, tmp_path, monkeypatch):
    makers = []
    for real in build.MAKERS:
        made = replace(tiny, name=real.__name__.removesuffix("_library"))
        makers.append(lambda made=made: made)
        makers[-1].__name__ = real.__name__
        monkeypatch.setattr(build, real.__name__, makers[-1])
    monkeypatch.setattr(build, "MAKERS", makers)
    assert set(build.outlook().values()) == {"on first use"}
    assert not Path(os.environ["SHOAL_NATIVE_CACHE"]).exists()
    build.compiled(build.kernels_library())
    others = dict.fromkeys(("ranks", "generation", "allocator", "backend"), "on first use")
    assert build.outlook() == {"kernels": "ready", **others}
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert "Python.h is missing: install" in build.outlook()["backend"]
    (tmp_path / "tiny.cpp").write_text("nonsense")
    with pytest.raises(Failed):
        build.compiled(build.allocator_library())
    assert "could not compile allocator" in build.outlook()["allocator"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.outlook()["kernels"] == "CXX names 'no-such-compiler', which is not there"
    monkeypatch.setenv("SHOAL_NATIVE", "0")
    assert set(build.outlook().values()) == {"SHOAL_NATIVE=0 is set"}
