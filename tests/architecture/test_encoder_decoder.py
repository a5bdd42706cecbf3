"""Mixtures of models with an encoder against their experts by themselves, and against a reference that is written down here.

The reference is the base model of transformers with hooks before its FFNs: a loop over the experts' own, in full.
"""

from __future__ import annotations

import copy
import json
import shutil
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from conftest import character_tokenizer
from modekit.architecture.modekit_router import causal_average, select
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import (
    MismatchError,
    ModekitError,
    RecipeError,
    SourceError,
    UnsupportedError,
)
from modekit.loaded.load import load_model, load_tokenizer
from pair_models import built, inputs, logits_of, pair_model, pair_tokenizer, planned, say, written
from refusal import run_python

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS: dict[str, dict[str, Any]] = {
    "bart": {"encoder_layers": 3},
    "bart untied": {"tie_word_embeddings": False},
    "mbart": {"scale_embedding": True},
    "marian": {"scale_embedding": True},
    "m2m_100": {"decoder_layers": 3, "encoder_ffn_dim": 40},
    "t5": {},
    "t5 gated": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
NAMES = ("one", "two", "three")
STILL = {"name": "still", "model": "base"}
ADAPTED = {"t5": ["q", "v", "wi", "wo"], "t5 gated": ["k", "wi_0", "wo"]}


@dataclass(frozen=True)
class Bench:
    """A folder with a base, three full models and two adapters of one kind, and the same in memory."""

    kind: str
    root: Path
    made: dict[str, PreTrainedModel]

    def build(self, mixture: dict[str, Any], *experts: dict[str, Any]) -> Path:
        """A mixture of the full models, or of others."""
        return built(self.root, mixture, *(experts or NAMES))


def random_gates(**router: Any) -> dict[str, Any]:
    """Routing by gates that were drawn."""
    return {"top_k": 2, "router": {"fit": "random", "seed": 3, **router}}


@pytest.fixture(scope="module", params=["bart", "t5"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Of every kind."""
    kind = str(request.param)
    model_type, root = kind.split()[0], tmp_path_factory.mktemp("pairs")
    made = {"base": pair_model(model_type, 0, **KINDS[kind])}
    for seed, name in enumerate(NAMES, 1):
        made[name] = copy.deepcopy(made["base"])
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter_name, parameter in made[name].named_parameters():
                if any(part in parameter_name for part in ("fc1", "fc2", "DenseReluDense")):
                    parameter.add_(torch.randn_like(parameter) * 0.3)
    for name, model in made.items():
        model.save_pretrained(root / name)
    pair_tokenizer().save_pretrained(root / "base")
    for name, targets in (("small", ADAPTED.get(kind, ["q_proj", "v_proj", "fc1", "fc2"])), ("wide", "all-linear")):
        torch.manual_seed(len(name))
        config = LoraConfig(r=len(name), lora_alpha=8, target_modules=targets, task_type="SEQ_2_SEQ_LM")
        adapted = get_peft_model(copy.deepcopy(made["base"]), config)
        with torch.no_grad():
            for parameter_name, parameter in adapted.named_parameters():
                if "lora" in parameter_name:
                    parameter.copy_(torch.randn_like(parameter) * 0.2)
        adapted.save_pretrained(root / name)
    return Bench(kind, root, made)


# --- promise 2: one expert alone


@pytest.mark.parametrize("bench", list(KINDS), indirect=True)
def test_an_expert_alone_is_its_own_model_bit_for_bit(bench: Bench) -> None:
    model = load_model(bench.build(random_gates()))
    for name in NAMES:
        model.use_expert(name)
        for pads in ("right", "left"):
            assert torch.equal(logits_of(model, inputs(pads)), logits_of(bench.made[name], inputs(pads))), (name, pads)
        for how in ({}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0}):
            assert torch.equal(written(model, inputs(), **how), written(bench.made[name], inputs(), **how)), (name, how)


def test_an_adapter_alone_is_peft_s_model(bench: Bench) -> None:
    model = load_model(
        bench.build(random_gates(), {"name": "small", "adapter": "./small"}, {"name": "wide", "adapter": "./wide"})
    )
    for name in ("small", "wide"):
        own = PeftModel.from_pretrained(copy.deepcopy(bench.made["base"]), bench.root / name).eval()
        model.use_expert(name)
        expected = logits_of(own, inputs())
        torch.testing.assert_close(logits_of(model, inputs()), expected, atol=2e-5 * float(expected.abs().max()), rtol=0)
        assert torch.equal(written(model, inputs(), num_beams=2), written(own, inputs(), num_beams=2))


# --- promise 1: what routers mix


@contextmanager
def reference(bench: Bench, out: Path, routing: dict[str, Any]) -> Iterator[PreTrainedModel]:
    """The base whose FFNs are sums over the experts' own, by the gates of a checkpoint; averages are of the whole source."""
    checkpoint = open_checkpoint(out)
    model = copy.deepcopy(bench.made["base"])
    gates = {
        slot.name.removesuffix(".router.gate"): gate for slot, gate in zip(checkpoint.slots, checkpoint.gates(), strict=True)
    }
    said = inputs()
    for place, gate in gates.items():
        layer = model.get_submodule(place.rpartition(".")[0])
        parts = [bench.made[name].get_submodule(place.rpartition(".")[0]) for name in NAMES]
        _mix(layer, parts, place.rpartition(".")[2], torch.tensor(gate), routing, said, encoder=".decoder." not in f".{place}")
    yield model


def _mix(
    layer: nn.Module,
    experts: list[nn.Module],
    leaf: str,
    gate: torch.Tensor,
    routing: dict[str, Any],
    said: dict[str, torch.Tensor],
    *,
    encoder: bool,
) -> None:
    def ffn(own: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if leaf == "fc1":
            return own.fc2(own.activation_fn(own.fc1(x)))  # type: ignore[operator]
        return own.get_submodule(leaf)(x)

    def mixed(x: torch.Tensor) -> torch.Tensor:
        scores = nn.functional.linear(x, gate.float())
        if routing.get("decay"):
            mask = said["attention_mask"].float() if encoder else torch.ones(x.shape[:2])
            scores, _ = causal_average(scores, mask, routing["decay"], None)
            if encoder:  # the mean of all real tokens, for each of them
                scores = scores[:, -1:].expand(-1, x.shape[1], -1)
        weights = select(scores, {"method": "routing", "top_k": 2})
        return sum(weights[..., e, None] * ffn(own, x) for e, own in enumerate(experts))  # type: ignore[return-value]

    class Ffn(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return mixed(x)

    setattr(layer, leaf, Ffn())
    if leaf == "fc1":
        layer.activation_fn, layer.fc2 = nn.Identity(), nn.Identity()


@pytest.mark.parametrize("granularity", ["token", "context"])
def test_logits_are_those_of_the_reference(bench: Bench, granularity: str) -> None:
    router = {} if granularity == "token" else {"granularity": granularity}
    out = bench.build(random_gates(**router))
    averages = open_checkpoint(out).shape.routing.averages
    assert len(averages) == 1
    with reference(bench, out, {"decay": averages[0].decay}) as model:
        torch.testing.assert_close(logits_of(load_model(out), inputs()), logits_of(model, inputs()), atol=2e-5, rtol=2e-5)


# --- promises 4 to 6: pads, caches, beams, copies


ROUTERS: dict[str, dict[str, Any]] = {
    "token": {},
    "context": {"granularity": "context"},
    "once per source": {"granularity": "sequence", "per": "model"},
    "per projection": {"per": "projection"},
}


@pytest.mark.parametrize("router", list(ROUTERS))
def test_pads_and_company_change_nothing(bench: Bench, router: str) -> None:
    model = load_model(bench.build(random_gates(**ROUTERS[router])))
    right, left = logits_of(model, inputs("right")), logits_of(model, inputs("left"))
    near = 1e-5 * float(right.abs().max())
    if bench.kind.startswith("t5"):  # the others have positions that pads on the left move
        torch.testing.assert_close(left, right, atol=near, rtol=1e-4)
    said = inputs()
    for row, length in enumerate((9, 6, 3)):
        alone = {name: value[row : row + 1] for name, value in said.items()}
        alone = {**alone, "input_ids": alone["input_ids"][:, :length], "attention_mask": alone["attention_mask"][:, :length]}
        torch.testing.assert_close(logits_of(model, alone)[0], right[row], atol=near, rtol=1e-4)


@pytest.mark.parametrize("router", list(ROUTERS))
def test_what_is_written_token_by_token_is_what_one_pass_says(bench: Bench, router: str) -> None:
    """Greedy: every token is the likeliest of a pass over all of them. Beams: scores are those of a pass over each."""
    model, said = load_model(bench.build(random_gates(**ROUTERS[router]))), inputs()
    ids = written(model, said, do_sample=False)
    logits = logits_of(model, {**said, "decoder_input_ids": ids[:, :-1]})
    assert torch.equal(logits.argmax(-1)[:, 1:], ids[:, 2:])
    found = written(model, said, num_beams=4, return_dict_in_generate=True, output_scores=True, length_penalty=0.0)
    logits = logits_of(model, {**said, "decoder_input_ids": found.sequences[:, :-1]})
    chosen = logits.log_softmax(-1).gather(-1, found.sequences[:, 1:, None])[..., 0].sum(1)
    torch.testing.assert_close(found.sequences_scores, chosen, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("router", list(ROUTERS))
def test_a_static_cache_writes_the_same(bench: Bench, router: str) -> None:
    """Generate makes 4-D masks for it, and routers still know which tokens are pads."""
    model, said = load_model(bench.build(random_gates(**ROUTERS[router]))), inputs()
    before = torch.tensor([[2, 5, 6], [2, 7, 8], [2, 0, 9]])
    begun = {"decoder_input_ids": before, "decoder_attention_mask": (before > 0).long()}
    for how in ({}, {"num_beams": 2}, {"num_beams": 2, **begun}):
        expected = written(model, said, do_sample=False, **how)
        assert torch.equal(written(model, said, do_sample=False, cache_implementation="static", **how), expected), how


ONE_SIDED: dict[str, dict[str, Any]] = {
    "encoder alone": {"layers": ["encoder"]},
    "keys and values": {"modules": ["cross_k", "cross_v"]},
    "decoder alone": {"layers": ["decoder"]},
    "cross-attention": {"modules": ["cross_q", "cross_k", "cross_v", "cross_o"]},
}


@pytest.mark.parametrize("where", list(ONE_SIDED))
def test_routers_on_one_side_alone_write_what_one_pass_says(bench: Bench, where: str) -> None:
    said = ONE_SIDED[where]
    mixture = {**random_gates(granularity="context"), **said}
    experts = () if "modules" not in said else ({"name": "small", "adapter": "./wide"}, STILL)
    model = load_model(bench.build(mixture, *experts))
    ids = written(model, inputs(), do_sample=False)
    logits = logits_of(model, {**inputs(), "decoder_input_ids": ids[:, :-1]})
    assert torch.equal(logits.argmax(-1)[:, 1:], ids[:, 2:])


def test_an_encoder_that_is_called_by_itself_says_the_same(bench: Bench) -> None:
    """With arguments by place or by name; its output is gone on from."""
    model, said = load_model(bench.build(random_gates(granularity="sequence", per="model"))), inputs()
    expected = logits_of(model, said)
    with torch.inference_mode():
        encoded = model.get_encoder()(said["input_ids"], said["attention_mask"])
        rest = {"attention_mask": said["attention_mask"], "decoder_input_ids": said["decoder_input_ids"]}
        torch.testing.assert_close(model(encoder_outputs=encoded, **rest).logits, expected, atol=1e-4, rtol=1e-4)
        with pytest.raises(RuntimeError, match="as this model made it"):
            model(encoder_outputs=(encoded.last_hidden_state,), **rest)
        assert torch.equal(logits_of(model, said), expected)  # what was refused left nothing behind


def test_it_opens_without_modekit(bench: Bench, tmp_path: Path) -> None:
    out = bench.build(random_gates())
    expected = logits_of(load_model(out), inputs())
    torch.save({"inputs": inputs(), "logits": expected}, tmp_path / "expected.pt")
    done = run_python(
        textwrap.dedent(f"""
        import sys
        sys.modules["modekit"] = None
        import torch
        from transformers import AutoModelForSeq2SeqLM
        said = torch.load({str(tmp_path / "expected.pt")!r})
        model = AutoModelForSeq2SeqLM.from_pretrained({str(out)!r}, trust_remote_code=True).eval()
        with torch.inference_mode():
            torch.testing.assert_close(model(**said["inputs"]).logits, said["logits"], atol=1e-4, rtol=1e-4)
        """)
    )
    assert done.returncode == 0, done.stderr


# --- what cannot be


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Bart, and what is none."""
    root = tmp_path_factory.mktemp("refused")
    for name, model in (
        ("base", pair_model("bart")),
        ("one", pair_model("bart", 1)),
        ("deep", pair_model("bart", decoder_layers=3)),
    ):
        model.save_pretrained(root / name)
    return root


@pytest.mark.parametrize(
    ("mixture", "expert", "kind", "says"),
    [
        ({}, "deep", MismatchError, "tensors that the base model lacks"),
        (
            {"modules": "decoder", "router": {"fit": "random", "granularity": "sequence", "per": "model"}},
            "one",
            UnsupportedError,
            "models that are a decoder alone",
        ),
        ({"router": {"fit": "random", "per": "model"}}, "one", UnsupportedError, "once per source"),
        (
            {"layers": ["decoder"], "router": {"fit": "random", "granularity": "sequence", "per": "model"}},
            "one",
            UnsupportedError,
            "must be in the encoder",
        ),
        ({"layers": [1], "router": {"fit": "random"}}, "one", RecipeError, "names neither"),
        ({"layers": ["decoder.7"], "router": {"fit": "random"}}, "one", RecipeError, "no such layer"),
    ],
)
def test_what_cannot_be_mixed_is_one_clear_error(
    folders: Path, mixture: dict[str, Any], expert: str, kind: type[ModekitError], says: str
) -> None:
    with pytest.raises(kind, match=says) as caught:
        planned(folders, mixture, "one", {"name": "other", "model": f"./{expert}"})
    assert caught.value.remedy


OLDER: dict[str, list[str]] = {
    "bart": ["activation_function", "scale_embedding", "max_position_embeddings", "tie_word_embeddings"],
    "marian": ["decoder_vocab_size", "share_encoder_decoder_embeddings"],
    "t5": ["num_decoder_layers", "relative_attention_max_distance", "tie_word_embeddings"],
}


@pytest.mark.parametrize("model_type", list(OLDER))
def test_a_base_whose_config_is_older_than_its_experts(tmp_path: Path, model_type: str) -> None:
    """What older versions of transformers left unsaid is what its classes take; what they saved besides is no part of it."""
    long = {} if model_type == "t5" else {"max_position_embeddings": 1024}
    far = {"relative_attention_max_distance": 128} if model_type == "t5" else {}
    for seed, name in enumerate(("base", "one")):
        pair_model(model_type, seed, **long, **far).save_pretrained(tmp_path / name)
    say(tmp_path / "base", **dict.fromkeys(OLDER[model_type], ...))
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors.pop("final_logits_bias", None)
    embedding = tensors.get("model.shared.weight", tensors.get("shared.weight"))
    prefix = "" if model_type == "t5" else "model."
    tensors |= {f"{prefix}{stack}.embed_tokens.weight": embedding.clone() for stack in ("encoder", "decoder")}
    if model_type == "t5":
        name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        tensors[name] = tensors[name.replace("layer.1.EncDec", "layer.0.Self")].clone()
    else:
        tensors |= {"model.encoder.version": torch.ones(1), "lm_head.weight": embedding.clone()}
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    model, own = load_model(built(tmp_path, random_gates(), "one", STILL)), load_model(tmp_path / "base")
    model.use_expert("still")
    assert torch.equal(logits_of(model, inputs()), logits_of(own, inputs()))


def write_three(folders: Path, root: Path) -> None:
    """A base and two experts of one kind, to be changed."""
    for name in ("base", "one", "two"):
        shutil.copytree(folders / ("one" if name == "two" else name), root / name)


@pytest.mark.parametrize(
    ("file", "key", "own"), [("config.json", "forced_bos_token_id", 5), ("generation_config.json", "decoder_start_token_id", 2)]
)
def test_models_that_write_other_languages_are_refused(folders: Path, tmp_path: Path, file: str, key: str, own: int) -> None:
    """One that says nothing is taken to be as the others."""
    write_three(folders, tmp_path)
    for name, value in (("one", own), ("two", 7)):
        say(tmp_path / name, file, **{key: value})
    with pytest.raises(MismatchError, match=f"made for other languages[\\s\\S]*{key}"):
        planned(tmp_path, {}, "one", "two")
    say(tmp_path / "two", file, **{key: ...})
    planned(tmp_path, {}, "one", "two")


def test_models_of_other_vocabularies_are_refused(folders: Path, tmp_path: Path) -> None:
    """As opus-mt of two directions: the same architecture and size, other tokens."""
    write_three(folders, tmp_path)
    for name in ("base", "one", "two"):
        (tmp_path / name / "vocab.json").write_text(json.dumps({"</s>": 0, "a": 1, "b" if name != "two" else "ü": 2}))
    with pytest.raises(MismatchError, match="tokenizer differs from the base model's in 2 tokens"):
        planned(tmp_path, {}, "one", "two")


@pytest.mark.parametrize("file", ["spiece.model", "target_vocab.json"])
def test_tokenizer_files_that_differ_are_refused(folders: Path, tmp_path: Path, file: str) -> None:
    """The base's would be copied for all. Where both have a tokenizer.json, that is what is read, and it says it all."""
    write_three(folders, tmp_path)
    for name in ("base", "one", "two"):
        (tmp_path / name / "tokenizer.json").unlink(missing_ok=True)
        (tmp_path / name / file).write_text('{"a": 1}')
    planned(tmp_path, {}, "one", "two")
    (tmp_path / "two" / file).write_text('{"a": 2}')
    with pytest.raises(MismatchError, match=f"another {file} than the base model's"):
        planned(tmp_path, {}, "one", "two")
    for name in ("base", "two"):
        character_tokenizer().save_pretrained(tmp_path / name)
    planned(tmp_path, {}, "one", "two")


def test_a_file_that_is_no_sentencepiece_model(tmp_path: Path) -> None:
    pair_model("t5").save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    (tmp_path / "spiece.model").write_bytes(b"\x0a\xff\xff\xff\xff\x0fjunk")
    with pytest.raises(SourceError, match=r"spiece\.model cannot be read as a sentencepiece model") as caught:
        load_tokenizer(tmp_path)
    assert "tiktoken" not in str(caught.value)


@pytest.mark.parametrize(("model_type", "whose"), [("t5", "base"), ("bart", "one")])
def test_embeddings_that_are_to_be_one_and_are_not(tmp_path: Path, model_type: str, whose: str) -> None:
    """Transformers keeps both: what it computes with is not what config.json says. The same values under several names pass."""
    for seed, name in enumerate(("base", "one")):
        pair_model(model_type, seed).save_pretrained(tmp_path / name)
    tensors = load_file(tmp_path / whose / "model.safetensors")
    prefix = "" if model_type == "t5" else "model."
    embedding, copied = tensors[f"{prefix}shared.weight"], f"{prefix}encoder.embed_tokens.weight"
    save_file({**tensors, copied: embedding.clone()}, tmp_path / whose / "model.safetensors", {"format": "pt"})
    shutil.rmtree(built(tmp_path, {}, "one", STILL))
    before = logits_of(load_model(tmp_path / whose), inputs())
    save_file({**tensors, copied: embedding + 1.0}, tmp_path / whose / "model.safetensors", {"format": "pt"})
    assert not torch.equal(logits_of(load_model(tmp_path / whose), inputs()), before)
    with pytest.raises(SourceError, match=f"two embeddings that are to be one[\\s\\S]*{copied}"):
        built(tmp_path, {}, "one", STILL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("said", "mixed"),
    [
        (["encoder"], {"encoder.0", "encoder.1"}),
        (["decoder.1"], {"decoder.1"}),
        (["encoder.0-1", "decoder.0"], {"encoder.0", "encoder.1", "decoder.0"}),
    ],
)
def test_layers_are_named_with_their_stack(folders: Path, said: list[str], mixed: set[str]) -> None:
    plan = planned(folders, {"layers": said}, "one", STILL)
    found = {slot.name.removeprefix("model.").replace(".layers", "").rpartition(".fc1")[0] for slot in plan.shape.slots}
    assert found == mixed
