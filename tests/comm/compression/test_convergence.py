"""On MNIST, each compressor with error feedback ends where uncompressed training ends; without it, 1-bit does not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import shoal.comm
from shoal.comm.compression.compressor import COMPRESSORS
from shoal.data.idx import read_idx

PARTS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
MARGIN = 0.008  # of the accuracy on 10,000 pictures: four standard deviations of one of 96%


def trained(rank: int, world: int, folder: str, name: str, feedback: bool, epochs: int, lr: float) -> float:
    """Accuracy of an MLP on the test set after training on the pictures of the folder, on two workers."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    place = Path(folder)
    pictures, labels, test, wanted = (torch.from_numpy(np.load(place / f"{part}.npy")) for part in PARTS)
    inputs = (pictures.float().view(-1, 784) - 33.3) / 78.6
    net = DistributedDataParallel(nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)))
    if name != "none":
        compressor = COMPRESSORS[name](error_feedback=feedback, force=True, min_bytes=0)
        shoal.comm.compress(net, compressor)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    generator = torch.Generator().manual_seed(2)
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs), generator=generator).view(-1, 2 * 50):
            mine = batch[rank * 50 : (rank + 1) * 50]
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs[mine]), labels[mine].long()).backward()
            optimizer.step()
    with torch.no_grad():
        answers = net.module((test.float().view(-1, 784) - 33.3) / 78.6).argmax(dim=1)
    return float((answers == wanted).float().mean())


@pytest.fixture(scope="module")
def unpacked(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 20,000 pictures to train on, and those of the test set."""
    folder = tmp_path_factory.mktemp("mnist")
    for part in PARTS:
        np.save(folder / f"{part}.npy", read_idx(shared_data / "mnist" / f"{part}-ubyte.gz")[:20_000])
    return folder


@pytest.fixture
def accuracy(over_gloo, unpacked: Path):
    def run(name: str, feedback: bool = True) -> float:
        first, second = over_gloo(2, trained, str(unpacked), name, feedback, 4, 0.02)
        assert first == second
        return first

    return run


SOAK = pytest.mark.soak  # a minute of training each, of compressors that round or choose as another one here does


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=[SOAK] * (name == "fp16")) for name in sorted(COMPRESSORS)])
def test_with_error_feedback_it_ends_where_uncompressed_training_ends(name: str, accuracy, uncompressed) -> None:
    assert accuracy(name) > uncompressed - MARGIN


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1bit", pytest.param("topk", marks=SOAK), pytest.param("powersgd", marks=SOAK)])
def test_without_error_feedback_it_does_not(name: str, accuracy, uncompressed) -> None:
    """The fault that the margin must find."""
    assert accuracy(name, feedback=False) < uncompressed - MARGIN


@pytest.fixture
def uncompressed(accuracy, _found: dict[str, float]) -> float:
    if "none" not in _found:
        _found["none"] = accuracy("none")
        assert _found["none"] > 0.95
    return _found["none"]


@pytest.fixture(scope="module")
def _found() -> dict[str, float]:
    return {}
