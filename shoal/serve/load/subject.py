"""What is put under load: a server that runs, by its URL, or a target that is served for the time being."""

import http.client
import json
import os
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from shoal.errors import RunFailed, UserError
from shoal.serve.load.processes import Asked

PROMPT = "Once upon a time there was"
TOKENS = 64  # that a stream asks for


@dataclass(frozen=True)
class Subject:
    asked: Asked
    about: Mapping[str, Any]  # what a server that was started here has said of itself; of others nothing


def is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def find(url: str, path: str, bodies: Sequence[str], key: str, stream: bool | None) -> Asked:
    """Where requests go, and what they hold where nothing else was said: the example of the server's description.

    Raises UserError when nobody listens there, or when a server of another kind needs --path and --body."""
    parts = urlsplit(url)
    if not parts.hostname:
        raise UserError(f"{url!r} names no host: write http://HOST:PORT.")
    tls = parts.scheme == "https"
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    port = parts.port or (443 if tls else 80)
    path = path or parts.path.rstrip("/")
    if not (path and bodies):
        path, found = _example(parts.hostname, port, tls, headers, path, stream)
        bodies = bodies or [found]
    return Asked(parts.hostname, port, path, bodies, tls, headers)


def _example(
    host: str, port: int, tls: bool, headers: Mapping[str, str], path: str, stream: bool | None
) -> tuple[str, str]:
    described = _get(host, port, tls, headers, "/openapi.json")
    paths = described.get("paths", {}) if isinstance(described, dict) else {}
    known = [path] if path else ["/predict", "/v1/completions"]
    for each in known:
        try:
            content = paths[each]["post"]["requestBody"]["content"]["application/json"]
            example = content.get("example") or content["schema"]["example"]
        except (KeyError, TypeError):
            continue
        if each == "/v1/completions":
            flow = {"stream": True, "stream_options": {"include_usage": True}} if stream is not False else {}
            example = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, **flow}
        return each, json.dumps(example)
    raise UserError(f"{host}:{port} describes no request in an openapi.json: say what to ask with --path and --body.")


def _get(host: str, port: int, tls: bool, headers: Mapping[str, str], path: str) -> Any:
    connection = (
        http.client.HTTPSConnection(host, port, timeout=10, context=ssl.create_default_context())
        if tls
        else http.client.HTTPConnection(host, port, timeout=10)
    )
    try:
        connection.request("GET", path, headers=dict(headers))
        answer = connection.getresponse()
        told = answer.read(16 << 20)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"nobody answers at {host}:{port}: {error}.") from None
    finally:
        connection.close()
    if answer.status == 401:
        raise UserError(f"{host}:{port} wants an API key: name a file with it (--api-key FILE).")
    try:
        return json.loads(told) if answer.status == 200 else {}
    except ValueError:
        return {}


@contextmanager
def served(target: str, options: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """A server of a target while the block lasts. Raises what keeps it from serving, in its own line."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "shoal", "serve", target, *words, "--port=0", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stderr
    try:
        line = process.stdout.readline()
        if not line:
            said = process.stderr.read().strip().removeprefix("shoal: ")
            raise (UserError if process.wait() == 2 else RunFailed)(said or "the server did not start.")
        yield json.loads(line)
    finally:
        process.terminate()
        process.communicate()


class Bare:
    """The model alone, in a process of its own."""

    def __init__(self, target: str, dtype: str, task: str, threads: int, body_file: str) -> None:
        words = [target, dtype, task or "-", str(threads), *([body_file] if body_file else [])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shoal.serve.load.bare", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )

    def loaded(self) -> dict[str, Any]:
        """Waits for it. Raises UserError when it cannot be loaded, or cannot use the body."""
        return self.answer()

    def ask(self, seconds: float, rows: int) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{seconds} {rows}\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RunFailed(f"the process with the bare model ended with {self.process.wait()}.")
        told: dict[str, Any] = json.loads(line)
        if "why" in told:
            raise UserError(str(told["why"]))
        return told

    def run(self, seconds: float, rows: int) -> dict[str, Any]:
        self.ask(seconds, rows)
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
