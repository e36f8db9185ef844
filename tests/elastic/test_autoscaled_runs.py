"""Real workers whose number a policy changes: the weights are those of an undisturbed run."""

import sys

import cloudpickle
import pytest
from train.tiny_runs import recipe, splits

from shoal.elastic.autoscale import Autoscale, Decision, Seen
from shoal.elastic.faults import Fault
from shoal.errors import UserError

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the agent cannot import a file of tests

DATA = splits("cnn", 101)
LONG = recipe("cnn", steps=64)


class ElsewhereMeasured(Autoscale):
    """On a host with free cores where two workers are twice as fast as one, and a third brings nothing. What this
    host, busy with other tests, would say is another matter."""

    def committed(self, seen: Seen) -> Decision | None:
        seconds = 0.1 if seen.workers == 1 else 0.05
        return super().committed(Seen(workers=seen.workers, wanted=seen.wanted, seconds=seconds, free=4.0))


@pytest.mark.slow
def test_a_run_grows_as_long_as_that_pays_goes_back_where_it_does_not_and_keeps_its_bits(disturb, undisturbed):
    policy = ElsewhereMeasured(1, 3, LONG.shards, window=3, window_s=0.0)
    run = disturb(LONG, 1, autoscale=policy, faults=[Fault("kill", 1, 50, "backward")], data=DATA)
    assert run.result["weights_sha256"] == undisturbed(LONG, data=DATA)
    decided = [(e["before"], e["workers"]) for e in run.of("autoscaled")]
    assert decided[:4] == [(1, 2), (2, 2), (2, 3), (3, 2)], "a try, a verdict, a try, a verdict"
    resized = [(e["before"], e["workers"], e["why"]) for e in run.of("resized")]
    assert [(before, workers) for before, workers, _ in resized[:3]] == [(1, 2), (2, 3), (3, 2)]
    assert resized[0][2] == "2 workers tried: 4.0 idle cores"
    assert resized[2][2].endswith("+0% in speed, where the shards allow +33% and at least +17% is wanted; 2 it is")
    assert run.steps == list(range(1, 65)), "no step is lost or told twice"
    (lost,) = run.of("lost")
    assert "SIGKILL" in lost["why"], "no worker ended but the one that was killed: those that are sent away only leave"
    assert {e["before"] for e in run.of("recovered")} == {2}


def test_a_run_whose_cores_are_all_taken_never_grows(disturb, undisturbed):
    """With the real look at the host: a worker that says it uses more cores than there are."""
    short = recipe("cnn", steps=30)
    run = disturb(short, 1, autoscale=Autoscale(1, 3, short.shards, cores=10**6, window=3, window_s=0.0), data=DATA)
    assert run.result["weights_sha256"] == undisturbed(short, data=DATA)
    assert not run.of("autoscaled")


@pytest.mark.parametrize(
    ("bounds", "options", "said"),
    [
        ((0, 2), {}, "use MIN:MAX, from 1 to 8"),
        ((3, 2), {}, "use MIN:MAX"),
        ((1, 9), {}, "the run has 8 shards"),
        ((1, 3), {"least": 2}, "use --autoscale 2:3"),
        ((3, 4), {}, "use --workers 3 to 4"),
        ((2, 2), {"how": {"mesh": {"pipe": 2}}}, "workers that are all alike"),
    ],
)
def test_bounds_and_plans_that_do_not_go_are_refused_before_anything_runs(disturb, tmp_path, bounds, options, said):
    with pytest.raises(UserError, match=said):
        disturb(LONG, 2, autoscale=bounds, data=DATA, **options)
    assert not (tmp_path / "run").exists()
