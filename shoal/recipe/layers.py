"""Effective values and where each came from: defaults < preset < recipe file < flags.

What the machine has and what a launcher said is handed in; apart from reading the named files, all here is pure."""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_origin

from shoal.errors import UserError
from shoal.recipe import presets
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe
from shoal.recipe.typed import (
    T,
    convert_key,
    dotted_keys,
    flatten,
    from_mapping,
    hint_of,
    read_toml,
    to_mapping,
    unflatten,
    unknown_key,
)

Origins = dict[str, str]  # dotted key -> "default", "preset gpt-stdlib", "file x.toml", "flag --steps", "detected", ...

CHOOSERS = {"model": "kind", "data": "source", "optimizer": "name"}  # table -> key that gives its options their meaning
EXCLUSIVE = (("steps", "epochs"), ("mesh.data", "placement"))  # setting one unsets the other in the layers below
NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Layer:
    """Values by dotted key, and where they came from: all from ``origin``, but for those that ``origins`` names."""

    values: Mapping[str, Any]
    origin: str
    origins: Mapping[str, str] = field(default_factory=dict)

    def origin_of(self, key: str) -> str:
        return self.origins.get(key, self.origin)


def file_layer(path: Path) -> Layer:
    """Raises UserError when the file is missing or is not TOML."""
    return Layer(flatten(read_toml(path)), f"file {path}")


def preset_layer(name: str) -> Layer:
    """Raises UserError with the nearest name when there is no such preset."""
    return Layer(flatten(presets.load(name)), f"preset {name}")


def flag_layer(flags: Mapping[str, Any], spelt: Mapping[str, str]) -> Layer:
    """``spelt`` tells how the user wrote the flag of a key; a key that is not in it came through ``--set``."""
    return Layer(flatten(flags), "flag --set", {key: f"flag {flag}" for key, flag in spelt.items()})


def saved_layer(value: Recipe | Plan, origins: Mapping[str, str]) -> Layer:
    """The values of a run that goes on, with the origins that it wrote down."""
    return Layer(flatten(to_mapping(value)), "run", origins)


