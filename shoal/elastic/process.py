"""The life of a worker process of an elastic run, from the fork to its exit."""

import os
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from shoal.comm.agent import Said, failure_of
from shoal.comm.freed_memory import keep_freed_memory
from shoal.comm.mesh import PeerLost
from shoal.comm.status import StatusBoard
from shoal.elastic.faults import Fault
from shoal.elastic.seat import Released, Seat


@dataclass(frozen=True, kw_only=True)
class Program:
    """What every worker runs."""

    code: bytes  # cloudpickle of (function, arguments), called as function(seat, *arguments); our own launcher made it
    threads: int
    faults: tuple[Fault, ...] = ()  # of a rehearsal


def live(
    program: Program, number: int, pipe: Connection, orders: socket.socket, arena: list[int], board: StatusBoard
) -> NoReturn:
    """Ends the process. It says how: result, released, user_error or failed."""
    import cloudpickle
    import torch

    def say(kind: str, value: Any, trace: str = "") -> None:
        pipe.send_bytes(cloudpickle.dumps(Said(number, kind, value, trace)))

    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's to pass on
        keep_freed_memory()
        torch.set_num_threads(program.threads)
        seat = Seat(number, orders, arena, board, say, program.faults)
        function, arguments = cloudpickle.loads(program.code)
        say("result", function(seat, *arguments))
        code = 0
    except Released:
        say("released", None)
        code = 0
    except PeerLost:
        code = 1  # the agent has gone
    except BaseException as error:
        say(*failure_of(error))
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
