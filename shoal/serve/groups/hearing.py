"""What a process of a group over several hosts hears: messages over connections, and that children of its own end."""

import os
import select
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import TypeVar

from shoal.serve.frames import FrameError, FrameReader

M = TypeVar("M")


def received(connection: socket.socket, reader: FrameReader[M]) -> tuple[list[M], bool]:
    """What has come over a connection that is ready, and whether that is lost."""
    try:
        data = connection.recv(1 << 16)
        return reader.feed(data), not data
    except (OSError, FrameError):
        return [], True


def ends_of_children() -> int:
    """A file descriptor that is ready when a child of this process has ended, from now on."""
    wake, woken = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    return wake


def heard(connection: socket.socket, reader: FrameReader[M], wake: int) -> Iterator[M | None]:
    """Messages as they come, and None when children may have ended (``wake``), until the connection is lost."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    poll.register(wake, select.POLLIN)
    while True:
        ready = {file for file, _ in poll.poll()}
        if wake in ready:
            with suppress(BlockingIOError):
                os.read(wake, 4096)
            yield None
        if connection.fileno() in ready:
            messages, lost = received(connection, reader)
            yield from messages
            if lost:
                return
