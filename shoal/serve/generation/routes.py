"""/v1/completions and /v1/chat/completions, as OpenAI's clients speak to them. Runs in the HTTP process: no torch."""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any
from uuid import uuid4
from weakref import WeakKeyDictionary

import msgspec

from shoal.data.tokenizer import Tokenizer, from_description
from shoal.serve.generation.answers import Choice, Delta, Form, Usage
from shoal.serve.generation.bodies import (
    Body,
    ChatBody,
    CompletionBody,
    ask_of,
    encode,
    end_tokens,
    prompts_of,
    read_body,
    stops_of,
)
from shoal.serve.generation.chat import chat_text
from shoal.serve.generation.description import PATHS as PATHS
from shoal.serve.generation.messages import Ask, Outcome, Piece
from shoal.serve.http.messages import HttpError, HttpRequest, HttpResponse, HttpStream, Route, json_response
from shoal.serve.http.predict import check_model, read_json

if TYPE_CHECKING:
    from shoal.serve.model import Model
    from shoal.serve.service import Service

_pieces = msgspec.msgpack.Decoder(list[Piece])
_outcome = msgspec.msgpack.Decoder(Outcome)
_json = msgspec.json.Encoder().encode


async def completions(service: "Service", request: HttpRequest) -> HttpResponse | HttpStream:
    plain = read_json(request.body)
    check_model(plain, service)
    body = read_body(plain, CompletionBody)
    tokenizer, facts = _tokenizer(service), service.model.facts
    prompts = prompts_of(body, tokenizer, facts["context"])
    echoes = [tokenizer.decode(prompt) for prompt in prompts] if body.echo else [""] * len(prompts)
    return await _answer(service, request, body, prompts, echoes, "cmpl")


async def chat(service: "Service", request: HttpRequest) -> HttpResponse | HttpStream:
    plain = read_json(request.body)
    check_model(plain, service)
    body = read_body(plain, ChatBody)
    facts = service.model.facts
    text = chat_text(body.messages, facts.get("chat", {}))
    tokens = encode(text, _tokenizer(service), facts["context"], "messages")
    return await _answer(service, request, body, [tokens], [""], "chatcmpl")


ROUTES: Mapping[tuple[str, str], Route] = {
    ("POST", "/v1/completions"): completions,
    ("POST", "/v1/chat/completions"): chat,
}


_opened: "WeakKeyDictionary[Model, tuple[Tokenizer, list[int]]]" = WeakKeyDictionary()


def _tokenizer(service: "Service") -> Tokenizer:
    return _tokens(service)[0]


def _tokens(service: "Service") -> tuple[Tokenizer, list[int]]:
    """The tokeniser, and the tokens that end an answer."""
    model = service.model
    if model not in _opened:
        if "tokenizer" not in model.facts:
            raise HttpError(400, f"{model.name!r} has no tokenizer.json: text cannot be read")
        tokenizer = from_description(model.facts["tokenizer"])
        _opened[model] = tokenizer, end_tokens(tokenizer, model.facts)
    return _opened[model]


async def _answer(
    service: "Service",
    request: HttpRequest,
    body: Body,
    prompts: Sequence[list[int]],
    echoes: Sequence[str],
    prefix: str,
) -> HttpResponse | HttpStream:
    tokenizer, ends = _tokens(service)
    facts, stops = service.model.facts, stops_of(body)
    asks = [ask_of(body, prompt, ends, facts["vocab"], facts["context"]) for prompt in prompts]
    about = {"id": f"{prefix}-{uuid4().hex}", "created": int(time.time()), "model": service.model.name}
    form = Form(isinstance(body, ChatBody), asks[0].logprobs >= 0, about)
    usage = Usage(prompt=sum(map(len, prompts)))
    answers = [
        _deltas(
            service, request, ask, body.priority or 0, tokenizer, stops, number * ask.choices, echoes[number], usage
        )
        for number, ask in enumerate(asks)
    ]
    deltas = answers[0] if len(answers) == 1 else _merged(answers)
    if not body.stream:
        async with aclosing(deltas):
            return json_response(form.whole([delta async for delta in deltas], usage))
    first = await anext(deltas)  # what is refused is refused with its own status, not in the middle of a stream
    wants_usage = body.stream_options is not None and body.stream_options.include_usage
    return HttpStream(
        _events(first, deltas, form, usage if wants_usage else None), headers={"Cache-Control": "no-store"}
    )


async def _deltas(
    service: "Service",
    request: HttpRequest,
    ask: Ask,
    priority: int,
    tokenizer: Tokenizer,
    stops: Sequence[str],
    first: int,
    echo: str,
    usage: Usage,
) -> AsyncGenerator[Delta, None]:
    """What comes of one prompt. When every choice has met a stop string, the rest is cancelled."""
    choices = [Choice(first + number, tokenizer, stops) for number in range(ask.choices)]
    cost = len(ask.tokens) + ask.most * max(ask.choices, ask.beams)
    stream = service.stream("generate", ask, cost=cost, client=request.client, priority=priority)
    if echo:
        for choice in choices:
            yield Delta(choice.index, echo, (), "")
    async with aclosing(stream):
        async for is_last, raw in stream:
            if is_last:
                usage.add(_outcome.decode(raw))
                break
            for piece in _pieces.decode(raw):
                choice = choices[piece.choice]
                if not choice.ended:
                    usage.generated += len(piece.tokens)
                    delta = choice.feed(piece, ask.ends)
                    if delta.text or delta.reason or delta.marks:
                        yield delta
            if all(choice.ended for choice in choices) and stops:
                break


async def _merged(answers: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """The answers to several prompts as they come. Closing it closes them all."""
    queue: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue()

    async def drain(deltas: AsyncGenerator[Delta, None]) -> None:
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    queue.put_nowait(delta)
            queue.put_nowait(None)
        except HttpError as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(drain(deltas)) for deltas in answers]
    try:
        left = len(tasks)
        while left:
            found = await queue.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                left -= 1
            else:
                yield found
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task


async def _events(
    first: Delta, deltas: AsyncGenerator[Delta, None], form: Form, usage: Usage | None
) -> AsyncGenerator[bytes, None]:
    """Server-sent events. An error in the middle is an event of its own, as OpenAI's clients expect."""
    async with aclosing(deltas):
        yield _event(form.chunk(first))
        try:
            async for delta in deltas:
                yield _event(form.chunk(delta))
        except HttpError as error:
            yield b"data: " + error.response().body + b"\n\n"
            return
        if usage is not None:
            yield _event(form.usage_chunk(usage))
        yield b"data: [DONE]\n\n"


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + _json(value) + b"\n\n"
