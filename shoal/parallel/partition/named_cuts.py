"""Cuts that a user names: modules, or parameters used on their own, at which a new chunk begins."""

from collections.abc import Sequence

from torch import fx

from shoal.errors import UserError, unknown_name
from shoal.parallel.partition.line import Line


def named(line: Line, count: int, cuts: Sequence[str]) -> tuple[int, ...]:
    """The place of each cut. Raises UserError for a cut that cannot be, or that is out of order."""
    if len(cuts) != count - 1:
        raise UserError(f"{count} chunks have {count - 1} cuts between them, but {len(cuts)} are given: {list(cuts)}.")
    places = tuple(_place(line, cut) for cut in cuts)
    for before, after, cut in zip(places, places[1:], cuts[1:], strict=False):
        if after <= before:
            order = [name for _, name in sorted(zip(places, cuts, strict=True))]
            raise UserError(f"the chunk that would end at cut {cut!r} is empty: name cuts in forward order: {order}.")
    return places


def _place(line: Line, cut: str) -> int:
    modules = dict(line.model.named_modules(remove_duplicate=False))
    known = {*modules, *dict(line.model.named_parameters(remove_duplicate=False))} - {""}
    if cut not in known:
        raise unknown_name("cut point", cut, known, type(line.model).__name__)
    place = next(
        (place for place, node in enumerate(line.nodes) if any(_within(name, cut) for name in _names(node))), None
    )
    if place is None:
        for node in line.nodes:
            if node.op == "call_module" and _within(cut, str(node.target)):
                kind = type(line.model.get_submodule(str(node.target))).__name__
                why = line.recording.whole.get(kind, "its layers are not called one by one")
                raise UserError(
                    f"no cut can be at {cut!r}, inside {node.target!r}: a {kind} is kept whole ({why}). "
                    f"Cut at {node.target!r} or after it."
                )
        raise UserError(f"no cut can be at {cut!r}: the forward pass of the example does not use it.")
    if not any(node.op == "call_module" or line.state(node) for node in line.nodes[:place]):
        raise UserError(f"no cut can be at {cut!r}: the model begins with it, so the chunk before it would be empty.")
    if place in line.forbidden:
        raise UserError(f"no cut can be at {cut!r}: {line.forbidden[place]}. Cut elsewhere, or do not write in place.")
    return place


def _names(node: fx.Node) -> list[str]:
    """What a node belongs to: the module whose code it comes from, the one that it calls, parameters that it uses."""
    read = [str(given.target) for given in node.all_input_nodes if given.op == "get_attr"]
    return [node.meta["module"], *read, *([str(node.target)] if node.op == "call_module" else [])]


def _within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")
