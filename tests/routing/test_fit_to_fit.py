"""`modekit fit` goes from any router to any other that the tensors allow, and says what else has to be built again."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import peft
import pytest

from adapter_folders import train_adapter
from conftest import DOMAINS, Workshop, make_workshop
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.cli.shell import main
from modekit.errors import RecipeError
from modekit.recipes.fits import FITS
from modekit.routing.fit import refit

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("short_tables")]
LINEAR = "linear"
NATIVE = [name for name, row in FITS.items() if row.native_as == "gate"]
ROUTER_FILES = ("model-router.safetensors", "config.json", "model.safetensors.index.json")


def asked(name: str) -> dict[str, Any]:
    """What a user who has little time asks for."""
    if name == LINEAR:
        return {"method": LINEAR}
    little = {"tokens_per_domain": 40}
    router = {"fit": name, **{key: value for key, value in little.items() if key in FITS[name].settings}}
    return {"method": "routing", "router": router}


def walk(out: Path, *names: str) -> Checkpoint:
    """From each to the next, with a proof behind every step."""
    for name in names:
        done = refit(open_checkpoint(out), asked(name))
        mixture = done.record.recipe.mixture
        assert mixture.method == LINEAR if name == LINEAR else mixture.router.fit == name
        assert is_proven(verify(open_checkpoint(out), reload=False)), name
    return open_checkpoint(out)


def shop_of(root: Path) -> Workshop:
    """Three full models, and two adapters beside the base."""
    shop = make_workshop(root)
    for name, targets, rank in (("medicine", ["q_proj", "up_proj"], 2), ("law", ["k_proj", "gate_proj", "down_proj"], 3)):
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
        train_adapter(root / "base", config, root / f"{name}-lora")
    return shop


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return shop_of(tmp_path_factory.mktemp("fits"))


def built(shop: Workshop, name: str, mixture: dict[str, Any], *, adapters: bool, form: str = "auto") -> Checkpoint:
    experts = shop.recipe["experts"]
    if adapters:
        low_rank = [{"name": name, "adapter": f"./{name}-lora", "text": f"./text/{name}.jsonl"} for name in DOMAINS[:2]]
        experts = [*low_rank, {"name": "general", "model": "base", "text": "./text/code.jsonl"}]
    return open_checkpoint(shop.build(name, mixture=mixture, experts=experts, output={"format": form}))


def test_adapters_go_from_every_router_to_every_other(shop: Workshop) -> None:
    out = built(shop, "WALK", {"router": {"fit": "random"}}, adapters=True).folder
    walk(out, *FITS, LINEAR, next(iter(FITS)))


DECORATED: dict[str, Any] = {
    "fit": "logistic",
    "granularity": "context",
    "decay": [0.5, 1.0],
    "jitter": 0.1,
    "noise": 0.1,
    "l2": 0.1,
    "tokens_per_domain": 40,
    "temperature": 2.0,
}


@pytest.mark.parametrize(("name", "per"), [("logistic", "layer"), ("lexical", "projection"), ("arrow", "feature")])
def test_what_only_the_old_router_needed_is_dropped(shop: Workshop, name: str, per: str) -> None:
    before = built(shop, "BEFORE", {"router": {**DECORATED, "per": per}, "top_k": 1}, adapters=True)
    done = refit(before, asked(name))
    assert is_proven(verify(done, reload=False)) and done.record.recipe.top_k == 1
    mixture = done.record.recipe.mixture.model_dump(mode="json", exclude_unset=True)
    fresh = built(shop, "FRESH", mixture, adapters=True, form="modekit").folder
    for file in ROUTER_FILES:
        assert (done.folder / file).read_bytes() == (fresh / file).read_bytes(), file


def test_full_models_go_from_every_router_that_reads_no_adapter_to_every_other(shop: Workshop) -> None:
    names = [name for name, row in FITS.items() if row.reads != "changes"]
    out = built(shop, "FULL", {"router": {"fit": "random"}}, adapters=False, form="modekit").folder
    walk(out, *names, LINEAR, names[0])
    for name in FITS.keys() - set(names):
        with pytest.raises(RecipeError, match="these experts are full models"):
            refit(open_checkpoint(out), asked(name))


def test_a_native_checkpoint_goes_from_every_native_router_to_every_other(shop: Workshop) -> None:
    out = built(shop, "NATIVE", {"router": {"fit": "random"}}, adapters=False, form="plain").folder
    walk(out, *NATIVE, LINEAR, NATIVE[0])


def test_what_a_native_checkpoint_cannot_say_is_to_be_built_again(shop: Workshop) -> None:
    checkpoint = built(shop, "TO-ARROW", {"router": {"fit": "random"}}, adapters=True, form="plain")
    with pytest.raises(RecipeError, match="build again with output"):
        refit(checkpoint, asked("arrow"))


def test_whole_models_beside_the_base_change_what_decides_before_the_first_layer(shop: Workshop) -> None:
    experts = [*shop.recipe["experts"][:2], {"name": "general", "model": "base", "text": "./text/code.jsonl"}]
    mixture = {"modules": "all", "router": {"fit": "lexical", "orders": [1, 2], "buckets": 64}}
    out = shop.build("WHOLE", mixture=mixture, experts=experts)
    done = walk(out, "logistic", "lexical", "centroid", "random", "lexical", LINEAR, "logistic")
    router = done.record.recipe.mixture.router
    assert (router.granularity, router.per) == ("sequence", "model")


def test_negative_prompts_go_with_the_fit_that_reads_them(shop: Workshop) -> None:
    experts = [{**expert, "negative_prompts": ["the weather"]} for expert in shop.recipe["experts"]]
    for name in ("logistic", LINEAR):
        out = shop.build("NEGATIVE", mixture={"router": {"fit": "centroid", "tokens_per_domain": 40}}, experts=experts)
        done = refit(open_checkpoint(out), asked(name))
        assert all(expert.negative_prompts is None for expert in done.record.recipe.experts)


def test_the_command_needs_no_more_than_the_name_of_the_fit(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    out = built(shop, "COMMAND", {"router": DECORATED}, adapters=True).folder
    monkeypatch.setattr(sys, "argv", ["modekit", "fit", str(out), "fit=lexical"])
    with suppress(SystemExit):
        main()
    settings = open_checkpoint(out).record.recipe.mixture.router
    assert (settings.fit, settings.granularity, settings.decay) == ("lexical", "token", None)
