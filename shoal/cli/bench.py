"""``shoal bench``: how fast collectives are here, by each transport and algorithm."""

import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.cli.exit_codes import DONE, FAILED
from shoal.cli.output import event_line, json_line, table
from shoal.cli.recipe_arguments import speaks
from shoal.cluster.detect import launched_workers, usable_cores
from shoal.errors import UserError, unknown_name

if TYPE_CHECKING:
    from shoal.comm.measuring.cases import Settings

HELP = "speed of collectives by operation, size, dtype, transport and algorithm"
SUBJECTS = ("collectives",)
PLAIN_EVERY_S = 5.0
PLOTS = (".html", ".svg")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("subject", metavar="SUBJECT", help="what to measure: collectives")
    parser.add_argument(
        "--ops", metavar="A,B", help="operations, or all; all_reduce,reduce_scatter,all_gather,broadcast"
    )
    parser.add_argument("--sizes", metavar="SIZES", help="such as 1KiB,1MiB or 1KiB..64MiB (each 4 times the last)")
    parser.add_argument("--dtypes", metavar="A,B", help="float32 if unset; or bfloat16, float16, int8, ..., or all")
    parser.add_argument(
        "--transports", metavar="A,B", help="gloo, shm, hier, nccl; the first is what others are held against"
    )
    parser.add_argument("--algorithms", metavar="A,B", help="native (the transport's own) if unset; ring, ..., or all")
    parser.add_argument("--workers", type=int, metavar="N", help="ranks; 2 to 4, as cores allow, if unset")
    parser.add_argument("--rounds", type=int, metavar="N", help="of the whole sweep; figures are medians over them; 3")
    parser.add_argument("--seconds", type=float, metavar="X", help="for the whole sweep, about; 45")
    parser.add_argument(
        "--zero-copy", action="store_true", help="shm and hier also with tensors on their symmetric heap"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the curves as .html or .svg")
    parser.add_argument("--json", action="store_true", help="the result as one JSON object, the last line of stdout")


def run(args: Namespace) -> int:
    """0: measured. 1: a transport gave a wrong result."""
    if args.subject not in SUBJECTS:
        raise unknown_name("subject", args.subject, SUBJECTS, "`shoal bench`")
    if args.plot and args.plot.suffix not in PLOTS:
        raise UserError(f"--plot {str(args.plot)!r}: name a file that ends in {' or '.join(PLOTS)}.")
    settings = chosen(args)
    from shoal.comm.measuring import sweep

    with _progress(args.json) as show:
        result = sweep.sweep(settings, show)
    if speaks():
        if args.plot:
            from shoal.observe import collective_plot

            collective_plot.write(result, args.plot)
        if args.json:
            print(json_line(result))
        else:
            _print(result)
            if args.plot:
                print(f"wrote {args.plot}")
    for line in result["wrong"]:
        print(f"shoal: wrong result: {line}", file=sys.stderr)
    return FAILED if result["wrong"] else DONE


def chosen(args: Namespace) -> "Settings":
    """Raises UserError naming what cannot be used."""
    from shoal.comm.measuring import cases, transports

    launched = launched_workers()
    if launched and args.workers not in (None, launched):
        raise UserError(f"--workers {args.workers}: torchrun started {launched}; leave --workers out.")
    asked = _names(args.transports, ("gloo", "shm", "hier"))
    given: dict[str, Any] = {
        "workers": launched or (min(4, max(2, usable_cores())) if args.workers is None else args.workers),
        "zero_copy": args.zero_copy,
        "ops": _names(args.ops, cases.OPS),
        "dtypes": _names(args.dtypes, cases.DTYPES),
        "algorithms": _names(args.algorithms, cases.ALGORITHMS),
        "sizes": None if args.sizes is None else cases.sizes(args.sizes),
        "rounds": args.rounds,
        "seconds": args.seconds,
        "transports": asked,
    }
    settings = cases.Settings(**{key: value for key, value in given.items() if value is not None})
    return transports.there(settings, asked_for=asked is not None)


def _names(text: str | None, all_of_them: Sequence[str] | Mapping[str, object]) -> tuple[str, ...] | None:
    if text is None:
        return None
    return tuple(all_of_them) if text == "all" else tuple(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))


@contextmanager
def _progress(json: bool) -> Iterator[Callable[[Mapping[str, Any]], None]]:
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


HEADER = ("operation", "size", "by", "median", "best", "alg GB/s", "bus GB/s", "memcpy", "CPU", "speed", "best", "CPU")


def _print(result: Mapping[str, Any]) -> None:
    first = result["settings"]["transports"][0]
    rows = [_cells(row) for row in result["rows"]]
    about = (
        f"{result['settings']['workers']} ranks on {result['machine']['cores']} cores, load "
        f"{result['machine']['load_average']:.1f}; memcpy: share of the speed of a copy of as many bytes on all ranks; "
        f"CPU: of all ranks, an operation; the last three columns: times as good as {first}"
    )
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        shown = Table(caption=about, header_style="bold")
        for number, name in enumerate(HEADER):
            shown.add_column(name, justify="left" if number < 3 else "right", no_wrap=True)
        before = None
        for row in rows:
            if before is not None and before != row[:2]:
                shown.add_section()
            shown.add_row(*(("", "", *row[2:]) if before == row[:2] else row))
            before = row[:2]
        Console().print(shown)
    else:
        print(table(HEADER, rows))
        print(about)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    by = [row["transport"], *([row["algorithm"]] if row["algorithm"] != "native" else [])]
    speeds = [row["algorithm_bytes_per_s"], row["bus_bytes_per_s"]]
    return (
        row["op"] if row["dtype"] == "float32" or not row["bytes"] else f"{row['op']} {row['dtype']}",
        about_size(row["bytes"]) if row["bytes"] else "-",
        " ".join([*by, *(["zero-copy"] if row["zero_copy"] else [])]),
        interval(row["latency_s"]),
        interval(row["min_s"]),
        *("-" if speed is None else f"{speed / 1e9:.2f}" for speed in speeds),
        "-" if row["memcpy_share"] is None else f"{row['memcpy_share']:.2f}",
        interval(row["cpu_s"]),
        *("" if row[key] is None else f"{row[key]:.1f}x" for key in ("against", "against_best", "against_cpu")),
    )


def about_size(nbytes: int) -> str:
    """1048572 -> "1 MiB": where blocks of equal size do not make a round number, it is near enough."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit * 0.999:
            return f"{nbytes / unit:.3g} {name}"
    return f"{nbytes} B"


def interval(seconds: float) -> str:
    """0.0000123 -> "12.3 us"; 0.25 -> "250 ms"."""
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= unit or unit == 1e-6:
            number = seconds / unit
            return f"{number:.0f} {name}" if number >= 100 else f"{number:.3g} {name}"
    return f"{seconds:g} s"
