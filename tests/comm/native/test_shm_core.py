"""The shared-memory transport's C++ tests (shm_test.cpp): with the flags it ships with, and under the sanitizers."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shoal.comm.native import build

HERE = Path(__file__).parent
KERNELS = build.HERE / "kernels"
STRICT = ("-std=c++17", "-g1", "-pthread", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off")

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")


def compiled(folder: Path, *flags: str) -> Path:
    """The test program. Its files are compiled side by side."""
    program, compiler = folder / "shm_test", build.compiler()
    assert compiler is not None
    sources = [*sorted(KERNELS.glob("shm_*.cpp")), HERE / "shm_test.cpp"]

    def run(*arguments: str) -> None:
        command = [compiler, *STRICT, *flags, f"-I{KERNELS}", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    objects = [str(folder / f"{source.stem}.o") for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda pair: run("-c", str(pair[0]), "-o", pair[1]), zip(sources, objects, strict=True)))
    run(*objects, "-o", str(program))
    return program


def said(program: Path, *parts: str, **environment: str) -> str:
    environment = {**os.environ, **environment}
    done = subprocess.run(
        [str(program), *parts], capture_output=True, text=True, check=False, timeout=300, env=environment
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


# For soak: it compiles anew what tests/comm/backend runs, every dtype on 1 to 4 ranks; that guards fire is shown below.
@pytest.mark.soak
def test_every_collective_is_exact_and_every_guard_fires_for_1_to_9_ranks(tmp_path: Path) -> None:
    assert said(compiled(tmp_path, *build.FLAGS), "numbers", "failures", "channels", "all") == "all is so\n"


@pytest.mark.slow
def test_no_byte_is_touched_that_must_not_be_and_nothing_is_undefined(tmp_path: Path) -> None:
    program = compiled(tmp_path, "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    assert said(program, "numbers", "failures", "channels", "few", ASAN_OPTIONS="detect_leaks=1") == "all is so\n"


@pytest.mark.slow
def test_ranks_never_race_for_a_byte(tmp_path: Path) -> None:
    """Ranks are threads with one mapping, so that the sanitizer sees what in life is shared between processes."""
    program = compiled(tmp_path, "-O1", "-fsanitize=thread")
    assert said(program, "failures", "channels", "few", TSAN_OPTIONS="halt_on_error=1") == "all is so\n"
