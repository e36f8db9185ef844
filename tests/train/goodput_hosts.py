"""Runs whose batch follows goodput, on a host whose clock a formula tells: what this one, busy with other tests, would
say is another matter. The gradients, and their noise, are real."""

from dataclasses import dataclass, replace

from torch import nn
from train.tiny_runs import recipe, splits

from shoal.models.registry import build
from shoal.recipe.batching import Batching
from shoal.recipe.recipe import ModelSpec, OptimizerSpec, Recipe, Reporting
from shoal.train.goodput import Goodput
from shoal.train.rebatching import BatchPolicy

DATA = splits("cnn", 301)
POLICY = Batching(policy="goodput", most=64)
MADE = recipe("cnn", steps=40, batching=POLICY, report=Reporting(checkpoint_every=10, keep=0, sample=False))
SGD = replace(MADE, optimizer=OptimizerSpec(name="sgd", lr=0.05, options={"momentum": 0.9}))


@dataclass(frozen=True)
class OnHost:
    """A model factory. A step of n workers takes ``fixed / n + a * samples / n + rest`` seconds there."""

    spec: ModelSpec = MADE.model
    fixed: float = 1.0
    a: float = 0.001
    rest: float = 0.0
    forgets: bool = False  # planted: a run that goes on does not look at what its log has decided

    def __call__(self) -> nn.Module:
        decide = Goodput.committed

        def as_there(policy, took, noise):
            policy.window = 3
            compute = (self.fixed + self.a * took.batch) / took.workers
            known = took.seconds > 0  # which a first step, or one after a change of workers, is not
            times = {"compute_s": compute, "seconds": compute + self.rest} if known else {}
            return decide(policy, took._replace(**times), noise)

        Goodput.committed = as_there
        if self.forgets:
            BatchPolicy.repeat = lambda *_: None
        return build(self.spec, DATA.train.facts)


def rebatched(events: list[dict]) -> list[tuple[int, int, int]]:
    """(after step, before, batch) of each change."""
    return [(e["step"], e["before"], e["batch"]) for e in events if e["event"] == "rebatched"]


def fixed(made: Recipe) -> Recipe:
    return replace(made, batching=Batching())
