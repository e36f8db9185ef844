"""``shoal doctor``: what this machine has, and what is missing."""

import platform
import shutil
import sys
import time
from argparse import ArgumentParser, Namespace
from importlib.util import find_spec
from typing import Any

from shoal.cli.exit_codes import DONE
from shoal.cli.output import about_size, interval, json_line, table
from shoal.cluster.cluster import Cluster, counted, gibibytes

HELP = "what this machine has: cores, memory, accelerators, speeds, extras"
EXTRAS = {  # extra of pyproject.toml -> (modules that it brings, what it is for)
    "images": (("PIL",), "image folders"),
    "parquet": (("pyarrow",), "Parquet files"),
    "tensorboard": (("tensorboard",), "metrics in TensorBoard"),
    "serve": (("httptools", "msgspec"), "shoal serve"),
    "ray": (("ray", "starlette"), "shoal serve --engine ray"),
}
SIZE = 512  # of the square matrices that are multiplied: large enough to be bound by arithmetic
TRIALS = 5


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the result as one JSON object")


def run(args: Namespace) -> int:
    found = examine()
    print(json_line(found) if args.json else table(("what", "found"), _rows(found)))
    return DONE


def examine() -> dict[str, Any]:
    """Facts as plain values; the speeds are floating-point operations a second of one core."""
    import torch

    from shoal.comm.measuring import checkup

    host = Cluster.detect().hosts[0]
    speeds = {name: matmul_flops(getattr(torch, name)) for name in ("float32", "bfloat16")}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "host": host.name,
        "cores": host.cores,
        "memory_bytes": host.memory_bytes,
        "accelerators": [
            {"kind": device.kind, "name": device.name, "memory_bytes": device.memory_bytes} for device in host.devices
        ],
        "matmul_flops": speeds,
        "bfloat16_speedup": speeds["bfloat16"] / speeds["float32"],
        "compiler": next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None),
        "communication": checkup.checkup(),
        "extras": {extra: all(find_spec(module) for module in modules) for extra, (modules, _) in EXTRAS.items()},
    }


def matmul_flops(dtype: Any) -> float:
    """Operations a second of a square matrix product on one core of this processor; the best of a few trials."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        left, right = (torch.ones(SIZE, SIZE, dtype=dtype) for _ in range(2))
        torch.mm(left, right)  # the first call chooses and prepares the kernel
        times = []
        for _ in range(TRIALS):
            start = time.perf_counter()
            torch.mm(left, right)
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return 2 * SIZE**3 / min(times)


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    accelerators = [f"{a['kind']} {a['name']}, {gibibytes(a['memory_bytes'])}" for a in found["accelerators"]]
    speeds = found["matmul_flops"]
    rows = [
        ("python", f"{found['python']} ({sys.executable})"),
        ("torch", found["torch"]),
        ("processor", f"{counted(found['cores'], 'core')} usable, {gibibytes(found['memory_bytes'])} of memory"),
        ("accelerators", "; ".join(accelerators) or "none"),
        (
            "matmul",
            f"float32 {speeds['float32'] / 1e9:.0f} GFLOP/s a core, bfloat16 {speeds['bfloat16'] / 1e9:.0f}: "
            f"{found['bfloat16_speedup']:.1f}x",
        ),
        ("C++ compiler", found["compiler"] or "none; needed for model.compile and for Shoal's compiled parts"),
        *communication(found["communication"]),
    ]
    for extra, present in found["extras"].items():
        missing = f"missing, for {EXTRAS[extra][1]}: pip install 'shoal[{extra}]'"
        rows.append((f"extra {extra}", "present" if present else missing))
    return rows


def communication(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What ranks of this host have to talk by, what is missing, and what that costs."""
    parts = {name: state for name, state in found["parts"].items() if state != "ready"}
    waiting = [name for name, state in parts.items() if state == "on first use"]
    missing: dict[str, list[str]] = {}
    for name, state in parts.items():
        if name not in waiting:
            missing.setdefault(state, []).append(name)
    told = [f"{', '.join(names)} missing: {reason}" for reason, names in missing.items()]
    if "backend" in parts and "backend" not in waiting:
        told.append("shm goes over shared memory in Python")
    if waiting:
        told.append(f"{', '.join(waiting)} compiled on first use; `python -m shoal.comm.native` does it now")
    timed = found["all_reduce_s"]
    speeds = [
        f"{about_size(nbytes)} "
        + ", ".join(
            f"{name} {interval(of_size[nbytes])}" + (f" ({seconds / of_size[nbytes]:.1f}x)" if name != "gloo" else "")
            for name, of_size in timed.items()
        )
        for nbytes, seconds in timed["gloo"].items()
    ]
    cost = "" if "shm" in timed else "; compiled, shm would take less than half of gloo's time (docs/figures.md)"
    free, shm = gibibytes(found["free_memory_bytes"]), found["dev_shm_bytes"]
    folder = "no /dev/shm" if shm is None else f"/dev/shm {gibibytes(shm[0])} of {gibibytes(shm[1])} free"
    cores = found["ranks_with_a_core"]
    return [
        ("compiled parts", "; ".join(told) or "ready"),
        ("all-reduce, 2 ranks", found["trouble"] or "; ".join(speeds) + cost),
        ("shared memory", f"{free} free; {folder}"),
        (
            "ranks",
            f"{cores} have a core each; where there are more, those that wait sleep, and short messages take longer",
        ),
    ]
