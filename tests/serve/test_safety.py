"""Whatever is sent, by whomever: one line and a 4xx, and the server goes on."""

import io
import json
import shutil
import socket
import ssl
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve.conftest import Asking, Served

import shoal
from shoal.cli.main import main
from shoal.models.bert import Head
from shoal.serve.frames import FrameError, from_engines, from_http_side
from shoal.serve.http import connection as one_connection

KEY = "a-key-of-the-tests"
PAGE = "https://app.example"


@pytest.fixture(scope="module")
def classifier(folders: Callable[[Head], Path]) -> Iterator[Asking]:
    with shoal.serve(folders("classification")) as server:
        yield Asking(server.url)


def npy(values: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values, **options)
    return stream.getvalue()


def one_line(told: bytes) -> str:
    message = json.loads(told)["error"]["message"]
    assert "\n" not in message
    assert len(message) < 400
    return str(message)


BROKEN_JSON: dict[str, bytes] = {
    "not JSON": b"{",
    "empty": b"",
    "NaN": b'{"input": [[NaN, 1]]}',
    "infinity": b'{"input": [[1e999, 1]]}',
    "too large for float32": b'{"input": [[1e300, 1]]}',
    "not UTF-8": b'{"input": "\xff\xfe"}',
    "a lone surrogate": b'{"input": "\\ud800"}',
    "deep": b'{"input": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
    "nested deeper than an array can be": b'{"input": ' + b"[" * 100 + b"1" + b"]" * 100 + b"}",
    "ragged": b'{"input": [[1, 2], [3]]}',
    "text for numbers": b'{"input": [["a", "b"]]}',
    "null": b'{"input": [[null, 1]]}',
    "no samples": b'{"input": []}',
    "a number": b"3",
    "a list": b"[]",
    "no field": b"{}",
    "two fields": b'{"input": [[1, 2]], "inputs": {"input": [[1, 2]]}}',
    "inputs that are a list": b'{"inputs": [1]}',
    "many names": json.dumps({"inputs": {str(i): [[1.0, 2.0]] for i in range(40)}}).encode(),
}


@pytest.mark.parametrize("name", BROKEN_JSON)
def test_a_body_that_cannot_be_used_gets_4xx_and_one_line(scripted: Asking, name: str) -> None:
    answer, told = scripted.raw("POST", "/predict", BROKEN_JSON[name])
    assert answer.status in (400, 413), told
    one_line(told)


BROKEN_ARRAYS: dict[str, tuple[str, bytes]] = {
    "a pickle": ("application/x-npy", npy(np.array([{}], object), allow_pickle=True)),
    "cut short": ("application/x-npy", npy(np.ones((4, 2), np.float32))[:-3]),
    "NaN": ("application/x-npy", npy(np.array([[np.nan, 1]], np.float32))),
    "a huge shape": (
        "application/x-npy",
        npy(np.ones((4, 2), np.float32)).replace(b"(4, 2), }      ", b"(10000000, 2), }"),
    ),
    "no array": ("application/x-npy", b"\x93NUMPY"),
    "code in the header": ("application/x-npy", npy(np.ones(2)).replace(b"'shape': (2,)", b"'shape': exit")),
    "records": ("application/x-npy", npy(np.zeros(2, [("a", "f4"), ("b", "f4")]))),
    "complex": ("application/x-npy", npy(np.zeros((2, 2), np.complex64))),
    "safetensors header too long": ("application/safetensors", struct.pack("<Q", 1 << 60) + b"{}"),
    "safetensors beyond its end": (
        "application/safetensors",
        struct.pack("<Q", 60) + b'{"input":{"dtype":"F32","shape":[9,2],"data_offsets":[0,72]}}'.ljust(60)[:60],
    ),
}


@pytest.mark.parametrize("name", BROKEN_ARRAYS)
def test_an_array_file_that_cannot_be_used_gets_4xx_and_nothing_is_unpickled(scripted: Asking, name: str) -> None:
    media, body = BROKEN_ARRAYS[name]
    answer, told = scripted.raw("POST", "/predict", body, content_type=media)
    assert answer.status == 400, told
    one_line(told)


@pytest.mark.parametrize(
    "body",
    [
        {"text": 3},
        {"text": []},
        {"text": [1]},
        {"txt": "a"},
        {"text": ["a"] * 2000},
        {"text": None},
        {"text": {"a": 1}},
    ],
)
def test_texts_that_are_none_get_4xx(classifier: Asking, body: dict[str, Any]) -> None:
    status, told = classifier.post("/predict", body)
    assert status in (400, 413)
    assert "\n" not in told["error"]["message"]


