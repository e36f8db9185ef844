"""Pushes in fewer bytes: a codec of shoal.comm.compression for each bucket, with what is lost fed back."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shoal.comm.compression.codecs import CODECS
from shoal.comm.server import wire
from shoal.comm.server.wire import Message, WireError
from shoal.errors import UserError


class Squeezer:
    """One worker's compressor; what a step leaves unsent of a run is added to the next one's."""

    def __init__(self, name: str) -> None:
        """Raises UserError for a codec that pushes cannot use."""
        if name not in CODECS:
            raise UserError(f"plan: compression {name!r} does not work on pushes: use one of {', '.join(CODECS)}.")
        self._codec = CODECS[name]()
        self._errors: dict[object, Tensor] = {}

    def __call__(self, key: object, flat: Tensor) -> tuple[Mapping[str, Any], Tensor]:
        """``key`` names the run: the same elements each step. (words, payload uint8)."""
        if flat.dtype != torch.float32:
            raise UserError("plan: compression of pushes takes float32 gradients only.")
        error = self._errors.setdefault(key, torch.zeros_like(flat))
        payload = torch.empty(self._codec.payload_bytes(flat.numel()), dtype=torch.uint8)
        self._codec.compress(flat, error, payload)
        return {"codec": self._codec.name}, payload


def unsqueezed(message: Message, data: Tensor, elements: int) -> Tensor:
    """What a compressed push says: float32 [elements]. Raises WireError, BadPayload."""
    name = wire.text(message.words, "codec")
    if name not in CODECS:
        raise WireError(f"codec {name!r:.60}")
    out = torch.empty(elements, dtype=torch.float32)
    CODECS[name]().restore(data, out)
    return out
