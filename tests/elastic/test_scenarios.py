"""Real processes under one fault or several, with four oracles each time; eight always, all in a soak.

The oracles: weights after each saved step, and loss and norm of every step, are those of an undisturbed run, to the
bit; the sample ledger agrees with the log; the log is linear, and so are its epochs; nothing is left (processes and
open files of the agent by the fixture `disturb`; shared memory and files here)."""

import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from train.tiny_runs import recipe, splits

from shoal.data.ledger import Ledger
from shoal.elastic import roster
from shoal.elastic.chaos import first_difference, told_once
from shoal.elastic.faults import Fault
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Reporting
from shoal.run.run import Run
from shoal.train import checkpoint
from shoal.train.api import train
from shoal.train.attempt import DOUBTFUL

DATA = splits("cnn", 101)
STEPS = 14
REPORT = Reporting(evaluate_every=4, checkpoint_every=2, keep=0, sample=False)
MADE = recipe("resnet", steps=STEPS, clip=0.05, report=REPORT)  # buffers, clipping, an uneven tail of each epoch
FILES = {
    *("recipe.toml", "plan.toml", "origins.json", "events.jsonl", "checkpoints", "result.json"),
    *("workers.json", "wanted.json", "data.json"),
}


def at(text: str) -> Fault:
    return Fault.parse(text)


def _cases() -> Iterator[tuple[str, int, list[str]]]:
    """(name, workers, faults)."""
    for phase in ("loading", "forward", "backward", "bucket", "exchanging", "waiting", "updating", "updated"):
        for rank in (0, 1, 2):
            yield f"kill rank {rank}, {phase}", 3, [f"kill:rank={rank},step=6,phase={phase}"]
    for phase in ("evaluating", "saving"):
        yield f"kill rank 0, {phase}", 3, [f"kill:rank=0,step=8,phase={phase}"]
    for phase, rank in (("forward", 0), ("exchanging", 1), ("updating", 2), ("saving", 0)):
        yield f"stop rank {rank}, {phase}", 3, [f"stop:rank={rank},step=7,phase={phase}"]
    for phase in ("loading", "forward", "bucket", "updating", "updated"):
        for rank in (0, 2):
            yield f"flip rank {rank}, {phase}", 3, [f"flip:rank={rank},step=6,phase={phase}"]
    for rank in (0, 1):
        yield f"flip rank {rank} of two", 2, [f"flip:rank={rank},step=6,phase=loading"]
        yield f"nan rank {rank}", 3, [f"nan:rank={rank},step=6,phase=forward"]
        yield f"skew rank {rank}", 3, [f"skew:rank={rank},step=6,phase=loading"]
        yield f"thaw rank {rank}", 3, [f"thaw:rank={rank},step=6,phase=exchanging"]
        yield f"fill rank 0, {rank}", 3, [f"fill:rank=0,step=6,phase={('loading', 'saving')[rank]}"]
        yield f"tear rank {rank}", 3, [f"tear:rank={rank},step=7,phase=forward"]
        yield f"rot rank {rank}", 3, [f"rot:rank={rank},step=7,phase=updated"]
    yield "flip before it is remembered, of two", 2, ["flip:rank=0,step=6,phase=updated"]
    yield "tear twice", 3, ["tear:rank=0,step=7,phase=forward", "tear:rank=1,step=11,phase=forward"]
    yield "rot while saving", 3, ["rot:rank=0,step=8,phase=saving"]
    yield "kill in recovery", 3, ["kill:rank=1,step=6,phase=forward", "kill:rank=0,step=5,phase=recovering"]
    yield "kill all but one", 4, [f"kill:rank={rank},step=6,phase=backward" for rank in (1, 2, 3)]
    yield "kill leader and another", 4, [f"kill:rank={rank},step=6,phase=updating" for rank in (0, 2)]
    yield "kill in three steps", 4, [f"kill:rank=0,step={step},phase=forward" for step in (5, 6, 7)]
    yield "kill the donor", 3, ["kill:rank=2,step=5,phase=forward", "kill:rank=0,step=6,phase=recovering"]
    yield "nan and kill", 3, ["nan:rank=1,step=6,phase=forward", "kill:rank=1,step=6,phase=bucket"]
    yield "flip and kill", 4, ["flip:rank=1,step=6,phase=forward", "kill:rank=0,step=6,phase=exchanging"]
    yield "stop and kill", 4, ["stop:rank=1,step=6,phase=forward", "kill:rank=0,step=6,phase=backward"]
    yield "two of two, in turn", 2, ["kill:rank=0,step=4,phase=forward", "kill:rank=0,step=9,phase=updating"]
    yield "fill and kill", 3, ["fill:rank=0,step=5,phase=loading", "kill:rank=0,step=9,phase=forward"]


