"""Fault rehearsal on several hosts that this machine plays: agents killed and stopped, links cut, slow and lossy."""

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.comm.launch import Agent
from shoal.elastic import roster
from shoal.elastic.api import PRELOAD
from shoal.elastic.chaos import SCRATCH, Survived, explained, judged, lasted_s, of_the_user, unstopped
from shoal.elastic.crew_of_hosts import HostsJob
from shoal.elastic.emulated import EmulatedHosts, check_number, train_emulated
from shoal.elastic.host_faults import LEADER, LINKS, SLOW, HostFault, usual_host_faults
from shoal.elastic.hosts import check_hosts, jobs
from shoal.elastic.network import Network, Trouble, make_network
from shoal.errors import RunFailed, UserError
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe
from shoal.run.run import Run
from shoal.run.scratch import scratch_folder
from shoal.train.able import check_repeatable
from shoal.train.api import train

if TYPE_CHECKING:
    from torch import nn

PROBED = 30  # steps of the run that says how long one takes on these hosts
APART = 5  # steps from the return of a host to the next fault
SECONDS = 12.0  # of training for each fault, where nobody says how many steps: until its host is back
LASTS = 10  # steps for which a link is slow or lossy
LOOK_S = 0.01


def rehearse_hosts(
    recipe: Recipe,
    plan: Plan,
    faults: Sequence[HostFault] = (),
    *,
    hosts: int,
    network: str = "relay",
    steps: int = 0,
    least: int = 1,
    folder: Path | None = None,
    progress: Callable[[Mapping[str, Any]], None] | None = None,
    model: "Callable[[], nn.Module] | None" = None,
    data: Any = None,
) -> dict[str, Any]:
    """As `shoal.elastic.chaos.rehearse`, with faults of whole hosts, one after the other: each host is back, and trains
    again, before the next one happens.

    ``network``: "relay", or "namespaces" (root). Trains ``steps``; 0: about 12 s of steps for each fault. Returns what
    `rehearse` does, with hosts and network. Raises UserError for bad input."""
    check_repeatable(recipe)
    faults = list(faults) or usual_host_faults(hosts)
    check_number(hosts)
    if hosts < 3:
        raise UserError(f"--emulate-hosts {hosts}: of two hosts one waits for the one that led: rehearse with 3.")
    check_hosts(recipe, plan, least)
    for fault in faults:
        if fault.host >= hosts:
            raise UserError(f"fault {str(fault)!r}: the hosts are numbered 0 to {hosts - 1}.")
    if plan.workers + plan.server_processes < hosts:
        beside = f" and {plan.server_processes} servers" if plan.server_processes else ""
        raise UserError(f"--workers {plan.workers}{beside}: {hosts} hosts need a worker or a server each.")
    report = replace(recipe.report, evaluate_every=10**9, checkpoint_every=10**9, sample=False, tensorboard=False)
    recipe = replace(recipe, epochs=0, report=report)
    mine: dict[str, Any] = {"model": model, "data": data}
    shapes = any(fault.kind in SLOW for fault in faults)
    with (
        nullcontext(folder) if folder else scratch_folder(SCRATCH) as made,
        closing(make_network(network, hosts, shapes=shapes)) as between,
    ):
        place = Path(made)
        probed = replace(recipe, steps=PROBED)
        told: dict[str, Any] = {"progress": progress, **mine}
        tried = unstopped(train_emulated(probed, plan, hosts=hosts, run_dir=place / "probe", **told))
        took = _step_s(Run(Path(tried["run_dir"])).events())
        steps = steps or max(PROBED, int(SECONDS * len(faults) / took))
        recipe = replace(recipe, steps=steps)
        calm = unstopped(train(recipe, plan, run_dir=place / "undisturbed", **told))
        rough = _Rough(faults, hosts, between, place / "disturbed", progress)
        result = rough.train(recipe, plan, least, mine)
        before, events = Run(Path(calm["run_dir"])).events(), Run(Path(result["run_dir"])).events()
    survived = [_survived(fault, rough.acted.get(number), events) for number, fault in enumerate(faults)]
    found = judged((calm, result), (before, events), survived, steps)
    if not found["bits_equal"]:
        happened = [replace(f, step=rough.acted[n][1]) for n, f in enumerate(faults) if n in rough.acted]
        with Agent(PRELOAD) as crew:
            why = explained(found["differs_at"], happened, events)
            found["notes"] = [why, *of_the_user(crew, recipe, plan, model, data)]
    return found | {
        "workers": plan.workers,
        "hosts": hosts,
        "network": network,
        "goodput": took * steps / lasted_s(events),
        "run_dir": str(folder) if folder else None,
    }


