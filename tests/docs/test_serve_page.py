"""The commands of docs/serve.md, section by section, as they stand there but for the ports."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest

from byte_level import save_byte_model
from chatting import TEMPLATE
from domain_mixtures import lexical_mixture
from modekit.engines.registry import ENGINES
from modekit.engines.serve import free_port
from modekit.engines.vllm_process import SERVER

PAGE = (Path(__file__).parents[2] / "docs" / "serve.md").read_text().replace("\\\n", " ")
SERVES = re.compile(r"(\w+=\w+ )*(modekit serve|python -m vllm\S+) ")
COMMAND = re.compile(r"^    ((?:modekit|vllm|curl http://127.0.0.1:8000|VLLM_\w+=\w+)\b.*)", re.MULTILINE)
"""All but commands of other programs: engines/test_litellm.py runs the proxy."""
HERE = ["One command", "llama.cpp"]
IN_VLLM = ["vLLM"]
_STARTS_S = 240


def sections() -> dict[str, list[str]]:
    """Heading -> the commands under it."""
    parts = re.split(r"^#{2,3} (.*)\n", PAGE, flags=re.MULTILINE)
    found = {heading: COMMAND.findall(text) for heading, text in zip(parts[1::2], parts[2::2], strict=True)}
    return {heading: commands for heading, commands in found.items() if commands}


@cache
def port_of(said: str) -> str:
    """One that is free here, the same for the same one on the page."""
    return str(free_port("127.0.0.1", 0))


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with OUT in it."""
    root = tmp_path_factory.mktemp("serve-page")
    save_byte_model(root / "BASE", "llama", 9, head_dim=32)
    (root / "BASE" / "chat_template.jinja").write_text(TEMPLATE)
    (root / "model").mkdir()
    lexical_mixture(root, "BASE", "model/OUT", head_dim=32)
    (root / "model" / "BASE").symlink_to(root / "BASE")
    return root


@pytest.fixture
def shell(mixtures: Path) -> Iterator[Shell]:
    with ExitStack() as stack:
        yield Shell(stack)


class Shell:
    """Runs lines of the page; what serves goes on until the section ends, or the next takes its place."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._serving: dict[str, subprocess.Popen[bytes]] = {}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._environment = {**os.environ, **(ENGINES["vllm"].environment()), "PATH": path}

    def run(self, line: str, folder: Path) -> str:
        """A command; what it printed, or nothing of one that goes on."""
        line = line.partition(" # ")[0].strip().replace("vllm serve", f"python -m {SERVER} --model")  # as the page says
        serves = SERVES.match(line)
        if serves and "--port" not in line:
            line += " --port 8000"
        line = re.sub(r"\b800\d\b", lambda found: port_of(found[0]), line)
        if not serves:
            done = subprocess.run(["bash", "-c", line], cwd=folder, env=self._environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
            return done.stdout
        port = shlex.split(line)[shlex.split(line).index("--port") + 1]
        self.stop(port)
        self._serving[port] = subprocess.Popen(["bash", "-c", f"exec env {line}"], cwd=folder, env=self._environment)
        self._stack.callback(self.stop, port)
        self._wait_for(port)
        return ""

    def stop(self, port: str) -> None:
        process = self._serving.pop(port, None)
        if process is not None:
            process.terminate()
            process.wait(60)

    def _wait_for(self, port: str) -> None:
        end = time.monotonic() + _STARTS_S
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    return
            except OSError:
                assert self._serving[port].poll() is None and time.monotonic() < end
                time.sleep(0.2)


def test_every_command_is_run() -> None:
    assert sorted(sections()) == sorted([*HERE, *IN_VLLM])


@pytest.mark.parametrize("heading", HERE)
def test_the_commands_run(mixtures: Path, shell: Shell, heading: str) -> None:
    for line in sections()[heading]:
        said = shell.run(line, mixtures / "model")
        if line.startswith("curl"):
            assert json.loads(said)["choices"], said


@pytest.mark.vllm
@pytest.mark.parametrize("heading", IN_VLLM)
def test_the_commands_of_vllm_run(mixtures: Path, shell: Shell, heading: str) -> None:
    for line in sections()[heading]:
        shell.run(line, mixtures / "model")
