"""Packages of others, each in an environment of its own, called through a small driver script (drivers/) in a child process.

Shape legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch
from filelock import FileLock

from peers.peer import Unsuitable

DRIVERS = Path(__file__).with_name("drivers")
TORCH = "torch>=2.9"
READY = "ready.json"
INSTALL_SECONDS, RUN_SECONDS = 1_800, 1_800
REASON_CHARACTERS = 300


@dataclass(frozen=True)
class Package:
    """A package on PyPI, and what it needs to run today."""

    name: str
    version: str
    driver: str
    pins: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """As the table names it."""
        return f"{self.name} {self.version}"

    def prepare(self, environments: Path) -> None:
        """Make its environment, unless there is one of the same packages. torch comes from where pip takes it here."""
        environments.mkdir(parents=True, exist_ok=True)
        with FileLock(environments / f"{self.name}.lock"):
            self._install(environments)

    def _install(self, environments: Path) -> None:
        home, wanted = environments / self.name, [f"{self.name}=={self.version}", TORCH, *self.pins]
        ready = home / READY
        if ready.exists() and json.loads(ready.read_text()) == wanted:
            return
        _call([sys.executable, "-m", "venv", "--clear", "--without-pip", str(home)], INSTALL_SECONDS)
        pip = [sys.executable, "-m", "pip", "--python", str(self.python(environments)), "install", "--quiet"]
        _call([*pip, *wanted], INSTALL_SECONDS)
        ready.write_text(json.dumps(wanted))

    def python(self, environments: Path) -> Path:
        """Its interpreter."""
        return environments / self.name / "bin" / "python"

    def run(self, environments: Path, job: dict[str, Any], folder: Path) -> None:
        """Let the driver do a job (JSON); what it makes is below `folder`. Raises Unsuitable with the package's own error."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "job.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        _call([str(self.python(environments)), str(DRIVERS / self.driver), str(file)], RUN_SECONDS)

    def open(self, environments: Path, folder: Path) -> Remote:
        """A model that only the package itself can open."""
        return Remote((str(self.python(environments)), str(DRIVERS / self.driver), str(folder)))


@dataclass(frozen=True)
class Remote:
    """A speaker in a child process: token ids go in through a pipe, scores come out. The child ends with the pipe."""

    command: tuple[str, ...]

    @cached_property
    def child(self) -> tuple[subprocess.Popen[bytes], BinaryIO]:
        """Started at the first text; scores have a pipe of their own, since packages print."""
        read, write = os.pipe()
        command = [*self.command, str(write)]
        started = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[write],
            env=environment(),
        )
        os.close(write)
        return started, os.fdopen(read, "rb")

    def logits(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """Of one document."""
        started, received = self.child
        ids = ids_BS[0].numpy().astype("<i8")
        with contextlib.suppress(BrokenPipeError):  # the answer is empty then
            assert started.stdin is not None
            started.stdin.write(len(ids).to_bytes(4, "little") + ids.tobytes())
            started.stdin.flush()
        vocabulary = int.from_bytes(received.read(4), "little")
        found = received.read(4 * vocabulary * len(ids))
        if not vocabulary or len(found) < 4 * vocabulary * len(ids):
            raise Unsuitable(f"the driver ended with exit code {started.wait()}")
        return torch.from_numpy(numpy.frombuffer(found, "<f4").reshape(1, len(ids), vocabulary).copy())


def environment() -> dict[str, str]:
    """Of a child: nothing of this process's packages, no hub; an error's last line is not wrapped."""
    kept = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}}
    return {**kept, "HF_HUB_OFFLINE": "1", "COLUMNS": "1000", "TOKENIZERS_PARALLELISM": "false"}


def _call(command: list[str], seconds: float) -> None:
    """Run it; its last line is the reason where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment(), check=False)
    except subprocess.TimeoutExpired:
        raise Unsuitable(f"{Path(command[0]).name} took more than {seconds / 60:g} minutes") from None
    if done.returncode < 0:
        raise Unsuitable(f"{Path(command[0]).name} was killed by signal {-done.returncode}")
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise Unsuitable((lines[-1] if lines else f"exit code {done.returncode}")[:REASON_CHARACTERS])
