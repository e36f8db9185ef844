"""Copies that do not go through the cache are copies."""

import itertools

import pytest
import torch

from shoal.comm import past_cache
from shoal.comm.native import build


@pytest.mark.skipif(build.kernels() is None, reason="no compiled kernels")
def test_copies_past_the_cache_are_copies_wherever_they_begin_and_end():
    source = torch.randint(0, 256, (4096,), dtype=torch.uint8)
    for into_at, from_at, size in itertools.product((0, 1, 15, 64, 77), (0, 3, 32), (0, 1, 63, 64, 65, 1000, 3000)):
        into = torch.zeros(4096, dtype=torch.uint8)
        past_cache.copy(into[into_at : into_at + size], source[from_at : from_at + size])
        assert torch.equal(into[into_at : into_at + size], source[from_at : from_at + size])
        assert not into[:into_at].any()
        assert not into[into_at + size :].any()


def test_what_is_no_plain_copy_is_torchs():
    into, source = torch.zeros(6, 5), torch.randn(5, 6, dtype=torch.float64)
    past_cache.copy(into, source.t())
    assert torch.equal(into, source.t().float())
    turned = torch.randn(5, 6, dtype=torch.complex64).conj().imag.t()
    past_cache.copy(into, turned)
    assert torch.equal(into, turned)
