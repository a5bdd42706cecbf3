"""Checkpoints that wrap a language model: read as transformers reads them, and mixed as if the language model lay alone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import rename_source_key, revert_weight_conversion

from adapter_folders import quiet
from conftest import SMALL, logits_of, save
from generated import check_generation
from modekit.building.build import build
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.checkpoint import open_checkpoint
from modekit.errors import ModekitError
from modekit.loaded.experts import load_expert
from modekit.loaded.load import load_model
from modekit.loaded.shapes import mixture_of
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.sources.model import open_source
from modekit.sources.wrappers import WRAPPERS, plain_names
from wrapped_models import WRAPPED, save_wrapped, text_model, wrapped_config, wrapped_model

RANDOM = {"method": "routing", "top_k": 1, "router": {"fit": "random"}}
FULL, ADAPTERS = ("full", "full text"), ("lora", "lora text", "lora old")


def test_every_wrapper_has_a_case() -> None:
    held = {(kind, said["text_config"]["model_type"]) for kind, said in WRAPPED.values()}
    assert held == {(kind, text) for kind, texts in WRAPPERS.items() for text in texts}


@pytest.mark.parametrize("case", WRAPPED)
def test_names_mean_what_transformers_says(case: str) -> None:
    """By its own tables: names as it writes them, and those that it reads as well."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(wrapped_config(case, tie_word_embeddings=False))
        alone = AutoModelForCausalLM.from_config(model.config.get_text_config()).state_dict().keys()
    written = revert_weight_conversion(model, model.state_dict())
    names = plain_names(written, where="model")
    assert names.keys() == alone
    tables = get_model_conversion_mapping(model)
    inside = {name: rename_source_key(named, tables, [])[0] for name, named in names.items()}
    assert set(inside.values()) <= model.state_dict().keys()
    assert inside["model.embed_tokens.weight"] == "model.language_model.embed_tokens.weight"
    assert plain_names(inside.values(), where="model") == inside  # in memory, and so in PEFT's files


def changed(model: PreTrainedModel, parts: str, seed: int) -> PreTrainedModel:
    """Fine-tuned, as it were, in the parts of its language model that a pattern names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(parts, name) and "vision" not in name and "visual" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def adapter(model: PreTrainedModel, folder: Path, seed: int = 3, **said: Any) -> Path:
    """A LoRA that PEFT makes and saves."""
    with quiet():
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, **said))
        changed(adapted, "lora_B", seed)
        adapted.save_pretrained(folder)
    return folder


def renamed(adapter: Path, folder: Path) -> Path:
    """The same under the names of older versions of transformers, and trained on a 4-bit twin of the base."""
    shutil.copytree(adapter, folder)
    old, new = "model.language_model.", "language_model.model."
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name.replace(old, new): each for name, each in tensors.items()}, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "unsloth/base-unsloth-bnb-4bit", "rank_pattern": {f"{new}layers.0.mlp.up_proj": 3}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=WRAPPED)
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wrapper, its language model alone, fine-tunes and adapters of both."""
    root, case = tmp_path_factory.mktemp("wrapped"), request.param
    save_wrapped(case, root / "base")
    save(text_model(wrapped_model(case)), root / "base text")
    save(changed(wrapped_model(case), r"\.mlp\.", 1), root / "full")
    save(changed(text_model(wrapped_model(case)), r"\.mlp\.", 2), root / "full text")
    pattern = r".*language_model.*\.(q_proj|up_proj)"
    adapter(wrapped_model(case), root / "lora", target_modules=pattern)
    adapter(text_model(wrapped_model(case)), root / "lora text", target_modules=["o_proj", "down_proj"])
    renamed(root / "lora", root / "lora old")
    return root


def built(root: Path, base: str, names: tuple[str, ...], out: str, **mixture: Any) -> Path:
    experts = [{"name": name.replace(" ", "-"), "adapter" if "lora" in name else "model": f"./{name}"} for name in names]
    recipe = parse_recipe({"base_model": f"./{base}", "experts": experts, "mixture": {**RANDOM, **mixture}})
    plan = make_plan(recipe, root)
    assert any("only the language model is mixed" in note for note in plan.notes)
    build(plan, root / out)
    assert is_proven(verify(open_checkpoint(root / out)))
    return root / out


def own(root: Path, name: str) -> PreTrainedModel:
    """An expert in transformers, with PEFT where it is an adapter: the wrapper itself, or its language model alone."""
    kind = AutoModelForCausalLM if name.endswith("text") else AutoModelForImageTextToText
    if "lora" not in name:
        return kind.from_pretrained(root / name).eval()
    base = kind.from_pretrained(root / ("base text" if name.endswith("text") else "base"))
    with quiet():
        return peft.PeftModel.from_pretrained(base, root / name.replace("old", "").strip()).eval()


@pytest.mark.parametrize("base", ["base", "base text"])
def test_one_recipe_of_every_form(shop: Path, ids: torch.Tensor, base: str) -> None:
    """Whole fine-tunes and adapters, of the wrapper and of its language model, over either."""
    folder = built(shop, base, (*FULL, *ADAPTERS), f"OUT {base}")
    model, checkpoint = load_model(folder), open_checkpoint(folder)
    ids = ids.clamp(max=89)  # the tokens of pictures are none of text
    before = logits_of(own(shop, "base"), ids)
    for place, name in enumerate((*FULL, *ADAPTERS)):
        expected = logits_of(own(shop, name), ids)
        assert not torch.allclose(expected, before, atol=1e-2)
        with mixture_of(model, checkpoint).forced(place):
            found = logits_of(model, ids)
        torch.testing.assert_close(found, expected, atol=0 if name in FULL else 1e-4, rtol=0)
        alone = logits_of(load_expert(shop / base, shop / name), ids)
        torch.testing.assert_close(alone, expected, atol=0 if name in FULL else 1e-4, rtol=0)


def test_text_is_generated_as_in_one_pass(shop: Path) -> None:
    """With a cache, left padding, beams; the routers' averages are of all tokens, whichever a layer is given."""
    router = {"fit": "random", "granularity": "context", "decay": [0.5], "seed": 1}
    check_generation(built(shop, "base", ("full", "lora"), "TEXT", router=router))
