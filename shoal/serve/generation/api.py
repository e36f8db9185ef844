"""Generate in one call, without a server."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from shoal.errors import UserError
from shoal.serve.generation.generator import Generator, Refused
from shoal.serve.generation.messages import Ask, Outcome, Scored
from shoal.serve.generation.opening import open_generator
from shoal.serve.generation.options import Options


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    reason: str  # "stop" or "length"
    scores: list[Scored]  # of each token, where the request asks for log-probabilities


@dataclass(frozen=True)
class Generated:
    answers: list[Answer]
    outcome: Outcome


def generate(model: nn.Module, asks: Sequence[Ask], options: Options | None = None) -> list[Generated]:
    """The answers to all requests, computed together; each is, to the bit, what it would be alone.

    Raises UserError for a request that cannot be served, which it names by its number."""
    generator = open_generator(model, options)
    try:
        return run_all(generator, asks)
    finally:
        generator.step.close()


def run_all(generator: Generator, asks: Sequence[Ask]) -> list[Generated]:
    """As `generate`, with a generator that has nothing else to do."""
    answers: list[dict[int, Answer]] = [{} for _ in asks]
    outcomes: dict[int, Outcome] = {}
    for number, ask in enumerate(asks):
        try:
            generator.add(number, ask, arrived=float(number))
        except Refused as refused:
            for other in range(number):
                generator.cancel(other)
            raise UserError(f"request {number}: {refused}.") from None
    while generator.busy:
        for told in generator.work():
            for piece in told.pieces:
                before = answers[told.request].get(piece.choice, Answer([], "", []))
                answers[told.request][piece.choice] = Answer(
                    before.tokens + piece.tokens, piece.reason, before.scores + (piece.scores or [])
                )
            if told.outcome:
                outcomes[told.request] = told.outcome
    return [
        Generated([found[choice] for choice in sorted(found)], outcomes[number]) for number, found in enumerate(answers)
    ]
