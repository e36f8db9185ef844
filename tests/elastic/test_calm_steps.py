"""What a step of an elastic run says that one of a plain run does not, counted by the run's own log."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from train.tiny_runs import recipe, splits

from shoal.train.held_parts import HeldParts

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


def test_what_is_held_is_listed_anew_only_when_it_is_held_in_other_tensors():
    module = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(module.parameters())
    parts = HeldParts(SimpleNamespace(module=module, coordinates={}), SimpleNamespace(), optimizer)

    def step() -> list[Any]:
        module(torch.ones(3)).sum().backward()
        optimizer.step()
        return parts.tensors()

    assert [part.name for part in parts.tensors()] == ["model/weight", "model/bias"]
    whole = step()
    assert {part.name for part in whole} >= {"model/bias", "optimizer/weight/exp_avg", "optimizer/bias/exp_avg_sq"}
    assert step() is whole
    moved = optimizer.state[module.weight]["exp_avg"].clone()
    optimizer.state[module.weight]["exp_avg"] = moved
    assert any(part.tensor is moved for part in step())
