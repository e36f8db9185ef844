"""A parameter server's part in an epoch of an elastic run: what it holds is mirrored before it answers for an update.

An update that workers have heard of is thereby in memory that outlives the server, and on several hosts in that of
another host. Who serves next, whichever process, is given the weights and states by the first worker, as in any run; a
push that was not answered for is made again."""

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from shoal.comm.group import HostGroup
from shoal.comm.heap import Heap, heap_file
from shoal.comm.server.service import Service
from shoal.comm.server.shared import serve
from shoal.comm.server.store import Store
from shoal.elastic.membership import FRESH
from shoal.elastic.mirror import Mirror
from shoal.elastic.mirrored_epoch import MirroredEpoch
from shoal.elastic.seat import Place
from shoal.train.held_parts import HeldPart, state_parts


def serve_epoch(place: Place, names: Sequence[str], mirror: Mirror) -> None:
    """Until all workers of the epoch have hung up. ``names``: of the trained parameters, in the flat buffer's order."""
    group, workers = place.group, place.group.servers
    shared = isinstance(group, HostGroup)
    assert workers is not None
    if place.cold and place.first_here and not shared:
        mirror.clear()
    mirrored = MirroredEpoch(mirror, place, FRESH if place.cold else max(place.steps), None)

    def updated(service: Service) -> None:
        step = mirror.begins + service.updates
        mirrored.write(step, _parts(service.store, names), _facts(service.store, names, step))

    def first() -> int:
        return mirror.begins + 1

    def serve_on(heap: Heap) -> None:
        serve(place.server, workers, heap, group.report, shared=shared, updated=updated, first=first)

    if isinstance(group, HostGroup):
        assert group.server_heap is not None
        serve_on(group.server_heap)
        return
    file = heap_file()
    try:
        serve_on(Heap(file))
    finally:
        os.close(file)


def _parts(store: Store, names: Sequence[str]) -> list[HeldPart]:
    found: list[HeldPart] = []
    for part, weights, state in store.held():
        name, shape = names[part.slot], store.setup.shapes[part.slot]
        found.append(HeldPart(f"model/{name}", shape, part.start, weights))
        found += state_parts(name, state, shape, part.start, weights)
    return found


def _facts(store: Store, names: Sequence[str], step: int) -> dict[str, Any]:
    values: dict[str, dict[str, Any]] = {}
    for part, _, state in store.held():
        plain = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
        if plain:
            values[names[part.slot]] = plain
    return {"step": step, "aliases": {}, "optimizer": {"groups": [], "values": values}, "kept": {}, "loop": {}}
