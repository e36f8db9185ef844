"""The engine of kind "generate": a `Generator` behind the seam of shoal/serve/engine.py."""

import time
from collections.abc import Mapping
from typing import Any

import msgspec
from torch import nn

from shoal.serve.engine import FIGURES_EVERY_S, Begun, Failed, Figures, FromEngine, Item, Request, Result, Tell
from shoal.serve.generation.generator import Generator, Refused, Told
from shoal.serve.generation.messages import Ask, Piece
from shoal.serve.generation.opening import open_generator, pack_once
from shoal.serve.generation.options import Options, options_from

_asks = msgspec.msgpack.Decoder(Ask)
_pieces = msgspec.msgpack.Decoder(list[Piece])
_encode = msgspec.msgpack.Encoder().encode


class GenerationEngine:
    """See shoal.serve.engine.Engine."""

    def __init__(self, generator: Generator, tell: Tell) -> None:
        self._generator = generator
        self._tell = tell
        self._working: frozenset[int] = frozenset()  # as told
        self._in_step: frozenset[int] | None = None  # whose rows this step computes; None: it has not begun
        self._told_at = float("-inf")
        self._untold = False  # something has happened since the figures were told
        self._step_s = self._busy_s = 0.0
        self._failed = 0

    def add(self, request: Request) -> None:
        try:
            ask = _asks.decode(request.payload)
            reached = [_pieces.decode(item) for item in request.reached]
            told = self._generator.add(
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
        if told:
            self._tell([message for each in told for message in _messages(each)])

    def cancel(self, id: int) -> None:
        self._generator.cancel(id)

    def next_at(self, now: float) -> float | None:
        if self._generator.busy:
            return now
        return self._told_at + FIGURES_EVERY_S if self._untold else None

    def work(self, now: float) -> None:
        if not self._generator.busy:
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
        self._tell([*(message for each in told for message in _messages(each)), *self._figures(now)])

    def _begin(self, requests: frozenset[int]) -> None:
        """Told when others are worked on than before, ahead of the work."""
        self._in_step = requests
        if requests != self._working:
            self._working = requests
            self._tell([Begun(tuple(sorted(requests)))])

    def _lose(self, requests: frozenset[int], why: str) -> None:
        text = " ".join(why.split())[:200]
        for id in requests:
            self._generator.cancel(id)
        self._failed += len(requests)
        self._tell(
            [Failed(id, 500, f"the model failed on this input or one beside it: {text}") for id in sorted(requests)]
        )

    def _figures(self, now: float) -> list[FromEngine]:
        """At most once a second; the last ones a second after the work, then an idle engine is silent."""
        if now - self._told_at < FIGURES_EVERY_S:
            return []
        self._told_at, self._untold = now, False
        counts, scheduler = self._generator.counts, self._generator.scheduler
        pool = scheduler.pool
        return [
            Figures(
                {
                    "generated_tokens_total": counts.tokens,
                    "prompt_tokens_total": counts.prompt_tokens,
                    "reused_prompt_tokens_total": counts.reused_tokens,
                    "steps_total": counts.steps,
                    "rows_total": counts.rows,
                    "drafted_tokens_total": counts.drafted,
                    "accepted_tokens_total": counts.accepted,
                    "preempted_total": scheduler.preempted,
                    "failed_total": self._failed,
                    "sequences_running": len(scheduler.running),
                    "sequences_waiting": len(scheduler.waiting),
                    "cache_blocks": pool.count,
                    "cache_blocks_held": pool.held,
                    "cache_blocks_kept": pool.kept,
                    "forward_seconds_total": self._step_s,
                    "busy_seconds_total": self._busy_s,
                    "share_of_bare_forward": self._step_s / self._busy_s if self._busy_s else 0.0,
                }
            )
        ]


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
    pack_once(model, _options(options))


def open_engine(model: nn.Module, facts: Mapping[str, Any], options: Mapping[str, Any], tell: Tell) -> GenerationEngine:
    return GenerationEngine(open_generator(model, _options(options)), tell)


def _options(options: Mapping[str, Any]) -> Options:
    return options_from({"threads": options.get("threads", 1), **options.get("generation", {})})
