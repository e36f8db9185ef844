"""A probe over real processes: everybody gets the same numbers, which make a topology that can be kept and asked."""

import os
import tempfile

import pytest
import torch.distributed as dist

import shoal.comm as comm
from shoal.cluster.topology import Topology
from shoal.comm.collectives.curves import Curve
from shoal.comm.measuring.probing import Probed, undisturbed, usual
from shoal.errors import UserError
from shoal.recipe.typed import from_mapping, to_mapping


def on_gloo(group, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=group.rank, world_size=group.world)
    try:
        second = dist.new_group()
        found = comm.probe(curves=("broadcast",), tune=("all_reduce",), seconds=0.1)
        lanes = comm.probe([dist.group.WORLD, second], curves=(), seconds=0.05)
        alone = comm.probe(dist.new_group([group.rank], use_local_synchronization=True))
        try:
            comm.probe(curves=("send_recv",), seconds=0.05)
            told = ""
        except UserError as error:
            told = str(error)
        return to_mapping(found), to_mapping(lanes), alone.topology.size, told
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def seen(request, agent):
    import cloudpickle

    cloudpickle.register_pickle_by_value(request.module)
    with tempfile.TemporaryDirectory() as folder:
        return agent.run(on_gloo, (os.path.abspath(folder),), workers=3)


@pytest.fixture(scope="module")
def found(seen) -> Probed:
    return from_mapping(Probed, seen[0][0])


def test_all_ranks_come_to_the_same_numbers(seen):
    for which in range(2):
        assert len({str(rank[which]) for rank in seen}) == 1


def test_the_ranks_of_one_host_are_joined_each_with_each_and_share_its_processors(found):
    topology = found.topology
    assert topology.groups() == ((0, 1, 2),)
    assert len(topology.links) == 6
    assert {link.kind for link in topology.links} == {"memory"}
    assert {name for link in topology.links for name in link.through} == {"h0:processors"}
    assert topology.cores["h0"] >= 1
    assert topology.message_s > 0
    assert topology.reduce_s_per_byte > 0
    assert found.residual >= 0
    assert found.backend == "gloo"


def test_several_groups_are_lanes(seen):
    lanes = from_mapping(Probed, seen[0][1]).topology
    assert lanes.lanes == 2
    assert [link.lane for link in lanes.between(0, 1)] == [0, 1]


def test_the_backends_own_collectives_and_what_predictions_miss_are_timed_at_some_sizes(found):
    assert {curve.collective for curve in found.curves} == {"broadcast", "all_reduce"}
    assert all(curve.name == "gloo" and min(curve.values) > 0 for curve in found.curves)
    assert found.corrections
    assert all(name.startswith("all_reduce/") and curve.ratio for name, curve in found.corrections.items())
    choice = comm.plan("all_reduce", 1 << 20, found)
    assert choice.predicted_s > 0
    assert {"gloo", "ring"} & {choice.algorithm, *(other.algorithm for other in choice.alternatives)}


def test_a_probe_can_be_kept_and_read_again(found, tmp_path):
    found.save(tmp_path / "probed.json")
    again = Probed.load(tmp_path / "probed.json")
    assert to_mapping(again) == to_mapping(found)
    assert again.topology == found.topology
    assert str(found).startswith("probed over gloo in ")
    (tmp_path / "probed.json").write_text('{"topolgy": {}}')
    with pytest.raises(UserError, match=r"did you mean 'topology'"):
        Probed.load(tmp_path / "probed.json")


def test_one_rank_has_no_links_to_measure_and_a_pair_no_collective(seen):
    assert [rank[2] for rank in seen] == [1, 1, 1]
    assert "leave it out of curves" in seen[0][3]


def test_what_a_thing_takes_is_not_moved_by_what_else_happens():
    assert undisturbed([1.1, 50.0, 1.0, 90.0]) == 1.0
    assert usual([1.2, 50.0, 0.1, 90.0, 1.1, 1.2, 1.3, 60.0]) == 1.2  # one lucky turn says nothing of the others


def test_a_probed_topology_is_known_again_by_what_it_says():
    curve = Curve(name="gloo", collective="all_reduce", sizes=(8,), values=(1.0,))
    one = Probed(Topology.synthetic(2), 0.1, "gloo", 1.0, (curve,))
    assert from_mapping(Probed, to_mapping(one)).curves == one.curves
