"""``shoal serve``: a run, a checkpoint or a Hugging Face folder, over HTTP."""

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from shoal.cli.exit_codes import DONE
from shoal.cli.output import count, json_line
from shoal.cli.recipe_arguments import mesh_sizes
from shoal.errors import UserError, unknown_name

if TYPE_CHECKING:
    from shoal.serve.options import ServeOptions

HELP = "a run, a checkpoint or a Hugging Face folder, over HTTP"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "target",
        metavar="TARGET",
        nargs="?",
        default="latest",
        help="a run ('latest': the newest), a checkpoint, a Hugging Face folder, or module:factory",
    )
    parser.add_argument("--port", type=int, help="8000; 0: any free one")
    parser.add_argument("--host", help="the address to listen on; others than loopback need --api-keys")
    parser.add_argument("--task", help="instead of the one that the target was made for")
    parser.add_argument("--name", help="the model's name, for clients")
    parser.add_argument("--dtype", help="float32, bfloat16, int8, or auto: the fastest that is near enough")
    parser.add_argument("--mesh", metavar="pipe=N,tensor=N", help="split the model over so many processes a replica")
    parser.add_argument("--engine", default="local", help="local, or ray: the same application on Ray Serve")
    parser.add_argument("--replicas", type=int, help="model processes, which share one copy of the weights")
    parser.add_argument(
        "--min-replicas", type=int, help="when nothing is asked; 0: none, and the first request wakes one"
    )
    parser.add_argument("--max-replicas", type=int, help="when much is asked")
    parser.add_argument("--calm-s", type=float, help="fewer are kept once fewer would have done for so long")
    parser.add_argument("--threads", type=int, help="of each model process")
    parser.add_argument("--batch", type=int, help="samples of a batch, at most")
    parser.add_argument(
        "--invariant",
        action="store_true",
        default=None,
        help="the same bits in any company: every forward pass has a full batch's shape",
    )
    parser.add_argument("--latency-ms", type=float, help="a batch may wait for company as long as this target allows")
    parser.add_argument("--queue", type=int, help="requests that may wait; more get 429")
    parser.add_argument(
        "--within-ms", type=float, help="who could not be answered within so long, by the times of late, gets 429"
    )
    parser.add_argument("--timeout-s", type=float, help="a request that takes longer gets 504")
    parser.add_argument("--body-bytes", type=int, help="the largest body of a request")
    parser.add_argument("--connections", type=int, help="open at the same time")
    parser.add_argument("--read-timeout-s", type=float, help="a request may take so long from first to last byte")
    parser.add_argument("--drain-s", type=float, help="after SIGTERM, open requests may take so long to end")
    parser.add_argument("--hang-s", type=float, help="a model process that is silent for longer at work is replaced")
    parser.add_argument("--api-keys", metavar="FILE", help="one key a line; or the variable SHOAL_API_KEYS, by commas")
    parser.add_argument("--admin-keys", metavar="FILE", help="who may POST /v1/reload; one key a line")
    parser.add_argument("--follow", action="store_true", help="serve each newer checkpoint of the run as it comes")
    parser.add_argument("--canary", type=float, help="the share of requests that it gets until it is promoted; 1")
    parser.add_argument("--tls-cert", metavar="FILE", help="certificate chain, for HTTPS")
    parser.add_argument("--tls-key", metavar="FILE")
    parser.add_argument("--allow-origin", metavar="ORIGIN", help="whose pages may ask from a browser: none but our own")
    parser.add_argument(
        "--generation",
        action="append",
        metavar="KEY=VALUE",
        help="how text is generated: cache_bytes, running, prompt_rows, stretch, precision, kernels, speculate",
    )
    parser.add_argument(
        "--print-deployment", metavar="WHERE", help="write manifests for a cluster and serve nothing: kubernetes"
    )
    parser.add_argument("--image", help="of --print-deployment: the container image that holds Shoal and the target")
    parser.add_argument("--pods", metavar="A..B", help="of --print-deployment: between how many to scale; 1..4")
    parser.add_argument("--json", action="store_true", help="what is served as one JSON line on stdout")


