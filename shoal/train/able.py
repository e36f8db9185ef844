"""Which plans can be trained: said before anything is spent."""

from shoal.errors import UserError
from shoal.parallel.held import check_axes
from shoal.recipe.memory_plan import MemoryPlan
from shoal.recipe.plan import Plan

_NOT_YET = ("offload_parameters",)


def check_trainable(plan: Plan) -> None:
    """Raises UserError for what a plan can say, `shoal plan` explains, and the training loop does not carry out."""
    check_axes(plan)
    if plan.splits_model and plan.states != "replicated":
        raise UserError(
            f"plan: states = {plan.states!r} is for whole models so far, and the mesh splits this one: use "
            f"states = 'replicated', or mesh axis 'data' alone."
        )
    memory, usual = plan.memory, MemoryPlan()
    saves = memory.changes_updates or ("saving activations" if memory.works_on_blocks else "")
    if plan.splits_model and saves:
        raise UserError(
            f"plan: {saves} is for whole models so far, and the mesh splits this one: leave one of them out, "
            f"or use mesh axis 'data' alone."
        )
    if memory.changes_updates and (plan.sync == "local" or plan.states != "replicated"):
        other = f"states = {plan.states!r}" if plan.states != "replicated" else "sync = 'local'"
        raise UserError(f"plan: {memory.changes_updates} does not go with {other} so far: leave one of them out.")
    if memory.budget_bytes:
        other = (
            f"states = {plan.states!r}" if plan.states != "replicated"
            else f"sync = {plan.sync!r}" if plan.sync not in ("exact", "fast")
            else f"compression = {plan.compression!r}" if plan.compression != "none"
            else ""
        )  # fmt: skip
        if other:
            raise UserError(f"plan: memory.peak_bytes does not go with {other} so far: leave one of them out.")
    asked = [key for key in _NOT_YET if getattr(memory, key) != getattr(usual, key)]
    if asked:
        raise UserError(
            f"plan: memory.{asked[0]} is not carried out yet: memory.recompute is what saves memory so far."
        )
