"""Shoal beside other servers of the same classifier, and all of them beside its bare forward pass, in turns in one run.

    python bench/serving_peers.py [--rounds 5] [--seconds 2] [--dtypes float32,bfloat16] [--peers litserve,ray]
    python bench/serving_peers.py --python PYTHON [--quick]     (of an environment that has the peers, and torch)

The model, the request and the control are those of bench/serve.py: 64 clients, batches of up to 32, one model core. A
peer runs the same model, tokeniser and forward pass in the way that its documentation shows, waits 5 ms for a batch,
and has JSON in and out. One that is not installed is named in one line, and the run goes on without it.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

try:
    from litserve import LitAPI  # its workers find the class by the name of its module
except ImportError:
    LitAPI = object

RESULTS = Path(__file__).parent / "results" / "serving_peers.json"
WAIT_S = 0.005  # that a peer's batch waits for company
PEERS = ("litserve", "ray")


class Model:
    """Texts to scores, as every peer calls it."""

    def __init__(self, folder: str, dtype: str) -> None:
        import torch

        from shoal.comm.freed_memory import keep_freed_memory
        from shoal.serve.forward import open_forward
        from shoal.serve.intake.registry import open_intake
        from shoal.serve.target import load

        keep_freed_memory()
        torch.set_num_threads(1)
        loaded = load(folder, dtype=dtype)
        self.intake, self.forward = open_intake(loaded.facts, 32), open_forward(loaded.model, loaded.facts)

    def __call__(self, texts: list[str]) -> list[dict]:
        import numpy as np
        import torch

        tokens = [self.intake.inputs(text)[0].arrays["tokens"].numpy() for text in texts]  # of one length, here
        scores = self.forward({"tokens": torch.from_numpy(np.concatenate(tokens))})["scores"].tolist()
        return [{"scores": row} for row in scores]


class LitClassifier(LitAPI):
    folder, dtype = "", ""

    def setup(self, device: str) -> None:
        self.model = Model(self.folder, self.dtype)

    def decode_request(self, request: dict) -> str:
        return request["text"]

    def batch(self, inputs: list[str]) -> list[str]:
        return inputs

    def predict(self, texts: list[str]) -> list[dict]:
        return self.model(texts)

    def unbatch(self, output: list[dict]) -> list[dict]:
        return output

    def encode_response(self, output: dict) -> dict:
        return output


def litserve_peer(folder: str, dtype: str, port: int) -> None:
    import litserve

    api = LitClassifier(max_batch_size=32, batch_timeout=WAIT_S)
    api.folder, api.dtype = folder, dtype
    server = litserve.LitServer(api, accelerator="cpu")
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="error")


def ray_peer(folder: str, dtype: str, port: int) -> None:
    import ray
    from ray import serve

    @serve.deployment(max_ongoing_requests=256, ray_actor_options={"num_cpus": 1})
    class Classifier:
        def __init__(self) -> None:
            self.model = Model(folder, dtype)

        @serve.batch(max_batch_size=32, batch_wait_timeout_s=WAIT_S)
        async def predict(self, texts: list[str]) -> list[dict]:
            return self.model(texts)

        async def __call__(self, request) -> dict:
            return await self.predict((await request.json())["text"])

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=os.environ["PEER_TMP"])
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Classifier.bind(), route_prefix="/predict")
    try:
        while True:
            time.sleep(3600)
    finally:
        ray.shutdown()


class Peer:
    """A peer's process and all below it; what it serves is asked as Shoal is."""

    def __init__(self, python: str, name: str, folder: Path, dtype: str, port: int, log: Path) -> None:
        from process_trees import below

        command = [python, __file__, "--be", name, str(folder), dtype, str(port)]
        root = str(Path(__file__).parents[1])
        env = {**os.environ, "PYTHONPATH": root, "PEER_TMP": str(log.parent / name), "RAY_DISABLE_IMPORT_WARNING": "1"}
        self.port = port
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=env, start_new_session=True)
        begun = time.perf_counter()
        while not self._answers():
            if self.process.poll() is not None or time.perf_counter() - begun > 120:
                self.close()
                raise RuntimeError(f"{name} did not start: {log.read_text()[-1500:]}")
            time.sleep(0.2)
        self.start_s = time.perf_counter() - begun
        self.pids = [self.process.pid, *below(self.process.pid)]

    def _answers(self) -> bool:
        body = json.dumps({"text": "a"}).encode()
        asked = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/predict", body, {"Content-Type": "application/json"}
        )
        try:
            return urllib.request.urlopen(asked, timeout=10).status == 200
        except OSError:
            return False

    def close(self) -> None:
        from process_trees import below

        pids = below(self.process.pid)
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pid in pids:
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                continue


