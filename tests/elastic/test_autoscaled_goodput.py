"""Workers and batch together: a step is judged by what it is worth."""

import sys
from dataclasses import replace

import cloudpickle
import pytest
from train import goodput_hosts
from train.goodput_hosts import DATA, MADE, OnHost, rebatched

from shoal.elastic.autoscale import Autoscale, Decision, Seen
from shoal.elastic.autoscaled import progress_s
from shoal.run.batches import recorded

cloudpickle.register_pickle_by_value(goodput_hosts)
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def test_a_step_of_another_batch_takes_as_long_as_the_steps_that_it_is_worth():
    plain = {"event": "committed", "seconds": 0.3}
    assert progress_s(plain) == 0.3
    assert progress_s({**plain, "worth": 1.5}) == pytest.approx(0.2)


class ElsewhereMeasured(Autoscale):
    """On a host with free cores where steps take the less the more workers there are."""

    def committed(self, seen: Seen) -> Decision | None:
        return super().committed(replace(seen, seconds=0.1 / seen.workers, free=4.0))


@pytest.mark.slow
def test_workers_and_batch_may_follow_together_and_the_bits_are_those_of_the_replayed_run(disturb, undisturbed):
    long = replace(MADE, steps=60)
    policy = ElsewhereMeasured(1, 2, long.shards, window=3, window_s=0.0)
    run = disturb(long, 1, autoscale=policy, data=DATA, model=OnHost(fixed=0.1, a=0.02, rest=0.2))
    assert [e["workers"] for e in run.of("resized")] == [2]
    assert rebatched(run.events)
    assert all(e["worth"] > 0 for e in run.of("committed") if e["step"] > 25)
    again = replace(run.run.recipe, batching=recorded(run.run))
    assert run.result["weights_sha256"] == undisturbed(again, data=DATA)
