"""The Cluster: what it refuses, how it is written down, and what is detected of this machine."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster.cluster import Cluster, Device, Host, Link
from shoal.cluster.detect import memory_bytes, this_host, usable_cores
from shoal.errors import UserError

names = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=8)
devices = st.builds(Device, kind=names, memory_bytes=st.integers(0, 1 << 40), name=names)
hosts = st.builds(
    Host,
    name=names,
    cores=st.integers(1, 256),
    memory_bytes=st.integers(0, 1 << 45),
    devices=st.lists(devices, max_size=2).map(tuple),
)


@given(st.lists(hosts, min_size=1, max_size=4, unique_by=lambda host: host.name), st.floats(1, 1e12))
def test_a_cluster_that_is_written_as_toml_reads_back_equal(tmp_path_factory, members, speed):
    link = Link(kind="ethernet", bytes_per_s=speed, latency_s=1e-5, between=tuple(host.name for host in members))
    cluster = Cluster(hosts=tuple(members), links=(link, Link(kind="pcie", bytes_per_s=speed)))
    file = tmp_path_factory.mktemp("cluster") / "cluster.toml"
    file.write_text(cluster.to_toml(), encoding="utf-8")
    assert Cluster.from_toml(file) == cluster
    assert cluster.cores == sum(host.cores for host in members)


ONE = Host(name="a", cores=1, memory_bytes=1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Cluster(hosts=()), "no hosts"),
        (lambda: Cluster(hosts=(ONE, ONE)), "two hosts are called 'a'"),
        (lambda: Cluster(hosts=(ONE,), links=(Link(kind="x", bytes_per_s=1, between=("a", "b")),)), "ends at 'b'"),
        (lambda: Link(kind="x", bytes_per_s=0), "bytes_per_s above 0"),
        (lambda: Host(name="a", cores=0, memory_bytes=1), "at least 1 core"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()


def test_a_cluster_file_with_an_unknown_key_is_refused_with_the_nearest_one(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[[hosts]]\nname = 'a'\ncore = 1\nmemory_bytes = 1\n")
    with pytest.raises(
        UserError, match=r"unknown key 'hosts\[0\]\.core' in .*c\.toml: did you mean 'hosts\[0\]\.cores'"
    ):
        Cluster.from_toml(file)
    file.write_text("[[hosts]]\nname = 'a'\n")
    with pytest.raises(UserError, match=r"'hosts\[0\]' in .*c\.toml lacks cores, memory_bytes"):
        Cluster.from_toml(file)


def test_a_cluster_prints_a_line_for_each_host_device_and_link():
    gpu = Device(kind="cuda", name="Big", memory_bytes=80 << 30)
    cluster = Cluster(
        hosts=(Host(name="a", cores=1, memory_bytes=1 << 30, devices=(gpu,)), Host(name="b", cores=4, memory_bytes=0)),
        links=(Link(kind="ethernet", bytes_per_s=1.25e9, latency_s=2e-5, between=("a", "b")),),
    )
    assert str(cluster).splitlines() == [
        "a: 1 core, 1.0 GiB",
        "  cuda Big, 80.0 GiB",
        "b: 4 cores, 0.0 GiB",
        "ethernet a - b: 1.25 GB/s, 20 us",
    ]


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 4),
        ({"cpu.max": "max 100000\n"}, 4),
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "900000 100000\n"}, 4),
        ({"cpu.max": "100000 0\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
    ],
)
def test_usable_cores_are_the_smaller_of_affinity_and_quota(monkeypatch, tmp_path, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    _write(tmp_path, files)
    assert usable_cores(tmp_path) == cores


@pytest.mark.parametrize("file", ["memory.max", "memory/memory.limit_in_bytes"])
def test_memory_is_the_smaller_of_the_machine_and_the_limit(tmp_path, file):
    physical = memory_bytes(tmp_path)
    _write(tmp_path, {file: "1048576\n"})
    assert memory_bytes(tmp_path) == 1 << 20
    for unlimited in ("max\n", f"{2**63 - 4096}\n"):
        _write(tmp_path, {file: unlimited})
        assert memory_bytes(tmp_path) == physical


def _write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def test_this_machine_is_a_cluster_of_one_host():
    cluster = Cluster.detect()
    assert len(cluster.hosts) == 1
    assert cluster.cores == usable_cores()
    assert cluster.hosts[0].memory_bytes > 0


def test_looking_at_this_machine_does_not_import_torch_unless_asked():
    program = "import sys; from shoal.cluster.detect import this_host; this_host(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert this_host(accelerators=False).devices == ()
