"""From logits to tokens."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.serve.generation.messages import Ask
from shoal.serve.generation.sampling import Chooser, draw, log_probabilities, scored, uniform


def logits(vocab=50, seed=0, scale=2.0):
    return (np.random.default_rng(seed).standard_normal(vocab) * scale).astype(np.float32)


def chances(row, ask, draws=4000):
    counts = Counter(draw(row, ask, (i + 0.5) / draws) for i in range(draws))
    return np.array([counts[token] / draws for token in range(len(row))])


def left_by_transformers(row, ask):
    """The probabilities after transformers' own warpers, in its order."""
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    scores = torch.from_numpy(row)[None]
    warpers = [TemperatureLogitsWarper(ask.temperature)]
    warpers += [TopKLogitsWarper(ask.top_k)] if ask.top_k else []
    warpers += [TopPLogitsWarper(ask.top_p)] if ask.top_p < 1 else []
    warpers += [MinPLogitsWarper(ask.min_p)] if ask.min_p else []
    for warper in warpers:
        scores = warper(None, scores)
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 12, "top_p": 0.6, "min_p": 0.05}, {"top_k": 1}],
)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_tokens_come_as_often_as_transformers_warpers_say(options, temperature):
    ask = Ask([1], 1, temperature=temperature, **options)
    row = logits()
    np.testing.assert_allclose(chances(row, ask), left_by_transformers(row, ask), atol=6e-4)


@settings(max_examples=60)
@given(
    vocab=st.integers(2, 900),
    seed=st.integers(0, 99),
    top_k=st.integers(0, 900),
    top_p=st.floats(0, 1),
    at=st.floats(0, 1, exclude_max=True),
)
def test_what_is_drawn_is_always_one_of_those_that_are_left(vocab, seed, top_k, top_p, at):
    row = logits(vocab, seed, scale=0.3)  # flat: many are left
    ask = Ask([1], 1, top_k=min(top_k, vocab), top_p=top_p)
    token = draw(row, ask, at)
    order = np.lexsort((np.arange(vocab), -row))
    rank = int(np.flatnonzero(order == token)[0])
    assert not ask.top_k or rank < ask.top_k
    weights = np.exp(row[order[: ask.top_k or vocab]].astype(np.float64))
    before = weights[:rank].sum() / weights.sum()
    assert rank == 0 or before < top_p + 1e-6


def test_no_token_of_probability_zero_is_ever_drawn():
    row = np.full(10, -np.inf, np.float32)
    row[[2, 5]] = 0.0
    assert {draw(row, Ask([1], 1), at) for at in (0.0, 0.49, 0.51, 1 - 2**-53)} == {2, 5}


def test_of_equal_logits_the_smaller_token_goes_first():
    row = np.zeros(600, np.float32)
    assert {draw(row, Ask([1], 1, top_k=3), i / 30) for i in range(30)} == {0, 1, 2}
    assert draw(row, Ask([1], 1, top_p=0.0), 0.999) == 0


def test_draws_are_spread_evenly_and_depend_on_seed_choice_and_place_alone():
    draws = np.array([uniform(1, 0, i) for i in range(20_000)])
    assert 0 <= draws.min() < draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.01
    assert np.abs(np.histogram(draws, 10, (0, 1))[0] / 2000 - 1).max() < 0.1
    assert len({uniform(1, 0, 0), uniform(2, 0, 0), uniform(1, 1, 0), uniform(1, 0, 1), uniform(-1, 0, 0)}) == 5


def test_the_repetition_penalty_is_that_of_transformers_on_prompt_and_answer():
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    row = logits()
    chooser = Chooser(Ask([3, 9], 5, repetition=1.7), 0)
    chooser.take(20)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[3, 9, 20]]), torch.from_numpy(row)[None])
    np.testing.assert_allclose(chooser._changed(row), expected[0].numpy(), rtol=1e-6)


def test_frequency_counts_and_presence_does_not_and_the_prompt_is_not_counted():
    chooser = Chooser(Ask([4], 9, frequency=0.5, presence=0.25, bias={7: 3.0}), 0)
    for token in (1, 1, 2):
        chooser.take(token)
    changed = chooser._changed(np.zeros(10, np.float32))
    assert changed.tolist() == [0, -1.25, -0.75, 0, 0, 0, 0, 3.0, 0, 0]


def test_an_end_cannot_come_before_the_least_number_of_tokens():
    row = np.array([0, 9, 1], np.float32)
    chooser = Chooser(Ask([0], 5, temperature=0, ends=[1], least=2), 0)
    chosen = []
    for _ in range(3):
        token, _ = chooser.choose(row)
        chooser.take(token)
        chosen.append(token)
    assert chosen == [2, 2, 1]


def test_the_row_that_tokens_are_chosen_from_is_left_as_it_was():
    row = logits()
    before = row.copy()
    Chooser(Ask([1, 2], 3, repetition=2.0, bias={1: 1.0}, top_p=0.5, logprobs=3), 0).choose(row)
    np.testing.assert_array_equal(row, before)


def test_log_probabilities_are_the_models_own_before_penalties():
    row = logits()
    np.testing.assert_allclose(log_probabilities(row), torch.from_numpy(row).log_softmax(-1).numpy(), atol=1e-6)
    token, told = Chooser(Ask([1], 3, temperature=0, bias={11: 100.0}, logprobs=2), 0).choose(row)
    assert token == 11
    assert told == scored(row, 11, 2)
    assert [t for t, _ in told.likeliest] == np.argsort(-row)[:2].tolist()
    assert math.isclose(told.logprob, torch.from_numpy(row).log_softmax(-1)[11], abs_tol=1e-6)
