"""What `shoal serve` can be told, with its defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, Literal

from shoal.errors import UserError, unknown_name
from shoal.serve.groups.mesh import plan_of

TASKS = (
    "image-classification",
    "sequence-classification",
    "classification",  # of rows of numbers
    "embeddings",
    "question-answering",
    "text-generation",
    "tensors",  # whatever the model takes, and what it gives
)


DTYPES = ("auto", "float32", "bfloat16", "int8")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    target: str = "latest"  # a run, a checkpoint, a Hugging Face folder, or module:factory
    task: str = ""  # "": inferred; see TASKS
    name: str = ""  # of the model, for clients; "": the folder's
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "float32"  # auto: what is measured to be fastest
    replicas: int = 1  # model processes; they share one copy of the weights
    mesh: Mapping[str, int] = field(default_factory=dict)  # axis -> processes that hold one model together: a replica
    min_replicas: int = -1  # when nothing is asked: 0: none, the first request wakes one; -1: replicas
    max_replicas: int = 0  # when much is asked; 0: replicas
    calm_s: float = 60.0  # fewer model processes are kept once fewer would have done for so long
    threads: int = 1  # of each model process
    batch: int = 32  # samples, at most
    invariant: bool = False  # the same bits in any company, at a full batch's price or alone
    latency_ms: float = 0.0  # target from arrival to answer: a batch may wait for company so long; 0: it never waits
    queue: int = 256  # requests that wait beside those that the model processes have; who comes then gets 429
    within_ms: float = 0.0  # who could not be answered within so long gets 429; 0: only the queue's length counts
    generation: Mapping[str, Any] = field(default_factory=dict)  # of text: see shoal.serve.generation.options.Options
    timeout_s: float = 30.0  # a request that is not answered by then gets 504
    body_bytes: int = 4 << 20  # of a request
    connections: int = 1024
    read_timeout_s: float = 20.0  # from a request's first byte to its last
    idle_timeout_s: float = 75.0  # of a kept connection between two requests
    drain_s: float = 30.0  # on SIGTERM: how long open requests may take to end
    hang_s: float = 60.0  # a model process that works on one batch for longer is killed, and its requests run again
    api_keys: tuple[str, ...] = ()  # (): none is asked for, which is allowed on loopback only
    admin_keys: tuple[str, ...] = ()  # for /v1/reload; (): there is no such address
    canary: float = 1.0  # of requests, that each newer checkpoint of a followed run gets until it is promoted
    follow: bool = False  # serve each newer checkpoint of the run as soon as it is there
    tls_cert: str = ""
    tls_key: str = ""
    allow_origin: str = ""  # an origin whose pages may ask ("*": all); "": none but our own

    def __post_init__(self) -> None:
        positive = (
            "replicas",
            "threads",
            "batch",
            "timeout_s",
            "body_bytes",
            "connections",
            "read_timeout_s",
            "hang_s",
        )
        for name in positive:
            if getattr(self, name) <= 0:
                raise UserError(f"serve: {name} must be greater than 0, got {getattr(self, name)}.")
        if not -1 <= self.min_replicas <= self.least <= self.replicas <= self.most:
            raise UserError(
                f"serve: {self.least} to {self.most} model processes, {self.replicas} at the start: put them in order."
            )
        plan_of(self.mesh)
        for name in ("latency_ms", "queue", "within_ms", "drain_s", "idle_timeout_s", "calm_s"):
            if getattr(self, name) < 0:
                raise UserError(f"serve: {name} must not be negative, got {getattr(self, name)}.")
        if not 0 < self.canary <= 1:
            raise UserError(f"serve: canary is a share of the requests, above 0 and at most 1, got {self.canary}.")
        if self.canary < 1 and not (self.follow and self.admin_keys):
            raise UserError("serve: --canary needs --follow, and --admin-keys for those who promote what it tries out.")
        if self.task and self.task not in TASKS:
            raise unknown_name("task", self.task, TASKS, "--task")
        if not 0 <= self.port < 65536:
            raise UserError(f"serve: port must be from 0 to 65535, got {self.port}.")
        if self.dtype not in DTYPES:
            raise UserError(f"serve: dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if self.mesh and self.dtype in ("auto", "int8"):
            raise UserError(f"serve: a model on a mesh is served in float32 or bfloat16, not in {self.dtype}.")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise UserError("serve: give both --tls-cert and --tls-key, or neither.")
        if any(len(key) < 8 for key in (*self.api_keys, *self.admin_keys)):
            raise UserError("serve: an API key has fewer than 8 characters: use a longer one.")
        if not self.api_keys and not is_loopback(self.host):
            raise UserError(
                f"serve: {self.host!r} can be reached from other machines: name a file with API keys (--api-keys FILE)."
            )

    @property
    def at_once(self) -> int:
        """Samples that a replica can work on at a time: a batch at each of its stages."""
        return self.batch * self.mesh.get("pipe", 1)

    @property
    def least(self) -> int:
        return self.replicas if self.min_replicas < 0 else self.min_replicas

    @property
    def most(self) -> int:
        return self.max_replicas or self.replicas

    def engine_options(self) -> dict[str, Any]:
        """What the model processes are told."""
        plain = {"batch": self.batch, "latency_ms": self.latency_ms, "within_ms": self.within_ms}
        return {**plain, "threads": self.threads, "invariant": self.invariant, "generation": dict(self.generation)}


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
