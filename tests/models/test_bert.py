"""The BERT itself: what its mask, its places and its heads mean."""

import pytest
import torch

from shoal.errors import UserError
from shoal.models.bert import HEADS, Bert, BertConfig

CONFIG = BertConfig(layers=2, heads=2, width=16, context=8, vocab=11, classes=3, dropout=0.0)
TOKENS = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])


def _bert(head: str) -> Bert:
    torch.manual_seed(0)
    return Bert(CONFIG, head).eval()


def test_bert_base_has_the_published_parameters():
    with torch.device("meta"):
        base = Bert(BertConfig(layers=12, heads=12, width=768, context=512, vocab=30522), "encoder")
    assert sum(p.numel() for p in base.parameters()) == 109_482_240


@pytest.mark.parametrize(
    ("head", "shape"), list(zip(HEADS, [(2, 8, 16), (2, 8, 11), (2, 3), (2, 8, 2)], strict=True)), ids=HEADS
)
def test_each_head_has_its_shape_and_what_is_behind_the_mask_changes_nothing(head, shape):
    model = _bert(head)
    output = model(TOKENS, MASK)
    assert output.shape == shape
    hidden = TOKENS.clone()
    hidden[1, 5:] = (hidden[1, 5:] + 1) % 11
    same = model(hidden, MASK)
    if output.dim() == 2:
        assert torch.equal(output, same)
    else:
        assert torch.equal(output[MASK.bool()], same[MASK.bool()])


def test_every_token_sees_every_other():
    model = _bert("encoder")
    for at in range(8):
        changed = TOKENS.clone()
        changed[:, at] = (changed[:, at] + 1) % 11
        assert (model(TOKENS) != model(changed)).any(-1).all()


def test_logits_at_some_places_are_those_of_all_places():
    model = _bert("masked-language-model")
    at = torch.tensor([[0, 1, 0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 0, 0, 0, 0]]).bool()
    torch.testing.assert_close(model(TOKENS, at=at), model(TOKENS)[at])  # float32: a smaller matmul
    assert model(TOKENS, at=torch.zeros_like(at)).shape == (0, 11)


def test_types_default_to_the_first_and_matter():
    model = _bert("encoder")
    assert torch.equal(model(TOKENS), model(TOKENS, types=torch.zeros_like(TOKENS)))
    assert not torch.equal(model(TOKENS), model(TOKENS, types=torch.ones_like(TOKENS)))


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(UserError, match="9 tokens do not fit the model's context of 8"):
        _bert("encoder")(torch.zeros(1, 9, dtype=torch.long))
