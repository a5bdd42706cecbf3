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
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import rename_source_key, revert_weight_conversion

from adapter_folders import quiet
from conftest import logits_of, save
from generated import check_generation
from modekit.building.build import build
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import ModekitError
from modekit.loaded.experts import load_expert
from modekit.loaded.load import load_model
from modekit.loaded.shapes import mixture_of
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.sources.adapter import open_adapter
from modekit.sources.compatible import MUST_MATCH, _plain, check_values
from modekit.sources.families import family_of
from modekit.sources.source import open_source
from modekit.sources.towers import WRAPPERS, plain_names, text_config
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
        adapted.save_pretrained(str(folder))
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
    pattern = (  # as Unsloth writes it
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|up_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:q_proj|up_proj)))"
    )
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


@pytest.mark.parametrize("case", WRAPPED)
def test_what_stays_behind_is_said(case: str, tmp_path: Path) -> None:
    """Tower, heads that predict further tokens; and what an adapter changes of a tower."""
    model = wrapped_model(case)
    save(model, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    extra = {"mtp.fc.weight": torch.zeros(4, 8)}
    save_file({**tensors, **extra}, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    tower = {"qwen3_5": r"visual.*\.qkv", "gemma4": "embed_vision.*projection"}.get(case.split()[0], r"vision_tower.*\.q_proj")
    adapter(model, tmp_path / "lora", target_modules=rf".*(language_model.*\.up_proj|{tower})")
    recipe = parse_recipe({"base_model": "./base", "experts": [{"name": "law", "adapter": "./lora"}], "mixture": RANDOM})
    plan = make_plan(recipe, tmp_path)
    base, law = (note for note in plan.notes if note.endswith("stay behind"))
    assert base.startswith("base_model: only the language model is mixed") and "mtp" in base
    assert law.startswith("experts[0] 'law'") and re.search("visual|vision", law)
    assert set(plan.source_states) == {tmp_path / "base" / "model.safetensors", tmp_path / "lora" / "adapter_model.safetensors"}


OLD_GEMMA3 = {
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize("case", [*WRAPPED, "as Gemma 3 was published"])
def test_a_silent_config_means_what_transformers_takes_it_for(case: str) -> None:
    """Settings that equal their class's defaults are left out, and rotary settings may be those of old versions."""
    silent: dict[str, Any] = OLD_GEMMA3
    if case in WRAPPED:
        full = wrapped_config(case).to_dict()
        text = full["text_config"]
        class_says = AutoConfig.for_model(text["model_type"]).to_dict()
        sizes = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "model_type"}
        said = {key: value for key, value in text.items() if key in sizes or value != class_says.get(key, ...)}
        silent = {"model_type": full["model_type"], "text_config": said}
    full = AutoConfig.for_model(**silent).to_dict()
    ours, theirs = (text_config(each, ["lm_head.weight"], where="model") for each in (silent, full))
    family = family_of(ours, where="model")
    said, meant = (family.settings(each, MUST_MATCH, where="model") for each in (ours, theirs))
    assert {key: _plain(value) for key, value in said.items()} == {key: _plain(value) for key, value in meant.items()}
    if family.derived is None:
        check_values(ours, family, where="model")
    alone, within = AutoConfig.for_model(**ours).to_dict(), full["text_config"]
    carried = {"dtype", "eos_token_id", "tie_word_embeddings", "transformers_version"}
    assert {key: value for key, value in alone.items() if within.get(key) != value}.keys() <= carried


def test_the_language_model_is_saved_by_its_own_class(shop: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    save(load_model(shop / "base"), tmp_path / "alone")
    assert open_source("base", "base", tmp_path / "alone").wrapper is None
    assert torch.equal(logits_of(tmp_path / "alone", ids), logits_of(load_model(shop / "base"), ids))


def test_what_was_saved_out_of_a_wrapper_may_keep_its_names(ids: torch.Tensor, tmp_path: Path) -> None:
    """As transformers saves what it opened as Qwen3_5ForCausalLM."""
    save_wrapped("qwen3_5", tmp_path / "base")
    save(changed(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), r"\.mlp\.", 1), tmp_path / "law")
    assert any("language_model" in name for name in load_file(tmp_path / "law" / "model.safetensors"))
    assert json.loads((tmp_path / "law" / "config.json").read_text())["model_type"] == "qwen3_5_text"
    experts = [{"name": "law", "model": "./law"}, {"name": "rest", "model": "base"}]
    build(make_plan(parse_recipe({"base_model": "./base", "experts": experts, "mixture": RANDOM}), tmp_path), tmp_path / "OUT")
    checkpoint = open_checkpoint(tmp_path / "OUT")
    assert checkpoint.shape.native_type == "qwen3_5_moe_text"
    model = load_model(tmp_path / "OUT")
    with mixture_of(model, checkpoint).forced(0):
        torch.testing.assert_close(logits_of(model, ids), logits_of(tmp_path / "law", ids), atol=1e-4, rtol=0)


def test_a_native_mixture_of_shards(ids: torch.Tensor, tmp_path: Path) -> None:
    """The tower in files of its own, which are recorded, too."""
    save(wrapped_model("mistral3"), tmp_path / "base", max_shard_size="20KB")
    save(changed(wrapped_model("mistral3"), r"\.mlp\.", 1), tmp_path / "law", max_shard_size="20KB")
    experts = [{"name": "law", "model": "./law"}, {"name": "rest", "model": "base"}]
    build(make_plan(parse_recipe({"base_model": "./base", "experts": experts, "mixture": RANDOM}), tmp_path), tmp_path / "OUT")
    checkpoint = open_checkpoint(tmp_path / "OUT")
    assert checkpoint.shape.native_type == "mixtral" and is_proven(verify(checkpoint))
    assert set(checkpoint.record.sources[0].files) == {file.name for file in (tmp_path / "base").glob("*.safetensors")}
    model, ids = load_model(tmp_path / "OUT"), ids.clamp(max=89)
    with mixture_of(model, checkpoint).forced(0):
        torch.testing.assert_close(logits_of(model, ids), logits_of(own(tmp_path, "law"), ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("config", "more", "wanted"),
    [
        ({"text_config": [1]}, {}, "no usable text_config"),
        ({"text_config": {"model_type": "mixtral"}}, {}, "wraps a model of this family"),
        ({"text_config": {"hidden_size": "wide"}}, {}, "no usable hidden_size"),
        ({"text_config": {"auto_map": {"AutoModel": "x.Y"}}}, {}, "code of its own"),
        ({}, {"lm_head.weight": (96, 32)}, "mean the same"),
        ({}, {"language_model.model.layers.7.mlp.up_proj.weight": (48, 32)}, "more or fewer layers than config.json says"),
        ({}, {"language_model.model.layers.0.mlp.up_proj.lora_A.weight": (48, 32)}, "expert has tensors|another shape|lacks"),
    ],
)
def test_a_wrapper_that_lies_is_refused(
    config: dict[str, Any], more: dict[str, tuple[int, int]], wanted: str, tmp_path: Path
) -> None:
    save_wrapped("mistral3", tmp_path / "base")
    save_wrapped("mistral3", tmp_path / "law")
    said = json.loads((tmp_path / "law" / "config.json").read_text())
    inner = config.get("text_config", {})
    whole = {**said["text_config"], **inner} if isinstance(inner, dict) else inner
    (tmp_path / "law" / "config.json").write_text(json.dumps({**said, **config, "text_config": whole}))
    tensors = load_file(tmp_path / "law" / "model.safetensors")
    tensors |= {name: torch.zeros(shape) for name, shape in more.items()}
    save_file(tensors, tmp_path / "law" / "model.safetensors", metadata={"format": "pt"})
    recipe = {"base_model": "./base", "experts": [{"name": "law", "model": "./law"}], "mixture": RANDOM}
    with pytest.raises(ModekitError, match=wanted):
        make_plan(parse_recipe(recipe), tmp_path)


def test_every_linear_layer_and_a_head_of_its_own(ids: torch.Tensor, tmp_path: Path) -> None:
    """PEFT's shorthand means the tower's layers, too; whole copies of modules go by the wrapper's names."""
    save_wrapped("mistral3", tmp_path / "base")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    adapter(model, tmp_path / "lora", target_modules="all-linear", modules_to_save=["lm_head"])
    source = open_source("base_model", "base", tmp_path / "base")
    found = open_adapter("experts[0]", "lora", tmp_path / "lora", source)
    assert found.replaced.keys() == {"lm_head.weight"} and found.changes.keys() <= source.tensors.keys()
    assert len(found.changes) == 7 * 3 and all("vision" in name or "projector" in name for name in found.beside)
    expected = logits_of(own(tmp_path, "lora"), ids.clamp(max=89))
    alone = logits_of(load_expert(tmp_path / "base", tmp_path / "lora"), ids.clamp(max=89))
    torch.testing.assert_close(alone, expected, atol=1e-4, rtol=0)
