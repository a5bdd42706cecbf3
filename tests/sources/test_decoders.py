"""Every causal type of the installed transformers, most of them without a row in the table of families.

A tiny model of each is base; a second one, and an adapter on the linear parts of its layers, are experts. Forced, each
expert is the model that transformers or PEFT makes of it. Why a type is not mixed says REFUSED.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from conftest import save, tiny_model, write_text
from damage import change_config
from families_table import NO_WHOLE, PARTLY, REFUSED, WHOLE_FFNS
from modekit.building.build import build
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import MismatchError, ModekitError, UnsupportedError
from modekit.experts.specialize import specialize
from modekit.loaded.head import Head
from modekit.loaded.passes import backbone_of, predicted_logits
from modekit.loaded.text_training import TextLoss, Training
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.sources.families import family_of
from modekit.sources.pairs import PAIRS
from modekit.sources.structure import INEXACT, INEXACT_WHOLE, structure
from modekit.text.sequences import TokenSequence, make_batches
from modekit.training.train import train
from tiny_decoders import TYPES, tiny_config, tiny_decoder
from trained import short_settings

FORCED_WRITERS = ("mamba", "mamba2", "falcon_mamba", "xlm")
"""Their passes do not hand on the cache in which routers of averages keep what they read."""
ONE_ROUTER = {"fit": "random", "granularity": "sequence", "per": "model"}
IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(5))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval().float()(input_ids=IDS).logits


def mixture(root: Path, name: str, experts: list[dict[str, str]], **says: Any) -> PreTrainedModel:
    recipe = parse_recipe({"base_model": "./base", "experts": experts, "mixture": {"method": "gating", **says}})
    build(make_plan(recipe, root), root / name, overwrite=True)
    return opened(root / name)


def opened(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def forced(model: PreTrainedModel, expert: int | torch.Tensor) -> torch.Tensor:
    model.use_expert(expert)
    said = logits(model)
    model.use_expert(None)
    return said


def linear_parts(root: Path) -> list[str]:
    """The linear modules of the layers; of a mixture of experts those outside of it."""
    config = json.loads((root / "base" / "config.json").read_text())
    stack = structure(config, where="base").family.stacks[0]
    model, paths = opened(root / "base"), list(stack.parts.values())
    if any(parameter.ndim > 2 and "experts" in name for name, parameter in model.named_parameters()):
        paths = [
            path for path in paths if not path.endswith(("gate_proj", "up_proj", "down_proj"))
        ]  # PEFT takes them for experts
    plain = [path for path in paths if not (is_refused_by_peft(config["model_type"]) and path.endswith("out_proj"))]
    names = [f"{stack.layers}{layer}.{path}" for layer in range(2) for path in plain]
    return [name for name in names if name in dict(model.named_modules())]


def is_refused_by_peft(model_type: str) -> bool:
    return model_type in {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}


def save_models(model_type: str, root: Path) -> None:
    for seed, name in enumerate(("base", "other")):
        save(tiny_decoder(model_type, seed), root / name)


def save_adapter(root: Path) -> torch.Tensor:
    """Logits of PEFT's merged model."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=linear_parts(root), init_lora_weights=False)
    adapted = peft.get_peft_model(opened(root / "base"), config)
    adapted.save_pretrained(root / "lora")
    return logits(adapted.merge_and_unload())


@pytest.mark.parametrize("model_type", TYPES)
def test_an_expert_alone_is_its_own_model(model_type: str, tmp_path: Path) -> None:
    """Whole models and adapters, bit for bit where tensors are copied; mixed, the result is finite and of all experts."""
    if model_type in REFUSED | PARTLY:
        pytest.skip((REFUSED | PARTLY)[model_type])
    save_models(model_type, tmp_path)
    base, other = (logits(opened(tmp_path / name)) for name in ("base", "other"))
    adapted = save_adapter(tmp_path)
    experts = [{"name": "plain", "model": "base"}, {"name": "other", "model": "./other"}, {"name": "low", "adapter": "./lora"}]
    for name, rest in (("whole", {"modules": "all"}), ("adapters", {})):
        if name == "whole" and model_type in NO_WHOLE:
            continue
        here = experts if name == "whole" else [experts[0], experts[2]]
        model = mixture(tmp_path, name, here, router=ONE_ROUTER, **rest)
        expected = [base, other, adapted] if name == "whole" else [base, adapted]
        for expert, own in enumerate(expected):
            torch.testing.assert_close(forced(model, expert), own, atol=1e-4 * max(1.0, float(own.abs().max()) / 10), rtol=0)
        mixed = logits(model)
        assert torch.isfinite(mixed).all() and (mixed - base).abs().max() > 1e-3
        if model_type in FORCED_WRITERS:
            model.use_expert(1)
        with torch.no_grad():
            model.generate(IDS[:, :5], max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)


