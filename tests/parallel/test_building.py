"""A worker of a split model has memory for what it holds of it, from the start."""

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal.models.registry import build, build_blank, task_for
from shoal.parallel.held import Held
from shoal.parallel.place import Subject, place
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import ModelSpec

FACTS = {"vocab": 512, "context": 16}
OPTIONS = {"layers": 4, "heads": 8, "width": 512}
SPECS = {
    "gpt": ModelSpec(kind="gpt", options=OPTIONS),
    "deep gpt": ModelSpec(kind="gpt", options={**OPTIONS, "layers": 8}),
    "moe": ModelSpec(kind="moe", options={**OPTIONS, "layers": 2, "experts": 4}),
}


def peak_bytes() -> int:
    """Of the resident set, without files: code that is run for the first time is mapped then, and stays."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak, files = (int(status.partition(f"{key}:")[2].split()[0]) << 10 for key in ("VmHWM", "RssFile"))
    return peak - files


def placed(group, kind: str, mesh: dict[str, int], faulty: bool) -> tuple[int, int, int]:
    """(bytes by which the resident set grew at most, bytes that are held, bytes of the whole model)."""
    torch.set_num_threads(1)
    spec = SPECS[kind]
    hold(group, replace(spec, options={**spec.options, "width": 32}), mesh)  # what is imported and allocated once
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts from here
    before = peak_bytes()
    kept = build_whole(spec) if faulty else None
    held, whole = hold(group, spec, mesh)
    grown = peak_bytes() - before
    del kept
    return grown, sum({id(p): p.nbytes for s in held.shares for p in s.parameters.values()}.values()), whole


def hold(group, spec: ModelSpec, mesh: dict[str, int]) -> tuple[Held, int]:
    torch.manual_seed(0)
    found = build_blank(spec, FACTS)
    assert found is not None
    whole = sum(t.nbytes for t in found.module.parameters())
    subject = Subject(task_for(spec, FACTS), {"tokens": torch.zeros(1, 17, dtype=torch.int64)}, found.first)
    return place(found.module, Plan(mesh=mesh, device="cpu"), group, torch.device("cpu"), subject), whole


def build_whole(spec: ModelSpec) -> torch.nn.Module:
    torch.manual_seed(0)
    return build(spec, FACTS)


CASES = {
    "gpt over tensors": ("gpt", {"tensor": 4}),
    "gpt in stages": ("deep gpt", {"pipe": 4}),
    "gpt in stages over tensors": ("deep gpt", {"pipe": 2, "tensor": 2}),
    "moe over experts": ("moe", {"expert": 4}),
}
ROOM = 16 << 20  # activations, and the largest tensor that one operation needs whole
BLOCKS = 50 << 20  # two of a pipeline, with gradients: measured one by one, at times in memory that is not used again


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if "pipe" in CASES[case][1] else ()) for case in CASES]
)
def test_building_takes_what_is_held_and_one_operation_more(on_workers, case):
    kind, mesh = CASES[case]
    room = ROOM + BLOCKS * ("pipe" in mesh)
    for grown, held, whole in on_workers(Plan(mesh=mesh).workers, placed, kind, mesh, False):
        assert held < 0.6 * whole
        assert grown < held + room < whole, (grown, held, whole)


def test_the_measure_finds_a_worker_that_builds_the_whole(on_workers):
    kind, mesh = CASES["gpt over tensors"]
    for grown, _, whole in on_workers(4, placed, kind, mesh, True):
        assert grown > whole
