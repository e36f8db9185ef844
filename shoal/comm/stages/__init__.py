"""Messages between the stages of a pipeline: activations and their gradients, of any shape, changing as they like."""

from shoal.comm.stages.messages import Key, StageMessages, make_messages

__all__ = ["Key", "StageMessages", "make_messages"]
