"""Where a run can be made, and how one is found."""

import pytest

from shoal.errors import UserError
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe
from shoal.run.run import Run


@pytest.mark.parametrize("place", ["file", "file/run", "file/deep/run"])
def test_a_place_below_a_file_is_refused_before_anything_is_spent(place, tmp_path):
    (tmp_path / "file").write_text("here before\n")
    with pytest.raises(UserError, match=r"cannot write the run directory .*/file' is no folder"):
        Run.check_place(tmp_path / place)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_spent(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # root may write anywhere
    with pytest.raises(UserError, match="cannot be written"):
        Run.check_place(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"run directory .*/runs': .* cannot be written"):
        Run.check_place(None)


def test_a_name_that_is_too_long_is_refused_before_anything_is_spent(tmp_path):
    with pytest.raises(UserError, match=r"cannot write the run directory .*: File name too long"):
        Run.check_place(tmp_path / ("a" * 300))
    with pytest.raises(UserError, match="no run in 'aaa"):
        Run.find("a" * 300)


def test_a_place_where_a_run_can_be_made_is_let_pass_and_left_as_it_is(tmp_path):
    Run.check_place(tmp_path / "deep" / "run")
    assert not list(tmp_path.iterdir())


def test_a_misspelt_run_is_told_with_the_nearest_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no run in 'latst': a run directory holds recipe.toml"):
        Run.find("latst")  # there is none yet
    made = Run.create(Recipe(steps=1), Plan(), {})
    with pytest.raises(UserError, match=r"no run in 'latst': did you mean 'latest'\?"):
        Run.find("latst")
    with pytest.raises(UserError, match=rf"did you mean 'runs/{made.path.name}'\?"):
        Run.find(made.path.name)
    with pytest.raises(UserError, match="Try `shoal train`"):
        Run.find("nothing/alike")
