"""N-gram routers: what is counted, what the table says, and that decisions are causal and exact."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import DOMAINS, Workshop, logits_of
from generated import check_generation
from modekit.architecture.modekit_router import ngram_rows
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from modekit.checkpoint.record import STATISTICS_FOLDER
from modekit.errors import RecipeError
from modekit.loaded.load import load_model
from modekit.routing.ngram import load_ngram_statistics
from modekit.routing.refit import refit
from modekit.text.held_out import fit_documents
from modekit.text.sequences import encode

ROUTER: dict[str, Any] = {"fit": "ngram", "buckets": 4096}


def build(workshop: Workshop, name: str = "NGRAM", **changes: Any) -> Checkpoint:
    mixture = {"method": "routing", "top_k": 2, **changes, "router": {**ROUTER, **changes.get("router", {})}}
    return open_checkpoint(workshop.build(name, mixture=mixture))


@pytest.fixture(scope="module")
def checkpoint(shared_workshop: Workshop) -> Checkpoint:
    return build(shared_workshop)


def rows(ids: list[int], order: int = 2, buckets: int = 997) -> list[int]:
    tensor = torch.tensor([ids])
    return ngram_rows(tensor, torch.ones_like(tensor), None, order, buckets)[0][0].tolist()


def test_a_row_depends_on_the_newest_tokens_alone() -> None:
    assert rows([5, 6, 7])[2] == rows([9, 9, 6, 7])[3]
    assert rows([5, 6, 7])[2] != rows([5, 8, 7])[2]
    assert rows([5, 6, 7], order=1)[2] == rows([1, 7], order=1)[1]
    assert rows([7])[0] != rows([5, 7])[1]  # a text's first token has nothing before it
    assert rows([0, 1])[1] != rows([1])[0]  # token 0 is a token


@pytest.mark.parametrize("order", [1, 2, 3])
def test_pads_on_either_side_and_passes_in_pieces_change_no_row(order: int) -> None:
    ids = torch.tensor([[7, 3, 9, 4, 3, 9]])
    whole = rows(ids[0].tolist(), order)
    for before, behind in ((3, 0), (0, 2), (2, 1)):
        padded = torch.nn.functional.pad(ids, (before, behind))
        mask = torch.nn.functional.pad(torch.ones_like(ids), (before, behind))
        got, state = ngram_rows(padded, mask, None, order, 997)
        assert got[0, before : before + 6].tolist() == whole
        more, _ = ngram_rows(torch.tensor([[5]]), torch.ones((1, 1), dtype=torch.int64), state, order, 997)
        assert more[0].tolist() == rows([*ids[0].tolist(), 5], order)[-1:]
    state, pieces = None, []
    for token in ids[0]:
        got, state = ngram_rows(token.reshape(1, 1), torch.ones((1, 1), dtype=torch.int64), state, order, 997)
        pieces += got[0].tolist()
    assert pieces == whole


def test_the_table_is_naive_bayes_over_the_counted_ngrams(checkpoint: Checkpoint) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    counts = []
    for place, expert in enumerate(checkpoint.record.recipe.experts):
        own: Counter[int] = Counter()
        for document in fit_documents(expert, checkpoint.recipe_root, place):
            for sequence in encode(tokenizer, [document], max_tokens=10**9, sequence_length=512):
                own.update(rows(list(sequence.ids), 2, 4096))
        counts.append(own)
    gate = load_model(checkpoint.folder).get_parameter(checkpoint.slots[0].name).detach()
    seen = sorted(set().union(*counts))[:200]
    expected = torch.tensor([[math.log((own[row] + 0.5) / (sum(own.values()) + 0.5 * 4096)) for row in seen] for own in counts])
    expected = expected - expected.mean(0)
    scale = gate[:, seen].norm() / expected.norm()
    assert torch.allclose(gate[:, seen], expected * scale, atol=1e-4)
    assert 1 / 512 < float(scale) < 8


def test_the_right_expert_is_named_for_held_out_text(checkpoint: Checkpoint) -> None:
    model = load_model(checkpoint.folder)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    said: dict[str, torch.Tensor] = {}
    model.base_model.flow.listener = lambda place, logits: said.update({place: logits})
    for expert, text in enumerate(["99 fever artery lesion nerve", "99 licence clause party court", "99 def return self"]):
        model(input_ids=tokenizer(text, return_tensors="pt").input_ids)
        (logits,) = said.values()
        assert int(logits[0, -1].argmax()) == expert, DOMAINS[expert]


def test_generation_padding_and_beams_equal_the_full_pass(checkpoint: Checkpoint) -> None:
    check_generation(checkpoint.folder)


def test_it_opens_without_modekit_and_is_proven(checkpoint: Checkpoint, ids: torch.Tensor) -> None:
    assert is_proven(verify(checkpoint))
    trusted = AutoModelForCausalLM.from_pretrained(checkpoint.folder, trust_remote_code=True, dtype=torch.float32).eval()
    with torch.inference_mode():
        assert torch.allclose(trusted(input_ids=ids).logits, logits_of(checkpoint.folder, ids), atol=1e-5)
        trusted.use_expert("law")
        assert torch.allclose(trusted(input_ids=ids).logits, expert_in_base(checkpoint.recipe_root, "law", ids), atol=1e-4)


def expert_in_base(root: Path, name: str, ids: torch.Tensor) -> torch.Tensor:
    """The base with one expert's FFN, by hand."""
    base = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32).eval()
    own = AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.float32)
    base.load_state_dict({key: value for key, value in own.state_dict().items() if ".mlp." in key}, strict=False)
    return logits_of(base, ids)


