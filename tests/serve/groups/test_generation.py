"""Text from a GPT in several processes is the text of one: to the bit by stages, within rounding by slices."""

import os
import signal
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
import torch
from serve.generation.tiny_gpt import prompts, tiny_gpt
from serve.groups.forked_groups import Forked, forked, made

from shoal.errors import UserError
from shoal.serve.engine import Begun, Failed, FromEngine, Item, Request, Result
from shoal.serve.generation.api import generate
from shoal.serve.generation.generator import Generations
from shoal.serve.generation.messages import Ask, Outcome, Piece
from shoal.serve.generation.options import Options
from shoal.serve.generation.pace import pace_of
from shoal.serve.generation.step import Floats, Rows, shape_of
from shoal.serve.groups.generation import LaneCache, StagedGeneration
from shoal.serve.groups.mesh import plan_of

FACTS = {"task": "text-generation"}
SIZES = {"layers": 4, "heads": 4, "width": 32}
Told = tuple[dict[int, list[int]], dict[int, list[float]], Outcome]  # of each choice: tokens, log-probabilities


def asked() -> list[Ask]:
    short, long, shared, other = prompts(5, 70, 40, 9)
    return [
        Ask(short, most=12, temperature=0, logprobs=0),
        Ask(long, most=10, temperature=0.9, seed=3, logprobs=0),
        Ask(shared, most=9, choices=3, top_p=0.9, seed=4, logprobs=0),
        Ask([*shared, 7], most=6, temperature=0, logprobs=0),
        Ask(other, most=6, choices=2, beams=3),
        Ask(short, most=15, temperature=0.5, seed=9, repetition=1.2, logprobs=0),
    ]


def together(group: Forked, asks: list[Ask]) -> list[Told]:
    ids = [group.send(ask, "generate") for ask in asks]
    tokens: dict[int, dict[int, list[int]]] = {id: defaultdict(list) for id in ids}
    scores: dict[int, dict[int, list[float]]] = {id: defaultdict(list) for id in ids}
    ended: dict[int, Outcome] = {}
    while len(ended) < len(ids):
        message = group.hear()
        assert message is not None
        assert not isinstance(message, Failed), message
        if isinstance(message, Item):
            for piece in msgspec.msgpack.decode(message.payload, type=list[Piece]):
                tokens[message.id][piece.choice] += piece.tokens
                scores[message.id][piece.choice] += [score.logprob for score in piece.scores or []]
        if isinstance(message, Result):
            ended[message.id] = msgspec.msgpack.decode(message.payload, type=Outcome)
    return [(dict(tokens[id]), dict(scores[id]), ended[id]) for id in ids]


def alone(asks: list[Ask], options: Options, **sizes: Any) -> list[Told]:
    found = generate(tiny_gpt(**{**SIZES, **sizes}), asks, options)
    return [
        (
            {n: answer.tokens for n, answer in enumerate(one.answers)},
            {n: [s.logprob for s in answer.scores] for n, answer in enumerate(one.answers)},
            one.outcome,
        )
        for one in found
    ]


def of_group(mesh: Mapping[str, int], asks: list[Ask], generation: Mapping[str, Any], **sizes: Any) -> list[Told]:
    with forked(tiny_gpt(**{**SIZES, **sizes}), FACTS, mesh, generation=dict(generation)) as group:
        return together(group, asks)


def bits(told: list[Told]) -> list[Any]:
    """All but how many tokens of a prompt were found in the cache, which depends on who came before."""
    found = []
    for tokens, scores, outcome in told:
        found.append((tokens, {k: v for k, v in scores.items() if v}, outcome.generated, outcome.scores))
    return found


@pytest.mark.parametrize(
    ("mesh", "generation", "sizes"),
    [
        ({"pipe": 2}, {}, {}),
        ({"pipe": 3}, {"threads": 2, "speculate": 3}, {"tied": False, "bias": False}),
        ({"pipe": 2}, {"precision": "bfloat16", "cache_bytes": 40 * 16 * 32 * 4 * 2 * 2}, {}),
        ({"pipe": 2}, {"kernels": "torch"}, {}),
        ({"expert": 2}, {}, {"experts": 5, "top_k": 3}),
        ({"pipe": 2, "expert": 3}, {"threads": 2}, {"experts": 5, "tied": False, "bias": False}),
        ({"expert": 2}, {"kernels": "torch"}, {"experts": 5}),
    ],
    ids=[
        *("two stages", "three stages, guesses", "little room, bfloat16", "PyTorch's kernels"),
        *("experts apart", "stages of experts", "PyTorch's kernels, experts apart"),
    ],
)
def test_stages_and_experts_in_other_processes_generate_the_bits_of_one(
    mesh: dict[str, int], generation: dict[str, Any], sizes: dict[str, Any]
) -> None:
    want = alone(asked(), Options(**{k: v for k, v in generation.items() if k != "cache_bytes"}), **sizes)
    assert bits(of_group(mesh, asked(), generation, **sizes)) == bits(want)


