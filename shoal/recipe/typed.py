"""Frozen dataclasses to and from plain mappings and TOML: typed, with the nearest name for an unknown key.

A field with metadata ``{"rest": True}`` (a mapping) takes the keys that the dataclass itself does not name, so that
``[model] layers = 6`` can stand beside ``kind = "gpt"``; whoever knows that kind checks them later.
"""

import dataclasses
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from shoal.errors import UserError, unknown_name

T = TypeVar("T")


def _rest_field(cls: type) -> str | None:
    return next((f.name for f in dataclasses.fields(cls) if f.metadata.get("rest")), None)


def from_mapping(cls: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass ``cls`` from nested plain values.

    Raises UserError, naming the dotted key and ``where`` it stood, for an unknown key or a value of the wrong type."""
    return _build(cls, mapping, where, "")


def _build(cls: type[T], mapping: Mapping[str, Any], where: str, prefix: str) -> T:
    if not isinstance(mapping, Mapping):
        raise UserError(f"{_at(prefix, where)} must be a table, got {mapping!r}.")
    rest_name = _rest_field(cls)
    names = {f.name for f in dataclasses.fields(cls) if f.init} - {rest_name}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, value in mapping.items():
        if key in names:
            values[key] = _convert(hints[key], value, where, f"{prefix}{key}")
        elif key == rest_name and isinstance(value, Mapping):
            raise UserError(f"{_at(prefix + key, where)} is not a table: write its keys under {prefix[:-1]!r}.")
        elif rest_name:
            rest[key] = value
        else:
            raise unknown_key(f"{prefix}{key}", [f"{prefix}{n}" for n in sorted(names)], where)
    if rest_name:
        values[rest_name] = rest
    lacking = [f.name for f in dataclasses.fields(cls) if f.init and f.name not in values and _is_required(f)]  # type: ignore[arg-type]
    if lacking:
        raise UserError(f"{_at(prefix, where)} lacks {', '.join(lacking)}.")
    return cls(**values)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def hint_of(cls: type, key: str, where: str = "") -> Any:
    """The declared type of a dotted key; ``Any`` for a key that only its kind knows (see ``rest`` above).

    Raises UserError with the nearest key when there is none."""
    hint: Any = cls
    for part in key.split("."):
        origin = typing.get_origin(hint)
        if hint is Any:
            return hint
        if dataclasses.is_dataclass(hint):
            names = {f.name for f in dataclasses.fields(hint) if f.init and not f.metadata.get("rest")}
            if part not in names and not _rest_field(hint):  # type: ignore[arg-type]
                raise unknown_key(key, dotted_keys(cls), where)
            hint = typing.get_type_hints(hint)[part] if part in names else Any
        elif isinstance(origin, type) and issubclass(origin, Mapping):
            hint = typing.get_args(hint)[1]
            if _is_leaf(hint):
                return hint  # the rest of the key is one name, dots and all: rules.up.ffn
        else:
            raise UserError(f"{_at(key, where)}: {key.rpartition('.')[0]!r} is a value, not a table.")
    return hint


def _is_leaf(hint: Any) -> bool:
    origin = typing.get_origin(hint)
    nests = dataclasses.is_dataclass(hint) or (isinstance(origin, type) and issubclass(origin, Mapping))
    return hint is not Any and not nests


def dotted_keys(cls: type) -> list[str]:
    """Every key that the dataclass and those inside it name."""
    hints = typing.get_type_hints(cls)
    keys: list[str] = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            keys += [f"{field.name}.{key}" for key in dotted_keys(hint)]  # type: ignore[arg-type]
        elif not field.metadata.get("rest"):
            keys.append(field.name)
    return keys


def unknown_key(key: str, known: Iterable[str], where: str = "") -> UserError:
    """As ``unknown_name``, but it also knows a key without its table (lr) and the beginning of a key, and where the
    table is right and nothing in it is near, it says what the table has."""
    known = list(known)
    said = f"unknown key {key!r}{f' in {where}' if where else ''}"
    near = [k for k in known if k.rpartition(".")[2] == key or k.startswith(key)]
    if near:
        return UserError(f"{said}: did you mean {near[0]!r}?")
    table, dot, name = key.rpartition(".")
    inside = [k.removeprefix(table + dot) for k in known if dot and k.startswith(table + dot)]
    if inside and not get_close_matches(name, inside, n=1, cutoff=0.5):
        return UserError(f"{said}: known in {table}: {', '.join(sorted(inside))}.")
    return unknown_name("key", key, known, where)


def convert_key(cls: type, key: str, value: Any, where: str = "") -> Any:
    """``value`` as the type that ``cls`` declares for the dotted key. Raises UserError, as ``from_mapping``."""
    return _convert(hint_of(cls, key, where), value, where, key)


def _at(key: str, where: str) -> str:
    return f"{key.rstrip('.') or 'the file'!r}{f' in {where}' if where else ''}"


def _convert(hint: Any, value: Any, where: str, key: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else _build(hint, value, where, f"{key}.")  # type: ignore[arg-type]
    if origin is typing.Literal:
        if value not in args:
            raise unknown_name(f"value for {key}", str(value), [str(a) for a in args], where)
        return value
    if origin in (typing.Union, types.UnionType):
        for arm in args:
            try:
                return _convert(arm, value, where, key)
            except UserError:
                continue
    elif origin is tuple and isinstance(value, list | tuple):
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(args[0], v, where, f"{key}[{i}]") for i, v in enumerate(value))
        if len(args) == len(value):
            return tuple(_convert(a, v, where, f"{key}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    elif isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        if _is_leaf(args[1]):
            value = flatten(value)  # dots belong to the names
        return {str(k): _convert(args[1], v, where, f"{key}.{k}") for k, v in value.items()}
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint is int and isinstance(value, bool):
        pass
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    raise UserError(f"{_at(key, where)} must be {_name(hint)}, got {value!r}.")


def _name(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "nothing"}
    return words.get(hint, str(hint).replace("typing.", "").replace("collections.abc.", ""))


def to_mapping(value: Any) -> Any:
    """The plain nested mapping that ``from_mapping`` reads back; ``None`` values are left out (TOML has none)."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out: dict[str, Any] = {}
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            if field.metadata.get("rest"):
                out.update({k: to_mapping(v) for k, v in item.items()})
            elif item is not None:
                out[field.name] = to_mapping(item)
        return out
    if isinstance(value, Mapping):
        return {str(k): to_mapping(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_mapping(v) for v in value]
    return value


def read_toml(path: Path) -> dict[str, Any]:
    """Raises UserError when the file is missing or is not TOML, naming the line."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no file {str(path)!r}: check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {str(path)!r}: {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{str(path)!r} is not valid TOML: {error}.") from None


def to_toml(value: Any) -> str:
    import tomli_w

    return tomli_w.dumps(to_mapping(value))


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``: the dotted keys that flags and origins use."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``flatten``. Raises UserError when a key is used both as a value and as a table."""
    nested: dict[str, Any] = {}
    for dotted, value in flat.items():
        *tables, leaf = dotted.split(".")
        place = nested
        for table in tables:
            place = place.setdefault(table, {})
            if not isinstance(place, dict):
                raise UserError(f"{dotted!r}: {table!r} is a value, not a table.")
        place[leaf] = value
    return nested
