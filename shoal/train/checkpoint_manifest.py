"""The manifest of a checkpoint: what its files must hold, hash by hash. Pure: bytes to a Manifest and back."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal.errors import ShoalError, UserError
from shoal.recipe.typed import from_mapping, to_mapping

FORMAT, SCHEMA = "shoal checkpoint", 1
LIMIT_BYTES = 64 << 20  # of the manifest itself: about 250 000 tensors
ITEM_BYTES = {  # the safetensors format's names of the dtypes
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_HEX_64 = re.compile(r"[0-9a-f]{64}")
_NO_HASH = "0" * 64


class CheckpointError(ShoalError):
    """A checkpoint cannot be written, or is not what was written: says which file and what is wrong."""


@dataclass(frozen=True)
class StoredFile:
    name: str
    bytes: int
    sha256: tuple[str, ...]  # of each chunk of Manifest.chunk_bytes; the last chunk may be shorter


@dataclass(frozen=True)
class StoredTensor:
    file: str
    dtype: str  # a key of ITEM_BYTES
    shape: tuple[int, ...]
    start: int  # first byte in the file, counted from the file's beginning
    end: int  # one past the last byte


@dataclass(frozen=True)
class Manifest:
    facts: Mapping[str, Any]
    best: bool  # the best so far when it was written: the newest with this mark is the best
    saved_at: float  # seconds since 1970
    chunk_bytes: int
    files: tuple[StoredFile, ...]
    tensors: Mapping[str, StoredTensor]

    @property
    def bytes(self) -> int:
        """Of all files beside the manifest."""
        return sum(file.bytes for file in self.files)

    def hit(self, file: str, start: int, end: int) -> list[str]:
        """Names of the tensors that share a byte with ``file[start:end]``, in file order."""
        inside = [(t.start, name) for name, t in self.tensors.items() if t.file == file and t.start < end]
        return [name for _, name in sorted(inside) if self.tensors[name].end > start]


def plain_facts(value: Any, key: str = "facts") -> Any:
    """``value`` as JSON gives it back: mappings with text keys, lists, text, finite numbers, booleans and None.

    Raises CheckpointError naming the first key that JSON cannot carry, rather than let it change on the way."""
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise CheckpointError(f"checkpoint: the keys of {key} must be text, got {name!r}.")
        return {name: plain_facts(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_facts(item, f"{key}[{index}]") for index, item in enumerate(value)]
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise CheckpointError(
        f"checkpoint: {key} is {value!r}, which JSON cannot hold: use a finite number, text or a list."
    )


def encode(manifest: Manifest) -> bytes:
    """JSON with ``manifest_sha256``: the SHA-256 of the whole file's bytes with that field's 64 digits set to zeros.

    Raises CheckpointError for facts that JSON cannot hold and for a manifest over LIMIT_BYTES."""
    body = {**to_mapping(manifest), "facts": plain_facts(manifest.facts)}
    fields = {"format": FORMAT, "schema": SCHEMA, "manifest_sha256": _NO_HASH, **body}
    lines = (f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in fields.items())
    raw = ("{\n" + ",\n".join(lines) + "\n}\n").encode()  # one field a line: quick to write, and can still be read
    if len(raw) > LIMIT_BYTES:
        raise CheckpointError(f"checkpoint: the manifest takes {len(raw)} bytes, the limit is {LIMIT_BYTES}.")
    return raw.replace(_NO_HASH.encode(), hashlib.sha256(raw).hexdigest().encode(), 1)


def decode(raw: bytes) -> Manifest:
    """The manifest, with every relation inside it checked. Raises CheckpointError saying what is wrong."""
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not JSON ({error})") from None
    if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
        raise CheckpointError("is not a checkpoint's manifest")
    if (schema := fields.pop("schema", None)) != SCHEMA:
        raise CheckpointError(f"has schema {schema!r}, this version of shoal reads {SCHEMA}")
    said = fields.pop("manifest_sha256", None)
    if not isinstance(said, str) or not _HEX_64.fullmatch(said) or raw.count(said.encode()) != 1:
        raise CheckpointError("has no proper manifest_sha256")
    if hashlib.sha256(raw.replace(said.encode(), _NO_HASH.encode())).hexdigest() != said:
        raise CheckpointError("does not match its own manifest_sha256: it was changed or damaged")
    try:
        manifest = from_mapping(Manifest, fields)
    except (UserError, TypeError) as error:
        raise CheckpointError(f"has a wrong field: {error}") from None
    _check(manifest)
    return manifest


def _check(manifest: Manifest) -> None:
    step = manifest.facts.get("step")
    if not isinstance(step, int) or step < 0:
        raise CheckpointError(f"has step {step!r} among its facts")
    sizes: dict[str, int] = {}
    if manifest.chunk_bytes < 1:
        raise CheckpointError(f"has chunk_bytes {manifest.chunk_bytes}")
    for file in manifest.files:
        if not _PLAIN_NAME.fullmatch(file.name) or file.name in sizes:
            raise CheckpointError(f"names a file {file.name!r}: file names must be plain, without folders, and differ")
        if file.bytes < 0 or len(file.sha256) != -(-file.bytes // manifest.chunk_bytes):
            raise CheckpointError(f"has {len(file.sha256)} chunk hashes for {file.name} of {file.bytes} bytes")
        sizes[file.name] = file.bytes
    for name, tensor in manifest.tensors.items():
        item = ITEM_BYTES.get(tensor.dtype)
        if item is None:
            raise CheckpointError(f"gives {name!r} the unknown dtype {tensor.dtype!r}")
        whole = min(tensor.shape, default=0) >= 0 and math.prod(tensor.shape) * item == tensor.end - tensor.start
        inside = 0 <= tensor.start <= tensor.end <= sizes.get(tensor.file, -1) and tensor.start % item == 0
        if not whole or not inside:
            raise CheckpointError(f"places {name!r} at bytes {tensor.start}-{tensor.end} of {tensor.file!r}: it cannot")
