"""The relay between hosts that one machine plays: it hands on what was said, late or not; a cut way is silent."""

import os
import random
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from train.test_processes import until

from shoal.elastic.namespaces import Namespaces
from shoal.elastic.network import Relay, Trouble
from shoal.errors import UserError


@pytest.fixture
def relay() -> Iterator[Relay]:
    made = Relay(2)
    yield made
    made.close()


@pytest.fixture
def door(relay: Relay) -> Iterator[socket.socket]:
    """Of host 1."""
    with socket.create_server(relay.addresses(1)[1]) as made:
        yield made


def connected(relay: Relay, door: socket.socket) -> tuple[socket.socket, socket.socket]:
    """A connection from host 0 to host 1: its end on each."""
    until(lambda: reachable(relay), "an open door")
    near = socket.create_connection(relay.addresses(0)[1])
    near.sendall(b"?")
    return near, said_to(door)


def said_to(door: socket.socket) -> socket.socket:
    """The first connection over which something is said; others only looked whether somebody is there."""
    while True:
        far, _ = door.accept()
        if far.recv(1):
            return far
        far.close()


def reachable(relay: Relay) -> bool:
    try:
        socket.create_connection(relay.addresses(0)[1]).close()
    except ConnectionRefusedError:
        return False
    return True


def exactly(end: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (chunk := end.recv(size - len(data))):
        data += chunk
    return data


def test_what_is_slow_and_lossy_comes_late_and_whole_and_in_order(relay, door):
    near, far = connected(relay, door)
    relay.trouble(0, out=Trouble(delay_s=0.03, loss=0.05), into=Trouble(delay_s=0.03))
    said = random.Random(0).randbytes(300_000)
    begun = time.monotonic()
    near.sendall(said)
    assert exactly(far, len(said)) == said
    far.sendall(b"!")
    assert near.recv(1) == b"!"
    assert time.monotonic() - begun >= 0.06
    near.close()
    assert far.recv(1) == b"", "an end is handed on, too"
    far.close()


@pytest.mark.parametrize("direction", ["out", "into"])
def test_a_way_that_is_cut_is_silent_the_other_one_is_not_and_what_was_held_comes_when_it_is_whole(
    relay, door, direction
):
    near, far = connected(relay, door)
    says, hears = (near, far) if direction == "out" else (far, near)
    cut, whole = Trouble(cut=True), Trouble()
    relay.trouble(0, out=cut if direction == "out" else whole, into=cut if direction == "into" else whole)
    says.sendall(b"held")
    for _ in range(5):
        hears.sendall(b"x")
        assert says.recv(1) == b"x"
    assert not select.select([hears], [], [], 0.2)[0]
    relay.trouble(0, out=whole, into=whole)
    assert exactly(hears, 4) == b"held"
    near.close()
    far.close()


def test_no_connection_is_made_over_a_cut(relay, door):
    until(lambda: reachable(relay), "an open door")
    relay.trouble(0, out=Trouble(cut=True), into=Trouble())
    with socket.create_connection(relay.addresses(0)[1]) as near:
        near.sendall(b"?")
        door.settimeout(0.3)
        with pytest.raises(TimeoutError):
            said_to(door)


def test_a_door_that_nobody_is_behind_is_closed_and_opens_again_where_it_was(relay):
    place = relay.addresses(0)[1]
    until(lambda: not reachable(relay), "a closed door")
    with socket.create_server(relay.addresses(1)[1]) as door:
        near, far = connected(relay, door)
    far.close()  # as when a process ends: its door first
    assert near.recv(1) == b""
    assert not reachable(relay), "known by the time that the end is"
    near.close()
    with socket.create_server(relay.addresses(1)[1]):
        until(lambda: reachable(relay), "an open door")
    assert relay.addresses(0)[1] == place


def may_make_namespaces() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        return False
    return subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not may_make_namespaces(), reason="network namespaces need root and iproute2")
def test_a_real_link_is_cut_one_way_and_nothing_of_it_is_left():
    network = Namespaces(2, shapes=False)
    names = [network.within(host)[-1] for host in range(2)]
    place = repr(network.addresses(0)[1])
    programs = [
        f"import socket; s = socket.create_connection({place})\n"
        "print(flush=True); input(); s.send(b'x'); print(s.recv(1), flush=True); input()",
        f"import socket; d = socket.create_server({place}); print(flush=True); s, _ = d.accept()\n"
        "input(); s.send(b'y')\n"
        "s.settimeout(0.5)\n"
        "try: print(s.recv(1), flush=True)\n"
        "except TimeoutError: print('silence', flush=True)\n"
        "s.settimeout(None); print(s.recv(1), flush=True)",
    ]
    ends: list[subprocess.Popen[str]] = []
    try:
        for host in (1, 0):
            command = [*network.within(host), sys.executable, "-c", programs[host]]
            ends.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            if host == 1:
                assert ends[0].stdout.readline() == "\n"
        hears, says = ends
        assert says.stdout.readline() == "\n", "connected"
        network.trouble(0, out=Trouble(cut=True), into=Trouble())
        for end in ends:
            end.stdin.write("\n")
            end.stdin.flush()
        assert says.stdout.readline() == "b'y'\n", "the way back is whole"
        assert hears.stdout.readline() == "silence\n"
        network.trouble(0, out=Trouble(), into=Trouble())
        assert hears.stdout.readline() == "b'x'\n", "sent again by the kernel, when somebody hears it"
    finally:
        for end in ends:
            end.communicate("\n")
        network.close()
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    assert not any(name in left for name in names)


def test_who_may_not_make_namespaces_is_told_what_else_there_is(monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(UserError, match="needs root: use --network relay"):
        Namespaces(3, shapes=False)
