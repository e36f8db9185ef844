"""Every optimiser does through Shoal what it does in a plain loop; rates follow their schedule."""

import inspect
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train import plain_loop
from train.tiny_runs import recipe, splits

from shoal.errors import RunFailed, UserError
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import ModelSpec, OptimizerSpec, ScheduleSpec
from shoal.run.run import Run
from shoal.train import checkpoint
from shoal.train.loop import Order, run_recipe
from shoal.train.optimizers import make_optimizer, optimizer_classes, writes_gradients
from shoal.train.schedules import learning_rate
from shoal.train.weights import weights_sha256

NAMES = sorted(set(optimizer_classes()) - {"Muon"})  # Muon takes matrices only: see below
FOREACH = OptimizerSpec(name="sgd", lr=0.1, options={"momentum": 0.9, "nesterov": True, "foreach": True})


def short(spec: OptimizerSpec):
    return recipe("mlp", optimizer=spec, steps=3)


def plainly(wanted, data) -> str:
    def make(model):
        return make_optimizer(wanted.optimizer, model, wanted.optimizer.lr)

    state, *_ = plain_loop.plain_training(wanted, data.train, make)
    return weights_sha256(state)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimiser_of_torch_gives_the_bits_of_a_plain_loop(run, name):
    wanted, data = short(OptimizerSpec(name=name, lr=0.01)), splits("mlp", 41, held_out=0)
    assert run(wanted, 2, data=data)["weights_sha256"] == plainly(wanted, data)


def settings(cls: type) -> list[dict]:
    known = inspect.signature(cls).parameters
    found: list[dict] = [{}]
    for option, value in {"weight_decay": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}.items():
        if option in known:
            found += [{**one, option: value} for one in found]
    return [one for one in found if "nesterov" not in one or "momentum" in one or "momentum" not in known]


KERNELS = [
    (name, kernel)
    for name, cls in sorted(optimizer_classes().items())
    for kernel in ("plain", "fused", "foreach")
    if kernel == "plain" or kernel in inspect.signature(cls).parameters
]


@pytest.mark.parametrize(("name", "kernel"), KERNELS)
def test_an_optimiser_that_is_trusted_leaves_the_gradients_as_they_are(name, kernel):
    cls = optimizer_classes()[name]
    for options in settings(cls):
        parameters = [torch.nn.Parameter(torch.randn(3, 4)) for _ in range(2)]
        optimizer = cls(parameters, lr=0.01, **options, **({} if kernel == "plain" else {kernel: True}))
        if writes_gradients(optimizer):
            continue
        for _ in range(2):
            given = [torch.randn(3, 4) for _ in parameters]
            for parameter, gradient in zip(parameters, given, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
            assert all(torch.equal(p.grad, g) for p, g in zip(parameters, given, strict=True)), options


def test_an_optimiser_that_writes_to_gradients_gets_a_copy_of_its_own(run):
    data = splits("mlp", 41, held_out=0)
    assert writes_gradients(make_optimizer(FOREACH, torch.nn.Linear(2, 2), 0.1))
    for kind in (torch.optim.Muon, torch.optim.Adafactor):  # which live in torch.optim itself
        optimizer = kind([torch.zeros(4, 4, requires_grad=True)], lr=0.1)
        assert not writes_gradients(optimizer)
    assert run(short(FOREACH), 3, data=data)["weights_sha256"] == plainly(short(FOREACH), data)


def test_the_foreach_kernel_of_nesterov_does_write_to_gradients():
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, nesterov=True, foreach=True)
    optimizer.step()
    assert not torch.equal(weight.grad, torch.ones(2)), "this torch no longer does: the copy may go"


def test_an_unknown_optimiser_or_option_is_told_with_the_nearest_name(run, tmp_path):
    for spec, text in (
        (OptimizerSpec(name="adamv"), "adam"),
        (OptimizerSpec(name="adamw", options={"beta": 1}), "betas"),
        (OptimizerSpec(name="adamw", options={"betas": [2, 3]}), "Invalid beta"),
        (OptimizerSpec(name="Muon"), "Muon only supports 2D"),
    ):
        with pytest.raises(UserError, match=text) as told:
            run(short(spec), 1, data=splits("mlp", 41), run_dir=tmp_path / "new")
        assert "\n" not in str(told.value)
        assert not (tmp_path / "new").exists()


def test_biases_and_norms_are_not_decayed():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    optimizer = make_optimizer(OptimizerSpec(options={"weight_decay": 0.1}), model, 0.1)
    assert [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups] == [(1, 0.1), (3, 0.0)]


# --- schedules ----------------------------------------------------------------------------------------------------


def rates(steps: int = 10, batch: int = 16, **schedule) -> list[float]:
    wanted = recipe("mlp", batch=batch, optimizer=OptimizerSpec(lr=1.0), schedule=ScheduleSpec(**schedule))
    return [round(learning_rate(wanted, step, steps), 12) for step in range(1, steps + 1)]


