"""Whether compressing pays: a pure decision, and measurements that can be believed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shoal.comm
from shoal.comm.compression.compressor import COMPRESSORS
from shoal.comm.compression.worth import measured_speed, on_one_host, shared_memory_bytes_per_s

SPEEDS = st.floats(1e6, 1e12)


@given(
    name=st.sampled_from(sorted(COMPRESSORS)),
    nbytes=st.integers(1 << 16, 1 << 30),
    link=SPEEDS,
    compress=SPEEDS,
    ranks=st.integers(2, 64),
)
def test_it_pays_just_where_the_link_is_slower_than_break_even(
    name: str, nbytes: int, link: float, compress: float, ranks: int
) -> None:
    verdict = shoal.comm.worth_it(COMPRESSORS[name](), nbytes, link, compress, ranks)
    if "too few" in verdict.why:
        assert not verdict
        return
    assert bool(verdict) == (verdict.compressed_s < verdict.plain_s)
    assert bool(verdict) == (link < verdict.break_even_bytes_per_s) or link == pytest.approx(
        verdict.break_even_bytes_per_s
    )
    edge = verdict.break_even_bytes_per_s
    assert shoal.comm.worth_it(COMPRESSORS[name](), nbytes, edge * 0.99, compress, ranks)
    refused = shoal.comm.worth_it(COMPRESSORS[name](), nbytes, edge * 1.01, compress, ranks)
    assert not refused
    assert "\n" not in refused.why
    assert "GB/s" in refused.why or "MB/s" in refused.why


def test_the_numbers_are_those_worked_out_by_hand() -> None:
    """8 MiB, 2 ranks, int8 at 4 GB/s over 1 GB/s: 8.39 ms as it is; 2.10 ms sent + 2.10 + 1.5 x 2.10 ms of work."""
    verdict = shoal.comm.worth_it(shoal.comm.Int8(), 8 << 20, 1e9, 4e9, 2)
    assert verdict.plain_s == pytest.approx(8.389e-3, rel=1e-3)
    assert verdict.compressed_s == pytest.approx(2.101e-3 + 2.5 * 2.097e-3, rel=1e-3)
    assert verdict
    assert not shoal.comm.worth_it(shoal.comm.Int8(), 8 << 20, 2e9, 4e9, 2)
    faster = shoal.comm.worth_it(shoal.comm.Int8(), 8 << 20, 2e9, 4e9, 2, open_bytes_per_s=40e9)
    assert faster


def test_one_rank_and_few_bytes_are_never_worth_it() -> None:
    assert not shoal.comm.worth_it(shoal.comm.Int8(), 1 << 20, 1.0, 1e12, 1)
    few = shoal.comm.worth_it(shoal.comm.OneBit(), 64, 1.0, 1e12, 2)
    assert not few
    assert "too few" in few.why


@pytest.mark.parametrize("name", sorted(COMPRESSORS))
def test_shared_memory_is_too_fast_for_every_compressor_and_force_says_otherwise(name: str) -> None:
    """Measured: adding up in place reads what compressing would have to read anyway, so no load can turn this round."""
    torch.set_num_threads(1)
    speed = measured_speed(COMPRESSORS[name]().method, torch.device("cpu"))
    assert 1e6 < speed.compress < 1e12
    assert shared_memory_bytes_per_s(2) > 1e8
    refused = on_one_host(COMPRESSORS[name](), 2)
    assert not refused
    assert "does not pay" in refused.why
    assert on_one_host(COMPRESSORS[name](force=True), 2)
