"""How layers become the stages of a pipeline, and in which order their work is done."""

from dataclasses import dataclass

from shoal.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PipelinePlan:
    schedule: str = "1f1b"  # a name that `shoal plan --schedules all` lists, or a CSV file
    chunks: int = 1  # of each worker: interleaved and looped schedules take more than one
    cuts: tuple[str, ...] = ()  # names of modules at which a new chunk begins; () balances by measured time

    def __post_init__(self) -> None:
        if self.chunks < 1:
            raise UserError(f"plan: pipeline.chunks must be at least 1, got {self.chunks}.")