CASES = {name: (workers, faults) for name, workers, faults in _cases()}
OFTEN = (
    *("flip rank 1 of two", "skew rank 1", "fill rank 0, 0", "rot rank 1", "tear rank 0", "kill in recovery"),
    *("flip and kill", "nan and kill"),
)
ELSEWHERE = {"stop", "thaw"}  # kinds that test_elastic_runs.py and test_chaos.py always play


@pytest.fixture(scope="module")
def calm(agent, tmp_path_factory) -> Run:
    """What the others are held against: one worker that nothing happens to."""
    result = train(MADE, Plan(device="cpu"), agent=agent, data=DATA, run_dir=tmp_path_factory.mktemp("calm") / "run")
    return Run(Path(result["run_dir"]))


def weights_by_step(run: Run) -> dict[int, dict[str, Any]]:
    """Of whole checkpoints: hashes of all their bytes, weights and optimiser."""
    found = {}
    for listed in checkpoint.listing(run.checkpoints, verify=True):
        if not listed.problem:
            manifest = checkpoint.read_manifest(listed.path)
            found.setdefault(listed.step, {file.name: file.sha256 for file in manifest.files})
    return found


def check(calm: Run, run: Run, memory: set[str]) -> None:
    events = run.events()
    # weights, by step
    wanted, got = weights_by_step(calm), weights_by_step(run)
    assert {STEPS, STEPS - 2} <= set(got)
    both = set(got) & set(wanted)  # one that was lost is made up for after a step that nobody else saves
    assert all(got[step] == wanted[step] for step in both), "weights or optimiser differ"
    assert first_difference(calm.events(), events) is None
    assert run.result is not None
    assert calm.result is not None
    assert run.result["weights_sha256"] == calm.result["weights_sha256"]
    assert run.result["samples"] == calm.result["samples"]
    # the ledger
    ledger = Ledger(len(DATA.train), MADE.batch, MADE.shards, MADE.micro_batches, MADE.seed)
    account = ledger.verify(events)
    assert account.wrong == (), "the ledger and the log differ"
    assert account.steps == STEPS
    # a linear log
    assert told_once(events, STEPS), "a step is told twice, or not at all"
    epochs = [event["membership"] for event in events if "membership" in event]
    assert epochs == sorted(epochs), "an older epoch comes after a newer one"
    # nothing left
    assert roster.read(run.path) == []
    assert {path.name for path in run.path.iterdir()} <= FILES, "a file is left"
    names = [path.name.removeprefix(DOUBTFUL) for path in run.checkpoints.iterdir()]
    assert not [name for name in names if not checkpoint.is_folder_name(name)]
    assert set(os.listdir("/dev/shm")) - memory == set()


def play(disturb: Callable[..., Any], calm: Run, name: str) -> None:
    workers, faults = CASES[name]
    memory = set(os.listdir("/dev/shm"))
    run = disturb(MADE, workers, data=DATA, faults=[at(text) for text in faults])
    check(calm, run.run, memory)
    told = {event.get("fault") for event in run.events}
    assert told & {str(at(text)) for text in faults}, "no fault happened"


@pytest.mark.parametrize("name", OFTEN)
def test_faults_of_every_kind_leave_weights_ledger_log_and_machine_as_they_should_be(disturb, calm, name):
    play(disturb, calm, name)


@pytest.mark.soak
@pytest.mark.parametrize("name", [name for name in CASES if name not in OFTEN])
def test_every_fault_leaves_weights_ledger_log_and_machine_as_they_should_be(disturb, calm, name):
    play(disturb, calm, name)


