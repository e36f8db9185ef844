"""Tensors in safetensors files: one file, or several with an index, as Hugging Face folders hold them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.errors import UserError
from shoal.models.initial_values import Kept

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


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, or of the one or several in a folder, mapped: each is read when it is asked
    for, whole or in part.

    Raises UserError when there is none, when one is corrupt, or when the index names a tensor that is not there."""

    def __init__(self, path: Path) -> None:
        self._files: dict[str, Any] = {}
        for file, named in _files_of(path):
            opened = _open(file)
            self._files |= dict.fromkeys(opened.keys(), opened)
            missing = sorted(named - set(opened.keys()))
            if missing:
                raise UserError(f"{str(path / INDEX)!r} names {missing[0]!r}, which is not in {file.name!r}.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def part(self, name: str, kept: Kept) -> Tensor:
        """The places that are kept, one run after the other; nothing else is read."""
        place = self._files[name].get_slice(name)
        return self._runs(place, (), len(place.get_shape()), kept) if kept else self[name]

    def _runs(self, place: Any, chosen: tuple[slice, ...], dims: int, kept: Kept) -> Tensor:
        dim = len(chosen)
        if dim == dims:
            tensor: Tensor = place[chosen]
            return tensor
        if dim not in kept:
            return self._runs(place, (*chosen, slice(None)), dims, kept)
        return torch.cat([self._runs(place, (*chosen, slice(a, b)), dims, kept) for a, b in kept[dim]], dim)


def _files_of(path: Path) -> list[tuple[Path, set[str]]]:
    """Each file, and the tensors that an index says are in it."""
    if not path.is_dir():
        return [(path, set())]
    if (path / SINGLE).exists():
        return [(path / SINGLE, set())]
    if not (path / INDEX).exists():
        pickled = next(iter(sorted(path.glob("*.bin"))), None)
        why = f" ({pickled.name} is a pickle, which may run code: convert it first)" if pickled else ""
        raise UserError(f"no {SINGLE} in {str(path)!r}{why}.")
    places = read_json(path / INDEX).get("weight_map")
    if not isinstance(places, dict):
        raise UserError(f"{str(path / INDEX)!r} has no weight_map.")
    found: dict[str, set[str]] = {}
    for name, file in places.items():
        if Path(file).name != file:
            raise UserError(f"{str(path / INDEX)!r} names {file!r}, which is not a file of the folder.")
        found.setdefault(file, set()).add(name)
    return [(path / file, named) for file, named in sorted(found.items())]


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
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
