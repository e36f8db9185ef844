"""An error for memory that ran out: who, what filled it, and the smallest change that would have sufficed."""

import gc
import re
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from shoal.comm.freed_memory import give_back_freed_memory
from shoal.memory.budget import Need, Ways, mebibytes, tried
from shoal.memory.choose import Candidate, candidates
from shoal.memory.gauge import Gauge
from shoal.memory.rehearsal import Passes
from shoal.memory.shortage import is_shortage
from shoal.memory.survey import survey
from shoal.recipe.memory_plan import size_text
from shoal.recipe.plan import Plan

MOST_PARTS = 16  # of a micro-batch, that are tried


def explained(
    module: nn.Module,
    ways: Ways,
    part: Callable[[int], Passes],
    gauge: Gauge,
    need: Need,
    missing: int,
    *,
    where: str,
    micro_batches: tuple[int, ...],
) -> str:
    """One line. ``part(n)``: the passes of one n-th of a micro-batch. ``need``: all but activations, of which
    ``missing`` bytes are not there yet.

    Changes are tried on the spot, beside as much memory as all else will take, the smallest first: the first one that
    runs is told. Nothing of the failed step may be held any more when this is called."""
    gc.collect()
    give_back_freed_memory()  # the heap of the failed step may hold all of the room that is left
    whole, change = need, ""
    try:
        stands_in = torch.empty(missing, dtype=torch.uint8, device=next(module.parameters()).device)
    except Exception as error:
        if not is_shortage(error):
            raise
        change = "memory.offload_optimizer = 'disk', or a smaller model: what is kept from step to step does not fit"
    else:
        whole, change = _sought(module, ways, part, gauge, need, micro_batches)
        del stands_in
    return f"{where} ran out of memory, which a step fills with {whole.told()}. What would fit: {change}."


def counted_change(need: Need, plan: Plan, micro_batches: tuple[int, ...], error: str) -> str:
    """What would fit, one sentence: of changes whose bytes can be counted, the first that frees what was asked for.

    For workers that make a pass together: the others wait, so that nothing can be tried."""
    asked = _asked(error)
    replicas = plan.axes.size("data")
    found: list[tuple[float, str]] = []
    if replicas > 1 and not plan.shards_states and plan.memory.offload_parameters != "disk":
        found.append((need.optimizer * (1 - 1 / replicas), "states = 'zero1'"))
    for parts in _parts(micro_batches):
        told = f"micro_batches = {parts * micro_batches[0]} in the recipe (now {micro_batches[0]})"
        found.append((need.activations * (1 - 1 / parts), told))
    if plan.memory.offload_optimizer == "none":
        found.insert(2, (need.optimizer, "memory.offload_optimizer = 'disk'"))
    for freed, told in found:
        if freed >= asked:
            return f"What would fit, by count of the {mebibytes(asked)} that it asked for: {told}."
    return (
        f"No smaller micro-batch, nor states kept elsewhere, frees the {mebibytes(asked)} that it asked for: use more "
        f"workers along an axis that splits the model, or a smaller model."
    )


def _parts(micro_batches: tuple[int, ...]) -> list[int]:
    """Into how many a micro-batch may be cut."""
    return [found for more in micro_batches[1:] if (found := more // micro_batches[0]) <= MOST_PARTS]


def _asked(error: str) -> int:
    """How many bytes an error for memory says that it asked for; 1 where it does not say."""
    bytes_ = re.search(r"allocate (\d+) bytes", error)
    if bytes_:
        return int(bytes_[1])
    units = re.search(r"allocate ([\d.]+) ([KMG])iB", error)
    return int(float(units[1]) * 1024 ** ("KMG".index(units[2]) + 1)) if units else 1


def _sought(
    module: nn.Module,
    ways: Ways,
    part: Callable[[int], Passes],
    gauge: Gauge,
    need: Need,
    micro_batches: tuple[int, ...],
) -> tuple[Need, str]:
    found: list[Candidate] = []
    if ways.blocks:
        try:
            found = candidates(survey(module, ways.blocks, part(1), gauge))
        except Exception as error:
            if not is_shortage(error):
                raise
    whole = replace(need, activations=found[0].least) if found else need
    fits: int | None = None
    low, high = 1, len(found)  # each candidate takes less than those before
    while low < high:
        middle = (low + high) // 2
        candidate = found[middle]
        most = tried(module, part(1), gauge) if ways.take(candidate, candidate.least) else None
        if most is None:
            low = middle + 1
        else:
            fits, high = most, middle
    if fits is not None:
        peak = replace(need, activations=fits).peak
        return whole, f"memory.peak_bytes = {size_text(peak)!r} ({mebibytes(fits)} of activations)"
    for number in _parts(micro_batches):
        most = tried(module, part(number), gauge)
        if most is not None:
            whole = whole if found else replace(need, activations=most * number)  # they grow with the samples
            told = f"micro_batches = {number * micro_batches[0]} in the recipe (now {micro_batches[0]})"
            return whole, f"{told}, with {mebibytes(most)} of activations"
    return whole, "a smaller model, or a smaller batch: no saving of activations is enough"
