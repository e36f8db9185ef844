"""Following a run: its newest checkpoint is served as soon as it is whole."""

import asyncio
import re
import sys
from pathlib import Path

from shoal.errors import UserError
from shoal.serve.groups.mesh import several_hosts
from shoal.serve.http.messages import HttpError
from shoal.serve.service import Service

LOOK_S = 1.0  # how often the folder is looked at
_CHECKPOINT = re.compile(r"step-(\d{8,})(?:\.(\d+))?")  # as shoal.train.checkpoint names them, once they are whole


def newest_name(run: Path) -> str:
    """The name of the run's newest checkpoint, "" when there is none. Raises UserError when it is no run."""
    if not (run / "recipe.toml").exists():
        raise UserError(f"--follow needs a run: {str(run)!r} holds no recipe.toml.")
    try:
        names = [entry.name for entry in (run / "checkpoints").iterdir()]
    except OSError:
        return ""
    found = [(int(m[1]), int(m[2] or 0), m[0]) for m in map(_CHECKPOINT.fullmatch, names) if m]
    return max(found)[2] if found else ""


async def follow(service: Service, run: Path) -> None:
    """Never returns. A checkpoint that cannot be served is told once on stderr; the old one goes on."""
    seen = newest_name(run)
    while True:
        await asyncio.sleep(LOOK_S)
        name = newest_name(run)
        if name in ("", seen):
            continue
        seen = name
        try:
            if service.has_canary:  # nobody has promoted it: the newer one takes its place
                await service.roll_back()
            # each host would find a newest one of its own; one host loads a lost parent's again, when it may be gone
            target = str(run / "checkpoints" / name) if several_hosts() else ""
            await service.reload(target, service.options.canary)
        except HttpError as error:
            print(f"shoal: {name} is not served: {error.why}", file=sys.stderr)
