"""What a generation is asked for, and what is told of it: the payloads of kind "generate" of shoal/serve/engine.py."""

import msgspec

MOST_CHOICES = 128
MOST_LOGPROBS = 20


class Ask(msgspec.Struct, array_like=True, frozen=True):
    """The payload of a Request. `shoal.serve.generation.checks.problem` says what may be in it."""

    tokens: list[int]  # the prompt
    most: int  # new tokens
    choices: int = 1  # how many answers
    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int = 0  # draw among so many likeliest; 0: among all
    top_p: float = 1.0  # draw among the likeliest that together have this probability (Holtzman et al., 2020)
    min_p: float = 0.0  # draw among those of at least this share of the likeliest one's probability
    seed: int = 0  # with the number of the choice and of the token, it decides every draw
    repetition: float = 1.0  # divides positive and multiplies negative logits of tokens seen (Keskar et al., 2019)
    frequency: float = 0.0  # taken off a token's logit for each time that it was generated
    presence: float = 0.0  # taken off the logit of each token that was generated
    bias: dict[int, float] = {}  # added to the logits of tokens
    logprobs: int = -1  # how many of the likeliest tokens to tell with each token; -1: no log-probabilities at all
    ends: list[int] = []  # tokens that end the answer; they are part of it
    least: int = 0  # new tokens before one of ``ends`` may come
    beams: int = 0  # above 0: beam search, the ``choices`` best of so many beams
    length_penalty: float = 1.0  # a beam's score is its log-probability / length ** this
    early: bool = False  # end as soon as ``beams`` answers have ended


class Scored(msgspec.Struct, array_like=True, frozen=True):
    """The log-probability of a token under the model: before penalties, bias and temperature."""

    logprob: float
    likeliest: list[tuple[int, float]]


class Piece(msgspec.Struct, array_like=True, frozen=True):
    """What was added to one answer. The payload of an Item is a list of them, at most one of each choice."""

    choice: int
    tokens: list[int]
    scores: list[Scored] | None = None  # as many as tokens
    reason: str = ""  # why the answer ends with these: "stop" (one of ``ends``) or "length"


class Outcome(msgspec.Struct, array_like=True, frozen=True):
    """The payload of the Result, after all items."""

    prompt: int  # tokens
    reused: int  # of them, found in the cache
    generated: int  # in all choices
    scores: list[float] = []  # of beam search: of each choice
