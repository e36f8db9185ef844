"""The verbs of elastic runs: what they call, what they print, what they refuse."""

import json

import pytest

from shoal.elastic.chaos import Survived
from shoal.elastic.faults import Fault
from shoal.elastic.host_faults import HostFault


def test_train_elastic_calls_the_elastic_library_with_the_minimum(shoal, library):
    calls = []

    def train_elastic(recipe, plan, **options):
        calls.append((plan.workers, options["least"], options["rebalance"]))
        return {"interrupted": False}

    library("shoal.elastic.api", train_elastic=train_elastic)
    assert shoal("train", "--workers", "4", "--elastic", "--min-workers", "2", "--json")[0] == 0
    assert shoal("train", "--workers", "4", "--elastic", "--rebalance", "--json")[0] == 0
    assert calls == [(4, 2, False), (4, 1, True)]


def test_train_hands_the_bounds_of_autoscaling_on(shoal, library):
    calls = []

    def train_elastic(recipe, plan, **options):
        calls.append(options["autoscale"])
        return {"interrupted": False}

    library("shoal.elastic.api", train_elastic=train_elastic)
    assert shoal("train", "--workers", "2", "--elastic", "--autoscale", "1:4", "--json")[0] == 0
    assert shoal("train", "--workers", "2", "--elastic", "--json")[0] == 0
    assert calls == [(1, 4), None]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--autoscale", "1:4"], "add --elastic"),
        (["--elastic", "--autoscale", "4"], "use two numbers of workers, MIN:MAX"),
        (["--elastic", "--autoscale", "1:-4"], "use two numbers of workers, MIN:MAX"),
        (["--elastic", "--autoscale", "1:4", "--emulate-hosts", "2"], "leave it out on several"),
    ],
)
def test_autoscaling_that_cannot_be_is_refused(shoal, flags, said):
    code, _, err = shoal("train", "--workers", "2", *flags)
    assert code == 2
    assert said in err


def test_a_minimum_without_elastic_is_refused(shoal):
    code, _, err = shoal("train", "--min-workers", "2")
    assert code == 2
    assert "add --elastic" in err


def test_train_on_several_hosts_calls_the_library_with_the_addresses_or_plays_them_all(shoal, library):
    calls = []

    def noted(recipe, plan, **options):
        calls.append({key: options.get(key) for key in ("agents", "number", "hosts", "least")})
        return {"interrupted": False}

    library("shoal.elastic.hosts", train_on_hosts=noted)
    library("shoal.elastic.emulated", train_emulated=noted)
    assert shoal("train", "--elastic", "--workers", "3", "--agents", "a:1,b:2", "--agent", "1", "--json")[0] == 0
    assert shoal("train", "--elastic", "--workers", "3", "--emulate-hosts", "3", "--min-workers", "2", "--json")[0] == 0
    assert calls == [
        {"agents": ["a:1", "b:2"], "number": 1, "hosts": None, "least": 1},
        {"agents": None, "number": None, "hosts": 3, "least": 2},
    ]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--emulate-hosts", "3"], "add --elastic"),
        (["--elastic", "--agents", "a:1,b:2"], "give both"),
        (["--elastic", "--agent", "1"], "give both"),
        (["--elastic", "--emulate-hosts", "3", "--agents", "a:1,b:2", "--agent", "0"], "leave --agents out"),
        (["--elastic", "--emulate-hosts", "3", "--rebalance"], "leave it out on several"),
    ],
)
def test_flags_of_several_hosts_that_do_not_go_together_are_refused(shoal, flags, said):
    code, _, err = shoal("train", "--workers", "2", *flags)
    assert code == 2
    assert said in err


def test_resize_says_what_it_took(shoal, library):
    done = {"before": 4, "workers": 2, "step": 12, "pause_s": 0.21, "why": "asked"}
    library(
        "shoal.elastic.commands", resize=lambda run, workers, servers, wait_s: {**done, "run": run, "asked": workers}
    )
    assert shoal("resize", "runs/a", "--workers", "2")[1] == (
        "4 -> 2 workers from step 12 on, 0.21 s between two steps\n"
    )
    found = json.loads(shoal("resize", "runs/a", "--workers", "2", "--json")[1])
    assert (found["run"], found["asked"], found["step"]) == ("runs/a", 2, 12)


