"""Counters and histograms, written as Prometheus reads them (text format 0.0.4)."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # bounds of latencies


class Histogram:
    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str, labels: str) -> Iterable[str]:
        so_far = 0
        comma = "," if labels else ""
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            so_far += count
            yield f'{name}_bucket{{{labels}{comma}le="{bound}"}} {so_far}'
        yield f"{name}_sum{{{labels}}} {self.sum:.9g}"
        yield f"{name}_count{{{labels}}} {so_far}"


class Metrics:
    """What the HTTP side counts. Labels hold routes and states only: never a prompt, a key or an address."""

    def __init__(self) -> None:
        self.requests: dict[tuple[str, int], int] = {}
        self.seconds: dict[str, Histogram] = {}
        self.by_version: dict[tuple[int, int], int] = {}
        self.seconds_by_version: dict[int, Histogram] = {}
        self.refused = 0
        self.cancelled = 0
        self.replicas_lost = 0
        self.reloads = 0
        self.engines: dict[int, Mapping[str, float]] = {}

    def request(self, route: str, status: int, seconds: float, version: int | None = None) -> None:
        """``version``: of the weights that worked on it; None: none did."""
        key = route, status
        self.requests[key] = self.requests.get(key, 0) + 1
        self.refused += status == 429
        histogram = self.seconds.get(route)
        if histogram is None:
            histogram = self.seconds[route] = Histogram()
        histogram.add(seconds)
        if version is not None:
            self.by_version[version, status] = self.by_version.get((version, status), 0) + 1
            self.seconds_by_version.setdefault(version, Histogram()).add(seconds)

    def text(self, now: Mapping[str, float]) -> str:
        """``now`` are gauges of this moment: name -> value."""
        out: list[str] = []

        def family(name: str, kind: str, meaning: str, lines: Iterable[str]) -> None:
            found = list(lines)
            if found:
                out.extend((f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", *found))

        family(
            "shoal_requests_total",
            "counter",
            "answered HTTP requests",
            (
                f'shoal_requests_total{{route="{route}",status="{status}"}} {count}'
                for (route, status), count in sorted(self.requests.items())
            ),
        )
        name = "shoal_request_seconds"
        family(
            name,
            "histogram",
            "from the last byte of a request to the last byte of its answer",
            (line for route, h in sorted(self.seconds.items()) for line in h.lines(name, f'route="{route}"')),
        )
        family(
            "shoal_version_requests_total",
            "counter",
            "answered requests by the version of the weights that worked on them",
            (
                f'shoal_version_requests_total{{version="{version}",status="{status}"}} {count}'
                for (version, status), count in sorted(self.by_version.items())
            ),
        )
        name = "shoal_version_request_seconds"
        found = sorted(self.seconds_by_version.items())
        lines = (line for version, h in found for line in h.lines(name, f'version="{version}"'))
        family(name, "histogram", "as shoal_request_seconds, by the version of the weights", lines)
        for name, count, meaning in (
            ("shoal_refused_total", self.refused, "requests answered with 429"),
            ("shoal_cancelled_total", self.cancelled, "requests whose client left before the answer"),
            ("shoal_reloads_total", self.reloads, "changes to other weights"),
            ("shoal_replicas_lost_total", self.replicas_lost, "model processes that died"),
        ):
            family(name, "counter", meaning, [f"{name} {count}"])
        for name, value in sorted(now.items()):
            family(f"shoal_{name}", "gauge", name.replace("_", " "), [f"shoal_{name} {value:.9g}"])
        self._engines(out)
        return "\n".join(out) + "\n"

    def _engines(self, out: list[str]) -> None:
        """What the model processes told, under a label that says which."""
        told: dict[str, list[str]] = {}
        for number, figures in sorted(self.engines.items()):
            for key, value in figures.items():
                name, _, labels = key.partition("{")
                inner = f'replica="{number}"' + (f",{labels.rstrip('}')}" if labels else "")
                told.setdefault(f"shoal_{name}", []).append(f"shoal_{name}{{{inner}}} {value:.9g}")
        for name, lines in sorted(told.items()):
            kind = "counter" if name.endswith(("_total", "_bucket")) else "gauge"
            out.extend((f"# TYPE {name} {kind}", *lines))
