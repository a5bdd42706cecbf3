"""The scoreboard's frame: rows are kept, a slow or a failing peer ends in a row, gaps are what they say."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from pools import tiny_pool

from modekit.demo.text import DOMAINS, UNSEEN
from peers import page
from peers.bounds import BOUNDS
from peers.choose import choose
from peers.measured import OTHER, measured, over_ours
from peers.peer import Formula, Made, Pool, Unsuitable
from peers.pool import Scored, open_pool, read_text, write_text
from peers.row import Row, path_of, run
from peers.score import counts, score, scores, texts_of


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return tiny_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture
def scored(pool: Pool) -> Scored:
    return Scored(pool, dict(pool.text))


def test_a_row_is_measured_once_and_kept(scored: Scored, tmp_path: Path) -> None:
    pool = scored.pool
    row = run(Formula("base", lambda pool, out: Made(pool.base), "bound"), scored, tmp_path, tokens=200, minutes=1)
    texts = texts_of(pool.base, pool.text, 200)
    assert row.losses == pytest.approx({name: nats for name, (nats, _) in scores(pool.base, texts, pool.base).items()})
    assert row.total == row.active == counts(pool.base)[0] and row.peak_mb > 0 and row.engines == "vLLM, llama.cpp"

    def fails(pool: Pool, out: Path) -> Made:
        raise AssertionError

    assert run(Formula("base", fails, "bound"), scored, tmp_path, tokens=200, minutes=1) == row


def test_a_row_that_another_run_makes_is_left_to_it(scored: Scored, tmp_path: Path) -> None:
    peer = Formula("base", lambda pool, out: Made(pool.base), "bound")
    path = path_of(tmp_path, peer, scored)
    path.parent.mkdir(parents=True)
    with FileLock(path.with_suffix(".lock")):
        assert run(peer, scored, tmp_path, tokens=20, minutes=1).failure == "another run makes it" and not path.exists()
    assert not run(peer, scored, tmp_path, tokens=20, minutes=1).failure and path.exists()


def test_why_there_is_no_row_stands_in_the_row(scored: Scored, tmp_path: Path) -> None:
    def unsuitable(pool: Pool, out: Path) -> Made:
        raise Unsuitable("needs equal ranks")

    def broken(pool: Pool, out: Path) -> Made:
        raise ValueError("what")

    def slow(pool: Pool, out: Path) -> Made:
        time.sleep(60)
        raise AssertionError

    found = [
        run(Formula(f.__name__, f, "test"), scored, tmp_path, tokens=20, minutes=0.02 if f is slow else 1).failure
        for f in (unsuitable, broken, slow)
    ]
    assert found == ["needs equal ranks", "ValueError: what", "took more than 0.02 minutes"]
    other = Formula("adapters alone", broken, "test", frozenset({"adapters"}))
    assert run(other, scored, tmp_path, tokens=20, minutes=1).failure == "not for these experts"
    assert not path_of(tmp_path, other, scored).exists()


def test_a_row_that_was_stopped_is_made_the_next_time(scored: Scored, tmp_path: Path) -> None:
    def stopped(pool: Pool, out: Path) -> Made:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError

    peer = Formula("stopped", stopped, "test")
    assert run(peer, scored, tmp_path, tokens=20, minutes=1).failure == "exit code -15"
    assert not path_of(tmp_path, peer, scored).exists()


def test_a_speaker_scores_as_the_model_that_it_wraps(pool: Pool) -> None:
    texts = texts_of(pool.base, pool.text, 200)

    class Wrapped:
        def logits(self, ids_BS: torch.Tensor) -> torch.Tensor:
            assert len(ids_BS) == 1
            from transformers import AutoModelForCausalLM

            return AutoModelForCausalLM.from_pretrained(pool.base)(ids_BS).logits

    for sequences in texts.values():
        assert score(Wrapped(), sequences) == pytest.approx(scores(pool.base, {"x": sequences}, pool.base)["x"], abs=1e-5)


def test_a_knob_is_chosen_by_the_select_split(pool: Pool) -> None:
    only_b = replace(pool, select={"b": pool.select["b"]})
    name, made = choose(only_b, list(pool.whole), lambda name: Made(pool.whole[name]))
    assert name == "b" and made.model == pool.whole["b"]


def _row(peer: str, a: float, b: float, music: float, seed: int = 0) -> Row:
    accuracy = {"a": 0.2, "b": 0.2, "music": 0.2}
    return Row(peer, "s", "full", seed, {"a": a, "b": b, "music": music}, accuracy, 8, 4, 16, 1.0, 2.0, 3.0, "vLLM", "")


def test_gaps_shares_and_bold() -> None:
    rows = [
        _row("base", 4.0, 3.0, 2.0),
        _row("own expert (oracle)", 3.0, 1.0, 2.0),
        _row("modekit, plain checkpoint", 3.5, 2.0, 2.0),
        _row("better", 3.25, 1.5, 3.0),
        _row("worse", 4.0, 3.0, 2.0),
        _row("worse", 5.0, 3.0, 2.0, seed=1),  # without a base of that seed
    ]
    peers = measured(rows, "full")
    assert peers["better"].gaps() == [0.75] and over_ours(peers, "better") == 0.25
    assert peers["better"].unseen() == 1.5
    assert peers["worse"].share() == pytest.approx((2.718281828**-1 + 2.718281828**-2) / 2)
    first, second = page.table(rows, "full").split("\n\n")
    order = ["**own expert (oracle)**", "**better**", "**modekit, plain checkpoint**", "base", "worse"]
    assert [line.split(" | ")[0] for line in first.splitlines()[2:]] == [f"| {name}" for name in order]
    assert "| **better** | **0.750** | +0.250 | 0.75, 0.75 | 1.500 |" in first
    assert "| worse | s | 1.00 | 0.0 | 1 | 2 | 3.00 |  |" in second


def test_the_page_is_written_between_its_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "PAGE", tmp_path / "scoreboard.md")
    monkeypatch.setattr(page, "ROWS", tmp_path / "kept" / "rows.jsonl")
    page.PAGE.write_text("# Page\n<!-- full -->\nold\n<!-- end -->\nprose\n<!-- failures -->\n<!-- end -->\n")
    folder = tmp_path / "results" / "full-seed0"
    folder.mkdir(parents=True)
    rows = [_row("base", 4.0, 3.0, 2.0), _row("own expert (oracle)", 3.0, 1.0, 2.0), replace(_row("x", 1, 1, 1), failure="why")]
    for row in rows:
        (folder / f"{row.peer}.json").write_text(json.dumps(row.__dict__))
    other = tmp_path / "other" / "full-seed1"
    other.mkdir(parents=True)
    (other / "base.json").write_text(json.dumps(_row("base", 4.0, 3.0, 2.0, seed=1).__dict__))
    alone = tmp_path / "other" / "adapters-seed0"  # nothing but a row that failed
    alone.mkdir()
    (alone / "x.json").write_text(json.dumps(replace(_row("x", 1, 1, 1), kind="adapters", failure="why").__dict__))
    page.ROWS.parent.mkdir()
    before = [_row("gone", 1, 1, 1), *(replace(row, kind="ffn") for row in rows[:2])]
    page.ROWS.write_text("".join(json.dumps(row.__dict__) + "\n" for row in before))
    page.write_page([tmp_path / "results", tmp_path / "other"])
    text = page.PAGE.read_text()
    assert "old" not in text and "prose" in text and "own expert" in text and "| x | adapters 0, full 0 | why |" in text
    kept = [json.loads(line) for line in page.ROWS.read_text().splitlines()]
    assert [row["kind"] for row in kept] == ["adapters"] + ["ffn"] * 2 + ["full"] * 4 and "gone" not in {
        row["peer"] for row in kept
    }


@pytest.fixture
def folder(pool: Pool, tmp_path: Path) -> Path:
    """What whole.py leaves, of the tiny models."""
    (tmp_path / "seed0").mkdir()
    for name in ("base", *(f"full-{domain}" for domain in DOMAINS)):
        (tmp_path / "seed0" / name).symlink_to(pool.base)
    for name in (*DOMAINS, UNSEEN):
        write_text([f"{name} {number}" for number in range(60)], tmp_path / "text" / f"{name}.jsonl")
    return tmp_path


def test_a_pool_keeps_the_report_split_from_peers(folder: Path) -> None:
    scored = open_pool(folder, "full", 0, folder / "out")
    for name in DOMAINS:
        parts = [read_text(each[name]) for each in (scored.pool.text, scored.pool.select, scored.report)]
        assert sum(map(len, parts)) == 60 == len({*parts[0], *parts[1], *parts[2]}) and all(parts)
    assert len(read_text(scored.report[UNSEEN])) == 60


def test_the_best_other_expert_is_never_ones_own(pool: Pool) -> None:
    made = next(peer for peer in BOUNDS if peer.name == OTHER).make(pool, Path())
    assert made.model == {"a": pool.whole["b"], "b": pool.whole["a"]}
