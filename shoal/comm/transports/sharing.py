"""How transfers that cross the same capacities share them: max-min fairly, as well-behaved streams do.

Nobody gets more than its own link carries; what somebody cannot use goes to the others (water-filling, Bertsekas and
Gallager, Data Networks, 1992).
"""

from collections.abc import Mapping, Sequence


def fair_rates(transfers: Sequence[tuple[float, Sequence[str]]], capacities: Mapping[str, float]) -> list[float]:
    """Bytes a second of each transfer, given as (what its own link carries, the names of the capacities it crosses)."""
    left = {name: capacities[name] for _, through in transfers for name in through}
    users: dict[str, int] = dict.fromkeys(left, 0)
    for _, through in transfers:
        for name in through:
            users[name] += 1
    rates = [0.0] * len(transfers)
    open_ones = list(range(len(transfers)))
    while open_ones:
        fair = {name: left[name] / count for name, count in users.items() if count}
        most = [min([transfers[i][0], *(fair[name] for name in transfers[i][1])]) for i in open_ones]
        lowest = min(most)
        for i, rate in zip(open_ones, most, strict=True):
            if rate <= lowest * (1 + 1e-12):
                rates[i] = lowest
                for name in transfers[i][1]:
                    left[name] = max(0.0, left[name] - lowest)
                    users[name] -= 1
        open_ones = [i for i in open_ones if not rates[i]]
    return rates
