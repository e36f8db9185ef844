"""Heads of requests that have come before, and the beginnings of answers: most are like one of a second ago."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus

from shoal.serve.http.messages import HttpRequest, HttpResponse, HttpStream

MOST_HEADS = 256  # then all are forgotten
LONGEST = 1024  # bytes of a head that is kept
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


@dataclass(slots=True)
class Head:
    """What a parser makes of a request's head."""

    method: str
    path: str
    headers: Mapping[str, str]
    length: int  # of the body that must follow
    keep: bool  # the connection


def head_of(request: HttpRequest, keep: bool) -> Head | None:
    """None when more than the head decides what follows it."""
    if "transfer-encoding" in request.headers or "expect" in request.headers:
        return None
    return Head(request.method, request.path, request.headers, len(request.body), keep)


class Heads:
    """All connections of a server share these."""

    def __init__(self) -> None:
        self._known: dict[bytes, Head] = {}
        self.get = self._known.get
        self._second = 0
        self._begun: dict[tuple[int, str], bytes] = {}  # status and media type -> up to the date of this second

    def add(self, written: bytes, head: Head) -> None:
        """``written`` is the whole head, with the empty line at its end, as a parser read it from its first byte on."""
        if len(written) > LONGEST:
            return
        if len(self._known) >= MOST_HEADS:
            self._known.clear()
        self._known[written] = head

    def written(
        self, answer: HttpResponse | HttpStream, framing: bytes, keep: bool, headers: Mapping[str, str] | None
    ) -> bytes:
        """The head of an answer."""
        second = int(time.time())
        if self._second != second:
            self._second = second
            self._begun.clear()
        form = answer.status, answer.media_type
        begun = self._begun.get(form)
        if begun is None:
            date = formatdate(second, usegmt=True)
            plain = f"Date: {date}\r\nContent-Type: {answer.media_type}\r\n"
            begun = self._begun[form] = _STATUS_LINES[answer.status] + plain.encode("latin-1", "replace")
        more = b"" if keep else b"Connection: close\r\n"
        for each in (answer.headers, headers):
            if each:
                text = "".join([f"{name}: {value}\r\n" for name, value in each.items()])
                more += text.encode("latin-1", "replace")
        return begun + framing + more + b"\r\n"
