"""Manifests for Kubernetes: what they must hold, and that the command in them is one that Shoal takes."""

import re
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from shoal.cli import serve as verb
from shoal.cli.main import main
from shoal.cli.parser import OneLineParser
from shoal.models.bert import Head
from shoal.serve.options import ServeOptions

IMAGE = "registry.example/encoder:1"
Printed = Callable[..., dict[str, Any]]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], folders: Callable[[Head], Path]) -> Printed:
    """The manifests by their kind; "text": as they were printed."""

    def run(*options: str, target: str = "") -> dict[str, Any]:
        words = [target or str(folders("classification")), "--print-deployment", "kubernetes", "--image", IMAGE]
        assert main(["serve", *words, *options]) == 0
        text = capsys.readouterr().out
        found = list(yaml.safe_load_all(text))
        return {one["kind"]: one for one in found} | {"text": text}

    return run


def pod(told: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = told["Deployment"]["spec"]["template"]["spec"]
    return made


def test_what_the_manifests_name_is_there_and_fits_together(printed: Printed) -> None:
    told = printed("--pods", "2..6", "--replicas", "2", "--threads", "3")
    assert set(told) == {"Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget", "text"}
    name = told["Deployment"]["metadata"]["name"]
    labels = told["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for selector in (
        told["Deployment"]["spec"]["selector"]["matchLabels"],
        told["Service"]["spec"]["selector"],
        told["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    scaler = told["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 6)
    (container,) = pod(told)["containers"]
    assert container["image"] == IMAGE
    ports = {port["name"] for port in container["ports"]}
    assert told["Service"]["spec"]["ports"][0]["targetPort"] in ports
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] in ports
    assert container["resources"]["requests"]["cpu"] == "7", "two processes of three threads, and one for HTTP"
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod(told)["volumes"]}
    secret = next(volume["secret"]["secretName"] for volume in pod(told)["volumes"] if volume["name"] == "keys")
    assert f"kubectl create secret generic {secret} " in told["text"]


def test_a_pod_has_the_time_to_drain_and_no_right_that_it_does_not_need(printed: Printed) -> None:
    told = pod(printed("--drain-s", "45"))
    assert told["terminationGracePeriodSeconds"] > 45
    assert told["securityContext"]["runAsNonRoot"] is True
    security = told["containers"][0]["securityContext"]
    assert (security["allowPrivilegeEscalation"], security["readOnlyRootFilesystem"]) == (False, True)
    assert security["capabilities"] == {"drop": ["ALL"]}


def test_the_command_in_it_is_this_one_and_shoal_takes_it(printed: Printed, tmp_path: Path) -> None:
    secret = "a-key-that-must-not-be-printed"
    (tmp_path / "keys").write_text(secret)
    given = ["--dtype", "auto", "--queue", "9", "--invariant", "--generation", "running=8", "--generation", "threads=2"]
    keys = ["--api-keys", str(tmp_path / "keys"), "--admin-keys", str(tmp_path / "keys")]
    told = printed(*given, *keys, "--tls-cert", "c.pem", "--tls-key", "k.pem", "--host", "0.0.0.0")
    assert secret not in told["text"]
    (container,) = pod(told)["containers"]
    assert container["livenessProbe"]["httpGet"]["scheme"] == "HTTPS"
    assert container["command"][:2] == ["shoal", "serve"]
    parser = OneLineParser(prog="shoal serve")
    verb.add_arguments(parser)
    args: Namespace = parser.parse_args([*container["command"][2:], *container["args"]])
    assert (args.dtype, args.queue, args.invariant, args.generation) == ("auto", 9, True, ["running=8", "threads=2"])
    files = (args.api_keys, args.admin_keys, args.tls_cert, args.tls_key)
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert all(str(Path(file).parent) in mounts for file in files)
    assert ServeOptions(target=args.target, host=args.host, api_keys=("secret-key",)).host == "0.0.0.0"


@pytest.mark.parametrize("target", ["module:Make_It", "runs/A Run.1", "x" * 90, "-.-"])
def test_any_target_gives_a_name_that_kubernetes_takes(printed: Printed, target: str) -> None:
    told = printed(f"--name={target}", target="runs/latest")
    name = told["Service"]["metadata"]["name"]
    assert len(name) <= 63
    assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--print-deployment", "kubernets", "--image", "x"], "did you mean 'kubernetes'"),
        (["--print-deployment", "kubernetes"], "--image NAME:TAG"),
        (["--print-deployment", "kubernetes", "--image", "x", "--pods", "3"], "LEAST..MOST"),
        (["--print-deployment", "kubernetes", "--image", "x", "--pods", "3..1"], "LEAST..MOST"),
        (["--image", "x"], "are for --print-deployment"),
        (["--engine", "rey"], "did you mean 'ray'"),
    ],
)
def test_what_cannot_be_written_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "x", *arguments]) == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.count("\n") == 1


def test_without_ray_its_engine_is_one_line_that_names_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["serve", "x", "--engine", "ray"]) == 2
    errors = capsys.readouterr().err
    assert "pip install 'shoal[ray]'" in errors
    assert errors.count("\n") == 1