@pytest.mark.parametrize(
    ("mesh", "kernels", "sizes"),
    [
        ({"tensor": 3}, "auto", {}),
        ({"pipe": 2, "tensor": 2}, "auto", {}),
        ({"tensor": 2}, "torch", {}),
        ({"tensor": 2}, "auto", {"experts": 4}),
        ({"tensor": 2}, "torch", {"experts": 4}),
    ],
    ids=["uneven", "stages of slices", "PyTorch's kernels", "of each expert", "of each expert, PyTorch's kernels"],
)
def test_slices_generate_the_same_tokens_within_rounding_and_equal_themselves(
    mesh: dict[str, int], kernels: str, sizes: dict[str, Any]
) -> None:
    asks = [ask for ask in asked() if not ask.beams]
    want = alone(asks, Options(kernels=kernels), **sizes)  # type: ignore[arg-type]
    got, again = (of_group(mesh, asks, {"kernels": kernels}, **sizes) for _ in range(2))
    assert bits(got) == bits(again)
    for (tokens, scores, _), (wanted, expected, _) in zip(got, want, strict=True):
        assert tokens == wanted
        for choice, row in expected.items():
            assert scores[choice] == pytest.approx(row, abs=1e-4)


def test_a_process_of_a_group_that_is_killed_takes_the_others_with_it() -> None:
    for rank in (0, 1):
        with forked(tiny_gpt(**SIZES), FACTS, {"pipe": 2}) as group:
            group.send(Ask(prompts(5)[0], most=60), "generate")
            assert isinstance(group.hear(), Begun)
            os.kill(group.pids[rank], signal.SIGKILL)
            while group.hear() is not None:
                pass


class Held:
    """Steps that end when the test says so."""

    def __init__(self, vocab: int) -> None:
        self.begun: list[Rows] = []
        self._ready = 0
        self._vocab = vocab

    def begin(self, rows: Rows, copies: Any) -> None:
        self.begun.append(rows)

    def let_go(self) -> None:
        self._ready += 1

    def finished(self) -> Floats | None:
        if not self._ready:
            return None
        self._ready -= 1
        return torch.zeros(len(self.begun.pop(0).wants), self._vocab).numpy()


class Nobody:
    sockets = ()


def two_lanes() -> tuple[StagedGeneration, Held, list[Generations], list[FromEngine]]:
    shape = shape_of(tiny_gpt())
    caches = [LaneCache(shape, 20, "held", number) for number in range(2)]
    lanes = [Generations(cache, pace_of(shape, False, 1.4, 64)) for cache in caches]
    steps, told = Held(shape.vocab), []
    engine = StagedGeneration(lanes, caches, steps, Nobody(), told.extend)  # type: ignore[arg-type]
    return engine, steps, lanes, told


def request(id: int) -> Request:
    payload = msgspec.Raw(msgspec.msgpack.encode(Ask([1, 2, 3], most=3, temperature=0)))
    return Request(id, "generate", payload, 1, 0.0, 1e9)


def test_a_second_lane_begins_while_the_first_is_under_way_and_has_blocks_of_its_own() -> None:
    engine, steps, _, told = two_lanes()
    for id in (1, 2):
        engine.add(request(id))
    engine.work(1.0)
    assert len(steps.begun) == 2, "neither has come back"
    assert [message for message in told if isinstance(message, Begun)] == [Begun((1,)), Begun((1, 2))]
    assert {int(block) // 20 for rows in steps.begun for block in rows.tables.flat} == {0, 1}
    for _ in range(6):
        steps.let_go()
        engine.hear()
        engine.work(1.0)
    assert {message.id for message in told if isinstance(message, Result)} == {1, 2}


def test_who_leaves_during_a_step_gives_its_blocks_back_when_the_step_is_done() -> None:
    engine, steps, lanes, told = two_lanes()
    engine.add(request(1))
    engine.work(1.0)
    engine.cancel(1)
    assert lanes[0].busy, "the step still writes to its blocks"
    before = len(told)
    steps.let_go()
    engine.hear()
    assert not lanes[0].busy
    assert lanes[0].scheduler.pool.held == 0
    assert not [message for message in told[before:] if isinstance(message, Item | Result | Failed)]


@pytest.mark.parametrize(
    ("mesh", "generation", "why"),
    [
        ({"pipe": 5}, {}, "4 layers"),
        ({"tensor": 5}, {}, "4 heads"),
        ({"expert": 2}, {}, "no experts"),
        ({"pipe": 2}, {"draft": "somewhere"}, "leave draft out"),
    ],
)
def test_a_gpt_that_cannot_be_split_so_is_refused_in_one_line(
    mesh: dict[str, int], generation: dict[str, Any], why: str
) -> None:
    with pytest.raises(UserError, match=why) as refused:
        made(tiny_gpt(**SIZES), FACTS, plan_of(mesh), {"threads": 1, "generation": generation})
    assert "\n" not in str(refused.value)
