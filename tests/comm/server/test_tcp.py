"""Real sockets: the same bits as on one process, workers that come and go, strangers, and servers that die."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
import zmq
from forked_programs import Program

from shoal.comm.mesh import PeerLost
from shoal.comm.server import wire
from shoal.comm.server.api import ParameterServer, Served, serve
from shoal.comm.server.tcp import TcpLink, TcpServer, new_token
from shoal.comm.server.wire import Kind, Message
from shoal.errors import RunFailed, UserError

ROUNDS = 4


def model(embedding: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    parts = [torch.nn.Linear(37, 29), torch.nn.Linear(29, 3)]
    return torch.nn.Sequential(*([torch.nn.Embedding(500, 32)] if embedding else []), *parts)


def gradients(of: torch.nn.Module, worker: int, number: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * worker + number)
    return [torch.randn(p.shape, generator=generator) for p in of.parameters()]


def weights(of: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in of.parameters()]


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def together(*programs) -> list:
    """Run in threads; their results, and the first error."""
    results: list = [None] * len(programs)
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            results[index] = programs[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(programs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    return results


OPTIMIZERS = {
    "SGD": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "AdamW": {"lr": 0.01, "fused": True},
    "Adagrad": {"lr": 0.01, "initial_accumulator_value": 0.1},
    "RMSprop": {"lr": 0.01, "centered": True},
}


@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_synchronous_rounds_give_the_bits_of_a_plain_optimiser_with_the_mean_gradient(name, servers):
    kind = getattr(torch.optim, "SGD" if name == "momentum" else name)

    nets = [model(), model()]  # made here: threads share the random stream

    def worker(rank: int, served: Served):
        net = nets[rank]
        optimizer = kind(net.parameters(), **OPTIMIZERS[name])
        with ParameterServer(net.parameters(), optimizer, served, worker=rank, expected=2) as server:
            for number in range(ROUNDS):
                for group in optimizer.param_groups:
                    group["lr"] = 0.1 / (number + 1)  # a schedule
                server.push(gradients(net, rank, number))
                assert server.pull() == number + 1
            server.fetch_state()
            return weights(net), [dict(optimizer.state[p]) for p in net.parameters()]

    with serve(servers) as served:
        results = together(lambda: worker(0, served), lambda: worker(1, served))
    twin = model()
    plain = kind(twin.parameters(), **OPTIMIZERS[name])
    for number in range(ROUNDS):
        for group in plain.param_groups:
            group["lr"] = 0.1 / (number + 1)
        for p, one, other in zip(
            twin.parameters(), gradients(twin, 0, number), gradients(twin, 1, number), strict=True
        ):
            p.grad = (one + other) / 2
        plain.step()
    for held, state in results:
        assert same(held, weights(twin))
        for parameter, own in zip(twin.parameters(), state, strict=True):
            assert own.keys() == plain.state[parameter].keys()
            for key, value in plain.state[parameter].items():
                assert value is None or torch.equal(own[key], value), key


def test_a_parameter_that_does_not_lie_in_rows_keeps_its_strides():
    values = torch.arange(120.0).view(12, 10)
    turned = torch.nn.Parameter(values.clone().t())
    with serve(2) as served:
        optimizer = torch.optim.SGD([turned], lr=1.0)
        with ParameterServer([turned], optimizer, served, worker=0) as server:
            server.push([torch.ones(10, 12)])
            server.pull()
    assert turned.stride() == (1, 10)
    assert torch.equal(turned.detach(), values.t() - 1)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_sparse_gradients_travel_by_rows_and_give_the_bits_of_dense_ones(name):
    rows = torch.tensor([[3, 77, 3, 499]])
    values = torch.randn(4, 32, generator=torch.Generator().manual_seed(5))
    sparse = torch.sparse_coo_tensor(rows, values, (500, 32), check_invariants=True)
    sent = {}

    def trained(gradient):
        net = model(embedding=True)
        optimizer = getattr(torch.optim, name)(net.parameters(), lr=0.1)
        with serve(2) as served, ParameterServer(net.parameters(), optimizer, served, worker=0) as server:
            before = sum(link.sent_bytes for link in server._roster.links)
            for _ in range(ROUNDS):
                server.push([gradient, *[None] * 4])
                server.pull()
            sent[gradient.is_sparse] = sum(link.sent_bytes for link in server._roster.links) - before
            return weights(net)

    assert same(trained(sparse), trained(sparse.to_dense()))
    assert sent[True] < sent[False] / 8


def test_compressed_pushes_are_half_as_large_and_close_to_exact_ones():
    found, sent = {}, {}
    for compression in ("none", "bf16"):
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        options = {"worker": 0, "compression": compression}
        with serve(2) as served, ParameterServer(net.parameters(), optimizer, served, **options) as server:
            before = sum(link.sent_bytes for link in server._roster.links)
            for number in range(ROUNDS):
                server.push(gradients(net, 0, number))
                server.pull()
            sent[compression] = sum(link.sent_bytes for link in server._roster.links) - before
            found[compression] = weights(net)
    for one, other in zip(found["none"], found["bf16"], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.02)  # bf16: 8 bits of each gradient, times lr
    assert not same(found["none"], found["bf16"])
    assert sent["bf16"] < 0.75 * sent["none"]  # heads and words are the rest


HELD = 90  # kind of the message from one worker to the other


def apart(group, served, mode, bound, steps, held_at):
    """Rank 0 is fast. Rank 1 stands still until that one says, before a pull, that it has pushed step ``held_at``.

    How far each has seen itself ahead; when rank 1 began its first push, and rank 0's pull of ``held_at`` returned."""
    net, seen, when = model(), [], 0.0
    options = {"worker": group.rank, "mode": mode, "staleness": bound, "expected": 2}
    with ParameterServer(net.parameters(), torch.optim.SGD(net.parameters(), lr=0.1), served, **options) as me:
        if group.rank == 1:
            group.mesh.receive(0, HELD, 0)
            when = time.monotonic()
        for number in range(steps):
            me.push(gradients(net, group.rank, number))
            if group.rank == 0 and number == held_at:
                group.mesh.send(1, HELD, 0)
            me.pull()
            seen.append(me.ahead)
            if group.rank == 0 and number == held_at:
                when = time.monotonic()
        group.gather(b"")
    return seen, when


