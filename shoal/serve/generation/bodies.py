"""The bodies of /v1/completions and /v1/chat/completions, in the fields of OpenAI's API and a few of our own."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from shoal.data.tokenizer import Tokenizer
from shoal.errors import UserError, unknown_name
from shoal.serve.generation.checks import problem
from shoal.serve.generation.messages import MOST_CHOICES, MOST_LOGPROBS, Ask
from shoal.serve.http.messages import HttpError

CHARACTERS_A_TOKEN = 64  # a prompt of more characters than so many for each token of the context is not tokenised
MOST_STOPS = 16
MOST_PROMPTS = 64
END_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")

Stops = Annotated[list[str], Meta(max_length=MOST_STOPS)]


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool = False


class TextFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["text"]


class Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What both have in common. None is as if a field were left out."""

    model: str | None = None
    n: Annotated[int, Meta(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | Stops | None = None
    user: str | None = None  # not looked at
    # not in OpenAI's API
    top_k: Annotated[int, Meta(ge=0)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    ignore_eos: bool | None = None
    num_beams: Annotated[int, Meta(ge=1, le=MOST_CHOICES)] | None = None
    length_penalty: Annotated[float, Meta(ge=-100, le=100)] | None = None
    early_stopping: bool | None = None
    priority: Annotated[int, Meta(ge=-10, le=10)] | None = None  # higher goes first


class CompletionBody(Body, kw_only=True, forbid_unknown_fields=True):
    prompt: str | list[str | int | list[int]]
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None


class Part(msgspec.Struct, kw_only=True):
    type: Literal["text"]
    text: str


class Message(msgspec.Struct, kw_only=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None


class ChatBody(Body, kw_only=True, forbid_unknown_fields=True):
    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)] | None = None
    metadata: dict[str, str] | None = None  # not looked at
    store: bool | None = None  # nothing is stored
    response_format: TextFormat | None = None


B = TypeVar("B", CompletionBody, ChatBody)


def read_body(plain: Mapping[str, Any], kind: type[B]) -> B:
    """Raises HttpError 400 that names the field."""
    known = {field.name for field in msgspec.structs.fields(kind)}
    for name in plain:
        if name not in known:
            raise HttpError(400, str(unknown_name("field", str(name)[:100], known)), param=str(name)[:100])
    try:
        return msgspec.convert(plain, kind)
    except msgspec.ValidationError as error:
        where = str(error).partition(" - at `$.")[2]
        raise HttpError(400, str(error), param=where.rstrip("`").partition("[")[0]) from None


def stops_of(body: Body) -> list[str]:
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if any(not 0 < len(stop) <= 1024 for stop in stops):
        raise HttpError(400, "a stop string has from 1 to 1024 characters", param="stop")
    return stops


def prompts_of(body: CompletionBody, tokenizer: Tokenizer, context: int) -> list[list[int]]:
    """The tokens of each prompt: one text, several, or tokens."""
    given = body.prompt
    several: Sequence[str | int | list[int]] = [given] if isinstance(given, str) else given
    if several and all(isinstance(one, int) for one in several):
        several = [[one for one in several if isinstance(one, int)]]
    if not 0 < len(several) <= MOST_PROMPTS:
        raise HttpError(400, f"from 1 to {MOST_PROMPTS} prompts can be given, not {len(several)}", param="prompt")
    out = []
    for one in several:
        if isinstance(one, int):
            raise HttpError(400, "a prompt is a text or a list of tokens: texts and tokens are mixed", param="prompt")
        out.append(encode(one, tokenizer, context, "prompt") if isinstance(one, str) else one)
    return out


def encode(text: str, tokenizer: Tokenizer, context: int, param: str) -> list[int]:
    """Raises HttpError 400 for a text that is far too long, empty, or of characters that the tokeniser lacks."""
    if len(text) > CHARACTERS_A_TOKEN * context:
        raise HttpError(
            400, f"a text of {len(text)} characters does not fit the context of {context} tokens", param=param
        )
    try:
        tokens = tokenizer.encode(text)
    except UserError as error:
        raise HttpError(400, str(error), param=param) from None
    except UnicodeEncodeError:
        raise HttpError(400, "the text holds half of a surrogate pair", param=param) from None
    if not tokens:
        raise HttpError(400, "the text is empty: give at least one character", param=param)
    return tokens


def most_tokens(body: Body, prompt: int, context: int) -> int:
    """How many new tokens: what is asked for, else 16 for a completion, and for a chat all that fit."""
    asked = getattr(body, "max_completion_tokens", None) or getattr(body, "max_tokens", None)
    room = context - prompt
    if asked is None:
        return max(1, min(16, room) if isinstance(body, CompletionBody) else room)
    return int(asked)


def ask_of(body: Body, tokens: list[int], ends: list[int], vocab: int, context: int) -> Ask:
    """Raises HttpError 400 for what cannot be generated."""
    if isinstance(body, CompletionBody):
        logprobs = -1 if body.logprobs is None else body.logprobs
        refused = {
            "suffix is not supported": body.suffix not in (None, ""),
            "best_of above n is not supported": body.best_of not in (None, 1, body.n),
            "echo goes without logprobs: the prompt has none here": bool(body.echo) and logprobs >= 0,
        }
    else:
        assert isinstance(body, ChatBody)
        logprobs = (body.top_logprobs or 0) if body.logprobs else -1
        refused = {
            "top_logprobs needs logprobs = true": body.top_logprobs is not None and not body.logprobs,
        }
    for why, is_refused in refused.items():
        if is_refused:
            raise HttpError(400, why, param=why.split()[0])
    beams = body.num_beams if (body.num_beams or 1) > 1 else 0
    if beams and (logprobs >= 0 or body.temperature or body.stop):
        raise HttpError(400, "beam search takes no logprobs, temperature or stop", param="num_beams")
    bias: dict[int, float] = {}
    for name, value in (body.logit_bias or {}).items():
        if not name.isdecimal() or len(name) > 9:
            raise HttpError(400, "logit_bias takes token numbers as names", param="logit_bias")
        bias[int(name)] = value
    ask = Ask(
        tokens,
        most_tokens(body, len(tokens), context),
        choices=body.n or 1,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=min(body.top_k or 0, vocab),
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        repetition=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        frequency=body.frequency_penalty or 0.0,
        presence=body.presence_penalty or 0.0,
        bias=bias,
        logprobs=logprobs,
        ends=[] if body.ignore_eos else ends,
        least=body.min_tokens or 0,
        beams=beams or 0,
        length_penalty=1.0 if body.length_penalty is None else body.length_penalty,
        early=bool(body.early_stopping),
    )
    why = problem(ask, vocab, context)
    if why:
        raise HttpError(400, why, param="max_tokens" if "context" in why else "")
    return ask


def end_tokens(tokenizer: Tokenizer, facts: Mapping[str, Any]) -> list[int]:
    """Those that end an answer: the folder's own, and the usual ones that the vocabulary has."""
    names = (*END_TOKENS, facts.get("chat", {}).get("eos", ""))
    found = (tokenizer.special(name) for name in names if name)
    return sorted({token for token in found if token is not None})
