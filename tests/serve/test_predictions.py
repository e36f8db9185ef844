"""What a server answers is what the model gives that was saved, run alone."""

import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors
from serve.conftest import WORDS, Asking
from serve.served_models import FAULT

import shoal
from shoal.errors import ShoalError, UserError
from shoal.models.bert import Bert, Head
from shoal.serve.api import Server
from shoal.serve.target import load

TEXTS = ["a b c", "who is red ?", "d", "what was blue . e f g h a b c d e f", "a " * 60, "green"]


def tokens_of(text: str) -> torch.Tensor:
    ids = [WORDS.index("[CLS]"), *(WORDS.index(word) for word in text.split()[:30]), WORDS.index("[SEP]")]
    return torch.tensor([ids])


@pytest.fixture(scope="module")
def classifier(folders: Callable[[Head], Path]) -> Iterator[Server]:
    with shoal.serve(folders("classification"), batch=4) as server:
        yield server


@pytest.fixture(scope="module")
def alone(folders: Callable[[Head], Path]) -> Bert:
    model = load(str(folders("classification"))).model
    assert isinstance(model, Bert)
    return model


def test_texts_get_the_classes_that_the_model_gives_each_alone(classifier: Server, alone: Bert) -> None:
    status, answer = Asking(classifier.url).post("/predict", {"text": TEXTS})
    assert status == 200
    for text, prediction in zip(TEXTS, answer["predictions"], strict=True):
        expected = alone(tokens_of(text)).softmax(-1)[0]
        got = torch.tensor(list(prediction["scores"].values()))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)  # float32: padding and company change sums
        assert prediction["label"] == f"LABEL_{int(expected.argmax())}"
        assert prediction["score"] == max(prediction["scores"].values())
    assert len({json.dumps(p) for p in answer["predictions"]}) == len(TEXTS), "the inputs matter"


def test_many_clients_at_once_each_get_their_own_answer(classifier: Server) -> None:
    asking = Asking(classifier.url)
    expected = {text: asking.post("/predict", {"text": text})[1]["predictions"][0] for text in TEXTS}

    def ask(i: int) -> None:
        text = TEXTS[i % len(TEXTS)]
        status, answer = asking.post("/predict", {"text": text})
        assert status == 200
        got = answer["predictions"][0]["scores"]
        assert got == pytest.approx(expected[text]["scores"], rel=1e-4)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(120)))
    assert asking.metric_reaches("shoal_rows_total", 120)
    assert asking.metric("shoal_batches_total") < asking.metric("shoal_rows_total"), "requests shared batches"


def test_the_client_in_process_gives_what_http_gives(classifier: Server) -> None:
    over_http = Asking(classifier.url).post("/predict", {"text": TEXTS[:2]})[1]["predictions"]
    in_process = classifier.predict(text=TEXTS[:2])
    for one, other in zip(over_http, in_process, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], rel=1e-5)
    with pytest.raises(UserError, match="'text'"):
        classifier.predict(txt="a")