def test_positions_of_as_many_tokens_as_sequences_are_no_sequences(tmp_path: Path) -> None:
    """Blenderbot's learned positions are (S, D), the same for all sequences."""
    save_models("blenderbot", tmp_path)
    experts = [{"name": "plain", "model": "base"}, {"name": "other", "model": "./other"}]
    model = mixture(tmp_path, "OUT", experts, modules="all", router=ONE_ROUTER)
    square = torch.cat([IDS, IDS.flip(1)])[:4, :4]
    with torch.no_grad():
        together = model(input_ids=square).logits
        alone = torch.cat([model(input_ids=ids[None]).logits for ids in square])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


# What a type's LoRA or FFN training lacks, and the sentence that says so.
NO_LORA = {
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2", "nemotron_h"), "PEFT has no adapter"),
    "reformer": "no gradient reaches",  # its layers recompute their input without parameters' gradients
}
NOT_TRAINED = dict.fromkeys(("camembert", "xlm-roberta"), "a head that is tied under a second name is not found again")
"""Mixtures that are not trained with `what: all`."""
TRAINING = Training(steps=6, batch_tokens=256, sequence_length=32, learning_rate=5e-3)
DECODERS = [each for each in TYPES if each not in {*REFUSED, *(family.model_type for family in PAIRS)}]


@pytest.mark.parametrize("model_type", DECODERS)
def test_a_specialist_of_every_class_learns_by_the_class_s_own_loss(model_type: str, tmp_path: Path) -> None:
    """And a teacher's head gives the class's own logits of the hidden states that are kept."""
    model = tiny_decoder(model_type)
    batch = next(make_batches([TokenSequence(tuple(row)) for row in IDS.tolist()]))
    with torch.no_grad():
        whole = model(input_ids=IDS, use_cache=False).logits
        loss = model(input_ids=IDS, labels=IDS if model.config.model_type not in UNSHIFTED else shifted(IDS)).loss
        hidden = backbone_of(model)(input_ids=IDS, use_cache=False)[0]
        torch.testing.assert_close(Head(model)(hidden.flatten(0, 1)), whole.flatten(0, 1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(TextLoss(model, TRAINING).eval()(batch), loss, atol=1e-5, rtol=1e-5)
        predicted = predicted_logits(model, batch)
    torch.testing.assert_close(predicted, whole[:, :-1].flatten(0, 1), atol=1e-5, rtol=1e-5)
    save(model, tmp_path / "base")
    write_text(tmp_path / "text", ("law",))
    for what in ("full", "lora"):
        given: dict[str, Any] = {"root": tmp_path, "train": what, "rank": 4, "training": TRAINING}
        if what == "lora" and model_type in NO_LORA:
            with pytest.raises(ModekitError, match=NO_LORA[model_type]):
                specialize(tmp_path / "base", tmp_path / what, ["./text/law.jsonl"], **given)
            continue
        found = specialize(tmp_path / "base", tmp_path / what, ["./text/law.jsonl"], **given).held_out_loss
        assert found.before is not None and found.after is not None and found.after < found.before


UNSHIFTED = (
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart"),
    *("trocr", "whisper"),
)
"""Types whose class compares each logit with the label at its own place."""


def shifted(ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([ids[:, 1:], torch.full((len(ids), 1), -100)], 1)


@pytest.mark.parametrize("model_type", [each for each in DECODERS if each not in (*NO_WHOLE, *NOT_TRAINED)])
def test_a_mixture_of_every_class_is_trained_and_taught(model_type: str, tmp_path: Path) -> None:
    save_models(model_type, tmp_path)
    texts = write_text(tmp_path / "text", ("law", "code"))
    experts = [{"name": "law", "model": "base"}, {"name": "code", "model": "./other"}]
    said = [{**each, "text": str(texts[each["name"]])} for each in experts]
    mixture(tmp_path, "OUT", said, modules="all", router=ONE_ROUTER)
    few = {"what": ["all"], "losses": ["lm", "forward_kl"], "evaluate_every": 3, "backbone_learning_rate": 2e-3}
    trained = train(open_checkpoint(tmp_path / "OUT"), short_settings(**few), evaluate_tokens=None)
    losses = trained.record.select_loss.values()
    assert trained.improved and sum(each["after"] for each in losses) < sum(each["before"] for each in losses)


@pytest.mark.parametrize("fit", ["logistic", "lexical"])
def test_routers_are_fitted_on_a_class_without_a_row(fit: str, tmp_path: Path) -> None:
    """Those that read hidden states, and those that read tokens; the checkpoint is proven, and opens."""
    save_models("gpt2", tmp_path)
    expected = save_adapter(tmp_path)
    texts = write_text(tmp_path / "text", ("law", "code"))
    experts = [
        {"name": "law", "adapter": "./lora", "text": str(texts["law"])},
        {"name": "code", "model": "base", "text": str(texts["code"])},
    ]
    model = mixture(
        tmp_path,
        "OUT",
        experts,
        router={"fit": fit},
    )
    torch.testing.assert_close(forced(model, 0), expected, atol=1e-4, rtol=0)
    assert is_proven(verify(open_checkpoint(tmp_path / "OUT")))


@pytest.mark.parametrize("model_type", WHOLE_FFNS)
def test_whole_ffns_are_experts(model_type: str, tmp_path: Path) -> None:
    save_models(model_type, tmp_path)
    by_hand = opened(tmp_path / "base")
    other = dict(opened(tmp_path / "other").named_parameters())
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            if ".mlp." in name:
                parameter.copy_(other[name])
    experts = [{"name": "plain", "model": "base"}, {"name": "other", "model": "./other"}]
    model = mixture(tmp_path, "OUT", experts, modules=["mlp"], router={"fit": "random"})
    torch.testing.assert_close(forced(model, 1), logits(by_hand), atol=1e-4, rtol=0)


def test_beams_with_a_common_expert_where_attentions_have_caches_of_their_own(tmp_path: Path) -> None:
    save_models("diffllama", tmp_path)
    experts = [{"name": "plain", "model": "base"}, {"name": "other", "model": "./other"}]
    common = {"expert": "base", "weight": 0.25, "apart": True}
    model = mixture(tmp_path, "OUT", experts, modules="decoder", router=ONE_ROUTER, always_on=common)
    said = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **said), model.generate(IDS, use_cache=False, **said))


@pytest.mark.parametrize("model_type", ["lfm2", "glm", "gpt2", "bloom"])
def test_whole_decoders_are_experts_where_it_is_known_what_runs_first(model_type: str, tmp_path: Path) -> None:
    save_models(model_type, tmp_path)
    experts = [{"name": "plain", "model": "base"}, {"name": "other", "model": "./other"}]
    if model_type in ("gpt2", "bloom"):
        with pytest.raises(UnsupportedError, match=r"modules: decoder has its router[^§]*begins with another module"):
            mixture(tmp_path, "OUT", experts, modules="decoder", router=ONE_ROUTER)
        return
    model, expected = mixture(tmp_path, "OUT", experts, modules="decoder", router=ONE_ROUTER), opened(tmp_path / "base")
    assert torch.isfinite(logits(model)).all()
    torch.testing.assert_close(forced(model, 0), logits(expected), atol=1e-4, rtol=0)


def test_an_expert_has_more_tokens_than_a_base_without_a_row(tmp_path: Path) -> None:
    save(tiny_decoder("gpt_neox", 0), tmp_path / "base")
    grown = tiny_decoder("gpt_neox", 1)
    grown.resize_token_embeddings(104)
    save(grown, tmp_path / "other")
    experts = [{"name": "plain", "model": "base"}, {"name": "other", "model": "./other"}]
    model = mixture(tmp_path, "OUT", experts, modules="all", router=ONE_ROUTER)
    torch.testing.assert_close(forced(model, 1), logits(opened(tmp_path / "other")), atol=1e-4, rtol=0)


def test_joined_experts_are_merged_into_a_backbone(tmp_path: Path) -> None:
    """Tensors that files hold expert by expert: proven in whole models, averaged in a merged backbone."""
    save_models("olmoe", tmp_path)
    experts = [{"name": "plain", "model": "base"}, {"name": "other", "model": "./other"}]
    mixture(tmp_path, "OUT", experts, modules="all", router=ONE_ROUTER)
    assert is_proven(verify(open_checkpoint(tmp_path / "OUT")))
    experts[0]["model"] = "./base"
    model = mixture(tmp_path, "OUT", experts, modules=["q"], backbone="average", router=ONE_ROUTER)
    name = "model.layers.1.mlp.experts.down_proj"
    mean = sum(opened(tmp_path / each).get_parameter(name) for each in ("base", "other")) / 2
    torch.testing.assert_close(model.get_parameter(name), mean, atol=1e-6, rtol=0)


def test_further_lists_of_layers_are_none_of_the_model(tmp_path: Path) -> None:
    """A head that predicts further tokens, in the files of a family with a row."""
    for seed, name in enumerate(("base", "other")):
        save(tiny_model(seed=seed), tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        save_file({**load_file(file), "mtp.layers.0.fc.weight": torch.zeros(4, 4)}, file, metadata={"format": "pt"})
    experts = [{"name": "plain", "model": "base"}, {"name": "other", "model": "./other"}]
    model = mixture(tmp_path, "OUT", experts, modules=["mlp"], router={"fit": "random"})
    assert torch.isfinite(logits(model)).all()


def test_a_config_of_a_billion_layers_is_refused_before_anything_is_made() -> None:
    with pytest.raises(ModekitError, match="n_layer"):
        family_of({"model_type": "gpt2", "n_layer": 10**9}, where="base_model")


def test_names_as_older_files_have_them(tmp_path: Path) -> None:
    """GPT-2 on the hub: without the name of the base model, and with masks that every model computes for itself."""
    save_models("gpt2", tmp_path)
    for name in ("base", "other"):
        file = tmp_path / name / "model.safetensors"
        tensors = {key.removeprefix("transformer."): tensor for key, tensor in load_file(file).items()}
        save_file({**tensors, "h.0.attn.bias": torch.ones(1, 1, 8, 8)}, file, metadata={"format": "pt"})
    experts = [{"name": "plain", "model": "base"}, {"name": "other", "model": "./other"}]
    model = mixture(tmp_path, "OUT", experts, modules="all", router=ONE_ROUTER)
    torch.testing.assert_close(forced(model, 1), logits(opened(tmp_path / "other")), atol=1e-4, rtol=0)


def test_a_low_rank_part_that_nothing_can_hold_is_refused(tmp_path: Path) -> None:
    """GPT-2 keeps its weights the other way round: the expert would be the base."""
    save_models("gpt2", tmp_path)
    experts = [{"name": "other", "model": "./other"}, {"name": "low", "model": "./other", "as": "lora"}]
    with pytest.raises(UnsupportedError, match=r"nothing of its own[^§]*experts\[1\] 'low'[^§]*leave 'as: lora' out"):
        mixture(tmp_path, "OUT", experts, router=ONE_ROUTER)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_an_expert_has_a_head_of_its_own_and_its_base_none(model_type: str, tmp_path: Path) -> None:
    """What the message says to do is enough."""
    for seed, name in enumerate(("tied", "other")):
        save(_tied(model_type, seed, tied=not seed), tmp_path / name)
    experts = [{"name": "plain", "model": "base"}, {"name": "other", "model": "./other"}]
    shutil.copytree(tmp_path / "tied", tmp_path / "base")
    with pytest.raises(MismatchError, match="head of its own") as refused:
        mixture(tmp_path, "OUT", experts, modules="all", router=ONE_ROUTER)
    assert "h.weight.clone()" in str(refused.value)
    model = opened(tmp_path / "tied")
    model.get_output_embeddings().weight = torch.nn.Parameter(model.get_output_embeddings().weight.clone())
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "base")
    model = mixture(tmp_path, "OUT", experts, modules="all", router=ONE_ROUTER)
    for expert, name in enumerate(("tied", "other")):
        torch.testing.assert_close(forced(model, expert), logits(opened(tmp_path / name)), atol=1e-4, rtol=0)


def _tied(model_type: str, seed: int, *, tied: bool) -> PreTrainedModel:
    make = tiny_model if model_type == "llama" else tiny_decoder
    return make(model_type, seed, tie_word_embeddings=tied)


@pytest.mark.parametrize("model_type", INEXACT)
def test_a_class_whose_expert_would_be_another_model_is_refused(model_type: str) -> None:
    config = tiny_config(model_type).to_dict()
    with pytest.raises(UnsupportedError, match="cannot be mixed"):
        family_of(config, where="base_model")


@pytest.mark.parametrize("model_type", INEXACT_WHOLE)
def test_a_class_of_which_whole_models_would_be_others_says_what_is_mixed(model_type: str, tmp_path: Path) -> None:
    save_models(model_type, tmp_path)
    experts = [{"name": "plain", "model": "base"}, {"name": "other", "model": "./other"}]
    with pytest.raises(UnsupportedError, match=r"whole models of the family[^§]*write modules: \[mlp, q"):
        mixture(tmp_path, "OUT", experts, modules="all", router=ONE_ROUTER)
    mixture(tmp_path, "OUT", experts, modules=["mlp", "q", "k", "v", "o"], router=ONE_ROUTER)


@pytest.mark.parametrize("model_type", ["inkling2_text", "inkling2_loop_text"])
def test_files_that_transformers_computes_with_are_mixed_once_saved_under_names_of_the_class(
    model_type: str, tmp_path: Path
) -> None:
    """What the message says to do is enough."""
    save_models(model_type, tmp_path)
    experts = [{"name": "plain", "model": "base"}, {"name": "other", "model": "./other"}]
    with pytest.raises(UnsupportedError, match=r"computes[^§]*save_original_format=False"):
        mixture(tmp_path, "OUT", experts, modules="all", router=ONE_ROUTER)
    expected = logits(opened(tmp_path / "other"))
    for name in ("base", "other"):
        opened(tmp_path / name).save_pretrained(tmp_path / name, save_original_format=False)
    model = mixture(tmp_path, "OUT", experts, modules="all", router=ONE_ROUTER)
    torch.testing.assert_close(forced(model, 1), expected, atol=1e-4, rtol=0)


def test_tensors_of_an_expert_alone_are_not_dropped(tmp_path: Path) -> None:
    save_models("gpt_neox", tmp_path)
    file = tmp_path / "other" / "model.safetensors"
    more = {"gpt_neox.layers.0.attention.query_key_value.lora_A.weight": torch.ones(4, 4)}
    save_file({**load_file(file), **more}, file, metadata={"format": "pt"})
    with pytest.raises(MismatchError, match=r"tensors that the base model lacks[^§]*lora_A"):
        mixture(tmp_path, "OUT", [{"name": "other", "model": "./other"}], router=ONE_ROUTER)


def test_a_setting_that_the_class_has_not_is_no_difference(tmp_path: Path) -> None:
    """Training tools write their own, such as their version."""
    for seed, name in enumerate(("base", "other")):
        save(tiny_decoder("stablelm", seed), tmp_path / name)
    change_config(tmp_path / "other", unsloth_version="2026.11.2")
    recipe = parse_recipe({"base_model": "./base", "experts": [{"name": "own", "model": "./other"}]})
    assert make_plan(recipe, tmp_path).shape.experts == 1
    change_config(tmp_path / "other", use_parallel_residual=True)
    with pytest.raises(MismatchError, match="use_parallel_residual differs"):
        make_plan(recipe, tmp_path)


def test_the_default_doge_can_be_mixed() -> None:
    config = AutoConfig.for_model("doge", hidden_size=64, vocab_size=96, num_hidden_layers=2).to_dict()
    assert config["num_experts"] > 4096
    assert family_of(config, where="base_model").layers(config | {"num_hidden_layers": 2}) == [0, 1]
