"""Text of no domain goes to the base: how many of a domain's tokens go there by mistake, and that nothing else changes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from conftest import DOMAINS, Workshop, logits_of, make_workshop
from modekit.architecture.modekit_router import Router, causal_average
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from modekit.errors import CheckpointError, RecipeError
from modekit.loaded.load import load_model
from modekit.loaded.modekit import routers_at
from modekit.loaded.shapes import mixture_of
from modekit.planning.make import make_plan
from modekit.planning.plan import ROUTER_FILE
from modekit.planning.tensors import EMBEDDING_FILE
from modekit.recipes.read import load_recipe, parse_recipe
from modekit.routing.evidence import Averaging, BaseRoom, TableSchedule, TokenRows, over_base, room_of, train_table
from modekit.routing.refit import refit
from modekit.routing.text_router import TextRouter

BASE = len(DOMAINS)
GENERAL = "river house green window morning street paper winter"
SEEN = ["7 fever artery lesion nerve dose pulse", "licence clause party court deed", "def return self import yield"]
FOREIGN = "QUJZ!! #%&/ ]]]{{{ WXQK ~~~~ VBX??"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Four experts: three domains, and the base with text of none. Heads of 64, so that recency is what the formula says."""
    workshop = make_workshop(tmp_path_factory.mktemp("unseen"), hidden_size=128, num_attention_heads=2, num_key_value_heads=1)
    words = GENERAL.split()
    lines = [
        json.dumps({"text": f"{number} " + " ".join(words[(number * 5 + place * (number % 7 + 1)) % 8] for place in range(8))})
        for number in range(60)
    ]
    (workshop.root / "text" / "general.jsonl").write_text("\n".join(lines) + "\n")
    general = {"name": "general", "model": "base", "text": "./text/general.jsonl"}
    workshop.recipe["experts"] = [*workshop.recipe["experts"], general]
    return workshop


def build(shop: Workshop, name: str, form: str = "modekit", fit: str = "lexical", **mixture: Any) -> Checkpoint:
    router = {"fit": fit, **mixture.pop("router", {})}
    said = {"method": "routing", "top_k": 2, "unseen": "base", **mixture, "router": router}
    return open_checkpoint(shop.build(name, mixture=said, output={"format": form}))


@pytest.fixture(scope="module")
def mixture(shop: Workshop) -> Checkpoint:
    return build(shop, "OUT-lexical")


def ids_of(checkpoint: Checkpoint, text: str) -> torch.Tensor:
    ids: torch.Tensor = AutoTokenizer.from_pretrained(checkpoint.folder)(text, return_tensors="pt").input_ids
    return ids


def said(checkpoint: Checkpoint, text: str) -> torch.Tensor:
    """The router's logits (S, E); of a native mixture those of its first layer."""
    model, ids = load_model(checkpoint.folder), ids_of(checkpoint, text)
    with torch.inference_mode(), mixture_of(model, checkpoint).traced() as trace:
        model(input_ids=ids)
        return next(iter(trace)).reshape(ids.shape[1], -1)


def with_row(checkpoint: Checkpoint, value: float) -> Any:
    """The loaded mixture whose router's row of the base says `value` of every token, whatever it said before."""
    model = load_model(checkpoint.folder)
    (gate,) = (model.get_parameter(slot.name) for slot in checkpoint.slots)
    with torch.no_grad():
        gate[BASE] = value
    return model


def held_out(shop: Workshop, name: str) -> list[str]:
    return [json.loads(line)["text"] for line in (shop.root / "text" / f"{name}.jsonl").read_text().splitlines()]


# The number that is added to the base's row.


@given(
    st.lists(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=60), min_size=1, max_size=4),
    st.floats(0.01, 0.9),
)
def test_no_domain_loses_more_than_it_may_and_one_cannot_lose_more(leads: list[list[float]], alarms: float) -> None:
    room = room_of([torch.tensor(each) for each in leads], alarms)
    lost = [sum(lead < room for lead in each) for each in leads]
    assert all(count <= alarms * len(each) for count, each in zip(lost, leads, strict=True))
    more = [sum(lead <= room + 1e-4 for lead in each) for each in leads]
    assert any(count > alarms * len(each) for count, each in zip(more, leads, strict=True))


def texts(seed: int, favourites: list[int], count: int) -> list[TokenRows]:
    weights = torch.ones(24)
    weights[favourites] = 8.0
    draw = torch.Generator().manual_seed(seed)
    return [TokenRows(torch.multinomial(weights, 30, replacement=True, generator=draw).int()) for _ in range(count)]


