"""Tables: CSV, JSON lines and Parquet hold the same rows, and every bad row is named."""

import builtins
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from shoal.data.registry import open_data
from shoal.errors import UserError
from shoal.recipe.recipe import DataSpec

ROWS = [{"width": i * 0.5, "height": 10 - i, "kind": "ab"[i % 2], "price": i * 1.25} for i in range(20)]


def write(folder: Path, kind: str, rows: list[dict]) -> Path:
    path = folder / f"rows.{kind}"
    if kind == "csv":
        lines = [",".join(rows[0])] + [",".join("" if v is None else str(v) for v in row.values()) for row in rows]
        path.write_text("\n".join(lines) + "\n")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def spec(path: Path, **options: object) -> DataSpec:
    parts = {name: options.pop(name) for name in ("validation", "test", "test_path") if name in options}
    return DataSpec(source=path.suffix[1:], path=str(path), options=options, **{"validation": 0.0, **parts})


def all_of(source: object) -> dict[str, torch.Tensor]:
    return dict(source.fetch(np.arange(len(source)), 0))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_all_formats_give_the_same_classes_and_features(tmp_path, kind):
    source = open_data(spec(write(tmp_path, kind, ROWS), target="kind", standardise=False), 0).train
    assert {key: source.facts[key] for key in ("features", "columns", "classes", "labels")} == {
        "features": 3, "columns": ["width", "height", "price"], "classes": 2, "labels": ["a", "b"],
    }  # fmt: skip
    batch = all_of(source)
    assert batch["target"].tolist() == [0, 1] * 10
    assert batch["input"].tolist() == [[i * 0.5, 10 - i, i * 1.25] for i in range(20)]
    assert batch["input"].dtype == torch.float32


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_target_with_fractions_is_a_number(tmp_path, kind):
    source = open_data(spec(write(tmp_path, kind, ROWS), target="price", features=["width"]), 0).train
    assert source.facts["outputs"] == 1
    assert "classes" not in source.facts
    assert torch.equal(all_of(source)["target"], torch.arange(20.0)[:, None] * 1.25)


def test_whole_number_targets_are_classes_unless_said_otherwise(tmp_path):
    path = write(tmp_path, "csv", ROWS)
    assert open_data(spec(path, target="height"), 0).train.facts["labels"][:2] == ["-9", "-8"]
    assert open_data(spec(path, target="height", predict="number"), 0).train.facts["outputs"] == 1


def test_features_are_standardised_by_the_training_rows_alone(tmp_path):
    splits = open_data(spec(write(tmp_path, "csv", ROWS), target="kind", validation=0.25), 0)
    features = all_of(splits.train)["input"].double()
    assert torch.allclose(features.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-6)  # rounded to float32
    assert torch.allclose(features.std(0, correction=0), torch.ones(3, dtype=torch.float64), atol=1e-6)
    assert abs(all_of(splits.validation)["input"].mean().item()) > 1e-3


def test_a_test_file_is_treated_as_the_training_file_was(tmp_path):
    path = write(tmp_path, "csv", ROWS)
    (tmp_path / "apart").mkdir()
    apart = write(tmp_path / "apart", "csv", ROWS[5:6])
    splits = open_data(spec(path, target="kind", test_path=str(apart)), 0)
    assert torch.equal(all_of(splits.test)["input"], splits.train.fetch(np.array([5]), 0)["input"])
    assert splits.test.fetch(np.array([0]), 0)["target"].tolist() == [1]


def test_a_folder_of_files_is_one_table(tmp_path):
    for number in range(3):
        write(tmp_path, "csv", ROWS[number * 5 : number * 5 + 5]).rename(tmp_path / f"part{number}.csv")
    folder = DataSpec(
        source="csv", path=str(tmp_path), validation=0.0, options={"target": "kind", "standardise": False}
    )
    assert all_of(open_data(folder, 0).train)["input"][:, 0].tolist() == [i * 0.5 for i in range(15)]


