"""Memory that ran out, told apart from other errors."""

import errno

import torch

_SAID = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "out of memory")
# oneDNN does not pass on that there was no memory for its kernel or its scratch space. Of what it has no kernel for, it
# says that a primitive descriptor could not be created.
_SAID_BY_ONEDNN = ("could not create a primitive", "could not execute a primitive")


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on whichever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if not isinstance(error, RuntimeError):
        return False
    said = str(error)
    return said.partition("\n")[0] in _SAID_BY_ONEDNN or any(words in said for words in _SAID)
