"""The files for containers and clusters fit the package, and KServe's own description of its resources."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mi2rage_rt import cli

ROOT = Path(__file__).parents[2]
SERVICE = ROOT / "deploy" / "inferenceservice.yaml"
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")


@pytest.fixture
def service():
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(SERVICE.read_text(encoding="utf-8"))


def found_by_kserve(path: Path) -> list[str]:
    if importlib.util.find_spec("kserve") is None:  # not imported here, where Triton's client may be
        pytest.skip("the KServe SDK is not installed")
    command = [sys.executable, "-m", "tests.packaging.kserve_fields", str(path)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()


def test_kserve_knows_every_field() -> None:
    assert found_by_kserve(SERVICE) == []


def test_a_wrong_service_is_found_out(tmp_path: Path) -> None:
    text = SERVICE.read_text(encoding="utf-8")
    wrong = text.replace("maxReplicas: 4", "maxReplicas: four").replace("livenessProbe:", "liveProbe:")
    path = tmp_path / "wrong.yaml"
    path.write_text(wrong.replace("      - name: scratch\n        emptyDir", "      - emptyDir"), encoding="utf-8")
    said = "\n".join(found_by_kserve(path))
    for words in ("maxReplicas: 'four' is no int", "liveProbe: is no field of V1Container", "volumes[2]: "):
        assert words in said


def test_the_command_takes_the_containers_arguments(service, tmp_path: Path, capsys) -> None:
    container = service["spec"]["predictor"]["containers"][0]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    command = re.search(r"^CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert command is not None
    for folder, *options in ([*container["args"][1:]], json.loads(command[1])[1:]):
        assert folder in mounts
        # What stands in the arguments is read before the folders are looked for: those alone are wrong here.
        there = [option.replace("/token/", f"{tmp_path}/") for option in options]
        with pytest.raises(SystemExit, match="2"):
            cli.main(["serve", str(tmp_path / "bundle"), *there])
        assert str(tmp_path) in capsys.readouterr().err


def test_the_pod_is_given_the_time_that_the_server_takes_to_end(service) -> None:
    from mi2rage_rt.serve.lifecycle import ServerOptions

    usual = ServerOptions()
    assert service["spec"]["predictor"]["terminationGracePeriodSeconds"] > usual.drain_s + usual.grace_s


def test_the_ports_are_the_servers(service) -> None:
    from mi2rage_rt.serve.lifecycle import ServerOptions

    usual, container = ServerOptions(), service["spec"]["predictor"]["containers"][0]
    assert [port["containerPort"] for port in container["ports"]] == [usual.port]
    assert {container[probe]["httpGet"]["port"] for probe in ("livenessProbe", "readinessProbe")} == {usual.port}
    assert f"EXPOSE {usual.port} {usual.grpc_port}" in DOCKERFILE
