"""/predict and /v1/embeddings: bodies to samples, samples to the model processes, outputs to answers."""

import asyncio
import base64
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from numpy.typing import NDArray

from shoal.serve.http.messages import HttpError, HttpRequest, HttpResponse, json_response
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

if TYPE_CHECKING:
    from shoal.serve.service import Service

AT_ONCE = 64  # samples of one HTTP request that are with the model processes at the same time
_outputs = msgspec.msgpack.Decoder(Outputs)
_json = msgspec.json.Decoder()


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


class Predict:
    """The routes of models that answer in one pass."""

    def __init__(self, service: "Service", intake: Intake) -> None:
        self._service = service
        self._intake = intake

    async def predict(self, service: "Service", request: HttpRequest) -> HttpResponse:
        media = request.media_type()
        if media in NPY:
            outputs = await self._bulk({"input": read_npy(request.body)}, request)
            main = next(iter(outputs.values()))
            return HttpResponse(200, write_npy(main), NPY[0])
        if media in SAFETENSORS:
            outputs = await self._bulk(read_safetensors(request.body), request)
            return HttpResponse(200, write_safetensors(outputs), SAFETENSORS[0])
        body = read_json(request.body)
        check_model(body, service)
        samples = self._intake.read(body)
        predictions = await self._answers(samples, request, "predict")
        return json_response({"model": service.model.name, "predictions": predictions})

    async def embeddings(self, service: "Service", request: HttpRequest) -> HttpResponse:
        """As OpenAI's: {"input": text, texts, ids or lists of ids, "encoding_format": "float" | "base64"}."""
        body = read_json(request.body)
        check_model(body, service)
        form = "float" if body.get("encoding_format") is None else body["encoding_format"]
        if form not in ("float", "base64"):
            raise HttpError(400, "'encoding_format' must be 'float' or 'base64'", param="encoding_format")
        if "input" not in body:
            raise HttpError(400, "'input' is missing", param="input")
        if body.get("dimensions") is not None:
            raise HttpError(400, "this model's vectors have one size: leave 'dimensions' out", param="dimensions")
        samples = self._intake.read({"input": body["input"]})
        made = [self._intake.inputs(sample) for sample in samples]
        tokens = sum(one.length for inputs in made for one in inputs)
        outputs = await self._run([one for inputs in made for one in inputs], request, "embed")
        data = []
        for index, output in enumerate(outputs):
            raw = output.arrays["vectors"].data
            vector: Any = base64.b64encode(raw).decode() if form == "base64" else memoryview(raw).cast("f").tolist()
            data.append({"object": "embedding", "index": index, "embedding": vector})
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return json_response({"object": "list", "data": data, "model": service.model.name, "usage": usage})

    async def answer(self, body: Mapping[str, Any], client: str = "") -> list[Any]:
        """What ``predict`` answers to a JSON body, for those who ask without HTTP."""
        request = HttpRequest("POST", "/predict", {}, b"", client)
        with self._service.hold():
            return await self._answers(self._intake.read(body), request, "predict")

    async def _answers(self, samples: Sequence[Any], request: HttpRequest, kind: Any) -> list[Any]:
        made = [self._intake.inputs(sample) for sample in samples]
        outputs = iter(await self._run([one for inputs in made for one in inputs], request, kind))
        return [
            self._intake.prediction(sample, [next(outputs) for _ in inputs])
            for sample, inputs in zip(samples, made, strict=True)
        ]

    async def _bulk(self, arrays: Mapping[str, NDArray[Any]], request: HttpRequest) -> dict[str, NDArray[Any]]:
        return joined(await self._run(rows_of(arrays, self._service.options.batch), request, "predict"))

    async def _run(self, inputs: Sequence[Inputs], request: HttpRequest, kind: Any) -> list[Outputs]:
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
        return _outputs.decode(await self._service.ask(kind, inputs, cost=cost, client=request.client))


def check_model(body: Mapping[str, Any], service: "Service") -> None:
    """Raises HttpError 404 when the body names another model than the one that is served."""
    named = body.get("model")
    if named is not None and named != service.model.name:
        raise HttpError(404, f"no model of that name: this server has {service.model.name!r}", param="model")
