"""One dense model of a mixture: what merges are, what a distillation adds, and what is said of it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapter_folders import UP, write_adapter
from conftest import Workshop, make_workshop
from modekit.checkpoint.open import open_checkpoint
from modekit.conversion.densify import DenseRecord, Densify, course_of, densify
from modekit.conversion.merges import By
from modekit.conversion.upcycle import Upcycling, upcycle
from modekit.errors import InterruptError, SourceError, TextError, TrainingError
from modekit.evaluation.domains import held_out_domains
from modekit.experts.specialist import held_out_scores
from modekit.run import QUIET, Run
from modekit.sources import contents
from modekit.text.splits import split_of

SHORT = {"steps": 3, "batch_tokens": 256, "sequence_length": 64, "select_tokens": 200}
AS_BUILT = {"texts": {}, "root": Path(), "scale": None, "tokens": 200, "overwrite": False}


def made(shop: Workshop, out: str, by: By, name: str = "DENSE", **said: object) -> DenseRecord:
    course = course_of(**{**SHORT, **said.pop("course", {})})  # type: ignore[dict-item]
    asked = Densify(by, course, **{**AS_BUILT, "overwrite": True, **said})  # type: ignore[arg-type]
    return densify(open_checkpoint(shop.root / out), asked, shop.root / name)


def opened(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def mean_of(models: Sequence[PreTrainedModel], name: str) -> torch.Tensor:
    return torch.stack([dict(model.named_parameters())[name].data.double() for model in models]).mean(0)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_the_average_is_the_mean_of_the_experts_and_has_the_base_s_class_and_size(tmp_path: Path, model_type: str) -> None:
    shop = make_workshop(tmp_path, model_type)
    shop.build()
    record = made(shop, "OUT", "average")
    dense, base = opened(tmp_path / "DENSE"), opened(tmp_path / "base")
    experts = [opened(tmp_path / name) for name in ("medicine", "law", "code")]
    assert type(dense) is type(base)
    assert sum(p.numel() for p in dense.parameters()) == sum(p.numel() for p in base.parameters()) == record.parameters
    for name, parameter in dense.named_parameters():
        assert torch.allclose(parameter.double(), mean_of(experts, name), atol=1e-6), name


def test_a_sum_takes_the_best_scale_and_is_base_and_scaled_differences(tmp_path: Path) -> None:
    shop = make_workshop(tmp_path)
    shop.build()
    record = made(shop, "OUT", "sum")
    assert record.merge.scale in [times / 3 for times in (1.0, 1.5, 2.0, 3.0)]
    base = opened(tmp_path / "base")
    experts = [opened(tmp_path / name) for name in ("medicine", "law", "code")]
    for name, parameter in opened(tmp_path / "DENSE").named_parameters():
        origin = dict(base.named_parameters())[name].data.double()
        wanted = origin + record.merge.scale * 3 * (mean_of(experts, name) - origin)
        assert torch.allclose(parameter.double(), wanted, atol=1e-5), name
    assert made(shop, "OUT", "sum", "OTHER", scale=0.25).merge.scale == 0.25


def test_the_best_expert_is_that_of_the_lowest_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "CHUNK", 1_000)  # so that tensors are read in several
    shop = make_workshop(tmp_path)
    shop.build()
    record = made(shop, "OUT", "best")
    scored = {name: record.losses["dense"][name] for name in record.losses["dense"]}
    domains = held_out_domains(open_checkpoint(tmp_path / "OUT"), tokens_per_domain=200, sequence_length=64)
    found = held_out_scores(opened(tmp_path / "DENSE").eval(), domains, "dense", QUIET)
    assert {name: score.loss for name, score in found.items()} == pytest.approx(scored, abs=1e-4)
    own = dict(opened(tmp_path / str(record.merge.expert)).named_parameters())
    assert all(torch.equal(parameter, own[name]) for name, parameter in opened(tmp_path / "DENSE").named_parameters())


def test_adapters_of_the_modekit_architecture_become_one_dense_model(tmp_path: Path) -> None:
    shop = make_workshop(tmp_path)
    for name in ("fever", "court"):
        write_adapter(tmp_path / name, UP, target_modules=["up_proj"], r=4, lora_alpha=8)
    experts = [{"name": name, "adapter": f"./{name}", "text": "./text/law.jsonl"} for name in ("fever", "court")]
    shop.build(experts=experts)
    made(shop, "OUT", "average")
    base = dict(opened(tmp_path / "base").named_parameters())
    moved = {name for name, p in opened(tmp_path / "DENSE").named_parameters() if not torch.equal(p, base[name])}
    assert moved and all(name.endswith("up_proj.weight") for name in moved)


def test_a_distillation_lowers_the_held_out_loss_and_says_what_it_keeps(tmp_path: Path) -> None:
    shop = make_workshop(tmp_path)
    shop.build()
    record = made(shop, "OUT", "distil", course={"steps": 12, "learning_rate": 3e-3})
    losses = record.losses
    assert set(losses) == {"base", "experts", "mixture", "merge", "dense"}
    assert sum(losses["dense"].values()) < sum(losses["merge"].values())
    assert record.best_step > 0
    assert DenseRecord.model_validate(json.loads((tmp_path / "DENSE" / "densify.json").read_text())) == record
    assert (tmp_path / "DENSE" / "trained-on.txt").exists()
    assert not (tmp_path / "DENSE.training").exists()
    assert opened(tmp_path / "DENSE").num_parameters() == record.parameters


def test_a_distillation_does_not_go_on_where_its_states_were_compared_on_other_text(tmp_path: Path) -> None:
    shop = make_workshop(tmp_path, num_hidden_layers=1)
    shop.build()
    asked = Densify("distil", course_of(**{**SHORT, "evaluate_every": 1}), **AS_BUILT)  # type: ignore[arg-type]

    def stop(stage: str, done: int, total: int) -> None:
        if stage.startswith("train") and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(InterruptError, match="kept up to step"):
        densify(open_checkpoint(tmp_path / "OUT"), asked, tmp_path / "DENSE", run=Run(progress=stop))
    lines = (tmp_path / "text" / "law.jsonl").read_text().splitlines(keepends=True)
    lines.remove(next(line for line in lines if split_of(json.loads(line)["text"]) == "select"))
    (tmp_path / "text" / "law.jsonl").write_text("".join(lines))
    with pytest.raises(TrainingError, match="an unfinished training is in the way"):
        densify(open_checkpoint(tmp_path / "OUT"), asked, tmp_path / "DENSE")


def test_where_no_state_was_better_the_merge_itself_is_written(tmp_path: Path) -> None:
    shop = make_workshop(tmp_path)
    shop.build()
    record = made(shop, "OUT", "distil", course={"learning_rate": 10.0, "warmup": 0.0})
    assert record.best_step == 0
    assert record.losses["dense"] == pytest.approx(record.losses["merge"])
    assert any("no state" in note for note in record.notes)


@pytest.mark.parametrize("by", ["average", "sum"])
def test_a_mixture_whose_experts_are_all_the_base_is_the_base(tmp_path: Path, by: By) -> None:
    shop = make_workshop(tmp_path)
    upcycle("./base", Upcycling(copies=2, top_k=1), tmp_path / "OUT", root=tmp_path)
    made(shop, "OUT", by)
    base = dict(opened(tmp_path / "base").named_parameters())
    assert all(torch.equal(parameter, base[name]) for name, parameter in opened(tmp_path / "DENSE").named_parameters())


def test_a_merge_that_is_given_needs_no_text_and_reads_held_out_text_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = make_workshop(tmp_path)
    shop.build()
    monkeypatch.setattr("modekit.conversion.densify.read_texts", lambda *_, **__: pytest.fail("text to train on was read"))
    assert set(made(shop, "OUT", "average").losses) == {"base", "experts", "mixture", "dense"}
    assert made(shop, "OUT", "sum", scale=0.5).losses
    for given in ({"law": ["./nowhere.jsonl"]}, {"physics": ["./text/law.jsonl"]}):
        with pytest.raises(TextError, match="--text"):
            made(shop, "OUT", "average", texts=given, root=tmp_path)
    (tmp_path / "text").rename(tmp_path / "elsewhere")
    assert made(shop, "OUT", "average").losses == {}


def test_where_the_mixture_closes_no_gap_nothing_is_kept_of_it() -> None:
    for mixture, kept in ((0.9, 0.5), (0.01, None), (None, None)):
        made = {"by": "sum", "merge": {"by": "sum", "scale": 0.5}, "parameters": 1, "steps": 0, "best_step": 0}
        made |= {"losses": {}, "notes": []}
        record = DenseRecord.model_validate({**made, "gap_closed": {"mixture": mixture, "dense": 0.45}})
        assert record.kept == (kept and pytest.approx(kept))


def test_of_experts_whose_gain_is_noise_no_gap_is_shown(tmp_path: Path) -> None:
    """Random models, of which some are a little better than the base on a few tokens by chance."""
    shop = make_workshop(tmp_path, num_hidden_layers=1)
    shop.build()
    record = made(shop, "OUT", "average")
    assert set(record.gap_closed.values()) == {None} and record.kept is None
    assert any("two standard errors: medicine" in note for note in record.notes)


def test_of_a_mixture_that_says_nan_nothing_is_written(tmp_path: Path) -> None:
    shop = make_workshop(tmp_path, num_hidden_layers=1)
    out = shop.build(experts=shop.recipe["experts"][:2])
    file = next(out.glob("model-expert-00001-*.safetensors"))
    save_file({name: tensor * math.nan for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(SourceError, match="a loss is not finite"):
        made(shop, "OUT", "average")
    assert not (tmp_path / "DENSE").exists()


def test_without_text_there_is_no_distillation_and_no_figure(tmp_path: Path) -> None:
    shop = make_workshop(tmp_path)
    shop.build(experts=[{key: value for key, value in each.items() if key != "text"} for each in shop.recipe["experts"]])
    assert made(shop, "OUT", "sum").losses == {}
    with pytest.raises(TextError):
        made(shop, "OUT", "distil")


def test_an_expert_s_folder_that_has_changed_is_refused(tmp_path: Path) -> None:
    shop = make_workshop(tmp_path)
    shop.build()
    (tmp_path / "law" / "config.json").unlink()
    with pytest.raises(SourceError, match="law"):
        made(shop, "OUT", "average")
