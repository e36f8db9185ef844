"""Client processes: started, begun at one moment, and read."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from shoal.errors import RunFailed
from shoal.serve.load.arrivals import Arrival, dealt
from shoal.serve.load.client import Order, Sample
from shoal.serve.load.figures import Seen

BEFORE_S = 0.05  # from "go" to the first request


@dataclass(frozen=True)
class Asked:
    """Where requests go and what they hold."""

    host: str
    port: int
    path: str
    bodies: Sequence[str]
    tls: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)


def send(
    asked: Asked,
    *,
    seconds: float,
    arrivals: Sequence[Arrival] = (),
    clients: int = 0,
    processes: int = 1,
    connections: int = 512,
    patience_s: float = 30.0,
    before: Sequence[str] = (),
    meanwhile: Callable[[], None] = lambda: None,
) -> Seen:
    """One load, until its last answer: an open loop of ``arrivals``, or a closed one of ``clients``.

    ``before``: words before the command of each client process. ``meanwhile`` is called when they have begun."""
    host = f"[{asked.host}]" if ":" in asked.host else asked.host
    headers = {"Host": f"{host}:{asked.port}", "Content-Type": "application/json", **asked.headers}
    count = max(1, min(processes, clients or len(arrivals)))
    shares = dealt(arrivals, count)
    orders = [
        Order(
            asked.host,
            asked.port,
            asked.tls,
            asked.path,
            headers,
            list(asked.bodies),
            [(one.at, one.body) for one in shares[number]],
            len(range(number, clients, count)),
            number % len(asked.bodies),
            seconds,
            max(1, connections // count),
            patience_s,
        )
        for number in range(count)
    ]
    command = [*before, sys.executable, "-m", "shoal.serve.load.client"]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in orders]
    try:
        for process, order in zip(started, orders, strict=True):
            _say(process, json.dumps(asdict(order)))
        for process in started:
            _heard(process)
        begun = time.monotonic() + BEFORE_S
        for process in started:
            _say(process, f"go {begun}")
        meanwhile()
        told = [json.loads(_heard(process)) for process in started]
    finally:
        for process in started:
            if process.stdin and process.stdout:
                process.stdin.close()
                process.stdout.close()
            process.kill()
            process.wait()
    samples = [Sample(*values) for one in told for values in one["samples"]]
    return Seen(samples, [gap for one in told for gap in one["gaps"]], sum(one["cpu_s"] for one in told))


def _say(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdin
    process.stdin.write(line + "\n")
    process.stdin.flush()


def _heard(process: "subprocess.Popen[str]") -> Any:
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise RunFailed(f"a client process ended with {process.wait()} before it was done.")
    return line
