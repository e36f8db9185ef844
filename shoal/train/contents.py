"""What a checkpoint holds of a model and its optimiser: whole tensors, whatever each worker holds of them."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shoal.memory.conversion import converted, spread
from shoal.parallel.held import Held
from shoal.parallel.whole import Whole
from shoal.train.state import (
    check_names,
    load_model,
    load_optimizer,
    model_tensors,
    optimizer_facts,
    optimizer_tensors,
    values_of,
)
from shoal.train.weights import weights_sha256


class Contents:
    """Where a plan splits the model, every worker calls each of these, and rank 0 gets what there is; {} elsewhere."""

    def __init__(self, held: Held, device: torch.device) -> None:
        self._held = held
        self._whole = Whole(held, device) if held.plan.splits_model else None

    def weights(self) -> dict[str, Tensor]:
        """The model's parameters and persistent buffers, by name."""
        own = model_tensors(self._held.module)
        if self._whole is None:
            return own
        found = self._whole.gather(own)
        return {name: found[name] for name in self._held.names} if found else {}

    def sha256(self) -> str:
        """Of `weights`, on every worker."""
        found = self.weights()
        if self._whole is None:
            return weights_sha256(found)
        return self._held.group.gather(weights_sha256(found).encode() if found else b"")[0].decode()

    def tensors(self, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
        """ "model/<name>" and "optimizer/<parameter>/<key>"."""
        state = {f"model/{name}": tensor for name, tensor in self.weights().items()}
        if optimizer is None:
            return state
        own = optimizer_tensors(self._held.module, optimizer)
        if self._whole is not None:
            own = dict(sorted(spread(own, self._held.cut_names).items()))  # in one order on all workers
            own = self._whole.gather(own, _parameters_of(own))
        return state | {f"optimizer/{name}": tensor for name, tensor in own.items()}

    def facts(self, optimizer: torch.optim.Optimizer | None) -> dict[str, Any] | None:
        """What the optimiser holds beside tensors."""
        if optimizer is None:
            return None
        found = optimizer_facts(self._held.module, optimizer)
        if self._whole is not None:
            for row in self._held.group.gather(json.dumps(found["values"]).encode()):
                found["values"] = json.loads(row) | found["values"]
        return found

    def load(
        self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None, optimizer: torch.optim.Optimizer | None
    ) -> list[str]:
        """The inverse: each worker takes its part of what a checkpoint of any layout holds. What is to be said of it.

        Raises UserError for the checkpoint of another model."""
        held, module = self._held, self._held.module
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            if part in parts:  # what workers have left unsent is not the model's
                parts[part][rest] = tensor
        if self._whole is not None:
            check_names(held.names, parts["model"])
            parts["model"] = self._whole.own({name: parts["model"][name] for name in model_tensors(module)})
            trained = dict(module.named_parameters())
            parts["optimizer"] = spread(parts["optimizer"], held.cut_names)
            paths = _parameters_of(parts["optimizer"])
            own = {path: t for path, t in parts["optimizer"].items() if paths[path] in trained}
            parts["optimizer"] = self._whole.own(own, paths)
            facts = facts and {**facts, "values": values_of(facts, trained)}
        weights, states, said = converted(parts["model"], parts["optimizer"], module, held.plan.memory, held.sizes)
        load_model(module, weights)
        if optimizer is not None and facts:
            load_optimizer(module, optimizer, states, facts)
        if held.pipeline is not None:
            held.pipeline.share_tied()
        return list(said)


def _parameters_of(paths: Mapping[str, Tensor]) -> dict[str, str]:
    """Of "<parameter>/<key>", as an optimiser's tensors are called: the parameter."""
    return {path: path.rpartition("/")[0] for path in paths}