def test_there_are_at_least_sixty_scenarios_and_each_kind_of_fault_is_always_played():
    assert len(CASES) >= 60
    played = {at(text).kind for name in OFTEN for text in CASES[name][1]}
    assert played >= {at(text).kind for _, faults in CASES.values() for text in faults} - ELSEWHERE
    assert set(OFTEN) <= set(CASES)


PLANTED = {  # and what the oracle that is to see it says
    "a changed weight": "weights or optimiser differ",
    "a sample too many": "the ledger and the log differ",
    "a step told twice": "the ledger and the log differ",
    "an epoch that comes back": "an older epoch comes after a newer one",
    "a file that stays": "a file is left",
}


def test_each_oracle_sees_what_it_is_there_for(disturb, calm, tmp_path):
    whole = disturb(MADE, 2, data=DATA, faults=[at("kill:rank=1,step=5,phase=forward")]).run
    memory = set(os.listdir("/dev/shm"))
    check(calm, whole, memory)
    for number, planted in enumerate(PLANTED):
        run = Run(shutil.copytree(whole.path, tmp_path / str(number)))
        lines = (run.path / "events.jsonl").read_text().splitlines(keepends=True)
        if planted == "a changed weight":
            newest = checkpoint.load(run.checkpoints / f"step-{STEPS:08d}")
            next(iter(newest.tensors.values())).view(-1)[0] += 1
            checkpoint.save(newest, run.checkpoints)
        elif planted == "a sample too many":
            lines = "".join(lines).replace('"samples": 16', '"samples": 17', 1).splitlines(keepends=True)
        elif planted == "a step told twice":
            lines.append(next(line for line in lines if '"event": "committed"' in line))
        elif planted == "an epoch that comes back":
            lines.append(next(line for line in lines if '"membership": 1' in line))
        else:
            assert planted == "a file that stays"
            (run.path / ".workers.json.1234").write_text("")
        (run.path / "events.jsonl").write_text("".join(lines))
        with pytest.raises(AssertionError, match=PLANTED[planted]):
            check(calm, run, memory)


def drawn(seed: int) -> tuple[int, list[Fault], list[tuple[int, Mapping[str, Any]]]]:
    """(workers, faults, wishes after a step) of a random schedule."""
    draw = random.Random(seed)
    workers = draw.randrange(2, 5)
    kinds = ("kill", "kill", "nan")  # a flip needs others to be seen by, and a drawn run may be down to one worker
    phases = ("loading", "forward", "backward", "bucket", "exchanging", "updating", "updated", "recovering")
    faults = [
        Fault(
            "kill" if phase == "recovering" else draw.choice(kinds),
            draw.randrange(workers),
            draw.randrange(2, STEPS - 2),
            phase,
        )
        for phase in draw.choices(phases, k=draw.randrange(1, 5))
    ]
    wishes = [
        (draw.randrange(2, STEPS - 2), draw.choice(({"workers": draw.randrange(1, 6)}, {"drain": "0"}, {"drain": "1"})))
        for _ in range(draw.randrange(1, 3))
    ]
    return workers, faults, wishes


def storm(disturb: Callable[..., Any], calm: Run, seed: int) -> None:
    workers, faults, wishes = drawn(seed)
    memory, waiting = set(os.listdir("/dev/shm")), list(wishes)

    def listen(event: Mapping[str, Any]) -> None:
        while event["event"] == "committed" and waiting and event["step"] >= min(waiting, key=lambda w: w[0])[0]:
            due = min(waiting, key=lambda w: w[0])
            waiting.remove(due)
            roster.wish(Path(event["run_dir"]), **due[1])

    run = disturb(MADE, workers, data=DATA, faults=faults, progress=listen)
    check(calm, run.run, memory)


@pytest.mark.parametrize("seed", range(2))
def test_drawn_faults_and_resizes_of_real_processes_lose_and_double_no_sample(disturb, calm, seed):
    storm(disturb, calm, seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2, 60))
def test_many_drawn_faults_and_resizes_of_real_processes_lose_and_double_no_sample(disturb, calm, seed):
    storm(disturb, calm, seed)
