"""Memory that ran out, told apart from other errors."""

import errno

import torch

_SAID = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "out of memory")


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on whichever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)
