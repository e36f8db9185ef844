"""Fault rehearsal: what it says of each fault, on runs that keep their bits and on one whose model cannot."""

import signal
from pathlib import Path

import pytest
import torch
from train.tiny_runs import recipe, splits

from shoal.elastic.chaos import explained, first_difference, lasted_s, rehearse, told_once, usual_faults
from shoal.elastic.deeds import DEEDS
from shoal.elastic.faults import KINDS, PHASES, Fault
from shoal.errors import UserError
from shoal.recipe.plan import Plan
from shoal.run.scratch import LOCK

DATA = splits("cnn", 101)
RESNET = recipe("resnet", steps=12, clip=0.05)


def plan(workers: int = 3) -> Plan:
    return Plan(mesh={"data": workers}, device="cpu")


def test_the_usual_faults_have_every_kind_and_every_phase_and_come_one_after_the_other():
    faults = usual_faults(3)
    assert {fault.kind for fault in faults} == set(KINDS) == set(DEEDS)
    assert {fault.phase for fault in faults} == set(PHASES)
    steps = [fault.step for fault in faults]
    assert steps == sorted(set(steps))
    assert all(fault.rank < 3 for fault in faults)


@pytest.mark.parametrize(
    ("kinds", "phases", "said"),
    [(["kil"], [], "did you mean 'kill'"), (["kill"], ["bakward"], "did you mean 'backward'")],
)
def test_a_misspelt_kind_or_phase_is_named_with_the_nearest(kinds, phases, said):
    with pytest.raises(UserError, match=said):
        usual_faults(3, kinds, phases)


def committed(*steps: int, loss: float = 1.0) -> list[dict]:
    return [{"event": "committed", "step": step, "loss": loss * step, "grad_norm": 1.0} for step in steps]


def test_a_log_is_linear_but_for_what_a_checkpoint_takes_back():
    resumed = [{"event": "resumed", "step": 2}]
    assert told_once(committed(1, 2, 3), 3)
    assert told_once(committed(1, 2, 3) + resumed + committed(3, 4), 4)
    assert not told_once(committed(1, 2), 3)
    assert not told_once(committed(1, 2, 2, 3), 3)
    assert not told_once(committed(1, 3), 3)
    assert not told_once(committed(1) + resumed + committed(3), 3), "a step was left out"


def test_a_run_lasts_from_its_first_start_also_when_all_workers_began_anew():
    events = [{"event": "started", "time": 1.0}, {"event": "started", "time": 6.0}, {"event": "ended", "time": 9.0}]
    assert lasted_s(events) == 8.0


def test_the_first_step_that_differs_is_found_also_where_it_is_told_twice():
    assert first_difference(committed(1, 2, 3), committed(1, 2, 3)) is None
    assert first_difference(committed(1, 2, 3), [*committed(1, 2, 3), *committed(2, loss=1.5)]) == 2


def test_what_does_not_go_on_is_said_by_where_the_difference_begins():
    kill = Fault("kill", 1, 5, "forward")
    assert "does not give the same numbers twice" in explained(3, [kill], [])
    assert "a new worker does not have it" in explained(7, [kill], [])
    assert "in no parameter, buffer or state_dict" in explained(7, [kill], [{"event": "resumed", "step": 4}])


@pytest.mark.parametrize("stopped", ["undisturbed", "disturbed"])
def test_ctrl_c_ends_the_whole_rehearsal_and_not_only_the_run_that_it_met(stopped, agent, tmp_path):
    def interrupt(event):
        if Path(event["run_dir"]).name == stopped and event["event"] == "committed" and event["step"] == 1:
            signal.raise_signal(signal.SIGINT)

    given = {"faults": [Fault("kill", 1, 9, "forward")], "folder": tmp_path, "agent": agent, "progress": interrupt}
    with pytest.raises(KeyboardInterrupt):
        rehearse(recipe("mlp", steps=12), plan(2), data=splits("mlp", 101), **given)
    assert {place.name for place in tmp_path.iterdir()} == {"undisturbed", stopped}


def test_a_rehearsal_tells_of_every_kind_of_fault_and_finds_the_bits_equal(agent):
    faults = [
        Fault("kill", 1, 3, "bucket0"),
        Fault("nan", 1, 6, "forward"),
        Fault("flip", 0, 9, "updated"),
        Fault("skew", 1, 12, "loading"),
        Fault("fill", 0, 15, "loading"),
        Fault("thaw", 1, 23, "backward"),
        Fault("rot", 0, 26, "forward"),
        Fault("kill", 0, 31, "recovering"),
    ]
    found = rehearse(RESNET, plan(), faults, data=DATA, agent=agent)
    assert found["ok"], found
    assert found["goodput"] > 0
    assert (found["bits_equal"], found["told_once"], found["differs_at"], found["notes"]) == (True, True, None, [])
    by_kind = {fault.kind: survived for fault, survived in zip(faults[:-1], found["faults"], strict=False)}
    assert all(survived.happened for survived in by_kind.values())
    assert "SIGKILL" in by_kind["kill"].why
    assert by_kind["kill"].redone == 1
    assert "rank 1: the gradient is not finite at step 6" in by_kind["nan"].why
    assert by_kind["nan"].redone == 1
    assert "parameters differ in step 10: rank 0 disagrees with the others" in by_kind["flip"].why
    assert by_kind["skew"].redone == by_kind["thaw"].redone == 0
    assert "File too large" in by_kind["fill"].why
    assert by_kind["rot"].redone > 1, "the newest checkpoint was passed over"
    assert all(survived.noticed_s >= 0 for survived in by_kind.values() if survived.noticed_s is not None)


class Counting(torch.nn.Module):
    """Counts its passes for itself, and computes with the count."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5))
        self.passes = 0

    def forward(self, input):
        self.passes += 1
        return self.layers(input) * (1 + self.passes / 1000)


def test_a_model_that_keeps_something_to_itself_is_found_out(agent):
    places: set[tuple[Path, bool]] = set()

    def listen(event):
        place = Path(event["run_dir"]).parent
        places.add((place, (place / LOCK).exists()))

    faults = [Fault("kill", 1, 4, "forward")]
    found = rehearse(RESNET, plan(2), faults, data=DATA, model=Counting, agent=agent, progress=listen)
    ((place, locked),) = places
    assert (locked, place.exists()) == (True, False), "where it is killed, the next rehearsal removes what it leaves"
    assert not found["ok"]
    assert not found["bits_equal"]
    assert found["differs_at"] >= 4
    note, named = found["notes"]
    assert "kept by each worker for itself" in note
    assert "the model gives another loss" in named
    assert "'passes' of the model was 0 and is 2" in named
    assert found["told_once"], "it is the model that is wrong, not the run"
