"""What a run's log says of a batch that changed: enough to do it again."""

from collections.abc import Iterable, Mapping
from typing import Any

from shoal.errors import UserError
from shoal.recipe.batching import Batching
from shoal.run.run import Run


def decided(events: Iterable[Mapping[str, Any]]) -> tuple[list[tuple[int, int]], int]:
    """From a run's log: (after which step, samples) of each change of the batch, and the last step that was committed.

    What was done again after a checkpoint counts as it was done last; steps that were not come as they were."""
    changes: dict[int, int] = {}
    last = now = 0  # the last step committed, and the step of the last change that was told
    for event in events:
        kind, step = event.get("event"), int(event.get("step", 0))
        if kind == "branched":
            changes |= dict(event.get("batches", ()))
        elif kind == "rebatched":
            changes[step], now = event["batch"], step
        elif kind == "committed":
            if now != step:
                changes.pop(step, None)
            now, last = 0, max(last, step)
    return sorted(changes.items()), last


def recorded(run: Run) -> Batching:
    """For a recipe whose batch is to change as that of ``run`` did. Raises UserError where it could not change."""
    spec = run.recipe.batching
    if spec.policy == "fixed":
        raise UserError(f"the batch of {str(run.path)!r} stays {run.recipe.batch}: there is nothing to replay.")
    changes, _ = decided(run.events())
    return Batching(policy="recorded", rule=spec.rule, changes=tuple(changes))
