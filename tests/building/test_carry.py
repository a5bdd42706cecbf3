"""A plain checkpoint that carries whole experts: each one forced is its own model; `verify` computes it all again."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapter_folders import quiet, train_adapter
from byte_level import save_byte_model
from conftest import DOMAINS, Workshop, character_tokenizer, logits_of, save, tiny_model, write_text
from generated import check_generation
from kills import KILLED, exit_code
from modekit.building.build import build, write_tensor
from modekit.building.differences import _head
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.carried import CARRIED_FILE, carried_digest
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import ModekitError, SourceError, TrainingError, UnsupportedError
from modekit.loaded.native import DenseView
from modekit.loaded.shapes import mixture_of
from modekit.planning.carry import CarrySize
from modekit.planning.make import make_plan
from modekit.recipes.read import load_recipe
from modekit.routing.fit import refit
from modekit.training.settings import TrainSettings, checked_settings
from modekit.training.train import train
from modekit.weights.bases import Stream, fit_pass_through
from sources.test_families import QWEN3_5, WINDOWED

pytestmark = pytest.mark.usefixtures("short_tables")

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
FULL_SIZES = {**SIZES, "num_hidden_layers": 2}
"""Where every tensor differs, the directions of each layer take seconds."""
FAMILIES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "mixtral", {}),
    ("llama", "mixtral", {"tie_word_embeddings": True}),
    ("llama", "granitemoe", {"attention_bias": True}),
    ("mistral", "mixtral", {}),
    ("qwen2", "qwen2_moe", {}),
    ("qwen3", "qwen3_moe", {"head_dim": 32}),
    ("granite", "granitemoe", {"residual_multiplier": 0.5, "embedding_multiplier": 3.0, "attention_multiplier": 0.1}),
    ("ernie4_5", "ernie4_5_moe", {}),
    ("hunyuan_v1_dense", "hunyuan_v1_moe", {"head_dim": 32}),
]


def adapter_shop(
    root: Path, family: str = "llama", *, modules: list[str] = LINEAR, reads_bytes: bool = False, **overrides: Any
) -> Workshop:
    """A base and a LoRA adapter per domain, of rank 2 on `modules`; llama.cpp and vLLM know tokenizers that read bytes."""
    if reads_bytes:
        save_byte_model(root / "base", family, 0, **{**SIZES, **overrides})
    else:
        save(tiny_model(family, **{**SIZES, **overrides}), root / "base")
    write_text(root / "text")
    experts = []
    for seed, name in enumerate(DOMAINS):
        train_adapter(root / "base", peft.LoraConfig(r=2, lora_alpha=2, target_modules=modules), root / name)
        file = root / name / "adapter_model.safetensors"
        generator = np.random.default_rng(seed)
        numbers = {key: generator.normal(0, 0.08, each.shape).astype(np.float32) for key, each in load_file(file).items()}
        save_file(numbers, file)
        experts.append({"name": name, "adapter": f"./{name}", "text": f"./text/{name}.jsonl"})
    return Workshop(root, recipe_of(experts))


def recipe_of(experts: list[dict[str, Any]], **output: Any) -> dict[str, Any]:
    mixture = {"method": "routing", "top_k": 1, "router": {"fit": "lexical"}}
    return {"base_model": "./base", "experts": experts, "mixture": mixture, "output": {"format": "plain", **output}}


def full_shop(root: Path, **output: Any) -> Workshop:
    """A base and a full fine-tune per domain, every tensor of which differs."""
    save(tiny_model(**FULL_SIZES), root / "base")
    write_text(root / "text")
    for seed, name in enumerate(DOMAINS):
        model, generator = tiny_model(**FULL_SIZES), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * (0.02 if parameter.ndim == 1 else 0.05 * parameter.std()))
        save(model, root / name)
    experts = [{"name": name, "model": f"./{name}", "text": f"./text/{name}.jsonl"} for name in DOMAINS]
    return Workshop(root, recipe_of(experts, carry="all", **output))


def own_model(root: Path, expert: dict[str, Any]) -> PreTrainedModel:
    if "model" in expert:
        return AutoModelForCausalLM.from_pretrained(root / expert["model"]).eval()
    with quiet():
        return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root / "base"), root / expert["name"]).eval()


def divergence(own: torch.Tensor, other: torch.Tensor) -> float:
    own, other = own.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((own.exp() * (own - other)).sum(-1).mean())


def shares(shop: Workshop, out: Path, ids: torch.Tensor) -> list[float]:
    """Per expert, KL of the forced expert over the base's: 0 is the whole expert, 1 nothing of it."""
    checkpoint, base = open_checkpoint(out), logits_of(shop.root / "base", ids)
    mixture, view, found = AutoModelForCausalLM.from_pretrained(out).eval(), DenseView(checkpoint), []
    for number, expert in enumerate(shop.recipe["experts"]):
        own = logits_of(own_model(shop.root, expert), ids)
        with mixture_of(mixture, checkpoint).forced(number):
            forced = logits_of(mixture, ids)
        view.use_expert(number)
        torch.testing.assert_close(logits_of(view.model, ids), forced, atol=1e-3, rtol=1e-3)
        found.append(divergence(own, forced) / divergence(own, base))
    return found


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    shop = adapter_shop(tmp_path_factory.mktemp("carry"))
    shop.build("OUT")
    return shop


