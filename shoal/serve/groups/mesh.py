"""Which meshes a model is served on."""

from collections.abc import Mapping

from shoal.cluster.detect import launched_workers
from shoal.errors import UserError
from shoal.recipe.plan import Plan

SERVED_AXES = ("pipe", "tensor", "expert")
MOST = 64  # processes of a group


def plan_of(mesh: Mapping[str, int]) -> Plan:
    """The Plan of each group. Raises UserError for axes along which nothing is served."""
    plan = Plan(mesh=dict(mesh) or {"data": 1})
    for axis, size in plan.axes.sizes:
        if axis == "data" and size > 1:
            raise UserError(f"--mesh data={size}: whole models side by side are --replicas {size}.")
        if axis not in ("data", *SERVED_AXES) and size > 1:
            raise UserError(f"--mesh {axis}={size}: models are served along {', '.join(SERVED_AXES)} so far.")
    if plan.axes.size("tensor") > 1 and plan.axes.size("expert") > 1:
        raise UserError("--mesh: axes tensor and expert do not go together so far: leave one of them out.")
    if plan.workers > MOST:
        raise UserError(f"--mesh: {plan.workers} processes for one model, and {MOST} are the most.")
    return plan


def several_hosts() -> bool:
    """Whether torchrun, or who sets its variables, has started `shoal serve` on other hosts too: a rank each."""
    return (launched_workers() or 1) > 1


def check_ranks(mesh: Mapping[str, int]) -> None:
    """Raises UserError for what is not served over several hosts."""
    ranks, wanted = launched_workers() or 1, plan_of(mesh).workers
    if ranks != wanted:
        raise UserError(f"serve: {ranks} ranks were started and --mesh has {wanted} places: start one rank for each.")
