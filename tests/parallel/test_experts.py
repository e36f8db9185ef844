"""Experts spread over workers, held to one process that has them all."""

from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.comm.group import HostGroup
from shoal.comm.tensors import make_collectives
from shoal.errors import UserError
from shoal.models.gpt import GPT, GPTConfig
from shoal.models.moe import MoE, MoEConfig
from shoal.models.tasks.language_model import LanguageModel
from shoal.parallel.experts.model import experts_split, split_experts

SIZES = {"layers": 2, "heads": 2, "width": 16, "context": 8, "vocab": 11, "experts": 5}
SAMPLES = (3, 1, 0, 2)  # of each worker: one has nothing to do but to answer
TOKENS = torch.randint(11, (sum(SAMPLES), 9), generator=torch.Generator().manual_seed(0))


def _model(**options: Any) -> MoE:
    torch.manual_seed(0)
    model = MoE(MoEConfig(**{**SIZES, **options})).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def _batches(world: int) -> list[dict[str, Tensor]]:
    return [{"tokens": rows} for rows in TOKENS[: sum(SAMPLES[:world])].split(SAMPLES[:world])]


def _pass(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(batch["tokens"][:, :-1])
    LanguageModel().loss(model, batch)[0].backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _split_pass(group: HostGroup, options: dict[str, Any], freeze: bool) -> tuple[Tensor, dict[str, Tensor], list[str]]:
    model = _model(**options)
    names = [name for name, _ in model.named_parameters()]
    if freeze:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("experts" in name)
    split_experts(model, experts_split(model, group.world), make_collectives(group))
    assert [name for name, _ in model.named_parameters()] == names
    return *_pass(model, _batches(group.world)[group.rank]), [n for n, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("options", [{}, {"top_k": 1, "bias": False}], ids=["top-2", "top-1"])
def test_experts_on_other_workers_give_the_bits_and_the_summed_gradients_of_one_process(on_workers, world, options):
    whole = _model(**options)
    alone = [_pass(whole, batch) for batch in _batches(world)]
    parts = on_workers(world, _split_pass, options, False)
    splits = experts_split(whole, world)
    for (ours, _, _), (theirs, _) in zip(parts, alone, strict=True):
        assert torch.equal(ours, theirs)
    for name, parameter in whole.named_parameters():
        expected = sum(gradients[name] for _, gradients in alone if name in gradients)
        if name in splits:
            zero = [torch.zeros_like(splits[name].take(parameter, rank)) for rank in range(world)]
            given = splits[name].join([part[1].get(name, zero[rank]) for rank, part in enumerate(parts)])
        else:
            given = sum(part[1][name] for part in parts if name in part[1])
        torch.testing.assert_close(
            given, expected, rtol=1e-10, atol=1e-12, msg=lambda said, name=name: f"{name}: {said}"
        )


def test_two_workers_sums_have_the_bits_of_adding_one_processs_gradients(on_workers):
    whole = _model()
    alone = [_pass(whole, batch)[1] for batch in _batches(2)]
    parts = on_workers(2, _split_pass, {}, False)
    for name, split in experts_split(whole, 2).items():
        assert torch.equal(split.join([part[1][name] for part in parts]), alone[0][name] + alone[1][name])


def test_layers_frozen_below_the_experts_leave_no_worker_waiting(on_workers):
    for _, gradients, trained in on_workers(3, _split_pass, {}, True):
        assert set(gradients) <= set(trained)
        assert all("experts" in name for name in trained)


def _sent(group: HostGroup, width: int) -> int:
    """Bytes of one forward pass with the same routes at every width."""
    model = _model(width=width, layers=1)
    torch.nn.init.zeros_(model.blocks[0].mixture.router.weight)  # all to the first two experts, which rank 0 holds
    split_experts(model, experts_split(model, group.world), make_collectives(group))
    with torch.no_grad():
        model(TOKENS[:2, :8])
    return sum(total.sent_bytes for place, total in group.counters.totals().items() if place[0] == "all-to-all")


def test_a_worker_sends_its_tokens_and_gets_its_answers(on_workers):
    tokens, pairs, number = 2 * 8, 2, 8
    asked = [on_workers(2, _sent, width)[1] for width in (16, 32)]
    assert asked[1] - asked[0] == tokens * pairs * 16 * number


def test_a_mesh_that_splits_no_expert_is_refused_with_the_repair():
    with pytest.raises(UserError, match=r"has 5 experts, fewer than the 6 workers .* use expert = 5 at most"):
        experts_split(_model(), 6)
    with pytest.raises(UserError, match=r"a GPT has no experts, a model of kind 'moe' has. Use axis 'data'"):
        experts_split(GPT(GPTConfig(layers=1, heads=1, width=8, context=4, vocab=5)), 2)