def test_embeddings_in_place_of_ids_are_refused(checkpoint: Checkpoint) -> None:
    model = load_model(checkpoint.folder)
    with pytest.raises(ValueError, match="reads token ids"):
        model(inputs_embeds=torch.randn(1, 4, 32))


def test_whole_models_are_mixed_token_by_token(workshop: Workshop, ids: torch.Tensor) -> None:
    checkpoint = build(workshop, "ALL", modules="all")
    assert is_proven(verify(checkpoint))
    model = load_model(checkpoint.folder)
    for name in DOMAINS:
        model.use_expert(name)
        assert torch.allclose(logits_of(model, ids), logits_of(workshop.root / name, ids), atol=1e-4)


def test_a_second_fit_reads_kept_counts_and_needs_no_text(workshop: Workshop) -> None:
    checkpoint = build(workshop)
    before = checkpoint.gates()[0]
    kept = load_ngram_statistics(checkpoint.folder / STATISTICS_FOLDER / "law.safetensors")
    assert kept is not None and int(kept.counts_H.sum()) == kept.tokens
    for path in (workshop.root / "text").glob("*"):
        path.unlink()
    same = refit(checkpoint, {"router": {"temperature": 1.0}})
    np.testing.assert_allclose(same.gates()[0], before, rtol=0, atol=1e-5 * abs(before).max())
    softer = refit(same, {"router": {"temperature": 2.0}})
    np.testing.assert_allclose(softer.gates()[0], before / 2, rtol=0, atol=1e-5 * abs(before).max())
    assert is_proven(verify(open_checkpoint(softer.folder)))


def test_the_same_recipe_gives_the_same_bytes(workshop: Workshop) -> None:
    first, second = build(workshop, "ONE"), build(workshop, "TWO")
    for path in sorted(first.folder.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (second.folder / path.relative_to(first.folder)).read_bytes(), path.name


def test_a_refit_keeps_what_it_was_not_asked_to_change(workshop: Workshop) -> None:
    checkpoint = build(workshop, router={"decay": [0.5], "smoothing": 0.1, "order": 1})
    changed = refit(checkpoint, {"router": {"temperature": 2.0}})
    settings = changed.record.recipe.mixture.router
    assert (settings.decay, settings.smoothing, settings.order) == ([0.5], 0.1, 1)
    assert open_checkpoint(changed.folder).config["modekit"]["routing"]["averages"] == [{"decay": 0.5, "sum": True}]


@pytest.mark.parametrize(
    ("router", "words"),
    [
        ({"granularity": "context"}, "reads the tokens so far by itself"),
        ({"per": "projection"}, "one decision for the whole model"),
        ({"decay": [0.9, 1.0]}, "one decay"),
        ({"l2": 0.1}, "'l2' has no effect with fit: ngram"),
        ({"buckets": 1}, "greater than or equal to 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(workshop: Workshop, router: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        build(workshop, router=router)


def test_without_kept_tokens_the_temperature_is_a_fixed_one(workshop: Workshop) -> None:
    checkpoint = build(workshop, router={"keep_tokens": 0})
    kept = load_ngram_statistics(checkpoint.folder / STATISTICS_FOLDER / "law.safetensors")
    assert kept is not None and kept.lengths == () and kept.tokens > 0
    assert is_proven(verify(checkpoint))
