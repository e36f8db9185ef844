"""Which plans a proof tries, and what they are called."""

from collections.abc import Sequence

from shoal.recipe.plan import Plan
from shoal.recipe.typed import flatten, to_mapping


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
