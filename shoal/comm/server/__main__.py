"""python -m shoal.comm.server: one parameter server in a process of its own.

Prints one line of JSON, {"address", "server"}, when it listens, and serves until it is ended (or, with --until-empty,
until its last worker has left). The token is read from the environment: SHOAL_SERVER_TOKEN, 64 hexadecimal digits.
"""

import argparse
import json
import os
import signal
import sys

from shoal.comm.server import wire
from shoal.errors import UserError

VARIABLE = "SHOAL_SERVER_TOKEN"


def token_from(environment: "os._Environ[str] | dict[str, str]") -> bytes:
    """Raises UserError when there is none, or none of the right length."""
    try:
        token = bytes.fromhex(environment.get(VARIABLE, ""))
    except ValueError:
        token = b""
    if len(token) != wire.TOKEN_BYTES:
        raise UserError(
            f"{VARIABLE} must hold {2 * wire.TOKEN_BYTES} hexadecimal digits, the same for workers and servers: "
            f"python -c 'import secrets; print(secrets.token_hex({wire.TOKEN_BYTES}))'"
        )
    return token


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shoal.comm.server", description=__doc__.split("\n")[0])
    parser.add_argument("--server", type=int, default=0, metavar="N", help="number of this server, from 0")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; the loopback interface if unset")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the optimiser")
    parser.add_argument("--until-empty", action="store_true", help="end when the last worker has left")
    args = parser.parse_args(arguments)
    try:
        token = token_from(os.environ)
    except UserError as error:
        print(f"shoal: {error}", file=sys.stderr)
        return 2
    import torch

    from shoal.comm.server.tcp import TcpServer

    torch.set_num_threads(args.threads)
    server = TcpServer(args.server, token=token, host=args.host, port=args.port, until_empty=args.until_empty)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print(json.dumps({"address": server.address, "server": args.server}), flush=True)
    try:
        server.run()
    except KeyboardInterrupt:
        return 130
    finally:
        server.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
