"""What is in infra/: that it parses, that every command and option in it exists, and that it holds no secret."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from flows.up import LEASES
from pipeline.cli import cli
from pipeline.store import open_store
from tests.servers import BIN, Prefect, Seaweed, children, wait_until

INFRA = Path(__file__).parents[1] / "infra"


def read(name: str) -> Any:
    return yaml.safe_load((INFRA / name).read_text())


def services() -> dict[str, dict[str, Any]]:
    return read("compose.yaml")["services"]


@cache
def options(*command: str) -> set[str]:
    """The options that a command's help names."""
    done = subprocess.run([BIN / command[0], *command[1:]], capture_output=True, text=True)
    return set(re.findall(r"(?<![\w-])--?[A-Za-z][\w.-]*", done.stdout + done.stderr))


def test_the_services_stand_on_each_other() -> None:
    compose = read("compose.yaml")
    for name, service in compose["services"].items():
        assert set(service.get("depends_on", ())) <= compose["services"].keys(), name
        volumes = [volume.split(":")[0] for volume in service.get("volumes", [])]
        named = {volume for volume in volumes if not volume.startswith((".", "/"))}
        assert named <= compose["volumes"].keys(), name
        assert all((INFRA / volume).exists() for volume in volumes if volume.startswith(".")), name
        # nothing is open to the world
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
    assert (INFRA / services()["head"]["build"]["dockerfile"].removeprefix("infra/")).exists()


def test_nothing_runs_as_root() -> None:
    image = (INFRA / "Dockerfile").read_text()
    users = re.findall(r"^USER (\S+)$", image, re.MULTILINE)
    assert users == ["census"]
    # Prefect keeps its database in the home of that user
    (kept,) = services()["prefect"]["volumes"]
    home = kept.split(":")[1]
    assert home == f"/home/{users[0]}/.prefect"
    assert f"--owner {users[0]} --group {users[0]} {home}" in image


@pytest.mark.parametrize("name", ["head", "node"])
def test_rays_options_exist(name: str) -> None:
    program, command, *given = services()[name]["entrypoint"]
    assert (program, command) == ("ray", "start")
    assert {option.split("=")[0] for option in given} <= options("ray", "start", "--help")


@pytest.mark.parametrize("name", ["prefect", "worker"])
def test_prefects_options_exist(name: str) -> None:
    words = services()[name]["entrypoint"]
    if name == "worker":
        shell, flag, script = words
        assert (shell, flag) == ("bash", "-c")
        trap, both = script.split(" TERM; ")
        node, worker, end = both.split(" & ")
        assert (trap, end) == ("trap 'kill $$(jobs -p); wait; exit 143'", "wait -n")
        assert {word.split("=")[0] for word in node.split()[2:]} <= options("ray", "start", "--help")
        words = worker.split()
    program, *given = words
    assert {word for word in given if word.startswith("--")} <= options(program, *given[:2], "--help")


@pytest.mark.parametrize(("second", "number", "code"), [("sleep 600", signal.SIGTERM, 143), ("false", 0, 1)])
def test_node_and_worker_end_together(second: str, number: int, code: int) -> None:
    shell, flag, script = services()["worker"]["entrypoint"]
    trap, both = script.replace("$$", "$").split(" TERM; ")
    first, end = both.split(" & ")[0], both.split(" & ")[2]
    assert first.startswith("ray start")
    process = subprocess.Popen([shell, flag, f"{trap} TERM; sleep 600 & {second} & {end}"], start_new_session=True)
    try:
        wait_until(lambda: process.poll() is not None or len(children(process.pid)) == 2, timeout_s=10)
        family = children(process.pid)
        if number:
            process.send_signal(number)
        assert process.wait(10) == code
        # behind a container's first process the kernel ends the others
        assert not number or not any(Path(f"/proc/{pid}").exists() for pid in family)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_places_of_nights_outlive_the_server() -> None:
    # what a server keeps in its memory nobody gives back once it has ended
    kept = services()["prefect"]["environment"]
    assert LEASES.items() <= kept.items()
    assert services()["head"]["environment"].items() <= kept.items()