@pytest.mark.parametrize(("will", "said"), [(True, "will do"), (False, "is short: a kill would cost the step")])
def test_drain_says_whether_the_grace_will_do(shoal, library, will, said):
    done = {"step": 12, "seconds": 0.5, "needed_s": 2.0, "grace_s": 30.0, "grace_will_do": will}
    library("shoal.elastic.commands", drain=lambda run, rank, grace_s, wait_s: done)
    out = shoal("drain", "runs/a", "--grace", "30")[1]
    assert "the run has ended, saved, after step 12" in out
    assert f"a grace of 30 s {said}" in out
    assert "rank 1 has left, after step 12" in shoal("drain", "runs/a", "--rank", "1")[1]


@pytest.mark.parametrize("equal", [True, False])
def test_chaos_fails_when_a_bit_differs_and_shows_each_fault(shoal, library, equal):
    asked = []

    def rehearse(recipe, plan, faults, **options):
        asked.extend(faults)
        return {
            "ok": equal,
            "bits_equal": equal,
            "told_once": True,
            "notes": [] if equal else ["the first step that differs is 4"],
            "steps": 12,
            "workers": plan.workers,
            "goodput": 0.9,
            "faults": [Survived(str(fault), True, 0.02, 0.3, 1, "killed") for fault in faults],
        }

    library("shoal.elastic.chaos", rehearse=rehearse, usual_faults=lambda *_: [])
    code, out, _ = shoal("chaos", "--workers", "2", "--fault", "kill:rank=1,step=5,phase=backward")
    assert asked == [Fault("kill", 1, 5, "backward")]
    assert code == (0 if equal else 1)
    assert "kill rank 1 at step 5, backward  0.02 s         0.30 s           1" in out
    assert ("weights NOT those" in out) == ("the first step that differs is 4" in out) == (not equal)
    code, out, _ = shoal("chaos", "--workers", "2", "--fault", "kill:step=5", "--json")
    assert json.loads(out.splitlines()[-1])["faults"][0]["noticed_s"] == 0.02


def test_chaos_over_hosts_calls_the_library_with_faults_of_hosts(shoal, library):
    asked = []

    def rehearse(recipe, plan, faults, *, hosts, network, steps, **options):
        asked.append((faults, hosts, network, steps))
        told = {"steps": 12, "workers": 3, "hosts": 3, "goodput": 0.9, "notes": []}
        return {"ok": True, "bits_equal": True, "told_once": True, **told, "faults": []}

    library("shoal.elastic.chaos_hosts", rehearse_hosts=rehearse)
    how = ("chaos", "--workers", "3", "--emulate-hosts", "3")
    code, out, _ = shoal(*how, "--fault", "cut-in:host=1", "--network", "namespaces", "--steps", "50")
    assert code == 0
    assert asked == [([HostFault("cut-in", 1)], 3, "namespaces", 50)]
    assert "3 workers of 3 hosts" in out
    assert shoal(*how, "--kinds", "delay")[0] == 0
    assert asked[1] == ([HostFault("delay", 0)], 3, "relay", 0)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--network", "relay"], "add --emulate-hosts 3"),
        (["--emulate-hosts", "3", "--phases", "forward"], "leave it out with --emulate-hosts"),
        (["--emulate-hosts", "3", "--kinds", "kill"], "did you mean 'kill-host'"),
        (["--emulate-hosts", "3", "--fault", "kill:rank=1,step=5"], "did you mean 'kill-host'"),
    ],
)
def test_faults_of_workers_and_of_hosts_are_not_mixed(shoal, flags, said):
    code, _, err = shoal("chaos", "--workers", "3", *flags)
    assert code == 2
    assert said in err


def test_drain_of_one_host_says_who_has_left(shoal, library):
    asked = []

    def drain(run, *, rank, host, grace_s, wait_s):
        asked.append((run, rank, host))
        return {"step": 12, "seconds": 0.5, "needed_s": 2.0}

    library("shoal.elastic.commands", drain=drain)
    assert "b has left, after step 12" in shoal("drain", "runs/a", "--host", "b")[1]
    assert asked == [("runs/a", None, "b")]
    code, _, err = shoal("drain", "runs/a", "--host", "b", "--rank", "1")
    assert code == 2
    assert "give one of them" in err
