"""Which plans can be trained: said before anything is spent."""

from shoal.errors import UserError
from shoal.recipe.memory_plan import MemoryPlan
from shoal.recipe.plan import Plan

_NOT_YET = ("offload_parameters",)


def check_trainable(plan: Plan) -> None:
    """Raises UserError for what a plan can say, `shoal plan` explains, and the training loop does not carry out."""
    split = [f"{axis} = {size}" for axis, size in plan.axes.sizes if axis != "data" and size > 1]
    if split:
        raise UserError(
            f"plan: training runs over mesh axis 'data' so far, and the mesh has {', '.join(split)}: "
            f"use --workers N, or look at the plan with shoal plan."
        )
    memory, usual = plan.memory, MemoryPlan()
    if memory.changes_updates and (plan.sync == "local" or plan.states != "replicated"):
        other = f"states = {plan.states!r}" if plan.states != "replicated" else "sync = 'local'"
        raise UserError(f"plan: {memory.changes_updates} does not go with {other} so far: leave one of them out.")
    asked = ["peak_bytes"] if memory.budget_bytes else []
    asked += [key for key in _NOT_YET if getattr(memory, key) != getattr(usual, key)]
    if asked:
        raise UserError(
            f"plan: memory.{asked[0]} is not carried out yet: memory.recompute is what saves memory so far."
        )
