"""An engine that dies while `modekit serve` runs: it is started again under its address, until that does not help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from asking import opened
from domain_mixtures import lexical_mixture
from modekit.engines import serve as module
from modekit.engines.child import Child
from modekit.engines.serve import ServedMixture
from modekit.errors import EngineError
from waiting import until

pytestmark = pytest.mark.usefixtures("short_tables")

ENGINE = """
import json, pathlib, sys, time
log = pathlib.Path(json.loads(sys.stdin.readline())["log"])
count = len(log.read_text()) if log.exists() else 0
log.write_text("x" * (count + 1))
{before}
print(json.dumps({{"address": "http://127.0.0.1:1"}}), flush=True)
{after}
sys.exit("error: no room for the model")
"""


def kept_until_it_ends(tmp_path: Path, before: str, after: str) -> tuple[int, str]:
    """How often an engine was started, and why it was not any more."""
    (tmp_path / "engine.py").write_text(ENGINE.format(before=before, after=after))
    log, path = tmp_path / "log", {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}

    def start() -> Child:
        return Child("engine", {"log": str(log)}, path)

    served = ServedMixture("", "engine", "", None, start, start())
    assert served.child.answer() is not None
    with pytest.raises(EngineError, match="ended 3 times") as error:
        served.wait()
    return len(log.read_text()), str(error.value)


def test_an_engine_that_ends_again_and_again_ends_it(tmp_path: Path) -> None:
    assert kept_until_it_ends(tmp_path, "", "")[0] == 3


def test_one_that_dies_as_it_loads_counts_however_long_that_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STEADY_S", 0.3)
    started, said = kept_until_it_ends(tmp_path, "if count: time.sleep(0.5); sys.exit('error: no room for the model')", "")
    assert started == 3 and "no room for the model" in said


def test_failures_of_long_ago_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STEADY_S", 0.3)
    assert kept_until_it_ends(tmp_path, "", "if count < 4: time.sleep(0.5)")[0] == 6


def writes(address: str) -> bool:
    with opened(f"{address}/v1/completions", {"prompt": "the", "max_tokens": 1}) as answer:
        return bool(json.load(answer)["choices"])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["llama", "transformers"])
def test_a_real_engine_comes_back_under_its_address_and_ends_with_the_command(tmp_path: Path, engine: str) -> None:
    folder = str(lexical_mixture(tmp_path).folder)
    command = [sys.executable, "-m", "modekit", "serve", folder, "--port", "0", "--engine", engine]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        address = process.stdout.readline().split("/v1")[0]
        assert writes(address)
        (before,) = psutil.Process(process.pid).children()
        before.kill()
        until(lambda: not before.is_running() or before.status() == psutil.STATUS_ZOMBIE)
        until(lambda: writes(address))
        engines = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.kill()
        process.wait(60)
    left = psutil.wait_procs(engines, timeout=20)[1]
    assert engines and [each for each in left if each.status() != psutil.STATUS_ZOMBIE] == [], "the engine is still there"
