"""``shoal export``: the model of a run or a checkpoint as a Hugging Face folder."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from shoal.cli.exit_codes import DONE
from shoal.cli.output import json_line

HELP = "write the model of a run or a checkpoint as a Hugging Face folder"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("target", metavar="RUN", help="a run ('latest': the newest) or one of its checkpoints")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to write; made if it is not there")
    parser.add_argument("--json", action="store_true", help="the result as one JSON object")


def run(args: Namespace) -> int:
    from shoal.train import api

    folder = api.export(args.target, args.folder)
    print(json_line({"folder": folder}) if args.json else f"wrote {folder}")
    return DONE
