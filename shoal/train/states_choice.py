"""What ``states = "auto"`` comes to: sharded over the workers of a host where that costs nothing, whole elsewhere.

On one host, workers who each update their slices of one copy of the weights (ZeRO-1) do less than workers who all
update everything, with the same bits (docs/sharded_states.md). Pure: nothing is measured."""

from collections.abc import Mapping
from dataclasses import replace

from shoal.comm.server.optimizer import ELEMENTWISE
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe

CHOSEN = "chosen: "  # how the origin of a value begins that was decided on so
_OWN_NAMES = {name.lower() for name in ELEMENTWISE}


def settled_states(
    plan: Plan, recipe: Recipe, *, elastic: bool = False, joined: bool = False, foreign: bool = False
) -> tuple[Plan, dict[str, str]]:
    """The plan with its states decided, and the origin that tells why; as it is, and {}, where the user has decided.

    ``elastic``: workers may come and go. ``joined``: they are torchrun's, who share no memory. ``foreign``: the model
    is handed over by a program."""
    if plan.states != "auto":
        return plan, {}
    against = _against(plan, recipe, elastic=elastic, joined=joined, foreign=foreign)
    if against:
        return replace(plan, states="replicated"), {"states": f"{CHOSEN}{against}"}
    return replace(plan, states="zero1"), {"states": f"{CHOSEN}{plan.workers} workers of one host share weights"}


def told_states(plan: Plan, origins: Mapping[str, str]) -> dict[str, str]:
    """For the event `started`, when slices are what workers hold: of which kind, and where that came from."""
    return {"states": f"{plan.states} ({origins.get('states', 'given')})"} if plan.shards_states else {}


def _against(plan: Plan, recipe: Recipe, *, elastic: bool, joined: bool, foreign: bool) -> str:
    """Why every worker keeps all; "" when nothing speaks for it."""
    if plan.workers == 1:
        return "one worker"
    if plan.splits_model:
        return "the mesh splits the model"
    if plan.sync != "exact":
        return f"sync = {plan.sync!r}"
    if plan.compression != "none":
        return f"compression = {plan.compression!r}"
    if elastic:
        return "what every worker has is not lost with one"
    if joined:
        return "workers that torchrun started share no memory"
    if plan.memory.offload_parameters == "disk":
        return "memory.offload_parameters = 'disk'"
    if recipe.optimizer.name.lower() not in _OWN_NAMES:
        return f"{recipe.optimizer.name} does not treat each element by itself"
    if foreign or recipe.model.kind == "custom" or recipe.model.loss:
        return "a model or a loss of your own may write to weights"
    return ""
