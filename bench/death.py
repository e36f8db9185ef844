"""How soon all local ranks know that one of them has died, and what a rank costs that only waits; gloo beside shm.

    python bench/death.py [--kills 20] [--ranks 3] [--transports gloo,shm] [--out bench/results/death.json]

Each kill has new processes: they call all_reduce in turns without end, and one of them is ended by SIGKILL at a random
moment (`busy`), or after it has stopped joining, so that all others already wait for it (`waiting`). A survivor writes
down when its call raised; the latest of them counts, from the moment before the signal was sent. Idle: the CPU seconds
that a rank uses while it waits two seconds in a barrier, as a share of them.
"""

import argparse
import json
import os
import random
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from shoal.comm.measuring.sweep import machine

RESULTS = Path(__file__).parent / "results" / "death.json"
GOAL_S, IDLE_GOAL = 0.1, 0.02
IDLE_S = 2.0
ELEMENTS = 1 << 18  # of the sums: 1 MiB
TIMEOUT = timedelta(seconds=30)


def in_rank(work: Callable[[int], bytes], rank: int, out: int) -> None:
    """The life of a forked rank: the result of its work goes through the pipe."""
    code = 1
    try:
        os.write(out, work(rank))
        code = 0
    except BaseException as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def forked(work: Callable[[int], bytes], ranks: int) -> list[tuple[int, int]]:
    """(process, pipe to read from) of each rank."""
    made = []
    for rank in range(ranks):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            in_rank(work, rank, write)
        os.close(write)
        made.append((pid, read))
    return made


def join(transport: str, rank: int, ranks: int, folder: str) -> None:
    if transport != "gloo":
        from shoal.comm.backend.registration import install

        install()
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group(transport, store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)


def await_files(files: list[Path], processes: list[tuple[int, int]]) -> None:
    """Returns when all files are there; ends the program, and the ranks, when one of them has ended before."""
    while not all(file.exists() for file in files):
        for pid, _ in processes:
            if os.waitpid(pid, os.WNOHANG)[0]:
                for other, _ in processes:
                    if other != pid:
                        os.kill(other, signal.SIGKILL)
                raise SystemExit("a rank ended before it had joined")
        time.sleep(0.005)


def kill_once(transport: str, ranks: int, victim: int, waiting: bool, delay_s: float) -> tuple[float, str]:
    """(seconds until the last survivor knew, what one of them was told)."""
    with tempfile.TemporaryDirectory(prefix="shoal-death-") as folder:
        stopped = Path(folder, "stopped")

        def work(rank: int) -> bytes:
            join(transport, rank, ranks, folder)
            tensor = torch.ones(ELEMENTS)
            dist.barrier()
            Path(folder, f"ready{rank}").touch()
            begun = time.monotonic()
            while True:
                if waiting and rank == victim and time.monotonic() - begun > delay_s:
                    stopped.touch()
                    signal.pause()
                try:
                    dist.all_reduce(tensor)
                except Exception as error:
                    return struct.pack("<q", time.monotonic_ns()) + str(error).encode()[:400]
                tensor.fill_(1.0)

        processes = forked(work, ranks)
        await_files([Path(folder, f"ready{rank}") for rank in range(ranks)], processes)
        if waiting:
            await_files([stopped], processes)
            time.sleep(0.1)  # the others are in their calls, long since
        else:
            time.sleep(delay_s)
        sent = time.monotonic_ns()
        os.kill(processes[victim][0], signal.SIGKILL)
        told = {rank: os.read(pipe, 1000) for rank, (_, pipe) in enumerate(processes) if rank != victim}
        for pid, pipe in processes:
            os.waitpid(pid, 0)
            os.close(pipe)
    if not all(told.values()):
        raise SystemExit(f"{transport}: a survivor ended without an error")
    return max(struct.unpack("<q", word[:8])[0] - sent for word in told.values()) / 1e9, next(iter(told.values()))[
        8:
    ].decode(errors="replace")


def idle(transport: str, ranks: int) -> float:
    """CPU seconds a second of the ranks that wait in a barrier for the last one, the most of them."""
    with tempfile.TemporaryDirectory(prefix="shoal-death-") as folder:

        def work(rank: int) -> bytes:
            join(transport, rank, ranks, folder)
            for _ in range(3):
                dist.barrier()
            if rank == 0:
                time.sleep(IDLE_S)
            used, begun = time.process_time(), time.monotonic()
            dist.barrier()
            share = (time.process_time() - used) / max(time.monotonic() - begun, IDLE_S / 2)
            dist.destroy_process_group()
            return struct.pack("<d", share)

        processes = forked(work, ranks)
        shares = [struct.unpack("<d", os.read(pipe, 8))[0] for _, pipe in processes]
        for pid, pipe in processes:
            os.waitpid(pid, 0)
            os.close(pipe)
    return max(shares[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each kind")
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--transports", default="gloo,shm")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    transports = args.transports.split(",")
    if "shm" in transports:
        from shoal.comm.native import build

        if not build.backend():  # once, before any rank is forked
            raise SystemExit(f"no shm: {build.why_not()}")
    torch.set_num_threads(1)
    dice = random.Random(0)
    seconds: dict[str, dict[str, list[float]]] = {name: {"busy": [], "waiting": []} for name in transports}
    said: dict[str, str] = {}
    for _ in range(args.kills):
        for kind in ("busy", "waiting"):
            victim, delay_s = dice.randrange(args.ranks), dice.uniform(0.02, 0.1)
            for name in transports:
                took, said[name] = kill_once(name, args.ranks, victim, kind == "waiting", delay_s)
                seconds[name][kind].append(took)
    shares = {name: [idle(name, args.ranks) for _ in range(3)] for name in transports}
    for name in transports:
        for kind, took in seconds[name].items():
            mark = "reached" if max(took) <= GOAL_S else "MISSED "
            print(f"{mark if name != 'gloo' else 'control':8} {name:5} {kind:8} {len(took)} kills: p50 "
                  f"{median(took) * 1e3:6.1f} ms, max {max(took) * 1e3:6.1f} ms (goal {GOAL_S * 1e3:.0f})")  # fmt: skip
        share = median(shares[name])
        mark = "reached" if share <= IDLE_GOAL else "MISSED "
        print(f"{mark if name != 'gloo' else 'control':8} {name:5} idle     a waiting rank uses {share:.2%} of a core")
        print(f"         told: {said[name]}")
    out = {"machine": machine(), "ranks": args.ranks, "seconds": seconds, "idle": shares, "told": said}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(out, indent=1) + "\n")
    print("raw numbers:", args.out)


if __name__ == "__main__":
    main()
