"""Start a model from the weights of a file or folder."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from shoal.errors import UserError
from shoal.models.bert import Bert
from shoal.models.dimensions import Named
from shoal.models.gpt import GPT
from shoal.models.huggingface import load_folder
from shoal.models.huggingface_names import bert_links, gpt_links, to_ours
from shoal.models.weights_file import read_tensors

_BERT_HEADS = ("pooler.", "transform.", "transform_norm.", "vocab_bias", "classifier.", "span.")


def load_weights(model: nn.Module, path: Path) -> tuple[str, ...]:
    """Copy the weights into the model; returns the names that the file does not hold and that keep their values.

    Only heads may be new: those of a BERT, and layers whose number of classes differs. For a BERT or GPT the names are
    Hugging Face's or the model's own; for others the model's own. Raises UserError when anything else is missing or has
    another shape."""
    if not path.exists():
        raise UserError(f"no file or folder {str(path)!r}: check model.weights.")
    given = _read(model, path)
    wanted = model.state_dict()
    new = tuple(name for name in wanted if name not in given or _other_classes(model, name, given))
    for name, tensor in wanted.items():
        if name in new:
            if name not in given and not (isinstance(model, Bert) and name.startswith(_BERT_HEADS)):
                raise UserError(f"{str(path)!r} does not hold {name!r}, which the model needs.")
        elif given[name].shape != tensor.shape:
            raise UserError(
                f"{name!r} has shape {list(given[name].shape)} in {str(path)!r} but {list(tensor.shape)} in the model: "
                f"leave the sizes out of the recipe, or make them equal."
            )
    unplaced = sorted(set(given) - set(wanted))
    if unplaced and not isinstance(model, Bert):  # a BERT's other heads are left out
        raise UserError(f"{str(path)!r} holds {unplaced[0]!r}, which the model has no place for.")
    with torch.no_grad():
        for name in set(wanted) - set(new):
            wanted[name].copy_(given[name])
    return new


def _read(model: nn.Module, path: Path) -> Mapping[str, Tensor]:
    if (path / "config.json").exists() and isinstance(model, Bert | GPT):
        folder = load_folder(path)
        if isinstance(model, Bert) != (folder.config.kind == "bert"):
            raise UserError(f"{str(path)!r} holds a {folder.config.kind} model, not a {type(model).__name__}.")
        return folder.state
    tensors = read_tensors(path)
    if isinstance(model, Bert | GPT) and not set(tensors) & set(model.state_dict()):
        layers = model.config.layers
        return to_ours(tensors, bert_links(layers) if isinstance(model, Bert) else gpt_links(layers))
    return tensors


def _other_classes(model: nn.Module, name: str, given: Mapping[str, Tensor]) -> bool:
    dims = model.dimensions().get(name, ()) if isinstance(model, Named) else ()
    return "classes" in dims and given[name].shape != model.get_parameter(name).shape
