"""The kernels stay inside their buffers, on numbers of every kind and on damaged payloads."""

import subprocess
from pathlib import Path

import pytest

from shoal.comm.native import build

HERE = Path(__file__).parent
KERNELS = build.HERE / "kernels"


@pytest.mark.slow
@pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")
def test_no_kernel_reads_or_writes_outside_of_its_buffers(tmp_path: Path) -> None:
    program = tmp_path / "fuzz"
    flags = ["-std=c++17", "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{KERNELS}"]
    sources = [HERE / "kernels_fuzz.cpp", *sorted(KERNELS.glob("compress_*.cpp"))]
    subprocess.run([build.compiler(), *flags, *sources, "-o", program], check=True, timeout=120)
    done = subprocess.run([program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
