"""The Plan: where the work runs. It changes time and memory only, or says which part is lossy."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shoal.errors import UserError
from shoal.recipe.typed import from_mapping, read_toml, to_toml


@dataclass(frozen=True, kw_only=True)
class Plan:
    mesh: Mapping[str, int] = field(default_factory=lambda: {"data": 1})  # axis -> workers along it
    rules: Mapping[str, str] = field(default_factory=lambda: {"batch": "data"})  # named dimension -> mesh axis
    placement: tuple[int, ...] = ()  # shards of each worker, in order; () spreads them evenly
    sync: Literal["exact", "fast", "parameter-server", "local"] = "exact"
    # fast: sums in an order that depends on the number of workers; local: workers average their weights now and then
    servers: int = 1  # parameter-server: processes that hold the parameters, split by bytes
    staleness: int = 0  # parameter-server: steps a worker may be ahead of the slowest; 0 exact, -1 asynchronous
    average_every: int = 8  # local: steps between two averages of the weights
    compression: Literal["none", "fp16", "bf16", "int8", "topk", "1bit", "powersgd"] = "none"  # lossy: of gradients
    compression_force: bool = False  # compress although a measurement says that it does not pay
    bucket_bytes: int = 4 << 20  # gradients are reduced in pieces of this size, while backward still runs
    prefetch: int = 2  # steps whose batches each worker's loaders make ahead; 0 loads in line
    loaders: int = 1  # background loading threads of each worker
    device: str = "auto"  # auto, cpu or cuda
    hang_after_s: float = (
        120.0  # a worker without progress for so long is called hung; five times as long in its first step
    )

    def __post_init__(self) -> None:
        if set(self.mesh) != {"data"}:
            raise UserError(f"plan: mesh axes {sorted(self.mesh)} are not known here: the only axis is 'data'.")
        if self.workers < 1:
            raise UserError(f"plan: mesh axis 'data' must have at least 1 worker, got {self.workers}.")
        if self.rules != {"batch": "data"}:
            raise UserError("plan: the only rule known here is batch = 'data'.")
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
        if self.placement and (len(self.placement) != self.workers or min(self.placement) < 1):
            raise UserError(
                f"plan: placement {list(self.placement)} must give each of the {self.workers} workers "
                f"at least one shard."
            )

    @property
    def workers(self) -> int:
        return self.mesh["data"]

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
        return "; ".join(parts)

    @property
    def server_processes(self) -> int:
        """Parameter servers that are processes of their own, where one launcher starts everything."""
        return self.servers if self.sync == "parameter-server" else 0

    def owned(self, shards: int) -> tuple[range, ...]:
        """The contiguous run of shards of each worker. Raises UserError when they cannot be placed."""
        if self.workers > shards:
            raise UserError(
                f"{self.workers} workers for {shards} shards: each worker needs one. Use at most {shards} workers, "
                f"or raise shards in the recipe (that changes the recipe's arithmetic)."
            )
        counts = self.placement or tuple(
            shards // self.workers + (rank < shards % self.workers) for rank in range(self.workers)
        )
        if sum(counts) != shards:
            raise UserError(f"plan: placement {list(counts)} places {sum(counts)} shards, the recipe has {shards}.")
        starts = [sum(counts[:rank]) for rank in range(self.workers)]
        return tuple(range(start, start + count) for start, count in zip(starts, counts, strict=True))

    @staticmethod
    def from_toml(path: str | Path) -> "Plan":
        """Raises UserError naming the file and the key."""
        return from_mapping(Plan, read_toml(Path(path)), str(path))

    def to_toml(self) -> str:
        return to_toml(self)
