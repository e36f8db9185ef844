"""Servers of a host's own workers: nobody waits for one that cannot begin any more."""

import os
import socket
import threading

import numpy as np
import pytest

from shoal.comm.heap import Heap, heap_file
from shoal.comm.mesh import Mesh, PeerLost
from shoal.comm.server import shared
from shoal.comm.server.shared import SharedLink, serve
from shoal.comm.server.wire import Kind, Message
from shoal.comm.status import SERVERS, Reporter


@pytest.mark.parametrize("gone", [0, 1], ids=["the one that sets it up", "another one"])
def test_a_worker_that_is_lost_before_the_server_is_ready_ends_it_for_the_others(gone):
    pairs = [socket.socketpair() for _ in range(2)]
    report = Reporter(0, os.getpid(), None)
    file = heap_file()

    def live() -> None:
        mesh = Mesh(-1, [theirs for _, theirs in pairs], report)
        serve(0, mesh, Heap(file), report)
        mesh.close()

    server = threading.Thread(target=live, daemon=True)
    server.start()
    links = [SharedLink(Mesh(-1, [ours], report, first=SERVERS), 0) for ours, _ in pairs]
    links[1 - gone].send(Message(Kind.join, words={"fingerprint": "of the model"}))
    pairs[gone][0].close()
    with pytest.raises(PeerLost, match="server 0 has gone"):
        links[1 - gone].receive()
    server.join()
    pairs[1 - gone][0].close()
    os.close(file)


def test_a_message_that_is_longer_than_a_piece_arrives_whole_and_in_order(monkeypatch):
    monkeypatch.setattr(shared, "PIECE", 1000)
    ours, theirs = socket.socketpair()
    report = Reporter(0, os.getpid(), None)
    here, there = (SharedLink(Mesh(-1, [end], report), 0) for end in (ours, theirs))
    long = np.arange(5000, dtype=np.float32)
    for clock, data in enumerate([long, b"", long[:7]]):
        here.send(Message(Kind.push, clock=clock, dtype="float32" if len(data) else "none", data=data))
    for clock, size in enumerate([5000, 0, 7]):
        message = there.receive()
        assert message.clock == clock
        assert bytes(message.data) == long[:size].tobytes()
    assert there.received_bytes == here.sent_bytes
    here.close()
    for end in (ours, theirs):
        end.close()
