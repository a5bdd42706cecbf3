"""Every expert of a mixture, gates forced on it, beside its own model: whole, or by how much not."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import modekit.evaluation.forced as module
from adapter_folders import quiet, train_adapter
from command_line import ended, modekit
from conftest import DOMAINS, Workshop, make_workshop
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import CheckpointError, SourceError, UnsupportedError
from modekit.evaluation.domains import held_out_domains
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.forced import ForcedExperts, divergences, force_experts
from modekit.files.figures import three_digits
from modekit.report.card import make_card
from modekit.report.page import write_report
from modekit.text.sequences import Batch
from pair_models import make_pair_workshop
from refusal import borrow

ALL = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FEW: dict[str, Any] = {"tokens_per_domain": 300, "sequence_length": 32}


def forced(folder: Path) -> ForcedExperts:
    return force_experts(open_checkpoint(folder), **FEW)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """LoRA, rsLoRA and DoRA that PEFT trained on attention and FFN, each with a text of its own."""
    shop = make_workshop(tmp_path_factory.mktemp("adapters"))
    kinds: list[dict[str, Any]] = [{}, {"use_rslora": True}, {"use_dora": True}]
    for name, kind in zip(DOMAINS, kinds, strict=True):
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=ALL, task_type="CAUSAL_LM", **kind)
        train_adapter(shop.root / "base", config, shop.root / f"{name}-adapter")
    shop.recipe["experts"] = [
        {"name": name, "adapter": f"./{name}-adapter", "text": f"./text/{name}.jsonl"} for name in DOMAINS
    ]
    return shop


@pytest.fixture(scope="module")
def whole(adapters: Workshop) -> tuple[Checkpoint, ForcedExperts]:
    folder = adapters.build("WHOLE")
    return open_checkpoint(folder), forced(folder)


def test_divergence_is_that_of_torch() -> None:
    own, other = (torch.randn(70, 96, generator=torch.Generator().manual_seed(seed)) * 3 for seed in (1, 2))
    p, q = own.log_softmax(-1), other.log_softmax(-1)
    (kl_N, largest), (none_N, nothing) = divergences(own, other, own)
    assert torch.allclose(kl_N.float(), torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1), rtol=1e-4)
    assert largest == pytest.approx(float((p - q).abs().max()), rel=1e-5)
    assert not none_N.any() and nothing == 0.0
    [(fewer_N, _)] = divergences(own[:, :90], other)
    [(same_N, _)] = divergences(own[:, :90], other[:, :90])
    assert torch.equal(fewer_N, same_N) and not torch.allclose(fewer_N, kl_N)


def test_adapters_kept_low_rank_are_whole(whole: tuple[Checkpoint, ForcedExperts]) -> None:
    _, found = whole
    assert [(row.expert, row.text, row.own_model) for row in found.rows] == [(name, name, "PEFT") for name in DOMAINS]
    for row in found.rows:
        assert row.base_kl > 0.01 and row.kl < 1e-7 and row.largest < 1e-3, row
        assert row.lost is not None and row.lost < 1e-5
        assert row.forced_loss == pytest.approx(row.own_loss, abs=1e-5)


def test_losses_are_those_of_peft_and_of_eval(whole: tuple[Checkpoint, ForcedExperts]) -> None:
    """PEFT's by a pass per sequence here; base and oracle as the table of eval has them."""
    checkpoint, found = whole
    row = next(row for row in found.rows if row.expert == "law")
    (domain,) = [each for each in held_out_domains(checkpoint, **FEW) if each.name == "law"]
    with quiet(), torch.inference_mode():
        base = AutoModelForCausalLM.from_pretrained(checkpoint.recipe_root / "base", dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(base, checkpoint.recipe_root / "law-adapter").eval()
        total = sum(
            float(torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum"))
            for ids in (torch.tensor([sequence.ids]) for sequence in domain.sequences)
        )
    assert row.tokens == domain.scored_tokens
    assert row.own_loss == pytest.approx(total / row.tokens, rel=1e-5)
    table = evaluate(checkpoint, **FEW, write=False)
    assert row.forced_loss == pytest.approx(table.row("oracle").scores["law"].loss, rel=1e-5)
    assert row.base_loss == pytest.approx(table.row("base").scores["law"].loss, rel=1e-5)


def test_logits_of_one_text_are_kept_at_a_time(adapters: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, alive, most = open_checkpoint(adapters.build("FEW")), weakref.WeakSet[torch.Tensor](), list[int]()
    logits = module.predicted_logits

    def counted(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        said = logits(model, batch)
        alive.add(said)
        most.append(len(alive))
        return said

    monkeypatch.setattr(module, "predicted_logits", counted)
    rows = force_experts(checkpoint, **FEW).rows
    assert len(rows) == len(DOMAINS) and max(most) <= 4  # of one batch: the base, own model and mixture, and one to go


def test_a_native_mixture_leaves_attention_behind(adapters: Workshop) -> None:
    found = forced(adapters.build("FOLDED", output={"format": "plain"}))
    for row in found.rows:
        assert row.lost is not None and 0.01 < row.lost < 2, row
        assert row.largest > 0.1 and row.forced_loss != row.own_loss


def test_full_models_and_the_base_as_experts(shared_workshop: Workshop, tmp_path: Path) -> None:
    shop = borrow(shared_workshop, tmp_path)
    shop.recipe["experts"] = [*shop.recipe["experts"][:1], {"name": "general", "model": "base"}]
    router = {"fit": "random", "granularity": "sequence", "per": "model"}
    found = forced(shop.build(mixture={"modules": "all", "router": router}))
    assert [(row.expert, row.text, row.own_model) for row in found.rows] == [
        ("medicine", "medicine", "full model"),
        ("general", "medicine", "base"),
    ]
    medicine, general = found.rows
    assert medicine.kl < 1e-7 and medicine.base_kl > 0.01
    assert general.base_kl == 0 and general.lost is None and general.kl < 1e-7
    assert found.tables()[0].rows[1][3] == "-" and found.notes == []
    checkpoint = open_checkpoint(tmp_path / "OUT")
    moved = checkpoint.record.model_copy(update={"trained": {"a tensor": "0" * 64}})
    assert force_experts(Checkpoint(checkpoint.folder, moved), **FEW).notes[0].startswith("the mixture was trained")


def test_a_damaged_expert_shows(adapters: Workshop, whole: tuple[Checkpoint, ForcedExperts]) -> None:
    """And what was found before is no longer of this checkpoint."""
    _, before = whole
    folder = adapters.build("DAMAGED")
    forced(folder)
    name = next(name for name in open_checkpoint(folder).tensors if name.endswith("lora_B"))
    path = open_checkpoint(folder).tensors[name].file
    tensors = load_file(path)
    tensors[name][:, 4:8] *= -1.0  # the second adapter's columns
    save_file(tensors, path, metadata={"format": "pt"})
    damaged = open_checkpoint(folder)
    assert ForcedExperts.find(damaged) is None
    for row, was in zip(force_experts(damaged, **FEW).rows, before.rows, strict=True):
        assert (row.kl > 1e-4) == (row.expert == "law"), row
        assert row.own_loss == pytest.approx(was.own_loss, rel=1e-5)
    tensors[name][:, 4:8] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="expert 'law'"):
        forced(folder)


def test_what_is_written_is_read_back_and_shown(whole: tuple[Checkpoint, ForcedExperts]) -> None:
    checkpoint, found = whole
    found.write(checkpoint)
    assert ForcedExperts.find(checkpoint) == ForcedExperts.read(checkpoint)
    assert ForcedExperts.from_data(json.loads(json.dumps(found.as_data()))).as_data() == found.as_data()
    page = (checkpoint.folder / "results" / "forced.md").read_text()
    assert "| law | law |" in page
    card = make_card(checkpoint).contents["README.md"].decode()
    assert "| law | law |" in card and "lost" in card
    html = write_report(checkpoint).page.read_text()
    assert "Each expert and its own model" in html and f">{three_digits(found.rows[0].kl)}<" in html
    for rows in ([], [{"kl": float("inf")}]):
        with pytest.raises(ValueError, match=r"\w"):
            ForcedExperts.from_data({**found.as_data(), "rows": rows})


def test_without_text_english_that_comes_along_is_read(shared_workshop: Workshop, tmp_path: Path) -> None:
    shop = borrow(shared_workshop, tmp_path)
    experts = [{key: expert[key] for key in ("name", "model")} for expert in shop.recipe["experts"][:2]]
    found = forced(shop.build(experts=experts))
    assert [row.text for row in found.rows] == ["general"] * 2
    assert "general English that comes with modekit" in found.notes[0] and "there is no text to evaluate on" in found.notes[0]


def test_models_that_are_gone_are_left_out_and_said(workshop: Workshop) -> None:
    folder = workshop.build()
    (workshop.root / "law").rename(workshop.root / "moved")
    found = forced(folder)
    assert [row.expert for row in found.rows] == ["medicine", "code"]
    assert found.notes == ["law is left out: it is no longer where the recipe found it"]
    (workshop.root / "base").rename(workshop.root / "moved-base")
    with pytest.raises(SourceError, match="base: it is no longer"):
        forced(folder)


def test_given_weights_leave_no_expert_whole(workshop: Workshop) -> None:
    mixture = {"method": "linear", "weights": {name: place + 1.0 for place, name in enumerate(DOMAINS)}}
    with pytest.raises(UnsupportedError, match="fixed weights"):
        forced(workshop.build(mixture=mixture))


def test_pairs_are_read_by_models_with_an_encoder(tmp_path: Path) -> None:
    shop = make_pair_workshop(tmp_path, "t5")
    found = forced(
        shop.build(mixture={"modules": "all", "router": {"fit": "random", "granularity": "sequence", "per": "model"}})
    )
    assert all(row.kl < 1e-7 < row.base_kl for row in found.rows)


def test_the_commands(adapters: Workshop) -> None:
    adapters.write()
    out = adapters.root / "TYPED"
    modekit("build", adapters.root / "recipe.yaml", out)
    code, said, _ = ended("verify", out, "--deep", "--no-reload")
    assert code == 0 and "copied tensors" in said and "Every expert, gates forced on it" in said
    both = json.loads(modekit("verify", out, "--deep", "--no-reload", "--json"))
    assert {check["verdict"] for check in both["checks"]} == {"proven"} and len(both["forced"]["rows"]) == 3
    assert isinstance(json.loads(modekit("verify", out, "--no-reload", "--json")), list)
