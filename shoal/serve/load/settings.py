"""What `shoal bench serve` is told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shoal.errors import UserError
from shoal.serve.load.figures import QUANTILES


@dataclass(frozen=True, kw_only=True)
class Settings:
    target: str  # the URL of a server, or what to serve
    path: str = ""  # "": /predict or /v1/completions, as the server describes
    bodies: Sequence[str] = ()  # JSON texts, in turns; (): the description's example
    key: str = ""
    stream: bool | None = None  # False: completions as a whole
    clients: Sequence[int] = ()  # a closed loop of each
    rates: Sequence[float] = ()  # an open loop of each: requests a second, with independent gaps
    trace: Path | None = None
    speed: float = 1.0  # of the trace
    latency_ms: float = 0.0  # search the highest rate that keeps it; 0: do not
    quantile: float = 99.0  # of the target
    seconds: float = 5.0  # that are measured, of each load
    warm_s: float = 1.0  # before those
    connections: int = 512
    processes: int = 1  # of clients
    patience_s: float = 30.0
    seed: int = 0
    serve: Mapping[str, str] = field(default_factory=dict)  # options of `shoal serve`, for a target
    bare: bool = True  # measure the bare model beside a target

    def __post_init__(self) -> None:
        for name in ("seconds", "connections", "processes", "patience_s", "speed"):
            if getattr(self, name) <= 0:
                raise UserError(f"bench serve: {name} must be greater than 0, got {getattr(self, name)}.")
        if self.warm_s < 0 or self.latency_ms < 0:
            raise UserError("bench serve: warm-s and latency-ms must not be negative.")
        if any(each < 1 for each in self.clients) or any(each <= 0 for each in self.rates):
            raise UserError("bench serve: --clients and --rates take numbers greater than 0.")
        if self.quantile not in QUANTILES:
            raise UserError(f"bench serve: --quantile is one of {', '.join(f'{q:g}' for q in QUANTILES)}.")
