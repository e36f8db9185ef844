"""Which ranks of a group share a host: decided from what each says of itself and whom it could really reach."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

MOST_RANKS = 256  # of a host's group: ShmGroup::kMostRanks


@dataclass(frozen=True)
class Card:
    """What a rank tells the others before they meet."""

    host: str  # its name, for messages only
    boot: str  # boot id of the kernel it runs on; "" where there is none to be had
    user: int  # effective user id
    pids: str  # its namespace of process ids
    pid: int
    address: str  # abstract Unix-domain socket on which it listens, without the leading zero byte
    token: str  # what a visitor must know: it stands in the group's store only
    library: str  # the compiled part it has loaded, "" for none
    why: str  # why it has loaded none
    not_in_python: str  # why it cannot do with Python over shared memory either, "" if it can
    cpus: tuple[int, ...]  # processors that it may run on
    cores: int  # of them, as many as its control group's quota pays for

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Card":
        fields = json.loads(text)
        return cls(**{**fields, "cpus": tuple(fields["cpus"])})


def may_share(one: Card, other: Card) -> bool:
    """Whether two ranks could be on one host, as far as their own words go."""
    return bool(one.boot) and one.boot == other.boot and one.user == other.user


def hosts_of(
    cards: Sequence[Card], reached: Sequence[frozenset[int]], most: int = MOST_RANKS
) -> tuple[tuple[int, ...], ...]:
    """The ranks by host, hosts in the order of their lowest ranks.

    ``reached[r]`` are the lower ranks whose socket rank r could connect to: containers of one machine that cannot see
    each other are hosts of their own. No host has more than ``most`` ranks."""
    hosts: list[list[int]] = []
    for rank, card in enumerate(cards):
        for host in hosts:
            if len(host) < most and all(may_share(card, cards[r]) and r in reached[rank] for r in host):
                host.append(rank)
                break
        else:
            hosts.append([rank])
    return tuple(map(tuple, hosts))


def cores_of(cards: Sequence[Card]) -> int:
    """Cores that the ranks of a host may use together: what any of them may run on, no more than a quota allows."""
    together = len({cpu for card in cards for cpu in card.cpus})
    quotas = [card.cores for card in cards if card.cores < len(card.cpus)]
    return max(1, min([together, *quotas]))


def without_library(cards: Sequence[Card]) -> str:
    """Why the group has to go without compiled parts, in a few words; "" when all ranks have the same."""
    lacking = [rank for rank, card in enumerate(cards) if not card.library]
    if lacking:
        who = "" if len(lacking) == len(cards) else f"on {rank_list(lacking)}: "
        return who + (cards[lacking[0]].why or "no compiled part")
    if len({card.library for card in cards}) > 1:
        other = next(rank for rank, card in enumerate(cards) if card.library != cards[0].library)
        return f"ranks 0 and {other} have loaded different versions of it"
    return ""


def without_python(cards: Sequence[Card], hosts: Sequence[Sequence[int]]) -> str:
    """Why the group cannot go over shared memory in Python, in a few words; "" when it can."""
    if len(hosts) > 1:
        return f"ranks on {len(hosts)} hosts need the compiled part"
    return next((card.not_in_python for card in cards if card.not_in_python), "")


def rank_list(ranks: Sequence[int]) -> str:
    """ "rank 3", "ranks 0-2, 5"."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {text}"


def host_list(hosts: Sequence[Sequence[int]], cards: Sequence[Card]) -> str:
    """ "ranks 0-1 on ant, rank 2 on bee"."""
    return ", ".join(f"{rank_list(host)} on {cards[host[0]].host}" for host in hosts)
