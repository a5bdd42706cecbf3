"""Whole models and whole decoders as experts: their own logits bit for bit, and a common expert beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from conftest import Workshop
from generated import check_generation
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import ModekitError
from modekit.loaded.load import load_model
from modekit.loaded.shapes import mixture_of
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe, read_recipe

NGRAM = {"fit": "lexical", "orders": [1, 2], "buckets": 512}
COMMON = {"always_on": {"expert": "base", "weight": 0.5, "apart": True}}


def mixture(workshop: Workshop, **said: object) -> Path:
    return workshop.build(mixture={"top_k": 1, "router": NGRAM, **said})


def test_experts_of_whole_decoders_share_the_bases_embedding_and_head(workshop: Workshop) -> None:
    folder = mixture(workshop, modules="decoder")
    checkpoint = open_checkpoint(folder)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= checkpoint.tensors.keys()
    assert not any("embed_tokens." in name and ".experts." in name for name in checkpoint.tensors)
    model, base, law = (load_model(each) for each in (folder, workshop.root / "base", workshop.root / "law"))
    law.model.embed_tokens, law.lm_head = base.model.embed_tokens, base.lm_head
    ids = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), mixture_of(model, checkpoint).forced(1):
        assert torch.equal(model(input_ids=ids).logits, law(input_ids=ids).logits)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "router",
    [NGRAM, {"fit": "random", "granularity": "sequence", "per": "model", "prefix": 4}],
    ids=["tokens", "hidden states"],
)
def test_text_is_generated_with_a_common_expert_as_one_pass_says(workshop: Workshop, router: dict[str, Any]) -> None:
    """Left padding, batches, beams: the cache has two rows for every sequence."""
    check_generation(mixture(workshop, modules="decoder", router=router, **COMMON))


def test_a_common_expert_beside_ffn_experts_with_a_router_in_every_layer(workshop: Workshop) -> None:
    check_generation(workshop.build(mixture={"top_k": 2, "router": {"fit": "random"}, **COMMON}))


def test_a_cache_is_not_read_with_another_number_of_streams(workshop: Workshop) -> None:
    folder = mixture(workshop, modules="decoder", **COMMON)
    model = load_model(folder)
    ids = AutoTokenizer.from_pretrained(folder)("fever artery", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        model.use_expert(0)
        with pytest.raises(ValueError, match="common expert"):
            model(input_ids=ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({"modules": "decoder", "always_on": {"expert": "law", "weight": 0.5, "apart": True}}, "is the base with a weight"),
        ({"modules": "all", **COMMON}, "another word than modules: all"),
        ({"modules": "decoder", "backbone": "average", **COMMON}, "backbone: base"),
        ({"modules": "decoder", "router": {"fit": "logistic"}}, "before the first layer"),
    ],
)
def test_what_whole_decoders_cannot_be_is_said(workshop: Workshop, said: dict[str, Any], wanted: str) -> None:
    recipe = workshop.write(mixture={"router": NGRAM, **said})
    with pytest.raises(ModekitError, match=wanted):
        make_plan(parse_recipe(read_recipe(recipe)), workshop.root)
