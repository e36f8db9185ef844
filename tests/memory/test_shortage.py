"""What counts as memory that ran out."""

import errno

import pytest
import torch

from shoal.memory.shortage import is_shortage


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("could not create a primitive"),
        RuntimeError("could not execute a primitive\nException raised from somewhere"),
    ],
    ids=repr,
)
def test_memory_that_ran_out_is_known_whoever_says_it(error):
    assert is_shortage(error)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("could not create a primitive descriptor for a convolution forward propagation primitive"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("out of memory"),
    ],
    ids=repr,
)
def test_other_errors_are_not(error):
    assert not is_shortage(error)


def test_the_allocator_of_torch_says_it_in_words_that_are_known():
    with pytest.raises(RuntimeError) as failed:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_shortage(failed.value)
