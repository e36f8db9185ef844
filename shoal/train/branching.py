"""A new run that starts from a checkpoint of another one: what was trained up to there is not trained again."""

from pathlib import Path

from shoal.errors import UserError
from shoal.run.run import origin
from shoal.train import checkpoint

SHOWN = 8  # steps that an error names


def find_start(target: str, steps: int = 0) -> Path:
    """The checkpoint that "RUN@STEP" names, for a run of ``steps`` (0: by epochs, which only the data tell).

    Raises UserError with the nearest step when there is none, or a damaged one, and when nothing is left to do.

    Of a step that was saved several times it is the newest one."""
    run, step = origin(target)
    if 0 < steps <= step:
        raise UserError(f"--from {target!r}: a run of {steps} steps has nothing left to do there: raise --steps.")
    found = checkpoint.listing(run.checkpoints)
    saved = sorted({one.step for one in found if not one.problem})
    if not saved:
        raise UserError(f"--from {target!r}: there is no whole checkpoint in {str(run.checkpoints)!r}.")
    of_step = [one for one in found if one.step == step]
    if not of_step:
        near = min(saved, key=lambda each: (abs(each - step), each))
        shown = ", ".join(map(str, saved[-SHOWN:]))
        kept = f"{'..., ' if len(saved) > SHOWN else ''}{shown}"
        raise UserError(f"--from {target!r}: there is no checkpoint of step {step}, the nearest is {near} (of {kept}).")
    problems = checkpoint.damage(of_step[0].path)
    if problems:
        others = sorted((each for each in saved if each != step), key=lambda each: abs(each - step))
        other = f" The nearest other one is of step {others[0]}." if others else ""
        raise UserError(f"--from {target!r}: {problems[0]}{other}")
    return of_step[0].path