def test_the_model_is_described_to_clients(classifier: Server) -> None:
    asking = Asking(classifier.url)
    (model,) = json.loads(asking.get("/v1/models")[1])["data"]
    assert (model["id"], model["task"], model["labels"]) == (
        "classification",
        "sequence-classification",
        ["LABEL_0", "LABEL_1", "LABEL_2"],
    )
    description = json.loads(asking.get("/openapi.json")[1])
    assert description["openapi"].startswith("3.1")
    body = description["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert asking.post("/predict", body["example"])[0] == 200
    assert asking.post("/predict", {"text": "a", "model": "another"})[0] == 404


def test_a_server_without_http_has_no_address(folders: Callable[[Head], Path]) -> None:
    with shoal.serve(folders("question-answering"), http=False) as server:
        assert server.url == ""
        context = "a b c d red e f g h blue"
        (answer,) = server.predict(question="who is red ?", context=context)
        assert answer["answer"] == context[answer["start"] : answer["end"]]
        long = " ".join(["a b c d red e f g h blue"] * 12)  # several windows of 32 tokens
        (answer,) = server.predict(question="who is red ?", context=long)
        assert answer["answer"] == long[answer["start"] : answer["end"]]


def test_tensors_travel_as_json_npy_and_safetensors(scripted: Asking) -> None:
    x = np.arange(22, dtype=np.float32).reshape(11, 2)  # more rows than a batch takes
    status, answer = scripted.post("/predict", {"input": x.tolist()})
    assert status == 200
    assert answer["predictions"] == [{"output": (3 * x).tolist()}]
    stream = io.BytesIO()
    np.save(stream, x)
    response, told = scripted.raw("POST", "/predict", stream.getvalue(), content_type="application/x-npy")
    assert response.status == 200
    assert np.array_equal(np.load(io.BytesIO(told), allow_pickle=False), 3 * x)
    response, told = scripted.raw(
        "POST", "/predict", save_safetensors({"input": x}), content_type="application/safetensors"
    )
    assert np.array_equal(load_safetensors(told)["output"], 3 * x)


def test_a_big_endian_or_column_major_file_means_what_it_says(scripted: Asking) -> None:
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    for other in (x.astype(">f4"), np.asfortranarray(x)):
        stream = io.BytesIO()
        np.save(stream, other)
        _, told = scripted.raw("POST", "/predict", stream.getvalue(), content_type="application/x-npy")
        assert np.array_equal(np.load(io.BytesIO(told), allow_pickle=False), 3 * x)


def test_an_input_that_the_model_fails_on_harms_no_other_in_its_batch(scripted: Asking) -> None:
    def ask(i: int) -> tuple[int, Any]:
        return scripted.post("/predict", {"input": [[FAULT if i % 5 == 0 else float(i), 1.0]]})

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(ask, range(40)))
    for i, (status, answer) in enumerate(answers):
        if i % 5 == 0:
            assert status == 500
            assert "a fault of the model" in answer["error"]["message"]
        else:
            assert answer["predictions"] == [{"output": [[3.0 * i, 3.0]]}]


def test_vectors_of_texts_come_as_openais_client_asks_for_them(folders: Callable[[Head], Path]) -> None:
    openai = pytest.importorskip("openai")
    with shoal.serve(folders("encoder"), name="small") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        answer = client.embeddings.create(model="small", input=TEXTS[:3])  # base64, as it asks by itself
        plain = client.embeddings.create(model="small", input=TEXTS[:3], encoding_format="float")
        encoder = load(str(folders("encoder"))).model
        for i, text in enumerate(TEXTS[:3]):
            states = encoder(tokens_of(text))[0]
            expected = states.mean(0).tolist()
            assert answer.data[i].embedding == pytest.approx(expected, rel=1e-4, abs=1e-5)
            assert plain.data[i].embedding == pytest.approx(answer.data[i].embedding, rel=1e-5)
        assert answer.usage.prompt_tokens == sum(len(t.split()) + 2 for t in TEXTS[:3])
        assert [model.id for model in client.models.list()] == ["small"] == [client.models.retrieve("small").id]
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="large", input="a")
        assert server.embed("a b")[0] == pytest.approx(
            client.embeddings.create(model="small", input="a b", encoding_format="float").data[0].embedding
        )


def test_a_target_that_cannot_be_served_says_so_in_one_line(tmp_path: Path, folders: Callable[[Head], Path]) -> None:
    with pytest.raises(UserError, match="no run in"), shoal.serve(tmp_path):
        pass
    with pytest.raises(UserError, match="does sequence-classification, not embeddings"):
        shoal.serve(folders("classification"), task="embeddings").__enter__()
    with pytest.raises(UserError, match="did you mean 'replicas'"):
        shoal.serve(tmp_path, replica=2)
    with pytest.raises(ShoalError, match="die as soon as they start"):
        shoal.serve("serve.served_models:dies_in_a_replica").__enter__()
