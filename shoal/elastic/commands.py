"""What is asked of a run from outside, while it trains: other numbers of workers, or an end without a lost step."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shoal.elastic import roster
from shoal.elastic.replan import MOST_SERVERS
from shoal.errors import RunFailed, UserError, unknown_name
from shoal.run.run import Run
from shoal.train.notices import needed_s

LOOK_S = 0.05


def resize(
    target: str | Path, workers: int | None = None, *, servers: int | None = None, wait_s: float = 120.0
) -> dict[str, Any]:
    """Train a running run on so many workers, or with so many parameter servers; returns when it does: before, workers
    or servers, step, pause_s, why.

    Raises UserError when nobody trains the run or the number cannot be, RunFailed when it does not come about."""
    run = Run.find(target)
    trained = _trained(run)
    serve = sum(not entry.shards for entry in trained)
    what, asked_for = ("servers", servers) if servers is not None else ("workers", workers or 0)
    before = serve if what == "servers" else len(trained) - serve
    most = MOST_SERVERS if what == "servers" else run.recipe.shards * run.plan.axes.size("pipe")
    if what == "servers" and not serve:
        raise UserError(f"--servers {servers}: {str(run.path)!r} has no parameter servers: use --workers.")
    if not 1 <= asked_for <= most:
        each = (
            f"the run has {run.recipe.shards} shards, each worker needs one" if what == "workers" else "that cannot be"
        )
        raise UserError(f"--{what} {asked_for}: {each}: use 1 to {most}.")
    asked = time.time()
    if before == asked_for:
        return {"before": before, what: before, "step": None, "pause_s": 0.0, "why": "it is so already"}
    roster.wish(run.path, **{what: asked_for})
    processes = len(trained) - before + asked_for

    def answer() -> Mapping[str, Any] | None:
        for event in run.events():
            if event["event"] == "refused" and event["time"] >= asked:
                raise UserError(str(event["why"]))
            if event["event"] in ("resized", "recovered") and event["time"] >= asked and event["workers"] == processes:
                return event
        return None

    found = _waited(run, answer, wait_s, f"{asked_for} {what}")
    return {
        "before": before,
        what: asked_for,
        "step": found["step"],
        "pause_s": found["cost_s"],
        "why": found["why"],
    }


def drain(
    target: str | Path, *, rank: int | None = None, host: str = "", grace_s: float = 0.0, wait_s: float = 300.0
) -> dict[str, Any]:
    """End a running run after the step in flight, saved; or let one worker leave it, or all of one host. No step is
    lost. A host that has left trains again when its agent is started anew.

    Returns step, seconds, needed_s (what it was expected to take) and, where a ``grace_s`` is given, whether it does.
    Raises UserError when nobody trains the run or there is no such rank, RunFailed when it does not come about."""
    run = Run.find(target)
    before = _trained(run)
    hosts = sorted({entry.host for entry in before})
    if host and (host not in hosts or len(hosts) < 2):
        if len(hosts) < 2:
            raise UserError(f"--host {host}: the run is on one host: leave --host out to end it.")
        raise unknown_name("host", host, hosts, "--host")
    needed = needed_s(run.events(), whole=rank is None and not host)
    asked, begun = time.time(), time.monotonic()
    if host:
        roster.wish(run.path, drain=f"{roster.HOST}{host}")

        def empty() -> Mapping[str, Any] | None:
            return None if any(entry.host == host for entry in roster.read(run.path)) else {}

        _waited(run, empty, wait_s, f"host {host} leaving")
    elif rank is None:
        roster.wish(run.path, drain="all")
        _waited(run, lambda: None if roster.read(run.path) else {}, wait_s, "an end", ends=True)
    else:
        leaving = next((entry for entry in before if entry.rank == rank), None)
        if leaving is None:
            raise UserError(f"--rank {rank}: the run has ranks 0 to {len(before) - 1}.")
        roster.wish(run.path, drain=str(rank))

        def gone() -> Mapping[str, Any] | None:
            return None if any(entry.pid == leaving.pid for entry in roster.read(run.path)) else {}

        _waited(run, gone, wait_s, f"rank {rank} leaving")
    steps = [e["step"] for e in run.events() if e["event"] in ("committed", "interrupted") and e["time"] >= asked]
    told = {"step": max(steps, default=None), "seconds": time.monotonic() - begun, "needed_s": needed}
    return {**told, "grace_s": grace_s, "grace_will_do": needed <= grace_s} if grace_s else told


def _trained(run: Run) -> list[roster.Entry]:
    found = roster.read(run.path)
    if not found:
        raise UserError(
            f"nobody trains {str(run.path)!r} with workers that may change: start it with shoal train --elastic."
        )
    return found


def _waited(
    run: Run, answer: Callable[[], Mapping[str, Any] | None], wait_s: float, what: str, *, ends: bool = False
) -> Mapping[str, Any]:
    end = time.monotonic() + wait_s
    while (found := answer()) is None:
        if not ends and not roster.read(run.path):
            raise RunFailed(f"the run in {str(run.path)!r} ended before it had {what}.")
        if time.monotonic() > end:
            raise RunFailed(f"no {what} after {wait_s:.0f} s: shoal report {str(run.path)!r} shows what the run does.")
        time.sleep(LOOK_S)
    return found
