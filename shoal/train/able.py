"""Which plans can be trained: said before anything is spent."""

from shoal.errors import UserError
from shoal.recipe.plan import Plan


def check_trainable(plan: Plan) -> None:
    """Raises UserError for what a plan can say, `shoal plan` explains, and the training loop does not carry out."""
    split = [f"{axis} = {size}" for axis, size in plan.axes.sizes if axis != "data" and size > 1]
    if split:
        raise UserError(
            f"plan: training runs over mesh axis 'data' so far, and the mesh has {', '.join(split)}: "
            f"use --workers N, or look at the plan with shoal plan."
        )
    if plan.states != "replicated":
        raise UserError(f"plan: states = {plan.states!r} is not carried out yet: use states = 'replicated'.")
    memory = plan.memory
    moved = [key for key in ("offload_activations", "offload_optimizer", "offload_parameters")
             if getattr(memory, key) != "none"]  # fmt: skip
    asked = [*(["peak_bytes"] if memory.budget_bytes else []), *moved]
    asked += [
        key for key, usual in (("optimizer_bits", 32), ("parameters", "float32")) if getattr(memory, key) != usual
    ]
    if asked:
        raise UserError(
            f"plan: memory.{asked[0]} is not carried out yet: memory.recompute is what saves memory so far."
        )
