"""``shoal bench collectives``: how fast they are here, by each transport and algorithm."""

import sys
from argparse import Action, Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shoal.cli.bench_progress import progress
from shoal.cli.exit_codes import DONE, FAILED
from shoal.cli.output import about_size, interval, json_line, table
from shoal.cli.recipe_arguments import speaks
from shoal.cluster.detect import launched_workers, usable_cores
from shoal.errors import UserError

if TYPE_CHECKING:
    from shoal.comm.measuring.cases import Settings

HELP = "speed of collectives by operation, size, dtype, transport and algorithm"
PLOTS = (".html", ".svg")


def add_arguments(add: Callable[..., Action]) -> None:
    add("--ops", metavar="A,B", help="operations, or all; all_reduce,reduce_scatter,all_gather,broadcast")
    add("--sizes", metavar="SIZES", help="such as 1KiB,1MiB or 1KiB..64MiB (each 4 times the last)")
    add("--dtypes", metavar="A,B", help="float32 if unset; or bfloat16, float16, int8, ..., or all")
    add("--transports", metavar="A,B", help="gloo, shm, hier, shm-python, nccl, mpi; the first is the others' control")
    add("--algorithms", metavar="A,B", help="native (the transport's own) if unset; ring, ..., or all")
    add("--workers", type=int, metavar="N", help="ranks; 2 to 4, as cores allow, if unset")
    add("--rounds", type=int, metavar="N", help="of the whole sweep; figures are medians over them; 3")
    add("--zero-copy", action="store_true", default=None, help="shm and hier also with tensors on their symmetric heap")


def run(args: Namespace) -> int:
    """0: measured. 1: a transport gave a wrong result."""
    settings = chosen(args)
    from shoal.comm.measuring import sweep

    with progress(args.json) as show:
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
        "zero_copy": bool(args.zero_copy),
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