@pytest.fixture(scope="module")
def carried(shop: Workshop) -> Checkpoint:
    return open_checkpoint(shop.root / "OUT")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_a_forced_adapter_is_what_peft_makes_of_it(
    tmp_path: Path, ids: torch.Tensor, family: tuple[str, str, dict[str, Any]]
) -> None:
    dense, native, overrides = family
    shop = adapter_shop(tmp_path, dense, **overrides)
    out = shop.build("OUT")
    checkpoint = open_checkpoint(out)
    assert checkpoint.config["model_type"] == native and checkpoint.record.carry is not None
    assert max(shares(shop, out, ids)) < 1e-2
    assert is_proven(checks := verify(checkpoint)), checks


def test_what_is_left_comes_from_the_output_projection(tmp_path: Path, ids: torch.Tensor) -> None:
    """The FFN's norm does not see its difference; everything else is exact."""
    shop = adapter_shop(tmp_path, modules=[name for name in LINEAR if name != "o_proj"])
    assert max(shares(shop, shop.build("OUT"), ids)) < 1e-4
    folded = shares(shop, shop.build("FFN", output={"format": "plain", "carry": "ffn"}), ids)
    assert min(folded) > 0.1


@pytest.mark.parametrize("rank", [64, 256])
def test_full_models_are_carried_the_better_the_more_channels(tmp_path: Path, ids: torch.Tensor, rank: int) -> None:
    shop = full_shop(tmp_path, rank=rank)
    out = shop.build("OUT")
    folded = shares(shop, shop.build("FFN", output={"format": "plain", "carry": "ffn"}), ids)
    found = shares(shop, out, ids)
    assert all(one < (0.6 if rank == 64 else 0.15) * other for one, other in zip(found, folded, strict=True)), (found, folded)
    assert is_proven(checks := verify(open_checkpoint(out))), checks


def test_dora_is_carried_by_what_it_makes_of_the_weights(tmp_path: Path, ids: torch.Tensor) -> None:
    save(tiny_model(**SIZES), tmp_path / "base")
    write_text(tmp_path / "text")
    experts = []
    for name in DOMAINS[:2]:
        config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=LINEAR, use_dora=True)
        train_adapter(tmp_path / "base", config, tmp_path / name)
        experts.append({"name": name, "adapter": f"./{name}", "text": f"./text/{name}.jsonl"})
    shop = Workshop(tmp_path, recipe_of(experts, rank=256))
    folded = shares(shop, shop.build("FFN", output={"format": "plain", "carry": "ffn"}), ids)
    found = shares(shop, shop.build("OUT"), ids)
    assert all(one < 0.15 * other for one, other in zip(found, folded, strict=True)), (found, folded)


def test_generation_pads_and_caches(carried: Checkpoint) -> None:
    check_generation(carried.folder)


def test_a_build_again_is_the_same_bytes(shop: Workshop, carried: Checkpoint) -> None:
    again = shop.build("AGAIN")
    for file in sorted(carried.folder.glob("*.safetensors")):
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name
    assert (again / "modekit.json").read_bytes() == (carried.folder / "modekit.json").read_bytes()


