"""With ``invariant``, a request has the same bits whatever it was batched with."""

import itertools
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from serve.conftest import WORDS

from shoal.models.bert import Bert, BertConfig
from shoal.serve.engine import FromEngine, Request, Result
from shoal.serve.payloads import Inputs, Outputs, array
from shoal.serve.single_pass import open_engine

BATCH = 8


def answers(
    lengths: Sequence[int], *, invariant: bool, dtype: str, apart: bool, width: int = 384, heads: int = 4
) -> list[np.ndarray]:
    """The scores of texts of these lengths, asked for one after the other (``apart``) or all at once."""
    torch.manual_seed(0)
    sizes = {"layers": 3, "heads": heads, "width": width, "vocab": len(WORDS), "context": 64, "classes": 3}
    model = Bert(BertConfig(**sizes), "classification").eval().requires_grad_(False)
    for parameter in model.parameters():  # far enough from 0 that inputs matter
        parameter.mul_(3.0)
    model = model.to(getattr(torch, dtype))
    told: dict[int, np.ndarray] = {}

    def tell(messages: Sequence[FromEngine]) -> None:
        for message in messages:
            if isinstance(message, Result):
                outputs = msgspec.msgpack.decode(message.payload, type=Outputs)
                told[message.id] = outputs.arrays["scores"].numpy()

    facts: dict[str, Any] = {"task": "sequence-classification", "dtype": dtype, "pad": 0, "context": 64}
    engine = open_engine(model, facts, {"batch": BATCH, "latency_ms": 0.0, "invariant": invariant}, tell)
    draw = np.random.default_rng(0)
    for id, length in enumerate(lengths):
        tokens = draw.integers(5, len(WORDS), (1, length)).astype(np.int32)
        payload = msgspec.Raw(msgspec.msgpack.encode(Inputs(1, length, {"tokens": array(tokens)})))
        engine.add(Request(id, "predict", payload, length, 0.0, 1e18))
        if apart:
            engine.work(time.monotonic())
    for _ in itertools.takewhile(lambda _: len(told) < len(lengths), range(100)):
        engine.work(time.monotonic())
    return [told[id] for id in range(len(lengths))]


LENGTHS = [32, 30, 17, 32, 9, 32, 31, 32, 32, 24, 32, 5, 40, 32]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_alone_and_in_company_the_bits_are_the_same(dtype: str) -> None:
    alone = answers(LENGTHS, invariant=True, dtype=dtype, apart=True)
    together = answers(LENGTHS, invariant=True, dtype=dtype, apart=False)
    reordered = answers(LENGTHS[:1] + LENGTHS[5:6], invariant=True, dtype=dtype, apart=False)
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))
    assert np.array_equal(alone[0], reordered[0])


@pytest.mark.parametrize(("width", "heads"), [(16, 2), (20, 2), (36, 3), (48, 4), (100, 4)])
def test_they_are_also_where_rows_of_a_batch_do_not_compute_alike(width: int, heads: int) -> None:
    sizes = {"dtype": "float32", "width": width, "heads": heads}
    together = answers(LENGTHS, invariant=True, apart=False, **sizes)
    for first in range(4):  # in other rows of other batches
        turned = answers(LENGTHS[:first], invariant=True, apart=False, **sizes)
        assert all(np.array_equal(a, b) for a, b in zip(turned, together, strict=False))
    alone = answers(LENGTHS, invariant=True, apart=True, **sizes)
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_without_it_company_changes_bits_here_which_is_what_it_guards_against() -> None:
    alone = answers(LENGTHS, invariant=False, dtype="float32", apart=True)
    together = answers(LENGTHS, invariant=False, dtype="float32", apart=False)
    assert not all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
