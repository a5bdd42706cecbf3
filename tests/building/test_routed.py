"""Fine-tunes of one mixture in one plain mixture: each one forced is itself, with the experts that it would choose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapter_folders import quiet, train_adapter
from building.test_carry import divergence, recipe_of
from byte_level import save_byte_model
from conftest import DOMAINS, Workshop, logits_of, save, tiny_model, write_text
from generated import check_generation
from modekit.building.build import build
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.carried import lost_of
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import CheckpointError, UnsupportedError
from modekit.evaluation.forced import force_experts
from modekit.evaluation.inspection.inspect import inspect
from modekit.experts.specialize import specialize
from modekit.loaded.load import decoder_layers
from modekit.loaded.shapes import mixture_of
from modekit.loaded.text_training import Training
from modekit.members.change import write_change
from modekit.members.edits import NewExpert, add_expert, remove_expert
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.routing.text_router import TextRouter
from tiny_decoders import tiny_decoder

pytestmark = pytest.mark.usefixtures("short_tables")

M, TOP_K = 4, 2
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": TOP_K}
_OF_QWEN = {"moe_intermediate_size": 32, "num_experts": M, "decoder_sparse_step": 1, "mlp_only_layers": []}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3_moe", {**_OF_QWEN, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3-softmax": ("qwen3_moe", {**_OF_QWEN, "head_dim": 16, "norm_topk_prob": False}),
    "mixtral": ("mixtral", {"num_local_experts": M}),
    "qwen2": ("qwen2_moe", {**_OF_QWEN, "shared_expert_intermediate_size": 48, "norm_topk_prob": False}),
    "qwen2-normed": ("qwen2_moe", {**_OF_QWEN, "shared_expert_intermediate_size": 64, "norm_topk_prob": True}),
    "granite": ("granitemoe", {"num_local_experts": M, "residual_multiplier": 0.5, "embedding_multiplier": 3.0}),
}
OWN = ("experts", "mlp.gate.", "router")


def base_of(family: str, **says: Any) -> PreTrainedModel:
    model_type, sizes = FAMILIES[family]
    return tiny_model(model_type, **{**SIZES, **sizes, **says})


def is_own(key: str) -> bool:
    """Of experts and gates."""
    return any(part in key for part in OWN) and "shared" not in key


def moved(model: PreTrainedModel, seed: int, only: Callable[[str], bool] = is_own, by: float = 0.5) -> PreTrainedModel:
    """With noise on some parameters, in shares of their spread."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if only(key):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * by * parameter.std())
    return model


def moe_shop(root: Path, family: str = "qwen3", *, copies: bool = False, **says: Any) -> Workshop:
    """A base that is a mixture, and a fine-tune per domain whose experts and gates are its own."""
    save(base_of(family, **says), root / "base")
    write_text(root / "text")
    for seed, name in enumerate(DOMAINS):
        model = base_of(family, **says)
        save(model if copies else moved(model, seed), root / name)
    experts = [{"name": name, "model": f"./{name}", "text": f"./text/{name}.jsonl"} for name in DOMAINS]
    return Workshop(root, recipe_of(experts))


