"""The guards of runs whose workers hold parts: stages, slices, cut tensors, or weights that servers hold."""

import json
from dataclasses import replace

import cloudpickle
import pytest
import torch
from train import test_guards
from train.test_guards import DATA, RESNET, STEP, Planted, _planted, ids_of
from train.tiny_runs import recipe, splits

from shoal.errors import RunFailed
from shoal.recipe.plan import Plan
from shoal.run.run import Run
from shoal.train.loop import Order
from shoal.train.not_finite import NotFinite, Spoilt

GPT, WORDS = recipe("gpt", steps=6, clip=0.05), splits("gpt", 101)
STAGES = {"mesh": {"pipe": 3}}
REPLICAS = {"mesh": {"data": 2, "pipe": 2}}
INTERLEAVED = {"mesh": {"pipe": 2}, "pipeline.schedule": "interleaved", "pipeline.chunks": 2}
SERVED = {"mesh": {"data": 2}, "sync": "parameter-server", "servers": 2}
CUT = {"mesh": {"tensor": 2}}


def plan_of(settings):
    from shoal.recipe.pipeline_plan import PipelinePlan

    own = {key.partition(".")[2]: value for key, value in settings.items() if "." in key}
    rest = {key: value for key, value in settings.items() if "." not in key}
    return Plan(**rest, device="cpu", **({"pipeline": PipelinePlan(**own)} if own else {}))


@pytest.fixture
def with_fault(agent, tmp_path, request):
    for module in (test_guards, request.module):
        cloudpickle.register_pickle_by_value(module)

    def run(settings, fault, made=RESNET, data=DATA, name="run", model=None):
        plan = plan_of(settings)
        order = Order(made, plan, run_dir=tmp_path / name, data=data, model=model)
        found = agent.run(_planted, (order, fault), workers=plan.workers, servers=plan.server_processes)[0]
        return found, Run(tmp_path / name).events()

    return run


@pytest.mark.parametrize(
    ("settings", "fault", "rank", "who"),
    [
        (STAGES, "gradient", 1, "rank 1 (stage 1): the gradient is not finite at step 4 although the loss is ("),
        pytest.param(
            STAGES,
            "gradient",
            2,
            "rank 2 (stage 2): the gradient is not finite at step 4 although the loss is (",
            marks=pytest.mark.slow,
        ),
        (REPLICAS, "gradient", 3, "rank 3 (stage 1): the gradient is not finite at step 4 although the loss is ("),
        pytest.param(
            INTERLEAVED,
            "gradient",
            1,
            "rank 1 (stage 1): the gradient is not finite at step 4 although the loss is (",
            marks=pytest.mark.slow,
        ),
        (SERVED, "gradient", 1, "rank 1: the gradient is not finite at step 4 although the loss is ("),
        pytest.param(SERVED, "loss", 1, "rank 1: loss is nan at step 4, shard 4", marks=pytest.mark.slow),
        ({"mesh": {"data": 2}, "states": "zero2"}, "loss", 1, "rank 1: loss is nan at step 4, shard 4"),
        pytest.param(
            {"mesh": {"data": 2}, "states": "zero3"},
            "loss",
            0,
            "rank 0: loss is nan at step 4, shard 0",
            marks=pytest.mark.slow,
        ),
        ({"mesh": {"data": 2}, "states": "zero3"}, "gradient", 0, "the gradient is not finite at step 4 although the "),
    ],
    ids=lambda value: str(value) if not isinstance(value, dict) else "-".join(map(str, value.values())),
)
def test_a_nan_that_comes_once_is_named_and_its_step_done_again_with_the_same_bits(
    with_fault, run, settings, fault, rank, who
):
    result, events = with_fault(settings, Planted(fault, rank))
    assert result["weights_sha256"] == run(RESNET, 1, data=DATA)["weights_sha256"]
    (replayed,) = [event for event in events if event["event"] == "replayed"]
    assert replayed["step"] == STEP + 1
    assert replayed["why"].startswith(who)
    assert [event["step"] for event in events if event["event"] == "committed"] == list(range(1, 7))


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        pytest.param(CUT, "gradient", id="tensor"),
        pytest.param({"mesh": {"context": 2}}, "loss", id="context", marks=pytest.mark.slow),
    ],
)
def test_cut_tensors_do_the_step_again_to_the_bits_of_their_own_undisturbed_run(with_fault, run, settings, fault):
    result, events = with_fault(settings, Planted(fault, 1), GPT, WORDS)
    assert result["weights_sha256"] == run(GPT, plan=plan_of(settings), data=WORDS)["weights_sha256"]
    (replayed,) = [event for event in events if event["event"] == "replayed"]
    assert replayed["step"] == STEP + 1
    assert f"at step {STEP + 1}" in replayed["why"]
    assert replayed["why"].startswith("rank ")


