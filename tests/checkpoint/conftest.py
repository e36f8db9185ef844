"""A small state with every kind of tensor, and a folder that holds two checkpoints of it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from shoal.train.checkpoint import Checkpoint, save


def make_state(step: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(step)
    weight = torch.randn(3, 4, generator=rng)
    return {
        "model/weight": weight,
        "model/tied": weight,
        "model/transposed": torch.randn(4, 3, generator=rng).t(),
        "model/half": torch.randn(3, generator=rng).bfloat16(),
        "model/empty": torch.empty(0, 5),
        "model/mask": torch.tensor([True, False, True]),
        "model/batches": torch.tensor(7),
        "model/every_other": torch.arange(step, step + 6)[::2],
        "optimizer/weight/step": torch.tensor(float(step)),
        "optimizer/weight/exp_avg": torch.randn(3, 4, generator=rng),
    }


def make_checkpoint(step: int) -> Checkpoint:
    return Checkpoint(make_state(step), {"step": step, "recipe_hash": "ab", "lr": [0.5, 1e-3], "data": {"epoch": 1}})


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with whole checkpoints of steps 1 and 2, each of several shards of several chunks."""
    for step in (1, 2):
        save(make_checkpoint(step), tmp_path, shard_bytes=160, chunk_bytes=64)
    return tmp_path


@pytest.fixture(scope="session")
def same() -> object:
    def compare(loaded: Checkpoint | None, step: int) -> bool:
        wanted = make_checkpoint(step)
        return (
            loaded is not None
            and loaded.facts == wanted.facts
            and loaded.tensors.keys() == wanted.tensors.keys()
            and all(
                torch.equal(tensor, wanted.tensors[name]) and tensor.dtype == wanted.tensors[name].dtype
                for name, tensor in loaded.tensors.items()
            )
        )

    return compare


@pytest.fixture(scope="session")
def checkpoint_of() -> object:
    return make_checkpoint
