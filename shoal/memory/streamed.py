"""An optimiser that updates one piece of a parameter at a time, its states brought from how and where they are kept.

Between two updates states may be quantised, on disk, or in the host's memory, and parameters bfloat16: all of it is
float32 beside the computation only for the piece in hand. Torch's own kernel makes the update, so what is only kept
elsewhere keeps its bits.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from shoal.errors import UserError
from shoal.memory.narrow import REST
from shoal.memory.quantised import BLOCK, blocks_of, decode, encode
from shoal.memory.rounding import joined, round_at_random, split, stream_key
from shoal.memory.shelves import SMALLEST, Here, OnDisk, Shelf

PIECE = 1 << 18  # elements: a piece of weights, gradients and states together fits a core's cache
CODES, SCALES = ".codes", ".scales"  # at the end of a key: a state in 8 bits
SIGNED = {"exp_avg": True, "momentum_buffer": True, "exp_avg_sq": False, "max_exp_avg_sq": False}
QUANTISABLE = ("Adam", "AdamW", "SGD")
_WHOLE = ("Adafactor", "Muon")  # look at a parameter as a matrix; the others treat each element by itself

State = dict[str, Any]


@dataclass(frozen=True)
class Origin:
    """What is updated is all of a parameter, or a part of it, flat from ``start`` on. Its bits are the same."""

    name: str
    elements: int  # of the whole parameter: they decide how its states are kept
    start: int = 0


@dataclass
class Keeping:
    """How parameters and states are kept between two updates."""

    shelf: Shelf  # of states
    quantised: bool = False
    rests: Mapping[nn.Parameter, Tensor | None] = field(default_factory=dict)  # of bfloat16 parameters: see `narrow`
    weights: Shelf | None = None  # of parameters, where these are not in memory
    seed: int = 0
    step: Callable[[], int] = lambda: 0  # updates that have been made before this one
    tell: Callable[[str], None] = lambda line: None


def check_streamable(optimizer: torch.optim.Optimizer, key: str, *, quantised: bool) -> None:
    """Raises UserError for an optimiser that cannot be updated piece by piece, or whose states have no 8-bit form."""
    kind = type(optimizer)
    if not f"{kind.__module__}.".startswith("torch.optim."):
        raise UserError(f"plan: {key} is for the optimisers of torch.optim, and this one is {kind.__qualname__}.")
    if quantised and kind.__name__ not in QUANTISABLE:
        raise UserError(
            f"plan: {key} is for {', '.join(QUANTISABLE[:-1])} and {QUANTISABLE[-1]}, and the optimiser is "
            f"{kind.__name__}: use one of them, or leave the key out."
        )


def quantisable(key: str, elements: int, dtype: torch.dtype) -> bool:
    """Whether a state of a parameter with so many elements has an 8-bit form that is worth it."""
    return key in SIGNED and elements >= SMALLEST and dtype == torch.float32


class Streamed(torch.optim.Optimizer):
    """Shares the groups of the optimiser that it wraps; ``state`` holds what is kept, as it is kept."""

    def __init__(self, inner: torch.optim.Optimizer, origins: Mapping[Tensor, Origin], keeping: Keeping) -> None:
        """``origins``: of every tensor of ``inner``."""
        super().__init__(inner.param_groups, inner.defaults)
        self.inner = inner
        self._origins, self._keeping = origins, keeping
        self._whole = type(inner).__name__ in _WHOLE
        self._own_groups = inner.param_groups
        self._scratch: dict[str, Tensor] = {}
        self._here: dict[torch.device, Here] = {}
        self._told = False
        self._of_parts: Streamed | None = None
        for parameter, rest in keeping.rests.items():
            if rest is not None:
                self.state[parameter][REST] = rest
        for given, state in inner.state.items():
            self.state[given].update(state)
        inner.state.clear()

    def over(self, inner: torch.optim.Optimizer, parts: Mapping[Tensor, tuple[nn.Parameter, int]]) -> "Streamed":
        """One that updates ``parts`` in the place of this one's parameters, and keeps their states in the same way.

        ``inner`` holds the parts, flat, each with its parameter and where in it it starts; their states, cut from this
        one's, are the caller's to hand over: a compensated part's other 16 bits too."""
        origins = {part: replace(self._origins[whole], start=start) for part, (whole, start) in parts.items()}
        rests: dict[Any, Tensor | None] = {p: None for p, (whole, _) in parts.items() if whole in self._keeping.rests}
        for part in rests:
            part.grad_dtype = torch.float32
        self._of_parts = Streamed(inner, origins, replace(self._keeping, rests=rests))
        return self._of_parts

    @property
    def elsewhere(self) -> Shelf | None:
        """Where states of parameters that are worth moving lie, if not beside the computation."""
        shelf = self._keeping.shelf
        return None if type(shelf) is Here else shelf

    def expected_bytes(self) -> int:
        """What the states of all parameters that are worth moving will take, found out on a parameter of 2 x 2."""
        total = 0
        for group in filter(lambda group: group["params"], self.param_groups):
            probe: Tensor = torch.zeros(2, 2, device=group["params"][0].device)
            probe.grad = torch.zeros_like(probe)
            made = self._inner_step(group, [probe], [{}])[0]
            each = 0.0
            for key, value in made.items():
                if isinstance(value, Tensor) and value.shape == probe.shape:
                    each += 1 + 4 / BLOCK if self._quantises(key, SMALLEST, value) else value.element_size()
            total += sum(int(each * p.numel()) for p in group["params"] if self._is_large(p))
        return total

    def resident_bytes(self) -> int:
        """What states take of the computation's memory."""
        kept: int = sum(t.nbytes for state in self.state.values() for key, t in state.items() if key == REST)
        moved = not isinstance(self._keeping.shelf, Here)
        return kept + (0 if moved else self.expected_bytes())

    def scratch_bytes(self) -> int:
        """What the pieces in hand take while they are updated, at the most."""
        largest = max((p.numel() for group in self.param_groups for p in group["params"]), default=0)
        return 8 * 4 * min(PIECE, largest)

    def prefetch(self) -> None:
        """The states that the next update begins with will be needed soon."""
        if self._of_parts is not None:
            self._of_parts.prefetch()
            return
        for parameter in [p for group in self.param_groups for p in group["params"]][:4]:
            self._ahead(parameter)

    def _ahead(self, parameter: nn.Parameter) -> None:
        self._keeping.shelf.ahead(self._tensors(parameter))
        if self._keeping.weights is not None:
            self._keeping.weights.ahead([parameter.detach()])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        work: list[tuple[dict[str, Any], nn.Parameter]] = []
        for group in self.param_groups:
            given = [p for p in group["params"] if p.grad is not None]
            alone = [self._is_large(p) or p in self._keeping.rests for p in given]
            self._update_together(group, [p for p, by_itself in zip(given, alone, strict=True) if not by_itself])
            work += [(group, p) for p, by_itself in zip(given, alone, strict=True) if by_itself]
        for number, (group, parameter) in enumerate(work):
            for _, later in work[number + 1 : number + 3]:
                self._ahead(later)
            self._update(group, parameter)
            self._keeping.shelf.done(self._tensors(parameter))
            if self._keeping.weights is not None:
                self._keeping.weights.done([parameter.detach()])

    def _is_large(self, parameter: nn.Parameter) -> bool:
        return self._origins[parameter].elements >= SMALLEST

    def _update_together(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        """Parameters that stay as they are, and whose states do: one call for all."""
        if parameters:
            made = self._inner_step(group, parameters, [self.state[p] for p in parameters])
            for parameter, state in zip(parameters, made, strict=True):
                self.state[parameter] = state

    def _tensors(self, parameter: nn.Parameter) -> Iterable[Tensor]:
        return [value for value in self.state[parameter].values() if isinstance(value, Tensor)]

    # --- one parameter ------------------------------------------------------------------------------------------------

    def _update(self, group: dict[str, Any], parameter: nn.Parameter) -> None:
        kept, count = self.state[parameter], parameter.numel()
        assert parameter.grad is not None
        gradient = parameter.grad.contiguous().view(-1)
        pieces = not self._whole and parameter.is_contiguous()
        size = PIECE if pieces else max(count, 1)
        known = _keys(kept)
        plain: State = {}
        for start in range(0, count, size):
            end = min(start + size, count)
            shape = torch.Size((end - start,)) if pieces else parameter.shape
            weight = self._weight(parameter, start, end)
            shaped = weight.view(shape)
            shaped.grad = gradient[start:end].view(shape)
            state = {key: self._bring(kept, key, start, end, shape, parameter) for key in known}
            made = self._inner_step(group, [shaped], [state])[0]
            self._put_weight(parameter, start, weight)
            for key, value in made.items():
                if isinstance(value, Tensor) and value.shape == shape:
                    self._put(parameter, key, start, value)
                else:
                    plain[key] = value
        kept.update(plain)

    def _inner_step(self, group: dict[str, Any], weights: Sequence[Tensor], states: Sequence[State]) -> list[State]:
        """Torch's update of ``weights``, in place, and the states after it."""
        inner, parameters = self.inner, group["params"]
        try:
            group["params"], inner.param_groups = list(weights), [group]
            inner.state.update({w: state for w, state in zip(weights, states, strict=True) if state})
            inner.step()
            return [inner.state.get(weight, {}) for weight in weights]
        finally:
            group["params"], inner.param_groups = parameters, self._own_groups
            inner.state.clear()

    def _buffer(self, role: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        held = self._scratch.get(role)
        if held is None or held.numel() < count or held.dtype != dtype or held.device != device:
            held = self._scratch[role] = torch.empty(count, dtype=dtype, device=device)
        return held[:count]

    # --- weights ------------------------------------------------------------------------------------------------------

    def _weight(self, parameter: nn.Parameter, start: int, end: int) -> Tensor:
        """float32 values to be updated in place: the parameter's own memory where that can be."""
        own = parameter.detach()
        narrow = parameter in self._keeping.rests
        away = self._keeping.weights is not None and self._keeping.weights.holds(own)
        if own.is_contiguous() and not narrow and not away:
            return own.view(-1)[start:end]
        flat = own.contiguous().view(-1)[start:end]
        into = self._buffer("weight", end - start, torch.float32 if narrow else own.dtype, own.device)
        rest = self.state[parameter].get(REST) if narrow else None
        if rest is None:
            return into.copy_(flat)
        return joined(flat, self._shelf_of(rest).read(rest, start, end), into)

    def _put_weight(self, parameter: nn.Parameter, start: int, values: Tensor) -> None:
        keeping, own = self._keeping, parameter.detach()
        if parameter in keeping.rests:
            rest = self.state[parameter].get(REST)
            if rest is None:
                origin = self._origins[parameter]
                key = stream_key(keeping.seed, keeping.step(), origin.name)
                values = round_at_random(values, key, origin.start + start)
            else:
                values, left = split(values)
                self._write(parameter, REST, start, left)
        if keeping.weights is not None and keeping.weights.holds(own):
            try:
                keeping.weights.write(own, start, values)
                return
            except OSError as error:
                self._tell_full("parameter", error)
                parameter.data = own = own.clone()
        if own.is_contiguous():
            Here(own.device).write(own, start, values)
        else:
            own.copy_(values.view(own.shape))

    # --- states -------------------------------------------------------------------------------------------------------

    def _quantises(self, key: str, elements: int, value: Tensor) -> bool:
        return self._keeping.quantised and quantisable(key, elements, value.dtype)

    def _bring(self, kept: State, key: str, start: int, end: int, shape: torch.Size, parameter: nn.Parameter) -> Any:
        if key + CODES in kept:
            codes, scales = kept[key + CODES], kept[key + SCALES]
            codes = self._shelf_of(codes).read(codes, start, end)
            scales = self._shelf_of(scales).read(scales, start // BLOCK, blocks_of(end))
            into = self._buffer(key, end - start, torch.float32, parameter.device)
            return decode(codes.to(into.device), scales.to(into.device), into, signed=SIGNED[key]).view(shape)
        value = kept[key]
        if not isinstance(value, Tensor):
            return value
        if value.numel() != parameter.numel() or value.shape != parameter.shape:
            return value.clone()  # a counter of steps: each piece counts the same step
        shelf = self._shelf_of(value)
        found = shelf.read(value.contiguous(), start, end)
        if isinstance(shelf, OnDisk):
            found = self._buffer(key, end - start, found.dtype, parameter.device).copy_(found)
        return found.view(shape)

    def _put(self, parameter: nn.Parameter, key: str, start: int, value: Tensor) -> None:
        flat, elements = value.contiguous().view(-1), parameter.numel()
        if not self._quantises(key, self._origins[parameter].elements, value):
            self._write(parameter, key, start, flat)
            return
        codes = self._buffer("codes", len(flat), torch.uint8, flat.device)
        scales = self._buffer("scales", blocks_of(len(flat)), torch.float32, flat.device)
        encode(flat, codes, scales, signed=SIGNED[key])
        self._write(parameter, key + CODES, start, codes)
        self._write(parameter, key + SCALES, start // BLOCK, scales, torch.Size((blocks_of(elements),)))

    def _write(
        self, parameter: nn.Parameter, key: str, start: int, values: Tensor, shape: torch.Size | None = None
    ) -> None:
        """Into what is kept under ``key``, which is made, or moved to its shelf, when it is not there yet."""
        kept, shape = self.state[parameter], shape or parameter.shape
        held = kept.get(key)
        shelf = self._keeping.shelf if self._is_large(parameter) else self._at(parameter.device)
        try:
            if held is None or not (shelf.holds(held) and held.is_contiguous()):
                moved = shelf.make(shape, values.dtype)
                if held is not None:
                    shelf.write(moved, 0, held.contiguous().view(-1))
                held = kept[key] = moved
            shelf.write(held, start, values)
        except OSError as error:
            self._tell_full("optimiser state", error)
            if held is None or shelf.holds(held):
                stays = torch.empty(shape, dtype=values.dtype, device=parameter.device)
                held = kept[key] = stays if held is None else stays.copy_(held)
            self._at(parameter.device).write(held, start, values)

    def _shelf_of(self, tensor: Tensor) -> Shelf:
        shelf = self._keeping.shelf
        return shelf if shelf.holds(tensor) else self._at(tensor.device)

    def _at(self, device: torch.device) -> Here:
        return self._here.setdefault(device, Here(device))

    def _tell_full(self, what: str, error: OSError) -> None:
        """What does not go to disk stays in memory: nothing is lost. Said once; it is tried again at each update."""
        if not self._told:
            self._keeping.tell(
                f"offload to disk takes no more ({error.strerror or error}): a {what} stays in memory, and training "
                f"goes on."
            )
        self._told = True


def _keys(kept: Mapping[str, Any]) -> list[str]:
    """The optimiser's own keys of a state as it is kept."""
    plain = [key.removesuffix(CODES) for key in kept if key != REST and not key.endswith(SCALES)]
    return list(dict.fromkeys(plain))
