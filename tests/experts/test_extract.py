"""Adapters extracted from full fine-tunes: exact where the difference is of low rank, optimal where it is not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from conftest import logits_of, save, tiny_model
from modekit.errors import MismatchError, ModekitError, OutputError, UnsupportedError
from modekit.experts.extract import Extraction, extract
from modekit.text.splits import TRAINED_FILE
from pair_models import pair_model, pair_tokenizer
from refusal import run_python, tree
from tiny_decoders import tiny_decoder


def is_linear(name: str) -> bool:
    return ".layers." in name and name.endswith("_proj.weight")


def tune(root: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None], name: str = "tuned") -> Path:
    """A copy of root/base in which `change` has replaced tensors."""
    shutil.copytree(root / "base", root / name)
    state = load_file(root / "base" / "model.safetensors")
    changed = {key: change(key, tensor) for key, tensor in state.items()}
    state = {key: tensor if changed[key] is None else changed[key].contiguous() for key, tensor in state.items()}
    save_file(state, root / name / "model.safetensors", metadata={"format": "pt"})
    return root / name


def low_rank(rank: int = 3, only: str = "_proj") -> Callable[[str, torch.Tensor], torch.Tensor | None]:
    """Add a difference of low rank to linear weights."""
    generator = torch.Generator().manual_seed(7)

    def change(name: str, weight: torch.Tensor) -> torch.Tensor | None:
        if not is_linear(name) or only not in name:
            return None
        left = torch.randn(weight.shape[0], rank, generator=generator)
        right = torch.randn(rank, weight.shape[1], generator=generator)
        return (weight.float() + 0.02 * left @ right).to(weight.dtype)

    return change


def noise(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Move everything, in full rank."""
    generator = torch.Generator().manual_seed(len(name) + 31 * sum(map(ord, name)))
    return weight + 0.02 * torch.randn(weight.shape, generator=generator)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a tiny base."""
    save(tiny_model(), tmp_path / "base")
    return tmp_path


def run(root: Path, *, overwrite: bool = False, **settings: Any) -> Extraction:
    return extract(root / "tuned", root / "base", root / "OUT", **{"rank": 3, **settings}, overwrite=overwrite)


def with_adapter(root: Path) -> Any:
    """The base with the adapter, as peft loads it."""
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root / "base"), root / "OUT").eval()


def test_a_low_rank_fine_tune_is_recovered_and_loads_in_peft(root: Path, ids: torch.Tensor) -> None:
    tuned = tune(root, low_rank())
    (tuned / TRAINED_FILE).write_text("0123456789abcdef\n")
    record = run(root)
    assert (root / "OUT" / TRAINED_FILE).read_text() == "0123456789abcdef\n"
    assert (record.all.modules, record.all.rank) == (21, 3) and record.all.error < 1e-5 and not record.not_carried
    assert record.carried == pytest.approx(1.0)
    model = with_adapter(root)
    assert (logits_of(model, ids) - logits_of(tuned, ids)).abs().max() < 1e-4
    assert (logits_of(root / "base", ids) - logits_of(tuned, ids)).abs().max() > 0.1
    merged = dict(model.merge_and_unload().named_parameters())
    for name, weight in load_file(tuned / "model.safetensors").items():
        assert torch.allclose(merged[name], weight, atol=1e-5), name
    assert json.loads((root / "OUT" / "extract.json").read_text()) == record.model_dump(mode="json")
    config = json.loads((root / "OUT" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["bias"]) == (3, 3, {}, "none")
    linear = filter(is_linear, load_file(tuned / "model.safetensors"))
    assert config["target_modules"] == sorted(name.removesuffix(".weight") for name in linear)
    assert Path(config["base_model_name_or_path"]) == root / "base"


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "opt"])
def test_full_rank_is_the_model(tmp_path: Path, model_type: str, ids: torch.Tensor) -> None:
    """Also of families without a row, and of GPT-2, which keeps its weights the other way round."""
    save(
        tiny_decoder(model_type, vocab_size=96) if model_type in ("gpt2", "opt") else tiny_model(model_type), tmp_path / "base"
    )
    linear = re.compile(r"(_proj|\.fc[12]|\.c_(attn|proj|fc))\.weight$")
    tuned = tune(tmp_path, lambda name, weight: noise(name, weight) if linear.search(name) else None)
    record = run(tmp_path, rank=10_000)
    assert record.all.error < 1e-5
    assert (logits_of(with_adapter(tmp_path), ids) - logits_of(tuned, ids)).abs().max() < 1e-4


def test_what_an_adapter_cannot_carry_is_named(root: Path) -> None:
    tune(root, noise)
    record = run(root)
    base = load_file(root / "base" / "model.safetensors")
    assert set(record.not_carried) == {name for name in base if not is_linear(name)}
    tuned = load_file(root / "tuned" / "model.safetensors")
    for name, drift in record.not_carried.items():
        assert drift == pytest.approx(float((tuned[name] - base[name]).norm() / base[name].norm()), rel=1e-5)
    assert record.carried < 1
    (note, _) = record.notes()
    assert "more is lost than kept" in note
    assert record.kinds["mlp.up_proj"].modules == 3


def test_encoder_and_decoder_are_told_apart(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "tuned")):
        pair_model("t5", seed).save_pretrained(tmp_path / name)
        pair_tokenizer().save_pretrained(tmp_path / name)
    record = run(tmp_path)
    assert any(
        "relative_attention_bias" in name for name in record.not_carried
    )  # an embedding, to which PEFT has other factors
    peft = pytest.importorskip("peft")
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    adapted = peft.PeftModel(base, peft.PeftConfig.from_pretrained(tmp_path / "OUT"))
    loaded = adapted.load_adapter(str(tmp_path / "OUT"), "default")
    assert not loaded.missing_keys and not loaded.unexpected_keys
    stacks = [kind.partition(".")[0] for kind in record.kinds]
    assert stacks == sorted(stacks, reverse=True) and set(stacks) == {"encoder", "decoder"}
    assert all(row.modules <= 2 for row in record.kinds.values())
    assert json.loads((tmp_path / "OUT" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"


def test_unchanged_modules_get_no_factors(root: Path, ids: torch.Tensor) -> None:
    change = low_rank()
    tuned = tune(root, lambda name, weight: change(name, weight) if ".layers.1." in name or "down" in name else None)
    record = run(root)
    assert record.all.modules == 9 and not record.not_carried
    model = with_adapter(root)
    adapted = {name for name, _ in model.named_modules() if name.endswith("lora_A")}
    assert len(adapted) == 9
    assert (logits_of(model, ids) - logits_of(tuned, ids)).abs().max() < 1e-4


def test_models_in_bfloat16_and_in_shards(tmp_path: Path) -> None:
    save(tiny_model().to(torch.bfloat16), tmp_path / "base")
    tune(tmp_path, low_rank())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=torch.bfloat16)
    shutil.rmtree(tmp_path / "tuned")
    save(model, tmp_path / "tuned", max_shard_size="40KB")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 1
    record = run(tmp_path, rank=32)
    assert record.all.error < 1e-5


def test_tied_heads_are_not_compared(tmp_path: Path) -> None:
    save(tiny_model(tie_word_embeddings=True), tmp_path / "base")
    tune(tmp_path, low_rank())
    assert not run(tmp_path).not_carried


def test_an_adapter_needs_no_torch(root: Path) -> None:
    tune(root, low_rank())
    code = """
