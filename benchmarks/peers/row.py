"""A row of the scoreboard: made and scored in a process of its own, and kept on the disk."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from peers.peer import Peer, Unsuitable
from peers.pool import Scored
from peers.score import engines, milliseconds_per_token, scores, size, texts_of


@dataclass(frozen=True)
class Row:
    """What was measured of one peer on one pool; `failure`: why there is nothing.

    Attributes:
        losses: text -> nats per token.
        accuracy: text -> share of tokens that are the likeliest.
        nbytes: of what is kept, at two bytes a parameter unless the peer says otherwise.
        seconds: of a processor, to make it.
        peak_mb: resident memory while it was made, in MB; Python and torch take some 500 of it.
        ms_per_token: of a forward pass in transformers.
        load: largest share of an expert, as the peer says; 0: it does not.
    """

    peer: str
    source: str
    kind: str
    seed: int
    losses: dict[str, float] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)
    total: int = 0
    active: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    peak_mb: float = 0.0
    ms_per_token: float = 0.0
    engines: str = ""
    note: str = ""
    failure: str = ""
    load: float = 0.0


def path_of(results: Path, peer: Peer, scored: Scored) -> Path:
    """Where its row is kept."""
    name = re.sub(r"[^a-z0-9]+", "-", peer.name.lower()).strip("-")
    return results / f"{scored.pool.kind}-seed{scored.pool.seed}" / f"{name}.json"


def read_rows(results: Path) -> list[Row]:
    """All that are there."""
    return [_kept(path) for path in sorted(results.glob("*-seed*/*.json"))]


def run(peer: Peer, scored: Scored, results: Path, *, tokens: int, minutes: float) -> Row:
    """The row that is there, or a new one, unless another run makes it right now."""
    path, pool = path_of(results, peer, scored), scored.pool
    blank = Row(peer.name, peer.source, pool.kind, pool.seed)
    if pool.trained not in peer.kinds:
        return Row(**{**asdict(blank), "failure": "not for these experts"})
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path.with_suffix(".lock"), timeout=0):
            return _kept(path) if path.exists() else _made(peer, scored, path, blank, tokens, minutes)
    except Timeout:
        return Row(**{**asdict(blank), "failure": "another run makes it"})


def _made(peer: Peer, scored: Scored, path: Path, blank: Row, tokens: int, minutes: float) -> Row:
    """A new row, kept at `path`; a process that takes longer is killed with all that it started."""
    try:
        peer.prepare(scored.pool.environments)
    except Unsuitable as error:
        _write(Row(**{**asdict(blank), "failure": str(error)}), path)
        return _kept(path)
    child = multiprocessing.get_context("fork").Process(target=_measure, args=(peer, scored, path, blank, tokens))
    child.start()
    child.join(60 * minutes)
    slow = child.is_alive()
    if child.pid is not None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # a row that has ended may leave the process of a package
    child.join()
    if not path.exists():
        how = f"took more than {minutes:g} minutes" if slow else f"exit code {child.exitcode}"
        ended = Row(**{**asdict(blank), "failure": how})
        if child.exitcode is not None and child.exitcode < 0 and not slow:
            return ended  # somebody stopped it: the next run makes the row
        _write(ended, path)
    return _kept(path)


def _kept(path: Path) -> Row:
    return Row(**json.loads(path.read_text(encoding="utf-8")))


def _measure(peer: Peer, scored: Scored, path: Path, blank: Row, tokens: int) -> None:
    """Make, score and write; runs in a process group of its own."""
    os.setsid()
    out = path.with_suffix("")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    said = asdict(blank)
    try:
        before, wall = processor_seconds(), time.perf_counter()
        made = peer.make(scored.pool, out)
        said |= {"seconds": processor_seconds() - before, "peak_mb": _peak_mb(), "note": made.note, "load": made.load}
        texts = texts_of(scored.pool.base, scored.report, tokens)
        for name, (nats, right) in scores(made.model, texts, scored.pool.base).items():
            said["losses"][name], said["accuracy"][name] = nats, right
        said |= {"ms_per_token": milliseconds_per_token(made.model, texts)}
        said |= {**asdict(size(made)), "engines": engines(made)}
        print(f"{path.parent.name} {peer.name}: {time.perf_counter() - wall:.0f} s", flush=True)
    except Unsuitable as error:
        said["failure"] = str(error)
    except Exception as error:
        traceback.print_exc()
        said["failure"] = f"{type(error).__name__}: {error}"[:300]
    _write(Row(**said), path)
    shutil.rmtree(out, ignore_errors=True)


def _write(row: Row, path: Path) -> None:
    path.with_suffix(".part").write_text(json.dumps(asdict(row), indent=1), encoding="utf-8")
    path.with_suffix(".part").rename(path)


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _peak_mb() -> float:
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