def byte_shop(root: Path, family: str, **says: Any) -> Checkpoint:
    """A mixture of two fine-tunes whose tokenizer llama.cpp and vLLM know; the first is the base, too."""
    model_type, sizes = FAMILIES[family]
    texts, experts = write_text(root / "text", DOMAINS[:2]), []
    for seed, name in enumerate(DOMAINS[:2]):
        save_byte_model(root / name, model_type, 0, **{**SIZES, **sizes, **says})
        moved(loaded(root / name), seed).save_pretrained(root / name)
        experts.append({"name": name, "model": f"./{name}", "text": str(texts[name])})
    return open_checkpoint(Workshop(root, {**recipe_of(experts), "base_model": f"./{DOMAINS[0]}"}).build("OUT"))


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def shop(family: str, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    shop = moe_shop(tmp_path_factory.mktemp("moe"), family)
    shop.build("OUT")
    return shop


@pytest.fixture(scope="module")
def checkpoint(shop: Workshop) -> Checkpoint:
    return open_checkpoint(shop.root / "OUT")


def chosen(model: PreTrainedModel, routers: list[torch.nn.Module], ids: torch.Tensor) -> list[torch.Tensor]:
    """The experts that every layer's router chooses, sorted, (T, k)."""
    found: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        logits = torch.nn.functional.linear(args[0].reshape(-1, args[0].shape[-1]), next(module.parameters()))
        found.append(logits.topk(TOP_K).indices.sort().values)

    handles = [router.register_forward_pre_hook(keep) for router in routers]
    logits_of(model, ids)
    for handle in handles:
        handle.remove()
    return found


def test_a_forced_fine_tune_is_itself_and_chooses_its_own_experts(
    shop: Workshop, checkpoint: Checkpoint, ids: torch.Tensor
) -> None:
    assert checkpoint.config["model_type"] == loaded(shop.root / "base").config.model_type
    mixture = mixture_of(loaded(checkpoint.folder), checkpoint)
    for number, name in enumerate(DOMAINS):
        own = loaded(shop.root / name)
        path = mixture.native.router_module  # type: ignore[attr-defined]
        own_choice = chosen(own, [layer.get_submodule(path) for layer in decoder_layers(own)], ids)
        with mixture.forced(number):
            torch.testing.assert_close(logits_of(mixture.model, ids), logits_of(own, ids), atol=1e-4, rtol=1e-4)
            choice = chosen(mixture.model, mixture.routers(), ids)[1:]  # type: ignore[attr-defined]
        for ours, theirs in zip(choice, own_choice, strict=True):
            torch.testing.assert_close(ours - number * M, theirs, atol=0, rtol=0)


def test_it_is_proven_and_generates(checkpoint: Checkpoint) -> None:
    assert is_proven(checks := verify(checkpoint)), checks
    check_generation(checkpoint.folder)


def test_an_adapter_of_the_base_is_trained_without_warnings_and_of_the_mixture_refused(
    shop: Workshop, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    asked: dict[str, Any] = {"root": shop.root, "train": "lora", "rank": 2, "training": Training(steps=1, sequence_length=32)}
    with pytest.raises(UnsupportedError, match="channels lead"):
        specialize(shop.root / "OUT", tmp_path / "new", ["./text/law.jsonl"], **asked)
    specialize(shop.root / "base", tmp_path / "new", ["./text/law.jsonl"], **asked)
    assert not [each for each in recwarn if "pattern" in str(each.message)]


def test_a_token_without_an_embedding_harms_no_other(tmp_path: Path, ids: torch.Tensor) -> None:
    """Its stream is nothing but channels; the first token is seen by all."""
    shop = moe_shop(tmp_path, "qwen3")
    ids[:, 0] = nothing = int(ids[0, 7])
    for name in ("base", *DOMAINS):
        model = loaded(tmp_path / name)
        model.get_input_embeddings().weight.data[nothing] = 0
        save(model, tmp_path / name)
    checkpoint = open_checkpoint(shop.build("OUT"))
    mixture = mixture_of(loaded(checkpoint.folder), checkpoint)
    with mixture.forced(1):
        torch.testing.assert_close(
            logits_of(mixture.model, ids), logits_of(loaded(tmp_path / DOMAINS[1]), ids), atol=2e-4, rtol=1e-4
        )


def test_other_counts_of_experts_are_damage(tmp_path: Path) -> None:
    out = moe_shop(tmp_path, "qwen3", copies=True).build("OUT")
    config = json.loads((out / "config.json").read_text())
    for key in ("num_experts", "num_experts_per_tok"):
        (out / "config.json").write_text(json.dumps({**config, key: config[key] + 1}))
        with pytest.raises(CheckpointError, match="disagree"):
            _ = open_checkpoint(out).shape


def test_copies_of_a_mixture_are_that_mixture(tmp_path: Path, family: str, ids: torch.Tensor) -> None:
    shop = moe_shop(tmp_path, family, copies=True)
    torch.testing.assert_close(
        logits_of(loaded(shop.build("OUT")), ids), logits_of(loaded(tmp_path / "base"), ids), atol=1e-4, rtol=1e-4
    )


@pytest.mark.slow
def test_attention_norms_and_head_are_carried_where_weights_sum_to_one(tmp_path: Path, ids: torch.Tensor) -> None:
    """Changes of rank 2 of attention go through the channels. All experts of a token: a tie of two would hide it."""
    shop = moe_shop(tmp_path, "qwen3", num_experts_per_tok=M)
    for seed, name in enumerate(DOMAINS):
        model, generator = loaded(tmp_path / name), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")):
                    left, right = (torch.randn(size, 2, generator=generator) for size in parameter.shape)
                    parameter.add_(left @ right.T * 0.03 * parameter.std())
        save(model, tmp_path / name)
    shares = {}
    for carry, says in (("ffn", {}), ("all", {"rank": 256})):
        checkpoint = open_checkpoint(shop.build(carry, output={"format": "plain", "carry": carry, **says}))
        mixture, base = mixture_of(loaded(checkpoint.folder), checkpoint), logits_of(loaded(tmp_path / "base"), ids)
        shares[carry] = list[float]()
        for number, name in enumerate(DOMAINS):
            own = logits_of(loaded(tmp_path / name), ids)
            with mixture.forced(number):
                shares[carry].append(divergence(own, logits_of(mixture.model, ids)) / divergence(own, base))
        assert is_proven(checks := verify(checkpoint)), checks
    assert max(shares["all"]) < 1e-3 < min(shares["ffn"]), shares


def test_adapters_are_folded_into_their_own_experts(tmp_path: Path, ids: torch.Tensor) -> None:
    """As PEFT merges them, fused experts and gates."""
    save(base_of("qwen3"), tmp_path / "base")
    write_text(tmp_path / "text")
    for seed, name in enumerate(DOMAINS[:2]):
        torch.manual_seed(seed)
        parameters = ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]
        config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=parameters)
        train_adapter(tmp_path / "base", config, tmp_path / name)
    experts = [{"name": name, "adapter": f"./{name}", "text": f"./text/{name}.jsonl"} for name in DOMAINS[:2]]
    checkpoint = open_checkpoint(Workshop(tmp_path, recipe_of(experts)).build("OUT"))
    mixture = mixture_of(loaded(checkpoint.folder), checkpoint)
    for number, name in enumerate(DOMAINS[:2]):
        with quiet():
            own = peft.PeftModel.from_pretrained(loaded(tmp_path / "base"), tmp_path / name).merge_and_unload()
        assert (logits_of(own, ids) - logits_of(loaded(tmp_path / "base"), ids)).abs().max() > 0.01
        with mixture.forced(number):
            torch.testing.assert_close(logits_of(mixture.model, ids), logits_of(own, ids), atol=1e-4, rtol=1e-4)
    assert is_proven(checks := verify(checkpoint)), checks


