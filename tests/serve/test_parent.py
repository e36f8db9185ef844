"""The parent of the model processes: what it looks up once for all that it forks, and what it tells while it waits."""

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from serve.conftest import Served, gone

from shoal.comm.native import build
from shoal.models.bert import Head
from shoal.serve.parent import SILENT_S, Parent


def test_ranks_that_are_lost_a_second_time_are_told_again() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        parent = Parent(ours, 0.0)
        parent._agents = SimpleNamespace(missing=[1])
        assert parent._tells_after_ms() == 1e3 * SILENT_S
        parent._told_missing = True
        assert parent._tells_after_ms() is None, "once is enough"
        parent._agents.missing = []
        parent._all_here()
        parent._agents.missing = [1]
        assert parent._tells_after_ms() == 1e3 * SILENT_S


@pytest.mark.slow
def test_the_compilers_version_is_asked_once_whatever_is_forked(
    served: Callable[..., Served], folders: Callable[[Head], Path], tmp_path: Path
) -> None:
    """Processes of a group look for the collectives in C++; a version that is asked in each of them takes a while."""
    found = build.compiler()
    if found is None:
        pytest.skip("there is no C++ compiler")
    told, wrapper = tmp_path / "told", tmp_path / "c++"
    wrapper.write_text(f'#!/bin/sh\necho "$1" >> {told}\nexec {found} "$@"\n')
    wrapper.chmod(0o755)
    server = served(folders("classification"), "--mesh", "tensor=2", CXX=str(wrapper))
    assert server.post("/predict", {"text": "a"})[0] == 200
    killed = server.replicas()
    os.kill(killed[0], signal.SIGKILL)
    assert gone(killed)
    assert server.post("/predict", {"text": "a"})[0] == 200
    assert told.read_text().split("\n").count("--version") == 1
