"""``shoal bench serve``: how much a server carries, and how long it takes over it."""

import os
from argparse import Action, Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shoal.cli.bench_progress import progress
from shoal.cli.exit_codes import DONE, FAILED
from shoal.cli.output import json_line, table
from shoal.errors import UserError

HELP = "load on a server: answers a second, and how long they take, from when each request was due"
PLOTS = (".svg",)
LOAD = ("clients", "rates", "trace", "latency_ms")  # what asks for a load


def add_arguments(add: Callable[..., Action]) -> None:
    add("--clients", metavar="A,B", help="closed loops: so many clients, each with one request at a time; 1,64")
    add("--rates", metavar="A,B", help="open loops: requests a second that come as independent users send them")
    add("--trace", type=Path, metavar="FILE", help='requests as they came: {"at": seconds, "body": ...} a line')
    add("--speed", type=float, metavar="X", help="of the trace: 2 plays it in half the time")
    add("--latency-ms", type=float, metavar="X", help="search the highest rate whose percentile stays within this")
    add("--quantile", type=float, metavar="P", help="which percentile: 50, 90, 99 or 99.9; 99")
    add("--path", help="of the requests; /predict or /v1/completions, as the server describes itself")
    add("--body", type=Path, metavar="FILE", help="JSON of a request, or one a line to take in turns")
    add("--no-stream", action="store_true", default=None, help="completions as a whole, not as they come")
    add("--warm-s", type=float, metavar="X", help="of each load, before what is measured; 1")
    add("--connections", type=int, metavar="N", help="of open loops, at the same time; 512")
    add("--processes", type=int, metavar="N", help="that the clients run in; 1")
    add("--patience-s", type=float, metavar="X", help="what is not answered so long after the end never is; 30")
    add("--seed", type=int, metavar="N", help="of the gaps between requests; 0")
    add("--serve", action="append", metavar="NAME=VALUE", help="an option of `shoal serve`, when TARGET is no URL")
    add("--no-bare", action="store_true", default=None, help="do not measure the bare model beside a target")
    add("--api-key", metavar="FILE", help="that holds the key; or the variable SHOAL_API_KEY")


def run(args: Namespace) -> int:
    """0: measured. 1: a load without a single answer."""
    from shoal.serve.load import measure
    from shoal.serve.load.settings import Settings

    if args.target is None:
        raise UserError("`shoal bench serve` needs a TARGET: the URL of a server, or what to serve.")
    given: dict[str, Any] = {
        "target": args.target,
        "path": args.path,
        "bodies": _bodies(args.body),
        "key": _key(args.api_key),
        "stream": False if args.no_stream else None,
        "clients": _numbers("--clients", args.clients, int),
        "rates": _numbers("--rates", args.rates, float),
        "serve": _pairs(args.serve),
        "bare": False if args.no_bare else None,
    }
    plain = ("trace", "speed", "latency_ms", "quantile", "seconds", "warm_s", "connections", "processes")
    given |= {name: getattr(args, name) for name in (*plain, "patience_s", "seed")}
    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    with progress(args.json) as show:
        result = measure.measure(settings, show)
    if args.plot:
        from shoal.observe import load_plot

        load_plot.write(result, args.plot)
    print(json_line(result) if args.json else "\n".join(_lines(result)))
    if args.plot and not args.json:
        print(f"wrote {args.plot}")
    return DONE if all(row["ok"] for row in result["rows"]) else FAILED


def _bodies(file: Path | None) -> list[str] | None:
    """A file holds one JSON value, or one a line."""
    import json

    if file is None:
        return None
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--body: cannot read {str(file)!r}: {getattr(error, 'strerror', error)}.") from None
    try:
        return [json.dumps(json.loads(text))]
    except ValueError:
        pass
    try:
        return [json.dumps(json.loads(line)) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise UserError(f"--body: {str(file)!r} is neither JSON nor JSON a line: {error}.") from None


def _key(file: str | None) -> str | None:
    if file is None:
        return os.environ.get("SHOAL_API_KEY")
    try:
        return Path(file).read_text(encoding="utf-8").split()[0]
    except (OSError, UnicodeDecodeError, IndexError) as error:
        raise UserError(f"--api-key: no key in {file!r}: {getattr(error, 'strerror', error)}.") from None


def _numbers(option: str, text: str | None, kind: type) -> tuple[Any, ...] | None:
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(f"{option} takes numbers by commas, such as 1,64; got {text!r}.") from None


def _pairs(words: list[str] | None) -> dict[str, str]:
    pairs = {}
    for word in words or ():
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise UserError(f"--serve {word!r}: write NAME=VALUE, such as dtype=bfloat16.")
        pairs[name] = value
    return pairs


HEADER = ("load", "answers/s", "p50 ms", "p90", "p99", "p99.9", "max", "refused", "failed", "late p99")
STREAM = ("tokens/s", "first p50 ms", "p99", "gap p50 ms", "p99")


def _lines(result: Mapping[str, Any]) -> list[str]:
    streams = any("tokens_a_second" in row for row in result["rows"])
    header = (*HEADER, *STREAM) if streams else HEADER
    lines = [table(header, [_cells(row, streams) for row in result["rows"]])]
    for one in result.get("bare", ()):
        per = f"{one['a_second']:.4g} {one['unit']}/s, {one['p50_ms']:.3g} ms a pass"
        lines.append(f"bare model, {one['rows']} at a time: {per}")
    lines += _share(result)
    if "search" in result:
        found = result["search"]
        limit = f"{found['quantile']} of all answers within {found['target_ms']:g} ms"
        lines.append(f"{limit}: {found['rate']:.4g} requests/s" if found["rate"] else f"{limit}: at no rate")
    lines += [
        f"{row['load']}: the clients sent late themselves: more --processes, or a machine of their own"
        for row in result["rows"]
        if row["client_is_short"]
    ]
    machine = result["machine"]
    lines.append(f"{machine['cores']} cores, load {machine['load_average']:.1f}; late: sent so long after it was due")
    return lines


def _share(result: Mapping[str, Any]) -> list[str]:
    """The most that any load got, of the most that the bare model gave."""
    key = "tokens_a_second" if any("tokens_a_second" in row for row in result["rows"]) else "ok_a_second"
    most = max((row.get(key, 0.0) for row in result["rows"]), default=0.0)
    bare = max((one["a_second"] for one in result.get("bare", ())), default=0.0)
    return [f"most of all loads: {most:.4g}/s, {most / bare:.0%} of the bare model"] if bare else []


def _cells(row: Mapping[str, Any], streams: bool) -> tuple[str, ...]:
    def milliseconds(kind: str, *names: str) -> list[str]:
        return [f"{row[kind][name]:.3g}" if row.get(kind) else "-" for name in names]

    cells = [
        row["load"],
        f"{row['ok_a_second']:.4g}",
        *milliseconds("ms", "p50", "p90", "p99", "p99.9", "max"),
        str(row["refused"]),
        str(row["failed"]),
        *milliseconds("late_ms", "p99"),
    ]
    if streams:
        cells += [f"{row['tokens_a_second']:.4g}" if "tokens_a_second" in row else "-"]
        cells += [*milliseconds("first_ms", "p50", "p99"), *milliseconds("gap_ms", "p50", "p99")]
    return tuple(cells)
