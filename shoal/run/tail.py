"""What the end of an event log has told already, for a process that goes on with it in another one's place."""

import json
from pathlib import Path

TAIL_BYTES = 1 << 20


def told_lately(path: Path) -> set[tuple[str, int]]:
    """(event, step) of the last events that have a step. Empty where there is no log."""
    try:
        with path.open("rb") as log:
            log.seek(0, 2)
            log.seek(max(0, log.tell() - TAIL_BYTES))
            lines = log.read().split(b"\n")[:-1]  # what follows the last newline was torn by a kill
    except FileNotFoundError:
        return set()
    found = set()
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("step"), int):
            found.add((str(event.get("event")), event["step"]))
    return found
