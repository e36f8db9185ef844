"""From a model to a generator: which kernels, how large the cache, how prompts are cut."""

from dataclasses import replace

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
    """What `open_step` will want of the weights, made now. Raises UserError as it does."""
    shape_of(model)
    if _native(model, options):
        from shoal.serve.generation.packing import packed_once

        packed_once(model, torch.bfloat16 if _half(model, options) else torch.float32)  # type: ignore[arg-type]


def _native(model: nn.Module, options: Options) -> bool:
    if options.kernels == "torch" or next(model.parameters()).device.type != "cpu":
        return False
    from shoal.serve.generation.native_step import available

    return available()


def _half(model: nn.Module, options: Options) -> bool:
    return options.precision == "bfloat16" or next(model.parameters()).dtype == torch.bfloat16


def open_step(model: nn.Module, options: Options) -> Step:
    """Raises UserError for a model that is no GPT, and when the native kernels are asked for and not there."""
    shape = shape_of(model)
    whole = -(-shape.context // BLOCK)
    asked = options.cache_bytes or min(1 << 30, options.running * whole * shape.block_bytes())
    blocks = max(asked // shape.block_bytes(), 1)
    half = _half(model, options)
    if _native(model, options):
        from shoal.serve.generation.native_step import NativeStep

        return NativeStep(model, blocks, threads=options.threads, half=half)  # type: ignore[arg-type]
    if options.kernels == "native":
        from shoal.comm.native import build

        raise UserError(f"generation option kernels = 'native': {build.why_not(['generation']) or 'only on a CPU'}.")
    from shoal.serve.generation.torch_step import TorchStep

    return TorchStep(model, blocks, half=half)  # type: ignore[arg-type]


def open_generator(model: nn.Module, options: Options | None = None, draft: nn.Module | None = None) -> Generator:
    """A generator over the model's weights as they are now; ``draft`` is a small model that guesses ahead.

    Raises UserError as `open_step`, and for a draft of another vocabulary."""
    options = options or Options()
    if draft is None and options.draft:
        draft = _loaded(options.draft)
    step = open_step(model, options)
    drafts: Drafts | None = Repetition() if options.speculate else None
    if draft is not None:
        small = open_step(draft, replace(options, cache_bytes=options.cache_bytes // 4))
        if small.vocab != step.vocab:
            raise UserError(
                f"the draft's vocabulary has {small.vocab} tokens and the model's {step.vocab}: they must be the same."
            )
        drafts = SmallModel(small)
    pace = pace_of(shape_of(model), _half(model, options), options.stretch, options.prompt_rows)
    return Generator(step, pace, Limits(running=options.running), drafts, options.speculate or 4)


def _loaded(target: str) -> nn.Module:
    from shoal.serve.target import load

    return load(target).model
