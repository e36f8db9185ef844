"""Groups of model processes without a server: forked from the test, asked over the leader's socket."""

import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import msgspec
import numpy as np
from torch import nn

from shoal.recipe.plan import Plan
from shoal.serve.engine import Begun, Failed, Figures, FromEngine, Request, Result
from shoal.serve.frames import encode, from_engines
from shoal.serve.groups.links import Links
from shoal.serve.groups.mesh import plan_of
from shoal.serve.payloads import Inputs, Outputs, array
from shoal.serve.replica import group_module, run_replica, serve_model, take_seat

OPTIONS = {"batch": 4, "latency_ms": 0.0, "threads": 1, "invariant": False, "generation": {}}


class Forked:
    """The processes of one group, or a single one; ``pids`` by rank."""

    def __init__(self, pids: list[int], link: socket.socket) -> None:
        self.pids, self._link = pids, link
        self._reader = from_engines()
        self._heard: list[FromEngine] = []
        self._next = 0

    def send(self, payload: msgspec.Struct, kind: str = "predict") -> int:
        self._next += 1
        raw = msgspec.Raw(msgspec.msgpack.encode(payload))
        now = time.monotonic()
        self._link.sendall(encode([Request(self._next, kind, raw, 1, now, now + 60)]))  # type: ignore[arg-type]
        return self._next

    def hear(self) -> FromEngine | None:
        """The next message but for figures; None when the leader has gone."""
        while True:
            while self._heard:
                message = self._heard.pop(0)
                if not isinstance(message, Figures):
                    return message
            data = self._link.recv(1 << 20)
            if not data:
                return None
            self._heard += self._reader.feed(data)

    def answers(self, ids: Sequence[int]) -> dict[int, Result | Failed]:
        found: dict[int, Result | Failed] = {}
        while len(found) < len(ids):
            message = self.hear()
            assert message is not None, "the group has ended"
            if isinstance(message, Result | Failed):
                found[message.id] = message
        return found

    def predict(self, *batches: Mapping[str, Any]) -> list[dict[str, np.ndarray]]:
        """The outputs for arrays [rows, ...], one request each; texts by "tokens" have a length."""
        ids = []
        for arrays in batches:
            first = next(iter(arrays.values()))
            length = first.shape[1] if "tokens" in arrays else 0
            ids.append(self.send(Inputs(len(first), length, {name: array(a) for name, a in arrays.items()})))
        told = self.answers(ids)
        return [outputs_of(told[id]) for id in ids]


def outputs_of(answer: Result | Failed) -> dict[str, np.ndarray]:
    assert isinstance(answer, Result), answer
    outputs = msgspec.msgpack.decode(answer.payload, type=Outputs)
    return {name: one.numpy() for name, one in outputs.arrays.items()}


@contextmanager
def forked(
    model: nn.Module, facts: Mapping[str, Any], mesh: Mapping[str, int], split: Any = None, **options: Any
) -> Iterator[Forked]:
    """A group on this mesh; with an empty one, the model in one process. ``split``: made before."""
    chosen = {**OPTIONS, **options}
    plan = plan_of(mesh)
    if plan.splits_model and split is None:
        split = made(model, facts, plan, chosen)
    ours, theirs = socket.socketpair()
    links = Links(plan.workers) if plan.workers > 1 else None
    pids = []
    for rank in range(plan.workers):
        pid = os.fork()
        if pid == 0:
            ours.close()
            if links is None:
                life = partial(serve_model, model, facts, chosen, theirs)
            else:
                life = partial(take_seat, split, plan, facts, chosen, partial(links.taken, rank), theirs)
            run_replica(life, 1, os.getppid())
        pids.append(pid)
    theirs.close()
    if links:
        links.close()
    group = Forked(pids, ours)
    try:
        assert group.hear() == Begun(()), "it can work"
        yield group
    finally:
        ours.close()
        for pid in pids:  # all end when the leader's socket does
            os.waitpid(pid, 0)


def made(model: nn.Module, facts: Mapping[str, Any], plan: Plan, options: Mapping[str, Any] = OPTIONS) -> Any:
    return import_module(group_module(facts["task"])).split(model, plan, facts, options)
