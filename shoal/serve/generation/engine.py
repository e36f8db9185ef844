"""The engine of kind "generate": `Generations` behind the seam of shoal/serve/engine.py."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from torch import nn

from shoal.errors import UserError
from shoal.serve.engine import FIGURES_EVERY_S, Begun, Failed, Figures, FromEngine, Item, Request, Result, Tell
from shoal.serve.generation.generator import Generations, Generator, Refused, Told
from shoal.serve.generation.messages import Ask, Piece
from shoal.serve.generation.opening import open_generator, pack_once
from shoal.serve.generation.options import Options, options_from

_asks = msgspec.msgpack.Decoder(Ask)
_pieces = msgspec.msgpack.Decoder(list[Piece])
_encode = msgspec.msgpack.Encoder().encode


class Generating:
    """What is asked of generations and told of them; not what computes their steps.

    ``lanes``: each with a cache of its own; a request goes to the one that has the fewest sequences."""

    def __init__(self, lanes: Sequence[Generations], tell: Tell) -> None:
        self._lanes = lanes
        self._lane_of: dict[int, int] = {}  # of the requests that are open
        self._tell = tell
        self._working: frozenset[int] = frozenset()  # as told
        self._told_at = float("-inf")
        self._untold = False  # something has happened since the figures were told
        self._step_s = self._busy_s = 0.0
        self._failed = 0

    def add(self, request: Request) -> None:
        number = min(range(len(self._lanes)), key=lambda lane: len(self._lanes[lane].scheduler.streams))
        try:
            ask = _asks.decode(request.payload)
            reached = [_pieces.decode(item) for item in request.reached]
            told = self._lanes[number].add(
                request.id,
                ask,
                arrived=request.arrived,
                deadline=request.deadline,
                priority=request.priority,
                client=request.client,
                reached=reached,
            )
        except (msgspec.DecodeError, Refused) as error:
            self._tell([Failed(request.id, 400, str(error))])
            return
        self._lane_of[request.id] = number
        if told:
            self._tell(self._messages(told))

    def cancel(self, id: int) -> None:
        number = self._lane_of.pop(id, None)
        if number is not None:
            self._lanes[number].cancel(id)

    @property
    def _busy(self) -> bool:
        return any(lane.busy for lane in self._lanes)

    def _figures_at(self) -> float | None:
        return self._told_at + FIGURES_EVERY_S if self._untold else None

    def _tell_working(self, requests: frozenset[int]) -> None:
        """Told when others are worked on than before, ahead of the work."""
        if requests != self._working:
            self._working = requests
            self._tell([Begun(tuple(sorted(requests)))])

    def _lose(self, requests: frozenset[int], why: str) -> None:
        text = " ".join(why.split())[:200]
        for id in requests:
            self.cancel(id)
        self._failed += len(requests)
        self._tell(
            [Failed(id, 500, f"the model failed on this input or one beside it: {text}") for id in sorted(requests)]
        )

    def _messages(self, told: Sequence[Told]) -> list[FromEngine]:
        for each in told:
            if each.expired or each.outcome:
                self._lane_of.pop(each.request, None)
        return [message for each in told for message in _messages(each)]

    def _figures(self, now: float) -> list[FromEngine]:
        """At most once a second; the last ones a second after the work, then an idle engine is silent."""
        if now - self._told_at < FIGURES_EVERY_S:
            return []
        self._told_at, self._untold = now, False
        each = [_lane_figures(lane) for lane in self._lanes]
        return [
            Figures(
                {
                    **{name: sum(figures[name] for figures in each) for name in each[0]},
                    "failed_total": self._failed,
                    "forward_seconds_total": self._step_s,
                    "busy_seconds_total": self._busy_s,
                    "share_of_bare_forward": self._step_s / self._busy_s if self._busy_s else 0.0,
                }
            )
        ]


class GenerationEngine(Generating):
    """See shoal.serve.engine.Engine: a whole model in this process."""

    def __init__(self, generator: Generator, tell: Tell) -> None:
        super().__init__([generator], tell)
        self._generator = generator
        self._in_step: frozenset[int] | None = None  # whose rows this step computes; None: it has not begun

    def next_at(self, now: float) -> float | None:
        return now if self._busy else self._figures_at()

    def work(self, now: float) -> None:
        if not self._busy:
            self._tell(self._figures(now))
            return
        begun = time.monotonic()
        self._in_step = None
        self._untold = True
        try:
            told = self._generator.work(now, self._begin)
        except Exception as error:  # the model's own code, or ours: those in the step are lost, the others go on
            lost = self._generator.requests() if self._in_step is None else self._in_step
            self._lose(lost, f"{type(error).__name__}: {error}")
            return
        self._busy_s += time.monotonic() - begun
        self._step_s += self._generator.step_s
        self._generator.step_s = 0.0
        self._tell([*self._messages(told), *self._figures(now)])

    def _begin(self, requests: frozenset[int]) -> None:
        self._in_step = requests
        self._tell_working(requests)


def _lane_figures(lane: Generations) -> dict[str, float]:
    counts, scheduler = lane.counts, lane.scheduler
    return {
        "generated_tokens_total": counts.tokens,
        "prompt_tokens_total": counts.prompt_tokens,
        "reused_prompt_tokens_total": counts.reused_tokens,
        "steps_total": counts.steps,
        "rows_total": counts.rows,
        "drafted_tokens_total": counts.drafted,
        "accepted_tokens_total": counts.accepted,
        "preempted_total": scheduler.preempted,
        "sequences_running": len(scheduler.running),
        "sequences_waiting": len(scheduler.waiting),
        "cache_blocks": scheduler.pool.count,
        "cache_blocks_held": scheduler.pool.held,
        "cache_blocks_kept": scheduler.pool.kept,
    }


def _messages(told: Told) -> list[FromEngine]:
    if told.expired:
        return [Failed(told.request, 504, "its time was over before the answer was complete")]
    out: list[FromEngine] = []
    if told.pieces:
        out.append(Item(told.request, msgspec.Raw(_encode(told.pieces))))
    if told.outcome:
        out.append(Result(told.request, msgspec.Raw(_encode(told.outcome))))
    return out


def prepare(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Called before a fork: what all model processes can share is made here, once, and what is wrong is found here.

    Raises UserError for a model that is no GPT and for a draft that is not there or does not fit."""
    pack_once(model, generation_options(options))


def open_engine(model: nn.Module, facts: Mapping[str, Any], options: Mapping[str, Any], tell: Tell) -> GenerationEngine:
    return GenerationEngine(open_generator(model, generation_options(options)), tell)


def generation_options(options: Mapping[str, Any]) -> Options:
    """Raises UserError for what text generation cannot be told."""
    if options.get("within_ms"):
        raise UserError(
            "serve: --within-ms bounds the time of a whole answer, and how long a text is, its client says: "
            "leave it out, and bound --queue and --timeout-s."
        )
    return options_from({"threads": options.get("threads", 1), **options.get("generation", {})})
