"""`shoal serve --print-deployment kubernetes`: what runs the same server on a cluster, as manifests."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import UserError
from shoal.serve.options import ServeOptions

KEYS, TLS = "/etc/shoal/keys", "/etc/shoal/tls"  # where secrets are mounted
GRACE_S = 10  # beyond the time to drain, before a pod is killed
PROCESS_BYTES = 1 << 30  # of a server beside its weights: torch, and what a forward pass needs
BUSY_PERCENT = 70  # of the requested CPU: more pods beyond it


@dataclass(frozen=True)
class Pods:
    image: str  # holds Shoal and the target
    least: int = 1
    most: int = 4

    def __post_init__(self) -> None:
        if not self.image or re.search(r"\s", self.image):
            raise UserError("--print-deployment: name the image that holds Shoal and the target: --image NAME:TAG.")
        if not 1 <= self.least <= self.most:
            raise UserError(f"--pods {self.least}..{self.most}: write LEAST..MOST, from 1 on.")


def manifests(options: ServeOptions, words: Sequence[str], pods: Pods, admin: bool) -> list[dict[str, Any]]:
    """A deployment, a service, an autoscaler and a disruption budget.

    ``words``: of the command, besides where it listens and what it reads keys from. ``admin``: with admin keys."""
    name = _name(options)
    labels = {"app.kubernetes.io/name": name, "app.kubernetes.io/managed-by": "shoal"}
    chosen = {"matchLabels": {"app.kubernetes.io/name": name}}
    return [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "selector": chosen,
                # a new pod answers before an old one goes
                "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
                "template": {
                    "metadata": {"labels": labels},
                    "spec": _pod(name, options, words, pods, admin),
                },
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "selector": {"app.kubernetes.io/name": name},
                "ports": [{"name": "http", "port": 80 if not options.tls_cert else 443, "targetPort": "http"}],
            },
        },
        {
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
                "minReplicas": pods.least,
                "maxReplicas": pods.most,
                "metrics": [
                    {
                        "type": "Resource",
                        "resource": {
                            "name": "cpu",
                            "target": {"type": "Utilization", "averageUtilization": BUSY_PERCENT},
                        },
                    }
                ],
                "behavior": {"scaleDown": {"stabilizationWindowSeconds": max(60, round(options.calm_s))}},
            },
        },
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {"name": name, "labels": labels},
            "spec": {"selector": chosen, "maxUnavailable": 1},
        },
    ]


def _pod(name: str, options: ServeOptions, words: Sequence[str], pods: Pods, admin: bool) -> dict[str, Any]:
    scheme = "HTTPS" if options.tls_cert else "HTTP"
    mounts = [{"name": "keys", "mountPath": KEYS, "readOnly": True}, {"name": "tmp", "mountPath": "/tmp"}]
    volumes: list[dict[str, Any]] = [
        {"name": "keys", "secret": {"secretName": f"{name}-keys"}},
        {"name": "tmp", "emptyDir": {}},
    ]
    listens = ["--host=0.0.0.0", "--port=8000", f"--api-keys={KEYS}/api-keys"]
    listens += [f"--admin-keys={KEYS}/admin-keys"] if admin else []
    if options.tls_cert:
        mounts.append({"name": "tls", "mountPath": TLS, "readOnly": True})
        volumes.append({"name": "tls", "secret": {"secretName": f"{name}-tls"}})
        listens += [f"--tls-cert={TLS}/tls.crt", f"--tls-key={TLS}/tls.key"]

    def probe(path: str, every_s: int, failures: int) -> dict[str, Any]:
        get = {"path": path, "port": "http", "scheme": scheme}
        return {"httpGet": get, "periodSeconds": every_s, "failureThreshold": failures, "timeoutSeconds": 5}

    size = _memory(options)
    processes = options.most * max(1, _product(options.mesh.values()))
    return {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": round(options.drain_s) + GRACE_S,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [
            {
                "name": "shoal",
                "image": pods.image,
                "command": ["shoal", "serve", options.target],
                "args": [*words, *listens],
                "ports": [{"name": "http", "containerPort": 8000}],
                "startupProbe": probe("/health/ready", 2, 150),  # loading may take five minutes
                "readinessProbe": probe("/health/ready", 5, 2),
                "livenessProbe": probe("/health/live", 10, 3),
                "resources": {
                    "requests": {"cpu": str(processes * options.threads + 1), "memory": size},  # one for HTTP
                    "limits": {"memory": size},
                },
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }


def _product(values: Any) -> int:
    made = 1
    for value in values:
        made *= value
    return made


def _name(options: ServeOptions) -> str:
    """A name that Kubernetes takes (RFC 1123), from the model's."""
    plain = options.name or Path(options.target).name.rpartition(":")[2]
    return f"shoal-{re.sub('[^a-z0-9]+', '-', plain.lower()).strip('-')}"[:50].rstrip("-")


def _memory(options: ServeOptions) -> str:
    """Twice the weights that lie in the target, as far as it can be seen from here: while they are loaded there are two
    copies, and two versions while they are changed."""
    files = Path(options.target).rglob("*.safetensors") if Path(options.target).is_dir() else ()
    whole = 2 * sum(file.stat().st_size for file in files) + PROCESS_BYTES * (1 + options.most)
    return f"{-(-whole // (1 << 20))}Mi"


def text(documents: Sequence[Mapping[str, Any]], name: str, options: ServeOptions) -> str:
    """YAML, with the commands that make its secrets as comments. Each text is quoted as JSON quotes it."""
    head = [f"# kubectl create secret generic {name}-keys --from-file=api-keys=FILE"]
    head[0] += " --from-file=admin-keys=FILE" if options.admin_keys else ""
    head += [f"# kubectl create secret tls {name}-tls --cert=FILE --key=FILE"] if options.tls_cert else []
    return "\n".join([*head, *("---\n" + "\n".join(_yaml(document, "")) for document in documents)])


def _yaml(value: Any, indent: str) -> Iterator[str]:
    entries = value.items() if isinstance(value, Mapping) else ((None, item) for item in value)
    for key, item in entries:
        start = f"{indent}- " if key is None else f"{indent}{json.dumps(key) if '/' in key else key}:"
        if isinstance(item, Mapping | list) and item:
            inner = list(_yaml(item, indent + "  "))
            if key is None:
                yield start + inner[0].lstrip()
                yield from inner[1:]
            else:
                yield start
                yield from inner
        else:
            yield f"{start}{'' if key is None else ' '}{json.dumps(item)}"


def kubernetes(options: ServeOptions, words: Sequence[str], pods: Pods) -> str:
    admin = bool(options.admin_keys)
    return text(manifests(options, words, pods, admin), _name(options), options)
