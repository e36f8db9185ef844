"""Between hosts with a limited link, compressed sums put on the wire what they claim, and pay where the model says."""

from functools import partial

import pytest
from benches import bench
from emulated_hosts import emulated_hosts, why_not
from forked_programs import Program, Source

limited = bench("hosts")

REASON = why_not()
NBYTES = 1 << 21
CONTROL = 30_000  # bytes of the barriers around what is counted


@pytest.mark.slow
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_the_kernel_counts_the_bytes_of_the_formula_and_all_pay_over_a_slow_link(warm: Source) -> None:
    with emulated_hosts(2, (0.5,), partial(Program, source=warm)) as hosts:
        job = {"nbytes": NBYTES, "rounds": 2, "bytes_per_s": 0.5 * limited.GBIT}
        ranks = hosts.run("compressed_hosts:compressed", (0, 1), **job)
    for rank in ranks:
        for name, claimed in rank["claimed"].items():
            for one in rank["found"][name]:
                assert claimed <= one["sent"]["eth0"] <= claimed * limited.HEADERS + CONTROL, name
        assert all(yes for yes, _ in rank["predicted"].values()), rank["predicted"]
