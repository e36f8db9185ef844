"""What each worker keeps in memory, what it computes again, and what it puts elsewhere."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from shoal.errors import UserError, unknown_name

Tier = Literal["none", "host", "disk"]
OPERATIONS = ("activation", "norm", "dropout", "softmax", "elementwise", "attention", "matmul", "convolution")
CHEAP = ("activation", "norm", "dropout", "softmax", "elementwise")  # few operations for each byte that they leave
UNITS = {"": 1, "b": 1} | {
    f"{prefix}{end}": base ** (power + 1)
    for power, prefix in enumerate("kmgt")
    for end, base in (("b", 1000), ("ib", 1024))
}


def size_bytes(size: int | str, where: str) -> int:
    """ "2GiB" -> 2147483648; a plain number is in bytes. Raises UserError naming ``where``."""
    if isinstance(size, int):
        if size < 0:
            raise UserError(f"{where} = {size} bytes is less than nothing.")
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)\s*", size)
    if found is None or found[2].lower() not in UNITS:
        raise UserError(f'{where} = {size!r} is no size: write "512MiB", "2GiB", "1.5GB" or a number of bytes.')
    return math.floor(float(found[1]) * int(UNITS[found[2].lower()]))


def size_text(count: int) -> str:
    """2147483648 -> "2GiB", at most three figures, rounded up: read as a budget, it is never too small."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= factor:
            digits = 2 if count < 10 * factor else 1 if count < 100 * factor else 0
            rounded = math.ceil(count / factor * 10**digits) / 10**digits
            return f"{rounded:.{digits}f}".rstrip("0").rstrip(".") + unit if digits else f"{rounded:.0f}{unit}"
    return f"{count}B"


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    recompute: Literal["none", "every", "full", "selective"] = "none"
    # activations that the forward pass drops and the backward pass computes again (Chen et al., 2016); full: of all
    # blocks that are found but the last, whose activations are used at once
    recompute_every: int = 2  # every: of so many blocks, one is recomputed
    recompute_operations: tuple[str, ...] = CHEAP  # selective: kinds of operations whose results are dropped
    blocks: tuple[str, ...] = ()  # modules that are recomputed as one, or patterns of them; () finds them
    peak_bytes: int | str = 0  # "2GiB": recompute and offload as little as keeps a worker's peak below; 0: no limit
    offload_activations: Tier = "none"  # what a block keeps for its backward pass: to host memory or to disk
    offload_optimizer: Tier = "none"  # optimiser states, between two updates
    offload_parameters: Tier = "none"  # parameters of each block, while other blocks work
    offload_dir: str = ""  # disk: where; "" for the system's folder of temporary files
    optimizer_bits: int = 32  # 8: block-wise quantised states (Dettmers et al., 2022); lossy
    parameters: Literal["float32", "bfloat16-stochastic", "bfloat16-compensated"] = "float32"  # all but float32: lossy

    def __post_init__(self) -> None:
        if self.recompute_every < 1:
            raise UserError(f"plan: memory.recompute_every must be at least 1 block, got {self.recompute_every}.")
        if self.recompute_every != 2 and self.recompute != "every":
            raise UserError(
                f"plan: memory.recompute_every = {self.recompute_every} is for memory.recompute = 'every', "
                f"and it is {self.recompute!r}."
            )
        for kind in self.recompute_operations:
            if kind not in OPERATIONS:
                raise unknown_name("kind of operation", kind, OPERATIONS, "plan.memory.recompute_operations")
        if self.recompute_operations != CHEAP and self.recompute != "selective":
            raise UserError(
                f"plan: memory.recompute_operations is for memory.recompute = 'selective', "
                f"and that is {self.recompute!r}."
            )
        if self.recompute == "selective" and not self.recompute_operations:
            raise UserError("plan: memory.recompute = 'selective' needs memory.recompute_operations.")
        if self.budget_bytes and self.recompute != "none":
            raise UserError(
                f"plan: memory.peak_bytes chooses what is recomputed: leave out memory.recompute = {self.recompute!r}."
            )
        if self.budget_bytes and self.offload_activations != "none":
            raise UserError(
                f"plan: memory.peak_bytes chooses what is offloaded of the activations: leave out "
                f"memory.offload_activations = {self.offload_activations!r}."
            )
        if self.optimizer_bits not in (8, 32):
            raise UserError(f"plan: memory.optimizer_bits must be 8 or 32, got {self.optimizer_bits}.")
        if self.offload_dir and not self.uses_disk:
            raise UserError(
                f"plan: memory.offload_dir = {self.offload_dir!r} is for offload to 'disk': set "
                f"memory.offload_activations, offload_optimizer or offload_parameters."
            )

    @property
    def budget_bytes(self) -> int:
        """The most that a worker may hold at once; 0 for no limit."""
        return size_bytes(self.peak_bytes, "plan: memory.peak_bytes")

    @property
    def works_on_blocks(self) -> bool:
        """Blocks of the model are recomputed, or what they keep is offloaded; or may be, should a budget ask for it."""
        return self.recompute != "none" or self.offload_activations != "none" or bool(self.budget_bytes)

    @property
    def uses_disk(self) -> bool:
        """Some of it goes to disk, or may, should a budget ask for it."""
        tiers = (self.offload_activations, self.offload_optimizer, self.offload_parameters)
        return "disk" in tiers or bool(self.budget_bytes)

    @property
    def changes_weights(self) -> str:
        """The key that changes how parameters are kept while a pass runs, if one does."""
        if self.parameters != "float32":
            return f"memory.parameters = {self.parameters!r}"
        if self.offload_parameters != "none":
            return f"memory.offload_parameters = {self.offload_parameters!r}"
        return ""

    @property
    def changes_updates(self) -> str:
        """The key that changes how parameters or optimiser states are kept, if one does."""
        if self.optimizer_bits != 32:
            return f"memory.optimizer_bits = {self.optimizer_bits}"
        if self.offload_optimizer != "none":
            return f"memory.offload_optimizer = {self.offload_optimizer!r}"
        return self.changes_weights

    @property
    def lossy(self) -> str:
        """Which part changes the result, in a few words; "" for none."""
        parts = []
        if self.optimizer_bits == 8:
            parts.append("optimiser states are kept in 8 bits a value (block-wise)")
        if self.parameters == "bfloat16-stochastic":
            parts.append("parameters are bfloat16, rounded at random")
        if self.parameters == "bfloat16-compensated":
            parts.append("parameters are bfloat16 with a 16-bit compensation of each rounding")
        return "; ".join(parts)
