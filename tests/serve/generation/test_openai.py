"""OpenAI's own client against the two endpoints."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.request import urlopen

import pytest
from serve.generation.tiny_gpt import save_gpt

import shoal
from shoal.errors import UserError
from shoal.serve.api import Server

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_gpt(tmp_path_factory.mktemp("served") / "tiny", context=512)


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Server]:
    with shoal.serve(str(folder), name="tiny") as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none asked for", max_retries=0) as made:
        yield made


def text_of(chunks):
    return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)


def metric(server, name):
    lines = urlopen(f"{server.url}/metrics").read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.split("{")[0].split(" ")[0] == f"shoal_{name}")


def test_a_stream_is_the_whole_answer_in_pieces_with_its_usage_at_the_end(client):
    asked = {
        "model": "tiny",
        "prompt": "hello world",
        "max_tokens": 24,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert text_of(chunks) == whole.choices[0].text != ""
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 24
    assert len(chunks) > 4, "it came in pieces"
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_a_seed_gives_the_same_answers_again_alone_or_in_company(client):
    def ask(seed):
        made = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hello"}],
            n=2,
            seed=seed,
            max_tokens=20,
            temperature=0.9,
        )
        return [choice.message.content for choice in made.choices]

    alone = [ask(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == alone
    assert len({text for texts in alone for text in texts}) == 16


def test_the_answer_ends_before_a_stop_string_and_the_rest_is_not_computed(client, server):
    asked = {"model": "tiny", "prompt": "hello", "temperature": 0, "extra_body": {"ignore_eos": True}}
    free = client.completions.create(**asked, max_tokens=60).choices[0].text
    stop = free[10:13]
    made = client.completions.create(**asked, max_tokens=400, stop=[stop, "never there"])
    assert made.choices[0].text == free[: free.find(stop)]
    assert made.choices[0].finish_reason == "stop"
    assert made.usage.completion_tokens < 60
    assert stop not in text_of(client.completions.create(**asked, max_tokens=60, stop=stop, stream=True))


def test_a_text_ends_before_a_stop_string_wherever_tokens_and_characters_are_cut(client):
    """Tokens are bytes and pairs of them here: characters of several bytes come in parts."""
    asked = {"model": "tiny", "prompt": "world", "max_tokens": 40, "extra_body": {"ignore_eos": True}}
    tried = 0
    for seed in range(4):
        full = client.completions.create(**asked, seed=seed).choices[0].text
        wide = [at for at, character in enumerate(full) if ord(character) > 127]
        for at in [0, len(full) - 1, *wide[:2]]:
            for stop in (full[at], full[max(0, at - 2) : at + 1], [full[at : at + 3], "never said"]):
                words = [stop] if isinstance(stop, str) else stop
                ends = min(found for word in words if (found := full.find(word)) >= 0)
                whole = client.completions.create(**asked, seed=seed, stop=stop).choices[0]
                assert (whole.text, whole.finish_reason) == (full[:ends], "stop")
                *_, last = chunks = list(client.completions.create(**asked, seed=seed, stop=stop, stream=True))
                assert (text_of(chunks), last.choices[0].finish_reason) == (whole.text, "stop")
                tried += bool(wide)
    assert tried > 20


def test_a_token_that_is_a_part_of_a_character_is_told_by_its_bytes(client):
    asked = {"model": "tiny", "max_tokens": 60, "temperature": 1.5, "seed": 1, "extra_body": {"ignore_eos": True}}
    said = client.chat.completions.create(
        **asked, messages=[{"role": "user", "content": "a"}], logprobs=True, top_logprobs=3
    ).choices[0]
    raw = b"".join(bytes(each.bytes) for each in said.logprobs.content)
    assert raw.decode(errors="replace") == said.message.content
    assert b"\xef\xbf\xbd" not in raw, "the mark in its place is nobody's token"
    scores = client.completions.create(**asked, prompt="a", logprobs=5).choices[0].logprobs
    assert any(token.startswith("bytes:\\x") for token in scores.tokens)
    assert all(len(each) == 5 or "" in each for each in scores.top_logprobs), "names differ"


def test_log_probabilities_come_in_the_shape_of_both_endpoints(client):
    one = client.completions.create(model="tiny", prompt="hello", max_tokens=5, temperature=0, logprobs=3)
    told = one.choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == 5
    assert all(
        max(top.values()) == logprob for top, logprob in zip(told.top_logprobs, told.token_logprobs, strict=True)
    )
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=4, logprobs=True, top_logprobs=2, seed=1
    )
    content = chat.choices[0].logprobs.content
    assert [len(each.top_logprobs) for each in content] == [2] * len(content)
    assert all(each.logprob <= 0 for each in content)


def test_several_prompts_are_answered_in_order_as_text_or_tokens_with_echo(client):
    asked = {"model": "tiny", "max_tokens": 6, "temperature": 0}
    texts = ["hello", "one after the other", "words"]
    alone = [client.completions.create(prompt=text, **asked).choices[0].text for text in texts]
    together = client.completions.create(prompt=texts, **asked)
    assert [choice.text for choice in together.choices] == alone
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    echoed = client.completions.create(prompt=texts[:2], echo=True, **asked)
    assert [choice.text for choice in echoed.choices] == [texts[0] + alone[0], texts[1] + alone[1]]
    chunks = list(client.completions.create(prompt=texts, stream=True, **asked))
    by_index = ["".join(c.choices[0].text for c in chunks if c.choices[0].index == i) for i in range(3)]
    assert by_index == alone


def test_penalties_and_bias_change_what_comes(client):
    asked = {
        "model": "tiny",
        "prompt": [5, 6, 7],
        "max_tokens": 30,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    plain = client.completions.create(**asked).choices[0].text
    assert client.completions.create(**asked, frequency_penalty=2.0, presence_penalty=2.0).choices[0].text != plain
    biased = client.completions.create(**asked, logit_bias={"70": 100}).choices[0]
    assert len(set(biased.text)) == 1


def test_beam_search_gives_its_best_answers(client):
    made = client.completions.create(
        model="tiny", prompt="hello", max_tokens=8, n=2, extra_body={"num_beams": 4, "ignore_eos": True}
    )
    assert len(made.choices) == 2
    assert made.choices[0].text != made.choices[1].text


def test_a_prompt_that_was_asked_before_is_told_as_cached(client):
    prompt = "this is a stream of words, one after the other, hello world " * 4
    ask = {"model": "tiny", "prompt": prompt, "max_tokens": 2}
    client.completions.create(**ask)
    usage = client.completions.create(**ask).usage
    assert usage.prompt_tokens_details.cached_tokens >= 16
    assert usage.prompt_tokens > usage.prompt_tokens_details.cached_tokens


@pytest.mark.parametrize(
    ("wrong", "status", "why"),
    [
        ({"max_tokens": 5000}, 400, "do not fit the context of 512"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"extra_body": {"max_token": 4}}, 400, "did you mean 'max_tokens'?"),
        ({"prompt": ""}, 400, "empty"),
        ({"prompt": []}, 400, "prompts"),
        ({"prompt": ["a", 5]}, 400, "mixed"),
        ({"prompt": [100_000]}, 400, "ids are 0 to"),
        ({"prompt": "x" * 100_000}, 400, "does not fit"),
        ({"model": "another"}, 404, "no model of that name"),
        ({"n": 1000}, 400, "n"),
        ({"stop": [""]}, 400, "stop string"),
        ({"logit_bias": {"x": 1}}, 400, "token numbers"),
        ({"suffix": "end"}, 400, "suffix"),
        ({"echo": True, "logprobs": 1}, 400, "echo"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line_before_a_stream_begins(client, wrong, status, why):
    with pytest.raises(openai.APIStatusError) as refused:
        client.completions.create(**{"model": "tiny", "prompt": "hello", "stream": True, **wrong})
    assert refused.value.status_code == status
    assert why in refused.value.body["message"]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "robot", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
    ],
)
def test_messages_that_are_none_are_refused(client, messages):
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages=messages)


def test_a_client_that_leaves_frees_its_memory(client, server):
    stream = client.completions.create(
        model="tiny", prompt="hello", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    before = metric(server, "cancelled_total")
    stream.close()
    ended = client.completions.create(model="tiny", prompt="hello", max_tokens=1)
    assert ended.choices
    for _ in range(200):  # the server learns of it when it reads its socket
        if metric(server, "cancelled_total") > before:
            break
    assert metric(server, "cancelled_total") == before + 1
    assert metric(server, "requests_open") == 0


def test_the_description_of_the_endpoints_stands_alone(server):
    described = json.loads(urlopen(f"{server.url}/openapi.json").read())
    schema = described["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"prompt", "max_tokens", "top_k"} <= set(schema["properties"])
    assert "$ref" not in json.dumps(schema)


def test_the_http_side_needs_no_torch():
    program = "import sys, shoal.serve.generation.routes; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.slow
def test_a_stream_goes_on_with_the_same_tokens_when_its_process_is_killed(served, folder):
    server = served(folder, "--replicas", "2", "--name", "tiny")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none asked for", max_retries=0) as client:
        ask = {"model": "tiny", "prompt": "hello", "max_tokens": 400, "seed": 5, "extra_body": {"ignore_eos": True}}
        expected = client.completions.create(**ask).choices[0].text
        assert server.processes_become(3)
        left = server.replicas()  # one of these two works on it at first
        text = ""
        for chunk in client.completions.create(**ask, stream=True):
            text += chunk.choices[0].text
            if left and len(text) >= len(expected) * (2 - len(left)) / 2:
                os.kill(left.pop(), signal.SIGKILL)
        assert text == expected
        assert not left
        assert server.metric_reaches("shoal_replicas_lost_total", 2)


def test_half_a_request_and_a_broken_connection_disturb_nobody(client, server):
    host, port = server.url.rpartition("/")[2].split(":")
    left = threading.Barrier(9)

    def leave() -> None:
        with socket.create_connection((host, int(port))) as wire:
            body = json.dumps({"prompt": "hello", "max_tokens": 300, "stream": True}).encode()
            wire.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            assert b" 200 " in wire.recv(100)
        left.wait(30)

    threads = [threading.Thread(target=leave) for _ in range(8)]
    for thread in threads:
        thread.start()
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 40, "temperature": 0}
    texts = {client.completions.create(**asked).choices[0].text for _ in range(3)}
    left.wait(30)
    for thread in threads:
        thread.join()
    assert len(texts) == 1


def test_a_time_for_whole_answers_is_refused_where_clients_say_how_long_those_are(folder):
    with (
        pytest.raises(UserError, match="--within-ms bounds the time of a whole answer"),
        shoal.serve(str(folder), within_ms=100, http=False),
    ):
        raise AssertionError("it serves")
