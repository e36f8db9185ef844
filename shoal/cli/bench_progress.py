"""How a bench shows that it goes on."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from shoal.cli.output import event_line

PLAIN_EVERY_S = 5.0


@contextmanager
def progress(json: bool) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """JSON lines on stderr, a bar on a terminal, else a line every few seconds."""
    if json:
        yield event_line
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = BarColumn(bar_width=24), TextColumn("{task.description}", markup=False), TimeRemainingColumn()
        with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as bar:
            task = bar.add_task("starting", total=1.0)

            def draw(event: Mapping[str, Any]) -> None:
                bar.update(task, completed=event["done"], description=event["cell"], refresh=True)

            yield draw
    else:
        last = [time.monotonic()]

        def line(event: Mapping[str, Any]) -> None:
            if time.monotonic() - last[0] > PLAIN_EVERY_S:
                last[0] = time.monotonic()
                print(f"{event['done']:4.0%}  {event['cell']}", file=sys.stderr, flush=True)

        yield line