def test_verify_finds_a_number_that_was_changed(shop: Workshop, carried: Checkpoint) -> None:
    out = shutil.copytree(carried.folder, shop.root / "BAD")
    checkpoint = open_checkpoint(out)
    channels = checkpoint.carrier[0]
    name = "model.layers.1.block_sparse_moe.experts.0.w3.weight"
    file = checkpoint.tensors[name].file
    tensors = load_file(file)
    tensors[name][channels.expert_hidden :, 0] *= 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    wrong = next(check for check in verify(open_checkpoint(out), reload=False) if check.verdict == "failed")
    assert name in wrong.detail
    (out / CARRIED_FILE).write_bytes((out / CARRIED_FILE).read_bytes()[:-4] + b"\0\0\0\1")
    wrong = next(check for check in verify(open_checkpoint(out), reload=False) if check.verdict == "failed")
    assert CARRIED_FILE in wrong.detail


def test_another_file_of_what_is_carried_is_not_proven(shop: Workshop, carried: Checkpoint) -> None:
    out = shutil.copytree(carried.folder, shop.root / "OTHER")
    arrays = load_file(out / CARRIED_FILE)
    save_file({**arrays, "outputs.1": np.zeros((2, 3), np.float32)}, out / CARRIED_FILE)
    record = json.loads((out / "modekit.json").read_text())
    wrong = next(check for check in verify(open_checkpoint(out), reload=False) if check.verdict == "failed")
    assert CARRIED_FILE in wrong.detail
    misfits = {"units": np.zeros((9, 5)), "input_sizes": np.zeros(0), "inputs.0": np.zeros((2, 3)), "still": np.zeros(0)}
    for name, numbers in misfits.items():
        save_file({**arrays, name: numbers.astype(np.float32)}, out / CARRIED_FILE)
        forged = {**record, "carry": {**record["carry"], "sha256": carried_digest(out)}}
        (out / "modekit.json").write_text(json.dumps(forged))
        checks = verify(open_checkpoint(out), reload=False)
        assert next(check for check in checks if check.name == "computed tensors").verdict == "failed", name
    record["carry"]["head"] = True
    (out / "modekit.json").write_text(json.dumps(record))
    wrong = next(check for check in verify(open_checkpoint(out), reload=False) if check.verdict == "failed")
    assert "carry in modekit.json" in wrong.detail