class BreaksInTheMiddle(torch.nn.Module):
    """What the middle layer gives is never a number, or its gradient is infinite."""

    def __init__(self, where: str):
        super().__init__()
        self.where = where
        self.first, self.middle, self.last = torch.nn.Linear(64, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 5)
        self.scale = torch.nn.Parameter(torch.ones(16) if where == "output" else torch.zeros(16))

    def forward(self, input):
        hidden = self.middle(self.first(input.flatten(1)).relu())
        if self.where == "output":
            hidden = hidden * ((self.scale - 1) / (self.scale - 1))  # 0 / 0
        else:
            hidden = hidden + self.scale.sqrt()
        return self.last(hidden)


def breaks_forward():
    return BreaksInTheMiddle("output")


def breaks_backward():
    return BreaksInTheMiddle("gradient")


@pytest.mark.parametrize("model", [breaks_forward, breaks_backward])
def test_what_comes_twice_in_a_pipeline_ends_the_run_and_names_the_stage_that_it_begins_in(run, tmp_path, model):
    with pytest.raises(RunFailed) as failed:
        run(
            RESNET,
            plan=plan_of({**STAGES, "pipeline.cuts": ("middle", "last")}),
            data=DATA,
            model=model,
            run_dir=tmp_path / "run",
        )
    line = str(failed.value)
    assert "\n" not in line
    assert "the same when the step was done again, rank 1 (stage 1) and 7 more: " in line
    said = "what its forward pass hands on is not a number at step 1, shard 0, sample ids "
    if model is breaks_backward:
        said = "that of parameter 'scale' is not, shard 0, sample ids "
    assert said in line
    assert {int(each) for each in line.partition("sample ids ")[2].split(", ")} == ids_of(1, range(1))
    assert not [e for e in Run(tmp_path / "run").events() if e["event"] in ("committed", "replayed")]


@pytest.mark.parametrize("rank", [0, 3])
def test_a_flipped_bit_in_one_replicas_stage_is_caught_in_that_step_and_told_by_all(with_fault, tmp_path, rank):
    """Of two replicas each remembers what its own update left; the workers of the other stage hear of it."""
    with pytest.raises(RunFailed, match=f"parameters differ in step {STEP + 1}: rank {rank} disagrees with the others"):
        with_fault(REPLICAS, Planted("bit", rank))
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert [e["step"] for e in map(json.loads, lines) if e["event"] == "committed"] == list(range(1, STEP + 1))


def test_a_nan_is_traced_to_the_stage_that_it_began_in():
    """Activations carry it to later stages, gradients to earlier ones."""
    loss = [Spoilt(2, (3,), (7,), float("nan"), stage=2), Spoilt(1, (3,), (7,), stage=1, output=True)]
    assert NotFinite(4, float("nan"), "", [*loss, Spoilt(0, (1,), (2,), stage=0)]).ranks == (1,)
    assert NotFinite(4, float("nan"), "", loss[:1]).ranks == (2,)
    gradients = [Spoilt(rank, (3,), (7,), stage=rank, parameter=f"p{rank}") for rank in range(2)]
    found = NotFinite(4, 1.0, "", [*gradients, Spoilt(3, (5,), (9,), stage=0)])
    assert found.ranks == (1, 3)
    assert str(found).startswith("rank 1 (stage 1) and 1 more: the gradient is not finite at step 4")
    masked = Spoilt(0, (3,), (7,), stage=0, output=True)
    assert NotFinite(4, 1.0, "", [masked, *gradients]).ranks == (1,), "a mask that is handed on is no fault"


def test_without_the_votes_a_replicas_flipped_bit_would_be_trained_on(with_fault, monkeypatch):
    def blind(group, order, fault):
        import shoal.train.gradients
        from shoal.train.loop import run_recipe

        shoal.train.gradients.parameter_checksum = lambda parameters: 0.0
        return run_recipe(group, replace(order, observe=fault))

    monkeypatch.setitem(globals(), "_planted", blind)
    with pytest.raises(RunFailed, match=r"differ after step 6|bits of parameter"):
        with_fault(REPLICAS, Planted("bit", 3))
