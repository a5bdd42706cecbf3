"""A process of its own: what it started ends with it, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from modekit.engines.child import Child
from waiting import until

WORKER = "import time; time.sleep(600)"
ENGINE = f"""
import json, subprocess, sys
pipes = json.loads(sys.stdin.readline())["pipes"]
worker = subprocess.Popen([sys.executable, "-c", {WORKER!r}], **{{name: subprocess.DEVNULL for name in pipes}})
print("3\\nnull\\n[]\\nloading ...")
print(json.dumps({{"pid": str(worker.pid)}}), flush=True)
sys.stdin.read()
"""
ALL = ["stdin", "stdout", "stderr"]


@pytest.fixture
def path(tmp_path: Path) -> dict[str, str]:
    """The environment in which `starter` is a module that starts a worker."""
    (tmp_path / "starter.py").write_text(ENGINE)
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def worker_of(child: Child) -> int:
    answer = child.answer()
    assert answer is not None, child.complaint()
    return int(answer["pid"])


@pytest.mark.parametrize("pipes", [[], ALL], ids=["with its pipes", "without its pipes"])
def test_a_worker_ends_with_an_engine_that_is_killed(path: dict[str, str], pipes: list[str]) -> None:
    """One that holds the engine's end of the pipes keeps nobody waiting for an answer."""
    with Child("starter", {"pipes": pipes}, path) as child:
        worker = worker_of(child)
        assert not is_gone(worker)
        started = time.monotonic()
        os.kill(child._process.pid, signal.SIGKILL)
        assert child.answer() is None and time.monotonic() - started < 5
        assert "ended by SIGKILL" in child.complaint()
        until(lambda: is_gone(worker))
    assert not child.is_running()


def test_a_worker_ends_with_an_engine_that_is_stopped(path: dict[str, str]) -> None:
    """Also where whoever stopped it ends at once, and nobody is left to look after the worker."""
    with Child("starter", {"pipes": ALL}, path) as child:
        worker = worker_of(child)
    assert not child._watcher.is_alive()
    until(lambda: is_gone(worker))
    script = (
        "from modekit.engines.child import Child\n"
        f"with Child('starter', {{'pipes': {ALL}}}) as child:\n    print(child.answer()['pid'], flush=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **path}, capture_output=True, text=True, check=True
    )
    until(lambda: is_gone(int(done.stdout)))
