"""The engine behind the seam: what is told of a request, in order, whatever happens to it or beside it."""

import msgspec
import pytest
from serve.generation.tiny_gpt import prompts, tiny_gpt
from torch import nn

from shoal.errors import UserError
from shoal.serve.engine import Begun, Failed, Figures, Item, Request, Result
from shoal.serve.generation.engine import open_engine, prepare
from shoal.serve.generation.messages import Ask, Outcome, Piece
from shoal.serve.generation.options import options_from, options_from_pairs

encode = msgspec.msgpack.encode


class Told:
    """Collects what an engine tells."""

    def __init__(self, model=None, **options):
        self.messages = []
        self.engine = open_engine(model or tiny_gpt(), {}, {"threads": 1, "generation": options}, self.messages.extend)
        self.now = 0.0

    def ask(self, id, ask, **facts):
        facts = {"arrived": self.now, "deadline": 1e9, **facts}
        self.engine.add(Request(id, "generate", msgspec.Raw(encode(ask)), 1, **facts))

    def work(self, steps=10_000):
        for _ in range(steps):
            due = self.engine.next_at(self.now)
            if due is None:
                return
            self.now = max(self.now, due)
            self.engine.work(self.now)
            self.now += 1.0

    def of(self, id):
        return [m for m in self.messages if isinstance(m, Item | Result | Failed) and m.id == id]

    def pieces(self, id):
        return [
            p for m in self.of(id) if isinstance(m, Item) for p in msgspec.msgpack.decode(m.payload, type=list[Piece])
        ]

    def told(self, id, choice):
        """Token, score and reason, as they came."""
        pieces = [piece for piece in self.pieces(id) if piece.choice == choice]
        return [(piece.tokens, piece.scores, piece.reason) for piece in pieces]

    def tokens(self, id, choice=0):
        return [token for piece in self.pieces(id) if piece.choice == choice for token in piece.tokens]


def test_items_come_one_a_step_then_one_result_and_nothing_after():
    told = Told()
    told.ask(1, Ask(prompts(20)[0], 6, temperature=0))
    told.work()
    kinds = [type(message) for message in told.of(1)]
    assert kinds == [Item] * 6 + [Result]
    outcome = msgspec.msgpack.decode(told.of(1)[-1].payload, type=Outcome)
    assert outcome == Outcome(20, 0, 6)
    assert [piece.reason for piece in told.pieces(1)] == [""] * 5 + ["length"]
    assert told.engine.next_at(told.now) is None, "an idle engine waits for nothing"


def test_whom_it_works_on_is_told_before_the_work_and_only_when_it_changes():
    told = Told()
    told.ask(1, Ask(prompts(5)[0], 4))
    told.work(2)
    told.ask(2, Ask(prompts(5)[0], 2))
    told.work()
    begun = [message.ids for message in told.messages if isinstance(message, Begun)]
    assert begun == [(1,), (1, 2)]
    assert isinstance(told.messages[0], Begun)


def test_a_token_that_ends_the_answer_is_told_with_its_reason():
    told = Told()
    (tokens,) = prompts(20)
    told.ask(1, Ask(tokens, 8, temperature=0))
    told.work()
    third = told.tokens(1)[2]
    told.ask(2, Ask(tokens, 8, temperature=0, ends=[third]))
    told.work()
    assert told.tokens(2) == told.tokens(1)[: told.tokens(1).index(third) + 1]
    assert told.pieces(2)[-1].reason == "stop"


def test_nothing_is_told_after_a_cancel_and_its_memory_is_free():
    told = Told()
    told.ask(1, Ask(prompts(20)[0], 50, choices=3))
    told.work(4)
    told.engine.cancel(1)
    told.engine.cancel(99)
    before = len(told.messages)
    told.work()
    assert len(told.messages) == before
    assert told.engine._generator.scheduler.pool.held == 0


def test_a_request_goes_on_after_the_items_that_were_told_before_a_death():
    ask = Ask(prompts(20)[0], 12, choices=2, temperature=0.9, seed=3, frequency=0.5, logprobs=1)
    whole = Told()
    whole.ask(1, ask)
    whole.work()
    items = [message.payload for message in whole.of(1) if isinstance(message, Item)]
    for reached in (1, 5, 11, 12):
        rest = Told()
        rest.ask(1, ask, attempt=1, reached=tuple(items[:reached]))
        rest.work()
        before = Told()
        before.messages = [Item(1, item) for item in items[:reached]]
        for choice in range(2):  # the choices need not keep step
            assert before.told(1, choice) + rest.told(1, choice) == whole.told(1, choice)
        assert isinstance(rest.of(1)[-1], Result)


def test_a_prompt_is_shared_within_a_client_and_not_beyond():
    told = Told()
    (tokens,) = prompts(40)
    for id, client in ((1, "a"), (2, "a"), (3, "b")):
        told.ask(id, Ask(tokens, 1), client=client)
        told.work()
    reused = [msgspec.msgpack.decode(told.of(id)[-1].payload, type=Outcome).reused for id in (1, 2, 3)]
    assert reused == [0, 32, 0]


def test_a_deadline_ends_a_request_with_504_and_the_others_go_on():
    told = Told()
    told.ask(1, Ask(prompts(5)[0], 50), deadline=5.0)
    told.ask(2, Ask(prompts(5)[0], 20))
    told.work()
    assert told.of(1)[-1] == Failed(1, 504, "its time was over before the answer was complete")
    assert isinstance(told.of(2)[-1], Result)


