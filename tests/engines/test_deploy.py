"""The files in deploy/ are what they say: commands that exist, ports and names that agree, probes of routes that are there.

Neither docker nor Kubernetes is started. vLLM's options are held against its own command line by make test-vllm.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import typer
import yaml

from modekit.cli import app
from modekit.engines import ray_front
from modekit.engines.front import Front
from modekit.engines.guard import MOST_AT_ONCE, Guard
from modekit.engines.listening import KEY
from modekit.engines.ray_front import FrontArguments
from modekit.engines.run_front import WORKERS_KEY, FrontSettings
from modekit.engines.workers import WorkerPool
from modekit.errors import EngineError
from modekit.run import Run

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
VARIABLE = re.compile(r"\$\{(\w+)")
PATHS = ("/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


COMPOSE: Mapping[str, Any] = documents("compose.yaml")[0]["services"]
KUBERNETES = documents("kubernetes.yaml")
RAY: Mapping[str, Any] = documents("ray_serve.yaml")[0]


def kubernetes(kind: str, name: str) -> dict[str, Any]:
    return next(each for each in KUBERNETES if each["kind"] == kind and each["metadata"]["name"] == name)


def pods() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, pod and its one container."""
    for each in KUBERNETES:
        if "template" in each["spec"]:
            pod = each["spec"]["template"]["spec"]
            (container,) = pod["containers"]
            yield each["metadata"]["name"], pod, container


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """Every command line of the files, and where it stands."""
    for name, service in COMPOSE.items():
        yield f"compose.yaml: {name}", [*service.get("entrypoint", []), *service["command"]]
    for name, _, container in pods():
        yield f"kubernetes.yaml: {name}", [*container["command"], *container["args"]]
    copied = re.search(r"^CMD (\[.*\])$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert copied is not None
    yield "Dockerfile", yaml.safe_load(copied[1])
    for line in re.findall(r"^    (modekit .*)$", (DEPLOY / "README.md").read_text(), re.MULTILINE):
        yield "README.md", line.split()


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Command and options of a `modekit` command line, by modekit's own parser; nothing is run."""
    assert words[0] == "modekit"
    group = typer.main.get_command(app)
    name, command, rest = group.resolve_command(group.make_context("modekit", words[1:]), words[1:])  # type: ignore[attr-defined]
    return name, command.make_context(name, rest).params


LINES = dict(command_lines())


@pytest.mark.parametrize("where", [where for where, words in LINES.items() if words[0] == "modekit" and "--help" not in words])
def test_every_command_line_parses(where: str) -> None:
    name, options = parsed(LINES[where])
    assert name in {"front", "serve"} and options["host"] == "0.0.0.0"
    assert not options["no_key"], "a key is in the environment: test_keys_are_never_in_the_files"


def test_a_wrong_command_line_does_not() -> None:
    with pytest.raises(Exception, match="--no-such"):
        parsed(["modekit", "front", "OUT", "--worker", "http://a", "--no-such"])


def vllm_lines() -> list[list[str]]:
    return [words for words in LINES.values() if words[:2] == ["vllm", "serve"]]


def test_workers_are_the_same_everywhere() -> None:
    assert len(vllm_lines()) == 3 and all(words == vllm_lines()[0] for words in vllm_lines())


@pytest.mark.vllm
def test_vllm_knows_its_options() -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers())
    found = parser.parse_args(vllm_lines()[0][1:])
    assert found.served_model_name == ["base"] and [each.name for each in found.lora_modules] == ["medicine", "law"]


def port_of(words: list[str]) -> int:
    return int(words[words.index("--port") + 1])


def workers_of(words: list[str]) -> list[str]:
    return [words[index + 1] for index, word in enumerate(words) if word == "--worker"]


def test_ports_and_names_agree_in_compose() -> None:
    front = LINES["compose.yaml: front"]
    workers = {name: LINES[f"compose.yaml: {name}"] for name in COMPOSE if name.startswith("worker-")}
    assert workers_of(front) == [f"http://{name}:{port_of(words)}" for name, words in workers.items()]
    (published,) = COMPOSE["front"]["ports"]
    assert int(published.split(":")[1]) == port_of(front)
    asked = re.search(r"http://127.0.0.1:(\d+)(/\w+)", " ".join(COMPOSE["front"]["healthcheck"]["test"]))
    assert asked is not None and int(asked[1]) == port_of(front) and asked[2] in PATHS


