"""Ranks and links as plain data: what goes in comes out, and presets have the wires that their sources name."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster import presets
from shoal.cluster.cluster import Cluster, Device, Host
from shoal.cluster.cluster import Link as Joint
from shoal.cluster.topology import Capacity, Link, Speed, Topology
from shoal.errors import UserError

# NVIDIA DGX-1 V100: links between GPUs a and b, from NCCL's topology file of all 8 GPUs (NVIDIA/nccl issue 671).
V100 = {"01": 1, "02": 1, "03": 2, "04": 2, "12": 2, "13": 1, "15": 2, "23": 2, "26": 1, "37": 1, "45": 1, "46": 1,
        "47": 2, "56": 2, "57": 1, "67": 2}  # fmt: skip
# GB/s of a GPU's NVLinks in one direction, and its part of the network cards: the makers' data sheets.
PER_GPU = {"dgx1-p100": (80, 6.25), "dgx1-v100": (150, 6.25), "dgx2": (150, 6.25), "dgx-a100": (300, 25),
           "dgx-h100": (450, 50)}  # fmt: skip

topologies = st.builds(
    Topology.synthetic,
    st.integers(4, 9),
    hosts=st.integers(1, 4),
    inside=st.builds(Speed, st.floats(1e6, 1e12), st.floats(0, 1e-2)),
    between=st.lists(st.builds(Speed, st.floats(1e6, 1e12), st.floats(0, 1e-2)), max_size=3),
)


@given(topologies)
def test_text_gives_back_the_same_topology(topology):
    assert Topology.from_json(topology.to_json()) == topology
    assert hash(Topology.from_json(topology.to_json())) == hash(topology)


@pytest.mark.parametrize("ending", ["json", "toml"])
def test_a_file_gives_back_the_same_topology(ending, tmp_path):
    topology = Topology.preset("dgx1-v100", [1, 4, 6], nodes=2)
    topology.save(tmp_path / f"t.{ending}")
    assert Topology.load(tmp_path / f"t.{ending}") == topology


@given(topologies, st.data())
def test_a_subset_has_the_links_between_its_ranks_and_what_they_share(topology, data):
    ranks = data.draw(st.lists(st.integers(0, topology.size - 1), min_size=1, unique=True))
    part = topology.subset(ranks)
    for a, b in itertools.permutations(range(len(ranks)), 2):
        want = topology.between(ranks[a], ranks[b])
        assert [(x.kind, x.lane, x.bytes_per_s, x.through) for x in part.between(a, b)] == [
            (x.kind, x.lane, x.bytes_per_s, x.through) for x in want
        ]
    assert set(part.rates) == {name for link in part.links for name in link.through}


def test_a_dgx1_has_the_links_of_its_adjacency_matrix():
    topology = Topology.preset("dgx1-v100")
    found = {f"{x.source}{x.target}": x.bytes_per_s / 25e9 for x in topology.links if x.kind == "nvlink"}
    assert {ends: count for ends, count in found.items() if ends[0] < ends[1]} == V100
    assert all(found[ends[::-1]] == count for ends, count in found.items())
    quads = {"".join(pair) for quad in ("0123", "4567") for pair in itertools.combinations(quad, 2)}
    p100 = {f"{x.source}{x.target}" for x in Topology.preset("dgx1-p100").links if x.kind == "nvlink"}
    assert {ends for ends in p100 if ends[0] < ends[1]} == quads | {"04", "15", "26", "37"}


@pytest.mark.parametrize("name", presets.names())
def test_a_gpu_of_a_preset_has_the_rates_of_its_data_sheet(name):
    node = Topology.preset(name)
    made = presets.node(name)
    ports = sum(made.nvlinks(0, other) for other in range(1, made.gpus)) if not made.nvlink.to_switch else None
    links = made.nvlink.to_switch or ports
    assert links * made.nvlink.bytes_per_s == PER_GPU[name][0] * 1e9
    pair = Topology.preset(name, nodes=2)
    out = sum(rate for card, rate in pair.rates.items() if card.startswith("node0:nic") and card.endswith("out"))
    assert out / made.gpus == PER_GPU[name][1] * 1e9
    assert node.size == made.gpus
    assert made.sources


def test_gpus_without_nvlink_meet_over_pcie_and_share_its_switches():
    topology = Topology.preset("dgx1-v100", [0, 1, 5])
    assert topology.link(0, 2).kind == "pcie"  # GPUs 0 and 5
    assert topology.link(0, 1).kind == "nvlink"
    assert topology.link(0, 1, topology.lane_of("pcie")).kind == "pcie"
    shared = set(topology.link(0, 2, 1).through) & set(topology.link(1, 2, 1).through)
    assert shared == {"node0:switch0:out", "node0:switch2:in", "node0:gpu5:pcie:in", "node0:socket0:out"}


def test_a_cluster_gives_ranks_that_share_their_hosts_card():
    cluster = Cluster(
        hosts=(
            Host(name="a", cores=4, memory_bytes=1, devices=(Device(kind="cuda", memory_bytes=1),) * 2),
            Host(name="b", cores=8, memory_bytes=1),
        ),
        links=(
            Joint(kind="memory", bytes_per_s=5e9, between=("a",)),
            Joint(kind="ethernet", bytes_per_s=1e9, latency_s=1e-4),
            Joint(kind="infiniband", bytes_per_s=1e10, between=("a", "b")),
        ),
    )
    topology = Topology.from_cluster(cluster)
    assert topology.hosts == ("a", "a", "b")
    assert topology.cores == {"a": 4, "b": 8}
    assert topology.link(0, 1).bytes_per_s == 5e9
    assert [link.kind for link in topology.between(0, 2)] == ["ethernet", "infiniband"]
    assert topology.link(0, 2).through == topology.link(1, 2).through == ("a:ethernet0:out", "b:ethernet0:in")
    assert Topology.from_cluster(cluster, 3).size == 6
    with pytest.raises(UserError, match="at least 1 for each of 2 hosts"):
        Topology.from_cluster(cluster, [1, 2, 3])


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (lambda: Topology.preset("dgx1v100"), "did you mean 'dgx1-v100'"),
        (lambda: Topology.preset("dgx1-v100", [0, 8]), "GPUs from 0 to 7"),
        (lambda: Topology.preset("dgx1-v100").lane_of("nvlnk"), "did you mean 'nvlink'"),
        (lambda: Topology.preset("dgx1-v100").ranks_of("node1"), "did you mean 'node0'"),
        (lambda: Topology.synthetic(2).subset([0, 0]), "once"),
        (lambda: Topology.synthetic(2).subset([2]), "one of 0 to 1"),
        (lambda: Topology.synthetic(2).link(0, 1, 1), r"lanes there: 0 \(memory\)"),
        (lambda: Topology.synthetic(2, hosts=3), "over 3 hosts"),
        (lambda: Topology(hosts=()), "no ranks"),
        (lambda: Topology(hosts=("a",) * 2, links=(Link(source=0, target=2, bytes_per_s=1),)), "outside of 2 ranks"),
        (lambda: Topology(hosts=("a",) * 2, links=(Link(source=0, target=1, bytes_per_s=1),) * 2), "two links 0 -> 1"),
        (
            lambda: Topology(
                hosts=("a",) * 2,
                links=(Link(source=0, target=1, bytes_per_s=1, through=("car",)),),
                capacities=(Capacity(name="card", bytes_per_s=1),),
            ),
            "did you mean 'card'",
        ),
        (lambda: Topology(hosts=("a",), capacities=(Capacity(name="c", bytes_per_s=1),) * 2), "same name"),
        (lambda: Topology(hosts=("node",), cores={"nod": 1}), "did you mean 'node'"),
        (lambda: Link(source=0, target=0, bytes_per_s=1), "must join two ranks"),
        (lambda: Link(source=0, target=1, bytes_per_s=0), "above 0"),
        (lambda: Capacity(name="c", bytes_per_s=float("nan")), "above 0"),
        (lambda: Topology.from_json("{"), "not valid JSON"),
        (lambda: Topology.from_json('{"hosts": ["a"], "lnks": []}'), "did you mean 'links'"),
        (lambda: Topology.load("/nowhere/t.json"), "no file"),
    ],
)
def test_mistakes_are_told_in_one_line(ask, told):
    with pytest.raises(UserError, match=told) as caught:
        ask()
    assert "\n" not in str(caught.value)


def test_the_table_shows_who_is_joined_how_fast():
    table = str(Topology.preset("dgx1-v100", range(4)))
    assert table.splitlines()[0] == "dgx1-v100[0,1,2,3]: 4 ranks on 1 host"
    assert "       0   .  25  25  50\n" in table
    assert "  shared node*:gpu*:pcie:out, 4 of them: 15.8 GB/s" in table
    two = str(Topology.synthetic(4, hosts=2, between=[Speed(1.25e8, 1e-4)]))
    assert "lane 0 network: 8 links, 0.125 GB/s, 100 us" in two