def stack(layers: Iterable[Layer]) -> Layer:
    """Lay each layer over those before it.

    A layer that sets steps unsets epochs below it (and the other way round), and one that chooses another model kind,
    data source or optimiser takes away the options that were meant for the old one."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer in layers:
        for key in _displaced(values, layer.values):
            values.pop(key, None)
        values.update(layer.values)
        origins.update({key: layer.origin_of(key) for key in layer.values})
    return Layer(values, "default", {key: origins[key] for key in values})


def _displaced(below: Mapping[str, Any], above: Mapping[str, Any]) -> set[str]:
    gone = {
        other
        for pair in EXCLUSIVE
        for one, other in (pair, pair[::-1])
        if above.get(one) and not above.get(other)  # both in one layer stay, for the Recipe to refuse
    }
    if any(key.startswith("mesh.") for key in above):  # a mesh is one value: its axes are not mixed with another's
        gone |= {key for key in below if key.startswith("mesh.")}
        gone |= {"placement"} - set(above)
    named = set(dotted_keys(Recipe))
    for table, chooser in CHOOSERS.items():
        key = f"{table}.{chooser}"
        if key in above and key in below and above[key] != below[key]:
            gone |= {option for option in below if option.startswith(f"{table}.") and option not in named}
    return gone


def build(cls: type[T], layers: Iterable[Layer]) -> tuple[T, Origins]:
    """The dataclass from the stacked layers, and the origin of every effective value by dotted key.

    Raises UserError naming the layer in which a key is unknown or of the wrong type."""
    whole = stack(_checked(cls, layer) for layer in layers)
    value = from_mapping(cls, unflatten(whole.values))
    return value, {key: whole.origin_of(key) for key in flatten(to_mapping(value))}


def _checked(cls: type, layer: Layer) -> Layer:
    """Raises UserError where a value cannot be what its key asks for, or a key belongs to the other kind of file."""
    other, this, that = (Plan, "recipe", "plan") if cls is Recipe else (Recipe, "plan", "recipe")
    for key in layer.values:
        if key.split(".")[0] in {f.name for f in fields(other)}:
            raise UserError(
                f"key {key!r} in {layer.origin_of(key)} belongs to a {that}, not to a {this}: a plan's file is given "
                f"by --plan, a recipe's by its name alone."
            )
    values = {key: convert_key(cls, key, value, layer.origin_of(key)) for key, value in layer.values.items()}
    return replace(layer, values=values)


def assemble(
    recipe_file: Path | None = None,
    preset: str | None = None,
    flags: Mapping[str, Any] = NOTHING,
    *,
    spelt: Mapping[str, str] = NOTHING,
    saved: Layer | None = None,
) -> tuple[Recipe, Origins]:
    """The recipe that a command means, and the origin of every value.

    A recipe file stands alone over the defaults: which preset to take where neither is named is the caller's choice.
    ``saved`` is the recipe of a run that goes on. Raises UserError naming the layer and the key."""
    layers = [saved] if saved else []
    if preset:
        layers.append(preset_layer(preset))
    if recipe_file:
        layers.append(file_layer(recipe_file))
    return build(Recipe, [*layers, flag_layer(flags, spelt)])


def assemble_plan(
    plan_file: Path | None = None,
    flags: Mapping[str, Any] = NOTHING,
    *,
    shards: int,
    cores: int,
    world_size: int | None = None,
    spelt: Mapping[str, str] = NOTHING,
    saved: Layer | None = None,
) -> tuple[Plan, Origins]:
    """The plan that a command means, and the origin of every value.

    Where no layer gives the number of workers: as many as torchrun started (``world_size``), else one a core, at most
    one a shard. Raises UserError, also when the workers do not fit the shards or what torchrun started."""
    layers = [saved] if saved else []
    if plan_file:
        layers.append(file_layer(plan_file))
    given = stack(_checked(Plan, layer) for layer in [*layers, flag_layer(flags, spelt)])
    plan, origins = build(Plan, [_with_workers(given, shards, cores, world_size)])
    if world_size is not None and plan.workers != world_size:
        raise UserError(
            f"{plan.workers} workers ({mesh_origin(origins)}), but torchrun started {world_size}: leave the number out."
        )
    plan.owned(shards)
    return plan, origins


def mesh_origin(origins: Origins) -> str:
    return next(origin for key, origin in origins.items() if key.startswith("mesh."))


def _with_workers(given: Layer, shards: int, cores: int, world_size: int | None) -> Layer:
    if any(key.split(".")[0] == "mesh" for key in given.values):
        return given
    if given.values.get("placement"):
        workers, origin = len(given.values["placement"]), given.origin_of("placement")
    elif world_size is not None:
        workers, origin = world_size, "torchrun"
    else:
        workers, origin = max(1, min(cores, shards)), "detected"
    return Layer({**given.values, "mesh.data": workers}, given.origin, {**given.origins, "mesh.data": origin})


def owner(key: str, where: str) -> type[Recipe] | type[Plan]:
    """Whether a dotted key is the recipe's or the plan's: no key is both. Raises UserError with the nearest key."""
    for cls in (Recipe, Plan):
        if key.split(".")[0] in {f.name for f in fields(cls)}:
            return cls
    raise unknown_key(key, _settable(), where)


def keys_named(name: str) -> list[str]:
    """Dotted keys that somebody may mean who says this: "layers" -> ["model.layers"], "model" -> ["model.kind"]."""
    if name in CHOOSERS:
        return [f"{name}.{CHOOSERS[name]}"]
    return sorted({key for key in _settable() if name in (key, key.rpartition(".")[2])})


def _settable() -> list[str]:
    of_presets = [option for name in presets.names() for option in flatten(presets.load(name))]  # model.layers, ...
    return [*dotted_keys(Recipe), *dotted_keys(Plan), *of_presets]


def parse_setting(text: str) -> tuple[str, Any]:
    """ "model.layers=6" -> ("model.layers", 6): TOML's notation for the value; a bare word is text, or, where the key
    takes a list, a list of what its commas part ("pipeline.cuts=blocks.2,head").

    Raises UserError when there is no "=", or the nearest key when there is no such key."""
    key, equals, written = text.partition("=")
    key, written = key.strip(), written.strip()
    if not equals or not key:
        raise UserError(f"--set {text!r}: write it as key=value, such as --set model.layers=6.")
    hint = hint_of(owner(key, "--set"), key, "--set")
    wants_text = hint is str
    try:
        parsed = tomllib.loads(f"value = {written}")
    except tomllib.TOMLDecodeError:
        if get_origin(hint) is tuple and not set("[]'\"") & set(written):
            return key, [part.strip() for part in written.split(",")]
        return key, written
    if list(parsed) != ["value"] or (wants_text and not isinstance(parsed["value"], str)):
        return key, written  # a path such as 2024 is text, though TOML would read a number
    return key, parsed["value"]
