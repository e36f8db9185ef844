"""From a model to a generator: which kernels, how large the cache, how prompts are cut."""

from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import nn

from shoal.errors import UserError
from shoal.serve.generation.drafts import Drafts, Repetition, SmallModel
from shoal.serve.generation.generator import Generator
from shoal.serve.generation.options import Options
from shoal.serve.generation.pace import pace_of
from shoal.serve.generation.scheduler import Limits
from shoal.serve.generation.step import BLOCK, Step, shape_of


def pack_once(model: nn.Module, options: Options) -> None:
    """What `open_generator` will want, made now. Raises UserError as it does."""
    for each in filter(None, (model, _draft(model, options))):
        shape_of(each)
        if is_native(each, options):
            from shoal.serve.generation.packing import packed_once

            packed_once(each, torch.bfloat16 if halves(each, options) else torch.float32)  # type: ignore[arg-type]


def is_native(model: nn.Module, options: Options) -> bool:
    """Whether the C++ kernels compute its steps."""
    if options.kernels == "torch" or next(model.parameters()).device.type != "cpu":
        return False
    from shoal.serve.generation.native_step import available

    return available()


def halves(model: nn.Module, options: Options) -> bool:
    """Whether its weights are rounded to bfloat16."""
    return options.precision == "bfloat16" or next(model.parameters()).dtype == torch.bfloat16


def open_step(model: nn.Module, options: Options) -> Step:
    """Raises UserError for a model that is no GPT, and when the native kernels are asked for and not there."""
    shape = shape_of(model)
    whole = -(-shape.context // BLOCK)
    asked = options.cache_bytes or min(1 << 30, options.running * whole * shape.block_bytes())
    blocks = max(asked // shape.block_bytes(), 1)
    half = halves(model, options)
    if is_native(model, options):
        from shoal.serve.generation.native_step import NativeStep

        return NativeStep(model, blocks, threads=options.threads, half=half)  # type: ignore[arg-type]
    refuse_native(model, options)
    from shoal.serve.generation.torch_step import TorchStep

    return TorchStep(model, blocks, half=half)  # type: ignore[arg-type]


def refuse_native(model: nn.Module, options: Options) -> None:
    """Raises UserError when the native kernels are asked for and not there."""
    if options.kernels == "native" and not is_native(model, options):
        from shoal.comm.native import build

        raise UserError(f"generation option kernels = 'native': {build.why_not(['generation']) or 'only on a CPU'}.")


def open_generator(model: nn.Module, options: Options | None = None, draft: nn.Module | None = None) -> Generator:
    """A generator over the model's weights as they are now; ``draft`` is a small model that guesses ahead.

    Raises UserError as `open_step`, and for a draft of another vocabulary."""
    options = options or Options()
    draft = draft or _draft(model, options)
    step = open_step(model, options)
    drafts: Drafts | None = Repetition() if options.speculate else None
    if draft is not None:
        _check_draft(model, draft)
        drafts = SmallModel(open_step(draft, replace(options, cache_bytes=options.cache_bytes // 4)))
    pace = pace_of(shape_of(model), halves(model, options), options.stretch, options.prompt_rows)
    return Generator(step, pace, Limits(running=options.running), drafts, options.speculate or 4)


_drafts: "WeakKeyDictionary[nn.Module, nn.Module]" = WeakKeyDictionary()


def _draft(model: nn.Module, options: Options) -> nn.Module | None:
    """The small model that the options name: loaded once for a model."""
    if not options.draft:
        return None
    if model not in _drafts:
        from shoal.serve.target import load

        draft = load(options.draft).model
        _check_draft(model, draft)
        _drafts[model] = draft
    return _drafts[model]


def _check_draft(model: nn.Module, draft: nn.Module) -> None:
    large, small = shape_of(model).vocab, shape_of(draft).vocab
    if large != small:
        raise UserError(f"the draft's vocabulary has {small} tokens and the model's {large}: they must be the same.")
