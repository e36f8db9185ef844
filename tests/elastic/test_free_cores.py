"""Cores that nobody uses, from what the kernel counts."""

import os
from pathlib import Path

from shoal.cluster.detect import usable_cores
from shoal.elastic.free_cores import BETWEEN_S, FreeCores

TICKS = os.sysconf("SC_CLK_TCK")


def stat(file: Path, idle_s: float) -> Path:
    """Every allowed processor has been idle so long; one that is not allowed, much longer."""
    idle = int(idle_s * TICKS)
    rows = [f"cpu{n} 7 7 7 {idle - 5} 5 7 7 0 0 0" for n in sorted(os.sched_getaffinity(0))]
    file.write_text("\n".join(["cpu  1 1 1 999999 1", *rows, f"cpu9999 0 0 0 {idle * 1000} 0", "intr 5 cpu 1"]))
    return file


def test_idle_cores_are_idle_seconds_a_second_of_the_processors_that_are_allowed(tmp_path):
    cores = FreeCores(stat(tmp_path / "stat", 100.0))
    began = cores._last[0]
    stat(tmp_path / "stat", 102.0)
    cores.look(began + BETWEEN_S / 2)
    assert cores.idle == 0.0, "too soon to say"
    cores.look(began + 4.0)
    assert abs(cores.idle - 0.5 * len(os.sched_getaffinity(0))) < 1e-9


def test_beside_workers_that_fill_the_host_nothing_is_free_whatever_is_idle(tmp_path):
    cores = FreeCores(stat(tmp_path / "stat", 1.0))
    cores.idle = 1e9
    assert cores.beside(usable_cores(), 1) == 0.0
    assert cores.beside(0, 1) == usable_cores()
    assert cores.beside(1, usable_cores() + 1) == 0.0


def test_where_the_kernel_says_nothing_nothing_is_free(tmp_path):
    cores = FreeCores(tmp_path / "missing")
    cores.look(cores._last[0] + 10.0)
    assert cores.beside(0, 1) == 0.0
