"""What a difference looks like: which part of a sum is missing or counted twice, which tensor is a step behind. Pure.

A gradient is a sum over shards, and `fingerprint.along` of a sum is the sum of its terms': the reference tells each
shard's term, so the deviation of a gradient can be recognised as that of some shards, or as a factor. Only deviations
that fit every differing gradient count. What fits nothing is said to be so.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from shoal.prove.fingerprint import GRADIENT, LOSS, MODEL, Difference, StepPrint

FITS = 1e-3  # of the deviation: what rounding may leave between it and its explanation
SEEN = 1e-5  # of the gradient: less than this is rounding
MOST = 8  # gradients that are looked at


@dataclass(frozen=True)
class Evidence:
    """Of the step at which a run first differs."""

    reference: StepPrint
    before: StepPrint | None  # the reference's step before it
    workers: Mapping[int, StepPrint]  # by rank: what each shows
    uses: Mapping[str, int]  # places in which a pass uses each trained parameter
    crossing: str = ""  # what goes from worker to worker inside of a pass


def looks_like(difference: Difference, evidence: Evidence) -> str:
    """One sentence without its full stop, to come after "looks like"; "" where nothing fits."""
    if difference.shards and (difference.step == 1 or difference.tensor != LOSS):
        return _of_losses(difference, evidence)
    kind, _, name = difference.tensor.partition("/")
    if kind == GRADIENT:
        return _of_gradients(difference, name, evidence)
    if kind == MODEL and evidence.before is not None:
        old = evidence.before.tensors.get(difference.tensor)
        ranks = [rank for rank in difference.ranks if _bits(evidence.workers.get(rank), difference.tensor) == old]
        if old is not None and ranks:
            return f"{name} was not updated on {_ranks(ranks)}: it still has its value of the step before"
    if kind == MODEL:
        return "the gradients are right and the update is not"
    return ""


def _bits(prints: StepPrint | None, name: str) -> object:
    return prints.tensors.get(name) if prints is not None else None


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _shards(first: int, last: int) -> str:
    return f"shard {first}" if first == last else f"shards {first} to {last}"


# --- the forward pass ---------------------------------------------------------------------------------------------


def _of_losses(difference: Difference, evidence: Evidence) -> str:
    shards, wanted = difference.shards, evidence.reference.losses
    present = [shard for shard, loss in enumerate(wanted) if loss]
    which = "shard" if len(shards) == 1 else "shards"
    named = ", ".join(map(str, shards))
    if len(shards) > 1 and shards == tuple(present):
        where = f": look at {evidence.crossing}" if evidence.crossing else ""
        return f"the forward pass computes something else in every shard{where}"
    found = next(iter(evidence.workers.values())).losses
    apart = sum(found[shard] - wanted[shard] for shard in shards)
    if len(shards) > 1 and abs(apart) <= FITS * max(abs(found[shard] - wanted[shard]) for shard in shards):
        return f"samples of {which} {named} changed places: their losses are others, and add up to the same"
    return f"other samples, or another random stream, in {which} {named}: every other shard's loss is right"


# --- sums of gradients --------------------------------------------------------------------------------------------


def _of_gradients(difference: Difference, name: str, evidence: Evidence) -> str:
    wrong = [tensor for tensor in difference.tensors if tensor.startswith(f"{GRADIENT}/")]
    said: dict[str, list[int]] = {}
    for rank, prints in evidence.workers.items():
        here = [tensor for tensor in wrong if tensor in prints.tensors and _differs(prints, evidence.reference, tensor)]
        if here:
            said.setdefault(_explained(here[:MOST], prints, evidence.reference), []).append(rank)
    if set(said) - {""}:
        everywhere = len(said) == 1
        return "; ".join(text if everywhere else f"on {_ranks(ranks)} {text}" for text, ranks in said.items() if text)
    if len(wrong) == 1 and evidence.uses.get(name, 1) > 1:
        places = evidence.uses[name]
        return f"{name} is tied, used in {places} places: the gradient of one of them is missing or counted twice"
    return "the backward pass computes something else, though every loss is right" if wrong else ""


def _differs(prints: StepPrint, reference: StepPrint, tensor: str) -> bool:
    wanted = reference.tensors.get(tensor)
    return wanted is None or prints.tensors[tensor].sha256 != wanted.sha256


def _explained(tensors: Sequence[str], prints: StepPrint, reference: StepPrint) -> str:
    """What explains the deviation of all of these gradients at once; "" for nothing."""
    known = [tensor for tensor in tensors if tensor in reference.tensors and tensor in reference.shares]
    pairs = [(prints.tensors[t], reference.tensors[t], reference.shares[t]) for t in known]
    pairs = [
        (found, wanted, shares)
        for found, wanted, shares in pairs
        if abs(found.along - wanted.along) > SEEN * max(abs(share) for share in shares)
    ]
    if not pairs or len(known) < len(tensors):
        return ""
    factors = [found.along / wanted.along if wanted.along else 0.0 for found, wanted, _ in pairs]
    if all(abs(factor - factors[0]) <= FITS * abs(factors[0]) for factor in factors) and all(
        abs(found.norm - factors[0] * wanted.norm) <= FITS * found.norm for found, wanted, _ in pairs
    ):
        twice = ": it was counted twice" if abs(factors[0] - 2) <= FITS else ""
        return f"the gradient is scaled by {factors[0]:.4g}{twice}"
    for first, last, count, text in _guesses(len(pairs[0][2])):
        if all(_fits(found.along - wanted.along, count * sum(shares[first : last + 1]))
               for found, wanted, shares in pairs):  # fmt: skip
            return text
    return ""


def _fits(apart: float, guess: float) -> bool:
    return abs(apart - guess) <= FITS * abs(apart)


def _guesses(shards: int) -> Iterator[tuple[int, int, int, str]]:
    """(first shard, last, how many times it was added beyond once, what that is called), short runs first."""
    for length in range(1, shards):
        for first in range(shards - length + 1):
            last = first + length - 1
            called = _shards(first, last)
            verb = "are" if length > 1 else "is"
            yield first, last, -1, f"the gradient of {called} {verb} missing from the sum"
            yield first, last, 1, f"the gradient of {called} {verb} in the sum twice"
