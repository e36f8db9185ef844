"""Tensors in safetensors files: one file, or several with an index, as Hugging Face folders hold them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from shoal.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError when the file is missing or holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no file {str(path)!r}: check the path.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {str(path)!r}: {error}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{str(path)!r} must hold a JSON object.")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or of the one or several in a folder.

    Raises UserError when there is none, when one is corrupt, or when the index names a tensor that is not there."""
    if not path.is_dir():
        return _read_file(path)
    if (path / SINGLE).exists():
        return _read_file(path / SINGLE)
    if not (path / INDEX).exists():
        pickled = next(iter(sorted(path.glob("*.bin"))), None)
        why = f" ({pickled.name} is a pickle, which may run code: convert it first)" if pickled else ""
        raise UserError(f"no {SINGLE} in {str(path)!r}{why}.")
    places = read_json(path / INDEX).get("weight_map")
    if not isinstance(places, dict):
        raise UserError(f"{str(path / INDEX)!r} has no weight_map.")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise UserError(f"{str(path / INDEX)!r} names {name!r}, which is not a file of the folder.")
        tensors.update(_read_file(path / name))
    missing = sorted(set(places) - set(tensors))
    if missing:
        raise UserError(f"{str(path / INDEX)!r} names {missing[0]!r}, which is in none of its files.")
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"no file {str(path)!r}: check the path.") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{str(path)!r} is not a whole safetensors file: {error}.") from None


def write_tensors(tensors: Mapping[str, Tensor], folder: Path, shard_bytes: int) -> None:
    """Write model.safetensors, or several files of at most ``shard_bytes`` (or one tensor) with an index.

    The tensors must be contiguous and must not share memory."""
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / SINGLE, {"format": "pt"})
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        places |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
