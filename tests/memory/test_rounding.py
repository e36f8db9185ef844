"""bfloat16 in the place of float32: unbiased where it is random, exact where the rest is kept."""

import pytest
import torch

from shoal.memory.rounding import joined, random_halves, round_at_random, split, stream_key

CPU = torch.device("cpu")


@pytest.mark.parametrize(("start", "count"), [(0, 1), (1, 1), (1, 7), (100, 1000), (333, 666), (4095, 2)])
def test_the_numbers_of_an_element_do_not_depend_on_what_is_drawn_with_it(start, count):
    key = stream_key(3, 4, "layer.weight")
    assert torch.equal(random_halves(key, start, count, CPU), random_halves(key, 0, 5000, CPU)[start : start + count])


def test_seed_step_and_name_each_give_a_stream_of_their_own():
    keys = {
        stream_key(*key) for key in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"), (0, 10, "a"), (0, 1, "0a"))
    }
    assert len(keys) == 6
    streams = torch.stack([random_halves(key, 0, 1 << 16, CPU).double() for key in keys])
    between = torch.corrcoef(torch.cat([streams, streams[:1].roll(1), streams[:1].roll(2)]))
    assert float((between - torch.eye(8)).abs().max()) < 6 * 2**-8  # six standard deviations of nothing at all
    assert all(abs(float(stream.mean())) < 6 * 65536 / 12**0.5 / 2**8 for stream in streams)


def test_each_of_16_bits_is_fair():
    halves = random_halves(stream_key(0, 0, "w"), 0, 1 << 18, CPU).int() & 0xFFFF
    for bit in range(16):
        assert abs(float((halves >> bit & 1).double().mean()) - 0.5) < 6 * 0.5 / 2**9


def test_random_rounding_takes_one_of_two_neighbours_and_keeps_the_mean():
    values = torch.randn(1 << 14, generator=torch.Generator().manual_seed(0))
    rounds = torch.stack([round_at_random(values, stream_key(0, step, "w")).double() for step in range(256)])
    ulp = 2.0 ** (values.double().frexp().exponent - 8)
    assert bool(((rounds - values.double()).abs() < ulp).all())
    error = (rounds.mean(0) - values.double()) / ulp
    assert float(error.abs().max()) < 6 * 0.5 / 16
    assert abs(float(error.mean())) < 6 * 0.5 / 16 / 2**7


def test_what_bfloat16_holds_is_left_alone():
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, float("inf"), -float("inf"), 2.0**-126])
    assert torch.equal(round_at_random(values, 7), values.bfloat16())


def test_the_two_halves_of_a_float32_give_it_back():
    stream = torch.Generator().manual_seed(1)
    words = torch.randint(-(2**31), 2**31, (1 << 16,), generator=stream).int()
    ties = torch.arange(-500, 500, dtype=torch.int32) * 0x8000
    values = torch.cat([words, ties, ties + 1, ties - 1]).view(torch.float32)
    values = values[values.isfinite()]
    upper, rest = split(values)
    assert torch.equal(joined(upper, rest).view(torch.int32), values.view(torch.int32))
    assert (upper.element_size(), rest.element_size()) == (2, 2)
    away = (upper.double() - values.double()).abs()
    nearest = (values.bfloat16().double() - values.double()).abs()
    fits = upper.isfinite() & values.bfloat16().isfinite()
    assert torch.equal(away[fits], nearest[fits])
