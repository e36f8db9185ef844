"""A step by PyTorch's own kernels: for machines without a C++ compiler, and for devices that are no CPU.

It keeps the bits by giving the kernels the same shapes always: matrices go through in tiles of TILE rows, filled up
with zeros, and attention takes a sequence's rows in tiles that lie at multiples of TILE of its places. A row's place
in a tile depends on its place in the sequence only. It costs time where few rows are computed: docs/generation.md.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.models.activation import ACTIVATIONS
from shoal.models.gpt import GPT
from shoal.serve.generation.step import BLOCK, Floats, Rows, shape_of

TILE = BLOCK  # rows
Rounded = Callable[[Tensor], Tensor]


class TorchStep:
    """See `step.Step`. ``half``: weights rounded to bfloat16, computed with in float32."""

    def __init__(self, model: GPT, blocks: int, *, half: bool = False) -> None:
        shape = shape_of(model)
        self.vocab, self.context, self.blocks = shape.vocab, shape.context, blocks
        self.name = "torch" + ("-bfloat16" if half else "")
        self._shape = shape
        self._rounding = torch.bfloat16 if half else torch.float32
        self._norm, self._positions = _Norm(model.norm), model.positions.weight.detach().float()
        self._device = next(model.parameters()).device
        head = model.tokens.weight if model.head is None else model.head.weight
        self._head = self._rounded(head)
        self._tokens = self._head if model.head is None else model.tokens.weight.detach().float()
        self._layers = [_Layer(block, self._rounded) for block in model.blocks]
        self._activate = ACTIVATIONS[model.config.activation]
        size = (shape.layers, blocks, BLOCK, shape.heads, shape.head_size)
        self._keys = torch.zeros(size, device=self._device)
        self._values = torch.zeros(size, device=self._device)

    def _rounded(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self._rounding).float()

    @torch.no_grad()
    def run(self, rows: Rows) -> Floats:
        shape, device = self._shape, self._device
        tokens, places = (torch.from_numpy(each).to(device) for each in (rows.tokens, rows.places))
        tables = torch.from_numpy(rows.tables).to(device, torch.int64)
        sequences = torch.from_numpy(rows.sequences).to(device)
        where = tables[sequences, places // BLOCK], places % BLOCK
        tiles = _tiles(rows)
        x = self._tokens[tokens] + self._positions[places]
        for number, layer in enumerate(self._layers):
            qkv = _linear(layer.norm1(x), *layer.qkv)
            q, k, v = qkv.view(len(x), 3, shape.heads, shape.head_size).unbind(1)
            keys, values = self._keys[number], self._values[number]
            keys[where], values[where] = k, v
            mixed = torch.empty_like(q)
            for first, last, sequence, place in tiles:
                blocks = tables[sequence, : place // BLOCK + 1]
                mixed[first:last] = _attention(q[first:last], place % TILE, keys[blocks], values[blocks])
            x = x + _linear(mixed.flatten(1), *layer.out)
            x = x + _linear(_linear(layer.norm2(x), *layer.up, self._activate), *layer.down)
        normed = self._norm(x[torch.from_numpy(rows.wants).to(device)])
        return _linear(normed, self._head, None).cpu().numpy()

    def copy(self, source: int, target: int) -> None:
        for cache in (self._keys, self._values):
            cache[:, target] = cache[:, source]

    def close(self) -> None:
        pass


class _Norm:
    """A layer norm in float32, whatever its weights are kept in."""

    def __init__(self, norm: nn.Module) -> None:
        assert isinstance(norm, nn.LayerNorm)
        self._shape, self._eps = norm.normalized_shape, norm.eps
        self._weight = norm.weight.detach().float()
        self._bias = None if norm.bias is None else norm.bias.detach().float()

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self._shape, self._weight, self._bias, self._eps)


class _Layer:
    def __init__(self, block: nn.Module, rounded: Rounded) -> None:
        def pair(name: str) -> tuple[Tensor, Tensor | None]:
            linear = block.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            return rounded(linear.weight), None if linear.bias is None else linear.bias.detach().float()

        self.norm1, self.norm2 = _Norm(block.get_submodule("norm1")), _Norm(block.get_submodule("norm2"))
        self.qkv, self.out = pair("attention.qkv"), pair("attention.out")
        self.up, self.down = pair("up"), pair("down")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, then: Rounded | None = None) -> Tensor:
    """``then`` goes through the same shapes: vector kernels may compute the last few elements in another way."""
    padded = F.pad(x, (0, 0, 0, -len(x) % TILE))
    tiles = [F.linear(tile, weight, bias) for tile in torch.split(padded, TILE)]
    return torch.cat([then(tile) for tile in tiles] if then else tiles)[: len(x)]


def _attention(q: Tensor, slot: int, keys: Tensor, values: Tensor) -> Tensor:
    """Rows [r, heads, size] of one tile, the first in this slot, over [blocks, BLOCK, heads, size]: [r, heads, size].

    The last block is the tile's own."""
    count, heads, size = q.shape
    tile = q.new_zeros(TILE, heads, size)
    tile[slot : slot + count] = q
    k, v = (each.flatten(0, 1).transpose(0, 1) for each in (keys, values))  # [heads, T, size]
    scores = torch.bmm(tile.transpose(0, 1), k.transpose(1, 2)) * size**-0.5  # [heads, TILE, T]
    hidden = torch.ones(TILE, TILE, dtype=torch.bool, device=q.device).triu(1)
    scores[:, :, -TILE:].masked_fill_(hidden, -torch.inf)
    weights = scores.softmax(-1)
    # what lies in slots that are not written yet has the weight 0, but may be anything: infinities of an old sequence
    v = v.clone()
    v[:, k.shape[1] - TILE + slot + count :] = 0
    return torch.bmm(weights, v)[:, slot : slot + count].transpose(0, 1)


def _tiles(rows: Rows) -> list[tuple[int, int, int, int]]:
    """(first row, one past the last, sequence, place of the first) of each stretch of rows within one tile."""
    out: list[tuple[int, int, int, int]] = []
    for row, (sequence, place) in enumerate(zip(rows.sequences.tolist(), rows.places.tolist(), strict=True)):
        if out and out[-1][2] == sequence and place % TILE and place - out[-1][3] == row - out[-1][0]:
            out[-1] = (out[-1][0], row + 1, sequence, out[-1][3])
        else:
            out.append((row, row + 1, sequence, place))
    return out
