"""Runs whose parameters and optimiser states are kept in fewer bits, or elsewhere, between two updates."""

from pathlib import Path

import pytest
import torch
from train.test_exactness import plan, trail
from train.tiny_runs import recipe, splits

from shoal.errors import UserError
from shoal.memory.narrow import REST
from shoal.memory.streamed import CODES, SCALES
from shoal.recipe.memory_plan import MemoryPlan
from shoal.recipe.recipe import ModelSpec, OptimizerSpec
from shoal.run.run import Run
from shoal.train import checkpoint
from shoal.train.scoring import Target, rebuild

LARGE = {  # matrices of 4096 elements and more, which are worth moving and worth quantising
    "mlp": ModelSpec(kind="mlp", options={"hidden": (96, 48)}),
    "gpt": ModelSpec(kind="gpt", options={"layers": 2, "heads": 2, "width": 48, "dropout": 0.1}),
    "lstm": ModelSpec(kind="lstm", options={"width": 40, "layers": 2, "dropout": 0.1}),
}
EXACT = {
    "states on disk": MemoryPlan(offload_optimizer="disk"),
    "parameters on disk": MemoryPlan(offload_parameters="disk", blocks=()),
    "both, recomputed": MemoryPlan(offload_optimizer="disk", offload_parameters="disk", recompute="full"),
    "on the host": MemoryPlan(offload_optimizer="host", offload_parameters="host"),
}
LOSSY = {
    "8 bits": MemoryPlan(optimizer_bits=8),
    "stochastic": MemoryPlan(parameters="bfloat16-stochastic"),
    "compensated": MemoryPlan(parameters="bfloat16-compensated", offload_optimizer="disk"),
    "all": MemoryPlan(
        optimizer_bits=8, parameters="bfloat16-stochastic", offload_optimizer="disk", offload_parameters="disk"
    ),
}


