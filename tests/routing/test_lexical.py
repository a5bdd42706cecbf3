"""Lexical routers in both shapes: the same decisions, kept tokens in place of text, refits, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from conftest import DOMAINS, Workshop, logits_of, make_workshop
from generated import check_generation
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.evidence import read_table
from modekit.checkpoint.open import open_checkpoint
from modekit.checkpoint.record import STATISTICS_FOLDER
from modekit.errors import CheckpointError, RecipeError
from modekit.loaded.load import load_model
from modekit.loaded.shapes import mixture_of
from modekit.planning.make import make_plan
from modekit.planning.plan import ROUTER_FILE
from modekit.recipes.read import load_recipe
from modekit.routing.fit import refit
from modekit.routing.kept import save_kept
from modekit.routing.token_text import load_token_text

HELD_OUT = ["99 fever artery lesion nerve", "99 licence clause party court", "99 def return self"]


def build(workshop: Workshop, name: str, form: str, **router: Any) -> Checkpoint:
    mixture = {"method": "routing", "top_k": 2, "router": {"fit": "lexical", **router}}
    return open_checkpoint(workshop.build(name, mixture={**mixture, "modules": "auto"}, output={"format": form}))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """With heads of 64, so that recency is what the formula says."""
    return make_workshop(tmp_path_factory.mktemp("lexical"), hidden_size=128, num_attention_heads=2, num_key_value_heads=1)


@pytest.fixture(scope="module")
def native(shop: Workshop) -> Checkpoint:
    return build(shop, "NATIVE", "plain")


@pytest.fixture(scope="module")
def modekit(shop: Workshop) -> Checkpoint:
    return build(shop, "MODEKIT", "modekit")


def logits(checkpoint: Checkpoint, text: str) -> list[torch.Tensor]:
    """What every router says of a text, each (S, E)."""
    model = load_model(checkpoint.folder)
    ids = AutoTokenizer.from_pretrained(checkpoint.folder)(text, return_tensors="pt").input_ids
    with torch.inference_mode(), mixture_of(model, checkpoint).traced() as trace:
        model(input_ids=ids)
        return [each.reshape(ids.shape[1], -1) for each in trace]


def test_both_shapes_are_proven(native: Checkpoint, modekit: Checkpoint) -> None:
    for checkpoint in (native, modekit):
        checks = verify(checkpoint)
        assert is_proven(checks), checks
    assert native.shape.plain and native.config["model_type"] == "mixtral"


def test_the_table_is_the_same_in_both(native: Checkpoint, modekit: Checkpoint) -> None:
    (gate,) = modekit.gates()
    torch.testing.assert_close(torch.from_numpy(read_table(*native.carrier)), torch.from_numpy(gate).t(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("place", range(3))
def test_the_right_expert_is_named_for_held_out_text(native: Checkpoint, modekit: Checkpoint, place: int) -> None:
    for checkpoint in (native, modekit):
        for said in logits(checkpoint, HELD_OUT[place]):
            assert int(said[-1].argmax()) == place, DOMAINS[place]


def test_gates_of_every_layer_say_about_what_the_table_says(native: Checkpoint, modekit: Checkpoint) -> None:
    """In size, too: the stream is measured where the gate reads it."""
    for text in HELD_OUT:
        (wanted,) = logits(modekit, text)
        for said in logits(native, text):
            share = float((said * wanted).sum() / (wanted * wanted).sum())
            assert 0.5 < share < 2
            torch.testing.assert_close(said, wanted * share, atol=0.5, rtol=0.5)


def test_a_fit_rewrites_gates_and_embedding_alone(shop: Workshop) -> None:
    checkpoint = build(shop, "REFIT", "plain")
    shard = checkpoint.folder / "model-backbone-00001.safetensors"
    before = shard.stat().st_ino, shard.stat().st_mtime_ns
    table = read_table(*checkpoint.carrier)
    changed = refit(checkpoint, {"router": {"temperature": 2.0}})
    assert (shard.stat().st_ino, shard.stat().st_mtime_ns) == before
    spread = torch.from_numpy(table) - torch.from_numpy(table).mean(1, keepdim=True)
    now = torch.from_numpy(read_table(*open_checkpoint(changed.folder).carrier))
    torch.testing.assert_close(now - now.mean(1, keepdim=True), spread / 2, atol=0.02, rtol=0.02)
    assert is_proven(verify(open_checkpoint(changed.folder)))
    back = refit(open_checkpoint(changed.folder), {"router": {"temperature": 1.0}})
    assert (read_table(*open_checkpoint(back.folder).carrier) == table).all()


def test_kept_tokens_stand_in_for_text_that_is_gone(tmp_path: Path) -> None:
    workshop = make_workshop(tmp_path)
    checkpoint = build(workshop, "OUT", "modekit")
    kept = load_token_text(checkpoint.folder / STATISTICS_FOLDER / "law.safetensors", int(checkpoint.config["vocab_size"]))
    assert kept is not None and kept.lengths.sum() == len(kept.ids_N)
    before = {name: (checkpoint.folder / name).read_bytes() for name in (ROUTER_FILE, "modekit.json")}
    for name in DOMAINS:
        (tmp_path / "text" / f"{name}.jsonl").unlink()
    again = refit(checkpoint, {"router": {"fit": "lexical"}})
    assert {name: (again.folder / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("changes", [{"fit": "logistic"}, {"fit": "lexical", "decay": [1.0]}])
def test_another_carrier_is_another_build(shop: Workshop, native: Checkpoint, changes: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="build again"):
        refit(native, {"router": changes})


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"channels": 48}, "multiple of 32"),
        ({"channels": 32}, None),
        ({"format": "modekit", "channels": 64}, "no effect"),
    ],
)
def test_channels_of_the_output(shop: Workshop, output: dict[str, Any], message: str | None) -> None:
    mixture = {"method": "routing", "router": {"fit": "lexical"}}
    path = shop.write(mixture=mixture, output=output)
    if message is None:
        assert make_plan(load_recipe(path), shop.root).config["hidden_size"] == 128 + 32
    else:
        with pytest.raises(RecipeError, match=message):
            load_recipe(path)


def test_a_record_of_another_base_is_refused(shop: Workshop) -> None:
    import json

    checkpoint = build(shop, "OTHER", "plain")
    record = json.loads((checkpoint.folder / "modekit.json").read_text())
    for value in (64, "wide", None, 0):
        record["dense_config"]["hidden_size"] = value
        (checkpoint.folder / "modekit.json").write_text(json.dumps(record))
        with pytest.raises(CheckpointError):
            open_checkpoint(checkpoint.folder)


def test_logits_of_a_forced_expert_do_not_see_the_channels(shop: Workshop, native: Checkpoint, ids: torch.Tensor) -> None:
    model = load_model(native.folder)
    plain = open_checkpoint(shop.build("RANDOM"))
    dense = load_model(plain.folder)
    with mixture_of(model, native).forced(2), mixture_of(dense, plain).forced(2):
        torch.testing.assert_close(logits_of(model, ids), logits_of(dense, ids), atol=1e-4, rtol=1e-5)


@pytest.fixture(scope="module", params=[None, [1, 2]], ids=["tokens", "tokens and pairs"])
def of_orders(request: pytest.FixtureRequest, shared_workshop: Workshop) -> Checkpoint:
    said = {} if request.param is None else {"orders": request.param, "buckets": 4096}
    name = f"ORDERS{'-'.join(map(str, request.param or []))}"
    return build(shared_workshop, name, "modekit", decay=[0.9, 1.0], **said)


def test_n_grams_have_tables_of_their_own(of_orders: Checkpoint) -> None:
    orders = of_orders.record.recipe.mixture.router.orders or [1]
    (slot,) = of_orders.slots
    assert slot.shape == (3, 2 * len(orders) * (4096 if orders != [1] else int(of_orders.config["vocab_size"])))
    assert is_proven(verify(of_orders))
    for place, text in enumerate(HELD_OUT):
        assert int(logits(of_orders, text)[0][-1].argmax()) == place


def test_ids_may_be_of_32_bits(of_orders: Checkpoint) -> None:
    """As some loaders and engines make them: the hash of n-grams must not overflow."""
    model, ids = load_model(of_orders.folder), torch.arange(4, 44)[None]
    assert torch.equal(logits_of(model, ids.int()), logits_of(model, ids))


def test_generation_padding_and_beams_equal_the_full_pass(of_orders: Checkpoint) -> None:
    check_generation(of_orders.folder)


def test_what_orders_mean_to_a_native_checkpoint(shared_workshop: Workshop) -> None:
    mixture = {"method": "routing", "router": {"fit": "lexical", "orders": [1, 2]}}
    plan = shared_workshop.plan(mixture=mixture)
    assert not plan.shape.plain and "n-grams of a lexical router" in plan.why
    with pytest.raises(RecipeError, match="n-grams of a lexical router"):
        load_recipe(shared_workshop.write(mixture=mixture, output={"format": "plain"}))


@pytest.mark.parametrize(
    "wrong",
    [
        {"ids": torch.tensor([96], dtype=torch.int32), "lengths": torch.tensor([1], dtype=torch.int32)},
        {"ids": torch.tensor([-1], dtype=torch.int32), "lengths": torch.tensor([1], dtype=torch.int32)},
        {"ids": torch.tensor([5, 6], dtype=torch.int32), "lengths": torch.tensor([3], dtype=torch.int32)},
        {"ids": torch.tensor([5.0, float("nan")]), "lengths": torch.tensor([2], dtype=torch.int32)},
        {"ids": torch.tensor([5], dtype=torch.int32)},
    ],
)
def test_damaged_tokens_are_refused(tmp_path: Path, wrong: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "law.safetensors"
    save_kept(path, wrong, {"token_text": True, "source": {}})
    with pytest.raises(CheckpointError, match="the kept statistics are damaged"):
        load_token_text(path, 96)


def test_opening_reads_the_columns_of_the_evidence_alone(native: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an embedding of gigabytes, too."""
    monkeypatch.setattr("modekit.checkpoint.evidence.rows_of", None)
    assert open_checkpoint(native.folder).record == native.record
