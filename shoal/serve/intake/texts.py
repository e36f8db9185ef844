"""Texts: cut into tokens as in training, framed by the start token and the separator."""

from array import array as machine_array
from collections.abc import Mapping, Sequence
from typing import Any

from shoal.data.tokenizer import from_description
from shoal.errors import UserError
from shoal.serve.http.messages import HttpError
from shoal.serve.intake.task import Classes, field, several
from shoal.serve.intake.words import ID_BYTES, Words, stands_alone
from shoal.serve.payloads import Array, Inputs, Outputs

NAMES = "text", "input", "inputs"  # of one field: who asks may call it as they are used to
CHARACTERS_A_TOKEN = 64  # what of a text lies beyond so many for each token of the context is not even tokenised


class Texts:
    """Text to tokens. Longer text than the context is cut, as it was in training."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.tokenizer = from_description(facts["tokenizer"])
        self.context = int(facts["context"])
        self.start = int(facts["start"])
        self.separator = int(facts["separator"])
        self.vocab = int(facts["vocab"])
        self._words = Words(self.tokenizer) if stands_alone(self.tokenizer) else None
        self._frame = machine_array("i", [self.start]).tobytes(), machine_array("i", [self.separator]).tobytes()

    def framed(self, text: str) -> Inputs:
        text = text[: CHARACTERS_A_TOKEN * self.context]
        first, last = self._frame
        try:
            ids = self._words.ids(text) if self._words else machine_array("i", self.tokenizer.encode(text)).tobytes()
        except UserError as error:  # a character that the tokeniser does not know
            raise HttpError(400, str(error), param="text") from None
        return self._inputs(first + ids[: ID_BYTES * (self.context - 2)] + last)

    def from_ids(self, ids: Sequence[int]) -> Inputs:
        return self._inputs(machine_array("i", ids).tobytes())

    def _inputs(self, ids: bytes) -> Inputs:
        length = len(ids) // ID_BYTES
        return Inputs(1, length, {"tokens": Array("int32", (1, length), ids)})


class TextClasses(Classes):
    _TEXTS: Mapping[str, Any] = {
        "oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]
    }
    fields: Mapping[str, Any] = {"text": _TEXTS, "input": _TEXTS, "inputs": _TEXTS}
    alternatives: tuple[tuple[str, ...], ...] = tuple((name,) for name in NAMES)
    example: Mapping[str, Any] = {"text": "a line of text"}

    def __init__(self, facts: Mapping[str, Any]) -> None:
        super().__init__(facts.get("labels", ()))
        self._texts = Texts(facts)

    def read(self, body: Mapping[str, Any]) -> list[Any]:
        name, value = field(body, NAMES)
        return several(value, str, name)

    def inputs(self, sample: Any) -> list[Inputs]:
        return [self._texts.framed(sample)]


class Vectors:
    alternatives = TextClasses.alternatives
    example: Mapping[str, Any] = TextClasses.example

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._texts = Texts(facts)
        id = {"type": "integer", "minimum": 0, "exclusiveMaximum": self._texts.vocab}
        ids = {"type": "array", "items": id, "minItems": 1, "maxItems": self._texts.context}
        several = {"type": "array", "items": {"anyOf": [{"type": "string"}, ids]}, "minItems": 1}
        self.fields: Mapping[str, Any] = {name: {"anyOf": [{"type": "string"}, several, ids]} for name in NAMES}

    def read(self, body: Mapping[str, Any]) -> list[Any]:
        """Strings, or lists of token ids as OpenAI's clients may send them."""
        name, value = field(body, NAMES)
        if isinstance(value, list) and value and isinstance(value[0], int | float):
            value = [value]
        return [one if isinstance(one, str) else self._ids(one) for one in several(value, (str, list), name)]

    def _ids(self, given: list[Any]) -> list[int]:
        ids = [int(id) if isinstance(id, float) and id.is_integer() else id for id in given]  # JSON's 7.0 is whole
        if not 1 <= len(ids) <= self._texts.context:
            raise HttpError(400, f"{len(ids)} tokens: between 1 and {self._texts.context} fit the model", param="input")
        if not all(type(id) is int and 0 <= id < self._texts.vocab for id in ids):
            raise HttpError(400, f"token ids must be whole numbers below {self._texts.vocab}", param="input")
        return ids

    def inputs(self, sample: Any) -> list[Inputs]:
        return [self._texts.framed(sample) if isinstance(sample, str) else self._texts.from_ids(sample)]

    def prediction(self, sample: Any, outputs: Sequence[Outputs]) -> Any:
        return memoryview(outputs[0].arrays["vectors"].data).cast("f").tolist()
