"""Start a model from the weights of a file or folder."""

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from shoal.errors import UserError
from shoal.models.bert import Bert
from shoal.models.dimensions import Named
from shoal.models.gpt import GPT
from shoal.models.huggingface import read_config
from shoal.models.huggingface_names import Renamed, links_of
from shoal.models.initial_values import Kept
from shoal.models.weights_file import StoredTensors

_BERT_HEADS = ("pooler.", "transform.", "transform_norm.", "vocab_bias", "classifier.", "span.")


class GivenWeights:
    """What a file holds for a model: looked through without reading it, and read tensor by tensor, or in part.

    Only heads may be new: those of a BERT, and layers whose number of classes differs. For a BERT or GPT the names are
    Hugging Face's or the model's own; for others the model's own. Raises UserError when anything else is missing or has
    another shape."""

    def __init__(self, model: nn.Module, path: Path) -> None:
        """``model`` may lie on the meta device."""
        if not path.exists():
            raise UserError(f"no file or folder {str(path)!r}: check model.weights.")
        self._given = given = _open(model, path)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
        there = set(given.names)
        self.new = tuple(
            name
            for name, shape in shapes.items()
            if name not in there or (_of_classes(model, name) and given.shape(name) != shape)
        )
        for name, shape in shapes.items():
            if name in self.new:
                if name not in there and not (isinstance(model, Bert) and name.startswith(_BERT_HEADS)):
                    raise UserError(f"{str(path)!r} does not hold {name!r}, which the model needs.")
            elif given.shape(name) != shape:
                raise UserError(
                    f"{name!r} has shape {list(given.shape(name))} in {str(path)!r} but {list(shape)} in the model: "
                    f"leave the sizes out of the recipe, or make them equal."
                )
        unplaced = sorted(there - set(shapes))
        if unplaced and not isinstance(model, Bert):  # a BERT's other heads are left out
            raise UserError(f"{str(path)!r} holds {unplaced[0]!r}, which the model has no place for.")
        self.names = set(shapes) - set(self.new)  # of the tensors that it gives

    def part(self, name: str, kept: Kept | None = None) -> Tensor:
        return self._given.part(name, kept or {})


def load_weights(model: nn.Module, path: Path) -> tuple[str, ...]:
    """Copy the weights into the model; returns the names that the file does not hold and that keep their values.

    Raises UserError as `GivenWeights` does."""
    given = GivenWeights(model, path)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in given.names:
                tensor.copy_(given.part(name))
    return given.new


class _Plain:
    """Under the model's own names."""

    def __init__(self, stored: StoredTensors) -> None:
        self._stored = stored
        self.names: Collection[str] = stored.keys()
        self.shape, self.part = stored.shape, stored.part


def _open(model: nn.Module, path: Path) -> Renamed | _Plain:
    if not isinstance(model, Bert | GPT):
        return _Plain(StoredTensors(path))
    kind, layers = "bert" if isinstance(model, Bert) else "gpt", model.config.layers
    if (path / "config.json").exists():
        config = read_config(path)
        if config.kind != kind:
            raise UserError(f"{str(path)!r} holds a {config.kind} model, not a {type(model).__name__}.")
        return Renamed(StoredTensors(path), links_of(kind, config.options["layers"]))
    stored = StoredTensors(path)
    return _Plain(stored) if set(stored) & set(model.state_dict()) else Renamed(stored, links_of(kind, layers))


def _of_classes(model: nn.Module, name: str) -> bool:
    return "classes" in (model.dimensions().get(name, ()) if isinstance(model, Named) else ())