@pytest.mark.parametrize("name", ["qwen3", "granite"])
def test_members_come_and_go(tmp_path: Path, name: str) -> None:
    """What comes out is what a build of the new recipe gives, byte for byte."""
    shop = moe_shop(tmp_path, name)
    two = shop.build("two", experts=shop.recipe["experts"][:2])
    joint = shop.build("joint")
    new = NewExpert({key: value for key, value in shop.recipe["experts"][2].items() if key != "name"}, tmp_path)
    before = open_checkpoint(two)
    added = write_change(before, add_expert(before, DOMAINS[2], new), tmp_path / "added")
    removed = write_change(added, remove_expert(added, DOMAINS[2]), tmp_path / "removed")
    for made, wanted in ((added.folder, joint), (removed.folder, two)):
        for file in sorted(wanted.glob("*.safetensors")):
            assert (made / file.name).read_bytes() == file.read_bytes(), file.name
    assert is_proven(checks := verify(removed)), checks


@pytest.mark.parametrize(
    ("family", "says", "why"),
    [
        ("qwen3", {"mixture": {"top_k": 2, "router": {"fit": "lexical"}}}, "top_k: 2"),
        ("qwen3", {"mixture": {"top_k": 1, "router": {"fit": "logistic"}}}, "fit: lexical"),
        ("qwen3", {"output": {"format": "plain", "dtype": "float16"}}, "float16"),
        ("qwen3-softmax", {"output": {"format": "plain", "carry": "all"}}, "sum to one"),
    ],
)
def test_what_this_form_cannot_say_is_refused(tmp_path: Path, family: str, says: dict[str, Any], why: str) -> None:
    shop = moe_shop(tmp_path, family, copies=True)
    with pytest.raises(UnsupportedError, match=why):
        shop.plan(**says)


