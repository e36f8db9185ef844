"""Rows that are zero do not travel, and nothing is changed by that."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.comm.server import rows


@given(
    runs=st.integers(1, 200),
    touched=st.floats(0, 0.4),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_what_is_unpacked_is_what_was_packed_to_the_bit(runs, touched, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, dtype)
    flat = torch.randn(runs, 64 // dtype.itemsize, dtype=dtype, generator=generator)
    flat[torch.rand(runs, generator=generator) >= touched] = 0.0
    flat[0, 0] = -0.0  # a bit that a comparison with zero would not see
    flat = flat.view(-1)
    packed = rows.packed(flat)
    if packed is None:
        assert int((flat.view(runs, -1) != 0).any(dim=1).sum()) >= rows.WORTH * runs - 1
        return
    into = torch.full_like(flat, torch.nan)
    rows.unpack(packed, into)
    assert torch.equal(into.view(torch.int64), flat.view(torch.int64))
    with pytest.raises(ValueError, match="rows"):
        rows.unpack(packed[:-1], into)


def test_a_dense_run_is_sent_as_it_is():
    assert rows.packed(torch.ones(1600)) is None