def test_ports_and_names_agree_in_kubernetes() -> None:
    for name, pod, container in pods():
        service = kubernetes("Service", name)
        owner = next(each for each in KUBERNETES if "template" in each["spec"] and each["metadata"]["name"] == name)
        labels = owner["spec"]["template"]["metadata"]["labels"]
        assert owner["spec"]["selector"]["matchLabels"] == labels == service["spec"]["selector"]
        (port,) = container["ports"]
        (outer,) = service["spec"]["ports"]
        assert port["containerPort"] == port_of(container["args"]) and outer["targetPort"] == port["name"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = container[probe].get("httpGet") or container[probe]["tcpSocket"]
            assert asked["port"] == port["name"] and asked.get("path", "/health") in PATHS
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
        assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
    workers = kubernetes("StatefulSet", "worker")
    assert kubernetes("Service", workers["spec"]["serviceName"])["spec"]["clusterIP"] == "None"  # else no pod has a name
    assert workers_of(LINES["kubernetes.yaml: front"]) == [
        f"http://worker-{index}.{workers['spec']['serviceName']}:8000" for index in range(workers["spec"]["replicas"])
    ]


def test_probes_ask_for_routes_of_the_front() -> None:
    guard = Front(None, WorkerPool([])).app()  # type: ignore[arg-type]
    assert (
        isinstance(guard, Guard)
        and guard._paths == {*PATHS, "/v1/models/", "/v1/models/{name:path}"}
        and "/health" in guard._open
    )


def test_keys_are_never_in_the_files() -> None:
    """They come from the environment or a Secret, under the names that are read."""
    for name, _, container in pods():
        said = {each["name"]: each for each in container["env"]}
        keys = {KEY, WORKERS_KEY} if name == "front" else {"VLLM_API_KEY"}
        assert {each for each in said if each.endswith("KEY")} == keys
        assert all(said[key]["valueFrom"]["secretKeyRef"]["name"] == "modekit" for key in keys)
    front = {each["name"]: each for _, _, container in pods() for each in container["env"]}
    assert front[WORKERS_KEY]["valueFrom"] == front["VLLM_API_KEY"]["valueFrom"] != front[KEY]["valueFrom"]
    for service in COMPOSE.values():
        for name, value in service["environment"].items():
            if name.endswith("KEY"):
                assert VARIABLE.findall(value) == [WORKERS_KEY if name == "VLLM_API_KEY" else name]
    assert set(VARIABLE.findall((DEPLOY / "compose.yaml").read_text())) == {KEY, WORKERS_KEY, "MODELS"}


def test_the_image_has_what_it_copies_and_installs() -> None:
    said = (DEPLOY / "Dockerfile").read_text()
    for copied in re.findall(r"^COPY (.+) \S+$", said, re.MULTILINE):
        assert all((ROOT / each).exists() for each in copied.split())
    (extras,) = re.findall(r"'/source\[([\w,]+)\]'", said)
    defined = re.findall(
        r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1], re.MULTILINE
    )
    assert set(extras.split(",")) <= set(defined)
    assert (DEPLOY / COMPOSE["front"]["build"]["context"]).resolve() == ROOT
    assert (ROOT / COMPOSE["front"]["build"]["dockerfile"]).is_file()


def test_ray_serve_is_given_what_the_front_takes() -> None:
    (served,) = RAY["applications"]
    module, name = served["import_path"].split(":")
    assert module == ray_front.__name__ and hasattr(ray_front, name)
    arguments = FrontArguments.model_validate(served["args"])
    assert all(urlsplit(each).scheme == "http" for each in arguments.workers)
    (deployment,) = served["deployments"]
    assert deployment["num_replicas"] == 2 and deployment["max_ongoing_requests"] == MOST_AT_ONCE
    schema = pytest.importorskip("ray.serve.schema")
    assert schema.ServeDeploySchema.model_validate(RAY).applications[0].name == served["name"]


def test_ray_serve_takes_what_the_command_takes() -> None:
    """All but where it listens, under the same name or its plural."""
    _, options = parsed(["modekit", "front", "OUT", "--worker", "http://a"])
    known = {*FrontArguments.model_fields}
    assert {name if name in known else f"{name}s" for name in options} == known | {"hosts", "ports"}


def test_ray_serve_hands_all_of_it_to_the_front(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    said = {"checkpoint": "OUT", "workers": ["http://a"], "names": ["law=l"], "timeout": 5, "adapters": "/models/adapters"}

    def front_of(checkpoint: Path, settings: FrontSettings, *, run: Run) -> Front:
        taken.extend((checkpoint, settings, run.trust_remote_code))
        return Front(None, WorkerPool([]))  # type: ignore[arg-type]

    monkeypatch.setattr(ray_front, "open_checkpoint", lambda folder: folder)
    monkeypatch.setattr(ray_front, "front_of", front_of)
    assert isinstance(FrontArguments.model_validate(said).app(), Guard)
    checkpoint, settings, trusted = taken
    assert checkpoint == Path("OUT") and trusted is False
    assert (settings.workers, settings.names, settings.timeout) == (["http://a"], ["law=l"], 5)
    assert settings.adapters == Path("/models/adapters")


def test_a_wrong_argument_under_ray_serve_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_front, "import_module", lambda _: None)
    with pytest.raises(EngineError, match="argument of the front is wrong") as said:
        ray_front.application({"checkpoint": "/models/mixture", "workers": ["http://a"], "wrokers": []})
    assert "wrokers" in str(said.value.where)
