"""Tasks: losses as sums and counts, figures that add up."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shoal.errors import UserError
from shoal.models.tasks.classification import Classification
from shoal.models.tasks.cross_entropy import cross_entropy
from shoal.models.tasks.custom import CustomLoss
from shoal.models.tasks.language_model import BidirectionalLanguageModel, LanguageModel
from shoal.models.tasks.masked_language_model import MaskedLanguageModel, draw_noise, mask_tokens, noise_of
from shoal.models.tasks.question_answering import QuestionAnswering
from shoal.models.tasks.regression import Regression


class Answers(nn.Module):
    """Gives the same output whatever it is asked, and keeps what it was asked."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        self.seen = (inputs, named)
        at = named.get("at")
        return self.output if at is None else self.output[at]


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=20), st.integers(0, 2**32))
@settings(max_examples=15)
def test_cross_entropy_sums_minus_log_softmax_over_the_targets_that_count(targets, seed):
    logits = torch.randn(len(targets), 5, generator=torch.Generator().manual_seed(seed))
    target = torch.tensor([t if t >= 0 else -100 for t in targets])
    total, count = cross_entropy(logits, target)
    expected = [-logits[row].double().log_softmax(0)[t].item() for row, t in enumerate(targets) if t >= 0]
    assert count == len(expected)
    assert total.item() == pytest.approx(sum(expected), rel=1e-5, abs=1e-6)


def test_no_target_at_all_loses_nothing_and_has_a_gradient_of_zeros():
    logits = torch.randn(2, 5, requires_grad=True)
    total, count = cross_entropy(logits, torch.full((2,), -100))
    total.backward()
    assert (total.item(), count) == (0.0, 0)
    assert not logits.grad.any()
    assert math.isnan(LanguageModel().summarise({"loss": 0.0, "count": 0, "correct": 0})["loss"])


def test_low_precision_logits_are_summed_in_float32():
    logits = torch.zeros(3000, 7, dtype=torch.bfloat16)
    total, _ = cross_entropy(logits, torch.zeros(3000, dtype=torch.long))
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(3000 * math.log(7), rel=1e-5)


def test_a_language_model_is_asked_all_but_the_last_token_for_all_but_the_first():
    tokens = torch.tensor([[5, 1, 2, 0]])
    model = Answers(nn.functional.one_hot(tokens[:, 1:], 6).float() * 100)
    sums = LanguageModel().measure(model, {"tokens": tokens})
    assert torch.equal(model.seen[0][0], tokens[:, :-1])
    assert sums == {"loss": 0.0, "count": 3, "correct": 3}
    assert LanguageModel().summarise(sums) == {"loss": 0.0, "perplexity": 1.0, "accuracy": 1.0}


def test_padding_is_no_target_of_a_language_model():
    batch = {"tokens": torch.tensor([[5, 1, 2, 0]]), "mask": torch.tensor([[1, 1, 1, 0]])}
    _, count = LanguageModel().loss(Answers(torch.zeros(1, 3, 6)), batch)
    assert count == 2


def test_both_directions_of_a_bidirectional_model_count():
    tokens = torch.tensor([[5, 1, 2, 0]])
    one_hot = nn.functional.one_hot(tokens, 6).float() * 100
    model = Answers((one_hot[:, 1:], one_hot[:, :-1]))
    sums = BidirectionalLanguageModel().measure(model, {"tokens": tokens})
    assert sums == {"loss": 0.0, "count": 6, "correct": 6}


def test_an_overflowing_perplexity_is_infinite():
    assert LanguageModel().summarise({"loss": 1e6, "count": 1, "correct": 0})["perplexity"] == math.inf


