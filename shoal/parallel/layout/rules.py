"""Rules: named dimension -> mesh axis, for a whole model or for some of its modules."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from shoal.errors import UserError, unknown_name
from shoal.models.dimensions import Grain
from shoal.recipe.axes import AXES
from shoal.recipe.plan import DEFAULT_RULES

AXIS_OF_WORK = {"batch": ("data",), "layers": ("pipe",), "experts": ("expert",), "sequence": ("context", "tensor")}
# all other dimensions are of tensors inside of a layer
TENSOR = "tensor"


@dataclass(frozen=True)
class Rules:
    """What a plan says of the dimensions of one model, over the usual rules.

    A key is the name of a dimension, or ``module.dimension``: then it is for the weights of the modules whose name is
    or ends with ``module`` (or fits it as a pattern), and what flows between modules stays as the plain rule says."""

    given: Mapping[str, str]
    grains: Mapping[str, Grain]

    def axis(self, dimension: str, module: str = "") -> str:
        """The axis that splits a dimension, of a module's weights where one is named; "" for whole."""
        for key, axis in self.given.items() if module else ():
            pattern, _, name = key.rpartition(".")
            if name == dimension and pattern and fits(module, pattern):
                return axis
        names = [dimension]
        if dimension in self.grains and self.grains[dimension].follows:
            names.append(self.grains[dimension].follows)
        for rules in (self.given, DEFAULT_RULES):
            for name in names:
                if name in rules:
                    return rules[name]
        return ""

    def explicit(self, dimension: str, module: str = "") -> bool:
        """The plan itself says it: it is more than the usual rule."""
        return self.axis(dimension, module) != Rules({}, self.grains).axis(dimension)

    def check(self, dimensions: Iterable[str], modules: Iterable[str]) -> None:
        """Raises UserError for a dimension, axis or module that is not known, and for an axis that cannot split it."""
        known = {*dimensions, *DEFAULT_RULES, "sequence", "rows"}
        names = list(modules)
        for key, axis in self.given.items():
            module, _, dimension = key.rpartition(".")
            if dimension not in known:
                raise unknown_name("dimension", dimension, known, f"plan.rules.{key}")
            if axis and axis not in AXES:
                raise unknown_name("axis", axis, AXES, f"plan.rules.{key}")
            if module and not any(fits(name, module) for name in names):
                ends = {name.rpartition(".")[2] for name in names if name}
                raise unknown_name("module", module, ends, f"plan.rules.{key}")
            may = AXIS_OF_WORK.get(dimension, (TENSOR,))
            if axis and axis not in may:
                raise UserError(
                    f"plan.rules.{key} = {axis!r}: {dimension!r} cannot be split over axis {axis!r}: "
                    f"write {' or '.join(map(repr, may))}, or '' to keep it whole."
                )


def fits(module: str, pattern: str) -> bool:
    return module == pattern or module.endswith(f".{pattern}") or fnmatchcase(module, pattern)
