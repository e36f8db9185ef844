"""The recipes that come with the package fit the sources and the models that they name."""

import numpy as np
import pytest

from shoal.data.registry import open_data
from shoal.models.registry import build, task_for
from shoal.recipe.layers import assemble


@pytest.mark.parametrize("name", ["gpt-stdlib", "gpt-chars"])
def test_a_text_preset_opens_its_text_and_builds_its_model(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    text = tmp_path / "text.txt"
    text.write_text("all fish swim as one body\n" * 400, encoding="utf-8")
    recipe, _ = assemble(None, name, {"data.path": str(text)})
    splits = open_data(recipe.data, recipe.seed)
    model = build(recipe.model, splits.train.facts)
    total, count = task_for(recipe.model, splits.train.facts).loss(model, splits.train.fetch(np.arange(2), 0))
    assert count == 2 * 128
    assert total.isfinite()


def test_the_digits_preset_reads_idx_files_and_builds_its_model(shared_data):
    recipe, _ = assemble(None, "mnist-cnn", {"data.path": str(shared_data / "mnist")})
    splits = open_data(recipe.data, recipe.seed)
    assert splits.test is not None
    model = build(recipe.model, splits.train.facts)
    total, count = task_for(recipe.model, splits.train.facts).loss(model, splits.train.fetch(np.arange(2), 0))
    assert count == 2
    assert total.isfinite()