def _step_s(events: Sequence[Mapping[str, Any]]) -> float:
    seconds = sorted(event["seconds"] for event in events if event["event"] == "committed")
    return float(seconds[len(seconds) // 2])


class _Rough:
    """The run that things happen to, seen through what its agents tell."""

    def __init__(
        self,
        faults: Sequence[HostFault],
        hosts: int,
        network: Network,
        run_dir: Path,
        progress: Callable[[Mapping[str, Any]], None] | None,
    ) -> None:
        self._faults, self._hosts, self._network, self._run_dir = faults, hosts, network, run_dir
        self._progress = progress
        self.acted: dict[int, tuple[float, int]] = {}  # number of a fault -> when, and after which step
        self._step = self._recovered = 0

    def train(self, recipe: Recipe, plan: Plan, least: int, mine: Mapping[str, Any]) -> dict[str, Any]:
        given = (recipe, plan, None, self._run_dir, None, None, mine["model"], mine["data"])
        of_run = jobs(*given, hosts=self._hosts, least=least)

        def make(*where: Any) -> HostsJob:  # the network is this process's: without it they could but wait
            return replace(of_run(*where), outlives=False)

        with EmulatedHosts(make, self._network, self._listen) as emulated:
            for number in range(self._hosts):
                emulated.start(number)
            for number, fault in enumerate(self._faults):
                after = fault.step or self._step + APART
                if not self._until(partial(self._may_act, after), emulated):
                    break
                self._act(number, fault, emulated)
            return emulated.result()

    def _listen(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "committed":
            self._step = max(self._step, event["step"])
        self._recovered += event["event"] == "recovered"
        if self._progress:
            self._progress(event)

    def _until(self, true: Callable[[], bool], emulated: EmulatedHosts) -> bool:
        """False when the run has ended before."""
        while not true():
            if emulated.over:
                return False
            time.sleep(LOOK_S)
        return True

    def _may_act(self, after: int) -> bool:
        """The host of the fault before trains again."""
        return self._step >= after and len({entry.host for entry in roster.read(self._run_dir)}) == self._hosts

    def _act(self, number: int, fault: HostFault, emulated: EmulatedHosts) -> None:
        host = emulated.leader(self._run_dir) if fault.host == LEADER else fault.host
        spare = emulated.open(host) if fault.kind == "kill-host" else None
        recovered, step = self._recovered, self._step
        self.acted[number] = time.time(), step
        if spare is not None:
            emulated.signal(host, signal.SIGKILL)
        elif fault.kind == "stop-host":
            emulated.signal(host, signal.SIGSTOP)
        else:
            out, into = LINKS[fault.kind]
            self._network.trouble(host, out=out, into=into)
        if fault.kind in SLOW:
            self._until(lambda: self._step >= step + LASTS, emulated)
        else:
            self._until(lambda: self._recovered > recovered, emulated)
        if spare is not None:
            emulated.start(host, spare)
        elif fault.kind == "stop-host":
            emulated.signal(host, signal.SIGCONT)
        else:
            self._network.trouble(host, out=Trouble(), into=Trouble())


def _survived(fault: HostFault, acted: tuple[float, int] | None, events: Sequence[Mapping[str, Any]]) -> Survived:
    if acted is None:
        return Survived(str(fault), False, None, None, None, "the run ended before its turn came: give more --steps")
    at, step = acted

    def first(*names: str) -> Mapping[str, Any] | None:
        return next((e for e in events if e["event"] in names and e["time"] >= at), None)

    if fault.kind in SLOW:
        after = first("committed")
        why = "nothing was lost, so that nothing was to be noticed"
        return Survived(str(fault), True, None, after["time"] - at if after else None, 0, why)
    noticed, recovered = first("lost", "suspected"), first("recovered")
    if noticed is None or recovered is None:
        raise RunFailed(f"{fault} after step {step} was not noticed by the run's end: give more --steps.")
    took = recovered["time"] - at
    return Survived(str(fault), True, noticed["time"] - at, took, recovered["redone"], noticed["why"])