@pytest.mark.parametrize("top_k", [0, M + 1])
def test_a_base_whose_tokens_have_more_experts_than_there_are_is_refused(tmp_path: Path, top_k: int) -> None:
    """Of fine-tunes together there are enough."""
    shop = moe_shop(tmp_path, "mixtral", copies=True, num_experts_per_tok=top_k)
    with pytest.raises(UnsupportedError, match=r"more experts than there are, or none"):
        shop.plan(output={"format": "plain"})


@pytest.mark.parametrize(("model_type", "why"), [("gpt_oss", "sinks"), ("olmoe", "norms of queries")])
def test_families_that_have_no_such_form_say_why(tmp_path: Path, model_type: str, why: str) -> None:
    save(tiny_decoder(model_type), tmp_path / "base")
    write_text(tmp_path / "text")
    experts = [{"name": name, "model": "base", "text": f"./text/{name}.jsonl"} for name in DOMAINS]
    with pytest.raises(UnsupportedError, match="no plain checkpoint") as raised:
        make_plan(parse_recipe(recipe_of(experts)), tmp_path)
    assert why in str(raised.value.found)


def test_the_plan_says_what_it_costs(checkpoint: Checkpoint) -> None:
    plan = make_plan(checkpoint.record.pinned_recipe, checkpoint.recipe_root)
    cost = next(note for note in plan.notes if f"{len(DOMAINS)} x {M} experts" in note)
    base = loaded(checkpoint.recipe_root / "base")
    routed = sum(parameter.numel() for parameter in base.parameters() if parameter.ndim == 3)
    active = sum(parameter.numel() for parameter in base.parameters()) - routed * (M - TOP_K) // M
    assert f"{active:,} parameters are active" in cost
    assert checkpoint.parameters.idle == routed * (M - TOP_K) // M
    written = sum(ref.numel for ref in checkpoint.tensors.values())
    assert plan.parameters()["total"] == written and plan.bytes_written == 4 * written
    more = len(DOMAINS) * plan.parameters()["per_expert"] // (len(DOMAINS) * M) * (len(DOMAINS) * M - TOP_K)
    assert plan.parameters()["active"] == written - more


@pytest.mark.slow
@pytest.mark.parametrize(("family", "plain"), [("qwen3", True), ("qwen3-softmax", False)])
def test_an_open_recipe_takes_the_plain_form_where_that_keeps_attention(tmp_path: Path, family: str, plain: bool) -> None:
    """As the build measures; what it finds is what is lost in the result."""
    experts = moe_shop(tmp_path, family).recipe["experts"]
    for seed, name in enumerate(DOMAINS):
        save(moved(loaded(tmp_path / name), seed, lambda key: "self_attn" in key and "norm" not in key, 0.3), tmp_path / name)
    build(make_plan(parse_recipe({"base_model": "./base", "experts": experts}), tmp_path), tmp_path / "OUT")
    checkpoint = open_checkpoint(tmp_path / "OUT")
    assert checkpoint.shape.plain == plain
    if not plain:
        asked = {"base_model": "./base", "experts": experts, "output": {"format": "plain"}}
        with pytest.raises(UnsupportedError, match="carries no attention"):
            make_plan(parse_recipe(asked), tmp_path)
    else:
        found = [row.lost or 0.0 for row in force_experts(checkpoint, tokens_per_domain=300).rows]
        assert [each.share for each in lost_of(checkpoint.folder)] == pytest.approx(found, rel=0.7) and max(found) < 0.05


def test_both_levels_are_inspected(shop: Workshop, checkpoint: Checkpoint) -> None:
    """Each domain's text goes to its fine-tune, in every layer, and leaving that out costs; its own experts are told apart."""
    found = inspect(checkpoint, tokens_per_domain=600)
    for number, name in enumerate(DOMAINS):
        usage = found.per_domain[name]
        assert all(shares[number] > 0.8 for shares in usage.shares), usage.shares
        assert [len(row) for row in usage.inner] == [M] * len(found.routers)
        assert all(abs(sum(row) - 1) < 1e-3 for row in usage.inner)
    assert "Own experts: law" in [table.title for table in found.tables()]
    route = TextRouter(checkpoint)
    said = [json.loads((shop.root / "text" / f"{name}.jsonl").read_text().splitlines()[0])["text"] for name in DOMAINS]
    assert [route.decide(text).expert for text in said] == list(DOMAINS)
