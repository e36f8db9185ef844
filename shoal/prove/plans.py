"""Which plans a proof tries, and what they are called."""

from collections.abc import Sequence

from shoal.errors import unknown_name
from shoal.recipe.axes import AXES
from shoal.recipe.memory_plan import MemoryPlan
from shoal.recipe.plan import Plan
from shoal.recipe.typed import flatten, to_mapping

FAMILIES = ("standard", *AXES, "fast", "states", "memory", "servers")


def families(plan: Plan) -> set[str]:
    """What a plan is an example of: the axes that it splits over, and what else it does."""
    found = {axis for axis, size in plan.axes.sizes if size > 1} | {"standard"}
    found |= {"fast"} if plan.sync == "fast" else set()
    found |= {"servers"} if plan.server_processes else set()
    found |= {"states"} if plan.shards_states else set()
    return found | ({"memory"} if plan.memory != MemoryPlan() else set())


def of_families(plans: Sequence[Plan], chosen: Sequence[str]) -> tuple[Plan, ...]:
    """Those that are an example of any of these. Raises UserError for a name that is no family's."""
    for name in chosen:
        if name not in FAMILIES:
            raise unknown_name("family of plans", name, FAMILIES, "--plans")
    return tuple(plan for plan in plans if families(plan) & set(chosen))


def standard_plans(workers: Sequence[int], shards: int) -> list[Plan]:
    """Shards spread evenly over each number of workers; unevenly over the fewest and the most; and the fast mode.

    All on the CPU, whose kernels the reference uses. Raises UserError when there are more workers than shards."""
    even = [Plan(mesh={"data": count}, device="cpu") for count in workers]
    for plan in even:
        plan.owned(shards)
    several = sorted({count for count in workers if 1 < count < shards})
    uneven = [
        Plan(mesh={"data": count}, placement=uneven_placement(count, shards), device="cpu")
        for count in sorted({*several[:1], *several[-1:]})
    ]
    most = max(workers, default=1)
    fast = [Plan(mesh={"data": most}, sync="fast", device="cpu")] if most > 1 else []
    return even + [plan for plan in uneven if plan.owned(shards) not in [p.owned(shards) for p in even]] + fast


def uneven_placement(workers: int, shards: int) -> tuple[int, ...]:
    """One shard for each worker, and all the others for one in the middle: its run starts in mid-tree."""
    counts = [1] * workers
    counts[workers // 2] += shards - workers
    return tuple(counts)


def label(plan: Plan) -> str:
    """ "data=2 placement=1+7 fast": what sets a plan apart."""
    parts = [f"{axis}={size}" for axis, size in plan.mesh.items()]
    if plan.placement:
        parts.append(f"placement={'+'.join(map(str, plan.placement))}")
    if plan.sync != "exact":
        parts.append(plan.sync)
    told = ("mesh", "placement", "sync", "device")
    usual, own = flatten(to_mapping(Plan())), flatten(to_mapping(plan))
    others = {key: value for key, value in own.items() if key.split(".")[0] not in told and usual.get(key) != value}
    return " ".join([*parts, *(f"{key}={value}" for key, value in others.items())])