@pytest.mark.real
def test_the_bucket_is_made_and_found_there_again(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ENDPOINT_URL": seaweed.endpoint, "ACCESS_KEY_ID": "any", "SECRET_ACCESS_KEY": "any"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    program, *given = services()["bucket"]["entrypoint"]
    for _ in range(2):
        subprocess.run([BIN / program, *given], check=True, timeout=120)
    # the store of the example at the head of the file
    assert "--store s3://census " in (INFRA / "compose.yaml").read_text()
    open_store("s3://census").probe()


def test_the_image_holds_what_the_build_needs() -> None:
    left_in = {line[1:] for line in (INFRA / "Dockerfile.dockerignore").read_text().split() if line.startswith("!")}
    copied = re.findall(r"^COPY (.+) \S+$", (INFRA / "Dockerfile").read_text(), re.MULTILINE)
    assert left_in == {name for line in copied for name in line.split()}


def test_the_s3_servers_options_exist() -> None:
    command, *given = services()["s3"]["command"].split()
    assert {option.split("=")[0] for option in given} <= options("weed", command, "-h")


def test_the_s3_server_fills_its_disk() -> None:
    assert "-volume.max=0" in services()["s3"]["command"].split()


def test_the_cluster_starts_rays_nodes() -> None:
    cluster = read("kuberay.yaml")
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    spec = cluster["spec"]
    assert f"ray=={spec['rayVersion']}" in (INFRA.parent / "constraints.txt").read_text().splitlines()
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert {f"--{name}" for name in group["rayStartParams"]} <= options("ray", "start", "--help")
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert spec["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("name", sorted(path.name for path in INFRA.iterdir()))
def test_comments_name_commands_that_exist(name: str) -> None:
    for words in re.findall(r"^#   .*?(?:neuron-census|--rm census) (\w+) ([^\n]*)$", (INFRA / name).read_text(), re.M):
        command = cli.commands[words[0]]
        known = {
            option for parameter in command.params if isinstance(parameter, click.Option) for option in parameter.opts
        }
        assert set(re.findall(r"--[a-z-]+", words[1])) <= known


@pytest.mark.parametrize("name", sorted(path.name for path in INFRA.iterdir()))
def test_no_secret_has_a_value(name: str) -> None:
    for line in (INFRA / name).read_text().splitlines():
        if match := re.search(r"(ACCESS_KEY|TOKEN|PASSWORD)\w*[:=] *(\S+)", line.split("#")[0]):
            assert re.match(r"\$\{\w+:\?|\"\$\(", match[2]), line


@pytest.mark.real
def test_the_deployment_is_taken_by_a_server(prefect: Prefect, tmp_path: Path) -> None:
    asked = {"job": "/jobs/nightly.toml", "store": "s3://bucket/census", "ray": "head:6379"}
    environment = {
        **os.environ,
        "PREFECT_API_URL": prefect.api,
        "PREFECT_HOME": str(tmp_path),
        **{f"NEURON_CENSUS_{name.upper()}": value for name, value in asked.items()},
    }

    def call(*words: str) -> None:
        done = subprocess.run(
            [BIN / "prefect", *words], env=environment, cwd=INFRA.parent, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr

    call("work-pool", "create", "neuron-census", "--type", "process", "--overwrite")
    call("--no-prompt", "deploy", "--prefect-file", "infra/prefect.yaml", "--all")
    deployed = prefect.ask("GET", "deployments/name/census/nightly")
    assert deployed["parameters"] == asked
    assert [one["schedule"]["cron"] for one in deployed["schedules"] if one["active"]] == ["0 2 * * *"]
    assert deployed["work_pool_name"] == "neuron-census"
    assert deployed["entrypoint"] == "flows.census.census"
    assert deployed["pull_steps"] == [{"prefect.deployments.steps.set_working_directory": {"directory": "/"}}]
