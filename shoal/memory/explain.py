"""An error for memory that ran out: who, what filled it, and the smallest change that would have sufficed."""

import gc
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from shoal.memory.budget import Need, Ways, mebibytes, tried
from shoal.memory.choose import Candidate, candidates
from shoal.memory.gauge import Gauge
from shoal.memory.rehearsal import Loss
from shoal.memory.shortage import is_shortage
from shoal.memory.survey import survey
from shoal.recipe.memory_plan import size_text

PARTS = (2, 4, 8, 16)  # of a micro-batch, that are tried


def explained(
    module: nn.Module,
    ways: Ways,
    part: Callable[[int], Loss],
    gauge: Gauge,
    need: Need,
    missing: int,
    *,
    where: str,
    micro_batches: int,
) -> str:
    """One line. ``part(n)``: the loss of one n-th of a micro-batch. ``need``: all but activations, of which ``missing``
    bytes are not there yet.

    Changes are tried on the spot, beside as much memory as all else will take, the smallest first: the first one that
    runs is told. Nothing of the failed step may be held any more when this is called."""
    gc.collect()
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


def _sought(
    module: nn.Module, ways: Ways, part: Callable[[int], Loss], gauge: Gauge, need: Need, micro_batches: int
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
    for number in PARTS:
        most = tried(module, part(number), gauge)
        if most is not None:
            whole = whole if found else replace(need, activations=most * number)  # they grow with the samples
            told = f"micro_batches = {number * micro_batches} in the recipe (now {micro_batches})"
            return whole, f"{told}, with {mebibytes(most)} of activations"
    return whole, "a smaller model, or a smaller batch: no saving of activations is enough"