def test_a_missing_value_is_refused_by_its_row_or_becomes_the_mean(tmp_path):
    path = write(tmp_path, "csv", [*ROWS[:4], {**ROWS[4], "width": None}, *ROWS[5:]])
    with pytest.raises(UserError, match=r"row 5 has no number in column 'width': mend it; or set missing = 'mean'"):
        open_data(spec(path, target="kind"), 0)
    filled = open_data(spec(path, target="kind", missing="mean", standardise=False), 0).train
    others = [row["width"] for i, row in enumerate(ROWS) if i != 4]
    assert filled.fetch(np.array([4]), 0)["input"][0, 0].item() == pytest.approx(sum(others) / 19)
    assert open_data(spec(path, target="kind", missing="mean"), 0).train.fetch(np.array([4]), 0)["input"][0, 0] == 0


def test_text_with_a_label_becomes_padded_tokens(tmp_path):
    rows = [{"review": "good", "label": 1}, {"review": "not good at all", "label": 0}]
    source = open_data(spec(write(tmp_path, "jsonl", rows), text="review", target="label", context=8), 0).train
    assert {key: source.facts[key] for key in ("vocab", "pad", "mask_token", "context", "classes")} == {
        "vocab": 260, "pad": 256, "mask_token": 259, "context": 8, "classes": 2,
    }  # fmt: skip
    batch = all_of(source)
    assert batch["tokens"].tolist()[0] == [257, *b"good", 258, 256, 256]
    assert batch["tokens"].tolist()[1] == [257, *b"not go", 258]
    assert batch["mask"].sum(1).tolist() == [6, 8]
    assert (batch["tokens"].dtype, batch["mask"].dtype) == (torch.int64, torch.bool)
    assert batch["target"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("x.csv", "a,b\n1,2\n3\n", {"target": "a"}, r"line 3: 1 values for 2 columns"),
        ("x.csv", "a,a\n1,2\n", {"target": "a"}, r"line 1: a column name occurs twice"),
        ("x.csv", 'a,b\n1,"2\n', {"target": "a"}, r"line 2: unexpected end of data"),
        ("x.csv", "a,b\n", {"target": "a"}, "holds no rows"),
        ("x.csv", "a,b\n1,2\n", {"target": "c"}, r"unknown column 'c' in .*x\.csv"),
        ("x.csv", "age,b\n1,2\n", {"target": "b", "features": ["agee"]}, "did you mean 'age'"),
        ("x.csv", "a,b\nx,2\n", {"target": "b", "features": ["a"]}, "column 'a' holds 'x', not numbers"),
        ("x.csv", "a,b\nx,2\n", {"target": "b"}, "no column of numbers beside 'b'"),
        ("x.csv", "a,b\n1,x\n2,\n", {"target": "b"}, "row 2 has no value in the target column 'b'"),
        ("x.csv", "a,b\n1,x\n", {"target": "b", "predict": "number"}, "column 'b' holds text"),
        ("x.csv", "a,b\n1,x\n", {"target": "b", "separator": ";;"}, "separator must be one character"),
        ("x.csv", "a,b\n1,x\n", {"target": "b", "predict": "numbr"}, "did you mean 'number'"),
        ("x.jsonl", '{"a": 1}\n{"a"\n', {"target": "a"}, r"line 2: not JSON"),
        ("x.jsonl", "[1]\n", {"target": "a"}, r"line 1: must be a JSON object"),
        ("x.jsonl", '{"a": 1}\n', {"target": "a", "text": "b"}, "unknown column 'b'"),
        ("x.jsonl", '{"a": 1, "b": "x"}\n{"a": 1}\n', {"target": "a", "text": "b"}, "row 2 has no text"),
        ("x.parquet", "PAR1 not really", {"target": "a"}, "is not a whole Parquet file"),
    ],
)
def test_a_bad_file_is_named_with_the_line_or_column(tmp_path, name, text, options, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        open_data(spec(path, **options), 0)
    assert "\n" not in str(caught.value)


def test_a_class_seen_only_in_the_test_file_is_named(tmp_path):
    path = write(tmp_path, "csv", ROWS)
    (tmp_path / "apart").mkdir()
    apart = write(tmp_path / "apart", "csv", [{**ROWS[0], "kind": "c"}])
    with pytest.raises(UserError, match=r"unknown class 'c' in row 1 of"):
        open_data(spec(path, target="kind", test_path=str(apart)), 0)


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path, "parquet", ROWS)
    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.split(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"reading Parquet needs pyarrow: pip install 'shoal\[parquet\]'"):
        open_data(spec(path, target="kind"), 0)
