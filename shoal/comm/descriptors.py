"""How many files a host's agent holds open while it makes its workers, and whether the system lets it."""

import resource

from shoal.errors import UserError

_OTHERS = 256  # modules, logs, memory, the launcher's socket


def needed(workers: int, servers: int = 0) -> int:
    """Descriptors of an agent at its worst: both ends of each pair's socket, each process's pipe, and memory files."""
    count = workers + servers
    pairs = workers * (workers - 1) // 2 + workers * servers
    return 2 * pairs + 4 * count + _OTHERS


def check(workers: int, servers: int = 0) -> None:
    """Raises UserError when so many processes cannot be made on one host."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if most != resource.RLIM_INFINITY and needed(workers, servers) > most:
        fits = max(n for n in range(workers + 1) if n == 0 or needed(n, servers) <= most)
        raise UserError(
            f"{workers} workers on one host need {needed(workers, servers)} open files, and the limit is {most}: "
            f"use at most {fits} workers, or raise it (ulimit -Hn)."
        )


def make_room(workers: int, servers: int = 0) -> None:
    """Raise this process's limit as far as so many workers need, and it can be."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = needed(workers, servers)
    if now != resource.RLIM_INFINITY and now < wanted:
        within = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (within, most))
