"""Rows and figures of benchmarks/taxonomy.md: a gate is built and trained; closed forms; the page has what was kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from pools import tiny_pool

import taxonomy
from peers.claims import COLLAPSED, EVEN, EXPERTS, NOT_NORMALISED, UPCYCLED, balance, upcycled
from peers.gates import LEARNT, SET, Gate
from peers.peer import Pool
from peers.score import texts_of


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    folder = tmp_path_factory.mktemp("pool")
    made = tiny_pool(folder / "seed0")
    return replace(made, kind="ffn")


@pytest.mark.parametrize(
    "gate",
    [
        Gate("dense", "", {"method": "gating", "router": {"fit": "random"}}),
        Gate(
            "trained",
            "",
            {"top_k": 2, "router": {"fit": "random"}},
            {"steps": 2, "evaluate_every": 1, "losses": {"z": 1.0}},
        ),
    ],
    ids=lambda gate: gate.name,
)
def test_a_gate_is_made_and_its_load_is_a_share(pool: Pool, tmp_path: Path, gate: Gate) -> None:
    assert not gate.missing()
    made = gate.make(pool, tmp_path)
    assert isinstance(made.model, Path) and 1 / 2 <= made.load <= 1


def test_what_this_version_lacks_is_said() -> None:
    assert "mixture.topk" in Gate("typo", "", {"topk": 2}).missing()
    assert "balanced" in Gate("typo", "", {}, {"losses": {"balanced": 1.0}}).missing()


def test_every_row_has_a_name_of_its_own() -> None:
    names = [gate.name for gate in (*SET, *LEARNT)]
    assert len(set(names)) == len(names)


def test_the_balance_loss_is_one_when_even_and_the_number_of_experts_when_collapsed() -> None:
    assert balance() == pytest.approx({COLLAPSED: EXPERTS, EVEN: 1})


def test_copies_are_the_dense_model_where_weights_are_normalised(pool: Pool, tmp_path: Path) -> None:
    found = upcycled(pool, texts_of(pool.base, pool.text, 200), tmp_path)
    assert abs(found[UPCYCLED]) < 1e-5 < abs(found[NOT_NORMALISED])


def test_the_page_has_the_rows_that_were_kept() -> None:
    page = taxonomy.PAGE.read_text(encoding="utf-8")
    for line in taxonomy.KEPT.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert row["failure"] or f"| {row['peer']} | " in page or f"| **{row['peer']}** | " in page
