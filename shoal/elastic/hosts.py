"""What a program calls to train elastically on several hosts: once on each."""

import hashlib
import json
import os
import secrets
import stat
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.comm.launch import Agent
from shoal.elastic import roster
from shoal.elastic.api import PRELOAD, check_elastic
from shoal.elastic.crew_of_hosts import HostsJob
from shoal.elastic.links import address_of
from shoal.errors import UserError
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe
from shoal.run.hold import Hold
from shoal.train.api import order_of
from shoal.train.notices import Notice, drains

if TYPE_CHECKING:
    from torch import nn

MOST_HOSTS = 32
TOKEN_BYTES = 32


def check_hosts(recipe: Recipe, plan: Plan, least: int) -> None:
    """Raises UserError for plans whose workers share what one host has."""
    check_elastic(plan, recipe.shards, least)
    if plan.shards_states and recipe.model.compile:
        raise UserError(
            f"plan: states = {plan.states!r} between hosts brings parameters in by hooks on blocks, which a compiled "
            f"model does not keep: leave model.compile out."
        )
    if plan.device not in ("", "auto", "cpu"):
        raise UserError(f"plan: device = {plan.device!r}: elastic workers of several hosts train on processors so far.")


def train_on_hosts(
    recipe: Recipe,
    plan: Plan,
    *,
    agents: Sequence[str],
    number: int,
    run_dir: str | Path | None = None,
    resume: str | Path | None = None,
    start: str | None = None,
    least: int = 1,
    host: str = "",
    origins: Mapping[str, str] | None = None,
    progress: Callable[[Mapping[str, Any]], None] | None = None,
    model: "Callable[[], nn.Module] | None" = None,
    data: Any = None,
    agent: Agent | None = None,
    notice: Notice | None = None,
) -> dict[str, Any]:
    """As `shoal.elastic.api.train_elastic`, on several hosts: called on each, with its ``number`` among the ``agents``.

    ``agents`` are addresses, host:port, the same list everywhere; ``plan.workers`` is how many train on all hosts
    together. The run directory must be the same folder on all hosts. Any agent may end, and its workers with it: the
    run goes on with the same bits as long as more than half of those that count are left, and the same call on that
    host joins it again. What ``notice`` names is of this host alone: its workers leave, the others go on. A signal ends
    the run, saved. Raises UserError for bad input, and RunFailed when a worker raised or this agent has ended."""
    if not 2 <= len(agents) <= MOST_HOSTS:
        raise UserError(f"--agents: {len(agents)} addresses: give 2 to {MOST_HOSTS}, better an odd number.")
    if not 0 <= number < len(agents):
        raise UserError(f"--agent {number}: the hosts are numbered 0 to {len(agents) - 1} in the order of --agents.")
    addresses = tuple(address_of(text) for text in agents)
    if len(set(addresses)) < len(addresses):
        raise UserError("--agents: an address is there twice.")
    asked = (recipe, plan, origins, run_dir, resume, start, model, data)
    job = jobs(*asked, hosts=len(addresses), least=least)(number, addresses, host)
    with nullcontext(agent) if agent else Agent(PRELOAD) as crew, drains(notice) as stop:

        def tell(event: Mapping[str, Any]) -> None:
            stop.heard(event)
            if progress:
                progress(event)

        def leave() -> None:
            roster.wish(job.run_dir, drain=f"{roster.HOST}{number}")

        def reach(ask: Callable[[], None]) -> None:
            stop.reach(ask, leave)

        result: dict[str, Any] = crew.carry_out(job, 1, listen=listener(tell), on_start=reach)[0]
    return result


def listener(progress: Callable[[Mapping[str, Any]], None] | None) -> Callable[[int, Any], None]:
    lock = threading.Lock()

    def listen(_: int, event: Any) -> None:
        if progress:
            with lock:
                progress(event)

    return listen


def jobs(
    recipe: Recipe,
    plan: Plan,
    origins: Mapping[str, str] | None,
    run_dir: str | Path | None,
    resume: str | Path | None,
    start: str | None,
    model: "Callable[[], nn.Module] | None",
    data: Any,
    *,
    hosts: int,
    least: int,
) -> Callable[[int, tuple[tuple[str, int], ...], str], HostsJob]:
    """What the agent of each host is sent, by its number, the addresses of all as it sees them, and its name.

    Raises UserError."""
    import cloudpickle

    from shoal.elastic.loop import run_elastic

    check_hosts(recipe, plan, least)
    order = order_of(recipe, plan, origins, run_dir, resume, start, model, data, elastic=True)
    if order.run_dir is None:
        raise UserError("several hosts need to know where the run is: add --run-dir DIR, the same folder on all hosts.")
    order = replace(order, run_dir=(folder := order.run_dir.absolute()))
    with closing(Hold(shared=True)) as hold:
        hold.take(folder, make=True)  # each agent keeps it from then on
        token = shared_token(folder)
    told = [recipe.arithmetic_hash, plan.to_toml(), least, hosts, order.resume, str(order.start or "")]

    def make(number: int, addresses: tuple[tuple[str, int], ...], host: str) -> HostsJob:
        return HostsJob(
            code=cloudpickle.dumps((run_elastic, (order,))),
            threads=recipe.threads,
            workers=plan.workers,
            least=least,
            shards=recipe.shards,
            depth=plan.axes.size("pipe"),
            servers=plan.server_processes,
            hang_after_s=plan.hang_after_s,
            number=number,
            addresses=addresses,
            token=token,
            run_dir=folder,
            job=hashlib.sha256(json.dumps(told).encode()).hexdigest(),
            host=host,
        )

    return make


def shared_token(run_dir: Path) -> bytes:
    """What all agents of the run know: a file in its directory that only its owner can read; the first one makes it.

    Raises UserError where it cannot be made, or others can read it."""
    place = run_dir / "agents" / "token"
    own = place.with_name(f".token.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(TOKEN_BYTES))
        try:
            os.link(own, place)  # whole or not at all
        except FileExistsError:
            pass
        finally:
            own.unlink()
        state = place.stat()
        text = place.read_text()
    except OSError as error:
        raise UserError(f"cannot use {str(place)!r}: {error.strerror}.") from None
    if state.st_uid != os.geteuid() or stat.S_IMODE(state.st_mode) & 0o077:
        raise UserError(f"{str(place)!r} can be read by others: it is what agents know each other by. Remove it.")
    if len(text) != 2 * TOKEN_BYTES:
        raise UserError(f"{str(place)!r} holds no token: remove it.")
    return text.encode()
