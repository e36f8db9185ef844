"""What the trainer relies on, held against every source that the registry knows."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import idx_bytes
from PIL import Image
from safetensors.numpy import save_file

from shoal.data.registry import SOURCES, open_data
from shoal.data.source import Source
from shoal.recipe.recipe import DataSpec

COUNT = 40


def made(kind: str, folder: Path) -> DataSpec:
    """A small data set of that kind with random changes switched on where there are some."""
    options: dict[str, object] = {}
    path = folder / f"samples.{kind}"
    rows = [{"width": i * 0.5, "height": 10.0 - i, "target": "ab"[i % 2]} for i in range(COUNT)]
    match kind:
        case "text":
            path.write_text("a line of text\n" * COUNT * 10)
            options = {"context": 16}
        case "idx":
            path = folder
            images = np.arange(COUNT * 16).astype(np.uint8).reshape(COUNT, 4, 4)
            (folder / "train-images-idx3-ubyte").write_bytes(idx_bytes(images))
            (folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes((np.arange(COUNT) % 3).astype(np.uint8)))
            options = {"flip": True, "crop": 1}
        case "images":
            path = folder
            for i in range(COUNT):
                (folder / "ab"[i % 2]).mkdir(exist_ok=True)
                Image.fromarray(np.full((6, 6, 3), 6 * i, np.uint8)).save(folder / "ab"[i % 2] / f"{i}.png")
            options = {"size": 6, "flip": True, "crop": 2}
        case "csv":
            path.write_text("width,height,target\n" + "".join("{width},{height},{target}\n".format(**r) for r in rows))
        case "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            options = {"text": "target", "context": 6}
        case "parquet":
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        case "squad":
            asked = [{"id": f"q{i}", "question": "Who?", "answers": []} for i in range(2)]
            paragraphs = [{"context": f"Fish number {i}. " * 8, "qas": asked} for i in range(COUNT)]
            path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
            options = {"context": 64, "stride": 16, "question": 8}
        case "arrays":
            path = folder / "samples.safetensors"
            save_file({"input": np.arange(COUNT * 3.0).reshape(COUNT, 3), "target": np.arange(COUNT) % 3}, path)
        case "python":
            options = {"factory": "data_samples:noisy_pairs", "arguments": {"count": COUNT}}
    return DataSpec(source=kind, path=str(path), validation=0.25, test=0.1, options=options)


@pytest.fixture(params=sorted(SOURCES))
def spec(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataSpec:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    return made(request.param, tmp_path / "data")


def parts(spec: DataSpec) -> list[Source]:
    splits = open_data(spec, 7)
    return [part for part in (splits.train, splits.validation, splits.test) if part is not None]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_sample_does_not_depend_on_the_batch_it_comes_in(spec):
    for source in parts(spec):
        ids = np.array([2, 0, 1]) % len(source)
        together = source.fetch(ids, 3)
        alone = [source.fetch(ids[i : i + 1], 3) for i in range(3)]
        assert same({name: torch.cat([one[name] for one in alone]) for name in alone[0]}, dict(together))
        assert all(len(tensor) == 3 for tensor in together.values())


def test_opening_again_gives_the_same_samples_facts_and_fingerprints(spec):
    for first, again in zip(parts(spec), parts(spec), strict=True):
        assert first.fingerprint == again.fingerprint
        assert len(first.fingerprint) == 64
        assert json.loads(json.dumps(first.facts)) == json.loads(json.dumps(again.facts))
        ids = np.arange(len(first))
        assert same(dict(first.fetch(ids, 1)), dict(again.fetch(ids, 1)))


def test_the_parts_have_fingerprints_of_their_own(spec):
    sources = parts(spec)
    assert len(sources) == 3
    assert len({source.fingerprint for source in sources}) == 3


def test_threads_may_fetch_at_once(spec):
    source = parts(spec)[0]
    batches = [np.arange(i, i + 5) % len(source) for i in range(12)]
    alone = [dict(source.fetch(ids, 0)) for ids in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda ids: dict(source.fetch(ids, 0)), batches))
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))


def test_a_batch_is_the_callers_own_to_change(spec):
    source = parts(spec)[0]
    ids = np.arange(2)
    before = {name: tensor.clone() for name, tensor in source.fetch(ids, 0).items()}
    for tensor in source.fetch(ids, 0).values():
        tensor.zero_()
    assert same(before, dict(source.fetch(ids, 0)))
