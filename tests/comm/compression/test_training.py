"""`shoal train --compression`: refused where it does not pay; where it does, lossy, saying so, and equal everywhere."""

import math
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from train import tiny_runs

from shoal.comm.compression.compressor import COMPRESSORS, Int8
from shoal.comm.compression.exchange import shapes_between
from shoal.comm.launch import Agent
from shoal.comm.layout import BLOCK, flat_layout
from shoal.errors import UserError
from shoal.prove.api import prove
from shoal.prove.fingerprint import StepPrint, TensorPrint
from shoal.prove.trial import Ended, Trial
from shoal.prove.verdict import verdict
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe, Reporting
from shoal.train.api import train
from shoal.train.loop import Order, run_recipe

NAMES = sorted(COMPRESSORS)
# What bf16 and fp16 keep between steps is kept as int8's is.
SOME = [pytest.param(name, marks=[pytest.mark.soak] * (name in ("bf16", "fp16"))) for name in NAMES]


def plan_of(name: str, workers: int = 2, **changes: Any) -> Plan:
    forced = {"compression_force": True, "compression": name} if name != "none" else {}
    return Plan(**{"mesh": {"data": workers}, "device": "cpu", "bucket_bytes": 1 << 16, **forced, **changes})


def recipe_of(steps: int = 8) -> Recipe:
    """A ResNet: BatchNorm's statistics travel in the same buffer and must not be rounded."""
    return tiny_runs.recipe("resnet", steps=steps, clip=5.0)


@pytest.fixture(autouse=True)
def _by_value(request: pytest.FixtureRequest) -> None:
    """What stands in test files goes to the workers with the call."""
    cloudpickle.register_pickle_by_value(tiny_runs)
    cloudpickle.register_pickle_by_value(request.module)


