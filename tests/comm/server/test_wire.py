"""Whatever arrives is understood or refused; nothing else comes of it."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.comm.heap import Heap, heap_file
from shoal.comm.server import wire
from shoal.comm.server.api import ParameterServer, Served
from shoal.comm.server.service import Service
from shoal.comm.server.wire import Form, Kind, Message, WireError

TOKEN = bytes(range(32))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
WORDS = ("what", "run", "slot", "start", "key", "shape", "dtype", "offset", "value", "counts", "passes", "groups",
         "factor", "share", "unused", "version", "fingerprint", "codec", "stop", "servers", "bound")  # fmt: skip
MESSAGES = st.builds(
    Message,
    kind=st.sampled_from(Kind),
    worker=st.integers(0, 3),
    clock=st.integers(-2, 3),
    bucket=st.integers(0, 3),
    form=st.sampled_from(Form),
    dtype=st.just("uint8"),
    words=st.dictionaries(st.sampled_from(WORDS), JSON | st.integers(0, 3), max_size=8),
    data=st.binary(max_size=300),
)


def framed(message, sequence=0, token=TOKEN):
    head, data = wire.encode(message, sequence, token)
    return bytes(head), bytes(memoryview(data).cast("B"))


@given(MESSAGES, st.integers(0, 2**63))
def test_a_message_arrives_as_it_was_sent(message, sequence):
    try:
        head, data = framed(message, sequence)
    except ValueError:
        return  # not a number: JSON text for it is not JSON
    got, number = wire.decode(head, data, TOKEN)
    assert (got.kind, got.worker, got.clock, got.bucket, got.form, number) == (
        message.kind, message.worker, message.clock, message.bucket, message.form, sequence)  # fmt: skip
    assert bytes(got.data) == message.data
    assert json.dumps(got.words) == json.dumps(json.loads(json.dumps(message.words)))


@given(MESSAGES, st.data())
def test_bytes_that_were_changed_cut_or_made_up_raise_nothing_but_one_error(message, draw):
    head, data = framed(message)
    spoilt = bytearray(head)
    for _ in range(draw.draw(st.integers(0, 4))):
        spoilt[draw.draw(st.integers(0, len(spoilt) - 1))] = draw.draw(st.integers(0, 255))
    spoilt = spoilt[: draw.draw(st.integers(0, len(spoilt)))] + draw.draw(st.binary(max_size=8))
    for front, back in ((bytes(spoilt), data), (draw.draw(st.binary(max_size=200)), data), (head, data + b"x")):
        try:
            wire.decode(front, back, TOKEN)
            wire.head_length(memoryview(front))
        except WireError:
            continue


def test_another_token_is_refused_before_anything_is_read():
    head, data = framed(Message(Kind.join), token=bytes(32))
    with pytest.raises(WireError, match="a wrong token"):
        wire.decode(head, data, TOKEN)


@pytest.mark.parametrize("words", ["[1]", "nonsense", "[" * 100_000, '{"a":' * 50_000, "\xff"])
def test_words_that_are_no_object_are_refused(words):
    raw = words.encode("latin1")
    head, _ = framed(Message(Kind.join))
    size = len(raw).to_bytes(4, "little")
    at = wire.HEAD_BYTES - wire.TOKEN_BYTES - 8 - 4
    with pytest.raises(WireError):
        wire.decode(head[:at] + size + head[at + 4 :] + raw, b"", TOKEN)


def test_lengths_that_are_not_those_of_what_came_are_refused():
    head, _ = framed(Message(Kind.push, dtype="float32", data=np.zeros(4, np.float32)))
    for data in (b"", b"x" * 15, b"x" * 17):
        with pytest.raises(WireError, match="data of"):
            wire.decode(head, data, TOKEN)
    huge = bytearray(head)
    at = wire.HEAD_BYTES - wire.TOKEN_BYTES - 8
    huge[at : at + 8] = (1 << 62).to_bytes(8, "little")
    with pytest.raises(WireError, match="were announced"):
        wire.decode(bytes(huge), b"", TOKEN)


# --- a whole server -----------------------------------------------------------------------------------------------


class InProcess:
    """A link to a service in this process: answers wait in a list."""

    def __init__(self, service: Service, boxes: dict[int, list[Message]], worker: int) -> None:
        self.service, self.boxes, self.worker = service, boxes, worker
        self.name = f"server {service.server}"
        self.sent_bytes = self.received_bytes = 0
        boxes.setdefault(worker, [])

    def send(self, message: Message) -> None:
        head, data = framed(message)
        for worker, answer in self.service.handle(self.worker, wire.decode(head, data, TOKEN)[0]):
            self.boxes.setdefault(worker, []).append(wire.decode(*framed(answer), TOKEN)[0])

    def close(self) -> None: ...

    def receive(self) -> Message:
        message = self.boxes[self.worker].pop(0)
        return Message(**{**message.__dict__, "data": bytearray(message.data)})


def joined(monkeypatch, service, worker=0, **options):
    from shoal.comm.server import api
    from shoal.comm.server.roster import Roster

    boxes: dict[int, list[Message]] = {}
    link = InProcess(service, boxes, worker)
    monkeypatch.setattr(api, "_roster", lambda servers: Roster([link], None))
    torch.manual_seed(0)
    model = torch.nn.Linear(13, 7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, ParameterServer(model.parameters(), optimizer, Served((), TOKEN), worker=worker, **options)


def test_a_service_survives_any_message_and_goes_on_serving_as_if_there_had_been_none(monkeypatch):
    """The honest worker's weights are those of a plain optimiser, whatever others said in between."""
    service = Service(0, Heap(heap_file()), shared=False)
    model, server = joined(monkeypatch, service, mode="async")
    torch.manual_seed(0)
    twin = torch.nn.Linear(13, 7)
    plain = torch.optim.AdamW(twin.parameters(), lr=0.1)

    @settings(max_examples=75)
    @given(st.lists(MESSAGES, min_size=1, max_size=6), st.integers(0, 99))
    def strangers_talk(messages, seed):
        for message in messages:
            if message.kind not in (Kind.leave, Kind.get):
                for worker, _ in service.handle(message.worker + 1, message):
                    assert worker
        generator = torch.Generator().manual_seed(seed)
        gradients = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
        server.push(gradients)
        server.pull()
        for parameter, gradient in zip(twin.parameters(), gradients, strict=True):
            parameter.grad = gradient
        plain.step()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))

    strangers_talk()
    assert sum(service.refused.values()) > 100


