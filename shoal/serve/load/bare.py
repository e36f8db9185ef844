"""What the model gives when nobody serves it: the limit that a server is held against.

    python -m shoal.serve.load.bare TARGET DTYPE TASK THREADS [BODY_FILE]

A process with the allocator settings of model processes that does nothing but forward passes of ROWS copies of the
body's first sample, or, of a language model, generates for ROWS streams. "SECONDS ROWS" a line on stdin; samples (or
tokens) a second, the median of a pass and the processor time of one as JSON on stdout. TASK "-": inferred. It has
loaded the model when it writes its first line: the fields of an example, and its bytes of memory."""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoal.comm.freed_memory import keep_freed_memory
from shoal.errors import ShoalError, UserError
from shoal.serve.forward import open_forward
from shoal.serve.http.messages import HttpError
from shoal.serve.http.predict import read_json
from shoal.serve.intake.registry import open_intake
from shoal.serve.target import Loaded, load

Pass = Callable[[int], float]  # rows -> samples or tokens that it made


def proportional(pid: int) -> int:
    """Bytes of a process's memory; what n processes map counts one n-th. 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024


def open_pass(loaded: Loaded, body: Mapping[str, Any] | None) -> Pass:
    intake = open_intake(loaded.facts, 1)
    if intake is None:
        return _generation(loaded, body)
    first = intake.inputs(intake.read(intake.example if body is None else body)[0])[0]
    forward = open_forward(loaded.model, loaded.facts)
    one = {name: torch.from_numpy(np.array(each.numpy()))[:1] for name, each in first.arrays.items()}

    def run(rows: int) -> float:
        forward({name: tensor.expand(rows, *tensor.shape[1:]).contiguous() for name, tensor in one.items()})
        return rows

    return run


def _generation(loaded: Loaded, body: Mapping[str, Any] | None) -> Pass:
    """The same kernels in a tight loop: all streams begin and end together."""
    from shoal.data.tokenizer import from_description
    from shoal.serve.generation.api import run_all
    from shoal.serve.generation.bodies import CompletionBody, ask_of, prompts_of, read_body
    from shoal.serve.generation.opening import open_generator
    from shoal.serve.generation.options import Options

    if "tokenizer" not in loaded.facts:
        raise UserError(f"{loaded.facts['source']!r} has no tokeniser: its bare limit cannot be measured.")
    vocab, context = loaded.facts["vocab"], loaded.facts["context"]
    asked = read_body({**(body or {"prompt": "a", "max_tokens": 64, "temperature": 0}), "model": None}, CompletionBody)
    tokens = prompts_of(asked, from_description(loaded.facts["tokenizer"]), context)[0]
    ask = ask_of(asked, tokens, [], vocab, context)
    generator = open_generator(loaded.model, Options(threads=torch.get_num_threads()))

    def run(rows: int) -> float:
        made = run_all(generator, [ask] * rows)
        return sum(len(answer.tokens) for one in made for answer in one.answers)

    return run


def measure(run: Pass, seconds: float, rows: int) -> dict[str, float]:
    run(rows)
    spent: list[float] = []
    made = 0.0
    cpu, begun = time.process_time(), time.perf_counter()
    while not spent or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        made += run(rows)
        spent.append(time.perf_counter() - start)
    return {
        "rows": rows,
        "a_second": made / sum(spent),
        "p50_ms": 1e3 * statistics.median(spent),
        "cpu_ms": 1e3 * (time.process_time() - cpu) / made,  # of one sample or token
        "pss": proportional(os.getpid()),
    }


def main() -> None:
    target, dtype, task, threads, *file = sys.argv[1:]
    keep_freed_memory()
    torch.set_num_threads(int(threads))
    try:
        body = read_json(Path(file[0]).read_bytes()) if file else None
        run = open_pass(load(target, "" if task == "-" else task, dtype), body)
    except ShoalError as error:
        _refuse(str(error))
        return
    except HttpError as error:
        _refuse(f"the model cannot use this body: {error.why}.")
        return
    print(json.dumps({"pss": proportional(os.getpid())}), flush=True)
    for line in sys.stdin:
        seconds, rows = line.split()
        try:
            told = measure(run, float(seconds), int(rows))
        except Exception as error:  # a model's own code may raise anything
            _refuse(f"the model failed on this body: {type(error).__name__}: {' '.join(str(error).split())}.")
            return
        print(json.dumps(told), flush=True)


def _refuse(why: str) -> None:
    print(json.dumps({"why": why}), flush=True)


if __name__ == "__main__":
    main()
