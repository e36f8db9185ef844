"""/predict and /v1/embeddings: bodies to samples, samples to the model processes, outputs to answers."""

import asyncio
import base64
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from numpy.typing import NDArray

from shoal.serve.http.messages import Answered, HttpError, HttpRequest, HttpResponse, json_response
from shoal.serve.intake.task import Intake, rows_of
from shoal.serve.intake.tensors import (
    NPY,
    SAFETENSORS,
    joined,
    read_npy,
    read_safetensors,
    write_npy,
    write_safetensors,
)
from shoal.serve.payloads import Inputs, Outputs
from shoal.serve.waiting import Held

if TYPE_CHECKING:
    from shoal.serve.service import Service

AT_ONCE = 64  # samples of one HTTP request that are with the model processes at the same time
_outputs = msgspec.msgpack.Decoder(Outputs)
_json = msgspec.json.Decoder()
Build = Callable[[list[Outputs]], HttpResponse]
Read = tuple[list[Inputs], Build]


def read_json(body: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises HttpError 400 for all else: NaN, numbers too large, other bytes than UTF-8."""
    try:
        plain = _json.decode(body)
    except RecursionError:
        raise HttpError(400, "the body is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HttpError(400, f"the body is not JSON: {error}") from None
    if not isinstance(plain, dict):
        raise HttpError(400, "the body must be a JSON object")
    return plain


class _One:
    """A request of one sample and one pass, on its way: no task waits for it."""

    __slots__ = ("_build", "_to")

    def __init__(self, build: Build, to: Answered) -> None:
        self._build = build
        self._to = to

    def item(self, payload: msgspec.Raw) -> bool:
        return False

    def result(self, payload: msgspec.Raw) -> None:
        try:
            answer = self._build([_outputs.decode(payload)])
        except Exception as error:
            self._to.broke(error)
        else:
            self._to.answered(answer)

    def failed(self, error: HttpError) -> None:
        self._to.answered(error.response())


class _Route:
    """An address that takes JSON, and answers it with what the model makes of its samples."""

    def __init__(self, predict: "Predict", kind: Any) -> None:
        self._predict = predict
        self._service = predict.service
        self._kind = kind

    def begin(self, request: HttpRequest, held: Held, to: Answered) -> int | HttpResponse | Awaitable[HttpResponse]:
        """The number to withdraw it by, when ``to`` will be told; else the answer. Raises HttpError."""
        refusal = self._service.refusal(request.client, held)
        if refusal is not None:  # before the body is read: to refuse must cost next to nothing
            return refusal
        read = self._read(request)
        if not isinstance(read, tuple):
            return read
        inputs, build = read
        if len(inputs) > 1:
            return self._several(inputs, build, request)
        one = inputs[0]
        cost = one.rows * (one.length or 1)
        return self._service.submit(self._kind, one, _One(build, to), held, cost, request.client)

    async def __call__(self, service: "Service", request: HttpRequest) -> HttpResponse:
        read = self._read(request)
        return await (self._several(*read, request) if isinstance(read, tuple) else read)

    def _read(self, request: HttpRequest) -> Read | Awaitable[HttpResponse]:
        raise NotImplementedError

    async def _several(self, inputs: Sequence[Inputs], build: Build, request: HttpRequest) -> HttpResponse:
        return build(await self._predict.run(inputs, request, self._kind))


class _Predictions(_Route):
    def _read(self, request: HttpRequest) -> Read | Awaitable[HttpResponse]:
        media = request.media_type()
        if media in NPY:
            return self._npy(request)
        if media in SAFETENSORS:
            return self._safetensors(request)
        body = read_json(request.body)
        check_model(body, self._service)
        intake = self._predict.intake
        samples = intake.read(body)
        made = [intake.inputs(sample) for sample in samples]

        def build(outputs: list[Outputs]) -> HttpResponse:
            predictions = self._predict.predictions(samples, made, outputs)
            return json_response({"model": self._service.model.name, "predictions": predictions})

        return [one for inputs in made for one in inputs], build

    async def _npy(self, request: HttpRequest) -> HttpResponse:
        outputs = await self._bulk({"input": read_npy(request.body)}, request)
        return HttpResponse(200, write_npy(next(iter(outputs.values()))), NPY[0])

    async def _safetensors(self, request: HttpRequest) -> HttpResponse:
        outputs = await self._bulk(read_safetensors(request.body), request)
        return HttpResponse(200, write_safetensors(outputs), SAFETENSORS[0])

    async def _bulk(self, arrays: Mapping[str, NDArray[Any]], request: HttpRequest) -> dict[str, NDArray[Any]]:
        pieces = rows_of(arrays, self._service.options.batch)
        return joined(await self._predict.run(pieces, request, self._kind))


class _Embeddings(_Route):
    """As OpenAI's: {"input": text, texts, ids or lists of ids, "encoding_format": "float" | "base64"}."""

    def _read(self, request: HttpRequest) -> Read:
        body = read_json(request.body)
        check_model(body, self._service)
        form = "float" if body.get("encoding_format") is None else body["encoding_format"]
        if form not in ("float", "base64"):
            raise HttpError(400, "'encoding_format' must be 'float' or 'base64'", param="encoding_format")
        if "input" not in body:
            raise HttpError(400, "'input' is missing", param="input")
        if body.get("dimensions") is not None:
            raise HttpError(400, "this model's vectors have one size: leave 'dimensions' out", param="dimensions")
        intake = self._predict.intake
        inputs = [one for sample in intake.read({"input": body["input"]}) for one in intake.inputs(sample)]
        tokens = sum(one.length for one in inputs)

        def build(outputs: list[Outputs]) -> HttpResponse:
            data = []
            for index, output in enumerate(outputs):
                raw = output.arrays["vectors"].data
                vector: Any = base64.b64encode(raw).decode() if form == "base64" else memoryview(raw).cast("f").tolist()
                data.append({"object": "embedding", "index": index, "embedding": vector})
            usage = {"prompt_tokens": tokens, "total_tokens": tokens}
            return json_response({"object": "list", "data": data, "model": self._service.model.name, "usage": usage})

        return inputs, build


class Predict:
    """The routes of models that answer in one pass."""

    def __init__(self, service: "Service", intake: Intake) -> None:
        self.service = service
        self.intake = intake
        self.predict = _Predictions(self, "predict")
        self.embeddings = _Embeddings(self, "embed")

    async def answer(self, body: Mapping[str, Any], client: str = "") -> list[Any]:
        """What ``predict`` answers to a JSON body, for those who ask without HTTP."""
        request = HttpRequest("POST", "/predict", {}, b"", client)
        with self.service.hold():
            samples = self.intake.read(body)
            made = [self.intake.inputs(sample) for sample in samples]
            outputs = await self.run([one for inputs in made for one in inputs], request, "predict")
            return self.predictions(samples, made, outputs)

    def predictions(self, samples: Sequence[Any], made: Sequence[list[Inputs]], outputs: list[Outputs]) -> list[Any]:
        """The value that answers for each sample, ``made`` into one pass or several."""
        if len(samples) == 1:
            return [self.intake.prediction(samples[0], outputs)]
        left = iter(outputs)
        pairs = zip(samples, made, strict=True)
        return [self.intake.prediction(sample, [next(left) for _ in inputs]) for sample, inputs in pairs]

    async def run(self, inputs: Sequence[Inputs], request: HttpRequest, kind: Any) -> list[Outputs]:
        """All of them, in order; the first failure ends the rest."""
        if len(inputs) == 1:
            return [await self._one(inputs[0], request, kind)]
        room = asyncio.Semaphore(AT_ONCE)

        async def one(piece: Inputs) -> Outputs:
            async with room:
                return await self._one(piece, request, kind)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(piece)) for piece in inputs]
        except* HttpError as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _one(self, inputs: Inputs, request: HttpRequest, kind: Any) -> Outputs:
        cost = inputs.rows * (inputs.length or 1)
        return _outputs.decode(await self.service.ask(kind, inputs, cost=cost, client=request.client))


def check_model(body: Mapping[str, Any], service: "Service") -> None:
    """Raises HttpError 404 when the body names another model than the one that is served."""
    named = body.get("model")
    if named is not None and named != service.model.name:
        raise HttpError(404, f"no model of that name: this server has {service.model.name!r}", param="model")
