"""The training loop of a worker that may lose the others at any moment, and go on with whoever is left."""

import gc
import json
import time
from collections import deque
from collections.abc import Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from shoal.comm.group import Group
from shoal.comm.mesh import PeerLost
from shoal.elastic import transfer
from shoal.elastic.culprits import Wrong, culprits
from shoal.elastic.membership import FRESH
from shoal.elastic.mirror import Mirror
from shoal.elastic.mirrored_epoch import MirroredEpoch
from shoal.elastic.peer_copies import replenish
from shoal.elastic.replan import Formation, plan_of
from shoal.elastic.seat import Place, Released, Seat, SeatReporter
from shoal.elastic.serving import serve_epoch
from shoal.models.registry import task_for
from shoal.parallel.partition.measure import pieces
from shoal.parallel.pipeline.head_and_tail import arguments_of
from shoal.parallel.schedules.registry import MAKERS
from shoal.recipe.plan import Plan
from shoal.run.run import Run
from shoal.run.tail import told_lately
from shoal.train import checkpoint
from shoal.train.agreement import share_weights
from shoal.train.checkpoint import Checkpoint
from shoal.train.first_batch import subject_of
from shoal.train.first_model import made_model, model_to_place
from shoal.train.held_parts import HeldParts
from shoal.train.loop import Loop, Order, open_splits, worker_of
from shoal.train.not_finite import NotFinite
from shoal.train.optimizers import make_optimizer
from shoal.train.precision import settled
from shoal.train.step import Step

REMEMBERED = 8  # committed steps that every worker could still tell of, should rank 0 not have told them


def holds_apart(plan: Plan) -> bool:
    """Whether workers hold what no other one does: it is mirrored after each step."""
    return plan.shards_states or plan.axes.size("pipe") > 1 or plan.sync == "parameter-server"


def run_elastic(seat: Seat, order: Order) -> dict[str, Any]:
    """The life of one worker: it builds the model, then trains in one epoch after the other; the result of the run.

    Raises Released when the run ends or goes on without it."""
    return _Life(seat, order).live()