def test_a_fast_worker_waits_at_the_bound_and_goes_on_when_the_slow_one_moves(on_workers):
    """Two processes and one clock; the slow one stands still until the fast one has come to the bound."""
    with serve(2) as served:
        (fast, passed), (_, moved) = on_workers(2, apart, served, "ssp", 2, 8, 2)
    assert max(fast) == 2
    assert len(fast) == 8
    assert moved < passed


def test_without_a_bound_a_fast_worker_has_done_all_its_steps_before_the_slow_one_moves(on_workers):
    """So that the bound is what held it above."""
    with serve(2) as served:
        (fast, _), _ = on_workers(2, apart, served, "async", 0, 8, 7)
    assert max(fast) > 2


WORKER = """
import json, sys, torch
from shoal.comm.server.api import ParameterServer, Served
address, token, rank, steps = sys.argv[1], bytes.fromhex(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
torch.manual_seed(0)
net = torch.nn.Linear(8, 8)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
server = ParameterServer(net.parameters(), optimizer, Served((address,), token), worker=rank, mode="ssp", staleness=1)
print("joined", flush=True)
for step in range(steps):
    server.push([torch.ones(8, 8), torch.ones(8)])
    server.pull()
    print("step", step, server.ahead, flush=True)
sys.stdin.read()
"""


def test_a_worker_whose_connection_ends_blocks_nobody():
    with serve(2) as served:
        nets = [model(), model()]
        workers = [
            ParameterServer(net.parameters(), torch.optim.SGD(net.parameters()), served, worker=rank, mode="ssp")
            for rank, net in enumerate(nets)
        ]
        workers[0].push(gradients(nets[0], 0, 0))  # held: with staleness 0 the other must have pushed as well
        workers[1].close()  # without a word
        assert workers[0].pull() == 1
        workers[0].push(gradients(nets[0], 0, 1))
        assert workers[0].pull() == 2
        workers[0].leave()