@pytest.fixture
def run(agent: Agent, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    count = iter(range(100))

    def train_it(plan: Plan, recipe: Recipe | None = None, **options: Any) -> dict[str, Any]:
        if "resume" not in options:
            options.setdefault("run_dir", tmp_path / f"run{next(count)}")
        data = tiny_runs.splits("resnet", 100)
        return train(recipe or recipe_of(), plan, agent=agent, data=data, **options)

    return train_it


@pytest.fixture(scope="module")
def uncompressed(agent: Agent, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of the same run without compression."""
    cloudpickle.register_pickle_by_value(tiny_runs)
    data, folder = tiny_runs.splits("resnet", 100), tmp_path_factory.mktemp("runs") / "uncompressed"
    return train(recipe_of(), plan_of("none"), agent=agent, data=data, run_dir=folder)


def joined(group: Any, port: str, order: Order) -> tuple[dict[str, Any], dict[str, int]]:
    """The same run as torchrun would start it: over gloo, as if each worker were a host of its own."""
    from shoal.comm.distributed import DistributedGroup

    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": group.rank, "WORLD_SIZE": group.world}
    os.environ |= {name: str(value) for name, value in names.items()}
    apart = DistributedGroup(60.0, accelerator=False)
    try:
        result = run_recipe(apart, order)
        sent = {place[0]: total.sent_bytes for place, total in apart.counters.totals().items()}
        return result, sent
    finally:
        apart.close()


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize("name", NAMES)
def test_shared_memory_and_gloo_give_the_same_bits(
    name: str, run, uncompressed: dict[str, Any], agent: Agent, tmp_path: Path
) -> None:
    """All workers are compared with each other at the end of each run; the two ways of sending are compared here."""
    events: list[dict] = []
    here = run(plan_of(name), progress=lambda event: events.append(dict(event)))
    order = Order(recipe_of(), plan_of(name), run_dir=tmp_path / "joined", data=tiny_runs.splits("resnet", 100))
    [(apart, sent), _] = agent.run(joined, (free_port(), order), workers=2)
    assert apart["weights_sha256"] == here["weights_sha256"] != uncompressed["weights_sha256"]
    started = next(event for event in events if event["event"] == "started")
    assert name in started["lossy"]
    assert math.isfinite(here["loss"])
    if name in ("fp16", "bf16", "int8"):
        assert here["loss"] == pytest.approx(uncompressed["loss"], rel=0.05)  # 8 steps, rounded to 8 bits at the worst
    assert sent["reduce-scatter"] > 0
    assert sent["all-gather"] > 0


def test_the_counters_have_the_bytes_of_the_formula(agent: Agent, tmp_path: Path) -> None:
    """The model is small: a block of gradients, and one of BatchNorm's statistics, which are not compressed."""
    order = Order(recipe_of(), plan_of("int8"), run_dir=tmp_path / "run", data=tiny_runs.splits("resnet", 100))
    half = BLOCK // 2  # each of two workers owns one
    there = Int8().method.payload_bytes(half) + 4 * half
    for _, sent in agent.run(joined, (free_port(), order), workers=2):
        assert sent["reduce-scatter"] == sent["all-gather"] == order.recipe.steps * there


def test_on_one_host_it_is_refused_with_the_numbers(run, tmp_path: Path) -> None:
    for name in NAMES:
        with pytest.raises(UserError) as refused:
            run(plan_of(name, compression_force=False), run_dir=tmp_path / name)
        line = str(refused.value)
        assert "\n" not in line
        assert "share this host's memory" in line
        assert "does not pay" in line
        assert "GB/s" in line
        assert "--set compression_force=true" in line
        assert not (tmp_path / name).exists()  # refused before a run is made


def test_one_worker_has_nothing_to_compress(run) -> None:
    with pytest.raises(UserError, match="one rank sends nothing"):
        run(plan_of("int8", 1, compression_force=False))
    forced, alone = run(plan_of("int8", 1)), run(plan_of("none", 1, sync="fast"))
    assert forced["weights_sha256"] == alone["weights_sha256"]


def test_a_worker_without_samples_takes_part(run) -> None:
    """3 workers of 8 shards, and a last batch of 4 samples: shards 4 to 7 have none."""
    assert math.isfinite(run(plan_of("1bit", 3), replace(recipe_of(), steps=0, epochs=2))["loss"])


REPORT = Reporting(evaluate_every=10**9, checkpoint_every=4, sample=False)


def resumed(run, plan: Plan, first: dict[str, Any], steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The run's result when it has gone on to ``steps``, and its event."""
    events: list[dict] = []
    recipe = replace(recipe_of(steps), report=REPORT)
    result = run(plan, recipe, resume=first["run_dir"], progress=lambda event: events.append(dict(event)))
    return result, next(event for event in events if event["event"] == "resumed")


@pytest.mark.parametrize("name", SOME)
def test_a_resumed_run_of_as_many_workers_has_the_bits_of_one_that_never_stopped(name: str, run) -> None:
    straight = run(plan_of(name), replace(recipe_of(6), report=REPORT))
    first = run(plan_of(name), replace(recipe_of(4), report=REPORT))
    result, event = resumed(run, plan_of(name), first, 6)
    assert event["step"] == 4
    assert "lossy" not in event
    assert result["weights_sha256"] == straight["weights_sha256"] != first["weights_sha256"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (plan_of("topk"), plan_of("topk", 3)),  # what each kept was its own
        (plan_of("topk"), plan_of("none")),
        (plan_of("none"), plan_of("topk")),  # older checkpoints hold none either: rather said once too often
    ],
    ids=["more workers", "no more compression", "none saved"],
)
def test_a_resumed_run_says_what_is_lost(before: Plan, after: Plan, run) -> None:
    first = run(before, replace(recipe_of(4), report=REPORT))
    _, event = resumed(run, after, first, 5)
    assert "left unsent" in event["lossy"]


def test_the_prover_calls_it_lossy_and_still_finds_workers_that_disagree(agent: Agent) -> None:
    plans = [plan_of("int8"), plan_of("none"), plan_of("none", sync="fast")]
    result = prove(recipe_of(), steps=4, plans=plans, data=tiny_runs.splits("resnet", 100), agent=agent)
    lossy, exact, fast = result["plans"]
    assert lossy["ok"]
    assert lossy["lossy"]
    assert 0 < lossy["error"] < 0.5
    assert exact["ok"]
    assert exact["error"] == 0.0
    assert not exact["lossy"]
    assert not fast["lossy"]


def test_a_lossy_plan_fails_its_proof_where_workers_differ_or_begin_elsewhere_or_overflow() -> None:
    """Planted: another weight on one worker, another first loss, a loss that is not finite."""

    def steps(*losses: float, weight: str = "same") -> list[StepPrint]:
        return [StepPrint(n, (loss,), {"model/w": TensorPrint(weight, 1.0)}) for n, loss in enumerate(losses, start=1)]

    def ok(*workers: list[StepPrint]) -> bool:
        ended = [Ended("hash") for _ in workers]
        return verdict(plan_of("1bit"), Trial(list(workers), ended=ended), reference, 1e-5, weights=True)["ok"]

    reference = Trial([steps(2.0, 1.0)], ended=[Ended("hash")])
    assert ok(steps(2.0, 1.3), steps(2.0, 1.3))
    assert not ok(steps(2.0, 1.3), steps(2.0, 1.3, weight="another"))
    assert not ok(steps(2.1, 1.3), steps(2.1, 1.3))
    assert not ok(steps(2.0, math.inf), steps(2.0, math.inf))


def test_compression_of_averages_and_of_double_precision_is_refused(run) -> None:
    with pytest.raises(UserError, match="averages weights"):
        plan_of("int8", sync="local")
    double = lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5)).double()  # noqa: E731
    with pytest.raises(UserError, match="float32 gradients"):
        run(plan_of("int8"), model=double)


@given(
    shapes=st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=3), min_size=1, max_size=5),
    workers=st.integers(1, 4),
    bucket=st.integers(1, 1 << 18),
)
def test_buckets_are_cut_into_whole_rows_of_parameters(shapes: list[list[int]], workers: int, bucket: int) -> None:
    layout = flat_layout([math.prod(shape) for shape in shapes], [], workers, bucket)
    matrices = 0
    for part in layout.buckets:
        found = shapes_between(layout, shapes, part.start, part.stop)
        assert sum(math.prod(shape) for shape in found) == part.stop - part.start
        at = part.start
        for shape in found:
            if len(shape) > 1:
                inside = [
                    (s, p) for s, p in zip(layout.slots, shapes, strict=True) if s.offset <= at < s.offset + s.size
                ]
                [(slot, parameter)] = inside
                assert shape[1] == slot.size // parameter[0]
                assert (at - slot.offset) % shape[1] == 0
                matrices += shape[0]
            at += math.prod(shape)
    rows = sum(shape[0] for shape in shapes if len(shape) > 1)
    assert rows - matrices <= len(layout.buckets) - 1  # at most one row a cut is split
