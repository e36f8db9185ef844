"""A loaded checkpoint takes the memory of what is read of it."""

from pathlib import Path

import torch

from shoal.train import checkpoint
from shoal.train.checkpoint import Checkpoint


def mapped_bytes(tensor: torch.Tensor) -> int:
    """Of the mapping that a tensor lies in, what is resident in this process."""
    address, inside = tensor.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, stop = (int(part, 16) for part in first.split("-"))
            inside = start <= address < stop
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1]) << 10
    raise AssertionError("not mapped")


def test_what_nobody_reads_of_a_checkpoint_takes_no_memory_and_writing_stays_here(tmp_path):
    tensors = {f"model/{name}": torch.full((1 << 20,), float(name)) for name in range(8)}  # 4 MiB each
    path = checkpoint.save(Checkpoint(tensors, {"step": 1}), tmp_path)
    loaded = checkpoint.load(path)
    assert mapped_bytes(loaded.tensors["model/3"]) < 2 << 20
    assert torch.equal(loaded.tensors["model/3"], tensors["model/3"])
    assert 4 << 20 <= mapped_bytes(loaded.tensors["model/3"]) < 10 << 20
    loaded.tensors["model/3"].zero_()
    assert torch.equal(checkpoint.load(path).tensors["model/3"], tensors["model/3"])
    assert checkpoint.damage(path) == []
