"""What a plain checkpoint would lose of full models is measured by the build, which takes the other form where that is much."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

from adapter_folders import train_adapter
from building.test_carry import LINEAR, SIZES
from command_line import modekit
from conftest import DOMAINS, Workshop, save, tiny_model, write_text
from modekit.building.build import build
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.carried import CARRIED_FILE, Lost, lost_by, lost_notes, lost_of
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import SourceError, UnsupportedError
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.forced import force_experts
from modekit.planning.make import make_plan
from modekit.recipes.edit import as_written
from modekit.recipes.read import parse_recipe
from refusal import tree


def full_shop(
    root: Path, directions: int | None, dtype: torch.dtype = torch.float32, stream: float | None = None, **more: int
) -> Workshop:
    """A base and a full model per domain that differs from it in every weight in few directions, or, FFNs aside, in all.
    `stream`: the root mean square of embeddings.
    """
    sizes = {**SIZES, **more}
    base = tiny_model(**sizes)
    embedding = base.get_input_embeddings().weight
    with torch.no_grad():
        embedding.mul_(1.0 if stream is None else stream / embedding.square().mean().sqrt())
    save(base.to(dtype), root / "base")
    write_text(root / "text", documents=200)
    for seed, name in enumerate(DOMAINS):
        model, generator = copy.deepcopy(base).float(), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.ndim == 1 or (directions is None and "mlp" in key):
                    continue
                rows, columns = parameter.shape
                if directions is None:
                    change = torch.randn(parameter.shape, generator=generator)
                else:
                    left = torch.randn((rows, directions), generator=generator)
                    change = left @ torch.randn((directions, columns), generator=generator)
                parameter.add_(0.1 * parameter.std() * change / change.std())
        save(model.to(dtype), root / name)
    experts = [{"name": name, "model": f"./{name}", "text": f"./text/{name}.jsonl"} for name in DOMAINS]
    return Workshop(root, {"base_model": "./base", "experts": [*experts, {**experts[0], "name": "general", "model": "base"}]})


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return full_shop(tmp_path_factory.mktemp("noise"), None)


def built(shop: Workshop, out: Path, **said: Any) -> tuple[Any, tuple[str, ...]]:
    made = build(make_plan(parse_recipe({**shop.recipe, **said}), shop.root), out)
    return open_checkpoint(out), made.notes


def refuse_what_loses_a_hundredth(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little that is in nats: little models differ little."""
    monkeypatch.setattr("modekit.checkpoint.carried.MOST_LOST", 0.005)
    monkeypatch.setattr("modekit.checkpoint.carried._LEAST_NATS", 1e-5)


def check_measure(out: Path) -> None:
    """What was measured before the build is what forced experts lose of held-out text: of one as near as a single token of a
    thousand lets it be, which has a third of all that is lost.
    """
    checkpoint = open_checkpoint(out)
    said = dict(zip(checkpoint.names, lost_of(out), strict=True))
    forced = [row for row in force_experts(checkpoint).rows if row.lost is not None and row.text == row.expert]
    apart = [said[row.expert].share - (row.lost or 0) for row in forced]
    assert apart and len(lost_of(out)) == len(checkpoint.names)
    assert abs(np.mean(apart)) < 0.02 and max(map(abs, apart)) < 0.03, (said, forced)


def test_what_channels_hold_becomes_plain(tmp_path: Path) -> None:
    """All of a full model that differs from its base in few directions."""
    shop = full_shop(tmp_path, 2)
    checkpoint, (note, *notes) = built(shop, tmp_path / "OUT")
    assert any("lexical router adds" in each for each in notes) and not any("the build measures" in each for each in notes)
    assert checkpoint.shape.plain and "this plain checkpoint loses" in note and lost_by(checkpoint) == [note]
    assert max(lost_of(checkpoint.folder)).share < 0.05 and is_proven(verify(checkpoint))
    check_measure(checkpoint.folder)
    assert note in evaluate(checkpoint, tokens_per_domain=200).notes


