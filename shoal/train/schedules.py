"""Learning rates as a pure function of the step."""

import math

from shoal.recipe.recipe import Recipe


def learning_rate(recipe: Recipe, step: float, steps: float) -> float:
    """The rate of the ``step``-th update (from 1) of ``steps``.

    Linear scaling with the global batch: Goyal et al., 2017. Cosine: Loshchilov and Hutter, 2017."""
    schedule = recipe.schedule
    peak = recipe.optimizer.lr * (recipe.batch / schedule.base_batch if schedule.base_batch else 1.0)
    warm = schedule.warmup_steps
    if step <= warm:
        return peak * step / warm
    done = (step - warm) / max(1, steps - warm)
    if schedule.kind == "cosine":
        return peak * (schedule.final + (1 - schedule.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
    if schedule.kind == "linear":
        return peak * (1 - (1 - schedule.final) * min(1.0, done))
    if schedule.kind == "step" and schedule.step_every:
        return peak * schedule.gamma ** int((step - 1) // schedule.step_every)
    return peak
