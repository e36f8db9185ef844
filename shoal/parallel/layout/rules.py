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
        told = self.told(dimension, module)
        if told is not None:
            return told
        return next((DEFAULT_RULES[name] for name in self._names(dimension) if name in DEFAULT_RULES), "")

    def told(self, dimension: str, module: str = "") -> str | None:
        """What the plan itself says of it; None where the usual rules decide."""
        for key, axis in self.given.items() if module else ():
            pattern, _, name = key.rpartition(".")
            if name == dimension and pattern and fits(module, pattern):
                return axis
        return next((self.given[name] for name in self._names(dimension) if name in self.given), None)

    def _names(self, dimension: str) -> tuple[str, ...]:
        return (dimension, self.root(dimension))

    def root(self, dimension: str) -> str:
        """The dimension whose rule it shares: its own, or that of the one that it follows."""
        return self.grains.get(dimension, Grain()).follows or dimension

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