def test_classification_hands_mask_and_types_to_a_model_of_tokens():
    batch = {"tokens": torch.zeros(2, 3), "mask": torch.ones(2, 3), "target": torch.tensor([1, 0])}
    model = Answers(torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    sums = Classification().measure(model, batch)
    assert (sums["count"], sums["correct"]) == (2, 1)
    assert model.seen[1]["mask"] is batch["mask"]
    assert model.seen[1]["types"] is None
    Classification().loss(model, {"input": torch.zeros(2, 9), "target": torch.tensor([1, 0])})
    assert model.seen[1] == {}


@pytest.mark.parametrize("target", [torch.tensor([1.0, 3.0]), torch.tensor([[1.0], [3.0]])])
def test_regression_is_the_squared_error_of_each_sample(target):
    total, count = Regression().loss(Answers(torch.tensor([[2.0], [5.0]])), {"input": target, "target": target})
    assert (total.item(), count) == (5.0, 2)
    assert Regression().summarise({"loss": 8.0, "count": 2}) == {"loss": 4.0, "mse": 4.0, "rmse": 2.0}


def test_an_answer_counts_only_when_both_ends_are_right():
    logits = torch.zeros(3, 4, 2)
    logits[0, 1, 0] = logits[0, 2, 1] = logits[1, 1, 0] = logits[1, 3, 1] = logits[2, 0, 0] = logits[2, 0, 1] = 100
    batch = {"tokens": torch.zeros(3, 4), "start": torch.tensor([1, 1, 0]), "end": torch.tensor([2, 2, 0])}
    sums = QuestionAnswering().measure(Answers(logits), batch)
    assert sums == {"loss": 50.0, "count": 3, "correct_start": 3, "correct_end": 2, "correct": 2}
    assert QuestionAnswering().summarise(sums)["accuracy"] == pytest.approx(2 / 3)


def test_fifteen_per_cent_are_chosen_and_of_those_eight_tenths_hidden_a_tenth_swapped_a_tenth_left():
    tokens = torch.full((200, 500), 7)
    noise = draw_noise((200, 500), 1000, torch.Generator().manual_seed(0))
    seen, chosen = mask_tokens(tokens, torch.ones_like(tokens).bool(), noise, mask_token=1000)
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.005)  # four standard deviations of 100,000 draws
    hidden, left = (seen == 1000) & chosen, (seen == 7) & chosen
    assert (hidden.sum() / chosen.sum()).item() == pytest.approx(0.8, abs=0.015)
    assert (left.sum() / chosen.sum()).item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(seen[~chosen], tokens[~chosen])


def test_padding_and_special_tokens_are_never_chosen():
    tokens = torch.randint(5, (50, 40), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(40) < 30).expand(50, -1)
    task = MaskedLanguageModel(vocab=5, mask_token=9, special=(0, 3))
    model = Answers(torch.zeros(50, 40, 5))
    torch.manual_seed(0)
    _, count = task.loss(model, {"tokens": tokens, "mask": mask})
    at = model.seen[1]["at"]
    assert count == at.sum() > 0
    assert not at[:, 30:].any()
    assert not (at & ((tokens == 0) | (tokens == 3))).any()
    assert model.seen[1]["mask"].shape == (50, 40)


def test_training_masks_anew_from_the_default_generator_and_evaluation_by_each_row_alone():
    tokens = torch.randint(5, (8, 40), generator=torch.Generator().manual_seed(0))
    task, model = MaskedLanguageModel(vocab=5, mask_token=9), Answers(torch.zeros(8, 40, 5))

    def chosen(act: object) -> Tensor:
        act(model, {"tokens": tokens})
        return model.seen[1]["at"]

    assert not torch.equal(chosen(task.loss), chosen(task.loss))
    state = torch.get_rng_state()
    assert torch.equal(chosen(task.measure), chosen(task.measure))
    assert torch.equal(torch.get_rng_state(), state)
    rows = torch.cat([noise_of(row[None], 5).choice for row in tokens])
    assert torch.equal(noise_of(tokens, 5).choice, rows)


def test_a_window_longer_than_the_context_is_cut_for_a_masked_language_model():
    model = Answers(torch.zeros(1, 6, 5))
    MaskedLanguageModel(vocab=5, mask_token=9, context=6).loss(model, {"tokens": torch.ones(1, 7).long()})
    assert model.seen[0][0].shape == (1, 6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.ones(()), r"it returned a tensor of shape \[\]"),
        ((torch.ones(3), 3), r"it returned \(a tensor of shape \[3\], int\)"),
        (None, "it returned NoneType"),
    ],
)
def test_a_loss_of_the_users_own_that_is_no_sum_and_count_is_refused(given, said):
    task = CustomLoss(lambda model, batch: given, "mine:loss")
    with pytest.raises(UserError, match=f"mine:loss must return .*{said}"):
        task.loss(nn.Identity(), {})


def test_a_loss_of_the_users_own_is_measured_too():
    task = CustomLoss(lambda model, batch: (batch["input"].sum(), len(batch["input"])), "mine:loss")
    sums = task.measure(nn.Identity(), {"input": torch.tensor([1.0, 2.0])})
    assert sums == {"loss": 3.0, "count": 2}
    assert task.summarise(sums) == {"loss": 1.5}
