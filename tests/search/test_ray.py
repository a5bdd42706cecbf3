"""`modekit tune --ray`: a cluster that does not answer is said in seconds, and a real Ray searches what one process does."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml

from conftest import Workshop, make_workshop
from modekit.errors import SourceError, TuneError
from modekit.recipes.read import load_recipe
from modekit.run import QUIET
from modekit.search.tune import launch
from modekit.search.tune.launch import ADDRESS, check_answers, search_on_ray, share_of
from modekit.search.tune.selection import Selection
from modekit.search.tune.space import Space
from modekit.search.tune.study import SearchJob
from refusal import refuse

FIT = {"tokens_per_domain": 400, "keep_tokens": 64, "sequence_length": 32}
SPACE = {
    "router": ["linear", "ridge", "ngram"],
    "top_k": [1, 2],
    "backbone": ["base", "average"],
    "granularity": ["token"],
    "temperature": [1.0],
    "layers": [None],
    "always_on": [None],
    "modules": ["auto"],
    "order": [2],
    "ngram_decay": [0.98],
}
WORDS = ("--trials", 8, "--tokens", 300, "--sequence-length", 32)
SOON_S = 15
PATIENCE_S = 400  # Ray takes ten seconds to start where nothing else runs, and minutes on a busy machine


def shop_in(root: Path) -> tuple[Workshop, list[object]]:
    """A workshop, and the words of its search up to where the result goes."""
    made = make_workshop(root)
    made.recipe["mixture"] = {"method": "routing", "top_k": 2, "router": {**FIT, "fit": "ridge"}}
    (root / "space.yaml").write_text(yaml.safe_dump(SPACE))
    return made, ["tune", made.write(), "--space", root / "space.yaml", *WORDS]


@pytest.mark.parametrize("address", ["10", "http://127.0.0.1:1", "ray://head", "head:0", ":6379", "head:65536"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(TuneError, match="no address of a Ray cluster"):
        check_answers(address)


@pytest.mark.parametrize("way", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "no.such.host.invalid:{}", "auto"])
def test_a_cluster_that_is_gone(
    way: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error from the command line, soon, whether or not Ray is installed; nothing is left at OUT."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setenv(ADDRESS, way.format(port))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path_factory.mktemp("ray")))
    noted = Path(os.environ["RAY_TMPDIR"]) / "ray" / "ray_current_cluster"  # by `ray start`, of a head that has died since
    noted.parent.mkdir()
    noted.write_text(f"127.0.0.1:{port}")
    _, words = shop_in(tmp_path)
    started = time.monotonic()
    said = refuse(*words, tmp_path / "OUT", "--ray")
    assert time.monotonic() - started < SOON_S
    assert "the Ray cluster does not answer" in said and f"{ADDRESS}={way.format(port)}" in said
    assert not (tmp_path / "OUT").exists()


def test_what_processes_ask_for() -> None:
    """All of them fit at once, each with as many cores as that leaves it."""

    def nodes(*resources: dict[str, float]) -> list[dict[str, object]]:
        return [{"Alive": True, "Resources": each} for each in resources]

    assert share_of(nodes({"CPU": 8}), 2) == {"num_cpus": 4}
    assert share_of(nodes({"CPU": 2}), 4) == {"num_cpus": 1}
    assert share_of(nodes({"CPU": 4}, {"CPU": 2}), 2) == {"num_cpus": 2}
    assert share_of([{"Alive": False, "Resources": {"CPU": 64}}, *nodes({"CPU": 6})], 2) == {"num_cpus": 3}
    assert share_of(nodes({"CPU": 8, "GPU": 2}, {"CPU": 64}), 3) == {"num_cpus": 2, "num_gpus": 0.5}
    assert share_of([], 2) == {"num_cpus": 1}


def test_a_machine_that_does_not_see_the_folder(tmp_path: Path) -> None:
    shop, words = shop_in(tmp_path)
    recipe = load_recipe(Path(str(words[1])))
    job = SearchJob(recipe, shop.root, tmp_path / "nowhere", Space(**SPACE), False, 8, 0, False)
    with pytest.raises(TuneError, match="does not see the search's folder") as said:
        launch._work_there(job, Selection([], [], ""), 0)
    assert str(job.work) in str(said.value.where) and said.value.remedy


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object]]:
    """A workshop in which a search has run in one process: OUT."""
    root = tmp_path_factory.mktemp("ray")
    _, words = shop_in(root)
    done = in_a_process(*words, root / "OUT")
    assert done.returncode == 0, done.stderr
    return root, words


def command(*words: object, **environment: str) -> subprocess.Popen[str]:
    """`modekit WORDS` as a user starts it, in a session by which its processes are known."""
    return subprocess.Popen(
        [sys.executable, "-m", "modekit", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**{name: value for name, value in os.environ.items() if name != ADDRESS}, **environment},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # which a job in the background ignores
    )


def in_a_process(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    process = command(*words, **environment)
    stdout, stderr = process.communicate(timeout=PATIENCE_S)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def rays(temporary: Path) -> list[str]:
    """Processes of a Ray that keeps its files in a folder."""
    return [
        line for line in subprocess.check_output(["ps", "-ewwo", "pid,args"], text=True).splitlines() if str(temporary) in line
    ]


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for Ray's files; with a short name, for its sockets."""
    with TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as folder:
        yield Path(folder)
        assert_gone(Path(folder))


