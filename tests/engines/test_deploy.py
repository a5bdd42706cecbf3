"""The files in deploy/ are what they say: options that exist, ports and names that agree, keys that are in no file.

Neither docker nor Kubernetes is started. Options are held against LiteLLM's and vLLM's own parsers by `make test-litellm` and
`make test-vllm`; test_litellm.py runs the proxy.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from torch.distributed.run import get_args_parser

from modekit.cli import app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
VARIABLE = re.compile(r"\$\{(\w+)")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


COMPOSE: Mapping[str, Any] = documents("compose.yaml")[0]["services"]
KUBERNETES = documents("kubernetes.yaml")
PROXY = documents("litellm.yaml")[0]
IMAGE = (DEPLOY / "Dockerfile").read_text()
COMMAND: list[str] = yaml.safe_load(re.findall(r"^CMD (\[.*\])$", IMAGE, re.MULTILINE)[0])


def kubernetes(kind: str, name: str) -> dict[str, Any]:
    return next(each for each in KUBERNETES if each["kind"] == kind and each["metadata"]["name"] == name)


def pods() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, pod and its one container."""
    for each in KUBERNETES:
        if "template" in each["spec"]:
            pod = each["spec"]["template"]["spec"]
            (container,) = pod["containers"]
            yield each["metadata"]["name"], pod, container


def vllm_lines() -> list[list[str]]:
    found = [[*service["entrypoint"], *service["command"]] for name, service in COMPOSE.items() if name != "litellm"]
    return [*found, *([*container["command"], *container["args"]] for name, _, container in pods() if name == "worker")]


def port_of(words: list[str]) -> int:
    return int(words[words.index("--port") + 1])


def test_servers_are_the_same_everywhere() -> None:
    assert len(vllm_lines()) == 3 and all(words == vllm_lines()[0] for words in vllm_lines())


def test_every_model_of_the_proxy_is_on_two_servers() -> None:
    """And is called there as it is by vLLM's command line."""
    words = vllm_lines()[0]
    names = {"base", *(each.partition("=")[0] for each in words[words.index("--lora-modules") + 1 :])}
    at: dict[str, set[str]] = {}
    for row in PROXY["model_list"]:
        asked = row["litellm_params"]
        url = urlsplit(asked["api_base"])
        assert (url.scheme, url.port, url.path) == ("http", port_of(words), "/v1") and url.hostname in COMPOSE
        if row["model_name"] != "auto":
            assert asked["model"] == f"openai/{row['model_name']}"
            at.setdefault(row["model_name"], set()).add(str(url.hostname))
    assert set(at) == names and all(servers == {*COMPOSE} - {"litellm"} for servers in at.values())
    assert PROXY["litellm_settings"]["num_retries"] > 0


def test_ports_and_probes_agree() -> None:
    (published,) = COMPOSE["litellm"]["ports"]
    asked = re.search(r"http://127.0.0.1:(\d+)/health/liveliness", " ".join(COMPOSE["litellm"]["healthcheck"]["test"]))
    assert asked is not None and {int(asked[1]), int(published.split(":")[1])} == {port_of(COMMAND)}
    for name, pod, container in pods():
        service = kubernetes("Service", name)
        owner = next(each for each in KUBERNETES if "template" in each["spec"] and each["metadata"]["name"] == name)
        labels = owner["spec"]["template"]["metadata"]["labels"]
        assert owner["spec"]["selector"]["matchLabels"] == labels == service["spec"]["selector"]
        (port,) = container["ports"]
        (outer,) = service["spec"]["ports"]
        assert port["containerPort"] == port_of(container.get("args", COMMAND)) and outer["targetPort"] == port["name"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["port"] == port["name"]
        assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
    workers = kubernetes("StatefulSet", "worker")
    assert kubernetes("Service", workers["spec"]["serviceName"])["spec"]["clusterIP"] == "None"  # else no pod has a name


def test_keys_are_never_in_the_files() -> None:
    """They come from the environment or a Secret, under the names that are read."""
    read = set(re.findall(r"os\.environ/(\w+)", (DEPLOY / "litellm.yaml").read_text()))
    assert read == {"WORKERS_KEY", "LITELLM_MASTER_KEY"}
    for name, _, container in pods():
        said = {each["name"]: each for each in container["env"]}
        keys = read if name == "litellm" else {"VLLM_API_KEY"}
        assert {each for each in said if each.endswith("KEY")} == keys
        assert all(said[key]["valueFrom"]["secretKeyRef"]["name"] == "modekit" for key in keys)
    for service in COMPOSE.values():
        for name, value in service["environment"].items():
            if name.endswith("KEY"):
                assert VARIABLE.findall(value) == ["WORKERS_KEY" if name == "VLLM_API_KEY" else name]


def test_the_image_has_what_it_copies_and_installs() -> None:
    for copied in re.findall(r"^COPY (.+) \S+$", IMAGE, re.MULTILINE):
        assert all((ROOT / each).exists() for each in copied.split())
    (extra,) = re.findall(r"'/source\[(\w+)\]'", IMAGE)
    assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
    assert (DEPLOY / COMPOSE["litellm"]["build"]["context"]).resolve() == ROOT
    assert (ROOT / COMPOSE["litellm"]["build"]["dockerfile"]).is_file()


def test_torchrun_knows_its_options() -> None:
    (line,) = re.findall(r"`torchrun (.*?)`", (DEPLOY / "README.md").read_text())
    found = get_args_parser().parse_args(line.split())
    assert found.module and found.training_script == "modekit" and found.training_script_args == ["train", "OUT"]
    assert "train" in [info.name or (info.callback.__name__ if info.callback else "") for info in app.registered_commands]


@pytest.mark.litellm
def test_litellm_knows_its_options() -> None:
    from litellm.proxy.proxy_cli import run_server

    found = run_server.make_context("litellm", COMMAND[1:]).params
    assert found["port"] == port_of(COMMAND) and found["config"] == "/etc/litellm.yaml"


@pytest.mark.vllm
def test_vllm_knows_its_options() -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers())
    found = parser.parse_args(vllm_lines()[0][1:])
    assert found.served_model_name == ["base"] and [each.name for each in found.lora_modules] == ["medicine", "law"]
