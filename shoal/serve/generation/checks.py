"""What a generation may be asked for."""

import math

from shoal.serve.generation.messages import MOST_CHOICES, MOST_LOGPROBS, Ask


def problem(ask: Ask, vocab: int, context: int) -> str:
    """One line that says what is wrong, by the names of the fields of `Ask`; "" when nothing is."""
    numbers = (
        *(ask.temperature, ask.top_p, ask.min_p, ask.repetition, ask.frequency, ask.presence, ask.length_penalty),
        *ask.bias.values(),
    )
    if not all(map(math.isfinite, numbers)):
        return "every number must be finite"
    if not ask.tokens:
        return "the prompt is empty: give at least one token"
    if not all(0 <= token < vocab for token in ask.tokens):
        return f"the prompt has token {next(t for t in ask.tokens if not 0 <= t < vocab)}: ids are 0 to {vocab - 1}"
    if any(not 0 <= token < vocab for token in (*ask.bias, *ask.ends)):
        return f"bias and ends name tokens 0 to {vocab - 1}"
    if ask.most < 1:
        return f"at least one new token must be asked for, got {ask.most}"
    if len(ask.tokens) >= context:
        return f"the prompt's {len(ask.tokens)} tokens leave no room in the context of {context}: shorten it"
    if len(ask.tokens) + ask.most > context:
        return (
            f"the prompt's {len(ask.tokens)} tokens and {ask.most} new ones do not fit the context of {context}: "
            f"ask for at most {context - len(ask.tokens)} new ones"
        )
    for name, low, high in (
        ("temperature", 0.0, 100.0),
        ("top_p", 0.0, 1.0),
        ("min_p", 0.0, 1.0),
        ("frequency", -100.0, 100.0),
        ("presence", -100.0, 100.0),
        ("repetition", 0.01, 100.0),
        ("top_k", 0, vocab),
        ("choices", 1, MOST_CHOICES),
        ("logprobs", -1, MOST_LOGPROBS),
        ("least", 0, ask.most),
        ("beams", 0, MOST_CHOICES),
    ):
        value = getattr(ask, name)
        if not low <= value <= high:
            return f"{name} = {value} is not from {low} to {high}"
    if ask.beams and ask.beams < ask.choices:
        return f"{ask.choices} choices cannot come from {ask.beams} beams"
    return ""