def test_what_they_do_not_hold_takes_the_other_form_and_says_so(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two in a hundred, here: little models have few directions."""
    refuse_what_loses_a_hundredth(monkeypatch)
    checkpoint, (note, *more) = built(shop, tmp_path / "OUT")
    before = make_plan(parse_recipe(shop.recipe), shop.root).notes
    assert not any("channels" in each for each in (*before, *more))  # of the form that was not built
    assert not checkpoint.shape.plain and checkpoint.record.recipe.mixture.modules == "all"
    assert (
        note.startswith("not a plain checkpoint, which would lose ") and "format: plain in a recipe, builds it anyway" in note
    )
    assert not (checkpoint.folder / CARRIED_FILE).exists() and lost_by(checkpoint) == []
    again, said = built(shop, tmp_path / "AGAIN", **as_written(checkpoint.record.recipe))
    assert tree(again.folder) == tree(checkpoint.folder) and said == ()


@pytest.mark.slow
def test_whoever_wants_it_plain_gets_it_and_is_told(shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_what_loses_a_hundredth(monkeypatch)
    checkpoint, (note,) = built(shop, tmp_path / "OUT", output={"format": "plain", "rank": 32})
    assert checkpoint.shape.plain and "this plain checkpoint loses" in note
    assert max(lost_of(checkpoint.folder)).share > 0.01 and is_proven(verify(checkpoint, reload=False))
    again, _ = built(shop, tmp_path / "AGAIN", **as_written(checkpoint.record.recipe))
    assert tree(again.folder) == tree(checkpoint.folder)
    check_measure(checkpoint.folder)


@pytest.mark.parametrize(("size", "modules", "dtype"), [(0.016, LINEAR, "bfloat16"), (0.19, ["o_proj"], "float32")])
def test_a_small_adapter_is_rounded_away_and_a_large_one_unseen_by_a_norm(
    tmp_path: Path, size: float, modules: list[str], dtype: str
) -> None:
    """Beside a full model: several in a hundred are lost of either, though there is a channel for all of it."""
    shop = full_shop(tmp_path, 2, dtype=getattr(torch, dtype))
    folder = train_adapter(tmp_path / "base", peft.LoraConfig(r=2, lora_alpha=2, target_modules=modules), tmp_path / "small")
    generator, file = np.random.default_rng(0), folder / "adapter_model.safetensors"
    save_file({key: generator.normal(0, size, each.shape).astype(np.float32) for key, each in load_file(file).items()}, file)
    experts = [{"name": DOMAINS[0], "adapter": "./small", "text": shop.recipe["experts"][0]["text"]}, shop.recipe["experts"][1]]
    checkpoint, _ = built(shop, tmp_path / "OUT", experts=experts, output={"format": "plain"})
    assert 0.03 < lost_of(checkpoint.folder)[0].share < 0.08
    check_measure(checkpoint.folder)


@pytest.mark.slow
def test_a_change_of_the_mixture_says_it_too(shop: Workshop, tmp_path: Path) -> None:
    *experts, last = shop.recipe["experts"][:3]
    built(shop, tmp_path / "OUT", experts=experts, output={"format": "plain"})
    model, text = (str(shop.root / last[key]) for key in ("model", "text"))
    said = modekit("add", str(tmp_path / "OUT"), "--name", last["name"], "--model", model, "--text", text, "--no-measure")
    assert "this plain checkpoint loses" in said


@pytest.mark.parametrize("stream", [0.1, 100.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_plain_checkpoint_is_built_in_every_dtype_and_for_every_size_of_stream(
    tmp_path: Path, dtype: torch.dtype, stream: float
) -> None:
    """Gates and units are beyond float16, which is written as bfloat16."""
    shop = full_shop(tmp_path, 2, dtype, stream, tie_word_embeddings=False)
    plan = make_plan(parse_recipe({**shop.recipe, "output": {"format": "plain"}}), shop.root)
    wide = dtype == torch.float16
    assert any("float16 is written as bfloat16" in note for note in plan.notes) == wide
    build(plan, tmp_path / "OUT")
    checkpoint = open_checkpoint(tmp_path / "OUT")
    assert {ref.dtype for ref in checkpoint.tensors.values()} == {"F32" if dtype == torch.float32 else "BF16"}
    for row in force_experts(checkpoint, tokens_per_domain=200).rows:
        assert row.kl < (1e-4 if dtype == torch.float32 else 5e-3), row


def test_float16_that_is_asked_for_is_refused_before_anything_is_written(shop: Workshop) -> None:
    with pytest.raises(UnsupportedError, match="no gates in float16"):
        router = {"router": {"fit": "lexical"}}
        output = {"format": "plain", "dtype": "float16"}
        make_plan(parse_recipe({**shop.recipe, "mixture": router, "output": output}), shop.root)


def test_what_is_lost_decides_only_beyond_its_error_and_where_it_is_something() -> None:
    assert Lost(0.10, 0.01, 0.01).is_too_much and not Lost(0.10, 0.03, 0.01).is_too_much
    assert not Lost(11.7, 0.01, 0.0005).is_too_much and not Lost(0.04, 0.001, 0.3).is_too_much
    assert Lost(0.10, 0.01, 0.01).is_clear and not Lost(0.10, 0.03, 0.01).is_clear and Lost(9.0, 3.0, 0.0005).is_clear
    notes = [*lost_notes(["law", "tiny"], [Lost(0.012, 0.003, 0.01), Lost(11.7, 0.1, 0.00001)])]
    assert notes == ["this plain checkpoint loses 1.2% ± 0.3% of law, of what they change of the base"]


def test_a_loss_that_no_build_writes_is_refused(shop: Workshop, tmp_path: Path) -> None:
    checkpoint, _ = built(shop, tmp_path / "OUT", output={"format": "plain", "rank": 32})
    arrays = load_file(checkpoint.folder / CARRIED_FILE)
    others = ([[-0.1, 0.1, 0.1]], [[float("nan"), 0.1, 0.1]], [0.1])
    for damaged in (*(np.array(each, np.float32) for each in others), np.zeros((1, 3), np.int64)):
        save_file({"lost": damaged, "units": arrays["units"]}, checkpoint.folder / CARRIED_FILE)
        with pytest.raises(SourceError, match="a file of the mixture was changed"):
            lost_of(checkpoint.folder)
