"""The same recipe on servers that live in threads of the workers that torchrun started, over TCP."""

import pytest
from train.test_processes import (  # noqa: F401  (fixtures among them)
    DEADLINE_S,
    folder,
    mark,
    marked,
    own_loop,
    shoal,
    torchrun,
    trained,
    until,
    write_recipe,
)

pytestmark = pytest.mark.slow
ON_SERVERS = ("--sync", "parameter-server", "--servers")


def test_servers_under_torchrun_give_the_bits_of_the_local_launcher(mark, folder):  # noqa: F811
    write_recipe(folder, micro_batches=2)
    local = trained(shoal(mark, folder, "train", "recipe.toml", "--workers", "2", "--json"), folder)
    command = ("-m", "shoal", "train", "recipe.toml", *ON_SERVERS, "3", "--json")
    joined = trained(torchrun(mark, folder, 2, *command, "--run-dir", "joined"), folder)
    assert joined["weights_sha256"] == local["weights_sha256"]
    assert joined["figures"] == local["figures"]
    squeezed = ("--run-dir", "squeezed", "--staleness", "2", "--compression", "bf16")
    stale = trained(torchrun(mark, folder, 2, *command, *squeezed), folder)
    assert stale["steps"] == local["steps"]
    assert stale["weights_sha256"] != local["weights_sha256"]
    assert not marked(mark)


def test_the_command_takes_the_flags_and_bad_ones_are_told_with_exit_code_2(mark, folder):  # noqa: F811
    write_recipe(folder)
    for flags, text in (
        (("99999",), "99999 parameter servers on one host"),
        (("2", "--set", "optimizer.name=LBFGS"), "LBFGS"),
        (("2", "--staleness", "-2"), "staleness -2"),
    ):
        process = shoal(mark, folder, "train", "recipe.toml", *ON_SERVERS, *flags, "--run-dir", "run")
        _, err = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 2, err
        assert len(err.splitlines()) == 1
        assert text in err
    fine = ("2", "--staleness", "3", "--workers", "2", "--json")
    assert trained(shoal(mark, folder, "train", "recipe.toml", *ON_SERVERS, *fine), folder)["steps"] == 9


def test_a_lost_worker_ends_the_others_and_leaves_no_process(mark, own_loop):  # noqa: F811
    program = (own_loop / "own.py").read_text()
    plan = 'device="cpu", sync="parameter-server", servers=2, hang_after_s=2.0'
    (own_loop / "own.py").write_text(program.replace('device="cpu", hang_after_s=2.0', plan))
    process = torchrun(mark, own_loop, 3, "-m", "own", "SIGKILL")
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert "has gone" in err or "lost its peers" in err
    until(lambda: not marked(mark), "all processes to be gone")
