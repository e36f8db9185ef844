"""Whether the samples of a step stay as many in a run: they do, unless a recipe says otherwise."""

from dataclasses import dataclass
from typing import Literal

from shoal.errors import UserError

MOST_TIMES = 8  # the recipe's batch: the largest one, where none is named
ADAPTIVE = {"sgd": "adascale"}  # optimiser -> the rule that "auto" means; of all others "sqrt"


@dataclass(frozen=True, kw_only=True)
class Batching:
    """Another batch is another arithmetic: what is learned depends on it, and on nothing else that is said here."""

    policy: Literal["fixed", "goodput", "recorded"] = "fixed"
    # goodput: the batch follows measured step times and gradient noise; recorded: it changes as ``changes`` says
    most: int = 0  # goodput: the largest batch; 0: eight times the recipe's
    rule: Literal["auto", "adascale", "sqrt", "linear", "none"] = "auto"
    # learning rate of another batch; auto: adascale for SGD, sqrt for all other optimisers
    changes: tuple[tuple[int, int], ...] = ()  # recorded: (after this step, samples of each step), in order

    def check(self, batch: int, shards: int, micro_batches: int) -> None:
        """Raises UserError for what cannot be with a recipe's first ``batch``, shards and micro-batches."""
        unit = shards * micro_batches
        if self.policy != "goodput" and self.most:
            raise UserError(f"recipe: batching.most = {self.most} is for batching.policy = 'goodput'.")
        if self.policy != "recorded" and self.changes:
            raise UserError("recipe: batching.changes is for batching.policy = 'recorded'.")
        if self.policy == "goodput" and unit < 2:
            raise UserError(
                "recipe: batching.policy = 'goodput' compares the gradients of a step's shards: use at least 2 shards."
            )
        if self.policy == "goodput" and self.most and self.most < batch:
            raise UserError(
                f"recipe: batching.most = {self.most} is below the batch of {batch}, which is the smallest one: "
                f"use at least {2 * batch}."
            )
        steps = [step for step, _ in self.changes]
        if steps != sorted(set(steps)) or any(step < 1 for step in steps):
            raise UserError(f"recipe: batching.changes are after steps {steps}: they must go up, from 1 on.")
        for step, size in self.changes:
            if size < 1 or size % unit:
                raise UserError(
                    f"recipe: batching.changes: {size} samples after step {step} are not divisible by {shards} shards "
                    f"x {micro_batches} micro-batches."
                )

    def largest(self, batch: int) -> int:
        """Of a recipe with this batch."""
        return self.most or MOST_TIMES * batch

    def rule_of(self, optimizer: str) -> str:
        """The rule for the learning rate of another batch, by its name."""
        return ADAPTIVE.get(optimizer.lower(), "sqrt") if self.rule == "auto" else self.rule
