"""Experts come to trained mixtures, and go: what the training made of those who stay is as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from conftest import Workshop
from modekit.building.build import build
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import RecipeError
from modekit.members.change import before_change, write_change
from modekit.members.edits import NewExpert, add_expert, remove_expert
from modekit.routing.inputs import load_statistics
from modekit.training.settings import TrainSettings, checked_settings
from modekit.training.train import train

pytestmark = pytest.mark.usefixtures("short_tables")

SHORT = {"tokens_per_domain": 200, "keep_tokens": 64, "sequence_length": 32}
STEPS = {"steps": 4, "batch_tokens": 256, "sequence_length": 64, "select_tokens": 200}


def trained(bench: Workshop, router: dict[str, Any], names: int, output: str = "plain", **settings: Any) -> Checkpoint:
    """A mixture of the first experts, trained until it is better."""
    experts = bench.recipe["experts"][:names]
    out = bench.build(experts=experts, mixture={"top_k": 2, "router": router}, output={"format": output})
    asked = checked_settings({**STEPS, **settings}, TrainSettings, where="test")
    assert train(open_checkpoint(out), asked, evaluate_tokens=None).improved
    return open_checkpoint(out)


def code(bench: Workshop) -> NewExpert:
    said = bench.recipe["experts"][2]
    return NewExpert({key: said[key] for key in ("model", "text")}, bench.root)


@pytest.mark.parametrize("output", ["plain", "modekit"])
def test_rows_that_were_trained_stay_and_the_new_one_is_fitted(bench: Workshop, output: str) -> None:
    before = trained(bench, {"fit": "logistic", **SHORT}, 2, output, what=["routers"], learning_rate=0.2)
    assert before.record.router.status == "trained"
    added = write_change(before, add_expert(before, "code", code(bench)), bench.root / "added")
    assert added.record.router.status == "trained" and added.record.training == before.record.training
    text = load_statistics(added.folder / "router" / "code.safetensors")
    assert text is not None
    for number, (ours, theirs) in enumerate(zip(before.gates(), added.gates(), strict=True)):
        assert np.array_equal(theirs[:2], ours)
        logits = text.slots[number].sample_ND.float().numpy() @ theirs.T
        assert (logits.argmax(1) == 2).mean() > 0.8  # what its router reads of its text goes to the new expert
    removed = write_change(added, remove_expert(added, "code"), bench.root / "removed")
    assert all(np.array_equal(*pair) for pair in zip(removed.gates(), before.gates(), strict=True))
    assert removed.record.router.status == "trained"
    assert is_proven(verify(open_checkpoint(added.folder), reload=False))


@pytest.mark.parametrize("output", ["plain", "modekit"])
def test_trained_experts_stay_as_they_are(bench: Workshop, output: str) -> None:
    before = trained(bench, {"fit": "random"}, 2, output, what=["experts"], backbone_learning_rate=0.05)
    assert before.record.trained
    added = write_change(before, add_expert(before, "code", code(bench)), bench.root / "added")
    assert added.record.trained == before.record.trained
    assert is_proven(verify(open_checkpoint(added.folder), reload=False))
    removed = write_change(added, remove_expert(added, "medicine"), bench.root / "removed")
    was = sorted(digest for name, digest in before.record.trained.items() if ".experts.1." in name)
    assert sorted(removed.record.trained.values()) == was and was
    assert is_proven(verify(open_checkpoint(removed.folder), reload=False))


def test_a_router_that_is_set_as_a_whole_is_not_patched(bench: Workshop) -> None:
    pairs = {"fit": "lexical", "orders": [1, 2], "buckets": 512}
    before = trained(bench, pairs, 2, "modekit", what=["routers"], learning_rate=0.05)
    with pytest.raises(RecipeError, match="--refit"):
        write_change(before, add_expert(before, "code", code(bench)), bench.root / "added")
    change = before_change(before, add_expert(before, "code", code(bench)), refits=True)
    added = build(change.plan, bench.root / "added", update=change)
    assert added.record.router.status == "fitted" and added.names == ["medicine", "law", "code"]
    three = trained(bench, pairs, 3, "modekit", what=["routers"], learning_rate=0.05)
    removed = write_change(three, remove_expert(three, "law"), bench.root / "removed")
    (ours,), (theirs,) = three.gates(), removed.gates()
    assert np.array_equal(theirs, ours[[0, 2]])
