"""The LSTM and the bidirectional language model."""

import pytest
import torch

from shoal.errors import UserError
from shoal.models.elmo import Elmo, ElmoConfig, LayerMix
from shoal.models.lstm import LSTM, LSTMConfig

TOKENS = torch.randint(11, (1, 9), generator=torch.Generator().manual_seed(0))


def _changed(at: int) -> torch.Tensor:
    tokens = TOKENS.clone()
    tokens[0, at] = (tokens[0, at] + 1) % 11
    return tokens


def test_an_lstm_layer_has_four_gates_of_two_matrices_and_two_biases():
    model = LSTM(LSTMConfig(layers=3, width=8, hidden=10, vocab=11))
    lstm = 4 * 10 * (8 + 10 + 2) + 2 * 4 * 10 * (10 + 10 + 2)
    assert sum(p.numel() for p in model.parameters()) == 11 * 8 + lstm + 11 * 10 + 11


def test_the_lstm_sees_no_later_token():
    torch.manual_seed(0)
    model = LSTM(LSTMConfig(width=8, vocab=11)).eval()
    before, after = model(TOKENS), model(_changed(4))
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] != after[:, 4:]).any(-1).all()


def test_tied_layers_of_different_widths_are_refused():
    with pytest.raises(UserError, match=r"model.tied needs model.hidden = model.width, got 16 and 8"):
        LSTMConfig(width=8, hidden=16, tied=True)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_each_direction_of_elmo_predicts_a_token_from_its_own_side_only(layers):
    torch.manual_seed(0)
    model = Elmo(ElmoConfig(layers=layers, width=8, vocab=11)).eval()
    forward, backward = model(TOKENS)  # forward[t] predicts token t + 1, backward[t] predicts token t
    assert forward.shape == backward.shape == (1, 8, 11)
    for at in range(9):
        changed_forward, changed_backward = model(_changed(at))
        same_forward = (forward == changed_forward).all(-1)[0]
        same_backward = (backward == changed_backward).all(-1)[0]
        assert same_forward.tolist() == [t < at for t in range(8)]
        assert same_backward.tolist() == [t >= at for t in range(8)]


def test_elmo_shows_all_layers_of_both_directions_with_the_embedding_first():
    torch.manual_seed(0)
    model = Elmo(ElmoConfig(layers=2, width=8, vocab=11)).eval()
    states = model.representations(TOKENS)
    assert states.shape == (3, 1, 9, 16)
    assert torch.equal(states[0], model.tokens(TOKENS).repeat(1, 1, 2))
    changed = model.representations(_changed(4))
    assert torch.equal(states[:, :, :4, :8], changed[:, :, :4, :8])
    assert torch.equal(states[:, :, 5:, 8:], changed[:, :, 5:, 8:])


def test_the_layer_mix_starts_as_the_mean_and_learns():
    states = torch.randn(3, 2, 5, 16)
    mix = LayerMix(3)
    torch.testing.assert_close(mix(states), states.mean(0))
    mix(states).sum().backward()
    assert mix.scores.grad is not None
    assert mix.gamma.grad is not None
    assert {name: len(dims) for name, dims in mix.dimensions().items()} == {"scores": 1, "gamma": 1}
