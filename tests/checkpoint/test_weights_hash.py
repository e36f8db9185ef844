"""The hash of a set of weights can be recomputed from its description, and moves when anything moves."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shoal.errors import ShoalError
from shoal.train.weights import byte_pieces, weights_sha256


def described(tensors: dict[str, Tensor]) -> str:
    """The layout of the docstring, written a second time without streaming."""
    raw = b""
    for name in sorted(tensors, key=str.encode):
        value = tensors[name]
        dtype = str(value.dtype).split(".")[1]
        flat = value.to(torch.float32).numpy() if value.dtype == torch.bfloat16 else value.numpy()
        if value.dtype == torch.bfloat16:  # the upper half of the float32
            data = (flat.view(np.uint32) >> 16).astype("<u2").tobytes()
        else:
            data = flat.astype(flat.dtype.newbyteorder("<")).tobytes(order="C")
        for text in (name, dtype):
            raw += len(text.encode()).to_bytes(8, "little") + text.encode()
        for number in (value.dim(), *value.shape, len(data)):
            raw += number.to_bytes(8, "little")
        raw += data
    return hashlib.sha256(raw).hexdigest()


STATE = {
    "b.weight": torch.arange(12.0).reshape(3, 4),
    "a.transposed": torch.arange(12.0).reshape(3, 4).t(),
    "a.half": torch.tensor([1.5, -2.0, float("inf")], dtype=torch.bfloat16),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(3),
    "mask": torch.tensor([True, False]),
    "strided": torch.arange(20, dtype=torch.int32)[::3],
    "expanded": torch.tensor([7.0]).expand(4),
    "é\U0001f41f": torch.tensor([1], dtype=torch.uint8),
    "\uffff": torch.tensor([2], dtype=torch.uint8),
}


def test_the_hash_is_that_of_the_described_bytes():
    assert weights_sha256(STATE) == described(STATE)


def test_the_hash_of_a_known_state_never_changes():
    assert weights_sha256({}) == hashlib.sha256().hexdigest()
    known = {"w": torch.tensor([1.0, 2.0])}
    assert weights_sha256(known) == "a3339b3f5646249811da4983d9f1c7734ab9972f1f61f20fff1b6cb8c59dcdf7"


def test_the_order_of_the_mapping_and_the_strides_do_not_count():
    again = {name: STATE[name].contiguous() for name in reversed(STATE)}
    assert weights_sha256(again) == weights_sha256(STATE)


@pytest.mark.parametrize(
    "other",
    [
        {"w": torch.tensor([1.0, 2.0]).view(2, 1)},
        {"w": torch.tensor([1.0, 2.0]).view(torch.int32)},
        {"v": torch.tensor([1.0, 2.0])},
        {"w": torch.tensor([2.0, 1.0])},
        {"w": torch.tensor([1.0, 2.0000002])},
        {"w": torch.tensor([1.0]), "x": torch.tensor([2.0])},
        {"w": torch.tensor([1.0, 2.0]), "x": torch.empty(0)},
    ],
)
def test_name_shape_dtype_order_and_every_bit_count(other):
    assert weights_sha256(other) != weights_sha256({"w": torch.tensor([1.0, 2.0])})


def test_a_tied_parameter_counts_under_each_of_its_names():
    weight = torch.ones(2)
    assert weights_sha256({"a": weight, "b": weight}) == weights_sha256({"a": weight, "b": weight.clone()})
    assert weights_sha256({"a": weight, "b": weight}) != weights_sha256({"a": weight})


def test_a_parameter_hashes_as_its_tensor():
    assert weights_sha256({"w": torch.nn.Parameter(torch.ones(2))}) == weights_sha256({"w": torch.ones(2)})


@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    piece=st.integers(1, 40),
    turn=st.randoms(use_true_random=False),
    step=st.integers(1, 3),
)
def test_pieces_of_any_size_join_to_the_bytes_of_any_view(shape, piece, turn, step):
    order = list(range(len(shape)))
    turn.shuffle(order)
    tensor = torch.arange(int(np.prod(shape)), dtype=torch.int16).reshape(shape).permute(order)
    if shape:
        tensor = tensor[::step]
    pieces = [bytes(view) for view in byte_pieces(tensor, piece)]
    assert b"".join(pieces) == tensor.numpy().tobytes(order="C")


def test_a_contiguous_tensor_is_not_copied():
    tensor = torch.zeros(4)
    [view] = byte_pieces(tensor)
    tensor.fill_(1.0)
    assert bytes(view) == np.ones(4, dtype=np.float32).tobytes()


@pytest.mark.parametrize("tensor", [torch.eye(2).to_sparse(), torch.ones(2, device="meta")])
def test_a_tensor_without_plain_bytes_is_refused(tensor):
    with pytest.raises(ShoalError, match="has no plain bytes"):
        weights_sha256({"w": tensor})
