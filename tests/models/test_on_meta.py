"""Modules on the meta device cost no memory, and not torch's compiler either."""

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from shoal.models.on_meta import on_meta

PROGRAM = """
import sys
from torch import nn
from shoal.models.on_meta import on_meta
from shoal.models.registry import build
from shoal.recipe.recipe import ModelSpec
build(ModelSpec(kind="gpt", options={"layers": 1, "heads": 1, "width": 8}), {"vocab": 11, "context": 4})
with on_meta():
    nn.Embedding(4, 2), nn.Linear(2, 2), nn.LSTM(2, 2), nn.Conv2d(1, 1, 1), nn.LayerNorm(2)
print(*sorted({"sympy", "torch._dynamo", "torch._inductor"} & set(sys.modules)))
"""


def test_neither_they_nor_a_model_that_is_built_so_need_torchs_compiler() -> None:
    """Its import takes over a second and 70 MB of each process."""
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == "\n"


def test_what_is_made_within_has_no_memory_and_what_is_made_after_has_its_first_values() -> None:
    with on_meta():
        blank = nn.Linear(2, 3)
        assert nn.init.normal_(tensor=blank.weight) is blank.weight
    assert blank.weight.is_meta
    assert blank.weight.shape == (3, 2)
    assert not torch.equal(nn.Linear(2, 3).weight, nn.Linear(2, 3).weight)
