"""Which mesh so many workers form: replicas of the model, and stages of each. Pure arithmetic.

Where a plan cuts the model into stages, a worker is meant to hold no more than its part. So a row of workers that does
not divide by the plan's depth is cut deeper rather than less deep, as far as the model can be cut; only when fewer
workers are left than the plan has stages does each hold more of the model."""

from dataclasses import dataclass, replace

from shoal.elastic.pace import evenly
from shoal.recipe.pipeline_plan import PipelinePlan
from shoal.recipe.plan import Plan

MOST_WORKERS, MOST_SERVERS = 128, 16  # of one host: each has a socket to each other one


@dataclass(frozen=True)
class Formation:
    """``shares``: shards of each replica, whose stages are ranks next to each other. ``servers`` are the last ranks."""

    shares: tuple[int, ...]
    depth: int = 1
    servers: int = 0

    @property
    def workers(self) -> int:
        return len(self.shares) * self.depth

    @property
    def owned(self) -> list[range]:
        """The shards that each rank works on, alone or with the other stages of its replica."""
        starts = [sum(self.shares[:each]) for each in range(len(self.shares))]
        replicas = [range(start, start + count) for start, count in zip(starts, self.shares, strict=True)]
        return [owned for owned in replicas for _ in range(self.depth)] + [range(0)] * self.servers


def depth_for(workers: int, wanted: int, shards: int, deepest: int) -> int:
    """Stages of each replica of so many workers: ``wanted`` where they divide by it, else the next deeper number that
    divides them, up to ``deepest``, else the next less deep one. No more replicas than ``shards``."""
    fits = [d for d in range(1, workers + 1) if workers % d == 0 and workers // d <= shards]
    deeper = [d for d in fits if wanted <= d <= max(wanted, deepest)]
    return min(deeper) if deeper else max((d for d in fits if d < wanted), default=min(fits, default=1))


def formation_for(processes: int, servers: int, depth: int, *, shards: int, deepest: int) -> Formation:
    """Of so many processes, where ``servers`` and ``depth`` are wanted: the shards are dealt out evenly."""
    serving = servers_for(processes, servers)
    stages = depth_for(processes - serving, depth, shards, deepest)
    return Formation(evenly((processes - serving) // stages, shards), stages, serving)


def named(rank: int, workers: int) -> str:
    """What a process is called, of so many workers and then servers."""
    return f"rank {rank}" if rank < workers else f"server {rank - workers}"


def servers_for(processes: int, wanted: int) -> int:
    """How many of so many processes are parameter servers: one at least is a worker."""
    return min(wanted, processes - 1)


def plan_of(plan: Plan, formation: Formation) -> Plan:
    """The plan over other workers."""
    shares, depth = formation.shares, formation.depth
    if depth == 1:
        servers = formation.servers or plan.servers
        return replace(plan, mesh={"data": len(shares)}, placement=shares, pipeline=PipelinePlan(), servers=servers)
    return replace(plan, mesh={"data": len(shares), "pipe": depth}, placement=shares)
