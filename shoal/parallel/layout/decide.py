"""From rules to a layout: how each parameter is cut and what each module does. Nothing is allocated.

Two kinds of names meet at each layer. Its weight is cut as the rules say for its module; what flows between modules
lies as the plain rules say. Where they differ, the layer joins or cuts what flows (`shoal.parallel.layout.passage`)."""

from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import nn

from shoal.errors import UserError, unknown_name
from shoal.models.convolution import Conv2d
from shoal.models.dimensions import Dimensions, Grain, Grained, Named
from shoal.models.dropout import Dropout
from shoal.models.ends import Joint, Logits, Positions, Segments
from shoal.models.moe import ExpertLinear, Mixture
from shoal.models.resnet import PaddedShortcut
from shoal.parallel.layout.bands import band_treatments
from shoal.parallel.layout.passage import Cut, Flow, Lie
from shoal.parallel.layout.rules import TENSOR, Rules, fits
from shoal.parallel.layout.split import Split, even_split
from shoal.parallel.layout.treatment import Drawn, Enclosed, Joined, Layout, Mixed, Normed, Placed, Treatment, Weighted
from shoal.recipe.plan import Plan

FORWARDS = (nn.Linear.forward, nn.Conv2d.forward, Conv2d.forward, nn.Embedding.forward)  # what a part can do
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def layout_for(model: nn.Module, plan: Plan) -> Layout:
    """The model over the tensor axis of a plan: its own names of dimensions, and those that the plan gives."""
    names = model.dimensions() if isinstance(model, Named) else {}
    for pattern, dims in plan.dimensions.items():
        fitting = [n for n, p in model.named_parameters() if fnmatchcase(n, pattern) and p.dim() == len(dims)]
        if not fitting:
            known = (name for name, _ in model.named_parameters())
            raise unknown_name(f"parameter with {len(dims)} dims", pattern, known, "plan.dimensions")
        names |= dict.fromkeys(fitting, dims)
    return layout_of(model, names, plan.rules, plan.axes.size(TENSOR))


def layout_of(model: nn.Module, names: Dimensions, given: Mapping[str, str], ways: int) -> Layout:
    """``names``: the dims of the model's parameters (some may be left out: they stay whole); ``given``: a plan's rules.

    Raises UserError, with the repair, for rules that cannot be."""
    grains = model.grains() if isinstance(model, Grained) else {}
    rules = Rules(given, grains)
    dimensions = {*(dim for dims in names.values() for dim in dims), *grains}
    rules.check(dimensions, (name for name, _ in model.named_modules()))
    if ways == 1:
        return Layout(1, {}, {})
    deciding = _Deciding(model, names, rules, ways)
    for name, module in model.named_modules():
        deciding.visit(name, module)
    if deciding.rows:
        deciding.modules |= band_treatments(model, ways)
    _check_dropouts(model, deciding.splits)
    if not deciding.modules:
        kind, axis = type(model).__name__, f"plan: mesh axis 'tensor' = {ways}"
        if not dimensions:
            raise UserError(
                f"{axis} splits nothing of this {kind}, whose dimensions have no names: give it a method dimensions() "
                f"that names those of each parameter (docs/layouts.md), or use axis 'data' or 'pipe'."
            )
        raise UserError(
            f"{axis} splits nothing of this {kind}: give its dimensions ({', '.join(sorted(dimensions))}) a rule such "
            f"as rules.{min(dimensions)} = 'tensor', or use axis 'data'."
        )
    return Layout(ways, deciding.splits, deciding.modules)


