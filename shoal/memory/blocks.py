"""Which modules of a model are recomputed, or brought in from elsewhere, as one."""

from fnmatch import fnmatchcase

from torch import nn

from shoal.errors import UserError, unknown_name


def find_blocks(module: nn.Module, patterns: tuple[str, ...] = ()) -> dict[str, nn.Module]:
    """The blocks by name, none inside of another: those that ``patterns`` match, or the items of the model's lists of
    layers and its recurrent layers.

    Raises UserError for a pattern that matches nothing, and where there is no list to be found."""
    if patterns:
        return _matching(module, patterns)
    blocks: dict[str, nn.Module] = {}
    _collect(module, "", isinstance(module, nn.Sequential | nn.ModuleList), blocks)
    return blocks


def _collect(module: nn.Module, prefix: str, is_list: bool, blocks: dict[str, nn.Module]) -> None:
    for name, child in module.named_children():
        nested = isinstance(child, nn.Sequential | nn.ModuleList)
        if any(child is other for other in blocks.values()):
            continue  # a layer that is used twice
        if isinstance(child, nn.RNNBase) or (is_list and not nested and any(True for _ in child.parameters())):
            blocks[prefix + name] = child
        else:
            _collect(child, f"{prefix}{name}.", nested, blocks)


def _matching(module: nn.Module, patterns: tuple[str, ...]) -> dict[str, nn.Module]:
    names = [name for name, _ in module.named_modules() if name]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise unknown_name("module", pattern, names, "plan.memory.blocks")
    chosen: dict[str, nn.Module] = {}
    for name, child in module.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in chosen)
        if name and not inside and any(fnmatchcase(name, pattern) for pattern in patterns):
            if isinstance(child, nn.ModuleList | nn.ModuleDict):
                raise UserError(
                    f"plan.memory.blocks names {name!r}, a list that is never called: name its items, '{name}.*'."
                )
            chosen[name] = child
    return chosen
