"""The command line: finds the verb, lets it run, and turns Shoal's errors into one line and an exit code.

A verb is a module of this folder with ``HELP: str``, ``add_arguments(parser)`` and ``run(args) -> int``. It imports
torch and whatever else is heavy inside ``run``, so that ``shoal --help`` stays quick.
Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted after saving.
"""

import errno
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from shoal import __version__
from shoal.cli.ending import terminated_as_interrupted
from shoal.cli.exit_codes import BAD_INPUT, DONE, FAILED, INTERRUPTED
from shoal.cli.parser import OneLineParser
from shoal.errors import ShoalError, UserError, unknown_name

VERBS = (
    "train",
    "eval",
    "serve",
    "plan",
    "report",
    "prove",
    "inspect",
    "export",
    "resize",
    "drain",
    "chaos",
    "bench",
    "doctor",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except UserError as error:
        return _complain(error, BAD_INPUT)
    except ShoalError as error:
        return _complain(error, FAILED)
    except KeyboardInterrupt:
        return _complain("interrupted.", INTERRUPTED)
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        if error.filename and error.errno in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG):
            return _complain(f"{error.filename!r}: {error.strerror}: check the path and who may use it.", BAD_INPUT)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        return _complain(
            f"cannot write {error.filename or 'a file'!r}: {error.strerror}: free some space, or name another folder.",
            BAD_INPUT,
        )
    except SystemExit as stop:  # argparse, after --help or --version
        return stop.code if isinstance(stop.code, int) else DONE


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return DONE
    if argv[0] in ("-V", "--version"):
        print(f"shoal {__version__}")
        return DONE
    if argv[0] not in VERBS:
        raise unknown_name("option" if argv[0].startswith("-") else "verb", argv[0], [*VERBS, "--help", "--version"])
    verb = load(argv[0])
    parser = OneLineParser(prog=f"shoal {argv[0]}", description=verb.HELP)
    verb.add_arguments(parser)
    args = _parsed(parser, argv[1:])
    with terminated_as_interrupted():
        return int(verb.run(args))


def _parsed(parser: OneLineParser, argv: list[str]) -> Namespace:
    args, extra = parser.parse_known_args(argv)
    parser.refuse(extra)
    return args


def load(verb: str) -> ModuleType:
    return import_module(f"shoal.cli.{verb}")


def overview() -> str:
    lines = [f"  shoal {verb:<9} {load(verb).HELP}" for verb in VERBS]
    return "\n".join(
        [
            "Shoal trains PyTorch models on any number of workers, with the same bits at any size.",
            "",
            *lines,
            "",
            "`shoal train` without arguments trains a small GPT. `shoal VERB --help` shows a verb's options.",
        ]
    )


def _complain(what: object, code: int) -> int:
    print(f"shoal: {' '.join(str(what).split())}", file=sys.stderr)
    return code
