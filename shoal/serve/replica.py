"""A model process: reads requests from its socket, lets the engine work, and leaves when the socket closes."""

import os
import select
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

import torch
from torch import nn

from shoal.comm.agent import die_with_parent
from shoal.comm.freed_memory import keep_freed_memory
from shoal.comm.group import Group
from shoal.comm.mesh import PeerLost
from shoal.errors import ShoalError
from shoal.recipe.plan import Plan
from shoal.serve.engine import (
    Begun,
    Cancel,
    Engine,
    EngineModule,
    FromEngine,
    GroupEngine,
    GroupModule,
    Request,
    Split,
    Tell,
)
from shoal.serve.frames import FrameError, encode, from_http_side
from shoal.serve.groups.seat import Seat

READ_BYTES = 1 << 20


def engine_module(task: str) -> str:
    return "shoal.serve.generation.engine" if task == "text-generation" else "shoal.serve.single_pass"


def group_module(task: str) -> str:
    return "shoal.serve.groups.generation" if task == "text-generation" else "shoal.serve.groups.single_pass"


def run_replica(life: Callable[[], None], threads: int, parent: int) -> NoReturn:
    """The whole life of a forked model process. Never returns."""
    code = 1
    try:
        die_with_parent(parent)
        for number in (signal.SIGINT, signal.SIGTERM):  # who drains is the HTTP side's to say
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        keep_freed_memory()
        torch.set_num_threads(threads)
        life()
        code = 0
    except (FrameError, OSError, ShoalError) as error:
        print(f"shoal: a model process ends: {type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(code)


def serve_model(model: nn.Module, facts: Mapping[str, Any], options: Mapping[str, Any], link: socket.socket) -> None:
    """A whole model in this process."""
    module: EngineModule = import_module(engine_module(facts["task"]))
    serve(lambda tell: module.open_engine(model, facts, options, tell), link)


def take_seat(
    split: Split,
    plan: Plan,
    facts: Mapping[str, Any],
    options: Mapping[str, Any],
    meet: Callable[[], Group],
    link: socket.socket | None,
) -> None:
    """A part of a model in this process; ``meet`` gives its group, whose leader has the link to the HTTP side."""
    module: GroupModule = import_module(group_module(facts["task"]))
    seat = Seat(plan, meet())
    if seat.leads:
        assert link is not None
        serve(lambda tell: module.open_leader(split, seat, facts, options, tell), link)
        return
    if link is not None:
        link.close()
    with suppress(PeerLost):  # the group has ended
        module.follow(split, seat, facts, options)


def serve(open_engine: Callable[[Tell], Engine | GroupEngine], link: socket.socket) -> None:
    """Until the other end closes. Raises what the engine raises: it is for the engine to answer for its requests."""

    def tell(messages: Sequence[FromEngine]) -> None:
        link.sendall(encode(messages))

    engine = open_engine(tell)
    hear: Callable[[], None] = getattr(engine, "hear", _nobody)
    tell([Begun(())])  # it can work
    reader = from_http_side()
    poll = select.poll()
    for each in (link, *getattr(engine, "sockets", ())):
        poll.register(each, select.POLLIN)
    while True:
        hear()
        now = time.monotonic()
        due = engine.next_at(now)
        wait_ms = None if due is None else max(0.0, (due - now) * 1000)
        if link.fileno() in {file for file, _ in poll.poll(wait_ms)}:
            data = link.recv(READ_BYTES)
            if not data:
                return
            for message in reader.feed(data):
                match message:
                    case Request():
                        engine.add(message)
                    case Cancel():
                        engine.cancel(message.id)
            if len(data) == READ_BYTES:
                continue  # more lies there
        now = time.monotonic()
        due = engine.next_at(now)
        if due is not None and due <= now:
            engine.work(now)


def _nobody() -> None:
    """A whole model's process hears of no other."""