def test_odd_texts_are_texts(classifier: Asking) -> None:
    for text in ("", " ", "\0", "\u202e" * 50, "a" * 50_000, "🐟" * 500, "\n\n"):
        assert classifier.post("/predict", {"text": text})[0] == 200, repr(text[:9])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400))
def test_no_bytes_at_all_bring_down_a_connection_but_their_own(scripted: Asking, data: bytes) -> None:
    with socket.create_connection((scripted.host, int(scripted.port)), timeout=10) as raw:
        raw.sendall(data)
        raw.shutdown(socket.SHUT_WR)
        answer = raw.makefile("rb").read()
    assert not answer or answer.startswith(b"HTTP/1.1 4")
    assert scripted.get("/health/ready")[0] == 200


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
        max_leaves=12,
    )
)
def test_no_json_value_is_answered_with_a_fault_of_the_server(scripted: Asking, value: Any) -> None:
    answer, told = scripted.raw("POST", "/predict", json.dumps({"input": value}).encode())
    assert answer.status in (200, 400, 413, 500), told
    if answer.status == 500:
        assert "the model failed on this input" in one_line(told)  # a shape that the model does not take


def test_a_body_that_is_too_large_is_refused_before_it_is_read(scripted: Asking) -> None:
    with socket.create_connection((scripted.host, int(scripted.port)), timeout=10) as raw:
        raw.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000000\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 413")
    with socket.create_connection((scripted.host, int(scripted.port)), timeout=10) as raw:
        raw.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(4):
            raw.sendall(b"8000\r\n" + b"x" * 0x8000 + b"\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 413")


def test_a_head_that_is_too_long_is_refused(scripted: Asking) -> None:
    with socket.create_connection((scripted.host, int(scripted.port)), timeout=10) as raw:
        raw.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 40_000 + b"\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 431")


def test_addresses_and_methods_that_are_not_there(scripted: Asking) -> None:
    assert scripted.get("/nothing")[0] == 404
    answer, _ = scripted.raw("DELETE", "/predict")
    assert (answer.status, answer.headers["Allow"]) == (405, "POST")
    answer, told = scripted.raw("HEAD", "/health/live")
    assert (answer.status, told) == (200, b"")


def test_requests_sent_ahead_are_answered_in_order(scripted: Asking) -> None:
    with socket.create_connection((scripted.host, int(scripted.port)), timeout=10) as raw:
        for i in range(30):
            body = json.dumps({"input": [[float(i), 0.0]]}).encode()
            head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            raw.sendall(head.encode() + (b"Connection: close\r\n" if i == 29 else b"") + b"\r\n" + body)
        told = raw.makefile("rb").read()
    bodies = [json.loads(part.partition(b"HTTP/")[0]) for part in told.split(b"\r\n\r\n")[1:]]
    assert [body["predictions"][0]["output"][0][0] for body in bodies] == [3.0 * i for i in range(30)]


def test_pages_of_other_origins_and_names_may_not_ask(scripted: Asking) -> None:
    body = json.dumps({"input": [[1.0, 1.0]]}).encode()
    for headers in ({"origin": "http://evil.example"}, {"host": "evil.example"}):
        answer, _ = scripted.raw("POST", "/predict", body, **headers)
        assert answer.status == 403
    answer, _ = scripted.raw("POST", "/predict", body, origin=scripted.url)
    assert answer.status == 200


@pytest.fixture(scope="module")
def in_this_process() -> Iterator[Asking]:
    with shoal.serve("serve.served_models:scripted", allow_origin=PAGE) as server:
        yield Asking(server.url)


def test_who_does_not_read_the_answers_is_let_go_and_holds_nobody_up(
    in_this_process: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_connection, "UNREAD_S", 0.2)
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((in_this_process.host, int(in_this_process.port)))
        deaf.settimeout(10)
        with pytest.raises(ConnectionError):  # noqa: PT012
            while True:  # it reads until its answers are not read; then this waits, until it closes
                deaf.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50)
                assert in_this_process.get("/health/live")[0] == 200


def test_pages_of_an_origin_that_is_allowed_may_ask_and_no_others(in_this_process: Asking) -> None:
    body = json.dumps({"input": [[1.0, 1.0]]}).encode()
    before, _ = in_this_process.raw("OPTIONS", "/predict", origin=PAGE)
    answer, _ = in_this_process.raw("POST", "/predict", body, origin=PAGE)
    assert (before.status, answer.status) == (204, 200)
    assert {one.headers["Access-Control-Allow-Origin"] for one in (before, answer)} == {PAGE}
    assert in_this_process.raw("POST", "/predict", body, origin="https://other.example")[0].status == 403