def test_a_killed_worker_blocks_nobody_and_a_new_one_joins_where_the_slowest_is(warm):
    token = new_token()
    environment = {**os.environ, "SHOAL_SERVER_TOKEN": token.hex()}
    command = [sys.executable, "-m", "shoal.comm.server", "--until-empty"]
    server = Program(command, source=warm, env=environment, stdout=subprocess.PIPE, text=True)
    address = json.loads(server.stdout.readline())["address"]
    assert address.startswith("127.0.0.1:")

    def worker(rank: int, steps: int) -> Program:
        program = [sys.executable, "-c", WORKER, address, token.hex(), str(rank), str(steps)]
        return Program(program, source=warm, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    net = torch.nn.Linear(8, 8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    other = worker(0, 0)  # it leads, and then stands still
    try:
        assert other.stdout.readline() == "joined\n"
        options = {"worker": 1, "mode": "ssp", "staleness": 1}
        with ParameterServer(net.parameters(), optimizer, Served((address,), token), **options) as me:
            for _ in range(2):
                me.push([torch.ones(8, 8), torch.ones(8)])
                me.pull() if me._clock == 1 else None
            os.kill(other.pid, signal.SIGKILL)  # we are held by it: only its end lets us go on
            assert me.pull() >= 2
            assert me.ahead == 0
            third = worker(2, 1)
            try:
                assert third.stdout.readline() == "joined\n"
                assert third.stdout.readline() == "step 0 1\n"  # it began where we, the slowest, were
            finally:
                third.stdin.close()
                third.communicate(60)
            me.push([torch.ones(8, 8), torch.ones(8)])
            assert me.pull() == 4
        assert server.wait(60) == 0
    finally:
        for process in (other, server):
            process.kill()
            process.communicate()
        other.stdin.close()


def test_a_server_that_dies_is_named(warm):
    token = new_token()
    environment = {**os.environ, "SHOAL_SERVER_TOKEN": token.hex()}
    command = [sys.executable, "-m", "shoal.comm.server"]
    server = Program(command, source=warm, env=environment, stdout=subprocess.PIPE, text=True)
    address = json.loads(server.stdout.readline())["address"]
    net = model()
    me = ParameterServer(
        net.parameters(), torch.optim.SGD(net.parameters()), Served((address,), token), worker=0, expected=2
    )
    me.push(gradients(net, 0, 0))
    server.kill()
    server.communicate()
    with pytest.raises(PeerLost, match=rf"^server 0 at {address} has gone$"):
        me.pull()
    me.close()


@pytest.mark.parametrize("token", ["", "12", "xy" * 32])
def test_a_server_without_a_token_says_how_to_make_one(token, warm):
    command, environment = [sys.executable, "-m", "shoal.comm.server"], {**os.environ, "SHOAL_SERVER_TOKEN": token}
    server = Program(command, source=warm, env=environment, stderr=subprocess.PIPE, text=True)
    _, said = server.communicate(60)
    assert server.returncode == 2
    assert len(said.splitlines()) == 1
    assert "token_hex(32)" in said


def test_strangers_garbage_and_replays_are_counted_and_the_honest_worker_sees_nothing_of_them():
    token = new_token()
    server = TcpServer(token=token)
    thread = threading.Thread(target=server.run)
    thread.start()
    context = zmq.Context()
    try:
        host, port = server.address.split(":")
        for raw in (b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(5000), b"\xff" + bytes(8) + b"\x7f" + b"\0" * 100):
            with socket.create_connection((host, int(port))) as stranger:
                stranger.sendall(raw)
        stranger = context.socket(zmq.DEALER)
        stranger.connect(f"tcp://{server.address}")
        hello = wire.encode(Message(Kind.join), 0, bytes(32))
        for frames in ([b"x"], [b"", b""], [b"a", b"b", b"c"], [os.urandom(200), b""], list(hello)):
            stranger.send_multipart(frames)
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with ParameterServer(net.parameters(), optimizer, Served((server.address,), token), worker=0) as me:
            link = me._roster.links[0]
            me.push(gradients(net, 0, 0))
            me.pull()
            replayed = wire.encode(Message(Kind.commit, 0, 0), link._sent - 1, token)
            link._socket.send_multipart(replayed)
            forged = wire.encode(Message(Kind.leave, 1), link._sent, token)
            link._socket.send_multipart(forged)
            second = context.socket(zmq.DEALER)  # knows the token, and says that it is worker 0
            second.connect(f"tcp://{server.address}")
            second.send_multipart(wire.encode(Message(Kind.leave, 0), 0, token))
            third = context.socket(zmq.DEALER)  # answered, so that all of the above has been handled
            third.connect(f"tcp://{server.address}")
            third.send_multipart(wire.encode(Message(Kind.pull, 9), 0, token))
            assert wire.decode(*third.recv_multipart(), token)[0].kind is Kind.refused
            me.push(gradients(net, 0, 1))
            assert me.pull() == 2
        assert not stranger.poll(0)
    finally:
        server.end()
        thread.join(60)
        refused = dict(server.refused)
        server.close()
        context.destroy(linger=0)
    for reason, least in (
        ("a message that is not of two frames", 2),
        ("a wrong token", 1),
        ("a message that was sent before, or after a lost one", 1),
        ("a message in another worker's name", 1),
        ("worker 0 is another connection", 1),
    ):
        assert refused.get(reason, 0) >= least, refused


def test_a_server_that_is_not_there_is_told():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        link = TcpLink(address, 3, token=bytes(32), patience_s=0.2)
        with pytest.raises(PeerLost, match=rf"^server 3 at {address} did not answer within 0 s$"):
            link.receive()
        link.close()


def test_another_model_is_refused():
    with serve() as served:
        net, other = model(), torch.nn.Linear(3, 3)
        with ParameterServer(net.parameters(), torch.optim.SGD(net.parameters()), served, worker=0):  # noqa: SIM117
            with pytest.raises(RunFailed, match="another model, optimiser or scheme"):
                ParameterServer(other.parameters(), torch.optim.SGD(other.parameters()), served, worker=1)


class Own(torch.optim.SGD):
    pass


def test_optimisers_that_no_server_can_run_are_refused_in_one_line():
    net = model()
    for optimizer, text in (
        (Own(net.parameters()), "runs the optimisers of torch.optim, not .*Own"),
        (torch.optim.LBFGS(net.parameters()), "LBFGS evaluates the loss again"),
    ):
        with pytest.raises(UserError, match=text), serve() as served:
            ParameterServer(net.parameters(), optimizer, served, worker=0)