@pytest.mark.parametrize("alarms", [0.02, 0.3])
def test_fresh_text_of_the_domains_raises_as_many_false_alarms_as_were_allowed(alarms: float) -> None:
    kinds, averaging = [[1, 2, 3], [4, 5, 6], [7, 8, 9]], Averaging((0.9,))
    domains = [texts(number, kind, 600) for number, kind in enumerate(kinds)]
    trained = train_table(domains, 24, averaging, room=BaseRoom(2, alarms), schedule=TableSchedule(steps=60, aside=2))
    found = []
    for number, kind in enumerate(kinds[:2]):
        rows = torch.stack([each.rows for each in texts(90 + number, kind, 500)]).long()
        values = trained.table[:, 0].t()[rows]
        logits = causal_average(values, torch.ones(rows.shape), 0.9, None)[0]
        logits[..., 2] += trained.room
        found.append(float((over_base(logits, 2) < 0).float().mean()))
    assert max(found) == pytest.approx(alarms, rel=0.25, abs=0.005)
    assert min(found) <= max(found) * 1.01


# What a fit makes of it.


def test_text_of_no_domain_goes_to_the_base_and_text_of_a_domain_to_its_expert(mixture: Checkpoint) -> None:
    for place, text in enumerate(SEEN):
        assert int(said(mixture, text)[-1].argmax()) == place
    assert int(said(mixture, FOREIGN)[-1].argmax()) == BASE
    assert int(said(mixture, "river house green window morning street")[-1].argmax()) == BASE


def test_of_held_out_text_few_tokens_go_there(shop: Workshop, mixture: Checkpoint) -> None:
    """The stated rate is that of text kept aside from the fit; documents here are short, hence the allowance."""
    for name in DOMAINS:
        leads = torch.cat([over_base(said(mixture, text), BASE) for text in held_out(shop, name)[::7]])
        assert (leads < 0).float().mean() < 0.08, name


def test_a_larger_rate_adds_more(shop: Workshop, mixture: Checkpoint) -> None:
    fit = mixture.record.recipe.mixture.router.fit
    more = build(shop, f"MORE-{fit}", fit=fit, router={"false_alarms": 0.3})
    assert more.record.router.report["toward_base"] > mixture.record.router.report["toward_base"]


# What the mixture computes.


def test_where_it_leads_nowhere_nothing_changes(mixture: Checkpoint, ids: torch.Tensor) -> None:
    model = with_row(mixture, -1e3)
    found = logits_of(model, ids)
    for router in routers_at(model, mixture.slots):
        router.set({key: value for key, value in router.routing.items() if key != "unseen"})
    assert torch.equal(found, logits_of(model, ids))


def test_the_base_takes_all_of_a_token_and_of_no_other(mixture: Checkpoint) -> None:
    model, ids = load_model(mixture.folder), ids_of(mixture, SEEN[0] + " " + FOREIGN)
    weights: list[torch.Tensor] = []
    router = next(module for module in model.modules() if isinstance(module, Router))
    router.register_forward_hook(lambda _module, _args, output: weights.append(output[0]))
    with torch.inference_mode():
        model(input_ids=ids)
    leads = said(mixture, SEEN[0] + " " + FOREIGN).argmax(-1) == BASE
    assert leads.any() and not leads.all()
    assert torch.equal(weights[0][leads], torch.eye(BASE + 1)[BASE].expand(int(leads.sum()), -1))
    assert ((weights[0][~leads] > 0).sum(-1) == 2).all()
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(len(leads)))


@pytest.mark.parametrize(
    "extra",
    [
        {"always_on": {"expert": "law", "weight": 0.4}},
        {"method": "gating", "top_k": None},
        {"modules": ["q", "up"]},
        {"modules": "all"},
    ],
    ids=str,
)
def test_whatever_else_the_mixture_does(shop: Workshop, ids: torch.Tensor, extra: dict[str, Any]) -> None:
    checkpoint = build(shop, "EXTRA", **extra)
    assert is_proven(verify(checkpoint))
    found = logits_of(with_row(checkpoint, 1e3), ids)
    torch.testing.assert_close(found, logits_of(shop.root / "base", ids), atol=1e-4, rtol=1e-5)


def test_an_expert_that_is_forced_or_left_out_is_so_still(mixture: Checkpoint, shop: Workshop, ids: torch.Tensor) -> None:
    model = with_row(mixture, 1e3)
    with mixture_of(model, mixture).forced(1):
        forced = logits_of(model, ids)
    free = logits_of(model, ids)
    with mixture_of(model, mixture).left_out(BASE):
        without = logits_of(model, ids)
    assert not torch.allclose(forced, free) and not torch.allclose(without, free)


# Native checkpoints.


@pytest.fixture(scope="module")
def native(shop: Workshop) -> Checkpoint:
    return build(shop, "NATIVE", "native", top_k=1)


