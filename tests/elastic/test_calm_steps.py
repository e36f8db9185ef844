"""What a step of an elastic run says that one of a plain run does not, counted by the run's own log."""

from typing import Any

import pytest
from train.tiny_runs import recipe, splits

DATA = splits("mlp", 101)
HOW: list[Any] = [
    pytest.param({"states": "zero1"}, 0, id="slices"),  # that they are in the mirror goes with that they are updated
    pytest.param({"sync": "parameter-server"}, 0, id="server"),  # with the commit, and its answer
    pytest.param({"mesh": {"pipe": 2}}, 2, id="stages"),  # the norm's; nothing follows an update: they say so
    pytest.param({"states": "replicated"}, 0, id="whole"),
]


@pytest.mark.parametrize(("how", "votes"), HOW)
def test_a_step_is_known_to_be_in_the_mirror_without_a_message_of_its_own(disturb, undisturbed, how, votes):
    wanted = recipe("mlp", steps=8)
    run = disturb(wanted, workers=2, how=how, data=DATA)
    assert run.result["weights_sha256"] == undisturbed(wanted, data=DATA)
    told = [event["comm"] for event in run.of("committed") if event["step"] > 3]
    gathers = [
        sum(each["calls"][0] for each in comm["operations"] if each["operation"] == "gather") / comm["steps"]
        for comm in told
    ]
    assert gathers == [votes] * 5
