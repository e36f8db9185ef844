"""A closed-loop HTTP client that costs little: raw bytes over kept connections, in a process of its own.

    python bench/http_load.py HOST PORT PATH BODY_FILE CLIENTS SECONDS

Each client sends the next request when it has the answer to the last one. One JSON line: counts by status, seconds of
each answer as percentiles (of 200s, and of all), how many refusals named a time to come back.
"""

import asyncio
import json
import sys
import time
from pathlib import Path

WARM_S = 0.5  # at the start, not counted


class Client(asyncio.Protocol):
    def __init__(self, request: bytes, log: list[tuple[float, float, int, bool]], end: float) -> None:
        self.request, self.log, self.end = request, log, end
        self.buffer = b""
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport) -> None:
        self.transport = transport
        self.send()

    def send(self) -> None:
        self.begun = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        low = head.lower()
        at = low.index(b"content-length:") + 15
        if len(rest) < int(low[at:].split(b"\r\n", 1)[0]):
            return
        now = time.perf_counter()
        self.log.append((now, now - self.begun, int(head[9:12]), b"retry-after:" in low))
        self.buffer = b""
        if now < self.end:
            self.send()
        else:
            self.transport.close()

    def connection_lost(self, error) -> None:
        if not self.done.done():
            self.done.set_result(None)


def percentile(values: list[float], share: float) -> float | None:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else None


def slope(times: list[float]) -> float:
    """Answers a second, as the line through (time, answers so far): a batch that falls on an edge does not matter."""
    ordered = sorted(times)
    middle, half = sum(ordered) / len(ordered), (len(ordered) - 1) / 2
    spread = sum((at - middle) ** 2 for at in ordered)
    return sum((at - middle) * (i - half) for i, at in enumerate(ordered)) / spread


async def load(host: str, port: int, path: str, body: bytes, clients: int, seconds: float) -> dict:
    loop = asyncio.get_running_loop()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    )
    log: list[tuple[float, float, int, bool]] = []
    begun = time.perf_counter()
    end = begun + WARM_S + seconds
    made = [
        (await loop.create_connection(lambda: Client(f"{head}\r\n".encode() + body, log, end), host, port))[1]
        for _ in range(clients)
    ]
    await asyncio.wait([client.done for client in made], timeout=seconds + 30)
    counted = [entry for entry in log if begun + WARM_S < entry[0] <= end]
    statuses: dict[str, int] = {}
    for _, _, status, _ in counted:
        statuses[str(status)] = statuses.get(str(status), 0) + 1
    good = [spent for _, spent, status, _ in counted if status == 200]
    every = [spent for _, spent, _, _ in counted]
    times = [at - begun for at, _, status, _ in counted if status == 200]
    return {
        "seconds": seconds,
        "statuses": statuses,
        "ok_a_second": slope(times) if len(times) > 2 else len(times) / seconds,
        "p50_ms": 1e3 * (percentile(good, 0.5) or 0),
        "p99_ms": 1e3 * (percentile(good, 0.99) or 0),
        "all_p99_ms": 1e3 * (percentile(every, 0.99) or 0),
        "refusals_with_time": sum(named for _, _, status, named in counted if status == 429),
    }


def main() -> None:
    host, port, path, file, clients, seconds = sys.argv[1:]
    import uvloop

    print(json.dumps(uvloop.run(load(host, int(port), path, Path(file).read_bytes(), int(clients), float(seconds)))))


if __name__ == "__main__":
    main()
