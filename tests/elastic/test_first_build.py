"""Before it knows what it will hold, a worker of an elastic pipeline has no memory for the model."""

from types import SimpleNamespace

from resident import watch
from train.tiny_runs import recipe, splits
from worker_fixtures import on_workers

from shoal.elastic.loop import _Life
from shoal.models.registry import build
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import ModelSpec
from shoal.train.loop import Order

__all__ = ["on_workers"]

SMALL, LARGE = ({"layers": 8, "heads": 8, "width": width} for width in (32, 512))
WHOLE = 4 * 8 * 12 * 512 * 512  # bytes of the blocks' matrices
ROOM = 24 << 20  # a piece that is measured, activations, and what stands for values while a model is recorded


def begun(group, faulty: bool) -> tuple[int, int]:
    """(bytes by which the resident set grew at most, stages that the model can be cut into)."""
    seat = SimpleNamespace(alone=lambda: group, say=lambda *about: None)
    data = splits("gpt", 64)

    def start(options: dict[str, int]) -> int:
        spec = ModelSpec(kind="gpt", options=options)
        order = Order(recipe("gpt", model=spec), Plan(mesh={"pipe": 2}, device="cpu"), data=data)
        kept = build(spec, data.train.facts) if faulty else None
        deepest = _Life(seat, order)._deepest()
        del kept
        return deepest

    start(SMALL)  # what is imported and allocated once
    grown = watch()
    deepest = start(LARGE)
    return grown(), deepest


def test_a_worker_that_does_not_know_its_stages_yet_has_memory_for_a_piece(on_workers):
    [(grown, deepest)] = on_workers(1, begun, False)
    assert deepest > 8
    assert grown < ROOM < WHOLE / 3


def test_the_measure_finds_a_worker_that_builds_the_whole_first(on_workers):
    [(grown, _)] = on_workers(1, begun, True)
    assert grown > WHOLE
