"""What `states = "auto"` comes to, and that a run says so; the user's own word always counts."""

from dataclasses import replace

import pytest
from train.tiny_runs import recipe, splits

from shoal.recipe.memory_plan import MemoryPlan
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import ModelSpec, OptimizerSpec, Recipe
from shoal.run.run import Run
from shoal.train.able import check_trainable
from shoal.train.states_choice import settled_states

ONE, TWO = Recipe(steps=1), {"data": 2}


def test_workers_of_one_host_share_what_they_would_all_compute():
    plan, told = settled_states(Plan(mesh=TWO), ONE)
    assert plan == Plan(mesh=TWO, states="zero1")
    assert told == {"states": "chosen: 2 workers of one host share weights"}


@pytest.mark.parametrize(
    ("plan", "recipe", "how", "why"),
    [
        ({"mesh": {"data": 1}}, {}, {}, "one worker"),
        ({"mesh": {"data": 2, "pipe": 2}}, {}, {}, "the mesh splits the model"),
        ({"sync": "fast"}, {}, {}, "sync = 'fast'"),
        ({"sync": "parameter-server"}, {}, {}, "sync = 'parameter-server'"),
        ({"compression": "int8"}, {}, {}, "compression = 'int8'"),
        ({"memory": MemoryPlan(offload_parameters="disk")}, {}, {}, "memory.offload_parameters = 'disk'"),
        ({}, {"optimizer": OptimizerSpec(name="Adafactor")}, {}, "Adafactor does not treat each element by itself"),
        ({}, {"model": ModelSpec(kind="custom", factory="a:b")}, {}, "a model or a loss of your own"),
        ({}, {}, {"foreign": True}, "a model or a loss of your own"),
        ({}, {}, {"elastic": True}, "what every worker has is not lost with one"),
        ({}, {}, {"joined": True}, "share no memory"),
    ],
)
def test_states_stay_whole_where_sharding_is_not_carried_out_or_costs_something(plan, recipe, how, why):
    settled, told = settled_states(Plan(**{"mesh": TWO, **plan}), replace(ONE, **recipe), **how)
    assert settled.states == "replicated"
    assert why in told["states"]


@pytest.mark.parametrize(
    "memory",
    [
        {"optimizer_bits": 8},
        {"parameters": "bfloat16-compensated"},
        {"offload_optimizer": "disk"},
        {"offload_parameters": "host"},
        {"recompute": "full"},
        {"peak_bytes": "1GiB"},
    ],
    ids=str,
)
def test_whoever_saves_memory_has_states_once_a_host_too(memory):
    plan = Plan(mesh=TWO, memory=MemoryPlan(**memory))
    assert settled_states(plan, ONE)[0] == replace(plan, states="zero1")
    check_trainable(replace(plan, states="zero1"), ONE)


@pytest.mark.parametrize("states", ["replicated", "zero2"])
def test_what_the_user_says_counts(states):
    plan = Plan(mesh=TWO, states=states)
    assert settled_states(plan, ONE) == (plan, {})


def test_a_run_has_what_was_chosen_in_its_plan_and_its_log_and_the_bits_of_whole_states(run, tmp_path):
    made, data = recipe("cnn", steps=3), splits("cnn", 64)
    told = run(made, plan=Plan(mesh=TWO, device="cpu"), data=data, run_dir=tmp_path / "run")
    run_dir = Run(tmp_path / "run")
    assert run_dir.plan.states == "zero1"
    assert run_dir.origins["states"] == "chosen: 2 workers of one host share weights"
    started = next(event for event in run_dir.events() if event["event"] == "started")
    assert started["states"] == "zero1 (chosen: 2 workers of one host share weights)"
    whole = run(made, plan=Plan(mesh=TWO, states="replicated", device="cpu"), data=data)
    assert told["weights_sha256"] == whole["weights_sha256"]


@pytest.mark.parametrize("name", ["adamw", "AdamW", "sgd", "RMSprop"])
def test_optimisers_are_known_by_their_names_in_recipes(name):
    made = replace(ONE, optimizer=OptimizerSpec(name=name))
    assert settled_states(Plan(mesh=TWO), made)[0].states == "zero1"
