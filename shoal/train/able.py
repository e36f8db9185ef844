"""Which plans can be trained: said before anything is spent."""

from shoal.errors import UserError
from shoal.recipe.memory_plan import MemoryPlan
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe

_QUANTISABLE = ("adam", "adamw", "sgd")


def check_trainable(plan: Plan, recipe: Recipe | None = None) -> None:
    """Raises UserError for what a plan can say, `shoal plan` explains, and the training loop does not carry out: at
    all, or of this recipe."""
    memory = plan.memory
    if plan.axes.size("pipe") > 1 and memory.blocks:
        raise UserError(
            "plan: memory.blocks are modules, and a pipeline computes its chunks again as a whole: leave it out."
        )
    if memory.changes_updates and plan.sync == "local":
        raise UserError(
            f"plan: {memory.changes_updates} does not go with sync = 'local' so far: leave one of them out."
        )
    if memory.offload_parameters == "disk" and plan.shards_states:
        raise UserError(
            f"plan: memory.offload_parameters = 'disk' does not go with states = {plan.states!r} so far: use "
            f"memory.offload_optimizer = 'disk' in its place, or states = 'replicated'."
        )
    if memory.budget_bytes:
        other = (
            f"sync = {plan.sync!r}" if plan.sync not in ("exact", "fast")
            else f"compression = {plan.compression!r}" if plan.compression != "none"
            else ""
        )  # fmt: skip
        if other:
            raise UserError(f"plan: memory.peak_bytes does not go with {other} so far: leave one of them out.")
    if recipe is not None:
        _check_recipe(memory, recipe)


def _check_recipe(memory: MemoryPlan, recipe: Recipe) -> None:
    if memory.optimizer_bits == 8 and recipe.optimizer.name.lower() not in _QUANTISABLE:
        raise UserError(
            f"plan: memory.optimizer_bits = 8 is for adam, adamw and sgd, and the recipe's optimizer is "
            f"{recipe.optimizer.name!r}: use one of them, or leave it out."
        )
    if recipe.model.compile and memory.changes_weights:
        raise UserError(f"plan: {memory.changes_weights} is for models that are not compiled: leave model.compile out.")


def check_batching(recipe: Recipe, plan: Plan) -> None:
    """Raises UserError for plans under which a recipe's batch cannot change."""
    if recipe.batching.policy == "fixed":
        return
    said = f"recipe: batching.policy = {recipe.batching.policy!r}"
    if plan.splits_model:
        split = ", ".join(f"{axis} = {size}" for axis, size in plan.axes.sizes if axis != "data" and size > 1)
        raise UserError(f"{said} is for whole models, and the mesh splits this one ({split}): use axis 'data' alone.")
    if plan.sync != "exact" or plan.compression != "none":
        other = f"sync = {plan.sync!r}" if plan.sync != "exact" else f"compression = {plan.compression!r}"
        raise UserError(f"{said} looks at the gradients of single shards, and not with {other}: leave one of them out.")
    if plan.memory.budget_bytes:
        raise UserError(f"{said} does not go with memory.peak_bytes, which is found for one batch: leave one out.")


def check_repeatable(recipe: Recipe) -> None:
    """Raises UserError for a recipe whose runs cannot be compared with each other to the bit."""
    if recipe.batching.policy == "goodput":
        raise UserError(
            "recipe: batching.policy = 'goodput' decides by the clock, and no two runs make the same steps: use "
            "--batch-policy fixed, or replay:RUN."
        )
