"""`shoal bench serve`: one load after the other on one server, the bare model beside it, as one result."""

import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.serve.load.arrivals import Arrival, poisson, read_trace
from shoal.serve.load.figures import figures
from shoal.serve.load.processes import Asked, send
from shoal.serve.load.search import Search, kept
from shoal.serve.load.settings import Settings
from shoal.serve.load.subject import Bare, find, is_url, served

Tell = Callable[[Mapping[str, Any]], None]
DEFAULT_CLIENTS = 1, 64
DEFAULT_SHARES = 0.5, 0.8  # of the closed loop's answers a second: the rates of open loops where none is named
BARE_S = 2.0


@dataclass
class _Run:
    """What the steps of one measurement share."""

    settings: Settings
    asked: Asked
    tell: Tell
    rows: list[dict[str, Any]] = field(default_factory=list)
    loads: int = 1  # how many there will be, at least

    def _show(self, name: str) -> None:
        self.tell({"event": "measuring", "cell": name, "done": min(1.0, len(self.rows) / self.loads)})

    def closed(self, clients: int) -> dict[str, Any]:
        return self._row(f"{clients} clients", {"clients": clients}, clients=clients)

    def open(self, rate: float, name: str = "open") -> dict[str, Any]:
        s = self.settings
        arrivals = poisson(rate, s.warm_s + s.seconds, len(self.asked.bodies), s.seed)
        return self._row(f"{name}, {rate:.4g}/s", {"rate": rate}, arrivals=arrivals)

    def _row(self, name: str, facts: Mapping[str, Any], **load: Any) -> dict[str, Any]:
        s = self.settings
        self._show(name)
        whole = s.warm_s + s.seconds
        seen = send(self.asked, seconds=whole, **load, **self._limits())
        row = {"load": name, **facts, **figures(seen, s.warm_s, s.seconds, open_loop="arrivals" in load)}
        self.rows.append(row)
        return row

    def trace(self, arrivals: Sequence[Arrival]) -> dict[str, Any]:
        """All of it: what comes first is measured too."""
        self._show("trace")
        whole = arrivals[-1].at + 1e-9
        seen = send(self.asked, seconds=whole, arrivals=arrivals, **self._limits())
        row = {"load": "trace", "speed": self.settings.speed, **figures(seen, 0.0, max(whole, 1e-3), open_loop=True)}
        self.rows.append(row)
        return row

    def _limits(self) -> dict[str, Any]:
        s = self.settings
        return {"processes": s.processes, "connections": s.connections, "patience_s": s.patience_s}

    def search(self, first: float) -> dict[str, Any]:
        """Raises nothing: a target that no rate keeps is told as a rate of 0."""
        s = self.settings
        found = Search(first)
        quantile = f"p{s.quantile:g}"
        best: dict[str, Any] | None = None
        while not found.done:
            row = self.open(found.rate, name="search")
            self.rows.remove(row)
            fits = kept(row, quantile, s.latency_ms) and not row["client_is_short"]
            if fits and (best is None or row["rate"] > best["rate"]):
                best = row
            found.tell(fits)
        told = {"target_ms": s.latency_ms, "quantile": quantile, "trials": found.trials, "rate": found.holds}
        if best is not None:
            best["load"] = f"{quantile} within {s.latency_ms:g} ms: {best['rate']:.4g}/s"
            self.rows.append(best)
            told["ok_a_second"] = best["ok_a_second"]
        return told


def measure(settings: Settings, tell: Tell) -> dict[str, Any]:
    """The whole result, as plain values. Raises UserError for what cannot be asked, before anything is started."""
    arrivals, bodies = read_trace(settings.trace, settings.speed) if settings.trace else ([], list(settings.bodies))
    with ExitStack() as stack:
        url, about, bare = settings.target, {}, None
        if not is_url(url):
            tell({"event": "starting", "cell": f"starting {url}", "done": 0.0})
            about = stack.enter_context(served(url, settings.serve))
            url = about["url"]
        asked = find(url, settings.path, bodies, settings.key, settings.stream)
        if about and settings.bare:
            bare = _open_bare(settings, about, asked, stack)
        run = _Run(settings, asked, tell)
        told: dict[str, Any] = {"target": settings.target, "url": url, "path": asked.path, "served": dict(about)}
        if bare is not None:
            told["bare"] = _bare_figures(bare, settings, about, tell)
        _all_loads(run, arrivals, told)
    machine = {"cores": os.cpu_count(), "load_average": os.getloadavg()[0], "platform": platform.platform()}
    return {**told, "rows": run.rows, "machine": machine}


def _all_loads(run: _Run, arrivals: Sequence[Arrival], told: dict[str, Any]) -> None:
    s = run.settings
    named = bool(s.clients or s.rates or arrivals or s.latency_ms)
    clients = s.clients or (() if named else DEFAULT_CLIENTS)
    run.loads = len(clients) + len(s.rates or DEFAULT_SHARES) + bool(arrivals) + bool(s.latency_ms)
    closed = [run.closed(count) for count in clients]
    rates = s.rates or ([] if named else [max(0.5, share * closed[-1]["ok_a_second"]) for share in DEFAULT_SHARES])
    for rate in rates:
        run.open(rate)
    if arrivals:
        run.trace(arrivals)
    if s.latency_ms:
        guess = closed[-1]["ok_a_second"] if closed else run.closed(8)["ok_a_second"]
        if not closed:
            run.rows.pop()
        told["search"] = run.search(max(0.5, 0.5 * guess))


def _open_bare(settings: Settings, about: Mapping[str, Any], asked: Asked, stack: ExitStack) -> Bare:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    (folder / "body.json").write_text(asked.bodies[0], encoding="utf-8")
    threads = int(settings.serve.get("threads", 1))
    made = Bare(settings.target, about["dtype"], settings.serve.get("task", ""), threads, str(folder / "body.json"))
    stack.callback(made.close)
    made.loaded()
    return made


def _bare_figures(bare: Bare, settings: Settings, about: Mapping[str, Any], tell: Tell) -> list[dict[str, Any]]:
    """A sample (a stream) at a time, and a full batch (64 streams, or as many as there are clients)."""
    generates = about["task"] == "text-generation"
    full = max(settings.clients or DEFAULT_CLIENTS) if generates else int(settings.serve.get("batch", 32))
    told = []
    for rows in dict.fromkeys((1, full)):
        tell({"event": "measuring", "cell": f"bare, {rows} at a time", "done": 0.0})
        told.append({"unit": "tokens" if generates else "samples", **bare.run(BARE_S, rows)})
    return told
