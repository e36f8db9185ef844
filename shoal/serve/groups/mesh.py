"""Which meshes a model is served on."""

from collections.abc import Mapping

from shoal.errors import UserError
from shoal.recipe.plan import Plan

SERVED_AXES = ("pipe", "tensor")
MOST = 64  # processes of a group


def plan_of(mesh: Mapping[str, int]) -> Plan:
    """The Plan of each group. Raises UserError for axes along which nothing is served."""
    plan = Plan(mesh=dict(mesh) or {"data": 1})
    for axis, size in plan.axes.sizes:
        if axis == "data" and size > 1:
            raise UserError(f"--mesh data={size}: whole models side by side are --replicas {size}.")
        if axis not in ("data", *SERVED_AXES) and size > 1:
            raise UserError(f"--mesh {axis}={size}: models are served along {' and '.join(SERVED_AXES)} so far.")
    if plan.workers > MOST:
        raise UserError(f"--mesh: {plan.workers} processes for one model, and {MOST} are the most.")
    return plan


def told(mesh: Mapping[str, int]) -> str:
    """ "pipe=2,tensor=2", as it is written; "" for whole models."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1)