class _Deciding:
    def __init__(self, model: nn.Module, names: Dimensions, rules: Rules, ways: int) -> None:
        self.model, self.names, self.rules, self.ways = model, names, rules, ways
        self.splits: dict[str, Split] = {}
        self.modules: dict[str, Treatment] = {}
        self.rows = rules.axis("rows") == TENSOR
        self.slices: tuple[str, ...] = ()
        weights = [(n, dims) for n, dims in names.items() if len(dims) > 1]
        embeddings = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
        made = {dims[1] if name in embeddings else dims[0] for name, dims in weights}
        used = {dims[1] for name, dims in weights if name not in embeddings}
        for module in model.modules():
            if isinstance(module, Logits):
                made, used = made | {module.dims[0]}, used | set(module.dims)  # the loss takes the vocabulary in parts
        self._made = {self.rules.root(dim) for dim in made}
        self._flowing = self._made & {self.rules.root(dim) for dim in used}
        self._convolved = {
            self.rules.root(dim)
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d)
            for dim in names.get(f"{name}.weight", ())[:2]
        }
        if rules.axis("sequence") == TENSOR:
            self._check_slices()
            self.slices = model.sequences  # type: ignore[assignment]

    def visit(self, name: str, module: nn.Module) -> None:
        sliced = bool(self.slices) and any(fits(name, pattern) for pattern in self.slices)
        if isinstance(module, Positions | Segments):
            self._place(name, module, sliced)
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding) and type(module).forward in FORWARDS:
            self._weigh(name, module, sliced)
        elif isinstance(module, Mixture):
            if sliced:
                self.modules[name] = Enclosed()
            self._mix(f"{name}.experts", module)
        elif isinstance(module, ExpertLinear):
            pass  # with the mixture that it belongs to
        elif isinstance(module, Logits):
            self._give_logits(name, module, sliced)
        elif isinstance(module, nn.LayerNorm):
            self._norm(name, module, sliced)
        elif isinstance(module, BATCH_NORMS):
            for key, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if key != "num_batches_tracked":
                    self._cut(f"{name}.{key}", self.names.get(f"{name}.weight", ()), name, module.num_features)
        elif isinstance(module, Dropout):
            self._draw(name, module)
        elif isinstance(module, PaddedShortcut):
            if self._lies("width", False) == "features":
                self._widen(name, module)
        elif isinstance(module, Joint):
            if sliced:
                self.modules[name] = Joined(module.dims.index("sequence"), None)
        else:
            self._leave_whole(name, module)

    # --- dimensions -------------------------------------------------------------------------------------------

    def _axis(self, dim: str, module: str = "") -> str:
        if self.rows and self.rules.root(dim) in self._convolved:
            if self.rules.told(dim, module) == TENSOR:
                raise UserError(
                    f"plan.rules: axis 'tensor' would split both 'rows' and {dim!r} of the same images: "
                    f"write rules.{dim} = '' or leave rules.rows out."
                )
            return ""
        return self.rules.axis(dim, module)

    def _lies(self, dim: str, sliced: bool) -> Lie:
        """How what flows between modules under this name lies."""
        if self.rules.root(dim) in self._flowing and self._axis(self.rules.root(dim)) == TENSOR:
            return "features"
        return "positions" if sliced else "whole"

    def _split(self, dim: str, size: int, index: int, what: str) -> Split:
        """Raises UserError when there are fewer whole units than workers."""
        grain = self.rules.grains.get(dim, Grain())
        parts, unit = grain.parts, grain.unit
        if size % (parts * unit):
            raise UserError(
                f"{what}: dimension {dim!r} has {size} elements, which are no whole {grain.called or 'units'} of "
                f"{parts} x {unit}: make it a multiple of {parts * unit}."
            )
        units = size // (parts * unit)
        if units < self.ways:
            raise UserError(
                f"{what}: dimension {dim!r} has {units} {grain.called or 'elements'}, fewer than the {self.ways} "
                f"workers of mesh axis 'tensor': use tensor = {units} at most, or rules.{self.rules.root(dim)} = ''."
            )
        return even_split(index, TENSOR, size, self.ways, parts, unit)

    def _cut(self, parameter: str, dims: tuple[str, ...], module: str, *sizes: int) -> int | None:
        """Decide how a parameter is cut; the index of the dim that is, if one is."""
        found = [index for index, dim in enumerate(dims) if self._axis(dim, module) == TENSOR]
        if len(found) > 1:  # a dimension that only follows another gives way
            found = [index for index in found if self.rules.root(dims[index]) == dims[index]] or found
        if len(found) > 1:
            both = [dims[index] for index in found]
            raise UserError(
                f"plan.rules: axis 'tensor' would split {parameter} {list(dims)} twice, by {both[0]!r} and "
                f"{both[1]!r}: write rules.{both[1]} = '' or rules.{both[0]} = ''."
            )
        if not found:
            return None
        self.splits[parameter] = self._split(dims[found[0]], sizes[found[0]], found[0], parameter)
        return found[0]

    # --- modules ----------------------------------------------------------------------------------------------

    def _weigh(self, name: str, module: nn.Linear | nn.Conv2d | nn.Embedding, sliced: bool) -> None:
        dims = self.names.get(f"{name}.weight")
        if dims is None:
            return
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            self._leave_whole(name, module)
            return
        index = self._cut(f"{name}.weight", dims, name, *tuple(module.weight.shape))
        looked_up = isinstance(module, nn.Embedding)
        inwards, outwards = (0, 1) if looked_up else (1, 0)
        cut: Cut = "whole" if index is None else "out" if index == outwards else "in"
        bias: nn.Parameter | None = getattr(module, "bias", None)
        if bias is not None:
            self._cut(f"{name}.bias", dims[:1], name, *bias.shape)
        made, used = dims[outwards], dims[inwards]
        arrives = "whole" if looked_up else self._lies(used, sliced)
        self._flow(name, Flow(cut, arrives, self._lies(made, sliced)), dims, inwards, tuple(module.weight.shape))

    def _flow(self, name: str, flow: Flow, dims: tuple[str, ...], inwards: int, shape: tuple[int, ...]) -> None:
        if not flow.possible:
            raise UserError(
                f"plan.rules: {name} {list(dims)} cannot be cut in this way while 'sequence' is on axis 'tensor': "
                f"leave out the rules for single modules, or rules.sequence."
            )
        if flow == Flow("whole", "whole", "whole"):
            return
        needed = (flow.cut == "in" or flow.arrives == "features", flow.cut == "out" or flow.leaves == "features")
        inputs, outputs = (
            self._split(dims[index], shape[index], -1, f"{name}.weight") if wanted else None
            for index, wanted in zip((inwards, 1 - inwards), needed, strict=True)
        )
        learns = self.rules.root(dims[inwards]) in self._made or isinstance(self.model.get_submodule(name), Logits)
        self.modules[name] = Weighted(flow, inputs, outputs, learns)

    def _give_logits(self, name: str, module: Logits, sliced: bool) -> None:
        owners = [n for n, dims in self.names.items() if dims == module.dims]
        if not owners:
            return
        weight = owners[-1]  # an output layer of its own stands behind the embedding
        index = self._cut(weight, module.dims, weight.rpartition(".")[0], *self.model.get_parameter(weight).shape)
        cut: Cut = "whole" if index is None else "out" if index == 0 else "in"
        vocab, width = module.dims
        leaves: Lie = "features" if self._lies(vocab, False) == "features" else "whole"
        parent = name.rpartition(".")[0]
        for key, bias in self.model.get_submodule(parent).named_parameters(recurse=False):
            full = f"{parent}.{key}" if parent else key
            if self.names.get(full) == (vocab,):
                self._cut(full, (vocab,), weight.rpartition(".")[0], *bias.shape)
        flow = Flow(cut, self._lies(width, sliced), leaves)
        self._flow(name, flow, module.dims, 1, self.model.get_parameter(weight).shape)

    def _mix(self, name: str, module: Mixture) -> None:
        found = set()
        for key, parameter in module.experts.named_parameters():
            dims = self.names.get(f"{name}.{key}", ())
            index = self._cut(f"{name}.{key}", dims, f"{name}.{key.partition('.')[0]}", *parameter.shape)
            if parameter.dim() == 3:
                found.add("" if index is None else dims[index])
        if found == {"ffn"}:
            self.modules[name] = Mixed(module.top_k)
        elif found != {""}:
            raise UserError(f"plan.rules: {name} are split by 'ffn' or not at all: leave other rules for them out.")

    def _widen(self, name: str, module: PaddedShortcut) -> None:
        """It works on all channels: they are joined before it and cut after it."""
        channels = self.model.get_submodule(f"{name.rpartition('.')[0]}.conv1").in_channels
        assert isinstance(channels, int)
        inputs, outputs = (self._split("width", size, 1, name) for size in (channels, channels + module.added))
        self.modules[name] = Weighted(Flow("whole", "features", "features"), inputs, outputs, learns=True)

    def _norm(self, name: str, module: nn.LayerNorm, sliced: bool) -> None:
        dims = self.names.get(f"{name}.weight", self.names.get(f"{name}.bias", ()))
        if len(dims) != 1:
            return
        for key, parameter in module.named_parameters(recurse=False):
            self._cut(f"{name}.{key}", dims, name, *parameter.shape)
        lies = self._lies(dims[0], sliced)
        if lies == "features" and f"{name}.weight" not in self.splits and module.weight is not None:
            raise UserError(f"plan.rules: {name} must be split as what flows in: leave out the rule for this module.")
        if lies != "whole":
            split = self._split(dims[0], module.normalized_shape[0], -1, name) if lies == "features" else None
            self.modules[name] = Normed(lies, split)

    def _place(self, name: str, module: nn.Embedding, sliced: bool) -> None:
        dims = self.names.get(f"{name}.weight")
        if dims is None:
            return
        if self._axis(dims[0], name) == TENSOR:
            raise UserError(
                f"plan.rules: {dims[0]!r} of {name} cannot be split: every worker needs all of them: "
                f"write rules.{dims[0]} = ''."
            )
        self._cut(f"{name}.weight", dims, name, *module.weight.shape)
        lies = self._lies(dims[1], sliced)
        if lies == "positions":
            self.modules[name] = Placed(lies)

    def _draw(self, name: str, module: Dropout) -> None:
        cut = [d for d in module.dims if d != "sequence" and self._lies(d, False) == "features"]
        if cut:
            self.modules[name] = Drawn(module.dims.index(cut[0]), self._whole_split(cut[0], cut[0] == "heads"))
        elif self.slices and "sequence" in module.dims:
            self.modules[name] = Drawn(module.dims.index("sequence"), None)

    def _whole_split(self, dim: str, heads: bool) -> Split:
        """Of what flows under this name; of whole units where ``heads`` have a dim of their own."""
        for parameter, dims in self.names.items():
            for index, own in enumerate(dims):
                if own == dim and len(dims) > 1:
                    size = self.model.get_parameter(parameter).shape[index]
                    unit = self.rules.grains[dim].unit if heads else 1
                    split = self._split(dim, size, index, parameter)
                    kept = tuple(tuple((a // unit, b // unit) for a, b in runs) for runs in split.kept)
                    return Split(split.dim, split.axis, kept)
        raise UserError(f"a dropout names the dimension {dim!r}, which no weight of the model has: check its dims.")

    # --- what cannot be ---------------------------------------------------------------------------------------

    def _leave_whole(self, name: str, module: nn.Module) -> None:
        for key, _ in module.named_parameters(recurse=False):
            full = f"{name}.{key}" if name else key
            for dim in self.names.get(full, ()):
                if self.rules.told(dim, name) == TENSOR:
                    raise UserError(
                        f"plan.rules: {full} has dimension {dim!r}, and a {type(module).__name__} is not split by it: "
                        f"write rules.{dim} = ''."
                    )

    def _check_slices(self) -> None:
        if not getattr(self.model, "sequences", ()):
            raise UserError(
                f"plan.rules.sequence = 'tensor': a {type(self.model).__name__} has no modules that work on slices of "
                f"the sequence: leave the rule out."
            )
        for dim, wanted in (("heads", TENSOR), ("width", "")):
            if self._axis(dim) != wanted:
                raise UserError(
                    f"plan.rules.sequence = 'tensor' needs rules.{dim} = {wanted!r}: between the layers the "
                    f"sequence is cut, inside of attention the heads."
                )


def _check_dropouts(model: nn.Module, splits: Mapping[str, Split]) -> None:
    for name, module in model.named_modules():
        if splits and isinstance(module, nn.Dropout) and module.p:
            raise UserError(
                f"{name} is a torch.nn.Dropout, whose mask would depend on the layout: use "
                f"shoal.models.dropout.Dropout({module.p}, dims) that names the dims of what comes in."
            )
