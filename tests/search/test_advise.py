"""Advice: planted drift, gain and damage are found; the base is given back bit for bit; the advised recipe builds."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from command_line import ended
from conftest import DOMAINS, Workshop, save, tiny_model, write_text
from modekit.building.build import build
from modekit.checkpoint.checkpoint import open_checkpoint
from modekit.evaluation.domains import Domain
from modekit.evaluation.loss import score_domain
from modekit.experts.specialize import specialize
from modekit.loaded.load import decoder_layers, load_adapted, load_model, load_tokenizer
from modekit.loaded.text_training import Training
from modekit.planning.make import make_plan
from modekit.recipes.paths import from_folder
from modekit.recipes.read import load_recipe, parse_recipe
from modekit.search.advise.advise import advise
from modekit.search.advise.drift import Drift, compare, groups_of
from modekit.search.advise.findings import of_gains, of_unmixed
from modekit.search.advise.gains import ON_AVERAGE, PARTS, BlockLosses, Gains, figure_of
from modekit.search.advise.part_scores import PatchedBase, measure, on_average
from modekit.search.advise.recipe import recipe_text, write_advised
from modekit.search.advise.result import LIMITS, Advice, Facts, Figure, Finding
from modekit.search.advise.rules import EXPERTS, choose
from modekit.search.advise.text import Confusion, read_texts
from modekit.sources.adapter import open_adapter
from modekit.sources.contents import OpenFiles
from modekit.sources.families import FAMILIES, family_of
from modekit.sources.model import ModelSource, open_source
from modekit.sources.tokenizer import chat_template
from modekit.text.documents import read_documents
from modekit.text.sequences import encode
from modekit.text.splits import documents_of_split, split_of
from pair_models import PAIR_FAMILIES, make_pair_workshop, pair_model
from refusal import borrow, copy_expert, refuse, run_python, tree
from rounding import assert_close

TRAINING = Training(steps=12, learning_rate=5e-3, batch_tokens=512, sequence_length=64, held_out_tokens=200)
TOKENS = 400
PAIRS_OF_ALL_FAMILIES = [
    *({"model_type": name} for name in PAIR_FAMILIES),
    {"model_type": "t5", "feed_forward_proj": "gated-gelu"},
]


def source(folder: Path, label: str = "model") -> ModelSource:
    return open_source(label, str(folder), folder)


def changed(base: Path, out: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a model folder with changed tensors."""
    shutil.copytree(base, out)
    tensors = {name: change(name, tensor).contiguous() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def is_ffn(name: str) -> bool:
    return ".mlp." in name


def is_embedding(name: str) -> bool:
    return name in {"model.embed_tokens.weight", "lm_head.weight"}


def tuned(workshop: Workshop, domain: str, out: str, moves: Callable[[str], bool], steps: int = 12) -> Path:
    """The base, of which some tensors were trained on a domain's fit documents."""
    base = workshop.root / "base"
    model, tokenizer = load_model(base), load_tokenizer(base)
    documents = documents_of_split(read_documents([f"text/{domain}.jsonl"], root=workshop.root, where=""), "fit")
    batch = tokenizer(documents, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    moving = [parameter for name, parameter in model.named_parameters() if moves(name)]
    optimiser = torch.optim.Adam(moving, lr=5e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimiser.step()
    return save(model, workshop.root / out)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A base and, per domain, an expert trained in its FFN alone and one trained in embeddings and head alone."""
    workshop = Workshop(tmp_path_factory.mktemp("trained"))
    save(tiny_model(seed=0, initializer_range=0.02), workshop.root / "base")
    write_text(workshop.root / "text", documents=200)
    for domain in DOMAINS:
        text = [f"text/{domain}.jsonl"]
        specialize(workshop.root / "base", workshop.root / domain, text, root=workshop.root, training=TRAINING)
        tuned(workshop, domain, f"{domain}-embeddings", is_embedding)
    workshop.recipe = {
        "base_model": "./base",
        "experts": [{"name": name, "model": f"./{name}", "text": f"./text/{name}.jsonl"} for name in DOMAINS],
    }
    return workshop


def of_trained(trained: Workshop, root: Path, suffix: str = "") -> Workshop:
    """A workshop of one test with the trained models' recipe; nothing is copied."""
    workshop = borrow(trained, root)
    for expert in workshop.recipe["experts"]:
        expert["model"] += suffix
    return workshop


def run(workshop: Workshop, tokens: int = TOKENS, **options: Any) -> Advice:
    return advise(workshop.write(), tokens=tokens, **options)


def shares_of(advice: Advice, name: str) -> dict[str, Figure]:
    """Part -> share of an expert's gain, of experts that have a gain."""
    return {part: each.share for part, each in advice.gain[name].parts.items() if each.share is not None}


def about(findings: Any, name: str, level: str | None = None) -> list[Finding]:
    return [finding for finding in findings if finding.about == name and level in (None, finding.level)]


# Groups and drift


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "olmo2", "gemma2", "phi3", "starcoder2"])
def test_groups_are_those_of_the_loaded_modules(model_type: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(model_type, tie_word_embeddings=tied, **({"head_dim": 8} if model_type in {"qwen3", "gemma2"} else {}))
    base = source(save(model, tmp_path / "base"))
    family = family_of(base.config, where="")
    expected = {id(parameter): "norms" for parameter in model.parameters()}
    expected |= {id(parameter): "head" for parameter in model.get_output_embeddings().parameters()}
    expected |= {id(parameter): "embeddings" for parameter in model.get_input_embeddings().parameters()}
    for layer in decoder_layers(model):
        expected |= {id(parameter): "attention" for parameter in layer.self_attn.parameters()}
        expected |= {id(parameter): "ffn" for parameter in layer.mlp.parameters()}
    names = {name: expected[id(parameter)] for name, parameter in model.named_parameters()}
    assert groups_of(base, family) == names


@pytest.mark.parametrize("said", PAIRS_OF_ALL_FAMILIES, ids=lambda said: "-".join(said.values()))
def test_groups_of_a_model_with_an_encoder_are_those_of_its_layers(said: dict[str, str], tmp_path: Path) -> None:
    """By the classes' attributes: T5 numbers what its layers have, the others call fc1 and fc2 themselves."""
    model = pair_model(**said)
    save(model, tmp_path / "base")
    base = source(tmp_path / "base")
    found = groups_of(base, family_of(base.config, where=""))
    parts: dict[str, set[str]] = {"ffn": set(), "attention": set(), "embeddings": set()}
    for name, module in model.named_modules():
        is_outside = isinstance(module, torch.nn.Embedding) and "Attention" not in name
        kind = "embeddings" if is_outside else _KINDS.get(name.rpartition(".")[2])
        if kind is not None:
            parts[kind] |= {f"{name}.{leaf}" for leaf, _ in module.named_parameters()}
    for group, expected in parts.items():
        assert {name for name in found if found[name] == group} == expected & set(found), group
        assert expected & set(found)
    assert {name for name in found if found[name] == "head"} <= {"final_logits_bias"}
    assert all("norm" in name for name in found if found[name] == "norms")


_KINDS = {
    "fc1": "ffn",
    "fc2": "ffn",
    "DenseReluDense": "ffn",
    "self_attn": "attention",
    "encoder_attn": "attention",
    "SelfAttention": "attention",
    "EncDecAttention": "attention",
}


@pytest.mark.parametrize("model_type", ["bart", "t5"])
def test_advice_knows_ffn_experts_with_an_encoder(model_type: str, tmp_path: Path) -> None:
    """Experts that differ from the base in their FFN alone need nothing else of their own, whatever stack it is in."""
    workshop = make_pair_workshop(tmp_path, model_type)
    base = tmp_path / "base"
    for expert in workshop.recipe["experts"]:
        own = tmp_path / f"{expert['name']}-ffn"
        specialize(base, own, [expert["text"]], root=tmp_path, train="mlp", training=TRAINING)
        expert["model"] = f"./{own.name}"
    advice = run(workshop)
    assert advice.facts is not None and not advice.facts.outside_ffn and advice.drift[DOMAINS[0]].groups["ffn"].share == 1
    assert advice.advice[0].mixture == {"modules": "auto"}


def test_drift_of_planted_changes_is_exact(shared_workshop: Workshop, tmp_path: Path) -> None:
    base = source(shared_workshop.root / "base")
    groups = groups_of(base, FAMILIES[0])
    models = [
        changed(base.folder, tmp_path / "twice", lambda n, t: t * 2 if is_ffn(n) else t),
        changed(base.folder, tmp_path / "back", lambda n, t: t * 0.5 if is_ffn(n) else t),
        changed(base.folder, tmp_path / "head", lambda n, t: t * 4 if n == "lm_head.weight" else t),
        shutil.copytree(base.folder, tmp_path / "same"),
    ]
    drift = compare(base, [source(model) for model in models], groups)
    relative = [[drift.relative(place, group) for group in drift.groups] for place in range(4)]
    assert drift.groups == ["ffn", "attention", "norms", "embeddings", "head"]
    expected = [[1, 0, 0, 0, 0], [0.5, 0, 0, 0, 0], [0, 0, 0, 0, 3], [0, 0, 0, 0, 0]]  # powers of two: no rounding
    assert relative == [pytest.approx(row, abs=1e-12) for row in expected]
    assert [drift.share(0, group) for group in drift.groups] == pytest.approx([1, 0, 0, 0, 0])
    assert drift.cosine(0, 1) == pytest.approx(-1) and drift.cosine(0, 2) == 0 and drift.cosine(0, 3) is None
    assert drift.distance(0, 1) == pytest.approx(1.5) and drift.distance(3, 3) == 0
    assert drift.moved[0] == {name for name in base.tensors if is_ffn(name)} and drift.moved[3] == frozenset()


def test_drift_of_any_model_is_that_of_its_whole_tensors(shared_workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in blocks far smaller than a tensor."""
    monkeypatch.setattr("modekit.search.advise.drift._STEP", 100)
    base, *experts = (source(shared_workshop.root / name) for name in ("base", *DOMAINS))
    groups = groups_of(base, FAMILIES[0])
    drift = compare(base, experts, groups)
    weights = [load_file(model.folder / "model.safetensors") for model in (base, *experts)]
    deltas = [torch.cat([(own[n] - weights[0][n]).double().ravel() for n in groups]) for own in weights[1:]]
    norms = [float(delta.norm()) for delta in deltas]
    assert drift.cosine(0, 2) == pytest.approx(float(deltas[0] @ deltas[2]) / norms[0] / norms[2])
    assert drift.distance(0, 2) == pytest.approx(float((deltas[0] - deltas[2]).norm()) / max(norms[0], norms[2]))
    for group in drift.groups:
        names = [name for name in groups if groups[name] == group]
        square = sum(float((weights[2][n].double() - weights[0][n].double()).square().sum()) for n in names)
        origin = sum(float(weights[0][n].double().square().sum()) for n in names)
        assert drift.relative(1, group) == pytest.approx((square / origin) ** 0.5)
        assert drift.share(1, group) == pytest.approx(square / norms[1] ** 2)


def test_drift_of_an_adapter_is_that_of_its_merged_model(trained: Workshop, tmp_path: Path) -> None:
    base = source(trained.root / "base")
    specialize(base.folder, tmp_path / "lora", ["text/law.jsonl"], root=trained.root, train="lora", rank=3, training=TRAINING)
    adapter = open_adapter("adapter", "lora", tmp_path / "lora", base)
    groups = groups_of(base, FAMILIES[0])
    drift = compare(base, [adapter], groups)
    merged = load_adapted(base.folder, adapter).state_dict()
    weights = load_file(base.folder / "model.safetensors")
    for group in drift.groups:
        names = [name for name in groups if groups[name] == group]
        square = sum(float((merged[n].double() - weights[n].double()).square().sum()) for n in names)
        origin = sum(float(weights[n].double().square().sum()) for n in names)
        assert drift.relative(0, group) == pytest.approx((square / origin) ** 0.5, abs=1e-9)
    assert drift.relative(0, "ffn") and drift.relative(0, "attention") and drift.relative(0, "head") == 0


# Parts of experts in the base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_is_given_back_bit_for_bit(trained: Workshop, tmp_path: Path, dtype: torch.dtype) -> None:
    folders = [trained.root / "base", *(trained.root / f"{name}-embeddings" for name in DOMAINS[:2]), trained.root / "law"]
    for place, folder in enumerate(folders):
        save(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), tmp_path / str(place))
    sources = [source(tmp_path / str(place)) for place in range(len(folders))]
    groups = groups_of(sources[0], FAMILIES[0])
    moved = compare(sources[0], sources[1:], groups).moved
    model, ids = load_model(tmp_path / "0"), torch.arange(3, 60)[None]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model(ids).logits
    patched = PatchedBase(model, sources, groups, moved, OpenFiles())
    for expert in range(len(folders) - 1):
        for name, part in PARTS.items():
            with patched.with_parts([expert], part):
                inside = model.state_dict()
                assert any(not torch.equal(before[n], inside[n]) for n in before) == bool(part & patched.moved_groups(expert))
                if name == "all":
                    own = load_model(tmp_path / str(expert + 1))
                    assert_close(own(ids).logits, model(ids).logits)
        with patched.with_parts([0, 1, 2], PARTS["all"]), patched.with_parts([expert], PARTS["ffn"]):
            pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert_close(model(ids).logits, logits)


def test_the_base_is_given_back_after_an_error(trained: Workshop) -> None:
    sources = [source(trained.root / name) for name in ("base", "law")]
    groups = groups_of(sources[0], FAMILIES[0])
    model = load_model(sources[0].folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    patched = PatchedBase(model, sources, groups, compare(sources[0], sources[1:], groups).moved, OpenFiles())
    with pytest.raises(KeyboardInterrupt), patched.with_parts([0], PARTS["all"]):
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_losses_are_those_of_models_put_together_by_hand(trained: Workshop) -> None:
    """An expert that moved everything, so that every part is another model."""
    folder = tuned(trained, "law", "law-all", lambda name: True, steps=6)
    sources = [source(trained.root / "base"), source(folder), source(trained.root / "code-embeddings")]
    groups = groups_of(sources[0], FAMILIES[0])
    drift = compare(sources[0], sources[1:], groups)
    assert set(drift.moved[0]) == set(groups)
    documents = documents_of_split(read_documents(["text/law.jsonl"], root=trained.root, where=""), "select")
    text = encode(load_tokenizer(trained.root / "base"), documents, max_tokens=500, sequence_length=64)
    patched = PatchedBase(load_model(trained.root / "base"), sources, groups, drift.moved, OpenFiles())
    gains = measure(patched, {0: text}, [0, 1])
    states = [load_model(each.folder).state_dict() for each in sources]

    def loss(state: dict[str, torch.Tensor]) -> float:
        model = load_model(sources[0].folder)
        model.load_state_dict(state)
        return score_domain(model, Domain("", None, text), lambda _: None).loss

    for name, part in PARTS.items():
        by_hand = loss({n: states[1 if groups[n] in part else 0][n] for n in states[0]})
        assert gains.parts[0][name].mean == pytest.approx(by_hand, abs=1e-6), name
    assert gains.whole[1][0].mean == pytest.approx(loss(states[2]), abs=1e-6)
    assert len({losses.mean for losses in gains.parts[0].values()}) == len(PARTS)
    average = {n: states[1][n] if is_ffn(n) else (states[1][n] + states[2][n]) / 2 for n in states[0]}
    assert on_average(patched, {0: text}, [0, 1])[0].mean == pytest.approx(loss(average), abs=1e-5)


def test_the_error_of_a_mean_is_the_textbooks() -> None:
    values = np.array([1.0, 4.0, 2.0, 7.0, 3.0])
    got = figure_of(lambda mean: mean, BlockLosses(values * 10, np.full(5, 10.0)))
    assert got.value == pytest.approx(values.mean()) and got.error == pytest.approx(values.std(ddof=1) / 5**0.5)
    assert figure_of(lambda mean: mean, BlockLosses(values[:1], np.ones(1))).error is None


# What advice comes to


def test_experts_of_the_ffn_alone(trained: Workshop, tmp_path: Path) -> None:
    advice = run(of_trained(trained, tmp_path))
    for name in DOMAINS:
        shares = shares_of(advice, name)
        assert {part for part, share in shares.items() if share.value == 1} == {part for part in PARTS if "ffn" in PARTS[part]}
        assert all(share.value == 0 for part, share in shares.items() if "ffn" not in PARTS[part])
    assert advice.recipe is not None and advice.recipe["mixture"]["modules"] == "auto"
    assert advice.facts is not None and not advice.facts.outside_ffn
    assert not [finding for finding in advice.findings if finding.level != "note"]
    ways = {way.name: way for way in advice.ways}
    assert all(way.lost == 0 and way.loss == pytest.approx(ways["gateway"].loss) for way in ways.values())
    assert (
        ways["gateway"].total == 4 * ways["gateway"].active and ways["native"].said == "MixtralForCausalLM; of each expert ffn"
    )
    native = run(of_trained(trained, tmp_path), native=True)
    assert native.recipe is not None and native.plan is not None
    assert native.recipe["output"] == {"format": "native"} and native.plan.architecture == "MixtralForCausalLM"
    assert native.recipe["mixture"] == {"backbone": "base"} and "lexical" in native.plan.router_why


def test_experts_whose_gain_sits_in_the_embeddings(trained: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modekit.weights.numeric.BLOCK", 512)  # tensors of several blocks
    advice = run(of_trained(trained, tmp_path, "-embeddings"))
    shares = shares_of(advice, DOMAINS[1])
    assert (
        ON_AVERAGE in shares
        and shares["embeddings + head"].value == 1
        and shares["ffn"].value == 0
        and shares["all but embeddings"].value < 0.95
    )
    assert advice.recipe is not None and advice.recipe["mixture"]["modules"] == "all"
    ways = {way.name: way for way in advice.ways}
    assert ways["modekit"].lost == ways["gateway"].lost == 0
    expected = np.mean([advice.gain[name].parts[ON_AVERAGE].loss - advice.losses[name][name] for name in DOMAINS])
    assert ways["native"].lost == pytest.approx(expected) and ways["native"].lost > 0
    native = run(of_trained(trained, tmp_path, "-embeddings"), native=True)
    assert native.recipe is not None and native.facts is not None and native.facts.backbones is not None
    assert native.facts.backbones["base"] == 0 and native.facts.backbones["average"] > 0
    assert native.recipe["mixture"]["backbone"] == "average"
    (unmixed,) = about(native.findings, "medicine, law, code", "warning")
    assert "averaged" in unmixed.what and "medicine 100%" in unmixed.found


def test_adapters_stay_low_rank(trained: Workshop, tmp_path: Path) -> None:
    workshop = of_trained(trained, tmp_path)
    for expert in workshop.recipe["experts"][:2]:
        out = tmp_path / f"{expert['name']}-lora"
        specialize(
            trained.root / "base",
            out,
            [expert["text"]],
            root=tmp_path,
            train="lora",
            rank=2,
            training=replace(TRAINING, learning_rate=2e-2),
        )
        del expert["model"]
        expert["adapter"] = str(out)
    workshop.recipe["experts"][2] = {"name": "code", "model": "base", "text": str(trained.root / "text/code.jsonl")}
    advice = run(workshop)
    assert advice.facts is not None and advice.facts.low_rank and advice.facts.outside_ffn
    assert advice.recipe is not None and advice.recipe["mixture"]["modules"] == "auto"
    assert advice.recipe["experts"][0] == {**workshop.recipe["experts"][0]}
    for expert in workshop.recipe["experts"]:
        del expert["text"]
    silent = run(workshop)
    assert silent.plan is not None and "arrow" in silent.plan.router_why


@pytest.mark.parametrize("suffix", ["", "-embeddings"])
@pytest.mark.parametrize("native", [False, True])
def test_the_written_recipe_builds(trained: Workshop, tmp_path: Path, suffix: str, native: bool) -> None:
    workshop = of_trained(trained, tmp_path, suffix)
    workshop.recipe["eval"] = {"music": str(trained.root / "text/law.jsonl")}
    workshop.recipe["output"] = {"shard_size": "1MB"}
    advice = run(workshop, native=native)
    write_advised(tmp_path / "advised.yaml", advice, tmp_path)
    recipe = load_recipe(tmp_path / "advised.yaml")
    assert recipe.names == list(DOMAINS) and "music" in recipe.eval and recipe.output.shard_size == 10**6
    text = (tmp_path / "advised.yaml").read_text()
    assert all(choice.source.split()[0] in text for choice in advice.advice)
    build(make_plan(recipe, tmp_path), tmp_path / "OUT")
    checkpoint = open_checkpoint(tmp_path / "OUT")
    assert checkpoint.shape.plain == (native or not suffix) and checkpoint.record.router.status == "fitted"


def test_nothing_in_a_finding_leaves_its_comment() -> None:
    recipe = {"base_model": "b", "experts": [{"name": "a", "model": "c"}], "mixture": {"method": "linear"}}
    bad = Finding("warning", "a", "x\nbase_model: evil\u2028output: {}\x85y \x1b[31m\x00", to_do="mixture: {}\r\nz")
    text = recipe_text(recipe, [choose(FACTS)], [bad])
    assert yaml.safe_load(text) == recipe and "evil" in text


def test_what_n_grams_are_said_to_name_is_what_the_built_router_decides(trained: Workshop, tmp_path: Path) -> None:
    workshop = of_trained(trained, tmp_path)
    words = run(workshop).words
    assert words is not None and words.domains == list(DOMAINS)
    model = load_model(workshop.build(mixture={"router": {"fit": "ngram"}}))
    (slot,) = open_checkpoint(tmp_path / "OUT").slots
    weights: list[torch.Tensor] = []
    model.get_submodule(slot.name.removesuffix(".gate")).register_forward_hook(lambda module, args, out: weights.append(out[0]))
    tokenizer = load_tokenizer(tmp_path / "OUT")
    for place, expert in enumerate(workshop.recipe["experts"]):
        weights.clear()
        documents = documents_of_split(read_documents([expert["text"]], root=tmp_path, where=""), "select")
        for sequence in encode(tokenizer, documents, max_tokens=TOKENS, sequence_length=512):
            model(input_ids=torch.tensor([sequence.ids]))
        chosen = torch.cat(weights).argmax(-1)
        assert words.named[place] == pytest.approx([float((chosen == other).float().mean()) for other in range(3)])
    assert words.accuracy == pytest.approx(np.diagonal(words.named).mean()) and words.accuracy > 0.5


def test_a_recipe_written_elsewhere_names_the_same_files(trained: Workshop, tmp_path: Path) -> None:
    recipe = {**trained.recipe, "eval": {"music": ["./text/law.jsonl", "some/data-set"]}}
    recipe["experts"] = [*recipe["experts"], {"name": "general", "model": "base", "text": "text/law.jsonl"}]
    (trained.root / "sub").mkdir(exist_ok=True)
    moved = from_folder(recipe, trained.root, trained.root / "sub")
    assert moved["base_model"] == "../base" and moved["experts"][0]["text"] == "../text/medicine.jsonl"
    assert moved["experts"][-1]["model"] == "base" and moved["eval"]["music"] == ["../text/law.jsonl", "some/data-set"]
    assert from_folder(recipe, trained.root, trained.root) == recipe
    away = from_folder(recipe, trained.root, tmp_path)
    assert (tmp_path / away["base_model"]).resolve() == trained.root / "base"


def test_the_report_split_is_never_read(trained: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    call = PreTrainedTokenizerBase.__call__

    def spy(self: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend([text] if isinstance(text, str) else text)
        return call(self, text, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", spy)
    workshop = of_trained(trained, tmp_path)
    (tmp_path / "eval.jsonl").write_text(json.dumps({"text": "what only the table may see"}) + "\n")
    workshop.recipe["eval"] = {"law": str(tmp_path / "eval.jsonl")}
    advice = run(workshop)
    assert advice.losses and advice.words is not None
    splits = [split_of(document) for document in seen]
    assert splits.count("select") >= 3 and splits.count("fit") >= 100 and "report" not in splits
    assert "what only the table may see" not in seen


def test_scored_text_is_select_text_that_trained_nothing(trained: Workshop, tmp_path: Path) -> None:
    recipe = parse_recipe({**trained.recipe, "mixture": {"method": "linear"}})
    tokenizer = load_tokenizer(trained.root / "base")
    texts, _ = read_texts(recipe, trained.root, [], tokenizer, 10**6)
    documents = read_documents(["text/law.jsonl"], root=trained.root, where="")
    chosen = documents_of_split(documents, "select")
    assert len(texts[1].sequences) == len(chosen) > 5 and list(texts[1].fit) == documents_of_split(documents, "fit")
    from modekit.text.splits import TRAINED_DIGITS, TRAINED_FILE, digest_of

    (tmp_path / TRAINED_FILE).write_text(digest_of(chosen[0])[:TRAINED_DIGITS] + "\n")
    fewer, _ = read_texts(recipe, trained.root, [tmp_path], tokenizer, 10**6)
    assert len(fewer[1].sequences) == len(chosen) - 1


def test_without_text_what_needs_it_is_left_out(trained: Workshop, tmp_path: Path) -> None:
    workshop = of_trained(trained, tmp_path)
    for expert in workshop.recipe["experts"]:
        del expert["text"]
    advice = run(workshop)
    assert not advice.losses and advice.words is None
    assert [finding.about for finding in advice.findings if "no text" in finding.what] == list(DOMAINS)
    assert advice.recipe is not None and advice.recipe["mixture"] == {"modules": "auto"}
    assert advice.plan is not None and advice.plan.method == "linear"
    partly = of_trained(trained, tmp_path, "-embeddings")
    del partly.recipe["experts"][0]["text"]
    partly.recipe["experts"][2]["text"] = "./nowhere.jsonl"
    advice = run(partly)
    assert set(advice.gain) == {DOMAINS[1]}
    (missing,) = about(advice.findings, "code", "error")
    assert "does not exist" in missing.what and missing.to_do == "correct the path"
    assert advice.recipe is not None and "text" not in advice.recipe["experts"][2]
    assert advice.recipe["mixture"] == {"method": "linear", "backbone": "average"}


def test_a_base_without_tokenizer(trained: Workshop, tmp_path: Path) -> None:
    workshop = of_trained(trained, tmp_path)
    shutil.copytree(trained.root / "base", tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    workshop.recipe["base_model"] = "./base"
    advice = run(workshop)
    assert "no tokenizer" in about(advice.findings, "base_model")[0].what
    assert advice.plan is not None and advice.plan.method == "linear"


# Findings


def test_equal_and_nearly_equal_experts(trained: Workshop, tmp_path: Path) -> None:
    workshop = of_trained(trained, tmp_path)
    base = load_file(trained.root / "base" / "model.safetensors")
    changed(trained.root / "medicine", tmp_path / "near", lambda n, t: t + 0.01 * (t - base[n]))
    shutil.copytree(trained.root / "base", tmp_path / "base-again")
    model_of = ["near", "medicine", "base-again"]
    for expert, model in zip(workshop.recipe["experts"], model_of, strict=True):
        expert["model"] = str((tmp_path if model != "medicine" else trained.root) / model)
    advice = run(workshop)
    (near,) = about(advice.findings, "medicine, law")
    assert "almost the same way" in near.what and "distance 0.010" in near.found
    same, beaten = about(advice.findings, "code")
    assert "equals the base" in same.what and "model: base" in same.to_do
    assert "better on its text" in beaten.what
    assert advice.recipe is not None
    assert advice.recipe["experts"][2] == {"name": "code", "model": "base", "text": workshop.recipe["experts"][2]["text"]}
    workshop.recipe["experts"][0]["model"] = str(trained.root / "medicine")
    assert "the same model" in about(run(workshop).findings, "medicine, law")[0].what


def test_mixed_up_texts(trained: Workshop, tmp_path: Path) -> None:
    workshop = of_trained(trained, tmp_path)
    experts = workshop.recipe["experts"]
    experts[0]["text"], experts[1]["text"] = experts[1]["text"], experts[0]["text"]
    found = [finding.what for finding in about(run(workshop).findings, "law", "warning")]
    assert [what for what in found if "better on its text" in what] == ["medicine is better on its text than it is itself"]


def of_losses(losses: dict[int, list[float]]) -> Gains:
    """Gains of models (-1: the base) from their mean loss per domain, the same in each of four blocks."""
    ones = np.ones(4)
    return Gains(
        {model: {d: BlockLosses(loss * ones, ones) for d, loss in enumerate(row)} for model, row in losses.items()}, {}
    )


def test_an_expert_that_another_beats_on_its_own_text_is_named_even_when_it_is_the_base() -> None:
    recipe = parse_recipe(
        {
            "base_model": "b",
            "mixture": {"method": "linear"},
            "experts": [
                {"name": "medicine", "model": "m"},
                {"name": "law", "model": "l"},
                {"name": "general", "model": "base"},
            ],
        }
    )
    medicine, law = [2.0, 3.0, 3.44], [3.0, 2.0, 3.5]

    def found(base: list[float], medicine: list[float]) -> list[Finding]:
        gains = of_losses({-1: base, 0: medicine, 1: law, 2: base})
        return list(of_gains(recipe, gains, [0, 1]))

    (general,) = found([4.0, 4.0, 3.6], medicine)
    assert general.about == "general" and general.what == "medicine is better on its text than it is itself"
    assert "0.160" in general.found and "the worst of all" in general.found and "medicine" in general.to_do
    (general,) = found([4.0, 4.0, 3.47], medicine)  # law is worse still
    assert "the worst of all" not in general.found
    assert not found([4.0, 4.0, 3.4], medicine)  # text for the base: no expert knows it better
    worst, general = found([2.5, 4.0, 3.6], [3.5, 3.0, 3.44])
    assert worst.about == "medicine" and "not better than the base" in worst.what  # and no rival that is better than the base
    gains = of_losses({-1: [4.0, 4.0], 0: [4.5, 3.0], 1: [3.0, 2.0]})
    _, beaten = of_gains(recipe, gains, [0, 1])
    assert beaten.what == "law is better on its text than it is itself" and "the worst of all" in beaten.found


def test_a_base_with_text_that_an_expert_was_trained_on_is_named(trained: Workshop, tmp_path: Path) -> None:
    workshop = of_trained(trained, tmp_path)
    text = workshop.recipe["experts"][1]["text"]
    workshop.recipe["experts"].append({"name": "general", "model": "base", "text": text})
    assert "law is better on its text than it is itself" in [each.what for each in about(run(workshop).findings, "general")]


@pytest.mark.parametrize(
    ("mixture", "changes", "expected"),
    [
        ({"modules": "auto"}, {}, ("note", "stays behind", "law 60%, code 98%")),
        ({"modules": "auto"}, {"shares": {"ffn": 0.5}}, ("warning", "stays behind", "law 60%, code 98%")),
        ({"backbone": "average"}, {"shares": None}, ("warning", "is averaged", "law 60%, code 98%")),
        ({"modules": "all"}, {}, None),
    ],
)
def test_what_full_models_changed_outside_of_what_is_mixed_is_said(
    mixture: dict[str, Any], changes: dict[str, Any], expected: tuple[str, str, str] | None
) -> None:
    recipe = parse_recipe(
        {
            "base_model": "b",
            "mixture": {"method": "linear"},
            "experts": [{"name": "medicine", "model": "m"}, {"name": "law", "model": "l"}, {"name": "code", "model": "c"}],
        }
    )
    squares = {"ffn": [1.0, 2.0, 1.0], "attention": [0.0, 2.0, 25.0], "embeddings": [0.005, 1.0, 24.0]}
    drift = Drift(dict.fromkeys(squares, 1.0), {group: np.diag(row) for group, row in squares.items()}, [], [], ())
    found = list(of_unmixed(recipe, drift, [0, 1, 2], mixture, replace(FACTS, **changes)))
    assert len(found) == (expected is not None)
    if expected is not None:
        level, fate, shares = expected
        assert found[0].level == level and fate in found[0].what and found[0].about == "law, code"
        assert found[0].found == f"{shares} of the squared difference from the base" and "modekit train" in found[0].to_do


def test_an_expert_without_a_gain(trained: Workshop, tmp_path: Path) -> None:
    workshop = of_trained(trained, tmp_path)
    worse = changed(trained.root / "law", tmp_path / "worse", lambda n, t: t + torch.randn_like(t) if is_ffn(n) else t)
    workshop.recipe["experts"][1]["model"] = str(worse)
    advice = run(workshop)
    found = [finding.what for finding in about(advice.findings, "law", "warning")]
    assert "it is not better than the base model on its own text" in found
    assert advice.recipe is not None and [expert.get("model") for expert in advice.recipe["experts"]].count("base") == 1
    assert advice.gain["law"].parts["ffn"].share is None


def test_two_domains_that_are_one_text(trained: Workshop, tmp_path: Path) -> None:
    workshop = of_trained(trained, tmp_path)
    assert not about(run(workshop).findings, "medicine, law")
    workshop.recipe["experts"][1]["text"] = workshop.recipe["experts"][0]["text"]
    advice = run(workshop)
    assert "texts are nearly the same" in about(advice.findings, "medicine, law", "warning")[0].what
    assert advice.words is not None and Confusion((0, 1, 2), np.array(advice.words.named)).between(0, 1) == pytest.approx(0.5)
    assert "granularity: context" in about(advice.findings, "medicine, law, code", "note")[0].to_do


def test_everything_wrong_with_an_expert_is_said_at_once(trained: Workshop, tmp_path: Path) -> None:
    workshop = of_trained(trained, tmp_path)
    folder = copy_expert(workshop)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    query = "model.layers.0.self_attn.q_proj.weight"
    weights[query] = weights[query][:-1].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 1}))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    advice = run(workshop)
    errors = " | ".join(finding.what + finding.found for finding in about(advice.findings, "law", "error"))
    for words in ("tensor is missing", "another shape", "tokenizer differs", "'a'"):
        assert words in errors, f"{words}: {errors}"
    warnings = " | ".join(finding.what for finding in about(advice.findings, "law", "warning"))
    assert "chat template" in warnings and "ends its answers" in warnings
    assert all(finding.to_do for finding in about(advice.findings, "law"))
    assert advice.recipe is not None and [expert["name"] for expert in advice.recipe["experts"]] == ["medicine", "code"]
    assert set(advice.drift) == {"medicine", "code"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights(trained: Workshop, tmp_path: Path, value: float) -> None:
    workshop = of_trained(trained, tmp_path)
    folder = copy_expert(workshop)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.self_attn.o_proj.weight"][3, 4] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    advice = run(workshop)
    (finding,) = about(advice.findings, "law", "error")
    assert "NaN or Inf" in finding.what and finding.found == "model.layers.2.self_attn.o_proj.weight"
    assert advice.recipe is not None and len(advice.recipe["experts"]) == 2
    shutil.copytree(folder, tmp_path / "base")
    workshop.recipe["base_model"] = "./base"
    message = refuse("advise", workshop.write())
    assert "NaN or Inf" in message and "base_model" in message and "o_proj" in message


def test_models_that_are_not_there_or_pickled(trained: Workshop, tmp_path: Path) -> None:
    workshop = of_trained(trained, tmp_path)
    folder = copy_expert(workshop, 0)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    workshop.recipe["experts"][1]["model"] = "./nowhere"
    advice = run(workshop)
    assert "pickled" in about(advice.findings, "medicine", "error")[0].what
    assert "does not exist" in about(advice.findings, "law", "error")[0].what
    workshop.recipe["base_model"] = "./nowhere"
    assert "model folder does not exist" in refuse("advise", workshop.write())


def test_dtypes_that_differ(trained: Workshop, tmp_path: Path) -> None:
    workshop = of_trained(trained, tmp_path)
    folder = workshop.recipe["experts"][0]["model"]
    save(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), tmp_path / "half")
    workshop.recipe["experts"][0]["model"] = "./half"
    (finding,) = about(run(workshop).findings, "medicine", "note")
    assert finding.found == "bfloat16, base float32"


def test_chat_templates_by_file(tmp_path: Path) -> None:
    assert chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": " {{ a }} "}))
    assert chat_template(tmp_path) == "{{ a }}"
    (tmp_path / "chat_template.jinja").write_text("{{ b }}\n")
    assert chat_template(tmp_path) == "{{ b }}"


# Rules

FACTS = Facts(
    native=False,
    experts=4,
    low_rank=False,
    outside_ffn=True,
    shares=dict.fromkeys(PARTS, 1.0),
    backbones=None,
    text="all",
)
APART = {**dict.fromkeys(PARTS, 1.0), "ffn": 0.4, "attention": 0.1, "ffn + attention": 0.6}
WITH_ATTENTION = {**APART, "ffn + attention": 0.97}
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"modules": "auto"}),
    ({"native": True}, {"backbone": "base"}),
    ({"native": True, "lexical_fits": False}, {"backbone": "base"}),
    ({"shares": APART}, {"modules": "all"}),
    ({"shares": WITH_ATTENTION}, {"modules": "all"}),
    ({"shares": APART, "native": True}, {"backbone": "average"}),
    ({"shares": APART, "native": True, "backbones": {"base": 0.4, "average": 0.3}}, {"backbone": "base"}),
    ({"shares": APART, "native": True, "backbones": {"base": 0.4, "average": 0.5}}, {"backbone": "average"}),
    ({"shares": APART, "native": True, "low_rank": True}, {"backbone": "base"}),
    ({"shares": APART, "native": True, "low_rank": True, "lexical_fits": False}, {"backbone": "average"}),
    ({"shares": None}, {"modules": "all"}),
    ({"low_rank": True, "shares": WITH_ATTENTION}, {"modules": "auto"}),
    ({"low_rank": True, "shares": APART}, {"modules": "all"}),
    ({"low_rank": True, "shares": None, "text": "none"}, {"modules": "auto"}),
    ({"shares": None, "text": "some"}, {"backbone": "average", "method": "linear"}),
    ({"shares": None, "text": "none"}, {"backbone": "average"}),
    ({"shares": None, "text": "some", "outside_ffn": False}, {"modules": "auto", "method": "linear"}),
]


@pytest.mark.parametrize(("facts", "expected"), CASES)
def test_every_rule(facts: dict[str, Any], expected: dict[str, Any]) -> None:
    choice = choose(replace(FACTS, **facts))
    assert choice.mixture == expected
    assert (choice.why and "benchmarks/" in choice.source) or "measured here" in choice.source


def test_every_rule_is_used_and_gives_a_recipe() -> None:
    used = set()
    for facts, _ in CASES:
        choice = choose(replace(FACTS, **facts))
        used.add(choice.source)
        names = ("adapter", "model")[not facts.get("low_rank")]
        experts = [{"name": name, names: f"./{name}", "text": f"{name}.txt"} for name in "ab"]
        output = {"format": "native"} if facts.get("native") else {}
        parse_recipe({"base_model": "b", "experts": experts, "mixture": choice.mixture, "output": output})
    assert used == {rule.source for rule in EXPERTS}


# The command


def test_the_command(trained: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from modekit.cli.shell import main

    def said(*arguments: object) -> str:
        sys.argv = ["modekit", "advise", *map(str, arguments)]
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
        return capsys.readouterr().out

    recipe = of_trained(trained, tmp_path, "-embeddings").write(mixture={"methud": "what advice does not read"})
    table = said(recipe, "--tokens", TOKENS, "--write", tmp_path / "advised.yaml")
    table = " ".join(table.split())
    for words in (
        "How far experts moved",
        "Where the gain sits",
        "n-grams",
        "modules: all",
        "gives ",
        "fit reads",
        *LIMITS,
        "modekit build",
    ):
        assert words in table
    assert yaml.safe_load((tmp_path / "advised.yaml").read_text())["mixture"]["modules"] == "all"
    before = tree(tmp_path)
    data = Advice.model_validate_json(said(recipe, "--tokens", TOKENS, "--json"))
    assert tree(tmp_path) == before
    assert data.recipe is not None and data.recipe["mixture"]["modules"] == "all"
    assert data.drift["law"].groups["ffn"].relative == 0 and data.text["law"].documents > 5
    assert shares_of(data, "law")["embeddings + head"].value == 1
    assert "exists" in refuse("advise", recipe, "--write", tmp_path / "advised.yaml")
    assert "folder does not exist" in refuse("advise", recipe, "--write", tmp_path / "no" / "advised.yaml")


def test_nothing_to_mix_ends_with_exit_code_1(trained: Workshop, tmp_path: Path) -> None:
    workshop = of_trained(trained, tmp_path)
    for expert in workshop.recipe["experts"]:
        expert["model"] = "./nowhere"
    workshop.write()
    code, printed, _ = ended("advise", tmp_path / "recipe.yaml", "--write", tmp_path / "advised.yaml")
    assert code == 1 and "Nothing is left to mix" in printed
    assert not (tmp_path / "advised.yaml").exists()


def test_native_that_cannot_be_had_is_refused(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    for seed, name in enumerate(("base", "law")):
        save(tiny_model("gemma2", seed=seed, head_dim=8), tmp_path / name)
    workshop.recipe = {"base_model": "./base", "experts": [{"name": "law", "model": "./law"}]}
    assert "no native architecture" in refuse("advise", workshop.write(), "--native")
    assert run(workshop).recipe is not None


def test_a_wrong_recipe_is_refused(trained: Workshop, tmp_path: Path) -> None:
    workshop = of_trained(trained, tmp_path)
    workshop.recipe["experts"][0]["modle"] = "typo"
    assert "did you mean 'model'?" in refuse("advise", workshop.write())
    workshop.recipe["experts"] = "none"
    assert "experts" in refuse("advise", workshop.write())


def test_files_are_looked_at_without_torch() -> None:
    done = run_python("import sys, modekit.search.advise.advise; assert not {'torch', 'transformers'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr
