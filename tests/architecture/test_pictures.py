"""Mixtures that keep what wraps their language model (output.keep): an expert alone sees as its own multimodal model does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    Gemma3ImageProcessor,
    Gemma3Processor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from conftest import logits_of, router_logits, save, write_text
from generated import check_generation
from modekit.building.build import build
from modekit.building.preview import preview_of
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.checkpoint import open_checkpoint
from modekit.errors import ModekitError
from modekit.loaded.load import load_model
from modekit.loaded.shapes import mixture_of
from modekit.members.change import write_change
from modekit.members.edits import NewExpert, add_expert, remove_expert
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.report.card import make_card
from sources.test_wrappers import RANDOM, adapter, changed, own
from wrapped_models import WRAPPED, picture, save_wrapped, wrapped_model

NAMES = ("full", "lora", "rest")
EXPERTS = [
    {"name": "full", "model": "./full"},
    {"name": "lora", "adapter": "./lora"},
    {"name": "rest", "model": "base"},
]
AVERAGES = {"fit": "random", "granularity": "context", "decay": [0.5], "seed": 1}
ONCE = {"fit": "random", "granularity": "sequence", "per": "model", "seed": 1}
WRITE = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [90, 91, 92]}


def recipe(experts: list[dict[str, Any]] = EXPERTS, **mixture: Any) -> Any:
    said = {"base_model": "./base", "experts": experts, "mixture": {**RANDOM, **mixture}, "output": {"keep": "wrapper"}}
    return parse_recipe(said)


def shop_of(case: str, root: Path, parts: str = r"\.mlp\.") -> Path:
    """A wrapper, a fine-tune of it whose tower is the base's, and an adapter."""
    save_wrapped(case, root / "base")
    save(changed(wrapped_model(case), parts, 1), root / "full")
    adapter(wrapped_model(case), root / "lora", target_modules=r".*language_model.*\.(q_proj|up_proj)")
    return root


@pytest.fixture(scope="module", params=WRAPPED)
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = shop_of(request.param, tmp_path_factory.mktemp("pictures"))
    (root / "case").write_text(request.param)
    build(make_plan(recipe(router=AVERAGES), root), root / "OUT")
    return root


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shop_of("gemma3", tmp_path_factory.mktemp("gemma"))


