"""The same recipe with sharded states, on workers that torchrun started."""

import pytest
from train.test_processes import (  # noqa: F401  (fixtures among them)
    DEADLINE_S,
    folder,
    mark,
    marked,
    shoal,
    torchrun,
    trained,
    write_recipe,
)

pytestmark = pytest.mark.slow


def test_sharded_states_under_torchrun_give_the_bits_of_the_local_launcher(mark, folder):  # noqa: F811
    write_recipe(folder, micro_batches=2)
    local = trained(shoal(mark, folder, "train", "recipe.toml", "--workers", "1", "--json"), folder)
    command = ("-m", "shoal", "train", "recipe.toml", "--set", "states=zero3", "--set", "bucket_bytes=1")
    joined = trained(torchrun(mark, folder, 2, *command, "--json", "--run-dir", "joined"), folder)
    assert joined["weights_sha256"] == local["weights_sha256"]
    assert joined["figures"] == local["figures"]
    assert not marked(mark)


def test_what_cannot_be_is_told_with_exit_code_2(mark, folder):  # noqa: F811
    write_recipe(folder)
    for flags, text in (
        (("--set", "states=zero4"), "zero3"),
        (("--set", "states=zero1", "--set", "optimizer.name=Adafactor"), "use one of ASGD"),
        (("--set", "states=zero1", "--set", "state_group=2", "--workers", "3"), "state_group = 2 must divide"),
    ):
        process = shoal(mark, folder, "train", "recipe.toml", *flags, "--run-dir", "run")
        _, err = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 2, err
        assert len(err.splitlines()) == 1
        assert text in err
        assert not (folder / "run").exists()