class _Life:
    def __init__(self, seat: Seat, order: Order) -> None:
        self.seat, self.order = seat, order
        recipe = order.recipe
        group = seat.alone()
        self.worker = worker_of(group, plan_of(order.plan, Formation((recipe.shards,))), recipe)
        self.splits = open_splits(group, order)
        seat.say("opened", None)
        self.task = task_for(recipe.model, self.splits.train.facts)
        self.staged = order.plan.axes.size("pipe") > 1  # what a worker holds of the model differs by epoch
        if not self.staged:
            made = made_model(order, self.splits)
            self.model = self.worker.model(made, compile=recipe.model.compile)
            self.worker.optimizer(make_optimizer(recipe.optimizer, made, recipe.optimizer.lr))
            self.worker.leave()
        self.loop: ElasticLoop | None = None
        self.tried = 0  # the step that was not finite on one worker, and is to be done by others
        self.mirror: Mirror | None = None
        self.served = False  # it has been a server

    def live(self) -> dict[str, Any]:
        self.seat.ready(self._deepest() if self.staged else 1)
        while True:
            keeps = False
            try:
                place = self.seat.wait()
            except Released:
                self.worker.close()  # a checkpoint that is being written is finished
                raise
            try:
                if holds_apart(self.order.plan) and self.mirror is None:
                    self.mirror = Mirror(self.seat.mirror)
                place, lost = self._agreed(place)
                if place.server >= 0:
                    self._serve(place)
                    raise PeerLost("the workers have gone")
                plan = plan_of(self.order.plan, place.formation)
                if self.staged or lost:
                    self._build(place.group, plan)
                stand = None if place.cold else self._hand_over(place)
                if not self.staged and not lost:
                    self.worker.join(place.group, plan)
                loop = self._begun(place) if place.cold else self._taken_over(place, stand)
                if self.seat.report.rehearsal is not None:
                    self.seat.report.rehearsal.follow(self.worker, loop.run.path)
                result = loop.go(self.seat, quiet=place.quiet)
                if result is not None:
                    return result
            except PeerLost:
                keeps = True  # the agent knows why, and who is left
            except Wrong as found:
                self._part(found, len(place.steps))
            self.worker.leave(keeps=keeps)
            self.seat.hang_up()
            self.seat.left(*self._held())
            gc.collect()  # what the epoch's memory hangs on goes round in circles: it would stay for a while

    def _agreed(self, place: Place) -> tuple[Place, bool]:
        """Where several hosts mirror what their workers hold: all of them go on from the newest step that they have
        together. Whether they do not have one: then the run goes on from the disk, with models made anew."""
        if self.mirror is None or place.copies is None or place.cold:
            return place, False
        due = self.loop.at if self.loop is not None and self.loop.due else FRESH
        found = replenish(self.mirror, place.copies, place.homes, due)
        if found is None:
            return replace(place, cold=True), True
        step, due_then = found
        return replace(place, steps=(step,) * len(place.steps), due=due_then), False

    def _part(self, found: Exception, world: int) -> None:
        """From who is at fault: the step is done again without. Raises ``found`` where that would not help."""
        ranks = culprits(found, world, self.tried)
        if not ranks:
            raise found
        if self.worker.rank in ranks:
            self.seat.accuse(str(found))
        if isinstance(found, NotFinite):
            self.tried = found.step
        elif self.loop is not None and self.worker.step:
            self.loop.due |= 0 in ranks  # what it has saved last may be wrong too

    def _serve(self, place: Place) -> None:
        """Until the epoch ends."""
        assert self.mirror is not None
        self.served = True
        trained = [name for name, p in self.worker.held.module.named_parameters() if p.requires_grad]
        serve_epoch(place, trained[::-1], self.mirror)

    def _deepest(self) -> int:
        """How many stages the model can be cut into."""
        pipeline = self.order.plan.pipeline
        module, first = model_to_place(self.order, self.splits, parts=True)
        subject = subject_of(self.order.recipe, self.splits, self.task, self.worker.device, first)
        found = pieces(module, arguments_of(self.task.loss, module, subject.batch), clock=False, first=subject.first)
        return len(found) // (MAKERS[pipeline.schedule].chunks or pipeline.chunks)

    def _build(self, group: Group, plan: Plan) -> None:
        """The model anew, and of it what this worker holds among others. What is being written goes on."""
        recipe, writers = self.order.recipe, self.worker._writers
        self.worker = worker = worker_of(group, plan, recipe)
        worker._writers = writers
        made, first = model_to_place(replace(self.order, plan=plan), self.splits, parts=plan.splits_model)
        task = task_for(recipe.model, self.splits.train.facts)
        subject = subject_of(recipe, self.splits, task, worker.device, first) if plan.splits_model else None
        self.model = worker.model(made, compile=recipe.model.compile, subject=subject)
        self.task = worker.held.task or task
        worker.optimizer(make_optimizer(recipe.optimizer, made, recipe.optimizer.lr))

    def _held(self) -> tuple[int, bool]:
        """The newest step that can be gone on from, as far as this worker knows; whether what follows it is to be done.

        Where workers hold slices, a step that one of them did not end is taken back by all."""
        if self.loop is None and not self.served:
            return FRESH, False
        held = self.worker.step if self.mirror is None else self.mirror.newest
        return held, self.loop is not None and self.loop.due and held == self.loop.at

    def _begun(self, place: Place) -> "ElasticLoop":
        """Nobody holds a state: from the newest checkpoint of the run, or from the start."""
        worker, order = self.worker, self.order
        if self.mirror is not None and place.first_here:
            self.mirror.clear()
        if self.loop is not None and self.loop.log is not None:
            self.loop.log.close()
        again = bool(place.run) and (Path(place.run) / "recipe.toml").exists()
        if not self.staged:
            share_weights(worker.held.module, worker.group)
        recipe, why = settled(order.recipe, worker)
        origins = {**order.origins, "precision": why} if why else dict(order.origins)
        # the run was made by an epoch that was lost before it had begun, or all of its workers were lost later
        order = replace(order, recipe=recipe, origins=origins, resume=order.resume or again)
        told = b""
        if worker.rank == 0:
            told = str(self._run(order, Path(place.run) if again else None).path).encode()
        run = Run(Path(worker.group.gather(told)[0].decode()))
        loop = ElasticLoop(worker, order, run, self.splits, self.task, self.model)
        loop.begin(first=place.epoch == 1, lenient=again)
        worker.group.gather(b"")  # all have taken the checkpoint, or none counts as holding anything
        loop.enter(self.mirror, FRESH, place)
        self.loop = loop
        return loop

    def _run(self, order: Order, again: Path | None) -> Run:
        if again or order.resume:
            found = again or order.run_dir
            assert found is not None
            run = Run(found.absolute())
        else:
            if order.run_dir is not None:  # so that it is known whose it is, should this worker be lost right after
                self.seat.say("run", str(order.run_dir.absolute()))
            run = Run.create(order.recipe, order.plan, order.origins, order.run_dir)
        self.seat.say("run", str(run.path))
        return run

    def _hand_over(self, place: Place) -> Mapping[str, Any] | None:
        """Someone holds the newest step: those who do not take it from there. Where a taker's run stands, for it.

        Each worker is alone with this: for `Worker`, nobody else is there before `join`."""
        if not self.staged:
            self.worker.group = self.seat.nobody()
        if self.mirror is not None:
            return self._restored(self.mirror.read(max(place.steps)))
        mesh = place.group.mesh
        if mesh.rank == place.donor and place.takers:
            assert self.loop is not None
            state = self.loop.state()
            for taker in place.takers:
                transfer.send(mesh, taker, state)
        if mesh.rank not in place.takers:
            return None
        return self._restored(transfer.receive(mesh, place.donor))

    def _restored(self, state: Checkpoint) -> Mapping[str, Any]:
        self.worker.restore(state)
        self.worker._resumed = None  # the same recipe made both: there is nothing to compare
        stand: Mapping[str, Any] = state.facts["loop"]
        return stand

    def _taken_over(self, place: Place, stand: Mapping[str, Any] | None) -> "ElasticLoop":
        """The loop goes on where the newest step left it."""
        loop = self.loop
        if loop is None:
            assert stand is not None
            order = replace(self.order, recipe=replace(self.order.recipe, precision=stand["precision"]))
            loop = ElasticLoop(self.worker, order, Run(Path(place.run)), self.splits, self.task, self.model)
            self.loop = loop
        loop.worker, loop.task, loop.model = self.worker, self.task, self.model
        if stand is not None:
            loop.stand(stand)
        loop.due, loop.at = place.due, max(place.steps)
        loop.enter(self.mirror, max(place.steps), place)
        loop.take_rank()
        return loop