def test_a_native_checkpoint_decides_as_the_modekit_architecture(shop: Workshop, native: Checkpoint) -> None:
    modekit = build(shop, "MODEKIT-TOP-1", top_k=1)
    assert native.shape.plain and is_proven(verify(native))
    for text in (*SEEN, FOREIGN):
        lead, wanted = over_base(said(native, text), BASE), over_base(said(modekit, text), BASE)
        clear = wanted.abs() > 0.25  # its average is within some hundredths
        assert torch.equal((lead < 0)[clear], (wanted < 0)[clear])


def test_a_native_checkpoint_is_the_base_where_that_leads(shop: Workshop) -> None:
    """Nearly every token of a domain may be lost, so that the base leads from the first token of other text on."""
    checkpoint = build(shop, "LOST", "native", top_k=1, router={"false_alarms": 0.999})
    ids, model = ids_of(checkpoint, FOREIGN), load_model(checkpoint.folder)
    with torch.inference_mode(), mixture_of(model, checkpoint).traced() as trace:
        found = model(input_ids=ids).logits
        assert all(bool((each.reshape(-1, BASE + 1).argmax(-1) == BASE).all()) for each in trace)
    torch.testing.assert_close(found, logits_of(shop.root / "base", ids), atol=1e-4, rtol=1e-5)


def test_a_fit_turns_it_on_and_off_and_leaves_the_bytes(shop: Workshop, native: Checkpoint) -> None:
    names = (ROUTER_FILE, EMBEDDING_FILE, "modekit.json", "config.json")
    before = {name: (native.folder / name).read_bytes() for name in names}
    off = refit(native, {"unseen": None})
    assert off.record.recipe.mixture.unseen is None and "toward_base" not in off.record.router.report
    assert (off.folder / EMBEDDING_FILE).read_bytes() != before[EMBEDDING_FILE]
    on = refit(open_checkpoint(off.folder), {"unseen": "base"})
    assert {name: (on.folder / name).read_bytes() for name in names} == before


@pytest.mark.parametrize(("fit", "kept"), [("logistic", None), ("lexical", "base")])
def test_another_fit_keeps_it_where_that_reads_tokens(shop: Workshop, fit: str, kept: str | None) -> None:
    checkpoint = build(shop, "REFIT", router={"false_alarms": 0.1})
    changed = refit(checkpoint, {"router": {"fit": fit, **({"per": "model"} if fit == "logistic" else {})}})
    assert changed.record.recipe.mixture.unseen == kept
    assert changed.record.recipe.mixture.router.false_alarms == (0.1 if kept else None)
    assert changed.shape.routing.unseen == (BASE if kept else None)


# Whom a front asks, and what is said and refused.


def test_a_router_by_itself_sends_it_to_the_base(mixture: Checkpoint, native: Checkpoint) -> None:
    for checkpoint in (mixture, native):
        router = TextRouter(open_checkpoint(checkpoint.folder))
        assert router.decide(FOREIGN).expert == "general"
        assert [router.decide(text).expert for text in SEEN] == list(DOMAINS)


@pytest.mark.parametrize(("form", "top_k", "notes"), [("native", 2, 2), ("modekit", 2, 1)])
def test_the_plan_says_so(shop: Workshop, form: str, top_k: int, notes: int) -> None:
    mixture = {"top_k": top_k, "unseen": "base", "router": {"fit": "lexical", "false_alarms": 0.05}}
    plan = make_plan(load_recipe(shop.write(mixture=mixture, output={"format": form})), shop.root)
    said = [note for note in plan.notes if "'general'" in note]
    assert len(said) == notes and "5.0% of the tokens" in said[0]


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"method": "linear", "unseen": "base"}, "'unseen' has no effect with method 'linear'"),
        ({"unseen": "base", "router": {"fit": "logistic"}}, "which fit 'logistic' does not do"),
        ({"unseen": "base", "backbone": "average", "router": {"fit": "lexical"}}, "needs backbone: base"),
        ({"router": {"fit": "lexical", "false_alarms": 0.1}}, "'false_alarms' has no effect without unseen: base"),
    ],
)
def test_what_cannot_work_is_refused(shop: Workshop, mixture: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe({**shop.recipe, "mixture": mixture})


def test_without_the_base_among_the_experts_it_is_refused(shop: Workshop) -> None:
    recipe = {**shop.recipe, "experts": shop.recipe["experts"][:BASE]}
    with pytest.raises(RecipeError, match=r"mixture\.unseen: the base is not in the list of experts"):
        parse_recipe({**recipe, "mixture": {"unseen": "base", "router": {"fit": "lexical"}}})


def test_a_config_that_names_an_expert_that_is_not_there_is_refused(shop: Workshop) -> None:
    checkpoint = build(shop, "WRONG")
    path = checkpoint.folder / "config.json"
    config = json.loads(path.read_text())
    for place in (BASE + 1, -1, "base", 0.5):
        config["modekit"]["routing"]["unseen"] = place
        path.write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"config\.json does not say what is mixed"):
            open_checkpoint(checkpoint.folder)
