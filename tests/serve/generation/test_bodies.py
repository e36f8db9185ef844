"""Whatever comes in a body: it is a request that the engine takes, or one line with 400."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve.generation.tiny_gpt import byte_tokenizer

from shoal.data.tokenizer import from_description
from shoal.serve.generation.bodies import ChatBody, CompletionBody, ask_of, encode, prompts_of, read_body, stops_of
from shoal.serve.generation.chat import chat_text
from shoal.serve.generation.checks import problem
from shoal.serve.http.messages import HttpError

TOKENIZER = from_description({"kind": "json", "json": byte_tokenizer()})
VOCAB, CONTEXT = 320, 64

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
plausible = st.sampled_from([None, 0, 1, 2, 5, -1, 0.5, 1.5, True, False, "a", ["a", "b"], [1, 2], {"5": 1.0}])
message = st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": st.text(max_size=6)})


def fields_of(kind):
    return st.dictionaries(st.sampled_from(kind.__struct_fields__), anything | plausible, max_size=6)


def asks(plain, kind):
    body = read_body(plain, kind)
    stops_of(body)
    if isinstance(body, CompletionBody):
        prompts = prompts_of(body, TOKENIZER, CONTEXT)
    else:
        prompts = [encode(chat_text(body.messages, {}), TOKENIZER, CONTEXT, "messages")]
    return [ask_of(body, prompt, [0], VOCAB, CONTEXT) for prompt in prompts]


@settings(max_examples=120)
@given(
    plain=fields_of(CompletionBody), prompt=st.text(max_size=20) | st.lists(st.integers(-5, 400), max_size=5) | anything
)
def test_a_completions_body_is_a_request_or_refused(plain, prompt):
    check({"prompt": prompt, **plain}, CompletionBody)


@settings(max_examples=80)
@given(plain=fields_of(ChatBody), messages=st.lists(message, max_size=3) | anything)
def test_a_chat_body_is_a_request_or_refused(plain, messages):
    check({"messages": messages, **plain}, ChatBody)


def check(plain, kind):
    plain = msgspec.json.decode(msgspec.json.encode(plain))  # as it comes over the wire
    refused = None
    try:
        made = asks(plain, kind)
    except HttpError as error:
        made, refused = [], error
    assert refused is None or (refused.status == 400 and refused.why and "\n" not in refused.why)
    for ask in made:
        assert problem(ask, VOCAB, CONTEXT) == ""
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(ask), type=type(ask)) == ask


def test_what_is_left_out_is_as_openai_has_it():
    (completion,) = asks({"prompt": "hello"}, CompletionBody)
    assert (completion.most, completion.temperature, completion.choices, completion.ends) == (16, 1.0, 1, [0])
    (chat,) = asks({"messages": [{"role": "user", "content": "hi"}]}, ChatBody)
    assert chat.most == CONTEXT - len(chat.tokens)
    (other,) = asks({"prompt": "hello"}, CompletionBody)
    assert other.seed != completion.seed, "without a seed answers differ"


@pytest.mark.parametrize("name", ["user", "model"])
def test_fields_that_do_not_matter_here_are_taken(name):
    assert asks({"prompt": "hello", name: "x"}, CompletionBody)