class ElasticLoop(Loop):
    """A `Loop` that can be entered and left between any two steps, by another rank each time."""

    due = False  # evaluation and checkpoint of step ``at`` are still to be done
    at = 0

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.recent: deque[dict[str, Any]] = deque(maxlen=REMEMBERED)
        self.texts: dict[int, str] = {}  # of `recent`, by step: each is written once
        self.told: set[tuple[str, int]] = set()  # (event, step) that an earlier rank 0 has told already
        self.told_up_to = 0
        self.last_of_epoch = False
        self.began_s = time.perf_counter()
        self.result: dict[str, Any] | None = None
        self.mirror: Mirror | None = None
        self.mirrored: MirroredEpoch | None = None  # of the epoch, as the next one
        self.parts: HeldParts | None = None

    def begin(self, *, first: bool, lenient: bool) -> None:
        """``lenient``: where there is no checkpoint, training starts over."""
        resumes = self.order.resume
        if lenient:
            found, _, _ = checkpoint.newest(self.run.checkpoints)
            resumes = bool(self.worker.group.gather(b"1" if found else b"")[0])
        if resumes:
            self._resume()
        elif self.order.start is not None:
            self._branch(self.order.start)
        self.told_up_to = self.worker.step
        if first or not resumes:
            self._tell_start()

    # --- handing on -------------------------------------------------------------------------------------------

    def enter(self, mirror: Mirror | None, step: int, place: Place) -> None:
        """An epoch begins, from a step that ``mirror`` holds."""
        self.mirror, self.parts = mirror, None
        self.mirrored = MirroredEpoch(mirror, place, step, self.worker.step) if mirror is not None else None
        self.worker.publishes_later = self.mirrored is not None and self.mirrored.copies is None

    def state(self) -> Checkpoint:
        """All that another worker needs to be in this one's place."""
        return Checkpoint(self.worker.tensors(), {**self.worker.facts(), "loop": self._stand()})

    def _reflect(self) -> None:
        """Mirror what this worker holds after the step that it has just done."""
        worker = self.worker
        if self.mirrored is None:
            return
        update = worker._update
        assert update is not None
        self.parts = self.parts or HeldParts(worker.held, update, self._optimizer)
        facts = {
            "step": worker.step,
            "optimizer": self.parts.facts(groups=worker.rank == 0),
            "kept": {name: thing.state_dict() for name, thing in worker._kept.items()},
            "batches": [list(change) for change in worker.batches],
            "aliases": self.parts.aliases,
            "loop": self._stand() if worker.rank == 0 else {},
        }
        self.mirrored.write(worker.step, self.parts.tensors(), facts)
        if self.mirrored.copies is None:
            update.publish()  # servers answer once they have mirrored the step
            worker.settle()  # nobody begins a step before this one is whole: a loss costs one, not two
            if not update.meets:
                worker.group.gather(b"")

    def _stand(self) -> dict[str, Any]:
        self.texts = {told["step"]: self.texts.get(told["step"]) or json.dumps(told) for told in self.recent}
        return {
            "best": self.best,
            "samples": self.samples,
            "loss": self.loss,
            "figures": self.figures,
            "checkpoint": self.checkpoint,
            "last_of_epoch": self.last_of_epoch,
            "spent_s": time.perf_counter() - self.began_s,  # clocks of two hosts have nothing in common
            "precision": self.recipe.precision,
            "recent": list(self.texts.values()),
            **self.batching.facts(),
        }

    def stand(self, facts: Mapping[str, Any]) -> None:
        """The inverse of `state`, but for weights and optimiser."""
        self.best, self.samples, self.loss = facts["best"], facts["samples"], facts["loss"]
        self.figures, self.checkpoint = facts["figures"], facts["checkpoint"]
        self.last_of_epoch, self.began_s = facts["last_of_epoch"], time.perf_counter() - facts["spent_s"]
        self.recent, self.texts = deque(map(json.loads, facts["recent"]), maxlen=REMEMBERED), {}
        self.batching.take(self.worker, facts)

    def take_rank(self) -> None:
        """Rank 0 keeps the log: it begins, or ends, with the rank."""
        lost = False
        if self.worker.rank != 0 and self.log:
            self.log.close()
            self.log = None
        elif self.worker.rank == 0 and self.log is None:
            self.told = told_lately(self.run.path / "events.jsonl")
            self.told_up_to = max((step for event, step in self.told if event == "committed"), default=0)
            self.log = self.run.open_log()
            self._tell_committed()
            lost = self._save_was_lost()
        if self.mirror is not None:  # nobody has everything that a checkpoint holds
            lost = bool(self.worker.group.gather(b"1" if lost else b"")[0])
        if lost:
            self._save(self.worker.step, best=False, final=False)

    def _save_was_lost(self) -> bool:
        """Whether the checkpoint that was due last is not there: it was in the hands of the rank 0 that has gone."""
        last = self.batching.last_save(self.worker)
        there = checkpoint.listing(self.run.checkpoints)
        return last > 0 and not self.due and max((found.step for found in there), default=0) < last

    def tell(self, event: str, **fields: Any) -> None:
        if (event, fields.get("step")) in self.told:
            return
        if self.log is not None:
            cast(SeatReporter, self.worker.group.report).fence()
        super().tell(event, **fields)

    # --- training ---------------------------------------------------------------------------------------------

    def go(self, seat: Seat, *, quiet: bool) -> dict[str, Any] | None:
        """Train until the end, or until the workers are to change: then None. Raises PeerLost."""
        worker = self.worker
        if self.due:
            self._after(worker.step, self.last_of_epoch)
            self.due = False
        first = worker.step + 1
        shards = worker.take_up(quiet=quiet)
        steps = worker.steps(self.splits.train, batch=self.recipe.batch, **self.batching.length)
        last = time.perf_counter()
        try:
            for step in steps:
                rate = self._do(step)
                self.due, self.at, self.last_of_epoch = True, step.number, step.last_of_epoch
                self._committed(step, rate, time.perf_counter() - last)
                if step.number == first:
                    seat.went(step.number, shards)
                    self._after_first()
                self._after(step.number, step.last_of_epoch)
                self.due = False
                assert step.figures is not None
                if step.figures.change and not worker.stopping and step.number < self.steps:
                    if self.mirror is not None:  # nobody hangs up before all have mirrored the step
                        worker.settle()
                        worker.group.gather(b"")
                    return None
                last = time.perf_counter()
        finally:
            cast("Generator[Step]", steps).close()  # ends the threads that load ahead
        return self._agreed_end()

    def _agreed_end(self) -> dict[str, Any]:
        """The result, once rank 0 has written everything that is to be written, and all know it."""
        if self.result is None:
            ended = self._end(time.perf_counter() - self.began_s)
            self.result = ended if self.worker.rank == 0 else None
        told = self.worker.group.gather(json.dumps(self.result).encode())[0]
        result: dict[str, Any] = json.loads(told)
        return result

    def _committed(self, step: Step, rate: float, seconds: float) -> None:
        """Every worker remembers what rank 0 tells, for the case that it does not."""
        figures = step.figures
        assert figures is not None
        self.loss = figures.loss
        self.samples += step.samples
        changed = self.batching.committed(self.worker, step, seconds)
        beside = {**self._beside(step, rate, seconds), **changed}
        for number, _, extra in self.worker.told():
            self.recent.append(
                {
                    "step": number,
                    "loss": figures.loss,
                    "grad_norm": figures.norm,
                    "targets": int(figures.targets),
                    "waited": dict(enumerate(figures.waited)),
                    **beside,
                    **extra,
                }
            )
        self._reflect()
        self._tell_committed()

    def _tell_committed(self) -> None:
        if self.log is None:
            return
        for fields in self.recent:
            if fields["step"] > self.told_up_to:
                self.told_up_to = fields["step"]
                told = dict(fields)
                if changed := told.pop("rebatched", None):  # first: a new rank 0 knows by the step what has been told
                    self.tell("rebatched", step=fields["step"], **changed)
                self.tell("committed", **told)
