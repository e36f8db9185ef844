"""All that a report tells about one run, read and ready."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from shoal.observe.batch_section import Rebatched
from shoal.observe.communication import Communication
from shoal.observe.curves import Curves
from shoal.observe.figures import targets_matter
from shoal.observe.memory_section import Told
from shoal.observe.pipeline_section import Pipelined


@dataclass(frozen=True)
class Subject:
    """All that a page tells about one run."""

    name: str
    path: str
    recipe: Mapping[str, Any]  # dotted key -> value
    plan: Mapping[str, Any]  # dotted key -> value
    origins: Mapping[str, str]  # dotted key -> where its value came from
    curves: Curves
    result: Mapping[str, Any]  # what `train` returned; empty while it has not
    recipe_hash: str
    communication: Communication | None = None  # where the log tells of it
    memory: Told | None = None  # of a run under a budget
    pipeline: Pipelined | None = None  # of a run in stages
    batches: tuple[Rebatched, ...] = ()  # changes of the batch

    @property
    def weights(self) -> str:
        return str(self.result.get("weights_sha256", ""))

    @property
    def model(self) -> str:
        return str(self.recipe.get("model.kind", "model"))

    @property
    def parameters(self) -> float | None:
        value = self.curves.facts.get("parameters")
        return float(value) if isinstance(value, int | float) else None

    @property
    def workers(self) -> str:
        return str(self.curves.facts.get("workers", self.plan.get("mesh.data", "–")))

    @property
    def rate(self) -> tuple[float | None, str]:
        """The usual throughput, (value, unit): targets a second where a sample is more than one target."""
        targets = targets_matter(self.curves)
        series = self.curves.targets_per_s if targets else self.curves.samples_per_s
        return (median(series.y) if series.y else None), ("targets" if targets else "samples")