def test_half_a_request_holds_no_worker_and_is_closed(served: Callable[..., Served]) -> None:
    server = served("serve.served_models:scripted", "--read-timeout-s", "1", "--connections", "40")
    slow = [socket.create_connection((server.host, int(server.port)), timeout=10) for _ in range(30)]
    for connection in slow:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
    assert server.post("/predict", {"input": [[1.0, 1.0]]})[0] == 200, "thirty slow clients are in nobody's way"
    for connection in slow:
        assert connection.recv(100).startswith(b"HTTP/1.1 408")
        connection.close()
    many = [socket.create_connection((server.host, int(server.port)), timeout=10) for _ in range(45)]
    assert many[-1].recv(100).startswith(b"HTTP/1.1 503")
    for connection in many:
        connection.close()


def test_without_the_key_nothing_is_told_but_that_it_lives(served: Callable[..., Served], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"# of the tests\n{KEY}\nanother-key-of-them\n")
    server = served("serve.served_models:scripted", "--api-keys", keys, "--host", "0.0.0.0")
    body = {"input": [[1.0, 1.0]]}
    for path in ("/metrics", "/v1/models", "/openapi.json"):
        assert server.get(path)[0] == 401
        assert server.get(path, authorization=f"Bearer {KEY}")[0] == 200
    for headers in ({}, {"authorization": "Bearer wrong-key-here"}, {"authorization": KEY}, {"x_api_key": KEY[:-1]}):
        assert server.post("/predict", body, **headers)[0] == 401
    for headers in ({"authorization": f"Bearer {KEY}"}, {"x_api_key": "another-key-of-them"}):
        assert server.post("/predict", body, **headers)[0] == 200
    for path in ("/health/live", "/health/ready"):
        assert server.get(path)[0] == 200
    assert KEY not in server.get("/metrics", authorization=f"Bearer {KEY}")[1].decode()
    code, errors = server.end()
    assert (code, errors) == (0, ""), "neither keys nor inputs are logged"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "name a file with API keys"),
        (["--api-keys", "/nowhere"], "cannot read"),
        (["--batch", "0"], "batch must be greater than 0"),
        (["--dtype", "float8"], "dtype must be one of auto, float32"),
        (["--task", "embedings"], "did you mean 'embeddings'"),
        (["--tls-cert", "x"], "give both"),
        (["--prot", "1"], "did you mean '--port'"),
    ],
)
def test_a_bad_option_ends_with_one_line_before_anything_is_spent(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.serve.replicas.Replicas.start", lambda self: pytest.fail("a process is started"))
    assert main(["serve", str(tmp_path), *arguments]) == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.count("\n") == 1


def test_a_missing_extra_is_one_line_that_names_it() -> None:
    program = (
        "import sys; sys.modules['httptools'] = None\n"
        "from shoal.cli.main import main; raise SystemExit(main(['serve', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'shoal[serve]'" in done.stderr


def test_a_port_that_is_taken_is_one_line(classifier: Asking, folders: Callable[[Head], Path]) -> None:
    with pytest.raises(shoal.UserError, match="choose another --port"):
        shoal.serve(folders("classification"), port=int(classifier.port)).__enter__()


@given(st.binary(max_size=200), st.integers(1, 50))
def test_a_frame_of_any_bytes_is_refused_or_waits_and_never_runs_code(data: bytes, step: int) -> None:
    for reader in (from_http_side(), from_engines()):
        try:
            for at in range(0, len(data), step):
                assert isinstance(reader.feed(data[at : at + step]), list)
        except FrameError:
            continue


def test_with_a_certificate_it_speaks_https_and_nothing_else(served: Callable[..., Served], tmp_path: Path) -> None:
    openssl = shutil.which("openssl") or pytest.skip("no openssl on the PATH, which makes the certificate of the test")
    files = ["-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem"), "-days", "2"]
    new = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", *files, "-subj", "/CN=localhost"]
    subprocess.run([*new, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    files = ["--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem")]
    server = served("serve.served_models:scripted", *files, "--read-timeout-s", "1")
    silent = socket.create_connection((server.host, int(server.port)), timeout=20)
    assert server.told["url"].startswith("https://")
    trusted = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
    connection = HTTPSConnection(server.host, int(server.port), timeout=30, context=trusted)
    connection.request("POST", "/predict", json.dumps({"input": [[2.0, 0.0]]}))
    assert json.loads(connection.getresponse().read())["predictions"] == [{"output": [[6.0, 0.0]]}]
    connection.close()
    with pytest.raises((HTTPException, OSError)):
        server.get("/health/live")
    assert silent.recv(1) == b"", "who never begins to speak TLS is let go"
    silent.close()
