"""The mesh of workers: named axes, and which ranks lie along them. Pure arithmetic on ranks."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import prod

from shoal.errors import UserError, unknown_name

AXES = ("data", "pipe", "expert", "context", "tensor")
MEANING = {
    "data": "replicas of the model",
    "pipe": "stages of layers",
    "expert": "experts of a mixture",
    "context": "slices of the sequence",
    "tensor": "slices of the tensors",
}


@dataclass(frozen=True)
class Axes:
    """Ranks are row-major over the axes: those along the last one are neighbours."""

    sizes: tuple[tuple[str, int], ...]  # outermost first

    @staticmethod
    def of(mesh: Mapping[str, int]) -> "Axes":
        """Raises UserError for an unknown axis or a size below 1."""
        for axis, size in mesh.items():
            if axis not in AXES:
                raise unknown_name("axis", axis, AXES, "plan.mesh")
            if size < 1:
                raise UserError(f"plan: mesh axis {axis!r} must have at least 1 worker, got {size}.")
        if not mesh:
            raise UserError("plan: the mesh has no axis: write data = 1 for one worker.")
        return Axes(tuple(mesh.items()))

    @property
    def world(self) -> int:
        return prod(size for _, size in self.sizes)

    def size(self, axis: str) -> int:
        """Workers along an axis; 1 for one that the mesh does not have."""
        return dict(self.sizes).get(axis, 1)

    def coordinate(self, rank: int, axis: str) -> int:
        """Where a rank stands along an axis; 0 on one that the mesh does not have."""
        return self.coordinates(rank).get(axis, 0)

    def coordinates(self, rank: int) -> dict[str, int]:
        found: dict[str, int] = {}
        for axis, size in reversed(self.sizes):
            rank, found[axis] = divmod(rank, size)
        return found

    def rank(self, coordinates: Mapping[str, int]) -> int:
        """The inverse of `coordinates`; an axis that is not named counts as 0."""
        rank = 0
        for axis, size in self.sizes:
            rank = rank * size + coordinates.get(axis, 0)
        return rank

    def along(self, rank: int, *axes: str) -> tuple[int, ...]:
        """The ranks that differ from ``rank`` in these axes only, itself among them, in rank order."""
        own = self.coordinates(rank)
        ranges = [range(size) if axis in axes else (own[axis],) for axis, size in self.sizes]
        names = [axis for axis, _ in self.sizes]
        return tuple(self.rank(dict(zip(names, place, strict=True))) for place in product(*ranges))

    def partition(self, *axes: str) -> tuple[tuple[int, ...], ...]:
        """All groups along these axes: every rank is in exactly one."""
        return tuple(dict.fromkeys(self.along(rank, *axes) for rank in range(self.world)))