def test_a_constant_rate_warms_up_linearly():
    assert rates(6, kind="constant", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_linear_rate_ends_at_the_final_one():
    assert rates(5, kind="linear", final=0.0) == [0.8, 0.6, 0.4, 0.2, 0.0]
    assert rates(6, kind="linear", final=0.2, warmup_steps=2) == [0.5, 1.0, 0.8, 0.6, 0.4, 0.2]


def test_a_cosine_rate_is_half_way_down_in_the_middle():
    found = rates(8, kind="cosine", final=0.1)
    assert found[3] == pytest.approx(0.55)
    assert found[-1] == pytest.approx(0.1)
    assert found[1] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)


def test_a_stepped_rate_falls_after_each_run_of_steps():
    assert rates(7, kind="step", step_every=3, gamma=0.5) == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25]


def test_the_rate_grows_with_the_batch_where_a_base_is_given():
    assert rates(1, batch=64, kind="constant", base_batch=16) == [4.0]


def test_the_rate_of_a_step_is_told_and_applied(run):
    wanted = recipe("mlp", steps=6, schedule=ScheduleSpec(kind="linear", final=0.0, warmup_steps=2))
    result = run(wanted, 2, data=splits("mlp", 41))
    told = [e["lr"] for e in Run(Path(result["run_dir"])).events() if e["event"] == "committed"]
    assert told == [learning_rate(wanted, step, 6) for step in range(1, 7)]
    other = run(replace(wanted, schedule=ScheduleSpec(kind="constant")), 2, data=splits("mlp", 41))
    assert other["weights_sha256"] != result["weights_sha256"]


# --- what else a run settles --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cnn", "gpt"])
def test_held_out_figures_are_the_same_to_the_bit_on_any_number_of_workers(run, kind):
    wanted = recipe(kind, batch=8, steps=2)  # 20 held-out samples: batches of 8, 8 and 4
    found = [run(wanted, n, data=splits(kind, 41))["figures"] for n in (1, 2, 3)]
    assert found[0] == found[1] == found[2]
    assert found[0]["loss"] > 0


def test_a_precision_left_open_is_settled_and_its_origin_written_down(run):
    result = run(recipe("mlp", precision="auto", steps=2), 2, data=splits("mlp", 41))
    told = Run(Path(result["run_dir"]))
    assert told.recipe.precision in ("float32", "bfloat16")
    assert "measured" in told.origins["precision"]
    started = next(e for e in told.events() if e["event"] == "started")
    assert started["precision"] == told.recipe.precision


# --- buffers of a module ------------------------------------------------------------------------------------------


class Buffered(torch.nn.Module):
    """Logits of an image, with buffers of every kind."""

    def __init__(self, replaces: bool = False) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(64, 5)
        self.replaces = replaces
        self.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))
        self.register_buffer("turns", torch.polar(torch.ones(3), torch.arange(3.0)))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, input):
        logits = self.linear(input.flatten(1))
        with torch.no_grad():
            self.seen += len(input)
            if self.replaces:
                self.mean = 0.9 * self.mean + 0.1 * logits.mean(0)
            else:
                self.mean.lerp_(logits.mean(0), 0.1)
        return logits


CUSTOM = recipe("mlp", model=ModelSpec(kind="custom", task="classification"), steps=6)


def test_buffers_with_infinities_complex_and_whole_numbers_are_shared(run):
    hashes = set()
    for placement in ((8,), (3, 5), (2, 2, 4)):
        plan = Plan(mesh={"data": len(placement)}, placement=placement, device="cpu")
        result = run(CUSTOM, plan=plan, data=splits("mlp", 48, held_out=0), model=Buffered)
        hashes.add(result["weights_sha256"])
    assert len(hashes) == 1
    state = checkpoint.newest(Path(result["run_dir"]) / "checkpoints")[0].tensors
    start = Buffered()
    assert torch.equal(state["model/mask"], start.mask)
    assert torch.equal(state["model/turns"], start.turns)
    assert int(state["model/seen"]) == 6 * 2  # the mean over the shards: 2 samples of each a step
    assert state["model/mean"].any()


def test_a_buffer_that_is_replaced_in_the_forward_pass_is_refused_not_lost(run):
    with pytest.raises(UserError, match="new tensor in the place of buffer 'mean'"):
        run(CUSTOM, 2, data=splits("mlp", 48, held_out=0), model=lambda: Buffered(replaces=True))


def _drifting(group, order):
    def observe(worker, step):
        if worker.rank == 2 and step.number == 3:
            with torch.no_grad():
                next(worker.held.module.parameters()).view(-1)[0] += 1e-3

    return run_recipe(group, replace(order, observe=observe))


def test_a_worker_whose_parameters_differ_is_named(agent, run, tmp_path):
    plan = Plan(mesh={"data": 3}, device="cpu")
    order = Order(CUSTOM, plan, run_dir=tmp_path / "new", model=Buffered, data=splits("mlp", 48))
    with pytest.raises(RunFailed, match="parameters differ in step 4: rank 2 disagrees with the others"):
        agent.run(_drifting, (order,), workers=3)
