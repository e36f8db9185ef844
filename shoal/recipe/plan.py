"""The Plan: where the work runs. It changes time and memory only, or says which part is lossy."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shoal.errors import UserError, unknown_name
from shoal.recipe.axes import AXES, Axes
from shoal.recipe.memory_plan import MemoryPlan
from shoal.recipe.pipeline_plan import PipelinePlan
from shoal.recipe.typed import from_mapping, read_toml, to_toml

DEFAULT_RULES = {
    "batch": "data",
    "layers": "pipe",
    "heads": "tensor",
    "ffn": "tensor",
    "vocab": "tensor",
    "channels": "tensor",
    "experts": "expert",
    "sequence": "context",
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    mesh: Mapping[str, int] = field(default_factory=lambda: {"data": 1})  # axis -> workers along it, outermost first
    rules: Mapping[str, str] = field(default_factory=dict)  # over the usual ones: dimension -> axis, "" for whole
    dimensions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # parameter name pattern (fnmatch) -> names of its dims, for models that do not name their own
    placement: tuple[int, ...] = ()  # shards of each data replica, in order; () spreads them evenly
    sync: Literal["exact", "fast", "parameter-server", "local"] = "exact"
    # fast: sums in an order that depends on the number of workers; local: workers average their weights now and then
    servers: int = 1  # parameter-server: processes that hold the parameters, split by bytes
    staleness: int = 0  # parameter-server: steps a worker may be ahead of the slowest; 0 exact, -1 asynchronous
    average_every: int = 8  # local: steps between two averages of the weights
    compression: Literal["none", "fp16", "bf16", "int8", "topk", "1bit", "powersgd"] = "none"  # lossy: of gradients
    compression_force: bool = False  # compress although a measurement says that it does not pay
    states: Literal["auto", "replicated", "zero1", "zero2", "zero3"] = "auto"
    # zero: data replicas hold slices of optimiser states, gradients too, parameters too (Rajbhandari et al., 2020);
    # auto: what `shoal train` finds to be fastest with the same bits (shoal.train.states_choice), elsewhere replicated
    state_group: int = 0  # zero1-3: replicas that share one copy of the states; 0: all of them
    pipeline: PipelinePlan = field(default_factory=PipelinePlan)
    memory: MemoryPlan = field(default_factory=MemoryPlan)
    bucket_bytes: int = 4 << 20  # gradients are reduced in pieces of this size, while backward still runs
    prefetch: int = 2  # steps whose batches each worker's loaders make ahead; 0 loads in line
    loaders: int = 1  # background loading threads of each worker
    device: str = "auto"  # auto, cpu or cuda
    hang_after_s: float = (
        120.0  # a worker without progress for so long is called hung; five times as long in its first step
    )

    def __post_init__(self) -> None:
        axes = self.axes
        for dimension, axis in self.rules.items():
            if axis and axis not in AXES:
                raise unknown_name("axis", axis, AXES, f"plan.rules.{dimension}")
        if self.splits_model and self.sync not in ("exact", "fast"):
            raise UserError(
                f"plan: sync = {self.sync!r} is for whole models, and the mesh splits this one "
                f"({', '.join(f'{a} = {n}' for a, n in axes.sizes if a != 'data' and n > 1)}): use sync = 'exact'."
            )
        if self.splits_model and self.compression != "none" and not self.sums_gradients:
            raise UserError(
                f"plan: compression = {self.compression!r} is for gradients that replicas send each other, and this "
                f"mesh has one replica: add an axis 'data' of 2 or more to the mesh, or leave compression out."
            )
        if self.shards_states and self.sync != "exact":
            raise UserError(f"plan: states = {self.states!r} needs sync = 'exact', and sync is {self.sync!r}.")
        if self.shards_states and self.compression != "none":
            raise UserError(
                f"plan: compression = {self.compression!r} does not go with states = {self.states!r} so far: leave "
                f"one of them out."
            )
        if self.state_group and (not self.shards_states or axes.size("data") % self.state_group):
            raise UserError(
                f"plan: state_group = {self.state_group} must divide the {axes.size('data')} data replicas, "
                f"with states = 'zero1', 'zero2' or 'zero3'."
            )
        if self.pipeline.chunks > 1 and axes.size("pipe") == 1:
            raise UserError(f"plan: pipeline.chunks = {self.pipeline.chunks} is for a mesh with an axis 'pipe'.")
        if self.sync == "parameter-server" and self.memory.changes_updates:
            raise UserError(
                f"plan: {self.memory.changes_updates} is for updates that workers make, and with "
                f"sync = 'parameter-server' servers make them: leave it out, or use sync = 'exact'."
            )
        if self.servers < 1:
            raise UserError(f"plan: servers must be at least 1, got {self.servers}.")
        if self.staleness < -1:
            raise UserError(
                f"plan: staleness {self.staleness} is none: 0 is exact, s lets workers run s steps ahead, -1 any."
            )
        if self.average_every < 1:
            raise UserError(f"plan: average_every must be at least 1 step, got {self.average_every}.")
        for key, default, needs in (("servers", 1, "parameter-server"), ("staleness", 0, "parameter-server"),
                                    ("average_every", 8, "local")):  # fmt: skip
            value = getattr(self, key)
            if value != default and self.sync != needs:
                raise UserError(f"plan: {key} = {value} is for sync = {needs!r}, and sync is {self.sync!r}.")
        if self.compression != "none" and self.sync == "local":
            raise UserError("plan: sync = 'local' averages weights and sends no gradients: leave compression out.")
        if self.placement and (len(self.placement) != self.replicas or min(self.placement) < 1):
            raise UserError(
                f"plan: placement {list(self.placement)} must give each of the {self.replicas} data replicas "
                f"at least one shard."
            )

    @property
    def axes(self) -> Axes:
        return Axes.of(self.mesh)

    @property
    def workers(self) -> int:
        return self.axes.world

    @property
    def replicas(self) -> int:
        """Workers, or groups of workers, that have shards of their own: experts are spread over some of them."""
        return self.axes.size("data") * self.axes.size("expert")

    def replica_of(self, rank: int) -> int:
        """Whose shards a worker works on: its place in `owned`."""
        coordinates, place = self.axes.coordinates(rank), 0
        for axis, size in self.axes.sizes:
            if axis in ("data", "expert"):
                place = place * size + coordinates[axis]
        return place

    @property
    def splits_model(self) -> bool:
        """No worker holds the whole model."""
        return self.workers > self.axes.size("data")

    @property
    def sums_gradients(self) -> bool:
        """There are workers that hold the same part of the model and add up what each has of its gradient."""
        return any(self.axes.size(axis) > 1 for axis in ("data", "context", "expert"))

    @property
    def shards_states(self) -> bool:
        """Data replicas hold slices of what training keeps."""
        return self.states not in ("auto", "replicated")

    @property
    def alike(self) -> bool:
        """Every worker holds the whole model and its states, and makes the same update of them."""
        whole = not self.shards_states and not self.splits_model
        return whole and self.sync in ("exact", "fast") and not self.compresses

    @property
    def exact(self) -> bool:
        """The plan keeps every bit: sums inside of a tensor operation are not split, and nothing is lossy."""
        return self.sums_in_order and not self.lossy

    @property
    def sums_in_order(self) -> bool:
        """Sums are made in one order on any number of workers, whatever is lossy beside them."""
        split = any(self.axes.size(axis) > 1 for axis in ("expert", "context", "tensor"))
        return self.sync != "fast" and not split

    def axis_of(self, dimension: str) -> str | None:
        """The mesh axis with more than one worker that a named dimension is split over, if there is one."""
        axis = self.rules.get(dimension, DEFAULT_RULES.get(dimension, ""))
        return axis if axis and self.axes.size(axis) > 1 else None

    @property
    def compresses(self) -> bool:
        """Gradients go from worker to worker compressed; they are then summed as with sync = "fast"."""
        return self.compression != "none" and self.sync in ("exact", "fast")

    @property
    def lossy(self) -> str:
        """Which part of this plan changes the result beyond the order of sums, in a few words; "" for none."""
        parts = []
        if self.compression != "none":
            parts.append(
                f"gradients are compressed ({self.compression}): what a step leaves unsent goes out with later ones"
            )
        if self.sync == "local":
            parts.append(f"workers go their own ways for {self.average_every} steps, then average their weights")
        if self.staleness:
            behind = f"up to {self.staleness} steps" if self.staleness > 0 else "any number of steps"
            parts.append(f"a worker's weights may be {behind} old")
        if self.memory.lossy:
            parts.append(self.memory.lossy)
        return "; ".join(parts)

    @property
    def server_processes(self) -> int:
        """Parameter servers that are processes of their own, where one launcher starts everything."""
        return self.servers if self.sync == "parameter-server" else 0

    def owned(self, shards: int) -> tuple[range, ...]:
        """The contiguous run of shards of each data replica. Raises UserError when they cannot be placed."""
        count = self.replicas
        if count > shards:
            who = "workers" if count == self.workers else "data replicas"
            raise UserError(
                f"{count} {who} for {shards} shards: each {who[:-1]} needs one. Use at most {shards} {who}, "
                f"or raise shards in the recipe (that changes the recipe's arithmetic)."
            )
        counts = self.placement or tuple(shards // count + (each < shards % count) for each in range(count))
        if sum(counts) != shards:
            raise UserError(f"plan: placement {list(counts)} places {sum(counts)} shards, the recipe has {shards}.")
        starts = [sum(counts[:each]) for each in range(count)]
        return tuple(range(start, start + count) for start, count in zip(starts, counts, strict=True))

    @staticmethod
    def from_toml(path: str | Path) -> "Plan":
        """Raises UserError naming the file and the key."""
        return from_mapping(Plan, read_toml(Path(path)), str(path))

    def to_toml(self) -> str:
        return to_toml(self)
