"""The intake of each task."""

from collections.abc import Callable, Mapping
from typing import Any

from shoal.errors import UserError
from shoal.serve.intake.answers import Answers
from shoal.serve.intake.images import ImageClasses, NumberClasses
from shoal.serve.intake.task import Intake
from shoal.serve.intake.tensors import Tensors
from shoal.serve.intake.texts import TextClasses, Vectors


def open_intake(facts: Mapping[str, Any], most_rows: int) -> Intake | None:
    """None for text generation, which has routes of its own. Raises UserError when a text task has no tokeniser."""
    task = facts["task"]
    if task == "text-generation":
        return None
    texts: dict[str, Callable[[Mapping[str, Any]], Intake]] = {
        "sequence-classification": TextClasses,
        "embeddings": Vectors,
        "question-answering": Answers,
    }
    if task in texts:
        if "tokenizer" not in facts:
            raise UserError(f"{facts['source']!r} has no tokenizer.json: put it there, or serve it as --task tensors.")
        return texts[task](facts)
    if task == "image-classification":
        return ImageClasses(facts)
    return NumberClasses(facts) if task == "classification" else Tensors(facts, most_rows)