def test_a_service_survives_a_worker_that_has_joined_and_then_talks_nonsense(monkeypatch):
    service = Service(0, Heap(heap_file()), shared=False)
    _, server = joined(monkeypatch, service, mode="ssp", staleness=1)
    service.handle(1, Message(Kind.join, words={"fingerprint": server.setup.fingerprint}))

    @settings(max_examples=75)
    @given(st.lists(MESSAGES, max_size=6))
    def it_talks(messages):
        for message in messages:
            service.handle(1, message)

    it_talks()
    service.leave(1)
    before = server.version
    for _ in range(3):
        server.push([torch.ones(7, 13), torch.ones(7)])
        server.pull()
    assert server.version >= before + 3


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"bucket": 7}, "bucket 7 is not due"),
        ({"clock": 5}, "pushed step 5 where step 0 is due"),
        ({"dtype": "float64"}, "a gradient of float64 where float32 is due"),
        ({"data": np.zeros(3, np.float32)}, "12 bytes where"),
        ({"words": {"passes": [1, 2], "counts": [1.0]}}, "passes is not a list of 1"),
        ({"words": {"passes": [1], "counts": ["1"]}}, "count = '1' is not a finite number"),
        ({"words": {"passes": [1], "counts": [float("inf")]}}, "count = inf is not a finite number"),
        ({"form": Form.rows, "dtype": "uint8", "data": b"\1\1\1"}, "rows shorter than their bit map"),
        (
            {"form": Form.compressed, "dtype": "uint8", "data": b"123", "words": {"passes": [1], "counts": [1.0]}},
            "codec",
        ),
    ],
)
def test_a_push_of_the_wrong_kind_is_refused_with_a_reason_and_counted(monkeypatch, change, why):
    service = Service(0, Heap(heap_file()), shared=False)
    _, server = joined(monkeypatch, service, mode="async")
    size = sum(piece.size for piece in server.setup.pieces[0])
    good = {
        "kind": Kind.push,
        "dtype": "float32",
        "words": {"passes": [1], "counts": [1.0]},
        "data": np.zeros(size, np.float32),
    }
    ((_, answer),) = service.handle(0, Message(**{**good, **change}))
    assert answer.kind is Kind.refused
    assert why in answer.words["why"]
    assert sum(service.refused.values()) == 1
    assert service.handle(0, Message(**good)) == []