import sys
from pathlib import Path
from modekit.experts.extract import Extraction, extract
root = Path(sys.argv[1])
extract(root / "tuned", root / "base", root / "OUT", rank=3)
assert "torch" not in sys.modules
"""
    done = run_python(code, root)
    assert done.returncode == 0, done.stderr
    assert (root / "OUT" / "adapter_model.safetensors").exists()


# -- refusals --------------------------------------------------------------------------------------------------------


def refused(root: Path, error: type[ModekitError], match: str, **kwargs: Any) -> None:
    """The extraction is refused with a whole message, and the folder is as before."""
    before = tree(root)
    with pytest.raises(error, match=match) as caught:
        run(root, **kwargs)
    assert caught.value.where and caught.value.remedy
    assert tree(root) == before


@pytest.mark.parametrize(
    ("part", "match"), [("no such part", "no tensor differs"), ("norm", r"(?s)no linear weight.*norm.weight")]
)
def test_a_model_without_a_difference_that_an_adapter_reaches(root: Path, part: str, match: str) -> None:
    tune(root, lambda name, weight: noise(name, weight) if part in name else None)
    refused(root, MismatchError, match)


@pytest.mark.parametrize("model_type", ["mixtral", "granitemoe"])
def test_mixtures(tmp_path: Path, model_type: str) -> None:
    """Whether files hold an expert for itself or all in one tensor."""
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1}
    for seed, name in enumerate(("base", "tuned")):
        save(tiny_model(model_type, seed=seed, **sizes), tmp_path / name)
    refused(tmp_path, UnsupportedError, "experts of a mixture")


def test_a_folder_that_exists(root: Path) -> None:
    tune(root, low_rank())
    (root / "OUT").mkdir()
    (root / "OUT" / "mine").write_text("precious")
    refused(root, OutputError, "exists")
    refused(root, OutputError, "something else", overwrite=True)