def test_a_killed_build_goes_on_with_the_channels_that_it_has_written(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the text is another one by then: half the tensors would read what nobody writes."""
    plan = make_plan(load_recipe(shop.write()), shop.root)
    text = shop.root / "text" / "law.jsonl"
    was = text.read_bytes()

    written = iter(range(40))

    def write(*args: Any) -> None:
        if next(written, None) is None:
            os._exit(KILLED)
        write_tensor(*args)

    process = os.fork()
    if process == 0:
        monkeypatch.setattr("modekit.building.build.write_tensor", write)
        build(plan, shop.root / "KILLED")
        os._exit(0)
    assert exit_code(process) == KILLED
    try:
        text.write_text(json.dumps({"text": "another text"}) + "\n")
        checkpoint = build(plan, shop.root / "KILLED")
    finally:
        text.write_bytes(was)
    assert (checkpoint.folder / CARRIED_FILE).read_bytes() == (shop.build("WHOLE") / CARRIED_FILE).read_bytes()
    checks = verify(checkpoint, reload=False)
    assert next(check for check in checks if check.name == "computed tensors").verdict == "proven", checks


def test_a_fit_leaves_what_is_carried(tmp_path: Path) -> None:
    """Also where the recipe says how much."""
    shop = full_shop(tmp_path, rank=64)
    checkpoint = refit(open_checkpoint(shop.build("OUT")), {"router": {"seed": 7}})
    assert is_proven(checks := verify(checkpoint, reload=False)), checks


def test_a_few_words_of_text_are_enough(tmp_path: Path, ids: torch.Tensor) -> None:
    """Fewer tokens than a change has directions: the rest of it is carried, too."""
    shop = adapter_shop(tmp_path)
    for name in DOMAINS:
        (tmp_path / "text" / f"{name}.jsonl").write_text('{"text": "abc"}\n{"text": "de"}\n')
    assert max(shares(shop, shop.build("OUT"), ids)) < 1e-2


def test_one_expert_alone(tmp_path: Path, ids: torch.Tensor) -> None:
    """No token says anything of whose text it is."""
    shop = adapter_shop(tmp_path)
    del shop.recipe["experts"][1:]
    assert max(shares(shop, out := shop.build("OUT"), ids)) < 1e-2
    assert is_proven(checks := verify(open_checkpoint(out))), checks


def test_an_expert_with_more_tokens_than_the_base(tmp_path: Path) -> None:
    shop = full_shop(tmp_path)
    model = tiny_model(**FULL_SIZES, seed=1)
    model.resize_token_embeddings(100)
    save(model, tmp_path / "law")
    tokenizer = character_tokenizer()
    tokenizer.add_tokens([f"<new{number}>" for number in range(4)])
    tokenizer.save_pretrained(tmp_path / "law")
    checkpoint = open_checkpoint(shop.build("OUT", mixture=shop.recipe["mixture"]))
    assert checkpoint.config["vocab_size"] == 100
    assert is_proven(checks := verify(checkpoint)), checks


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"format": "modekit", "carry": "all"}, "output.carry has no effect"),
        ({"format": "plain", "carry": "ffn", "rank": 8}, "output.rank has no effect"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(shop: Workshop, output: dict[str, Any], message: str) -> None:
    with pytest.raises(ModekitError, match=message):
        load_recipe(shop.write(output=output))


@pytest.mark.parametrize(
    ("family", "overrides", "why"),
    [
        ("cohere2", {"layer_types": WINDOWED}, "subtract the mean"),
        ("qwen3_5_text", {**QWEN3_5, "head_dim": 32}, "linear attention"),
    ],
)
def test_other_architectures_say_why_not(tmp_path: Path, family: str, overrides: dict[str, Any], why: str) -> None:
    shop = adapter_shop(tmp_path, family, modules=["gate_proj", "up_proj", "down_proj"], **overrides)
    with pytest.raises(UnsupportedError, match=why) as caught:
        make_plan(load_recipe(shop.write()), shop.root)
    assert "format: modekit" in str(caught.value.remedy)


def test_nan_in_what_is_carried_is_refused(tmp_path: Path) -> None:
    shop = adapter_shop(tmp_path)
    file = tmp_path / DOMAINS[1] / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "o_proj.lora_B" in name)
    tensors[name][0, 0] = np.nan
    save_file(tensors, file)
    with pytest.raises(SourceError, match="NaN or Inf") as caught:
        shop.build("OUT")
    assert name in str(caught.value.where)
    assert not (tmp_path / "OUT").exists() and not list(tmp_path.glob("OUT*"))


@pytest.mark.parametrize(
    ("whose", "name", "where"),
    [
        ("law", "lm_head.weight", "lm_head.weight"),
        ("law", "model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("base", "model.layers.0.self_attn.q_proj.weight", "base_model"),
    ],
)
def test_nan_in_a_model_that_is_carried_is_named(tmp_path: Path, whose: str, name: str, where: str) -> None:
    shop = full_shop(tmp_path)
    tensors = load_file(tmp_path / whose / "model.safetensors")
    tensors[name][3, 3] = np.nan
    save_file(tensors, tmp_path / whose / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match="NaN or Inf") as caught:
        shop.build("OUT")
    assert where in str(caught.value.where) and (whose != "law" or "law" in str(caught.value.where))


class _Heads:
    """Heads of many experts that differ in a common space of some directions, and little beyond."""

    def __init__(self, experts: int, rows: int, hidden: int) -> None:
        generator = np.random.default_rng(0)
        self.experts = range(experts)
        common = generator.normal(0, 1, (rows, 8))
        self._rows = [
            common @ generator.normal(0, 1, (8, hidden)) + generator.normal(0, 0.1, (rows, hidden)) for _ in self.experts
        ]

    def changing(self, *_: str) -> list[int]:
        return list(self.experts)

    def head_rows(self, expert: int, rows: slice) -> np.ndarray[Any, Any]:
        return self._rows[expert][rows].astype(np.float32)


def test_the_head_of_many_experts_takes_no_more_memory_than_that_of_few() -> None:
    heads, generator = _Heads(32, 3_000, 64), np.random.default_rng(1)
    last = generator.normal(0, 1, (256, 64)).astype(np.float32)
    stream = Stream((), last, np.zeros(3_000, np.int64))
    tracemalloc.start()
    basis, size = _head(heads, CarrySize(outputs=32, inputs=32, terms=2, head=True), stream)  # type: ignore[arg-type]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300e6  # the Gram matrix of all tokens of all experts alone takes 540 MB
    directions = np.linalg.qr(basis)[0]
    whole = [heads.head_rows(expert, slice(0, 3_000)) @ last.T for expert in (0, 31)]
    left = [np.linalg.norm(each - directions @ (directions.T @ each)) / np.linalg.norm(each) for each in whole]
    assert max(left) < 0.05
    written = np.concatenate([basis.T @ each for each in whole], axis=1)
    assert size == pytest.approx(np.sqrt(np.mean(np.square(written))), rel=0.1)


@pytest.mark.parametrize(("terms", "error"), [(2, 0.05), (3, 0.01), (4, 0.005)])
def test_units_pass_streams_of_all_sizes(terms: int, error: float) -> None:
    """Most tokens about as large, the first ones a hundred times."""
    generator = np.random.default_rng(0)
    sizes = np.concatenate([np.exp(generator.normal(0, 0.1, 2_000)), 100 * np.exp(generator.normal(0, 0.05, 10))]) * 3.0
    units = fit_pass_through(sizes.astype(np.float32), terms)
    scale = np.array([1.0, 100.0]) * 3.0
    inside = np.array(units.alphas) * units.size / scale[:, None]
    passed = (inside / (1 + np.exp(-inside)) @ np.array(units.betas)) * units.size / scale
    np.testing.assert_allclose(passed, 1.0, atol=error)


# Trained.

STEPS = {"steps": 4, "batch_tokens": 400, "sequence_length": 64, "select_tokens": 400, "evaluate_every": 1}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "granite"])  # each expert's FFN in tensors of its own; all in one
def test_training_moves_what_the_base_has_and_no_channel(tmp_path: Path, family: str) -> None:
    shop = adapter_shop(tmp_path, family, modules=["q_proj", "o_proj"])
    checkpoint = open_checkpoint(shop.build("OUT"))
    before = {name: array for file in checkpoint.folder.glob("model*.safetensors") for name, array in load_file(file).items()}
    settings = checked_settings({**STEPS, "what": ["all"], "backbone_learning_rate": 0.002}, TrainSettings, where="test")
    assert train(checkpoint, settings, evaluate_tokens=None).improved
    checkpoint = open_checkpoint(checkpoint.folder)
    assert is_proven(verify(checkpoint))
    channels, carry = checkpoint.shape.channels, checkpoint.record.carry
    assert channels is not None and carry is not None
    hidden, units = channels.hidden + channels.spare, channels.expert_hidden + carry.units
    own = {hidden: channels.hidden, units: channels.expert_hidden}
    moved = set()
    for file in checkpoint.folder.glob("model*.safetensors"):
        for name, after in load_file(file).items():
            changed = after != before[name]
            if not changed.any():
                continue
            moved.add(name)
            assert ".layers.0." not in name, f"{name}: the layer in front moved"
            if after.ndim == 3 and after.shape[1] == 2 * units:
                changed = changed.reshape(len(changed), 2, units, hidden)
            for axis, size in enumerate(changed.shape):
                rows = np.flatnonzero(changed.any(axis=tuple(each for each in range(changed.ndim) if each != axis)))
                assert rows[-1] < own.get(size, size), f"{name}: a channel moved"
    layers = {name.split(".")[2] for name in moved if "self_attn" in name}
    assert len(layers) == checkpoint.layers - 1 and any("lm_head" in name or "embed" in name for name in moved)
    assert not any(name in moved for name in (slot.name for slot in checkpoint.slots))


def test_what_would_move_the_channels_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(adapter_shop(tmp_path, modules=["q_proj"]).build("OUT"))
    for asked in ({"what": ["routers"]}, {"weight_decay": 0.1}, {"losses": {"label": 0.1}}):
        with pytest.raises(TrainingError, match="channels that must stay"):
            train(
                checkpoint,
                checked_settings({**STEPS, "what": ["attention"], **asked}, TrainSettings, where="test"),
                evaluate_tokens=None,
            )
