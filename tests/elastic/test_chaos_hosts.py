"""Whole hosts rehearsed: what is refused before anything is spent, and a run that loses two of three and is cut off."""

import pytest
from train.tiny_runs import recipe, splits

from shoal.elastic.chaos_hosts import rehearse_hosts
from shoal.elastic.host_faults import HOST_KINDS, LEADER, LINKS, HostFault, usual_host_faults
from shoal.errors import UserError
from shoal.recipe.plan import Plan

SERVED = {"sync": "parameter-server", "servers": 1}
CNN, DATA = recipe("cnn", steps=30), splits("cnn", 101)


def plan(**how: object) -> Plan:
    return Plan(**{"mesh": {"data": 3}, "device": "cpu", **how})


def test_faults_are_read_as_they_are_written():
    assert HostFault.parse("cut-out:host=1,step=5") == HostFault("cut-out", 1, 5)
    assert HostFault.parse("kill-host:host=leader") == HostFault("kill-host", LEADER)
    assert str(HostFault("cut", LEADER, 7)) == "cut the leader after step 7"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kil-host", "did you mean 'kill-host'"),
        ("cut:hots=1", "did you mean 'host'"),
        ("cut:host=x", "write it as"),
        ("delay:step=-1", "write it as"),
    ],
)
def test_a_fault_that_is_none_is_refused_in_one_line(text, said):
    with pytest.raises(UserError, match=said) as refused:
        HostFault.parse(text)
    assert "\n" not in str(refused.value)


def test_the_usual_faults_are_all_kinds_and_leaders_too_each_of_a_host_that_is_there():
    faults = usual_host_faults(3)
    assert {fault.kind for fault in faults} == set(HOST_KINDS)
    assert {fault.kind for fault in faults if fault.host == LEADER} == {"kill-host", "cut"}
    assert all(fault.host < 3 for fault in faults)
    assert set(LINKS) < set(HOST_KINDS)


@pytest.mark.parametrize(
    ("hosts", "how", "faults", "said"),
    [
        (2, {}, [], "of two hosts one waits"),
        (40, {}, [], "use 2 to 32"),
        (3, {"mesh": {"data": 2}}, [], "3 hosts need a worker or a server each"),
        (4, {"mesh": {"data": 2}, **SERVED}, [], "--workers 2 and 1 servers: 4 hosts need"),
        (3, {"mesh": {"tensor": 3}}, [], "a mesh with tensor = 3 is not elastic yet"),
        (3, {}, [HostFault("cut", 3)], "numbered 0 to 2"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused_before_anything_is_spent(tmp_path, hosts, how, faults, said):
    with pytest.raises(UserError, match=said):
        rehearse_hosts(CNN, plan(**how), faults, hosts=hosts, folder=tmp_path / "both", data=DATA)
    assert not (tmp_path / "both").exists()


@pytest.mark.soak
def test_a_host_that_is_cut_off_one_way_and_one_that_is_killed_cost_no_bit_of_sharded_states(tmp_path):
    faults = [HostFault("cut-in", 1), HostFault("kill-host", LEADER)]
    found = rehearse_hosts(CNN, plan(states="zero1"), faults, hosts=3, folder=tmp_path, data=DATA)
    assert found["ok"], found
    assert found["bits_equal"]
    assert found["told_once"]
    assert [each.happened for each in found["faults"]] == [True, True]
    cut, killed = found["faults"]
    assert cut.noticed_s > 1.5, "a lease is waited for"
    assert all(0 < each.noticed_s < each.recovered_s for each in (cut, killed))
    assert all(each.redone <= 1 for each in found["faults"])
