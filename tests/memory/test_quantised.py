"""Eight bits a value: the nearest of 256, block by block, and nothing else."""

import pytest
import torch

from shoal.comm.native import build
from shoal.memory.quantised import (
    BLOCK,
    blocks_of,
    decode,
    decode_in_torch,
    encode,
    encode_in_torch,
    values_of,
)

KINDS = pytest.mark.parametrize("signed", [True, False])
SIZES = [1, 100, BLOCK, 5 * BLOCK + 17]


def drawn(size: int, signed: bool) -> torch.Tensor:
    """Magnitudes over eight decades."""
    stream = torch.Generator().manual_seed(size)
    values = torch.randn(size, generator=stream) * 10 ** (-8 * torch.rand(size, generator=stream))
    return values if signed else values.abs()


def there_and_back(values: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes, scales = torch.empty(len(values), dtype=torch.uint8), torch.empty(blocks_of(len(values)))
    encode(values, codes, scales, signed=signed)
    return codes, scales, decode(codes, scales, torch.empty(len(values)), signed=signed)


@KINDS
def test_there_are_256_values_dense_around_zero_over_seven_decades(signed):
    values = values_of(signed)
    assert len(values.unique()) == 256
    assert torch.equal(values, values.sort().values)
    assert 0.0 in values
    assert 1.0 in values
    assert float(values[values > 0].min()) < 1e-6
    assert bool((values >= 0).all()) == (not signed)
    if signed:  # 1 alone has no opposite
        assert torch.equal(values[:-1], -values[:-1].flip(0))


@KINDS
@pytest.mark.parametrize("size", SIZES)
def test_each_value_becomes_the_nearest_one_of_its_block(size, signed):
    values = drawn(size, signed)
    codes, scales, _ = there_and_back(values, signed)
    for number, block in enumerate(values.split(BLOCK)):
        assert float(scales[number]) == float(block.abs().max())
        distances = (block[:, None] / scales[number] - values_of(signed)[None]).abs()
        if not signed:
            distances[block > 0, 0] = 2  # never nought, whose inverse root is without bounds
        taken = distances.gather(1, codes[number * BLOCK :][: len(block), None].long())[:, 0]
        assert torch.equal(taken, distances.amin(1))


@KINDS
def test_the_kernels_give_the_bytes_of_their_twins(signed):
    """Also of what lies next to an edge between two codes, of noughts of both signs, and of the least there is."""
    assert build.kernels() is not None
    values = values_of(signed)
    edges = (values[1:] + values[:-1]) / 2
    near = torch.cat(
        [edges, edges.nextafter(edges + 1), edges.nextafter(edges - 1), values, torch.tensor([0.0, 1e-45])]
    )
    near = torch.cat([near, -near, torch.tensor([-0.0])]) if signed else near.abs()
    every = [near, torch.zeros(BLOCK + 3), torch.full((7,), 1e-45), *(drawn(size, signed) for size in SIZES)]
    for given in every + [part * 3e37 for part in every]:
        codes, scales, back = there_and_back(given, signed)
        others, theirs = torch.empty_like(codes), torch.empty_like(scales)
        encode_in_torch(given, others, theirs, signed=signed)
        assert torch.equal(codes, others)
        assert torch.equal(scales.view(torch.int32), theirs.view(torch.int32))
        again = decode_in_torch(codes, scales, torch.empty(len(given)), signed=signed)
        assert torch.equal(back.view(torch.int32), again.view(torch.int32))


@KINDS
def test_what_has_been_rounded_once_is_not_rounded_again(signed):
    codes, scales, values = there_and_back(drawn(5 * BLOCK + 17, signed).clamp(max=1.0), signed)
    again = there_and_back(values, signed)
    assert float(values.max()) in scales, "a block's largest is exact where it is positive"
    whole = [n for n, block in enumerate(values.split(BLOCK)) if float(block.abs().max()) == float(scales[n])]
    assert whole
    for number in whole:
        part = slice(number * BLOCK, (number + 1) * BLOCK)
        assert torch.equal(again[2][part], values[part])
        assert torch.equal(again[0][part], codes[part])


@KINDS
def test_zeros_stay_zero_and_an_outlier_coarsens_its_own_block_alone(signed):
    values = drawn(3 * BLOCK, signed)
    values[:BLOCK] = 0
    before = there_and_back(values, signed)[2]
    values[BLOCK] = 1e9
    after = there_and_back(values, signed)[2]
    assert not after[:BLOCK].any()
    assert torch.equal(after[2 * BLOCK :], before[2 * BLOCK :])
    assert not torch.equal(after[BLOCK + 1 : 2 * BLOCK], before[BLOCK + 1 : 2 * BLOCK])


def test_a_second_moment_is_never_lost_to_zero():
    values = torch.tensor([1.0, 1e-8, 1e-30, 0.0])
    found = there_and_back(values, False)[2]
    assert torch.equal(found > 0, values > 0)
    lowest = float(values_of(False)[1])
    assert found[1] == found[2] == lowest


def test_a_state_takes_a_byte_and_a_sixty_fourth_a_value():
    size = 1 << 16
    codes, scales, _ = there_and_back(drawn(size, True), True)
    assert codes.nbytes + scales.nbytes == size + size // 64
