"""Whole runs in which one worker is late by plan: the report of the run names it, and why."""

import json
import time
from pathlib import Path

import pytest
from train.tiny_runs import recipe, splits

from shoal.cli.main import main
from shoal.comm.status import Phase
from shoal.data.loading import Prefetcher
from shoal.models.registry import build
from shoal.observe.bottleneck import bottleneck
from shoal.observe.communication import read_communication
from shoal.recipe.plan import Plan
from shoal.run.run import Run
from shoal.train.step import Step
from shoal.train.worker import Worker

BURN_S = 0.02
LATE = 1


def hold(group):
    """Go on only when every other worker is seen to stand still for this one, and then be late for certain."""
    others = [rank for rank in range(group.world) if rank != group.rank]

    def waits(at):
        return at.phase is Phase.waiting and at.peer == group.rank

    while not all(waits(group.report.board.read(rank)) for rank in others):
        continue
    end = time.monotonic() + BURN_S
    while time.monotonic() < end:
        continue


def late_in_forward(worker):
    backward = Step.backward

    def slow(step, loss, count):
        if step.shard == worker.shards[-1]:
            hold(worker.group)
        backward(step, loss, count)

    Step.backward = slow


def late_with_data(worker):
    following = Prefetcher.__next__

    def slow(batches):
        place, batch = following(batches)
        if place[1] == worker.shards[-1]:
            hold(worker.group)
        return place, batch

    Prefetcher.__next__ = slow


class Planted:
    """A model factory that makes the worker of rank LATE late, in its own process."""

    def __init__(self, plant, spec, facts):
        self.plant, self.spec, self.facts = plant, spec, facts

    def __call__(self):
        take, plant = Worker.model, self.plant

        def taking(worker, module, **options):
            if worker.rank == LATE:
                plant(worker)
            return take(worker, module, **options)

        Worker.model = taking
        return build(self.spec, self.facts)


def trained(run, plant, workers=3, **options):
    tiny, data = recipe("mlp", steps=14), splits("mlp", 64, held_out=0)
    factory = Planted(plant, tiny.model, data.train.facts)
    plan = Plan(mesh={"data": workers}, device="cpu", **options)
    return Run(Path(run(tiny, workers, plan=plan, model=factory, data=data)["run_dir"]))


@pytest.mark.parametrize(("plant", "kind"), [(late_in_forward, "straggler"), (late_with_data, "loader")])
def test_the_worker_that_is_late_is_named_with_the_reason(run, plant, kind):
    done = trained(run, plant)
    c = read_communication(done.events())
    found = bottleneck(c)
    assert (found.kind, found.ranks) == (kind, (LATE,))
    assert all(c.waits[rank][LATE] >= 0.99 * BURN_S for rank in range(3) if rank != LATE)
    assert c.placement == (3, 3, 2)


def test_the_command_says_it_in_a_sentence_and_in_json_and_writes_a_trace(run, capfd, tmp_path):
    done = trained(run, late_in_forward)
    assert main(["report", str(done.path), "--trace", str(tmp_path / "trace.json")]) == 0
    said = capfd.readouterr().out.splitlines()
    assert said[0].startswith("The others stand still ")
    assert f" for rank {LATE}: it needs " in said[0]
    assert said[-1] == f"wrote {done.report} and {tmp_path / 'trace.json'}"
    assert main(["report", str(done.path), "--json"]) == 0
    (told,) = json.loads(capfd.readouterr().out)["communication"]
    assert told["bottleneck"]["sentence"] == said[0]
    assert told["bottleneck"]["ranks"] == [LATE]
    spans = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {span["args"]["name"] for span in spans if span["name"] == "process_name"} == {"rank 0", "rank 1", "rank 2"}
    assert any(span["name"] == "waiting for a worker" and span["dur"] >= 0.9 * BURN_S * 1e6 for span in spans)


@pytest.mark.parametrize("staleness", [0, 2])
def test_workers_on_parameter_servers_tell_of_themselves_too(run, staleness):
    tiny, data = recipe("mlp", steps=12), splits("mlp", 64, held_out=0)
    plan = Plan(mesh={"data": 2}, device="cpu", sync="parameter-server", staleness=staleness)
    events = list(Run(Path(run(tiny, 2, plan=plan, data=data)["run_dir"])).events())
    c = read_communication(events)
    assert (c.workers, c.servers, c.algorithm) == (2, 1, "server")
    assert set(c.flows) == {("push", "shared memory"), ("pull", "shared memory")}
    gradient = 4 * next(event["parameters"] for event in events if event["event"] == "started")
    # The servers read at least this. A worker that was ahead when counting began may be level when it ends.
    pushes = c.steps - staleness
    assert all(of.sent_bytes * c.steps >= gradient * pushes * 0.999 for of in c.flows["push", "shared memory"])
    assert c.measured.shared
    assert all(of.exposed_s > 0 for of in c.by_worker)
    assert all(busy > 0 for busy in c.busy)


def test_counting_changes_no_bit_and_one_worker_tells_of_no_communication(run):
    tiny, data = recipe("mlp", steps=6), splits("mlp", 64, held_out=0)
    results = [run(tiny, workers, data=data) for workers in (1, 2)]
    assert len({result["weights_sha256"] for result in results}) == 1
    alone, two = (read_communication(Run(Path(result["run_dir"])).events()) for result in results)
    assert alone is None
    assert two.workers == 2
    assert two.sent_bytes > 0
