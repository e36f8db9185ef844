"""A user's own schedule, from a CSV file and back.

A row is a worker and a cell one pass: ``F0.3`` is the forward pass of chunk 0 on micro-batch 3, ``B`` its backward
pass, ``I`` and ``W`` the two halves of one. The cells of torch.distributed.pipelining (``0F3``, and the pairs that it
overlaps) are read too. Empty cells stand for idle time and mean nothing; lines that begin with # are comments. Who
holds which chunk, and how many micro-batches there are, follows from the cells. Sends and receives are worked out, not
written."""

import re
from pathlib import Path

from shoal.errors import UserError
from shoal.parallel.schedules.actions import Action, Kind
from shoal.parallel.schedules.schedule import Schedule

_OURS = re.compile(r"([FBIW])(\d+)\.(\d+)")
_TORCHS = re.compile(r"(\d+)([FBIW])(\d+)")
_OVERLAPPED = re.compile(r"\(([^()]*)\)OVERLAP_F_B")
_MESSAGE = re.compile(r"SEND|RECV|^[SR][FB]")


def read_csv(path: str | Path) -> Schedule:
    """Raises UserError naming the row and the cell."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"schedule {str(path)!r} cannot be read: {error}: name a CSV file with a row a worker."
        ) from None
    return parse_csv(text, str(path))


def parse_csv(text: str, name: str) -> Schedule:
    """``name`` is what errors and tables call it. Raises UserError naming the row and the cell."""
    rows = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    actions = tuple(_row(row, f"schedule {name!r}, worker {worker}") for worker, row in enumerate(rows))
    holder: dict[int, int] = {}
    for worker, row in enumerate(actions):
        for action in row:
            if holder.setdefault(action.chunk, worker) != worker:
                raise UserError(
                    f"schedule {name!r}: chunk {action.chunk} is on worker {holder[action.chunk]} and, with "
                    f"{action}, on worker {worker}: keep it on one."
                )
    if not holder:
        raise UserError(f"schedule {name!r} has no pass: write a row a worker, with cells such as F0.0.")
    missing = next((chunk for chunk in range(max(holder)) if chunk not in holder), None)
    if missing is not None:
        raise UserError(
            f"schedule {name!r} has no pass of chunk {missing}, but some of chunk {max(holder)}: count chunks from 0."
        )
    placement = tuple(holder[chunk] for chunk in range(len(holder)))
    micro_batches = 1 + max(action.micro_batch for row in actions for action in row)
    return Schedule(name, placement, micro_batches, actions)


def to_csv(schedule: Schedule) -> str:
    """What `parse_csv` reads back."""
    return "".join(",".join(map(str, row)) + "\n" for row in schedule.actions)


def _row(text: str, where: str) -> tuple[Action, ...]:
    flat = _OVERLAPPED.sub(lambda pair: pair[1].replace(";", ","), text)
    return tuple(_cell(cell.strip(), where) for cell in flat.split(",") if cell.strip())


def _cell(cell: str, where: str) -> Action:
    if found := _OURS.fullmatch(cell):
        return Action(Kind(found[1]), int(found[2]), int(found[3]))
    if found := _TORCHS.fullmatch(cell):
        return Action(Kind(found[2]), int(found[1]), int(found[3]))
    if _MESSAGE.search(cell):
        raise UserError(f"{where}: cell {cell!r} is a message: leave it out, sends and receives are worked out.")
    raise UserError(f"{where}: cell {cell!r} is none: write kind, chunk, micro-batch, such as F0.3 (kinds F, B, I, W).")
