"""An elastic run of one host whose number of workers a policy changes: the shell around `shoal.elastic.autoscale`."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from shoal.comm.agent import Ended
from shoal.elastic import membership as m
from shoal.elastic.autoscale import Autoscale, Seen
from shoal.elastic.crew import ElasticCrew, ElasticJob
from shoal.elastic.free_cores import FreeCores
from shoal.elastic.replan import MOST_WORKERS
from shoal.errors import UserError
from shoal.recipe.plan import Plan


@dataclass(frozen=True, kw_only=True)
class AutoscaledJob(ElasticJob):
    policy: Autoscale

    def carry_out(self, launcher: Connection, forward: Callable[[Any], None]) -> Ended:
        return AutoscaledCrew(self, launcher, forward).run()


class AutoscaledCrew(ElasticCrew):
    def __init__(self, job: AutoscaledJob, launcher: Connection, forward: Callable[[Any], None]) -> None:
        super().__init__(job, launcher, forward)
        self.policy = job.policy
        self.cores = FreeCores()

    def _look(self) -> None:
        super()._look()
        self.cores.look(time.monotonic())

    def _on_event(self, event: dict[str, Any]) -> None:
        super()._on_event(event)
        if event.get("event") != "committed" or self.membership.finished:
            return
        workers, wanted = len(self.membership.members), self.membership.wanted
        free = self.cores.beside(workers, self.policy.cores)
        decided = self.policy.committed(Seen(workers=workers, wanted=wanted, seconds=progress_s(event), free=free))
        if decided is not None:
            sizes = (("workers", decided.workers), ("before", decided.before))
            self._tell(m.Tell("autoscaled", decided.why, 0.0, more=sizes))
            if decided.workers != wanted:
                self._decide(m.Resize(decided.workers, decided.why))


def progress_s(event: Mapping[str, Any]) -> float:
    """From the event of a committed step: seconds for the progress of one step of the recipe's batch.

    Where the batch follows goodput, steps of other batches are worth more, or less; else it is the time of the step."""
    return float(event["seconds"]) / float(event.get("worth", 1.0))


def check_bounds(bounds: tuple[int, int], plan: Plan, shards: int, least: int) -> None:
    """Raises UserError for bounds that cannot be, and for plans whose workers are not all alike."""
    low, high = bounds
    told = f"--autoscale {low}:{high}"
    most = min(shards, MOST_WORKERS)
    if not 1 <= low <= high <= most:
        raise UserError(f"{told}: use MIN:MAX, from 1 to {most}: the run has {shards} shards, each worker needs one.")
    if low < least:
        raise UserError(f"{told}: it may go below the {least} of --min-workers: use --autoscale {least}:{high}.")
    if not low <= plan.workers <= high:
        raise UserError(f"{told}: the run would begin with {plan.workers}: use --workers {low} to {high}.")
    if plan.axes.size("pipe") > 1 or plan.server_processes:
        raise UserError("--autoscale counts workers that are all alike: leave it out with this plan, use shoal resize.")
