"""Started by emulated_hosts: imports torch once, forks a process for each rank, and sends each to its host.

Reads one JSON order from standard input, whose end (the death of who ordered) ends the ranks; prints what they
returned."""

import ctypes
import importlib
import json
import os
import select
import signal
import sys
import threading
import traceback

SPACES = ("net", "ipc", "uts", "mnt")  # mounts last: the other files are found by the mounts of here


def enter(holder: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for descriptor in [os.open(f"/proc/{holder}/ns/{space}", os.O_RDONLY) for space in SPACES]:
        if libc.setns(descriptor, 0):
            raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")
        os.close(descriptor)


def work(order: dict, rank: int, pipe: int) -> None:
    """In the rank's process: ends it."""
    try:
        enter(order["ranks"][rank])
        os.environ.update(order["env"])
        module, _, function = order["job"].partition(":")
        call = getattr(importlib.import_module(module), function)
        answer = {"result": call(rank, len(order["ranks"]), order["address"], **order["arguments"])}
    except BaseException:
        answer = {"failure": f"rank {rank}: {traceback.format_exc()}"}
    with os.fdopen(pipe, "w") as out:
        out.write(json.dumps(answer))
    os._exit(0)


def main() -> int:
    order = json.loads(sys.stdin.buffer.raw.readline())
    sys.path[:0] = order["path"]
    import torch.distributed  # noqa: F401  (the ranks find it there)

    importlib.import_module(order["job"].partition(":")[0])
    pipes, children = {}, []
    for rank in range(len(order["ranks"])):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            libc = ctypes.CDLL(None)
            libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            work(order, rank, write)
        os.close(write)
        pipes[read] = rank
        children.append(child)

    def end() -> None:
        for child in children:
            os.kill(child, signal.SIGKILL)

    def watch() -> None:
        while sys.stdin.buffer.raw.read(1):
            pass
        end()

    threading.Thread(target=watch, daemon=True).start()
    texts, failure = dict.fromkeys(pipes.values(), ""), None
    while pipes and failure is None:
        for read in select.select(list(pipes), [], [])[0]:
            part = os.read(read, 1 << 16).decode()
            texts[pipes[read]] += part
            if not part:
                rank = pipes.pop(read)
                answer = json.loads(texts[rank]) if texts[rank] else {"failure": f"rank {rank} died"}
                failure = failure or answer.get("failure")
    if failure is not None:
        end()
    for child in children:
        os.waitpid(child, 0)
    children.clear()
    print(failure or json.dumps([json.loads(texts[rank])["result"] for rank in sorted(texts)]), flush=True)
    return 1 if failure else 0


if __name__ == "__main__":
    os._exit(main())