def whole(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return model


@torch.inference_mode()
def seen(model: PreTrainedModel, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the real tokens."""
    logits: torch.Tensor = model(**given).logits[given["attention_mask"].bool()]
    return logits


def test_an_expert_alone_is_its_own_multimodal_model_bit_for_bit(shop: Path) -> None:
    """On pictures, under left padding; and what it writes."""
    case = (shop / "case").read_text()
    model, given = whole(shop / "OUT"), picture(case)
    base = seen(own(shop, "base"), given)
    assert not torch.allclose(base, seen(own(shop, "base"), {**given, "pixel_values": 1 - given["pixel_values"]}), atol=1e-3)
    for name in NAMES:
        expert = own(shop, name.replace("rest", "base"))
        expected = seen(expert, given)
        model.use_expert(name)
        assert torch.equal(seen(model, given), expected)
        assert torch.equal(base, expected) == (name == "rest")
        assert torch.equal(model.generate(**given, **WRITE), expert.generate(**given, **WRITE))


def test_routers_read_pictures_and_text(shop: Path) -> None:
    """What is written with a cache is what one pass says; averages are those of the real tokens."""
    given = picture((shop / "case").read_text())
    model = whole(shop / "OUT")
    made = model.generate(**given, **WRITE)
    assert torch.equal(made, model.generate(**given, **WRITE, use_cache=False))
    alone = {name: value[1:] if len(value) == 2 else value[len(value) // 2 :] for name, value in given.items()}
    assert torch.equal(made[1:], model.generate(**alone, **WRITE))
    log = router_logits(model, **given)
    assert log and not torch.equal(log[-1][0], log[-1][1])


def test_text_alone_is_the_text_mixture(shop: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    """In either class; saved by its own class, it opens again."""
    ids = ids.clamp(max=89)
    text = load_model(shop / "OUT")
    expected = logits_of(text, ids)
    model = whole(shop / "OUT")
    assert not any("vis" in name for name, _ in text.named_modules())
    assert torch.equal(logits_of(model, ids), expected)
    model.save_pretrained(tmp_path / "AGAIN")
    assert torch.equal(logits_of(whole(tmp_path / "AGAIN"), ids), expected)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "AGAIN"), ids), expected)
    assert all("(?!" not in each for each in type(text)._keys_to_ignore_on_load_unexpected or ())  # other mixtures' class, too
    inner = AutoModel.from_pretrained(shop / "OUT").eval()
    assert torch.equal(inner(input_ids=ids).last_hidden_state, model.model(input_ids=ids).last_hidden_state)
    checkpoint = open_checkpoint(shop / "OUT")
    with mixture_of(text, checkpoint).forced(0):
        assert torch.equal(logits_of(text, ids), logits_of(own(shop, "full"), ids))
    assert is_proven(verify(checkpoint))
    check_generation(shop / "OUT")


@pytest.mark.parametrize("case", ["gemma3", "mistral3"])
def test_embeddings_and_heads_of_experts(case: str, tmp_path: Path) -> None:
    """modules: all, where the wrapper itself looks up tokens; head and embedding are one, or two."""
    shop_of(case, tmp_path, r"language_model|lm_head")
    experts = [EXPERTS[0], EXPERTS[2]]
    build(make_plan(recipe(experts, modules="all", router=ONCE), tmp_path), tmp_path / "OUT")
    assert is_proven(verify(open_checkpoint(tmp_path / "OUT")))
    model, given = whole(tmp_path / "OUT"), picture(case)
    made = model.generate(**given, **WRITE)
    assert torch.equal(made, model.generate(**given, **WRITE, use_cache=False))
    model.use_expert("full")
    assert torch.equal(seen(model, given), seen(own(tmp_path, "full"), given))
    model.use_expert("rest")
    assert torch.equal(seen(model, given), seen(own(tmp_path, "base"), given))


def test_a_router_that_reads_tokens(gemma: Path) -> None:
    """Fitted on text; tokens of pictures are ids as others. Experts come, go and get other names."""
    text = write_text(gemma)
    domains = dict(zip(NAMES, text.values(), strict=False))
    experts = [{**each, "text": str(domains[each["name"]])} for each in EXPERTS]
    build(make_plan(recipe(experts[1:], top_k=1, router={"fit": "lexical"}), gemma), gemma / "LEX")
    checkpoint = open_checkpoint(gemma / "LEX")
    new = NewExpert({"model": "./full", "text": str(domains["full"])}, gemma)
    checkpoint = write_change(checkpoint, add_expert(checkpoint, "full", new), gemma / "LEX")
    assert checkpoint.names == ["lora", "rest", "full"] and is_proven(verify(checkpoint))
    given, model = picture("gemma3"), whole(gemma / "LEX")
    made = model.generate(**given, **WRITE)
    assert torch.equal(made, model.generate(**given, **WRITE, use_cache=False))
    model.use_expert("full")
    assert torch.equal(seen(model, given), seen(own(gemma, "full"), given))
    checkpoint = write_change(checkpoint, remove_expert(checkpoint, "rest"), gemma / "LEX")
    assert checkpoint.names == ["lora", "full"] and is_proven(verify(checkpoint))
    model = whole(gemma / "LEX")
    model.use_expert("full")
    assert torch.equal(seen(model, given), seen(own(gemma, "full"), given))


def card_of(folder: Path) -> str:
    return make_card(open_checkpoint(folder), ask_hub=False).contents["README.md"].decode()


def test_processor_and_folder_open_without_modekit(gemma: Path, tmp_path: Path) -> None:
    for name in ("base", "lora"):
        shutil.copytree(gemma / name, tmp_path / name)
    tokens = PreTrainedTokenizerFast.from_pretrained(gemma / "base").convert_ids_to_tokens([90, 91, 92])
    special = dict(zip(("image_token", "boi_token", "eoi_token"), tokens, strict=True))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(gemma / "base", extra_special_tokens=special)
    images = Gemma3ImageProcessor(size={"height": 16, "width": 16})
    Gemma3Processor(images, tokenizer, image_seq_length=4).save_pretrained(tmp_path / "base")
    build(make_plan(recipe([EXPERTS[1]]), tmp_path), tmp_path / "OUT")
    assert (tmp_path / "OUT" / "processor_config.json").read_bytes() == (
        tmp_path / "base" / "processor_config.json"
    ).read_bytes()
    assert type(AutoProcessor.from_pretrained(tmp_path / "OUT")) is Gemma3Processor
    assert "`AutoProcessor` open the whole model" in card_of(tmp_path / "OUT")
    (tmp_path / "OUT" / "processor_config.json").unlink()
    assert "AutoProcessor" not in card_of(tmp_path / "OUT")
    code = (
        "import sys, torch; sys.modules['modekit'] = None\n"
        "from transformers import AutoModelForImageTextToText as A, AutoModelForCausalLM as B\n"
        "given = torch.load(sys.argv[2])\n"
        "for kind, more in ((A, given), (B, {'input_ids': given['input_ids'][1:]})):\n"
        "    model = kind.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "    print(float(model(**more).logits[-1].double().sum()))\n"
    )
    given = picture("gemma3")
    torch.save(given, tmp_path / "given")
    said = subprocess.run([sys.executable, "-c", code, tmp_path / "OUT", tmp_path / "given"], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    sums = [float(line) for line in said.stdout.split()]
    expected = [seen(whole(tmp_path / "OUT"), given)[-11:], logits_of(load_model(tmp_path / "OUT"), given["input_ids"][1:])]
    for found, logits in zip(sums, expected, strict=True):
        assert found == pytest.approx(float(logits.double().sum()), abs=1e-2)


@pytest.mark.parametrize("content", ['{"auto_map": {"AutoProcessor": "x/y--z.P"}}', "{", "[1]", None])
def test_a_processor_brings_no_code(gemma: Path, tmp_path: Path, content: str | None) -> None:
    for name in ("base", "lora"):
        shutil.copytree(gemma / name, tmp_path / name)
    file = tmp_path / "base" / "preprocessor_config.json"
    if content is None:
        file.symlink_to("/etc/hostname")
    else:
        file.write_text(content)
    if content == "[1]":  # which no processor opens, and runs nothing
        assert file in make_plan(recipe([EXPERTS[1]]), tmp_path).copied_files
        return
    with pytest.raises(ModekitError, match=r"code of its own|cannot be read|not the model's own"):
        make_plan(recipe([EXPERTS[1]]), tmp_path)


def test_a_plan_says_what_is_kept(gemma: Path, tmp_path: Path) -> None:
    plan = make_plan(recipe(), gemma)
    said = preview_of(plan)
    assert said.architecture == "ModekitForImageTextToText" and "output.keep" in said.why
    assert any(note.startswith("kept of the base model") and "vision_tower (32 tensors" in note for note in said.notes)
    assert not any("stay behind" in note for note in said.notes)
    assert plan.shape.without_vllm and plan.shape.without_gguf == "it keeps a vision tower (output.keep)"
    left = make_plan(recipe().model_copy(update={"output": parse_recipe({**_plain(), "output": {}}).output}), gemma)
    assert any("vision_tower" in note and "stay behind" in note for note in left.notes)
    assert left.shape.native_type is None and plan.parameters()["active"] == left.parameters()["active"]
    assert plan.parameters()["total"] > left.parameters()["total"]
    assert any("output: {keep: wrapper}" in note for note in left.notes)
    adapter(wrapped_model("gemma3"), tmp_path / "both", target_modules=r".*\.(q_proj)")
    both = make_plan(recipe([{"name": "both", "adapter": str(tmp_path / "both")}]), gemma)
    assert any(note.startswith("experts[0] 'both'") and "vision_tower" in note for note in both.notes)


def _plain() -> dict[str, Any]:
    return {"base_model": "./base", "experts": EXPERTS, "mixture": RANDOM}


def damaged(gemma: Path, root: Path, who: str, tensors: dict[str, Any], config: dict[str, Any]) -> Path:
    for name in ("base", "full", "lora"):
        shutil.copytree(gemma / name, root / name)
    said = json.loads((root / who / "config.json").read_text())
    (root / who / "config.json").write_text(json.dumps({**said, **config}))
    held = load_file(root / who / "model.safetensors")
    for name, change in tensors.items():
        held = {key: value for key, value in held.items() if not key.startswith(name)} if change is None else held
        if change is not None:
            held[name] = held[name] + change if isinstance(change, float) else torch.zeros(change)
    save_file(held, root / who / "model.safetensors", metadata={"format": "pt"})
    return root


LAYER = "vision_tower.encoder.layers.0."


@pytest.mark.parametrize(
    ("who", "tensors", "config", "wanted"),
    [
        ("base", {}, {"vision_config": None}, "no usable vision_config"),
        ("base", {"vision_tower.": None}, {}, "the vision tower is missing"),
        ("full", {f"{LAYER}mlp.fc1.bias": None}, {}, "vision tower or projector is not the base"),
        ("full", {f"{LAYER}mlp.fc1.bias": (7,)}, {}, "vision tower or projector is not the base"),
        ("full", {f"{LAYER}mlp.fc1.bias": 0.5}, {}, "vision tower or projector is not the base"),
        ("base", {f"{LAYER}mlp.fc1.bias": 0.5}, {}, "vision tower or projector is not the base"),
    ],
)
def test_a_tower_that_is_none_or_another_is_refused(
    gemma: Path, tmp_path: Path, who: str, tensors: dict[str, Any], config: dict[str, Any], wanted: str
) -> None:
    damaged(gemma, tmp_path, who, tensors, config)
    with pytest.raises(ModekitError, match=wanted):
        build(make_plan(recipe(), tmp_path), tmp_path / "OUT")
    assert not (tmp_path / "OUT").exists()


def test_what_cannot_be_kept_is_refused(gemma: Path) -> None:
    with pytest.raises(ModekitError, match=r"output\.keep: no native"):
        parse_recipe({**_plain(), "output": {"keep": "wrapper", "format": "native"}})
    apart = {"expert": "base", "weight": 0.5, "apart": True}
    with pytest.raises(ModekitError, match=r"output\.keep: a common expert"):
        parse_recipe({**_plain(), "mixture": {**RANDOM, "always_on": apart}, "output": {"keep": "wrapper"}})
    text = make_plan(parse_recipe({**_plain(), "output": {"format": "modekit"}}), gemma)
    assert "wrapper" not in str(text.config["modekit"]) and text.shape.written == text.config


def test_parts_are_named_where_not_everything_can_be_mixed(tmp_path: Path) -> None:
    """Linear attention has tensors that are no modules' weights."""
    shop_of("qwen3_5", tmp_path)
    with pytest.raises(ModekitError, match=r"modules: \[mlp, q, k, v, o\]") as refused:
        make_plan(recipe([EXPERTS[0], EXPERTS[2]], modules="all", router=ONCE), tmp_path)
    parts = str(refused.value.remedy).partition("[")[2].rstrip("]").split(", ")
    make_plan(recipe([EXPERTS[0], EXPERTS[2]], modules=parts), tmp_path)
    with pytest.raises(ModekitError, match="wraps no language model"):
        save(load_model(tmp_path / "base"), tmp_path / "text")
        make_plan(recipe().model_copy(update={"base_model": "./text"}), tmp_path)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda said: said.pop("text_config"), "missing or damaged"),
        (lambda said: said["text_config"].update(hidden_size="wide"), "hidden_size"),
        (lambda said: said["text_config"].update(num_hidden_layers=10**9), "disagree"),
        (lambda said: said["modekit"].update(wrapper="qwen3_5"), "does not say what is mixed"),
    ],
)
def test_a_config_of_a_mixture_that_lies(gemma: Path, tmp_path: Path, change: Any, wanted: str) -> None:
    build(make_plan(recipe([EXPERTS[1]]), gemma), tmp_path / "OUT")
    said = json.loads((tmp_path / "OUT" / "config.json").read_text())
    change(said)
    (tmp_path / "OUT" / "config.json").write_text(json.dumps(said))
    with pytest.raises(ModekitError, match=wanted):
        open_checkpoint(tmp_path / "OUT")


def test_a_lost_tensor_is_not_made_anew(gemma: Path, tmp_path: Path) -> None:
    build(make_plan(recipe([EXPERTS[1]]), gemma), tmp_path / "OUT")
    file = tmp_path / "OUT" / "model-backbone-00001.safetensors"
    held = load_file(file)
    del held["model.vision_tower.embeddings.patch_embedding.bias"]
    save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks tensors of the model: .*patch_embedding"):
        whole(tmp_path / "OUT")
    assert AutoConfig.from_pretrained(tmp_path / "OUT").vision_config.num_hidden_layers == 1
