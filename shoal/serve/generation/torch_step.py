"""A step by PyTorch's own kernels: for machines without a C++ compiler, and for devices that are no CPU.

It keeps the bits by giving the kernels the same shapes always: matrices go through in tiles of TILE rows, filled up
with zeros, and attention takes a sequence's rows in tiles that lie at multiples of TILE of its places. A row's place
in a tile depends on its place in the sequence only. It costs time where few rows are computed: docs/generation.md.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.models.activation import ACTIVATIONS
from shoal.models.gpt import GPT
from shoal.models.moe import choose_experts
from shoal.serve.generation.packing import ENDS, OF_LAYER, is_matrix, plain
from shoal.serve.generation.part import Part, whole
from shoal.serve.generation.step import BLOCK, Floats, Rows, Shape, shape_of

TILE = BLOCK  # rows
Rounded = Callable[[Tensor], Tensor]


class TorchStage:
    """See `step.Stage`. ``half``: weights rounded to bfloat16, computed with in float32.

    ``weights`` as `packing.plain` makes them of the part; ``sum`` is that of tensors over the parts of a stage."""

    def __init__(
        self,
        shape: Shape,
        part: Part,
        weights: Sequence[Tensor | None],
        blocks: int,
        *,
        half: bool = False,
        sum: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.blocks = blocks
        self.name = "torch" + ("-bfloat16" if half else "")
        self._shape, self._part, self._sum = shape, part, sum
        self._sliced = part.sliced(shape)
        rounding = torch.bfloat16 if half else torch.float32
        all_weights = [
            None if tensor is None else tensor.to(rounding if is_matrix(place) else torch.float32).float()
            for place, tensor in enumerate(weights)
        ]
        tokens, self._positions, self._head, *norm = all_weights[:ENDS]
        self._tokens = self._head if tokens is None else tokens
        self._norm = _Norm(norm[0], norm[1], shape.eps) if part.last else None
        places = range(ENDS, len(all_weights), OF_LAYER)
        self._layers = [_Layer(all_weights[place : place + OF_LAYER], shape.eps) for place in places]
        self._activate = ACTIVATIONS[shape.activation]
        self._device = next(tensor for tensor in all_weights if tensor is not None).device
        size = (len(part.layers), blocks, BLOCK, len(part.heads), shape.head_size)
        self._keys = torch.zeros(size, device=self._device)
        self._values = torch.zeros(size, device=self._device)

    @torch.no_grad()
    def compute(self, rows: Rows, entered: Tensor | None) -> Tensor:
        part, device = self._part, self._device
        tables = torch.from_numpy(rows.tables).to(device, torch.int64)
        sequences = torch.from_numpy(rows.sequences).to(device)
        places = torch.from_numpy(rows.places).to(device)
        where = tables[sequences, places // BLOCK], places % BLOCK
        tiles = _tiles(rows)
        x = self._embedded(torch.from_numpy(rows.tokens).to(device), places) if entered is None else entered
        for number, layer in enumerate(self._layers):
            qkv = _linear(layer.norm1(x), *layer.qkv)
            q, k, v = qkv.view(len(x), 3, len(part.heads), self._shape.head_size).unbind(1)
            keys, values = self._keys[number], self._values[number]
            keys[where], values[where] = k, v
            mixed = torch.empty_like(q)
            for first, last, sequence, place in tiles:
                blocks = tables[sequence, : place // BLOCK + 1]
                mixed[first:last] = _attention(q[first:last], place % TILE, keys[blocks], values[blocks])
            x = x + self._summed(mixed.flatten(1), *layer.out)
            normed = layer.norm2(x)
            if layer.router is not None:
                x = x + self._mixed(normed, layer, layer.router)
            else:
                x = x + self._summed(_linear(normed, *layer.up, self._activate), *layer.down)
        if self._norm is None:
            return x
        assert self._head is not None
        return _linear(self._norm(x[torch.from_numpy(rows.wants).to(device)]), self._head, None)

    def _embedded(self, tokens: Tensor, places: Tensor) -> Tensor:
        assert self._tokens is not None
        assert self._positions is not None
        if self._sum is None:
            return self._tokens[tokens] + self._positions[places]
        local = tokens - self._part.vocab.start
        elsewhere = (local < 0) | (local >= len(self._part.vocab))
        found = self._tokens[local.masked_fill(elsewhere, 0)].masked_fill(elsewhere[:, None], 0.0)
        return self._sum(found) + self._positions[places]

    def _summed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._sum is None or not self._sliced:
            return _linear(x, weight, bias)
        total = self._sum(_linear(x, weight, None))
        return total if bias is None else total + bias

    def _mixed(self, x: Tensor, layer: "_Layer", router: Tensor) -> Tensor:
        """What the experts of a mixture make of rows [n, width]: each row's best, weighted, the best first."""
        shares = _linear(x, router, None, partial(torch.softmax, dim=-1))
        routes = choose_experts(shares, self._shape.top_k)
        own = self._part.experts
        answers = x.new_zeros(len(x), self._shape.top_k, x.shape[1])
        for number, expert in enumerate(own):
            rows, places = (routes.experts == expert).nonzero(as_tuple=True)
            if len(rows):
                up, down = layer.of_expert(layer.up, number), layer.of_expert(layer.down, number)
                bias = None if self._sliced else down[1]
                answers[rows, places] = _linear(_linear(x[rows], *up, self._activate), down[0], bias)
        if self._sum is not None:  # of experts elsewhere: zeros are added to their answers, which changes none
            answers = self._sum(answers)
        if self._sliced and layer.down[1] is not None:
            answers = answers + layer.down[1][routes.experts]
        weighted = (answers * routes.weights.unsqueeze(-1)).unbind(1)
        return reduce(torch.add, weighted)

    def copy(self, source: int, target: int) -> None:
        for cache in (self._keys, self._values):
            cache[:, target] = cache[:, source]

    def close(self) -> None:
        pass


class TorchStep(TorchStage):
    """See `step.Step`: the whole model in one stage."""

    def __init__(self, model: GPT, blocks: int, *, half: bool = False) -> None:
        shape = shape_of(model)
        self.vocab, self.context = shape.vocab, shape.context
        super().__init__(shape, whole(shape), plain(model), blocks, half=half)

    def run(self, rows: Rows) -> Floats:
        return self.compute(rows, None).cpu().numpy()


class _Norm:
    """A layer norm in float32, whatever its weights are kept in."""

    def __init__(self, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        assert weight is not None
        self._weight, self._bias, self._eps = weight, bias, eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self._weight.shape, self._weight, self._bias, self._eps)


class _Layer:
    def __init__(self, weights: Sequence[Tensor | None], eps: float) -> None:
        def pair(place: int) -> tuple[Tensor, Tensor | None]:
            weight = weights[place]
            assert weight is not None
            return weight, weights[place + 1]

        self.norm1, self.norm2 = _Norm(weights[0], weights[1], eps), _Norm(weights[6], weights[7], eps)
        self.qkv, self.out = pair(2), pair(4)
        self.up, self.down = pair(8), pair(10)
        self.router = weights[12]

    @staticmethod
    def of_expert(layer: tuple[Tensor, Tensor | None], number: int) -> tuple[Tensor, Tensor | None]:
        weight, bias = layer
        return weight[number], None if bias is None else bias[number]


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