@pytest.mark.parametrize(
    ("ask", "why"),
    [
        (Ask([], 5), "empty"),
        (Ask([1], 0), "at least one new token"),
        (Ask([1] * 100, 50), "do not fit the context of 128: ask for at most 28"),
        (Ask([320], 5), "ids are 0 to 319"),
        (Ask([-1], 5), "ids are 0 to 319"),
        (Ask([1], 5, bias={999: 1.0}), "bias"),
        (Ask([1], 5, temperature=float("nan")), "finite"),
        (Ask([1], 5, top_p=1.5), "top_p = 1.5"),
        (Ask([1], 5, choices=100), "sequences are more than the 64"),
        (Ask([1], 5, choices=3, beams=2), "3 choices cannot come from 2 beams"),
        (Ask([1], 5, logprobs=21), "logprobs = 21"),
    ],
)
def test_what_cannot_be_generated_is_refused_in_one_line(ask, why):
    told = Told()
    told.ask(1, ask)
    (failed,) = told.messages
    assert failed.status == 400
    assert why in failed.why
    assert "\n" not in failed.why
    assert told.engine.next_at(0.0) is None


def test_bytes_that_are_no_request_are_refused():
    told = Told()
    told.engine.add(Request(1, "generate", msgspec.Raw(encode({"tokens": "x"})), 1, 0.0, 1e9))
    assert told.messages[0].status == 400


def test_a_fault_in_a_step_fails_those_in_it_and_no_other():
    told = Told(running=1)
    told.ask(1, Ask(prompts(5)[0], 5))
    told.ask(2, Ask(prompts(6)[0], 5))
    run = told.engine._generator.step.run

    def broken(rows):
        told.engine._generator.step.run = run
        raise RuntimeError("planted\nfault")

    told.engine._generator.step.run = broken
    told.work()
    assert told.of(1) == [
        Failed(1, 500, "the model failed on this input or one beside it: RuntimeError: planted fault")
    ]
    assert isinstance(told.of(2)[-1], Result)
    assert told.engine._generator.scheduler.pool.held == 0


def test_a_fault_before_the_step_fails_all_rather_than_coming_again_for_ever(monkeypatch):
    told = Told()
    told.ask(1, Ask(prompts(5)[0], 5))
    told.ask(2, Ask(prompts(6)[0], 5))
    monkeypatch.setattr(told.engine._generator.scheduler, "plan", lambda now: 1 / 0)
    told.work(3)
    assert [message.status for message in told.messages if isinstance(message, Failed)] == [500, 500]
    assert told.engine.next_at(told.now) is None


def test_the_figures_say_how_full_the_cache_is_and_how_much_of_the_time_was_the_models():
    told = Told()
    told.ask(1, Ask(prompts(20)[0], 6))
    told.work()
    values = [message.values for message in told.messages if isinstance(message, Figures)]
    assert values[0]["generated_tokens_total"] == 1
    assert values[-1]["generated_tokens_total"] == 6
    assert values[0]["cache_blocks_held"] == 2
    assert (values[-1]["cache_blocks_held"], values[-1]["cache_blocks_kept"]) == (0, 1)
    assert all(0 < each["share_of_bare_forward"] <= 1 for each in values)


def test_the_last_figures_come_a_second_after_the_work_and_then_nothing():
    told = Told()
    told.ask(1, Ask(prompts(20)[0], 3))
    while told.engine._generator.busy:
        told.engine.work(told.now)
    assert told.messages.pop().__class__ is Result
    assert told.engine.next_at(told.now) == told.now + 1.0
    told.engine.work(told.now + 1.0)
    assert isinstance(told.messages[-1], Figures)
    assert told.engine.next_at(told.now + 1.0) is None


def test_beam_search_tells_all_answers_at_its_end_with_their_scores():
    told = Told()
    told.ask(1, Ask(prompts(9)[0], 6, beams=4, choices=2))
    told.work()
    assert [type(message) for message in told.of(1)] == [Item, Result]
    outcome = msgspec.msgpack.decode(told.of(1)[-1].payload, type=Outcome)
    assert outcome.scores == sorted(outcome.scores, reverse=True)
    assert len(told.pieces(1)) == len(outcome.scores) == 2


def test_weights_are_packed_once_for_processes_that_are_forked_later():
    from shoal.serve.generation.packing import packed_once

    model = tiny_gpt()
    prepare(model, {"threads": 1})
    first = packed_once(model, model.tokens.weight.dtype)
    assert packed_once(model, model.tokens.weight.dtype)[2] is first[2]


def test_a_draft_that_is_not_there_is_found_before_the_fork():
    with pytest.raises(UserError, match="no run in"):
        prepare(tiny_gpt(), {"generation": {"draft": "/nowhere"}})


def test_a_model_that_is_no_gpt_and_an_option_that_is_none_are_refused_by_name():
    with pytest.raises(UserError, match="not by a Linear"):
        Told(nn.Linear(2, 2))
    with pytest.raises(UserError, match="did you mean 'cache_bytes'"):
        options_from({"cache_byte": 1})
    with pytest.raises(UserError, match="precision"):
        options_from({"precision": "int8"})


def test_options_come_from_words_of_the_command_line():
    assert options_from_pairs(["cache_bytes=1000", "stretch=1.5", "precision=bfloat16"]) == {
        "cache_bytes": 1000,
        "stretch": 1.5,
        "precision": "bfloat16",
    }
    for word, why in (
        ("cache_byte=1", "did you mean"),
        ("running=many", "a int"),
        ("running", "a int"),
        ("running=0", "1"),
    ):
        with pytest.raises(UserError, match=why):
            options_from_pairs([word])
