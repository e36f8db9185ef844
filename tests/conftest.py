"""Fixtures shared by all tests."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import TYPE_CHECKING

import pytest
from forked_programs import Source
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from shoal.comm.launch import Agent

# The gate gives the same verdict on the same change; the search for new examples goes on wherever people run the tests.
# How long an example takes says nothing of what it shows.
settings.register_profile("anywhere", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("gate", settings.get_profile("anywhere"), derandomize=True)
settings.load_profile("gate" if os.environ.get("CI") else "anywhere")

os.environ.setdefault("OMP_NUM_THREADS", "1")
if "SHOAL_CACHE" not in os.environ:  # tests leave nothing in the home folder; processes that they start inherit it
    os.environ["SHOAL_CACHE"] = tempfile.mkdtemp(prefix="shoal-test-cache-")
    atexit.register(shutil.rmtree, os.environ["SHOAL_CACHE"], ignore_errors=True)
# Compiled code is named by a hash of its sources, so that it may be shared by all test runs.
os.environ.setdefault("SHOAL_NATIVE_CACHE", str(Path(__file__).parents[1] / "build" / "native"))


@pytest.fixture(scope="session")
def agent() -> "Iterator[Agent]":
    """One agent for all tests of a session: a group of workers then costs a fork.

    What workers use is imported once, in it: otherwise each of them would import it anew, and torch._dynamo alone,
    which comes with the first optimiser or recorded model, takes more than a second."""
    from shoal.comm.launch import Agent
    from shoal.elastic.api import PRELOAD  # brings torch, for which the number of threads above is set

    with Agent((*PRELOAD, "shoal.prove.trial", "torch.distributed.fsdp", "torch.distributed.tensor")) as agent:
        agent.run(id, workers=1)  # it has imported everything, and has no file of a module open any more
        yield agent


@pytest.fixture
def launches_here(agent: "Agent", monkeypatch: pytest.MonkeyPatch) -> None:
    """The agents of commands and library calls of this process are forks of the agent of all tests."""
    from forked_agents import ForkedAgent

    names = ("shoal.train.api", "shoal.prove.api", "shoal.elastic.api", "shoal.comm.launch")
    for module in [import_module(name) for name in names]:
        monkeypatch.setattr(module, "Agent", lambda preload=(): ForkedAgent(agent))


@pytest.fixture(scope="session")
def warm() -> Iterator[Source]:
    """A process that has imported what commands and servers use: programs that are forked from it need not do so.

    Without uvloop, which remakes descriptors of its own, whoever has them by then, in each fork of a process."""
    import shoal.cli
    import shoal.serve
    from shoal.elastic.api import PRELOAD

    modules = ["torch", *PRELOAD]
    for package in (shoal.cli, shoal.serve):
        modules += [each.name for each in walk_packages(package.__path__, f"{package.__name__}.")]
    programs = ("shoal.serve.ray_engine", "shoal.serve.load")  # each by itself, where it is run
    starters = ["shoal.comm.launch", "shoal.serve.replicas", "shoal.serve.groups.host"]
    source = Source([name for name in modules if not name.startswith(programs)], starters, absent=["uvloop"])
    yield source
    source.close()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets that stand beside the checkout; a clone elsewhere may point SHOAL_TEST_DATA at its own copy."""
    folder = Path(os.environ.get("SHOAL_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "mnist").exists():
        pytest.skip(f"no real data sets at {folder}; set SHOAL_TEST_DATA to a folder with mnist/")
    return folder
