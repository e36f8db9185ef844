"""Runs and checkpoints are served as they were trained: the same treatment of what comes in, the same labels."""

import base64
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from serve.saved_runs import image_run, table_run, text_run

import shoal
from shoal.data.registry import open_data
from shoal.errors import UserError
from shoal.recipe.plan import Plan
from shoal.run.run import Run
from shoal.serve.target import load
from shoal.train.scoring import find_target, load_target, rebuild


def expected(run: Path, split: str = "train") -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The classes that the run's own model gives for its first samples, as the run's own data hands them over."""
    recipe = Run.find(run).recipe
    splits = open_data(recipe.data, recipe.seed)
    target = find_target(run)
    model = rebuild(target, load_target(target), splits.train.facts)
    batch = dict(getattr(splits, split).fetch(np.arange(5), 0))
    with torch.no_grad():
        logits = model(batch["tokens"], mask=batch["mask"]) if "tokens" in batch else model(batch["input"])
    return logits.softmax(-1), batch


def scores(predictions: list[dict[str, dict[str, float]]]) -> torch.Tensor:
    return torch.tensor([list(one["scores"].values()) for one in predictions])


def test_an_image_is_treated_as_in_training_whichever_way_it_comes(tmp_path: Path) -> None:
    run = image_run(tmp_path)
    want, batch = expected(run, "test")
    source = open_data(Run.find(run).recipe.data, 0).test
    pixels = source.images[:5]  # type: ignore[union-attr]
    files = []
    for image in pixels:
        stream = io.BytesIO()
        Image.fromarray(image[0]).save(stream, "PNG")
        files.append(base64.b64encode(stream.getvalue()).decode())
    with shoal.serve(next((run / "checkpoints").iterdir()), http=False) as server:  # a checkpoint is a target too
        assert server.facts["task"] == "image-classification"
        for body in (
            {"pixels": pixels.tolist()},
            {"image": [files[0], "data:image/png;base64," + files[1], *files[2:]]},
            {"input": batch["input"].tolist()},
        ):
            predictions = server.predict(**body)
            torch.testing.assert_close(scores(predictions), want, rtol=1e-5, atol=1e-6)
            assert list(predictions[0]["scores"]) == ["0", "1", "2", "3"]
        for bad, said in (
            ({"image": "AAAA"}, "base64 of a whole"),
            ({"image": "no base64"}, "base64 of a whole"),
            ({"pixels": [[300.0] * 12] * 12}, "from 0 to 255"),
            ({"pixels": [[1.0] * 11] * 12}, "the model takes"),
        ):
            with pytest.raises(UserError, match=said):
                server.predict(**bad)


def test_an_image_that_unpacks_to_too_many_pixels_is_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("L", (5000, 5000)).save(stream, "PNG")
    with (
        shoal.serve(image_run(tmp_path), http=False) as server,
        pytest.raises(UserError, match="send at most"),
    ):
        server.predict(image=base64.b64encode(stream.getvalue()).decode())


def test_rows_of_a_table_are_standardised_by_the_training_rows(tmp_path: Path) -> None:
    run = table_run(tmp_path)
    want, batch = expected(run)
    facts = open_data(Run.find(run).recipe.data, 0).train.facts
    own_units = batch["input"].double().numpy() * np.array(facts["scale"]) + np.array(facts["shift"])
    with shoal.serve(run, http=False) as server:
        rows = [dict(zip(facts["columns"], row, strict=True)) for row in own_units.tolist()]
        predictions = server.predict(rows=rows)
        torch.testing.assert_close(scores(predictions), want, rtol=1e-5, atol=1e-5)
        assert set(predictions[0]["scores"]) == {"no", "yes"}
        with pytest.raises(UserError, match="lacks 'weight'"):
            server.predict(rows={"height": 1.0})


def test_texts_are_cut_and_framed_as_in_training(tmp_path: Path) -> None:
    run = text_run(tmp_path)
    want, batch = expected(run)
    texts = [
        "".join(map(chr, row[mask][1:-1].tolist())) for row, mask in zip(batch["tokens"], batch["mask"], strict=True)
    ]
    with shoal.serve(run, http=False) as server:
        torch.testing.assert_close(scores(server.predict(text=texts)), want, rtol=1e-5, atol=1e-6)
        longer = server.predict(text=[texts[0].ljust(22) + "x" * 50, texts[0].ljust(22)])
        assert longer[0]["scores"] == pytest.approx(longer[1]["scores"]), "what is beyond the context does not count"


def test_windows_of_a_long_context_are_laid_as_training_lays_them(tmp_path: Path) -> None:
    from shoal.data.squad import Question, SquadConfig, squad_source
    from shoal.data.tokenizer import ByteTokenizer
    from shoal.serve.intake.answers import Answers

    config = SquadConfig(context=200, stride=128)
    context, question = "the fish swims in the sea. " * 30, "where does the fish swim?"
    source = squad_source(config, ByteTokenizer(), [context], [Question("q", question, 0, ())])
    special = source.facts
    facts = {"tokenizer": special["tokenizer"], "context": 200, "vocab": special["vocab"]}
    facts |= dict(zip(("pad", "start", "separator"), special["special"], strict=True))
    (asked,) = Answers(facts).read({"question": question, "context": context})
    batch = source.fetch(np.arange(len(source)), 0)
    assert len(asked.tokens) == len(source) > 3
    for (ids, types), offsets, row in zip(asked.tokens, asked.windows, range(len(source)), strict=True):
        length = int(batch["mask"][row].sum())
        assert ids == batch["tokens"][row, :length].tolist()
        assert types == batch["types"][row, :length].tolist()
        assert list(offsets) == source.example(row)["offsets"][:length]


def test_bfloat16_gives_the_classes_of_float32(tmp_path: Path) -> None:
    """Its numbers have 8 bits, so that scores differ by some thousandths."""
    run = text_run(tmp_path)
    want, _ = expected(run)
    with shoal.serve(run, dtype="bfloat16", http=False) as server:
        got = scores(server.predict(text=[f"line {i}" for i in range(5)]))
        assert load(str(run), dtype="bfloat16").facts["dtype"] == "bfloat16"
    assert got.shape == want.shape
    with shoal.serve(run, http=False) as server:
        exact = scores(server.predict(text=[f"line {i}" for i in range(5)]))
    torch.testing.assert_close(got, exact, rtol=0, atol=0.05)
    assert not torch.equal(got, exact), "it is another arithmetic"


@pytest.mark.parametrize("make", [image_run, text_run])
def test_a_run_is_served_without_its_data(launches_here: None, tmp_path: Path, make: Callable[[Path], Path]) -> None:
    """Training keeps in the run what is to be known of them: exactly what serving would have found in them."""
    recipe = Run.find(make(tmp_path / "data")).recipe
    run = Path(shoal.train(recipe, Plan(), run_dir=tmp_path / "run")["run_dir"])
    kept = (run / "data.json").read_bytes()
    (run / "data.json").unlink()
    with_data = load(str(run))
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(UserError):
        load(str(run))
    (run / "data.json").write_bytes(kept)
    without = load(str(run))
    assert without.facts == with_data.facts
    states = (with_data.model.state_dict(), without.model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in {**states[0], **states[1]})