def measure(dtype: str, folder: Path, cwd: Path, args: argparse.Namespace, there: list[str]) -> dict:
    from serve import BATCH, Control, Server
    from turns import turns

    body = folder / "body.json"
    with ExitStack() as stack:
        control = Control(folder, dtype)
        stack.callback(control.close)
        ours = Server([str(folder), "--dtype", dtype], cwd)
        stack.callback(ours.close)
        arms: dict[str, object] = {"shoal": ours}
        for number, name in enumerate(there):
            arms[name] = peer = Peer(args.python, name, folder, dtype, 18431 + number, cwd / f"{name}-{dtype}.log")
            stack.callback(peer.close)
        shares: dict[str, list[dict]] = {name: [] for name in arms}
        for name in turns(list(arms), args.rounds):
            bare = control.run(args.seconds, BATCH)
            told = load(arms[name], body, args.seconds)
            share, over = told["ok_a_second"] / bare["a_second"], told["cpu_ms"] - bare["cpu_ms"]
            shares[name].append({**told, "bare": bare, "share": share, "cpu_ms_over_bare": over})
    return {
        name: {key: statistics.median(one[key] for one in found) for key in found[0] if key != "bare"}
        | {"rounds": found}
        for name, found in shares.items()
    }


def load(arm: object, body: Path, seconds: float) -> dict:
    from process_trees import cpu_s
    from serve import CLIENTS, WARM_S

    from shoal.serve.load.figures import figures
    from shoal.serve.load.processes import Asked, send

    before = sum(map(cpu_s, arm.pids))
    seen = send(
        Asked("127.0.0.1", int(arm.port), "/predict", [body.read_text()]), seconds=WARM_S + seconds, clients=CLIENTS
    )
    told = figures(seen, WARM_S, seconds, open_loop=False)
    return {
        "ok_a_second": told["ok_a_second"],
        "p50_ms": told["ms"].get("p50", 0.0),
        "p99_ms": told["ms"].get("p99", 0.0),
        "cpu_ms": 1e3 * (sum(map(cpu_s, arm.pids)) - before) / max(1, len(seen.samples)),
    }


def main() -> None:
    if sys.argv[1:2] == ["--be"]:
        name, folder, dtype, port = sys.argv[2:]
        {"litserve": litserve_peer, "ray": ray_peer}[name](folder, dtype, int(port))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--python", default=sys.executable, help="has the peers, and torch")
    parser.add_argument("--quick", action="store_true", help="one round of float32; saves nothing")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds, args.dtypes = 1, 1.0, "float32"
    there = []
    for name in filter(None, args.peers.split(",")):
        if subprocess.run([args.python, "-c", f"import {name}"], capture_output=True, check=False).returncode:
            print(f"{name}: not installed for {args.python}: pip install {'ray[serve]' if name == 'ray' else name}")
        else:
            there.append(name)
    from serve import TEXT, make_folder

    os.environ["OMP_NUM_THREADS"] = "1"
    told: dict = {"machine": platform.platform(), "load_before": os.getloadavg()[0], "peers": there}
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_folder(Path(scratch) / "classifier")
        (folder / "body.json").write_text(json.dumps({"text": TEXT}))
        for dtype in args.dtypes.split(","):
            told[dtype] = measure(dtype, folder, Path(scratch), args, there)
            for name, found in told[dtype].items():
                print(
                    f"{dtype} {name}: {found['ok_a_second']:.0f}/s, {found['share']:.0%} of bare, p50/p99 "
                    f"{found['p50_ms']:.0f}/{found['p99_ms']:.0f} ms, {found['cpu_ms']:.2f} CPU ms a request, "
                    f"{found['cpu_ms_over_bare']:.2f} of it beyond the bare forward",
                    flush=True,
                )
    told["load_after"] = os.getloadavg()[0]
    if not args.quick:
        RESULTS.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