def assert_gone(temporary: Path, within_s: float = 30) -> None:
    until = time.monotonic() + within_s
    while left := rays(temporary):
        assert time.monotonic() < until, left
        time.sleep(0.5)


@pytest.mark.ray
def test_ray_tries_what_one_process_does(searched: tuple[Path, list[object]], temporary: Path) -> None:
    """The same candidates in the same order with the same losses, and nothing of Ray's in what is printed."""
    root, words = searched
    done = in_a_process(*words, root / "RAY", "--ray", "--json", RAY_TMPDIR=str(temporary))
    assert done.returncode == 0, done.stderr
    assert rays(temporary) == []
    assert all(re.match(r"\d+:\d\d  \S", line) for line in done.stderr.splitlines()), done.stderr
    assert "search" in done.stderr
    one, other = (json.loads((root / name / "results" / "tune.json").read_text()) for name in ("OUT", "RAY"))
    assert json.loads(done.stdout)["candidates"] == other["candidates"]
    for field in ("number", "mixture", "status", "tokens", "active", "best"):
        assert [each[field] for each in one["candidates"]] == [each[field] for each in other["candidates"]], field
    for own, its in zip(one["candidates"], other["candidates"], strict=True):
        assert own["losses"] == pytest.approx(its["losses"], abs=1e-5)


@pytest.mark.ray
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_ray_ends_with_the_command(
    searched: tuple[Path, list[object]], temporary: Path, tmp_path: Path, ending: signal.Signals
) -> None:
    _, words = searched
    process = command(*words, tmp_path / "OUT", "--ray", RAY_TMPDIR=str(temporary))
    until = time.monotonic() + PATIENCE_S
    while not any("raylet" in line for line in rays(temporary)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.2)
    process.send_signal(ending)
    assert process.wait(60) == (130 if ending == signal.SIGINT else -ending)
    assert_gone(temporary)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray that runs already."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as folder:
        patch.delenv(ADDRESS, raising=False)
        ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="error", _temp_dir=folder)
        yield ray
        ray.shutdown()


@pytest.mark.ray
def test_a_cluster_that_is_there_is_joined_and_left(searched: tuple[Path, list[object]], cluster: Any) -> None:
    root, words = searched
    address = cluster.get_runtime_context().gcs_address
    done = in_a_process(*words, root / "JOINED", "--ray", "--processes", 2, RAY_ADDRESS=address)
    assert done.returncode == 0, done.stderr
    found = json.loads((root / "JOINED" / "results" / "tune.json").read_text())["candidates"]
    assert len(found) >= WORDS[1] and len({json.dumps(each["mixture"], sort_keys=True) for each in found}) == len(found)
    assert [node["Alive"] for node in cluster.nodes()] == [True]


@pytest.mark.ray
def test_what_a_process_raises_ends_the_search(tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own errors as they are, any other as a TuneError; a Ray of the caller's is used and left to it."""
    monkeypatch.delenv(ADDRESS, raising=False)
    shop, words = shop_in(tmp_path)
    job = SearchJob(load_recipe(Path(str(words[1]))), shop.root, tmp_path / "OUT.tuning", Space(**SPACE), False, 8, 0, False)
    nothing = Selection([], [], "")
    job.work.mkdir()
    with pytest.raises(TuneError, match="ended early") as said:
        search_on_ray(job, nothing, 2, QUIET)
    assert "ZeroDivisionError" in str(said.value.found)
    with pytest.raises(SourceError) as own:
        search_on_ray(replace(job, root=tmp_path / "nothing"), nothing, 1, QUIET)
    assert own.value.where and own.value.remedy
    assert cluster.is_initialized()
