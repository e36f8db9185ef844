"""Shared memory without a name."""

import os
from pathlib import Path

import pytest
import torch

from shoal.comm.heap import PAGE, Heap, anonymous_file, heap_file


def _write_own_part(group, elements):
    tensors = [group.heap.tensor(elements, dtype) for dtype in (torch.float32, torch.float64)]
    for number, tensor in enumerate(tensors):
        tensor[group.rank :: group.world] = group.rank + 10 * number
    group.gather(b"written")
    return [tensor.tolist() for tensor in tensors], len(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else 0


@pytest.mark.parametrize("elements", [1, 7, 5000])
def test_every_worker_sees_what_the_others_wrote(on_workers, elements):
    shm = Path("/dev/shm")
    before = set(shm.iterdir()) if shm.exists() else set()
    results = on_workers(3, _write_own_part, elements)
    wanted = [[float(i % 3 + 10 * number) for i in range(elements)] for number in range(2)]
    assert [tensors for tensors, _ in results] == [wanted] * 3
    after = set(shm.iterdir()) if shm.exists() else set()
    assert {p for p in after - before if "shoal" in p.name} == set()


def test_tensors_start_on_a_page_are_zero_and_do_not_overlap():
    heap = Heap(heap_file())
    tensors = [heap.tensor(n, torch.float32) for n in (1, 0, 3000, 1024)]
    for number, tensor in enumerate(tensors):
        assert tensor.numel() == 0 or tensor.data_ptr() % PAGE == 0
        assert not tensor.any()
        tensor.fill_(number + 1)
    assert [set(t.tolist()) for t in tensors] == [{1.0}, set(), {3.0}, {4.0}]


def test_no_path_leads_to_the_memory():
    file = anonymous_file(10)
    try:
        assert os.fstat(file).st_size == 10
        assert not Path(os.readlink(f"/proc/self/fd/{file}").removesuffix(" (deleted)")).exists()
    finally:
        os.close(file)
