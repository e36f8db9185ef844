"""A model process: reads requests from its socket, lets the engine work, and leaves when the socket closes."""

import os
import select
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, NoReturn

import torch

from shoal.comm.agent import die_with_parent, keep_freed_memory
from shoal.errors import UserError
from shoal.serve.engine import Begun, Cancel, Engine, FromEngine, Request
from shoal.serve.frames import FrameError, encode, from_http_side
from shoal.serve.target import Loaded

READ_BYTES = 1 << 20


def engine_module(task: str) -> str:
    return "shoal.serve.generation.engine" if task == "text-generation" else "shoal.serve.single_pass"


def run_replica(loaded: Loaded, options: Mapping[str, Any], link: socket.socket, parent: int) -> NoReturn:
    """The whole life of a forked model process. Never returns."""
    code = 1
    try:
        die_with_parent(parent)
        for number in (signal.SIGINT, signal.SIGTERM):  # who drains is the HTTP side's to say
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        keep_freed_memory()
        torch.set_num_threads(options["threads"])
        serve(loaded, options, link)
        code = 0
    except (FrameError, OSError, UserError) as error:
        print(f"shoal: a model process ends: {type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(code)


def serve(loaded: Loaded, options: Mapping[str, Any], link: socket.socket) -> None:
    """Until the other end closes. Raises what the engine raises: it is for the engine to answer for its requests."""

    def tell(messages: Sequence[FromEngine]) -> None:
        link.sendall(encode(messages))

    engine: Engine = import_module(engine_module(loaded.facts["task"])).open_engine(
        loaded.model, loaded.facts, options, tell
    )
    tell([Begun(())])  # it can work
    reader = from_http_side()
    poll = select.poll()
    poll.register(link, select.POLLIN)
    while True:
        now = time.monotonic()
        due = engine.next_at(now)
        wait_ms = None if due is None else max(0.0, (due - now) * 1000)
        if poll.poll(wait_ms):
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