def run(args: Namespace) -> int:
    from shoal.serve import api
    from shoal.serve.options import ServeOptions

    given: dict[str, Any] = {
        field.name: getattr(args, field.name)
        for field in fields(ServeOptions)
        if getattr(args, field.name, None) is not None
    }
    from_environment = os.environ.get("SHOAL_API_KEYS", "").split(",")
    given["api_keys"] = _keys("--api-keys", args.api_keys) or tuple(filter(None, map(str.strip, from_environment)))
    if args.mesh is not None:
        given["mesh"] = dict(mesh_sizes(args.mesh))
    given["admin_keys"] = _keys("--admin-keys", args.admin_keys)
    if args.generation:
        from shoal.serve.generation.options import options_from_pairs

        given["generation"] = options_from_pairs(args.generation)
    if args.engine not in ("local", "ray"):
        raise unknown_name("engine", args.engine, ["local", "ray"], "--engine")
    if args.print_deployment:
        print(_deployment(args, ServeOptions(**{**given, "host": "127.0.0.1"})))
        return DONE
    if args.image or args.pods:
        raise UserError("--image and --pods are for --print-deployment kubernetes.")
    options = ServeOptions(**given)
    if args.engine == "ray":
        from shoal.serve import ray_engine

        return ray_engine.run(options, lambda told: print(json_line(told) if args.json else told["url"], flush=True))

    def ready(told: dict[str, Any]) -> None:
        print(json_line(told) if args.json else _lines(told), flush=True)

    return api.run(options, ready)


ELSEWHERE = ("target", "host", "port", "api_keys", "admin_keys", "tls_cert", "tls_key")  # the deployment says these


def _deployment(args: Namespace, options: "ServeOptions") -> str:
    from shoal.serve import deployment

    if args.print_deployment != "kubernetes":
        raise unknown_name("deployment", args.print_deployment, ["kubernetes"], "--print-deployment")
    least, dots, most = (args.pods or "1..4").partition("..")
    if not (dots and least.isdecimal() and most.isdecimal()):
        raise UserError(f"--pods {args.pods}: write LEAST..MOST, such as 1..4.")
    return deployment.kubernetes(options, list(_words(args)), deployment.Pods(args.image or "", int(least), int(most)))


def _words(args: Namespace) -> Iterator[str]:
    """The options of this command as a command in a container has them."""
    from shoal.serve.options import ServeOptions

    for field in fields(ServeOptions):
        value = getattr(args, field.name, None)
        option = f"--{field.name.replace('_', '-')}"
        if value is None or value is False or field.name in ELSEWHERE:
            continue
        if value is True:
            yield option
        else:
            yield from (f"{option}={one}" for one in (value if isinstance(value, list) else [value]))


def _keys(option: str, path: str | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        with open(path, encoding="utf-8") as file:
            keys = tuple(line.strip() for line in file if line.strip() and line[0] != "#")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option}: cannot read {path!r}: {getattr(error, 'strerror', error)}.") from None
    if not keys:
        raise UserError(f"{option}: {path!r} holds no key: one a line.")
    return keys


def _lines(told: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in told["seconds"].items() if name != "all")
    size = count(told["parameters"])
    each = "".join(f", {axis} {size}" for axis, size in told["mesh"].items())
    numbers = f"{_precision(told['precision'])}\n" if told["precision"] else ""
    who = f"group(s) of{each[1:]}" if each else "model process(es)"
    return (
        f"{told['model']}: {told['task']}, {size} parameters, {told['dtype']}, {told['replicas']} {who}\n"
        f"{numbers}"
        f"ready in {told['seconds']['all']:.2f} s ({parts})\n"
        f"{told['url']}  (try it there; {told['url']}/docs describes it; Ctrl-C ends)"
    )


def _precision(told: dict[str, Any]) -> str:
    """What was measured for --dtype auto."""
    if told["why"]:
        return f"{told['chosen']}: {told['why']}"
    arms = []
    for one in told["measured"]:
        times = " and ".join(f"{ms:.3g}" for ms in one["ms"].values())
        near = "" if one["dtype"] == "float32" else f" (same first choice {one['agree']:.1%}, error {one['error']:.2g})"
        arms.append(f"{one['dtype']} {times} ms{near}")
    rows = " and ".join(told["measured"][0]["ms"])
    return f"{told['chosen']} is the fastest that is near enough; {rows} at a time: {', '.join(arms)}"