def large(kind: str, **changes):
    return recipe(kind, **{"model": LARGE[kind], "steps": 4, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(LARGE))
def test_what_is_kept_elsewhere_keeps_every_bit(run, kind):
    wanted, data = large(kind, clip=0.05), splits(kind, 53)  # the fourth step is a tail
    plain = run(wanted, 1, data=data)
    for number, memory in enumerate(EXACT.values()):
        result = run(wanted, plan=plan(*((8,), (3, 5))[number % 2], memory=memory), data=data)
        assert result["weights_sha256"] == plain["weights_sha256"], memory
        assert trail(result) == trail(plain), memory


@pytest.mark.slow
@pytest.mark.parametrize("way", list(LOSSY))
def test_what_is_lossy_has_the_same_bits_on_any_number_of_workers_and_is_called_lossy(run, way):
    wanted, data, memory = large("gpt"), splits("gpt", 53), LOSSY[way]
    results = [run(wanted, plan=plan(*owned, memory=memory), data=data) for owned in ((8,), (3, 5), (2, 2, 4))]
    plain = run(wanted, 1, data=data)
    assert len({result["weights_sha256"] for result in results}) == 1
    assert results[0]["weights_sha256"] != plain["weights_sha256"]
    assert results[0]["loss"] == pytest.approx(plain["loss"], rel=0.02)
    started = next(event for event in Run(Path(results[0]["run_dir"])).events() if event["event"] == "started")
    assert started["lossy"] == memory.lossy
    assert not plan(8, memory=memory).exact


@pytest.mark.parametrize("way", ["all", "compensated"])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(run, way):
    data, memory = splits("gpt", 53), LOSSY[way]
    whole = run(large("gpt", steps=5), plan=plan(8, memory=memory), data=data)
    part = run(large("gpt", steps=2), plan=plan(3, 5, memory=memory), data=data)
    rest = run(large("gpt", steps=5), plan=plan(2, 6, memory=memory), data=data, resume=part["run_dir"])
    assert rest["weights_sha256"] == whole["weights_sha256"]
    ends = [checkpoint.newest(Path(result["run_dir"]) / "checkpoints")[0].tensors for result in (whole, rest)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_run_in_bfloat16_is_scored_with_the_weights_that_it_trained(run, agent):
    data = splits("mlp", 101)
    result = run(large("mlp"), plan=plan(3, 5, memory=LOSSY["compensated"]), data=data)
    state = checkpoint.newest(Path(result["run_dir"]) / "checkpoints")[0]
    model = rebuild(Target(Run(Path(result["run_dir"])), None), state, data.train.facts)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, state.tensors[f"model/{name}"].float())


def keys_of(result: dict) -> set[str]:
    """How the states of the newest checkpoint are kept."""
    tensors = checkpoint.newest(Path(result["run_dir"]) / "checkpoints")[0].tensors
    return {name.rpartition("/")[2] for name in tensors if name.startswith("optimizer/")}


@pytest.mark.slow
def test_a_checkpoint_goes_on_in_32_bits_and_back_with_a_line_for_each_change(run, agents_here, capfd):
    from shoal.train.api import train  # in agents whose stderr is this test's

    data, few = splits("mlp", 101), MemoryPlan(optimizer_bits=8, parameters="bfloat16-compensated")
    first = run(large("mlp", steps=3), plan=plan(8, memory=few), data=data)
    assert {"exp_avg" + CODES, "exp_avg_sq" + SCALES, REST} <= keys_of(first)
    capfd.readouterr()
    second = train(large("mlp", steps=6), plan(3, 5), data=data, resume=first["run_dir"])
    assert keys_of(second) == {"exp_avg", "exp_avg_sq", "step"}
    assert capfd.readouterr().err.splitlines() == [
        "shoal: the checkpoint's bfloat16 parameters go on in float32.",
        "shoal: the checkpoint's 8-bit optimiser states go on in 32 bits.",
    ]
    third = train(large("mlp", steps=9), plan(3, 5, memory=few), data=data, resume=second["run_dir"])
    assert {"exp_avg" + CODES, "exp_avg_sq" + SCALES, REST} <= keys_of(third)
    assert capfd.readouterr().err.splitlines() == [
        "shoal: the checkpoint's float32 parameters go on in bfloat16.",
        "shoal: the checkpoint's 32-bit optimiser states go on in 8 bits.",
    ]
    plain = run(large("mlp", steps=9), 1, data=data)
    assert third["loss"] == pytest.approx(plain["loss"], rel=0.2)  # of a start of 1.7


def test_compensated_parameters_that_go_on_in_float32_lose_no_bit(run):
    """Split and joined again without a step between: the very float32 weights."""
    data = splits("mlp", 101)
    float32 = run(large("mlp", steps=3), 1, data=data)
    tensors = checkpoint.newest(Path(float32["run_dir"]) / "checkpoints")[0].tensors
    from shoal.memory.conversion import converted
    from shoal.memory.keeping import keep_parameters
    from shoal.models.registry import build

    plan = MemoryPlan(parameters="bfloat16-compensated", optimizer_bits=8)
    say = [].append
    modules = [build(LARGE["mlp"], data.train.facts) for _ in range(2)]
    keep_parameters(modules[0], plan, device=torch.device("cpu"), sharing=1, say=say, tell=say)
    weights = {n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")}
    narrow, rests, _ = converted(weights, {}, modules[0], plan)
    assert any(t.dtype == torch.bfloat16 for t in narrow.values())
    back, left, _ = converted(narrow, rests, modules[1], MemoryPlan())
    assert not left
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_what_moves_nothing_is_said_and_no_error(agents_here, tmp_path, capfd):
    from shoal.train.api import train

    memory = MemoryPlan(offload_optimizer="host")
    train(large("mlp", steps=1), plan(3, 5, memory=memory), data=splits("mlp", 101), run_dir=tmp_path / "run")
    assert capfd.readouterr().err.splitlines() == [
        "shoal: memory.offload_optimizer = 'host' moves nothing: the worker's device is the host's own processor."
    ]


REFUSED = {
    "RMSprop": (MemoryPlan(optimizer_bits=8), {"optimizer": OptimizerSpec(name="RMSprop")}, "adam, adamw and sgd"),
    "compiled": (
        MemoryPlan(parameters="bfloat16-stochastic"),
        {"model": ModelSpec(kind="mlp", compile=True)},
        "for models that are not compiled",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_kept_so_is_refused_in_one_line_before_anything_starts(run, tmp_path, case):
    memory, changes, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as told:
        run(large("mlp", **changes), plan=plan(8, memory=memory), data=splits("mlp", 41), run_dir=tmp_path / "new")
    assert "\n" not in str(told.value)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_hold_a_file_is_named(run, tmp_path):
    memory = MemoryPlan(offload_optimizer="disk", offload_dir=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"memory\.offload_dir = .*nowhere"):
        run(large("mlp"), plan=plan(3, 5, memory=memory), data=splits("mlp", 41))


def test_a_model_without_a_list_of_layers_is_told_to_name_its_blocks(run):
    wanted = recipe("mlp", model=ModelSpec(kind="custom", task="classification"), steps=2)
    memory = MemoryPlan(offload_parameters="disk")
    with pytest.raises(UserError, match=r"name modules in memory\.blocks"):
        run(wanted, plan=plan(8, memory=memory), data=splits("mlp", 48), model=Flat)


class Flat(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(64, 5)

    def forward(self, input):
        return self.linear(input.flatten(1))
