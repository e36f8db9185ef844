"""The Recipe: all that decides a run's arithmetic, and nothing that does not."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shoal.errors import UserError
from shoal.recipe.batching import Batching
from shoal.recipe.typed import from_mapping, read_toml, to_mapping, to_toml

Options = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    kind: str = "gpt"  # a name in shoal.models.registry, or "custom" with a factory
    factory: str = ""  # "module:function" returning an nn.Module; for kind = "custom"
    loss: str = ""  # "module:function" (model, batch) -> (sum, count); "" takes the task's own
    task: str = ""  # "" lets the model kind choose; see shoal.models.tasks
    weights: str = ""  # a Hugging Face folder or a safetensors file to start from; "" starts from the seed
    freeze: tuple[str, ...] = ()  # parameter name patterns (fnmatch) that are not trained
    compile: bool = False  # torch.compile: other kernels, hence part of the arithmetic
    options: Options = field(default_factory=dict, metadata={"rest": True})  # the kind's own config


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    source: str = "text"  # a name in shoal.data.registry
    path: str = "@stdlib"  # file or folder; "@stdlib" is the Python standard library's own sources
    test_path: str = ""  # a separate test set, for sources that come with one
    validation: float = 0.05  # share of the samples held out and never trained on
    test: float = 0.0  # share held out for `shoal eval`, beside test_path
    options: Options = field(default_factory=dict, metadata={"rest": True})  # the source's own config


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    name: str = "adamw"  # adamw, sgd, or any class of torch.optim by its own name
    lr: float = 1e-3  # at the base batch; see ScheduleSpec.base_batch
    options: Options = field(default_factory=dict, metadata={"rest": True})  # passed to the optimiser's constructor


@dataclass(frozen=True, kw_only=True)
class ScheduleSpec:
    kind: Literal["constant", "cosine", "linear", "step"] = "cosine"
    warmup_steps: int = 0  # linear from lr / warmup_steps to lr
    final: float = 0.1  # cosine and linear end at final * lr
    step_every: int = 0  # kind "step": multiply by gamma every so many steps
    gamma: float = 0.1
    base_batch: int = 0  # linear scaling: lr * batch / base_batch; 0 leaves lr as it is


@dataclass(frozen=True, kw_only=True)
class Reporting:
    """What is written and when. Not part of the arithmetic, and not in the recipe's hash."""

    evaluate_every: int = 0  # steps; 0: at the end of each epoch and of the run
    evaluate_samples: int = 0  # at most so many held-out samples; 0: all
    checkpoint_every: int = 0  # steps; 0: at the end of each epoch and of the run
    keep: int = 3  # newest checkpoints kept, beside the best
    tensorboard: bool = False
    sample: bool = True  # generate a few lines at the end, when the model can


@dataclass(frozen=True, kw_only=True)
class Recipe:
    model: ModelSpec = field(default_factory=ModelSpec)
    data: DataSpec = field(default_factory=DataSpec)
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    schedule: ScheduleSpec = field(default_factory=ScheduleSpec)
    report: Reporting = field(default_factory=Reporting)
    batching: Batching = field(default_factory=Batching)
    batch: int = 64  # samples a step, over all shards
    shards: int = 8  # leaves of the reduction tree: the most workers that the run can ever use
    micro_batches: int = 1  # gradient accumulation inside a shard
    threads: int = 1  # intra-op threads of each worker; matmuls may sum in another order when it changes
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # "auto" measures both, then is written down
    clip: float = 0.0  # largest global gradient norm; 0: no clipping
    steps: int = 0  # length in steps; 0: by epochs
    epochs: int = 0  # length in epochs; 0: by steps

    def __post_init__(self) -> None:
        for name in ("batch", "shards", "micro_batches", "threads"):
            if getattr(self, name) < 1:
                raise UserError(f"recipe: {name} must be at least 1, got {getattr(self, name)}.")
        for name in ("steps", "epochs", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"recipe: {name} must not be negative, got {getattr(self, name)}.")
        if self.seed >= 1 << 63:
            raise UserError(f"recipe: seed must be less than 2**63, got {self.seed}.")
        for name, number in (("optimizer.lr", self.optimizer.lr), ("clip", self.clip)):
            if not 0 <= number < math.inf:
                raise UserError(f"recipe: {name} must be a number from 0 on, got {number}.")
        if self.batch % (self.shards * self.micro_batches):
            near = max(1, round(self.batch / (self.shards * self.micro_batches))) * self.shards * self.micro_batches
            raise UserError(
                f"recipe: batch {self.batch} is not divisible by {self.shards} shards x {self.micro_batches} "
                f"micro-batches: try batch = {near}, or fewer shards."
            )
        if self.steps and self.epochs:
            raise UserError(f"recipe: give steps ({self.steps}) or epochs ({self.epochs}), not both.")
        if not self.steps and not self.epochs:
            raise UserError("recipe: the length is missing: set steps or epochs.")
        self.batching.check(self.batch, self.shards, self.micro_batches)
        if not 0 <= self.data.validation + self.data.test < 1:
            raise UserError("recipe: data.validation + data.test must be at least 0 and less than 1.")

    @property
    def samples_of_micro_batch(self) -> int:
        """Of the usual one; one, where the batch is smaller than all of them together."""
        return max(1, self.batch // (self.shards * self.micro_batches))

    @property
    def arithmetic_hash(self) -> str:
        """SHA-256 over all that decides the arithmetic. Where the data lies and what is reported do not count."""
        plain = to_mapping(self)
        del plain["report"]
        if self.batching.policy == "fixed":
            del plain["batching"]
        for place in ("path", "test_path"):
            del plain["data"][place]
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

    @staticmethod
    def from_toml(path: str | Path) -> "Recipe":
        """Raises UserError naming the file and the key."""
        return from_mapping(Recipe, read_toml(Path(path)), str(path))

    def to_toml(self) -> str:
        return to_toml(self)
