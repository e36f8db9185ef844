"""A module in the place of another one."""

from torch import nn


def adopt(made: nn.Module, whole: nn.Module) -> None:
    """Begin ``made``: it takes over the parameters, buffers and settings of ``whole``, not its submodules and hooks."""
    nn.Module.__init__(made)
    made.__dict__.update({key: value for key, value in vars(whole).items() if key not in vars(made)})
    for key, parameter in whole._parameters.items():
        made.register_parameter(key, parameter)
    for key, buffer in whole._buffers.items():
        made.register_buffer(key, buffer, persistent=key not in whole._non_persistent_buffers_set)
    made.training = whole.training
