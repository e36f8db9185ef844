"""Eight faults of parallel training, each planted once: the prover names its step, layer and tensor, and its kind."""

from dataclasses import replace

import pytest
from eight_faults import (
    STEP,
    DoubleCount,
    DroppedHaloRow,
    LostTiedGradient,
    MissingAllReduce,
    StaleParameter,
    SwappedMicroBatch,
    WrongDropoutStream,
    WrongScale,
)
from planted_faults import Factory
from prove_subjects import RECIPES, data_of

from shoal.prove.api import prove
from shoal.recipe.plan import Plan


def over(rules=None, **mesh):
    return Plan(mesh=mesh, rules=rules or {}, device="cpu")


FIRST, TOKENS = "gradient/layers.0.weight", "gradient/tokens.weight"
PLANTED = {
    "missing all-reduce": (
        MissingAllReduce(), "mlp", over(tensor=2), FIRST, "every shard: look at what is summed and gathered",
    ),
    "double count": (DoubleCount(), "mlp", over(data=2), FIRST, "the gradient of shard 3 is in the sum twice"),
    "wrong scale": (WrongScale(), "mlp", over(data=2), FIRST, "scaled by 0.5"),
    "swapped micro-batch": (SwappedMicroBatch(), "mlp", over(data=2), FIRST, "samples of shards 3, 4 changed places"),
    "swapped micro-batch in a pipeline": (
        SwappedMicroBatch(everywhere=True), "mlp", over(pipe=2), FIRST, "samples of shards 0, 4 changed places",
    ),
    "stale parameter": (
        StaleParameter("layers.1.bias"), "mlp", over(data=2), "model/layers.1.bias",
        "layers.1.bias was not updated on rank 1",
    ),
    "stale parameter of a stage": (
        StaleParameter("layers.1.bias"), "mlp", over(pipe=2), "model/layers.1.bias",
        "layers.1.bias was not updated on rank 1",
    ),
    "lost tied gradient": (LostTiedGradient(), "gpt", over(pipe=2), TOKENS, "tokens.weight is tied, used in 2 places"),
    "wrong dropout stream": (
        WrongDropoutStream(), "gpt", over(data=2), TOKENS, "other samples, or another random stream, in shard 4",
    ),
    "dropped halo row": (
        DroppedHaloRow(), "cnn", over({"rows": "tensor"}, tensor=2), "gradient/convolutions.0.weight", "halo rows",
    ),
}  # fmt: skip


AGAIN = ("swapped micro-batch in a pipeline", "stale parameter of a stage")  # where stages hold the parts


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=[pytest.mark.slow] if fault in AGAIN else []) for fault in PLANTED]
)
def test_a_planted_fault_is_named_with_its_step_layer_and_tensor(fault, agent):
    planted, name, plan, tensor, looks_like = PLANTED[fault]
    recipe, data = replace(RECIPES[name], clip=0.0), data_of(name)
    found = prove(
        recipe,
        steps=STEP + 1,
        plans=[plan],
        data=data,
        model=Factory(planted, recipe.model, data.train.facts),
        agent=agent,
    )
    [verdict] = found["plans"]
    assert not found["ok"]
    assert verdict["differs"] == {"step": STEP, "layer": tensor.split("/")[1].rpartition(".")[0], "tensor": tensor}
    assert looks_like in verdict["looks_like"]
    assert [verdict["looks_like"] in line for line in found["differences"]] == [True]
    assert verdict["error"] > verdict["tolerance"] or "swapped" in fault  # whose weights may round to the same
